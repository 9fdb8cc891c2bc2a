from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.convert import convert_checkpoint
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.convert import (
    read_bionemo_te,
    read_fair_esm,
    write_bionemo_te,
    write_fair_esm,
    write_hf,
)

SOURCE = Path(__file__).parents[2] / "golden" / "esm2_tiny.fair_esm.safetensors"
LAYERS, HEADS, WIDTH = 3, 4, 40
SETTINGS = {
    "architectures": ["NVEsmForMaskedLM"],
    "model_type": "nv_esm",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "token_dropout": True,
    "layer_norm_eps": 1e-5,
    "vocab_size": 33,
    "padded_vocab_size": 64,
    "qkv_weight_interleaved": True,
    "fuse_qkv_params": True,
    "encoder_activation": "gelu",
    "transformers_version": "4.57.1",
}
KEPT_ELSEWHERE = {
    "esm.rotary_embeddings.inv_freq",
    "esm.contact_head.regression.weight",
    "esm.contact_head.regression.bias",
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference() -> tuple[Esm2Config, Tensors]:
    config, tensors = read_fair_esm(SOURCE, config=None, trust_pickle=False)
    return config, dict(tensors)


def spelled(fair: Tensors, *, rows: int = 64, order: str = "heads") -> Tensors:
    """Spell fair-esm's tensors as the recipe does, straight from its table, row by row."""
    te = {}
    for i in range(LAYERS):
        old, new = f"layers.{i}.", f"model.encoder.layers.{i}."
        for leaf in ("weight", "bias"):
            te[f"{new}self_attention.layernorm_qkv.layer_norm_{leaf}"] = fair[f"{old}self_attn_layer_norm.{leaf}"]
            te[f"{new}self_attention.proj.{leaf}"] = fair[f"{old}self_attn.out_proj.{leaf}"]
            te[f"{new}layernorm_mlp.layer_norm_{leaf}"] = fair[f"{old}final_layer_norm.{leaf}"]
            te[f"{new}layernorm_mlp.fc1_{leaf}"] = fair[f"{old}fc1.{leaf}"]
            te[f"{new}layernorm_mlp.fc2_{leaf}"] = fair[f"{old}fc2.{leaf}"]
            qkv = {kind: fair[f"{old}self_attn.{kind[0]}_proj.{leaf}"] for kind in ("query", "key", "value")}
            if order == "apart":
                te |= {f"{new}self_attention.layernorm_qkv.{kind}_{leaf}": piece for kind, piece in qkv.items()}
            elif order == "kinds":
                te[f"{new}self_attention.layernorm_qkv.{leaf}"] = torch.cat(list(qkv.values()))
            else:
                size = WIDTH // HEADS
                rows_in_order = [
                    piece[head * size + row] for head in range(HEADS) for piece in qkv.values() for row in range(size)
                ]
                te[f"{new}self_attention.layernorm_qkv.{leaf}"] = torch.stack(rows_in_order)
    for leaf in ("weight", "bias"):
        te[f"model.encoder.emb_layer_norm_after.{leaf}"] = fair[f"emb_layer_norm_after.{leaf}"]
        te[f"lm_head.dense.{leaf}"] = fair[f"lm_head.dense.{leaf}"]
        te[f"lm_head.decoder.layer_norm_{leaf}"] = fair[f"lm_head.layer_norm.{leaf}"]
    embedding, bias = torch.zeros(rows, WIDTH), torch.full((rows,), torch.finfo(torch.float32).min)
    embedding[:33], bias[:33] = fair["embed_tokens.weight"], fair["lm_head.bias"]
    return {**te, "model.embeddings.word_embeddings.weight": embedding, "lm_head.decoder.bias": bias}


def folder_of(path: Path, tensors: Tensors, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**SETTINGS, **changes}))
    return path


def read(path: Path, **config: Any) -> tuple[Esm2Config, Tensors]:
    parsed, tensors = read_bionemo_te(path, config=config or None, trust_pickle=False)
    return parsed, dict(tensors)


def assert_same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def weights(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in KEPT_ELSEWHERE}


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ("heads", {}),
        ("heads", {"padded_vocab_size": 33}),
        ("heads", {"padded_vocab_size": None}),
        ("kinds", {"qkv_weight_interleaved": False, "padded_vocab_size": 128}),
        ("apart", {"fuse_qkv_params": False}),
    ],
)
def test_folders_of_the_recipe_are_read(
    order: str, changes: dict[str, Any], tmp_path: Path, reference: tuple[Esm2Config, Tensors], caplog: Any
):
    rows = changes.get("padded_vocab_size", 64) or 33
    te = spelled(load_file(SOURCE), rows=rows, order=order)
    te["model.encoder.layers.1.self_attention.layernorm_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    config, tensors = read(folder_of(tmp_path / "te", te, **changes))
    assert config == reference[0]
    assert_same(weights(tensors), weights(reference[1]))
    assert not tensors["esm.contact_head.regression.weight"].any()
    assert "no contact head" in caplog.text
    assert "no rotary frequencies" in caplog.text
    torch.testing.assert_close(
        tensors["esm.rotary_embeddings.inv_freq"], reference[1]["esm.rotary_embeddings.inv_freq"]
    )


def test_the_first_published_prefix_and_what_is_stored_twice(tmp_path: Path, reference: tuple[Esm2Config, Tensors]):
    te = spelled(load_file(SOURCE))
    frequencies = reference[1]["esm.rotary_embeddings.inv_freq"].half()
    te |= {
        "lm_head.decoder.weight": te["model.embeddings.word_embeddings.weight"],
        "model.encoder.rotary_embeddings.inv_freq": frequencies,
        "model.pooler.dense.weight": torch.zeros(2, 2),
        "model.pooler.dense.bias": torch.zeros(2),
    }
    old = {name.replace("model.", "esm.", 1) if name.startswith("model.") else name: te[name] for name in te}
    _, tensors = read(folder_of(tmp_path / "te", old))
    assert_same(weights(tensors), weights(reference[1]))
    assert torch.equal(tensors["esm.rotary_embeddings.inv_freq"], frequencies)
    old["lm_head.decoder.weight"] = old["lm_head.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.decoder\.weight must equal model\.embeddings"):
        read(folder_of(tmp_path / "te", old))


def test_what_is_written_is_the_recipes(tmp_path: Path, reference: tuple[Esm2Config, Tensors]):
    write_bionemo_te(reference[0], reference[1].items(), tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), spelled(load_file(SOURCE)))
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.items() >= {k: v for k, v in SETTINGS.items() if k != "transformers_version"}.items()
    assert_same(read(tmp_path)[1], reference[1])


