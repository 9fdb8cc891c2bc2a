from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_esm2, tiny_evo2

import cistron
from cistron.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    UnknownNameError,
)
from cistron.models.checkpoint import save_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.manifest import read_manifest, sha256

GOLDEN = Path(__file__).parents[2] / "golden"
EVO2 = GOLDEN / "evo2_tiny.vortex.safetensors"
ESM2 = GOLDEN / "esm2_tiny.fair_esm.safetensors"


@pytest.mark.parametrize(
    ("source", "source_format", "golden"),
    [
        (EVO2, "vortex", "evo2_tiny.golden.safetensors"),
        (GOLDEN / "evo2_tiny_longrope.vortex.safetensors", "vortex", "evo2_tiny_longrope.golden.safetensors"),
        (ESM2, "fair-esm", "esm2_tiny.golden.safetensors"),
    ],
)
def test_a_converted_model_predicts_what_the_reference_predicts(
    source: Path, source_format: str, golden: str, tmp_path: Path
):
    directory = convert_checkpoint(source, tmp_path / "model", source_format=source_format)
    expected = load_file(GOLDEN / golden)
    model = cistron.load_model(directory)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=2e-5, rtol=1e-4)


def test_greedy_generation_is_that_of_the_reference(tmp_path: Path):
    directory = convert_checkpoint(EVO2, tmp_path / "model", source_format="vortex")
    golden = load_file(GOLDEN / "evo2_tiny.golden.safetensors")
    prompt = bytes(golden["prompt_ids"][0].tolist()).decode()
    generation = cistron.generate(cistron.load_model(directory), [prompt], num_tokens=24, top_k=1, allowed=None)[0]
    assert generation.token_ids == golden["greedy_ids"][0].tolist()


def test_provenance_names_the_bytes_that_were_converted(tmp_path: Path):
    directory = convert_checkpoint(EVO2, tmp_path / "model", source_format="vortex")
    assert read_manifest(directory)["provenance"] == {
        "source": EVO2.name,
        "source_format": "vortex",
        "source_files": {EVO2.name: sha256(EVO2)},
    }


@pytest.mark.parametrize(
    ("source", "foreign", "suffix"),
    [(EVO2, "vortex", ".safetensors"), (ESM2, "fair-esm", ".safetensors"), (ESM2, "hf", "")],
)
def test_there_and_back_is_bit_equal(source: Path, foreign: str, suffix: str, tmp_path: Path):
    source_format = "vortex" if source == EVO2 else "fair-esm"
    native = convert_checkpoint(source, tmp_path / "native", source_format=source_format)
    out = convert_checkpoint(native, tmp_path / f"foreign{suffix}", source_format="cistron", target_format=foreign)
    back = convert_checkpoint(out, tmp_path / "back", source_format=foreign)
    before, after = (cistron.load_model(directory).state_dict() for directory in (native, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (native / "config.json").read_text() == (back / "config.json").read_text()


@pytest.mark.parametrize("as_file", [True, False])
def test_the_configuration_of_a_bare_file_is_given_beside_it(as_file: bool, tmp_path: Path):
    weights = tmp_path / "custom.pt"
    torch.save(load_file(EVO2), weights)
    with EVO2.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    settings = header["__metadata__"]["config"]
    (tmp_path / "settings.json").write_text(settings)
    config: Any = tmp_path / "settings.json" if as_file else json.loads(settings)
    directory = convert_checkpoint(weights, tmp_path / "model", source_format="vortex", config=config)
    reference = convert_checkpoint(EVO2, tmp_path / "reference", source_format="vortex")
    assert sha256(directory / "model.safetensors") == sha256(reference / "model.safetensors")


def test_a_bare_file_without_configuration_is_refused(tmp_path: Path):
    torch.save(load_file(EVO2), tmp_path / "custom.pt")
    with pytest.raises(ConfigError, match="config="):
        convert_checkpoint(tmp_path / "custom.pt", tmp_path / "model", source_format="vortex")
    assert [path.name for path in tmp_path.iterdir()] == ["custom.pt"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"source_format": "vortexx"},
            UnknownNameError,
            "source_format: unknown format 'vortexx'; did you mean 'vortex'",
        ),
        (
            {"source_format": "vortex", "target_format": "fairesm"},
            UnknownNameError,
            r"target_format: .*did you mean 'fair-esm'\? \(known: vortex, .* hf, fair-esm, bionemo-te, cistron\)",
        ),
        ({"source_format": "vortex", "target_format": "hf"}, InputError, "hf holds esm models, and .* is evo2"),
        ({"source_format": "vortex", "config": "nowhere.yaml"}, InputError, "config: no such file: nowhere.yaml"),
    ],
)
def test_bad_requests_leave_nothing(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        convert_checkpoint(EVO2, tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source_format", ["vortex", "fair-esm", "hf", "cistron"])
def test_a_missing_source_is_named(source_format: str, tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere.pt", tmp_path / "model", source_format=source_format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target_format", ["cistron", "vortex"])
def test_an_existing_destination_is_kept(target_format: str, tmp_path: Path):
    destination = tmp_path / "model"
    destination.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        convert_checkpoint(EVO2, destination, source_format="vortex", target_format=target_format)
    assert destination.read_text() == "mine"


def test_a_source_that_lacks_a_tensor_leaves_nothing(tmp_path: Path):
    tensors = load_file(ESM2)
    tensors.pop("layers.1.fc2.bias")
    source = tmp_path / "broken.safetensors"
    save_file(tensors, source, metadata={"config": json.dumps({"encoder_layers": 3, "encoder_attention_heads": 4})})
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc2\.bias"):
        convert_checkpoint(source, tmp_path / "model", source_format="fair-esm")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(self.path), "boom")


@pytest.mark.parametrize("source_format", ["vortex", "fair-esm"])
def test_a_pickle_runs_no_code_unless_trusted(source_format: str, tmp_path: Path):
    source = tmp_path / "evil.pt"
    torch.save({"model": {}, "bomb": Bomb(str(tmp_path / "boom"))}, source, pickle_module=pickle)
    with pytest.raises(CheckpointError, match="trust_pickle=true"):
        convert_checkpoint(source, tmp_path / "model", source_format=source_format)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]
    with pytest.raises((CheckpointError, ConfigError)):
        convert_checkpoint(source, tmp_path / "model", source_format=source_format, trust_pickle=True)
    assert (tmp_path / "boom").exists()


