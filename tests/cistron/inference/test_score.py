from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2
from torch.nn import functional

from cistron.errors import InputError, SequenceError
from cistron.inference.score import score_sequences

DNA = ["ACGTACGTTGCA", "GGG", "TTACGNacgtRYACGATCGATCGGATCGATTAGC", "CA"]
PROTEINS = ["MKTAYIAKQR", "GSV", "MEEPQSDPSVEPPLSX"]


def cross_entropies(sequence: str, *, bos: bool = False) -> torch.Tensor:
    """An independent reckoning of one DNA sequence, in fp64."""
    ids = torch.tensor([[0] * bos + list(sequence.encode())])
    with torch.no_grad():
        logits = tiny_evo2()(ids).logits[0].double()
    return functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("bos", [False, True])
def test_dna_per_token_scores_are_cross_entropies(bos: bool):
    for sequence, result in zip(DNA, score_sequences(tiny_evo2(), DNA, reduction="none", prepend_bos=bos), strict=True):
        expected = -cross_entropies(sequence, bos=bos).numpy()
        assert result.per_token is not None
        assert result.per_token.dtype == np.float32
        np.testing.assert_allclose(result.per_token, expected, atol=1e-5)
        assert result.num_tokens == len(sequence) - (not bos)
        assert result.score == pytest.approx(expected.sum(), abs=1e-4)


def test_sum_and_mean_agree_with_the_tokens():
    model = tiny_evo2()
    for total, mean in zip(score_sequences(model, DNA, reduction="sum"), score_sequences(model, DNA), strict=True):
        assert total.per_token is None
        assert mean.score == pytest.approx(total.score / total.num_tokens)


@pytest.mark.parametrize("token_budget", [1, 20, 50, 10_000])
def test_scores_do_not_depend_on_the_batch(token_budget: int):
    for model, sequences in ((tiny_evo2(), DNA), (tiny_esm2(), PROTEINS)):
        together = score_sequences(model, sequences, reduction="sum", token_budget=token_budget)
        alone = [score_sequences(model, [sequence], reduction="sum")[0] for sequence in sequences]
        for a, b in zip(together, alone, strict=True):
            assert a.num_tokens == b.num_tokens
            assert a.score == pytest.approx(b.score, abs=1e-5 * b.num_tokens)


@pytest.mark.parametrize("token_budget", [7, 34])
@pytest.mark.parametrize("bos", [False, True])
def test_chunk_borders_change_no_token(token_budget: int, bos: bool):
    model, sequences, options = tiny_evo2(), [DNA[2], "ACGT" * 17, DNA[1]], {"reduction": "none", "prepend_bos": bos}
    whole = score_sequences(model, sequences, **options)
    chunked = score_sequences(model, sequences, token_budget=token_budget, **options)
    for a, b in zip(whole, chunked, strict=True):
        assert a.num_tokens == b.num_tokens == len(a.per_token)
        np.testing.assert_allclose(a.per_token, b.per_token, atol=1e-5)


def test_reverse_complement_by_chunks():
    model, sequence = tiny_evo2(), "AACGTTTGACCATGACGGTA"
    whole, chunked = (
        score_sequences(model, [sequence], reverse_complement=True, token_budget=budget)[0] for budget in (100, 6)
    )
    assert whole.score == pytest.approx(chunked.score, abs=1e-5)


def test_one_nucleotide_has_nothing_to_score_without_a_beginning():
    model = tiny_evo2()
    assert score_sequences(model, ["A"], reduction="sum")[0].score == 0.0
    assert score_sequences(model, ["A", "ACG"], reduction="sum")[0].num_tokens == 0
    assert math.isnan(score_sequences(model, ["A"])[0].score)
    assert score_sequences(model, ["A"], prepend_bos=True)[0].num_tokens == 1


def test_reverse_complement_averages_both_strands():
    model = tiny_evo2()
    forward, backward = score_sequences(model, ["AACGTTTGA", "TCAAACGTT"], reduction="sum")
    both = score_sequences(model, ["AACGTTTGA", "TCAAACGTT"], reduction="sum", reverse_complement=True)
    assert forward.score != pytest.approx(backward.score)
    for result in both:
        assert result.score == pytest.approx((forward.score + backward.score) / 2, abs=1e-5)


