"""Baselines and perplexity against slow, separate arithmetic."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tests.cistron.data.corpora import make_corpus

from cistron.data.samples import TrainingSample
from cistron.errors import ConfigError, InputError
from cistron.evaluation.baselines import MarkovChain, markov_entropy, order_zero_entropy, unigram_entropy
from cistron.evaluation.perplexity import baseline_losses, evaluate_corpus, open_plan, read_samples
from cistron.models.checkpoint import save_checkpoint
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2
from cistron.tokenizers import ESM2_TOKENS


def dna_sample(text: str, index: int = 0) -> TrainingSample:
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    targets = np.array([i if chr(i) in "ACGT" else -100 for i in ids[1:]] + [-100], dtype=np.int32)
    return TrainingSample(index, ids, targets, (targets >= 0).astype(np.float32))


def random_dna(seed: int, count: int) -> list[str]:
    letters = random.Random(seed)
    return ["".join(letters.choices("ACGTN", weights=[5, 2, 3, 4, 1], k=letters.randint(2, 40))) for _ in range(count)]


def slow_markov(train: list[str], valid: list[str], order: int) -> float:
    """Count with dictionaries of strings."""
    counts: dict[str, Counter[str]] = {}
    for text in train:
        for i in range(1, len(text)):
            if text[i] not in "ACGT":
                continue
            for k in range(order + 1):
                context = text[max(0, i - k) : i]
                if len(context) == k and "N" not in context:
                    counts.setdefault(context, Counter())[text[i]] += 1
    total, scored = 0.0, 0
    for text in valid:
        for i in range(1, len(text)):
            if text[i] not in "ACGT":
                continue
            context = text[max(0, i - order) : i].rpartition("N")[2]
            seen = counts.get(context, Counter())
            total -= math.log((seen[text[i]] + 1) / (seen.total() + 4))
            scored += 1
    return total / scored


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_markov_chain_equals_counting_strings(order: int) -> None:
    train, valid = random_dna(1, 30), random_dna(2, 10)
    got = markov_entropy(map(dna_sample, train), map(dna_sample, valid), order=order)
    assert got == pytest.approx(slow_markov(train, valid, order), rel=1e-12)


def test_markov_chain_learns_what_a_table_can_know() -> None:
    text = "ACGGT" * 60
    assert markov_entropy([dna_sample(text)], [dna_sample(text)], order=3) < 0.2
    assert MarkovChain(2).fit([dna_sample("ANCG")]) == 2


def test_unigram_counts_hidden_residues_and_no_special_token() -> None:
    ids = {token: i for i, token in enumerate(ESM2_TOKENS)}
    sample = TrainingSample(
        0,
        np.array([ids["<cls>"], ids["<mask>"], ids["A"], ids["A"], ids["<mask>"], ids["<eos>"]], dtype=np.int32),
        np.array([-100, ids["M"], -100, -100, ids["A"], -100], dtype=np.int32),
        np.zeros(6, dtype=np.float32),
    )
    # 25 letters start at one; then M has 2, A has 4, all together 29.
    expected = -(math.log(2 / 29) + math.log(4 / 29)) / 2
    assert unigram_entropy([sample], [sample]) == pytest.approx(expected, rel=1e-12)


def test_order_zero_is_the_entropy_of_the_targets() -> None:
    valid = [dna_sample("AACGT"), dna_sample("CA")]
    shares = np.array([2, 1, 1, 1]) / 5  # Targets A C G T and A.
    assert order_zero_entropy(valid) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    with pytest.raises(InputError, match="no target"):
        order_zero_entropy([dna_sample("ANN")])


def test_evo2_loss_is_the_mean_over_scored_bases(tmp_path) -> None:
    sequences = ["ACGTTGCAacgtNNACGTRAC" * 3, "TTGCA", "ac"]
    make_corpus(tmp_path / "corpus", sequences, row_length=32)
    shape = Evo2Config(
        hidden_size=8,
        layer_pattern="SDH*",
        num_attention_heads=2,
        mlp_size=16,
        num_filter_groups=2,
        hcm_filter_length=8,
        filter_cache_length=32,
        max_length=32,
    )
    model = Evo2(shape).eval()
    got = evaluate_corpus(model, tmp_path / "corpus", "train", max_length=999, token_budget=40)
    total, scored = 0.0, 0
    for text in sequences:
        for start in range(0, len(text), 32):
            row = text[start : start + 32].upper()
            if len(row) < 2:
                continue
            with torch.no_grad():
                chances = model(torch.tensor([list(row.encode())])).logits[0].double().log_softmax(-1)
            for i in range(1, len(row)):
                if row[i] in "ACGT":
                    total -= float(chances[i - 1, ord(row[i])])
                    scored += 1
    assert got.num_tokens == scored
    assert got.loss == pytest.approx(total / scored, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))


def test_esm2_scores_masked_residues_with_fixed_masks(tmp_path) -> None:
    residues = random.Random(0)
    sequences = ["".join(residues.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in (30, 50, 12)]
    make_corpus(tmp_path / "corpus", sequences, alphabet="protein")
    shape = Esm2Config(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16)
    model = Esm2(shape).eval()
    model.init_weights(seed=0)
    first = evaluate_corpus(model, tmp_path / "corpus", "train", max_length=40, seed=3)
    assert first == evaluate_corpus(model, tmp_path / "corpus", "train", max_length=40, seed=3)
    assert first != evaluate_corpus(model, tmp_path / "corpus", "train", max_length=40, seed=4)
    assert 3 <= first.num_tokens <= 40
    plan = open_plan(tmp_path / "corpus", "train", objective="masked", max_length=40, seed=3)
    samples = read_samples(plan, None)
    assert sum(int((sample.targets >= 0).sum()) for sample in samples) == first.num_tokens
    named = baseline_losses(plan, samples, max_samples=None, order=5)
    assert named["order 0, held-out's own"] < named["unigram"] < math.log(25)


def test_published_protocol_equals_hugging_face_on_the_same_masks(tmp_path) -> None:
    """exp(total cross-entropy / number of selected tokens), each protein padded and scored by transformers."""
    transformers = pytest.importorskip("transformers")
    residues = random.Random(4)
    sequences = ["".join(residues.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in (25, 90, 40, 61, 7, 33)]
    make_corpus(tmp_path / "corpus", sequences, alphabet="protein")
    shape = Esm2Config(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32)
    model = Esm2(shape).eval()
    model.init_weights(seed=0)
    save_checkpoint(model, tmp_path / "model")
    settings = {"max_length": 40, "seed": 42, "protocol": "published"}
    got = evaluate_corpus(model, tmp_path / "corpus", "train", token_budget=64, **settings)

    plan = open_plan(tmp_path / "corpus", "train", objective="masked", **settings)
    samples = read_samples(plan, None, protocol="published")
    width = max(len(sample.input_ids) for sample in samples)
    ids, targets = torch.full((6, width), 1), torch.full((6, width), -100)
    attention_mask = torch.zeros(6, width)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.from_numpy(sample.input_ids)
        targets[row, :length] = torch.from_numpy(sample.targets)
        attention_mask[row, :length] = 1
    peer = transformers.EsmForMaskedLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logits = peer(ids, attention_mask=attention_mask).logits.double()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    selected = int((targets >= 0).sum())
    assert got.num_tokens == selected
    assert got.perplexity == pytest.approx(math.exp(total.item() / selected), abs=2e-3)


def test_the_protocols_differ_in_what_counts(tmp_path) -> None:
    residues = random.Random(5)
    make_corpus(
        tmp_path / "corpus",
        ["".join(residues.choices("ACDEFGHIKLMNPQRSTVWY", k=400)) for _ in range(12)],
        alphabet="protein",
    )

    def samples(protocol):
        plan = open_plan(tmp_path / "corpus", "train", objective="masked", max_length=400, seed=42, protocol=protocol)
        return read_samples(plan, None, protocol=protocol)

    hidden, published = samples("hidden"), samples("published")
    for sample in hidden:
        assert (sample.input_ids[sample.targets >= 0] == ESM2_TOKENS.index("<mask>")).all()
    seen = np.concatenate([sample.input_ids[sample.targets >= 0] for sample in published])
    masked = (seen == ESM2_TOKENS.index("<mask>")).mean()
    assert 0.72 < masked < 0.88
    assert len(seen) == pytest.approx(0.15 * 4800, rel=0.15)
    assert sum((sample.targets >= 0).sum() for sample in hidden) < len(seen)
    make_corpus(tmp_path / "dna", ["ACGT" * 9])
    with pytest.raises(ConfigError, match="protocol=published is of masked models"):
        open_plan(tmp_path / "dna", "train", objective="next_token", max_length=9, seed=0, protocol="published")
