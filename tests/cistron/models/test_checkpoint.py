from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CheckpointError, CheckpointNotFoundError, InputError
from cistron.models.base import SequenceModel
from cistron.models.checkpoint import (
    iterate_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
    write_checkpoint,
)
from cistron.models.families import config_of
from cistron.models.manifest import read_manifest, sha256, write_manifest

MODELS: dict[str, Callable[[], SequenceModel]] = {
    "evo2": tiny_evo2,
    "evo2-training": lambda: tiny_evo2(parametrization="training", tie_embeddings=False),
    "evo2-bf16": lambda: tiny_evo2().bfloat16(),
    "esm2": tiny_esm2,
    "esm2-bf16": lambda: tiny_esm2().bfloat16(),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tiny_evo2(), tmp_path / "model")


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint and make its manifest agree, as a wrong exporter would."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    write_manifest(directory, {})


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5 << 30])
@pytest.mark.parametrize("kind", MODELS)
def test_a_round_trip_is_bit_equal(kind: str, max_shard_bytes: int, tmp_path: Path):
    model = MODELS[kind]()
    directory = save_checkpoint(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(directory)
    assert not loaded.training
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    ids = torch.from_numpy(model.tokenizer.encode("ACGTACGTTTGA"))[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_shards_are_bounded_and_indexed_as_hugging_face_does(tmp_path: Path):
    directory = save_checkpoint(tiny_evo2(), tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    state = tiny_evo2().state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    for file in files:
        tensors = load_file(directory / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000


def test_the_manifest_lists_every_file_and_the_provenance(tmp_path: Path):
    directory = save_checkpoint(tiny_esm2(), tmp_path / "model", provenance={"run": "r1", "step": 20})
    manifest = read_manifest(directory)
    assert manifest["version"] == 1
    assert manifest["provenance"] == {"run": "r1", "step": 20}
    assert manifest["files"].keys() == {path.name for path in directory.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": sha256(directory / name), "bytes": (directory / name).stat().st_size}


def test_a_dtype_keeps_what_must_stay_in_fp32(checkpoint: Path):
    loaded = load_checkpoint(checkpoint, dtype=torch.bfloat16).state_dict()
    expected = tiny_evo2().bfloat16().state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in expected.items()}
    assert torch.float32 in {tensor.dtype for tensor in loaded.values()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_loaded_model_does_not_need_its_files(checkpoint: Path):
    loaded = load_checkpoint(checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert all(torch.equal(t, tiny_evo2().state_dict()[name]) for name, t in loaded.state_dict().items())


def test_iteration_yields_what_was_saved(checkpoint: Path):
    expected = tiny_evo2().state_dict()
    found = {name: tensor.clone() for name, tensor in iterate_checkpoint(checkpoint)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_writing_holds_one_shard_at_a_time(tmp_path: Path):
    model = tiny_evo2()
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    limit = max(sizes.values())
    assert sum(sizes.values()) > 3 * limit
    alive: dict[str, weakref.ref[np.ndarray]] = {}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            held = sum(sizes[other] for other, reference in alive.items() if reference() is not None)
            assert held <= limit, "tensors of shards that are written should be gone"
            # A tensor keeps the array under it alive for as long as anybody uses its memory.
            array = tensor.numpy().copy()
            alive[name] = weakref.ref(array)
            copy = torch.from_numpy(array)
            del array
            yield name, copy
            del copy

    write_checkpoint(config_of(model), stream(), tmp_path / "model", max_shard_bytes=limit)
    assert alive.keys() == sizes.keys()


def test_nothing_is_left_of_a_failed_write(tmp_path: Path):
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tiny_evo2().state_dict().items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(config_of(tiny_evo2()), broken(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_an_occupied_destination_is_refused_and_kept(tmp_path: Path, occupied: str):
    destination = tmp_path / "model"
    if occupied == "folder":
        destination.mkdir()
    kept = destination / "note.txt" if occupied == "folder" else destination
    kept.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        save_checkpoint(tiny_evo2(), destination)
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [destination]


def test_an_empty_destination_is_used(tmp_path: Path):
    (tmp_path / "model").mkdir()
    assert load_checkpoint(save_checkpoint(tiny_evo2(), tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"missing tensor final_norm\.weight"),
        (lambda t: [*t, ("extra", torch.zeros(1))], "the configuration has no tensor extra"),
        (lambda t: [*t, t[0]], r"tensor embedding\.weight was given twice"),
        (lambda t: [(t[0][0], t[0][1][:-1]), *t[1:]], r"embedding\.weight has shape \[511, 32\], .* says \[512, 32\]"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(change: Callable[[list[Any]], list[Any]], message: str, tmp_path: Path):
    tensors = change(list(tiny_evo2().state_dict().items()))
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(config_of(tiny_evo2()), tensors, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.mlp.gate.weight"), r"missing tensor blocks\.0\.mlp\.gate\.weight"),
        (lambda t: t.update(strange=torch.zeros(2)), "the configuration has no tensor strange"),
        (lambda t: t.update({"final_norm.weight": torch.zeros(3)}), r"final_norm\.weight has shape \[3\], .* \[32\]"),
    ],
)
@pytest.mark.parametrize("believed", [True, False])
def test_loading_is_strict(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str, believed: bool
):
    manifest = (checkpoint / "manifest.json").read_text()
    rewrite(checkpoint, change)
    if not believed:
        (checkpoint / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_is_found(checkpoint: Path):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: sha256 is .* the manifest says"):
        load_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_found(checkpoint: Path, verify: bool):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_checkpoint(checkpoint, verify=verify)


def test_a_truncated_file_that_the_manifest_believes_in_is_found(checkpoint: Path):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    write_manifest(checkpoint, {})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=name.replace(".", r"\.")):
        load_checkpoint(checkpoint)


def test_a_missing_shard_is_named(tmp_path: Path):
    directory = save_checkpoint(tiny_evo2(), tmp_path / "model", max_shard_bytes=20_000)
    next(directory.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointNotFoundError, match="model-00002"):
        load_checkpoint(directory)


def test_an_index_that_contradicts_the_shards_is_refused(tmp_path: Path):
    directory = save_checkpoint(tiny_evo2(), tmp_path / "model", max_shard_bytes=20_000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = index["weight_map"]["final_norm.weight"]
    for weight_map, message in (
        ({**index["weight_map"], "embedding.weight": last}, "disagree about tensor"),
        ({**index["weight_map"], "embedding.weight": "../elsewhere.safetensors"}, "files of this folder"),
        ([], "'weight_map' must map"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        write_manifest(directory, {})
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(directory)


def test_a_file_outside_the_manifest_does_not_count(checkpoint: Path):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["model.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list it"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 9, "files": {}}', "format version 9"),
        ('{"version": 1, "files": {"../x": {"sha256": "", "bytes": 0}}}', "plain file names"),
        ('{"version": 1}', "'files' must map"),
        ("[]", "must hold a JSON object, got a list"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_manifest_is_refused(checkpoint: Path, content: str, message: str):
    (checkpoint / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "evo3"}, "unknown model family 'evo3'; did you mean 'evo2'"),
        ({"hiden_size": 3}, r"config\.json: hiden_size: no such setting; did you mean 'hidden_size'"),
        ({"num_attention_heads": 5}, r"config\.json: .*not a multiple"),
    ],
)
def test_a_bad_configuration_is_refused(checkpoint: Path, change: dict[str, Any], message: str):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_config(checkpoint)


def test_a_place_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match="not a finished Cistron checkpoint; bring other formats"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, and a Cistron checkpoint is a folder"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5 << 30])
def test_an_esm2_checkpoint_is_a_complete_hugging_face_one(tmp_path: Path, max_shard_bytes: int):
    transformers = pytest.importorskip("transformers")
    model = tiny_esm2()
    directory = save_checkpoint(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.EsmForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.from_numpy(model.tokenizer.encode("MKTAYIAKQR"))[None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("MKTAYIAKQR").input_ids == ids[0].tolist()


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5 << 30])
def test_weights_may_be_read_by_whoever_reads_the_rest(max_shard_bytes: int, tmp_path: Path):
    directory = save_checkpoint(tiny_evo2(), tmp_path / "model", max_shard_bytes=max_shard_bytes)
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in directory.iterdir()} == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.3.mixer.rotary.inv_freq"])
def test_weights_that_are_no_fractions_are_refused(name: str, checkpoint: Path):
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(CheckpointError, match=f"tensor {name} holds torch.int32"):
        load_checkpoint(checkpoint)