def test_native_to_native_reshards_and_verifies(tmp_path: Path):
    native = save_checkpoint(tiny_evo2(), tmp_path / "native", max_shard_bytes=20_000)
    copy = convert_checkpoint(native, tmp_path / "copy", source_format="cistron")
    assert (copy / "model.safetensors").exists()
    (native / "config.json").write_text((native / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert_checkpoint(native, tmp_path / "again", source_format="cistron")


def test_esm2_cannot_become_vortex(tmp_path: Path):
    native = save_checkpoint(tiny_esm2(), tmp_path / "native")
    with pytest.raises(InputError, match="vortex holds evo2 models"):
        convert_checkpoint(native, tmp_path / "out.pt", source_format="cistron", target_format="vortex")


@pytest.mark.parametrize(("source", "foreign"), [(EVO2, "vortex"), (ESM2, "fair-esm")])
def test_a_file_is_known_by_its_content(source: Path, foreign: str, tmp_path: Path):
    native = convert_checkpoint(source, tmp_path / "native", source_format=foreign)
    out = convert_checkpoint(native, tmp_path / "without_suffix", source_format="cistron", target_format=foreign)
    back = convert_checkpoint(out, tmp_path / "back", source_format=foreign)
    assert sha256(back / "model.safetensors") == sha256(native / "model.safetensors")


def test_vortex_reads_the_pickle_that_is_written(tmp_path: Path):
    native = convert_checkpoint(EVO2, tmp_path / "native", source_format="vortex")
    out = convert_checkpoint(native, tmp_path / "out" / "model.pt", source_format="cistron", target_format="vortex")
    assert list(out.parent.iterdir()) == [out]
    expected, got = load_file(EVO2), torch.load(out, weights_only=True)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_fair_esm_reads_the_two_pickles_that_are_written(tmp_path: Path):
    out = convert_checkpoint(ESM2, tmp_path / "esm2_x.pt", source_format="fair-esm", target_format="fair-esm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["esm2_x-contact-regression.pt", "esm2_x.pt"]
    back = convert_checkpoint(out, tmp_path / "back", source_format="fair-esm")
    native = convert_checkpoint(ESM2, tmp_path / "native", source_format="fair-esm")
    assert sha256(back / "model.safetensors") == sha256(native / "model.safetensors")


def test_neither_of_two_files_is_replaced(tmp_path: Path):
    (tmp_path / "esm2_x-contact-regression.pt").write_text("mine")
    with pytest.raises(InputError, match=r"regression\.pt, the contact regression, already exists"):
        convert_checkpoint(ESM2, tmp_path / "esm2_x.pt", source_format="fair-esm", target_format="fair-esm")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("kept", [0, 3, 5_000, 50_000])
def test_a_truncated_pickle_is_named(kept: int, tmp_path: Path):
    torch.save(load_file(EVO2), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        convert_checkpoint(tmp_path / "cut.pt", tmp_path / "model", source_format="vortex")
    assert not (tmp_path / "model").exists()


def test_a_native_source_takes_no_other_configuration(tmp_path: Path):
    native = save_checkpoint(tiny_evo2(), tmp_path / "native")
    with pytest.raises(InputError, match="config does not apply"):
        convert_checkpoint(native, tmp_path / "model", source_format="cistron", config={"hidden_size": 8})
