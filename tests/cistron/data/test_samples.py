from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from tests.cistron.data.corpora import make_corpus

from cistron.data.mask import IGNORED
from cistron.data.plan import SamplePlan
from cistron.data.samples import from_table, held_out_samples, iterate_samples, next_token, to_table
from cistron.errors import InputError
from cistron.tokenizers import ProteinTokenizer


def stored(text):
    return np.frombuffer(text.encode(), dtype=np.uint8)


def letters(targets):
    return "".join("." if target == IGNORED else chr(target) for target in targets)


def test_next_token_shifts_upper_cases_and_weighs():
    input_ids, targets, weights = next_token(stored("ACgtNAR"), 0, 7, lowercase_weight=0.1)
    assert bytes(input_ids.tolist()) == b"ACGTNAR"
    assert letters(targets) == "CGT.A.."
    assert weights.tolist() == pytest.approx([1, 0.1, 0.1, 0, 1, 0, 0])


def test_next_token_window_begins_anywhere():
    row = stored("ACGTACGTAC")
    input_ids, targets, _ = next_token(row, 4, 3, lowercase_weight=0.1)
    assert bytes(input_ids.tolist()) == b"ACG"
    assert letters(targets) == "CG."


def test_tags_and_control_characters_are_not_learnt():
    row = stored("A|d__CAT;|GT@C#G")
    _, targets, weights = next_token(row, 0, len(row), lowercase_weight=0.1)
    assert letters(targets) == ".........GT.C.G."
    assert ((weights > 0) == (targets != IGNORED)).all()


def test_a_window_that_begins_inside_a_tag_knows_it():
    row = stored("A|CATCAT|GT")
    _, targets, _ = next_token(row, 4, 7, lowercase_weight=0.1)
    assert letters(targets) == "....GT."


def slow_next_token(text, weight):
    """Independent of numpy: walk the letters one by one."""
    inside, rows = False, []
    for position, letter in enumerate(text):
        inside ^= letter == "|"
        rows.append((letter, inside or letter == "|", position))
    targets, weights = [], []
    for letter, hidden, _ in rows[1:]:
        scored = letter in "ACGTacgt" and not hidden
        targets.append(ord(letter.upper()) if scored else IGNORED)
        weights.append((weight if letter.islower() else 1.0) if scored else 0.0)
    return [ord(letter.upper()) for letter in text], [*targets, IGNORED], [*weights, 0.0]


def test_next_token_equals_a_slow_walk():
    rng = np.random.default_rng(0)
    for _ in range(30):
        text = "".join(rng.choice(list("ACGTacgtNnRy@#|"), size=int(rng.integers(2, 60))))
        input_ids, targets, weights = next_token(stored(text), 0, len(text), lowercase_weight=0.25)
        expected = slow_next_token(text, 0.25)
        assert input_ids.tolist() == expected[0]
        assert targets.tolist() == expected[1]
        assert weights.tolist() == expected[2]


def test_dna_samples_hold_the_letters_of_the_file(tmp_path):
    rng = np.random.default_rng(1)
    sequences = ["".join(rng.choice(list("ACGTacgtN"), size=int(size))) for size in rng.integers(5, 250, size=8)]
    index = make_corpus(tmp_path / "corpus", sequences)
    plan = SamplePlan(index, objective="next_token", max_length=100, seed=2)
    # max_length is the row length here, so samples are the rows.
    expected = [s[i : i + 100].upper() for s in sequences for i in range(0, len(s), 100) if len(s) - i > 1]
    got = [bytes(sample.input_ids.tolist()).decode() for sample in iterate_samples(plan, range(plan.samples_per_epoch))]
    assert sorted(got) == sorted(expected)


def test_protein_samples(tmp_path):
    sequences = ["MKTAYIAKQRQISFVKSHFSRQ", "MGLSDGEWQLVLNVWGKVEADI", "MVLSPADKTNVKAAW"]
    plan = SamplePlan(
        make_corpus(tmp_path / "c", sequences, alphabet="protein"), objective="masked", max_length=22, seed=0
    )
    tokenizer = ProteinTokenizer()
    whole = []
    for sample in iterate_samples(plan, range(3)):
        chosen = sample.targets != IGNORED
        ids = np.where(chosen, sample.targets, sample.input_ids)
        whole.append(tokenizer.decode(ids))
        assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.eos_id)
        assert chosen.any()
        assert (sample.weights == chosen).all()
        assert (sample.input_ids.dtype, sample.targets.dtype, sample.weights.dtype) == (np.int32, np.int32, np.float32)
    assert sorted(whole) == sorted(sequences)


def test_crops_carry_special_tokens_only_at_true_ends(tmp_path):
    rng = np.random.default_rng(3)
    sequence = "".join(rng.choice(list("ACDEFGHIKL"), size=40))
    plan = SamplePlan(
        make_corpus(tmp_path / "c", [sequence], alphabet="protein"), objective="masked", max_length=10, seed=0
    )
    tokenizer = ProteinTokenizer()
    seen = set()
    for number, sample in enumerate(iterate_samples(plan, range(200))):
        start = plan.locate(number).start
        ids = np.where(sample.targets != IGNORED, sample.targets, sample.input_ids)
        assert tokenizer.decode(ids) == sequence[start : start + 10]
        assert (ids[0] == tokenizer.cls_id) == (start == 0)
        assert (ids[-1] == tokenizer.eos_id) == (start == 30)
        seen.add(start)
    assert {0, 30} < seen


