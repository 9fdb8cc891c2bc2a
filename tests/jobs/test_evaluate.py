from __future__ import annotations

import json
import math

import pytest
from tests.cistron.data.corpora import make_corpus
from tests.tiny_models import tiny_evo2

from cistron.config import resolve
from cistron.errors import ConfigError
from cistron.models.checkpoint import save_checkpoint
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2
from cistron_jobs import evaluate
from cistron_jobs.evaluate import EvaluateConfig, run

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "GSHMASMTGGQQMGRDLYDDDDKDRWGS", "MADEEKLPPGWEKRMSRSSGRVYYFNH"] * 4


@pytest.fixture
def model_and_corpus(tmp_path):
    model = Esm2(Esm2Config(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=16))
    model.init_weights(seed=1)
    save_checkpoint(model, tmp_path / "model")
    make_corpus(tmp_path / "corpus", PROTEINS, alphabet="protein")
    return tmp_path


def test_the_table_and_the_file_agree(model_and_corpus, capsys):
    folder = model_and_corpus
    config = {"model": str(folder / "model"), "data": str(folder / "corpus"), "split": "train", "max_length": 30}
    result = run(resolve(EvaluateConfig, {**config, "output": str(folder / "result.json")}))
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["loss"].keys() == result["perplexity"].keys() == {"model", "unigram", "order 0, held-out's own"}
    assert result["loss"]["model"] == pytest.approx(math.log(33), abs=0.3), "an untrained model guesses"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{result['num_tokens']} scored tokens of 12 documents")
    losses = [float(line.split("nats")[0].split()[-1]) for line in printed[1:]]
    assert losses == sorted(losses)
    assert losses == pytest.approx(sorted(result["loss"].values()), abs=1e-4)


def test_another_alphabet_is_refused(model_and_corpus, tmp_path):
    make_corpus(tmp_path / "dna", ["ACGT" * 20])
    with pytest.raises(ConfigError, match="is this the right model for these data"):
        run(
            resolve(EvaluateConfig, {"model": str(tmp_path / "model"), "data": str(tmp_path / "dna"), "split": "train"})
        )


def test_the_protocol_is_printed_and_recorded(model_and_corpus, capsys):
    folder = model_and_corpus
    config = {"model": str(folder / "model"), "data": str(folder / "corpus"), "split": "train", "max_length": 30}
    hidden = run(resolve(EvaluateConfig, {**config, "protocol": "hidden"}))
    published = run(resolve(EvaluateConfig, config))
    assert published["loss"] == run(resolve(EvaluateConfig, {**config, "protocol": "published"}))["loss"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "scored tokens" in line]
    assert printed[0].endswith("protocol hidden: residues behind <mask> only; seed 42")
    assert "protocol published: all selected residues" in printed[1]
    assert (hidden["protocol"], published["protocol"]) == ("hidden", "published")
    assert hidden["settings"]["seed"] == 42
    assert hidden["num_tokens"] < published["num_tokens"]
    assert published["perplexity"]["model"] == math.exp(published["loss"]["model"])


def test_a_dna_model_has_no_protocol(tmp_path):
    save_checkpoint(tiny_evo2(), tmp_path / "model")
    make_corpus(tmp_path / "corpus", ["ACGTTGCA" * 10])
    config = {"model": str(tmp_path / "model"), "data": str(tmp_path / "corpus"), "split": "train"}
    assert run(resolve(EvaluateConfig, config))["protocol"] is None
    with pytest.raises(ConfigError, match="protocol=published is of masked models"):
        run(resolve(EvaluateConfig, {**config, "protocol": "published"}))


@pytest.mark.parametrize(("words", "most"), [({}, 10_000), ({"baseline_samples": None}, None)])
def test_baselines_count_a_bounded_part_of_the_training_split(model_and_corpus, monkeypatch, words, most):
    asked = []

    def counted(train, valid, *, max_samples, order):
        asked.append(max_samples)
        return {}

    monkeypatch.setattr(evaluate, "baseline_losses", counted)
    config = {"model": str(model_and_corpus / "model"), "data": str(model_and_corpus / "corpus"), "split": "train"}
    run(resolve(EvaluateConfig, config | words))
    assert asked == [most]