def test_a_bias_is_padded_with_the_least_number_of_its_dtype(tmp_path: Path, reference: tuple[Esm2Config, Tensors]):
    narrow = {name: tensor.bfloat16() for name, tensor in weights(reference[1]).items()}
    tensors = {**reference[1], **narrow}
    write_bionemo_te(reference[0], tensors.items(), tmp_path)
    bias = load_file(tmp_path / "model.safetensors")["lm_head.decoder.bias"]
    assert bias.dtype == torch.bfloat16
    assert (bias[33:] == torch.finfo(torch.bfloat16).min).all()
    assert_same(read(tmp_path)[1], tensors)


def test_faults_are_named(tmp_path: Path):
    te = spelled(load_file(SOURCE))
    with pytest.raises(CheckpointNotFoundError, match="not a folder"):
        read(tmp_path / "nowhere")
    folder = folder_of(tmp_path / "te", te)
    with pytest.raises(ConfigError, match="model_type: the bionemo-te format has 'nv_esm', got 'esm'"):
        read(folder, model_type="esm")
    with pytest.raises(ConfigError, match="encoder_activation"):
        read(folder, encoder_activation="swiglu")
    with pytest.raises(ConfigError, match="padded_vocab_size must be 33 or more, got 32"):
        read(folder, padded_vocab_size=32)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight has shape \[64, 40\].* \[128, 40\]"):
        read(folder, padded_vocab_size=128)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.encoder\.layers\.3"):
        read(folder, num_hidden_layers=4)
    folder_of(folder, {**te, "classifier.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unexpected tensor classifier\.weight"):
        read(folder)


FORMATS = {"cistron": "native", "hf": "hf", "bionemo-te": "te", "fair-esm": "esm2_x.pt"}


@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(FORMATS, 2)))
def test_there_and_back_is_bit_equal(first: str, second: str, tmp_path: Path, reference: tuple[Esm2Config, Tensors]):
    """Rounded frequencies, a fitted contact head: nothing may be made up on the way."""
    rounded = {n: t.half().float() if "inv_freq" in n else t for n, t in reference[1].items()}
    source = tmp_path / "start.safetensors"
    write_fair_esm(reference[0], rounded.items(), source)
    folders = []
    for number, target in enumerate((first, second, first)):
        folders.append(tmp_path / str(number))
        destination = folders[-1] / FORMATS[target]
        source = convert_checkpoint(source, destination, source_format="auto", target_format=target)
    assert_same_files(folders[0], folders[2])


def assert_same_files(first: Path, second: Path) -> None:
    """Compare all but the manifest, which says where the files came from."""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (first, second)]
    assert files[0] - {Path("native/manifest.json")} == files[1] - {Path("native/manifest.json")}
    for name in files[0]:
        one, two = first / name, second / name
        if name.suffix == ".pt":
            contents = [torch.load(path, weights_only=True) for path in (one, two)]
            assert_same(contents[0]["model"], contents[1]["model"])
            assert contents[0].get("cfg") == contents[1].get("cfg")
        elif name.suffix in {".safetensors", ".st"}:
            assert_same(load_file(one), load_file(two))
        elif name.name != "manifest.json":
            assert one.read_bytes() == two.read_bytes(), name


def watched(tensors: Tensors, most: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield copies of `tensors`, and record how many are in memory."""
    alive = []
    for name, tensor in tensors.items():
        array = tensor.numpy().copy()
        alive.append(ref(array))
        copy = torch.from_numpy(array)
        del array
        most.append(sum(found() is not None for found in alive))
        yield name, copy
        del copy


@pytest.mark.parametrize("write", [write_bionemo_te, write_hf, write_fair_esm])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_writer_holds_few_tensors(write: Any, name: str, tmp_path: Path, reference: tuple[Esm2Config, Tensors]):
    if write is not write_fair_esm:
        (tmp_path / name).mkdir()
    counts: list[int] = []
    write(reference[0], watched(reference[1], counts), tmp_path / name)
    assert len(counts) == len(reference[1])
    assert max(counts) <= 6  # queries, keys and values with their biases
