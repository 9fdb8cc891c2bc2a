from __future__ import annotations

import io
import logging
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests.cistron.models.evo2_formats import (
    CACHE,
    NATIVE,
    PATTERN,
    PROVIDER,
    TAPS,
    WIDTH,
    Bomb,
    assert_same,
    mbridge,
    native,
    random_layers,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.checkpoint import save_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_mbridge
from cistron.models.evo2.model import Evo2

NVIDIA = {
    "remove_activation_post_first_layer": False,
    "use_short_conv_bias": True,
    "add_attn_proj_bias": False,
    "share_embeddings_and_output_weights": False,
    "embedding_init_method_std": 1.0,
}
TRAINING = {"parametrization": "training", "norm_eps_inside": True, "filter_cache_length": TAPS}


def save(folder: Path, tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def write(root: Path, tensors, **settings) -> Path:
    folder = save(root / "iter_0000007", tensors)
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    run = {"model": {**PROVIDER, **settings}, "train": {"train_iters": 7}, "dataset": None}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(run))
    return root


def read(path, config=None, **options):
    parsed, tensors = read_mbridge(path, **{"config": config, "trust_pickle": False, **options})
    return parsed, dict(tensors)


def stored(folder: Path):
    """Read a checkpoint as its own library does."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_is_read_with_the_settings_beside_it(fused, tmp_path):
    layers = random_layers()
    root = write(tmp_path / "run", mbridge(layers, fused=fused))
    for source in (root, root / "iter_0000007"):
        parsed, tensors = read(source)
        assert_same(tensors, native(layers))
        assert parsed == Evo2Config(**{**NATIVE, **TRAINING})
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert read(root)[0] == parsed


def test_an_older_folder_has_a_prefix_and_no_settings(tmp_path):
    layers = random_layers()
    save(tmp_path / "run" / "weights", {f"module.{name}": tensor for name, tensor in mbridge(layers).items()})
    with pytest.raises(ConfigError, match="config="):
        read(tmp_path / "run")
    for config in (PROVIDER, {"model": PROVIDER}, NATIVE):
        assert_same(read(tmp_path / "run", config)[1], native(layers))


def test_nvidias_variant_has_its_own_biases_and_exact_frequencies(tmp_path):
    layers = random_layers(nvidia=True)
    root = write(tmp_path, mbridge(layers, tied=False), **NVIDIA)
    size = WIDTH // 2
    layers[3]["inv_freq"] = 1.0 / 10_000 ** (torch.arange(0, size, 2) / size)
    parsed, tensors = read(root)
    assert_same(tensors, native(layers, tied=False))
    assert (parsed.mlp_activation, parsed.hcs_bias, parsed.attention_output_bias) == ("gelu", True, False)
    assert not parsed.tie_embeddings
    rounded = read(root, {"round_inv_freq": True})[1]["blocks.3.mixer.rotary.inv_freq"]
    assert torch.equal(rounded, layers[3]["inv_freq"].bfloat16().float())
    assert not torch.equal(rounded, layers[3]["inv_freq"])


def test_long_context_settings(tmp_path):
    settings = {"seq_len_interpolation_factor": 128, "rotary_base": 1_000_000, "seq_length": 1_048_576}
    parsed, _ = read(write(tmp_path, mbridge(random_layers()), vortex_style_fp8=True, vocab_size=512, **settings))
    assert (parsed.rotary_scaling, parsed.rotary_base, parsed.max_length) == (128, 1e6, 1_048_576)
    assert parsed.requires_fp8


def test_filters_may_be_stored_over_the_training_length(tmp_path):
    layers = random_layers()
    theirs = mbridge(layers)
    for index in (1, 4):
        for ours, name in (("h", "h"), ("decay", "decay")):
            theirs[f"decoder.layers.{index}.mixer.mixer.filter.{name}"] = layers[index][ours]
    parsed, tensors = read(write(tmp_path, theirs))
    assert_same(tensors, native(layers))
    assert parsed.filter_cache_length == CACHE


def test_the_state_of_a_training_run_is_dropped_and_other_extras_are_not(tmp_path, caplog):
    layers = random_layers()
    theirs = {
        **mbridge(layers),
        "optimizer.state.exp_avg.decoder.final_norm.weight": torch.zeros(3),
        "rng_state/shard_0_1": io.BytesIO(b"x"),
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_5": io.BytesIO(b"x"),
        "output_layer.weight": layers[-1]["embedding"],
    }
    with caplog.at_level(logging.INFO, logger="cistron"):
        assert_same(read(write(tmp_path / "a", theirs))[1], native(layers))
    assert "dropping 3 entries" in caplog.text
    theirs["output_layer.weight"] = layers[-1]["head"]
    with pytest.raises(CheckpointError, match=r"output_layer\.weight differs"):
        read(write(tmp_path / "b", theirs))
    with pytest.raises(CheckpointError, match=r"unexpected tensor decoder\.mystery"):
        read(write(tmp_path / "c", {**mbridge(layers), "decoder.mystery": torch.zeros(2)}))


@pytest.mark.parametrize("changes", [{}, NVIDIA, {"seq_len_interpolation_factor": 4.0}])
def test_what_is_written_is_what_was_read(changes, tmp_path):
    nvidia = changes is NVIDIA
    layers = random_layers(nvidia=nvidia)
    root = write(tmp_path / "run", mbridge(layers, tied=not nvidia), **changes)
    directory = convert_checkpoint(root, tmp_path / "model", source_format="mbridge")
    out = convert_checkpoint(directory, tmp_path / "out", source_format="cistron", target_format="mbridge")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
        *(f"iter_0000001/{file}" for file in (".metadata", "__0_0.distcp", "common.pt", "metadata.json")),
        *(f"iter_0000001/{file}" for file in ("run_config.yaml", "train_state.pt")),
    }
    assert_same(stored(out / "iter_0000001"), mbridge(layers, tied=not nvidia))
    written = yaml.safe_load((out / "iter_0000001" / "run_config.yaml").read_text())["model"]
    for name, value in {**PROVIDER, **changes}.items():
        if name in written and value is not None:
            assert written[name] == value, name
    (config, tensors), (first, expected) = read(out), read(root)
    assert config == first
    assert_same(tensors, expected)


def test_the_inference_form_is_written_as_the_same_function(tmp_path):
    model = Evo2(Evo2Config(**NATIVE)).float()
    directory = save_checkpoint(model, tmp_path / "model")
    out = convert_checkpoint(directory, tmp_path / "out", source_format="cistron", target_format="mbridge")
    config, tensors = read(out)
    assert config.parametrization == "training"
    again = Evo2(config.model_copy(update={"norm_eps_inside": False}))
    again.load_state_dict(tensors)
    ids = torch.randint(60, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_frequencies_of_no_base_are_refused(tmp_path):
    model = Evo2(Evo2Config(**NATIVE))
    model.state_dict()["blocks.3.mixer.rotary.inv_freq"].mul_(2)
    directory = save_checkpoint(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"inv_freq: the mbridge format stores no rotary frequencies"):
        convert_checkpoint(directory, tmp_path / "out", source_format="cistron", target_format="mbridge")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_may_be_cut_into_pieces(tmp_path):
    layers = random_layers()
    theirs = mbridge(layers)
    folder = write(tmp_path, theirs) / "iter_0000007"
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    notes = pickle.loads((folder / ".metadata").read_bytes())
    notes.storage_data = {place: file for place, file in notes.storage_data.items() if place.fqn != name}
    chunks = []
    for number, piece in enumerate(theirs[name].chunk(3)):
        file = folder / f"__{number + 1}_0.distcp"
        torch.save(piece.clone(), file)
        offset = torch.Size([number * len(piece), 0])
        chunks.append(described.ChunkStorageMetadata(offset, piece.shape))
        notes.storage_data[described.MetadataIndex(name, offset, number)] = _StorageInfo(
            file.name, 0, file.stat().st_size
        )
    notes.state_dict_metadata[name] = replace(notes.state_dict_metadata[name], chunks=chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(notes))
    assert_same(read(tmp_path)[1], native(layers))


def test_the_metadata_runs_no_code_unless_trusted(tmp_path):
    layers = random_layers()
    path = write(tmp_path / "run", mbridge(layers)) / "iter_0000007" / ".metadata"
    notes = pickle.loads(path.read_bytes())
    notes.planner_data = Bomb(tmp_path / "boom")
    path.write_bytes(pickle.dumps(notes))
    with pytest.raises(CheckpointError, match=r"\.metadata.*trust_pickle=true \(it asks for builtins\.exec\)"):
        convert_checkpoint(tmp_path / "run", tmp_path / "model", source_format="mbridge")
    assert [found.name for found in tmp_path.iterdir()] == ["run"]
    assert_same(read(tmp_path / "run", trust_pickle=True)[1], native(layers))
    assert (tmp_path / "boom").exists()


def test_broken_folders_are_named(tmp_path):
    root = write(tmp_path / "run", mbridge(random_layers()))
    folder = root / "iter_0000007"
    good = (folder / ".metadata").read_bytes()
    notes = pickle.loads(good)
    first = next(iter(notes.storage_data))
    notes.storage_data[first] = _StorageInfo("../outside", 0, 3)
    (folder / ".metadata").write_bytes(pickle.dumps(notes))
    with pytest.raises(CheckpointError, match=r"points to '\.\./outside', outside the folder"):
        read(root)
    for content in (good[:100], b"", pickle.dumps([1])):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="no metadata of a distributed checkpoint"):
            read(root)
    (folder / ".metadata").write_bytes(good)
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"iter_0000007: tensor decoder\..* cannot be read, a file is broken"):
        convert_checkpoint(root, tmp_path / "model", source_format="mbridge")
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"__0_0\.distcp does not exist"):
        convert_checkpoint(root, tmp_path / "model", source_format="mbridge")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_file_of_states_is_named(tmp_path):
    theirs = mbridge(random_layers())
    theirs["decoder.layers.0.mixer.dense_projection._extra_state/shard_0_1"] = io.BytesIO(b"state")
    file = next(write(tmp_path, theirs).rglob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:10])
    with pytest.raises(CheckpointError, match=r"distcp is truncated: decoder\.layers\.0\..*should end at byte"):
        read(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"distcp does not exist, and decoder\.layers\.0\..* is in it"):
        read(tmp_path)


def test_settings_without_a_value_have_their_default(tmp_path):
    unset = dict.fromkeys(("layernorm_epsilon", "vortex_style_fp8", "hyena_filter_order", "normalization"))
    assert read(write(tmp_path, mbridge(random_layers()), **unset))[0].norm_eps == 1e-6


def test_a_folder_must_be_clear(tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointNotFoundError, match=str(missing)):
            read(missing)
    (tmp_path / "iter_0000001").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"\.metadata does not exist"):
        read(tmp_path)
    (tmp_path / "iter_0000002").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="iter_0000001, iter_0000002; name one"):
        read(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="must hold a number, got 'release'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_size": 64, "num_groups_hyena": 64}, CheckpointError, r"has shape \[512, 32\]"),
        ({"ffn_hidden_size": 40}, CheckpointError, r"linear_fc1\.weight has shape \[96, 32\].*says \[80, 32\]"),
        ({"hybrid_override_pattern": PATTERN + "S"}, CheckpointError, "missing tensor"),
        ({"normalization": "LayerNorm"}, ConfigError, "normalization: Evo 2 has 'RMSNorm'"),
        ({"num_groups_hyena_short": 4}, ConfigError, "num_groups_hyena_short"),
        ({"seq_length": None}, ConfigError, "has no seq_length"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, error, words, tmp_path):
    root = write(tmp_path, mbridge(random_layers()), **change)
    with pytest.raises(error, match=words):
        read(root)