def test_vortex_compat_takes_log_probabilities_in_bf16():
    ids = torch.tensor([list(DNA[2].encode())])
    model = tiny_evo2()
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    # Rounded twice: the logits, and the log-probabilities that were reckoned from them in a wider format.
    rounded = logits.bfloat16().double()
    exact = rounded - rounded.exp().sum(-1, keepdim=True).log()
    expected = exact.bfloat16().gather(1, ids[0, 1:, None])[:, 0].float().numpy()
    plain = score_sequences(model, [DNA[2]], reduction="none")[0]
    for token_budget in (1000, 8):
        result = score_sequences(model, [DNA[2]], reduction="none", vortex_compat=True, token_budget=token_budget)[0]
        assert result.per_token is not None
        assert np.array_equal(result.per_token, torch.from_numpy(result.per_token).bfloat16().float().numpy())
        np.testing.assert_allclose(result.per_token, expected, rtol=2**-7)
        assert (result.per_token == expected).mean() > 0.9
        assert not np.array_equal(result.per_token, plain.per_token)


def test_protein_score_is_the_pseudo_log_likelihood():
    model = tiny_esm2()
    for sequence, result in zip(PROTEINS, score_sequences(model, PROTEINS, reduction="none"), strict=True):
        ids = torch.from_numpy(model.tokenizer.encode(sequence))
        expected = []
        for token in range(1, len(ids) - 1):
            masked = ids.clone()
            masked[token] = 32
            with torch.no_grad():
                logits = model(masked[None]).logits[0, token]
            expected.append(-functional.cross_entropy(logits.double(), ids[token]).item())
        np.testing.assert_allclose(result.per_token, expected, atol=1e-5)
        assert result.num_tokens == len(sequence)
        assert result.score == pytest.approx(sum(expected), abs=1e-4)


def test_long_sequences_are_reduced_in_pieces(monkeypatch: pytest.MonkeyPatch):
    options = {"reduction": "none", "vortex_compat": True}
    whole = score_sequences(tiny_evo2(), DNA, **options)
    monkeypatch.setattr("cistron.inference.score._ROWS_PER_SOFTMAX", 5)
    for a, b in zip(whole, score_sequences(tiny_evo2(), DNA, **options), strict=True):
        np.testing.assert_array_equal(a.per_token, b.per_token)


@pytest.mark.parametrize("tied", [True, False])
def test_log_probabilities_of_a_model_in_bf16_are_not_rounded(tied: bool):
    model = tiny_evo2(tie_embeddings=tied).bfloat16()
    ids = torch.tensor([list(DNA[2].encode())])
    with torch.no_grad():
        hidden = model(ids, hidden_states=["final_norm"]).hidden_states["final_norm"][0, :-1]
        logits = hidden.double() @ model.head.double().T
    expected = -functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    result = score_sequences(model, [DNA[2]], reduction="none")[0]
    np.testing.assert_allclose(result.per_token, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([], {}, "the request is empty"),
        (["ACGT", "ACQ"], {}, "sequence 1: letter 'Q' at position 3"),
        (["A" * 257], {}, "sequence 0: 257 nt is longer than the limit of 256"),
        (["ACGT"], {"reduction": "median"}, "reduction must be one of mean, sum, none, got 'median'"),
        (["ACGT"], {"token_budget": 0}, "token_budget must be at least 1"),
        (["ACGT"], {"reverse_complement": True, "reduction": "none"}, "tokens are at different places"),
        (["A", "|d__B|ACGT"], {"reverse_complement": True}, "sequence 1: a phylogenetic tag"),
    ],
)
def test_bad_dna_requests(sequences: list[str], options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        score_sequences(tiny_evo2(), sequences, **options)


@pytest.mark.parametrize("option", ["reverse_complement", "prepend_bos", "vortex_compat"])
def test_dna_options_do_not_apply_to_proteins(option: str):
    with pytest.raises(InputError, match=f"{option} applies to DNA models, and this is esm2"):
        score_sequences(tiny_esm2(), ["MKT"], **{option: True})


def test_a_masked_residue_cannot_be_scored():
    with pytest.raises(SequenceError, match="sequence 1: <mask> at position 3 has no residue to score"):
        score_sequences(tiny_esm2(), ["MKT", "MK<mask>T"])
