from __future__ import annotations

import numpy as np
import pytest

from cistron.errors import InputError
from cistron.evaluation.variant_effect import CONSEQUENCES, consequence_scores, discrimination

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: nothing to compare with")


def case(seed: int, size: int, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Random labels and scores, with ties if there are few levels."""
    generator = np.random.default_rng(seed)
    labels = generator.random(size) < 0.3
    labels[:2] = True, False
    scores = generator.normal(size=size) + labels
    return labels, scores if levels is None else np.round(scores * levels / 4)


@pytest.mark.parametrize("levels", [None, 3, 20])
@pytest.mark.parametrize(("seed", "size"), [(0, 2), (1, 9), (2, 400)])
def test_metrics_and_curves_are_those_of_scikit_learn(seed: int, size: int, levels: int | None):
    labels, scores = case(seed, size, levels)
    found = discrimination(labels, scores, resamples=10)
    assert found.auroc.value == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert found.auprc.value == pytest.approx(metrics.average_precision_score(labels, scores))
    false_rate, true_rate, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert found.roc.x == pytest.approx(false_rate)
    assert found.roc.y == pytest.approx(true_rate)
    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    assert found.pr.y == pytest.approx(precision[-2::-1])
    assert found.pr.x == pytest.approx(recall[-2::-1])
    assert (found.num_positives, found.num_negatives) == (labels.sum(), (~labels).sum())


@pytest.mark.parametrize("levels", [None, 5])
def test_the_bootstrap_is_that_of_resampled_variants(levels: int | None):
    labels, scores = case(3, 150, levels)
    found = discrimination(labels, scores, resamples=4000, seed=1)
    generator = np.random.default_rng(2)
    naive = []
    for _ in range(400):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(labels == value), (labels == value).sum()) for value in (0, 1)]
        )
        pair = labels[rows], scores[rows]
        naive.append((metrics.roc_auc_score(*pair), metrics.average_precision_score(*pair)))
    low, high = np.quantile(naive, [0.025, 0.975], axis=0)
    for place, estimate in enumerate((found.auroc, found.auprc)):
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.low, estimate.high) == pytest.approx((low[place], high[place]), abs=0.025)


def test_the_seed_fixes_the_interval():
    labels, scores = case(4, 60, None)
    first, again, other = (discrimination(labels, scores, resamples=150, seed=seed).auroc for seed in (5, 5, 6))
    assert first == again
    assert first.value == other.value
    assert first.low != other.low


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([True, True], [1.0, 2.0], "both classes are needed: 2 of 2 are positive"),
        ([False], [1.0], "both classes are needed"),
        ([True, False], [1.0], "must be lists of one length"),
        ([True, False, True], [1.0, 2.0, float("nan")], "score 2 is not finite"),
    ],
)
def test_bad_requests(labels: list[bool], scores: list[float], message: str):
    with pytest.raises(InputError, match=message):
        discrimination(labels, scores)


def test_consequences_have_an_order():
    scores = consequence_scores(["Nonsense", "Synonymous", "Missense", "Nonsense"])
    assert scores[0] == scores[3] > scores[2] > scores[1]
    assert scores[0] == max(consequence_scores(CONSEQUENCES))
    with pytest.raises(InputError, match="'Frameshift' has no place in the order"):
        consequence_scores(["Missense", "Frameshift"])
