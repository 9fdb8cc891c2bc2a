from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
from tests.tiny_models import tiny_esm2

from cistron.errors import InputError
from cistron.inference.protein_windows import centred_start, num_windows, overlapping_windows, residues_per_window


@pytest.mark.parametrize(("length", "window"), [(5, 5), (3, 8), (6, 5), (40, 7), (41, 8), (9, 1), (2045, 1022)])
def test_windows_cover_every_residue_with_weights_that_sum_to_one(length: int, window: int):
    windows = overlapping_windows(length, window=window)
    assert num_windows(length, window=window) == len(windows)
    total = np.zeros(length)
    for part in windows:
        assert part.stop - part.start == min(window, length)
        total[part.start : part.stop] += 1 if part.weights is None else part.weights
    np.testing.assert_allclose(total, 1)
    assert sum(part.share for part in windows) == pytest.approx(length)
    assert (len(windows) == 1) == (length <= window)


def test_the_weights_of_a_published_window():
    """At 1,024 tokens: windows 511 apart, weights 1 / (1 + exp((128 - d) / 16)) towards a cut."""
    first, second, third = overlapping_windows(2044, window=1022)
    assert (first.start, second.start, third.start) == (0, 511, 1022)
    for residue in (511, 600, 700, 1021):
        from_right, from_left = 1022 - residue, residue - 511 + 1
        a, b = (1 / (1 + math.exp((128 - distance) / 16)) for distance in (from_right, from_left))
        far = 1 / (1 + math.exp((128 - (1533 - residue)) / 16))  # the second window is cut on its right, too
        assert first.weights is not None
        assert first.weights[residue] == pytest.approx(a / (a + b * far))
    assert np.all(first.weights[:511] == 1), "the protein's own end is no cut"


def test_a_window_is_centred_as_far_as_the_ends_allow():
    rng = random.Random(0)
    for _ in range(100):
        length, window = rng.randint(1, 30), rng.randint(1, 12)
        for position in range(length):
            start = centred_start(position, length=length, window=window)
            assert 0 <= start <= position < min(start + window, length)
            if window // 2 <= position < length - window // 2 - 1 and length > window:
                assert start == position - window // 2


def test_the_default_window_is_what_the_model_was_trained_on(caplog: pytest.LogCaptureFixture):
    model = tiny_esm2(max_position_embeddings=14)
    caplog.set_level(logging.INFO)
    assert residues_per_window(model, None, longest=10) == 10
    assert not caplog.records
    assert residues_per_window(model, None, longest=11) == 10
    assert "proteins of up to 11 residues are read in windows of 10" in caplog.text
    assert residues_per_window(model, 50, longest=12) == 50
    assert "esm2 reads 12 residues at once, but was trained on 10" in caplog.text


def test_a_window_without_a_residue_is_refused():
    with pytest.raises(InputError, match="window must be at least 1 residue, got 0"):
        residues_per_window(tiny_esm2(), 0, longest=5)
