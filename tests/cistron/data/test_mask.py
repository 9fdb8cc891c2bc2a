from __future__ import annotations

import numpy as np
import pytest

from cistron.data.mask import IGNORED, mask_tokens
from cistron.errors import ConfigError
from cistron.tokenizers import ProteinTokenizer

MASK = ProteinTokenizer.mask_id


def random_ids(length, seed=0):
    body = np.random.default_rng(seed).integers(4, 24, size=length)
    return np.concatenate([[ProteinTokenizer.cls_id], body, [ProteinTokenizer.eos_id]])


def test_statistics_are_those_of_one_draw():
    length = 200_000
    ids = random_ids(length)
    input_ids, targets = mask_tokens(ids, rng=np.random.default_rng(1))
    chosen = targets != IGNORED
    n = chosen.sum()
    assert n / length == pytest.approx(0.15, abs=0.004)
    masked = (input_ids == MASK)[chosen].mean()
    same = (input_ids == ids)[chosen].mean()
    # A random residue equals the old one in 1 of 20 cases, so 10 % random show as 9.5 % changed.
    assert masked == pytest.approx(0.80, abs=0.01)
    assert same == pytest.approx(0.105, abs=0.008)
    assert 1 - masked - same == pytest.approx(0.095, abs=0.008)


def test_replacements_are_the_20_standard_residues_in_equal_shares():
    ids = np.full(300_000, 29)  # "." is no residue that could be drawn.
    input_ids, targets = mask_tokens(ids, rng=np.random.default_rng(2), probability=1.0)
    assert (targets == 29).all()
    replaced = input_ids[(input_ids != 29) & (input_ids != MASK)]
    counts = np.bincount(replaced, minlength=33)
    assert set(np.flatnonzero(counts)) == set(range(4, 24))
    expected = len(replaced) / 20
    assert ((counts[4:24] - expected) ** 2 / expected).sum() < 19 + 5 * 6.2


def test_replacements_from_the_whole_vocabulary():
    ids = np.full(300_000, 29)
    input_ids, targets = mask_tokens(ids, rng=np.random.default_rng(2), probability=1.0, replacement="vocabulary")
    assert (targets == 29).all()
    counts = np.bincount(input_ids, minlength=33)
    # Each of 33 tokens for 1 in 330 positions, besides what is masked or left.
    others = np.delete(counts, [29, MASK])
    expected = len(ids) / 330
    assert ((others - expected) ** 2 / expected).sum() < 31 + 5 * 7.9
    assert counts[MASK] / len(ids) == pytest.approx(0.8 + 0.1 / 33, abs=0.004)


def test_positions_without_a_target_are_untouched():
    ids = random_ids(5000)
    input_ids, targets = mask_tokens(ids, rng=np.random.default_rng(3))
    untouched = targets == IGNORED
    assert (input_ids[untouched] == ids[untouched]).all()
    assert (targets[~untouched] == ids[~untouched]).all()


def test_special_tokens_are_never_chosen():
    ids = np.tile([0, 1, 2, 3, 32, 5], 500)
    input_ids, targets = mask_tokens(ids, rng=np.random.default_rng(4), probability=1.0)
    special = ids != 5
    assert (targets[special] == IGNORED).all()
    assert (input_ids[special] == ids[special]).all()
    assert (targets[~special] == 5).all()


def test_every_sequence_with_a_residue_has_a_target():
    for seed in range(200):
        _, targets = mask_tokens(random_ids(1, seed), rng=np.random.default_rng(seed), probability=0.01)
        assert (targets != IGNORED).tolist() == [False, True, False]
    _, targets = mask_tokens(np.array([0, 32, 2]), rng=np.random.default_rng(0))
    assert (targets == IGNORED).all()


def test_outcome_follows_the_generator():
    ids = random_ids(300)
    first, again, other = (mask_tokens(ids, rng=np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1])
def test_bad_probability(probability):
    with pytest.raises(ConfigError, match=str(probability)):
        mask_tokens(random_ids(4), rng=np.random.default_rng(0), probability=probability)
