from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.score import score_sequences
from cistron.inference.variants import Variant, score_variants, variant_windows

CONTIG = "".join(random.Random(1).choices("ACGT", k=120))
WILD_TYPE = "MKTAYIAKQRQISF"


@dataclass
class Line:
    """What a VCF reader of another package might yield."""

    chrom: str
    pos: int
    ref: str
    alt: str


def other(letter: str) -> str:
    return "ACGT"[("ACGT".index(letter) + 1) % 4]


def test_dna_score_is_the_change_in_log_likelihood():
    model = tiny_evo2()
    variants = [("chr1", pos, CONTIG[pos - 1], other(CONTIG[pos - 1])) for pos in (1, 50, 60, 120)]
    variants.append(("chr1", 50, CONTIG[49], other(other(CONTIG[49]))))
    variants.append(("chr1", 70, CONTIG[69:72], CONTIG[69]))
    variants.append(("chr1", 70, CONTIG[69], CONTIG[69] + "TTT"))
    table = score_variants(model, variants, {"chr1": CONTIG}, window=40)
    columns = ["chrom", "pos", "ref", "alt", "ref_score", "alt_score", "score", "window_letters", "ambiguous_letters"]
    assert table.column_names == columns
    for (_, pos, ref, alt), row in zip(variants, table.to_pylist(), strict=True):
        assert (row["pos"], row["ref"], row["alt"]) == (pos, ref, alt)
        left, right = max(0, pos - 1 - 20), pos - 1 + 20 - max(0, len(alt) - len(ref))
        before, after = CONTIG[left : pos - 1], CONTIG[pos - 1 + len(ref) : right]
        expected = [
            score_sequences(model, [before + allele + after], reduction="sum")[0].score for allele in (ref, alt)
        ]
        assert [row["ref_score"], row["alt_score"]] == pytest.approx(expected, abs=1e-4)
        assert row["score"] == pytest.approx(row["alt_score"] - row["ref_score"])


