from __future__ import annotations

import random

import pytest
import torch
from tests.tiny_models import tiny_evo2

from cistron.inference.prefix import Segment, shared_prefix_sums, shared_segments

MODEL = tiny_evo2()


def edited(source: random.Random, base: str) -> str:
    place, removed = source.randrange(len(base)), source.choice([0, 1, 1, 3])
    inserted = "".join(source.choices("ACGTN", k=source.choice([0, 1, 1, 4])))
    return base[:place] + inserted + base[place + removed :]


def related_sequences(source: random.Random) -> list[str]:
    """Edits of one sequence, its beginnings, and strangers."""
    base = "".join(source.choices("ACGT", k=source.randint(2, 120)))
    found = {base, base[:1], base[: len(base) // 2], *("".join(source.choices("ACGT", k=k)) for k in (1, 2, 60))}
    found |= {edited(source, base) for _ in range(8)} - {""}
    order = sorted(found)
    source.shuffle(order)
    return order


def independent(sequence: str) -> float:
    """Log-likelihood by one plain pass."""
    ids = torch.from_numpy(MODEL.tokenizer.encode(sequence))[None]
    with torch.no_grad():
        log_probs = MODEL(ids).logits.double().log_softmax(-1)[0, :-1]
    return log_probs.gather(-1, ids[0, 1:, None]).sum().item()


def walk(segment: Segment, start: int = 0) -> list[tuple[int, int]]:
    """Check that segments join, and return (sequence, length) of each leaf."""
    assert segment.start == start
    assert segment.stop > start or not segment.children
    if not segment.children:
        return [(segment.sequence, segment.stop)]
    leaves = [leaf for child in segment.children for leaf in walk(child, segment.stop)]
    assert segment.reach == max(length for _, length in leaves)
    return leaves


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("least_shared", "token_budget"), [(1, 16_384), (8, 40), (32, 300)])
def test_shared_beginnings_change_no_score(seed: int, least_shared: int, token_budget: int):
    sequences = related_sequences(random.Random(seed))
    sums = shared_prefix_sums(MODEL, sequences, least_shared=least_shared, token_budget=token_budget)
    assert sums.tolist() == pytest.approx([independent(sequence) for sequence in sequences], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("least_shared", [1, 5, 40])
def test_the_tree_holds_every_sequence_and_no_beginning_twice(least_shared: int):
    for seed in range(20):
        sequences = related_sequences(random.Random(seed))
        trees = shared_segments(sequences, least_shared=least_shared)
        leaves = [leaf for tree in trees for leaf in walk(tree)]
        assert sorted(leaves) == [(index, len(sequence)) for index, sequence in enumerate(sequences)]
        beginnings = {sequence[: end + 1] for sequence in sequences for end in range(len(sequence))}
        run = sum(tree.num_tokens for tree in trees)
        # One node of the trie of all letters is one token; a fork may come up to `least_shared` - 1 tokens too early.
        assert len(beginnings) <= run <= len(beginnings) + (least_shared - 1) * len(sequences)


def test_the_model_runs_the_tokens_of_the_tree_and_no_more():
    base = "".join(random.Random(0).choices("ACGT", k=200))
    sequences = [base] + [base[:100] + letter + base[101:] for letter in "ACGT" if letter != base[100]]
    model = tiny_evo2()
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].numel()))
    shared_prefix_sums(model, sequences, token_budget=150)
    assert sum(lengths) == 100 + 4 * 100


def test_many_forks_of_one_window_keep_the_tree_shallow():
    base = "".join(random.Random(0).choices("ACGT", k=4000))
    sequences = [base[:place] + "N" + base[place + 1 :] for place in range(0, 4000, 7)]
    level = trees = shared_segments(sequences, least_shared=1)
    depth = 0
    while level:
        depth, level = depth + 1, [child for segment in level for child in segment.children]
    assert depth <= 130
    assert sum(tree.num_tokens for tree in trees) < 0.55 * sum(map(len, sequences))


def test_no_sequences():
    assert shared_segments([]) == []
    assert shared_prefix_sums(MODEL, []).tolist() == []