def test_crops_keep_their_ends_when_asked(tmp_path):
    index = make_corpus(tmp_path / "c", ["MKTAYIAKQRQISFVKSHFSRQLEERLG" * 3], alphabet="protein")
    plan = SamplePlan(index, objective="masked", max_length=10, seed=0, keep_ends=True)
    for sample in iterate_samples(plan, range(50)):
        assert len(sample.input_ids) == plan.max_tokens == 12
        assert (sample.input_ids[0], sample.input_ids[-1]) == (ProteinTokenizer.cls_id, ProteinTokenizer.eos_id)


def test_random_replacements_follow_the_plan(tmp_path):
    index = make_corpus(tmp_path / "c", ["MKTAYIAKQRQISFVKSHFSRQLEERLG" * 40], alphabet="protein")

    def replaced(replacement):
        plan = SamplePlan(
            index, objective="masked", max_length=2000, seed=0, mask_probability=1.0, replacement=replacement
        )
        (sample,) = iterate_samples(plan, range(1))
        inside = sample.input_ids[1:-1]
        return set(inside[inside != ProteinTokenizer.mask_id].tolist())

    assert replaced("standard") <= set(range(4, 24)) | {24}
    assert replaced("vocabulary") & {0, 1, 2, 3, 27, 28, 29, 30, 31}


def test_masks_depend_on_seed_and_index_only(tmp_path):
    index = make_corpus(tmp_path / "c", ["MKTAYIAKQRQISFVKSHFSRQ" * 3], alphabet="protein")

    def inputs(seed, indices):
        plan = SamplePlan(index, objective="masked", max_length=66, seed=seed)
        return {sample.sample_index: sample.input_ids.tolist() for sample in iterate_samples(plan, indices)}

    forward, backward = inputs(0, range(6)), inputs(0, reversed(range(6)))
    assert forward == backward
    assert len({tuple(ids) for ids in forward.values()}) == 6
    assert inputs(1, range(6)) != forward


def test_table_round_trip(tmp_path):
    plan = SamplePlan(
        make_corpus(tmp_path / "c", ["ACGTNacgt" * 9, "ACG"]), objective="next_token", max_length=8, seed=0
    )
    samples = list(iterate_samples(plan, range(5, 11)))
    table = pa.concat_tables([to_table(samples[:4]), to_table(samples[4:])])
    assert table.num_rows == 2
    for row, sample in zip(from_table(table), samples, strict=True):
        assert row.sample_index == sample.sample_index
        for name in ("input_ids", "targets", "weights"):
            assert np.array_equal(getattr(row, name), getattr(sample, name))
            assert getattr(row, name).dtype == getattr(sample, name).dtype
    assert [row.sample_index for row in from_table(table.slice(1))] == [9, 10]
    assert from_table(to_table([])) == []


def test_damaged_shard_is_named(tmp_path):
    index = make_corpus(tmp_path / "c", ["ACGT" * 20] * 8)
    plan = SamplePlan(index, objective="next_token", max_length=80, seed=0)
    shard = tmp_path / "c" / "train" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(InputError, match=r"shard-00000\.parquet"):
        list(iterate_samples(plan, range(8)))
    with pytest.raises(InputError, match=r"shard-00000\.parquet: .* bytes, but the index says"):
        index.verify(hashes=True)


def test_verify_finds_a_changed_byte(tmp_path):
    index = make_corpus(tmp_path / "c", ["ACGT" * 20] * 3)
    shard = tmp_path / "c" / "train" / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    index.verify()
    with pytest.raises(InputError, match="sha256 differs"):
        index.verify(hashes=True)


def test_everything_but_the_source_works_without_ray():
    modules = ("commit", "config", "holdout", "index", "mask", "pack", "plan", "rows", "samples", "shards")
    imports = "; ".join(f"import cistron.data.{module}" for module in modules)
    code = f"{imports}; import sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_held_out_proteins_are_scored_behind_masks_only(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEV"] * 40, alphabet="protein")
    plan = SamplePlan(corpus, objective="masked", max_length=64, seed=3)
    count = 0
    for trained, scored in zip(iterate_samples(plan, range(40)), held_out_samples(plan, range(40)), strict=True):
        assert np.array_equal(trained.input_ids, scored.input_ids)
        is_target = scored.targets != IGNORED
        assert np.array_equal(is_target, (trained.targets != IGNORED) & (trained.input_ids == ProteinTokenizer.mask_id))
        assert np.array_equal(scored.targets[is_target], trained.targets[is_target])
        assert np.array_equal(scored.weights > 0, is_target)
        count += int((trained.targets != IGNORED).sum() - is_target.sum())
    assert count > 0, "some training targets are visible, so the two must differ"