def random_variants(source: random.Random, contig: str, count: int) -> list[tuple[str, int, str, str]]:
    """Substitutions of one and several letters, insertions and deletions, some at one place, some at the ends."""
    places = [1, 2, len(contig), *(source.randint(1, len(contig)) for _ in range(count // 2))]
    found = []
    for _ in range(count):
        pos = source.choice(places)
        ref = contig[pos - 1 : pos - 1 + source.choice([1, 1, 2, 5])]
        alt = source.choice([ref[:1], ref + "ACG", "".join(source.choices("ACGT", k=len(ref))), "T"])
        found.append(("c", pos, ref, alt))
    return found


@pytest.mark.parametrize(("window", "reverse_complement"), [(2, False), (33, False), (64, True), (256, True)])
def test_shared_prefixes_give_the_independent_scores(window: int, reverse_complement: bool):
    model, source = tiny_evo2(), random.Random(window)
    short = "".join(source.choices("ACGTN", k=70))
    variants = random_variants(source, short, 30)
    variants = [variant for variant in variants if max(map(len, variant[2:])) <= window - window // 2]
    table = score_variants(model, variants, {"c": short}, window=window, reverse_complement=reverse_complement)
    for variant, row in zip(variants, table.to_pylist(), strict=True):
        pair = variant_windows(Variant(*variant), short, window=window)
        alone = [
            score_sequences(model, [sequence], reduction="sum", reverse_complement=reverse_complement)[0].score
            for sequence in pair
        ]
        assert row["score"] == pytest.approx(alone[1] - alone[0], abs=1e-5), variant


def test_one_reference_window_is_read_once():
    model, counts = tiny_evo2(), []

    def count(_: object, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        counts.append(args[0].numel() if mask is None else int(mask.sum()))

    model.register_forward_pre_hook(count, with_kwargs=True)
    ref = CONTIG[59]
    alts = [("c", 60, ref, alt) for alt in "ACGT" if alt != ref]
    score_variants(model, alts, {"c": CONTIG}, window=100)
    assert sum(counts) == 50 + 4 * 50
    counts.clear()
    score_variants(model, alts * 2, {"c": CONTIG}, window=100, reverse_complement=True)
    assert sum(counts) == 50 + 4 * 50 + 49 + 4 * 51


def test_a_window_that_is_short_or_hardly_known_is_told():
    contig = "N" * 30 + CONTIG[30:]
    variants = [("c", np.int64(pos), contig[pos - 1], other(contig[pos - 1])) for pos in (34, len(contig))]
    table = score_variants(tiny_evo2(), variants, {"c": contig}, window=10)
    assert table["window_letters"].to_pylist() == [10, 6]
    assert table["ambiguous_letters"].to_pylist() == [2, 0]


def test_the_window_is_centred_and_cut_at_the_ends():
    contig = "ACGTACGTAC"
    assert variant_windows(Variant("c", 5, "A", "G"), contig, window=4) == ("GTAC", "GTGC")
    assert variant_windows(Variant("c", 1, "A", "G"), contig, window=4) == ("AC", "GC")
    assert variant_windows(Variant("c", 10, "C", "G"), contig, window=4) == ("TAC", "TAG")
    assert variant_windows(Variant("c", 5, "A", "AGG"), contig, window=8) == ("ACGTAC", "ACGTAGGC")


def test_reverse_complement_averages_both_strands():
    model = tiny_evo2()
    ref, alt = variant_windows(Variant("c", 60, CONTIG[59], other(CONTIG[59])), CONTIG, window=30)
    scores = score_sequences(model, [ref, alt], reduction="sum", reverse_complement=True)
    table = score_variants(
        model, [("c", 60, CONTIG[59], other(CONTIG[59]))], {"c": CONTIG}, window=30, reverse_complement=True
    )
    assert table["score"][0].as_py() == pytest.approx(scores[1].score - scores[0].score, abs=1e-4)


def test_soft_masking_and_the_form_of_the_request_change_nothing(tmp_path: Path):
    model = tiny_evo2()
    fasta = tmp_path / "reference.fa"
    fasta.write_text(f">chr0\nAC\n>chr1 soft-masked\n{CONTIG[:60]}\n{CONTIG[60:].lower()}\n")
    ref, alt = CONTIG[69], other(CONTIG[69])
    expected = score_variants(model, [("chr1", 70, ref, alt)], {"chr1": CONTIG}, window=32)
    for variant in (Line("chr1", 70, ref, alt), ["chr1", 70, ref.lower(), alt.lower()]):
        for reference in (fasta, str(fasta)):
            table = score_variants(model, [variant], reference, window=32)
            assert table["score"].to_pylist() == expected["score"].to_pylist()


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ([], {}, "variants: the request is empty"),
        ("chr1", {}, "give a list"),
        ([("chr1", 1, "A")], {}, r"variant 0: must be \(chrom, pos, ref, alt\)"),
        ([("chr1", "7", "A", "C")], {}, "variant 0: pos must be a whole number, got '7'"),
        ([("chr1", 1, "A", "<DEL>")], {}, r"variant 0 \(chr1:1\): alt must be letters of ACGTN, got '<DEL>'"),
        ([("chr1", 1, "A", "*")], {}, "alt must be letters"),
        ([("chr1", 1, "A", "C,G")], {}, "alt must be letters of ACGTN, got 'C,G'"),
        ([("chr1", 1, "A", None)], {}, "alt must be letters of ACGTN, got None"),
        ([("chr1", 1, "", "A")], {}, "ref must be letters"),
        ([("chr9", 1, "A", "C")], {}, "the reference has no sequence named 'chr9'"),
        ([("chr1", 0, "A", "C")], {}, "chr1:0 A>C: outside chr1, which has 120 letters"),
        ([("chr1", 121, "A", "C")], {}, "chr1:121 A>C: outside chr1"),
        ([("chr1", 3, other(CONTIG[2]), "N")], {}, f"the reference has '{CONTIG[2]}' there, not"),
        ([("chr1", 3, CONTIG[2:50], "N")], {"window": 10}, "alleles do not fit a window of 10"),
        ([("chr1", 3, CONTIG[2], "N")], {"window": 500}, "window must be from 2 to the model's limit of 256, got 500"),
        ([("chr1", 3, CONTIG[2], "N")], {"strategy": "wt-marginal"}, "strategy 'wt-marginal' is for proteins"),
        ([("chr1", 3, CONTIG[2], "N")], {"token_budget": 0}, "token_budget"),
    ],
)
def test_bad_dna_requests(variants: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        score_variants(tiny_evo2(), variants, {"chr1": CONTIG}, **{"window": 40, **options})


def letter_log_probs(sequence: str, position: int, *, masked: bool) -> torch.Tensor:
    """Independent log-probabilities of one sequence at a 0-based position."""
    model = tiny_esm2()
    ids = torch.from_numpy(model.tokenizer.encode(sequence))[None]
    if masked:
        ids[0, 1 + position] = 32
    with torch.no_grad():
        return model(ids).logits[0, 1 + position].double().log_softmax(-1)


@pytest.mark.parametrize("strategy", ["masked-marginal", "wt-marginal"])
@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_marginals_add_up_over_substitutions(strategy: str, token_budget: int):
    encode = tiny_esm2().tokenizer.encode
    variants = ["K2A", "A4A", "Y5W:R10G", "F14M"]
    table = score_variants(tiny_esm2(), variants, WILD_TYPE, strategy=strategy, token_budget=token_budget)
    assert table.column_names == ["variant", "score"]
    for variant, row in zip(variants, table.to_pylist(), strict=True):
        expected = 0.0
        for word in variant.split(":"):
            log_probs = letter_log_probs(WILD_TYPE, int(word[1:-1]) - 1, masked=strategy == "masked-marginal")
            expected += (log_probs[encode(word[-1])[1]] - log_probs[encode(word[0])[1]]).item()
        assert row["variant"] == variant
        assert row["score"] == pytest.approx(expected, abs=1e-5)


def test_the_default_strategy_is_masked_marginal():
    model = tiny_esm2()
    default, masked, wild = (
        score_variants(model, ["K2A"], WILD_TYPE, strategy=strategy)["score"][0].as_py()
        for strategy in (None, "masked-marginal", "wt-marginal")
    )
    assert default == masked != wild


def test_masked_residues_of_long_proteins_are_seen_in_a_window_around_each_position():
    encode = tiny_esm2().tokenizer.encode
    table = score_variants(tiny_esm2(), ["M1A:K8G:F14M"], WILD_TYPE, window=6)
    expected = 0.0
    for word, start in (("M1A", 0), ("K8G", 4), ("F14M", 8)):
        part = WILD_TYPE[start : start + 6]
        log_probs = letter_log_probs(part, int(word[1:-1]) - 1 - start, masked=True)
        expected += (log_probs[encode(word[-1])[1]] - log_probs[encode(word[0])[1]]).item()
    assert table["score"][0].as_py() == pytest.approx(expected, abs=1e-5)


def test_pseudo_ppl_is_the_change_in_pseudo_log_likelihood():
    table = score_variants(tiny_esm2(), ["K2A:F14M", "M1M"], WILD_TYPE, strategy="pseudo-ppl")
    mutant, wild = score_sequences(tiny_esm2(), ["MATAYIAKQRQISM", WILD_TYPE], reduction="sum")
    assert table["score"].to_pylist() == pytest.approx([mutant.score - wild.score, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("variants", "reference", "options", "message"),
    [
        ([], WILD_TYPE, {}, "the request is empty"),
        (["K2"], WILD_TYPE, {}, r"variant 0 \('K2'\): cannot read 'K2'; write it as 'A23T'"),
        (["K2A", "K0A"], WILD_TYPE, {}, r"variant 1 \('K0A'\): K0A is before the beginning; positions count from 1"),
        (["K2J"], WILD_TYPE, {}, "cannot read 'K2J'"),
        (["K15A"], WILD_TYPE, {}, "K15A is past the end, at 14 residues"),
        (["A2K"], WILD_TYPE, {}, "the wild type has K at 2, not A"),
        (["K2A:K2G"], WILD_TYPE, {}, "replaces position 2 twice"),
        ([("c", 1, "A", "C")], WILD_TYPE, {}, "variant 0: must be a string such as 'A23T'"),
        (["K2A"], {"a": WILD_TYPE}, {}, "reference must be the wild-type protein sequence, got a dict"),
        (["K2A"], WILD_TYPE, {"strategy": "delta"}, "strategy must be one of masked-marginal, wt-marginal, pseudo-ppl"),
        (["K2A"], Path("wild_type.fa"), {}, "reference must be the wild-type protein sequence, got a PosixPath"),
        (["K2A"], WILD_TYPE, {"window": 0}, "window must be at least 1 residue"),
        (["K2A"], WILD_TYPE, {"window": 40.0}, "window must be a whole number of residues, got 40.0"),
        (["K2A"], WILD_TYPE, {"reverse_complement": True}, "reverse_complement applies to DNA models"),
    ],
)
def test_bad_protein_requests(variants: list[Any], reference: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        score_variants(tiny_esm2(), variants, reference, **options)


def test_a_wild_type_that_is_no_protein():
    with pytest.raises(SequenceError, match=r"reference: letter '\.' at position 9 .*; remove alignment gaps"):
        score_variants(tiny_esm2(), ["P1A"], "proteins.fa")
    with pytest.raises(SequenceError, match=r"reference: letter '\*' at position 4"):
        score_variants(tiny_esm2(), ["K2A"], "MKT*")


def test_the_default_window_is_no_longer_than_the_model_reads():
    model = tiny_evo2()
    variant = ("c", 60, CONTIG[59], other(CONTIG[59]))
    shortened = score_variants(model, [variant], {"c": CONTIG}, window=model.config.max_length)
    assert score_variants(model, [variant], {"c": CONTIG}).equals(shortened)
