from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models import sources
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_vortex, write_vortex
from cistron.models.evo2.model import Evo2
from cistron.models.evo2.vortex import config_from_vortex, config_to_vortex

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = GOLDEN / "evo2_tiny.vortex.safetensors"


def settings(path=TINY):
    with safe_open(path, framework="pt") as stream:
        return json.loads(stream.metadata()["config"])


def read(path, **options):
    config, tensors = read_vortex(path, **{"config": None, "trust_pickle": False, **options})
    return config, dict(tensors)


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", ["evo2_tiny", "evo2_tiny_longrope"])
def test_a_file_survives_the_round_trip_bit_for_bit(name, tmp_path):
    source = GOLDEN / f"{name}.vortex.safetensors"
    config, tensors = read_vortex(source, config=None, trust_pickle=False)
    write_vortex(config, tensors, tmp_path / "out.safetensors")
    same(load_file(source), load_file(tmp_path / "out.safetensors"))
    again, native = read(tmp_path / "out.safetensors")
    assert again == config
    same(native, read(source)[1])


def test_native_names_and_shapes_are_the_models(tmp_path):
    config, tensors = read(TINY)
    expected = Evo2(config, device="meta").state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in expected.items()}


def test_dtypes_are_kept(tmp_path):
    config, tensors = read(TINY)
    mixed = {n: t if n.endswith(("log_poles", "residues", "inv_freq")) else t.bfloat16() for n, t in tensors.items()}
    write_vortex(config, mixed.items(), tmp_path / "out.safetensors")
    same(read(tmp_path / "out.safetensors")[1], mixed)


def test_attention_rows_are_told_apart_by_head():
    config, tensors = read(TINY)
    stored = load_file(TINY)["blocks.3.inner_mha_cls.Wqkv.weight"]
    heads, size = config.num_attention_heads, config.head_size
    for head in range(heads):
        for kind in range(3):
            start = kind * config.hidden_size + head * size
            rows = stored[(head * 3 + kind) * size :][:size]
            assert torch.equal(tensors["blocks.3.mixer.qkv.weight"][start : start + size], rows)


def test_the_configuration_is_that_of_the_metadata():
    config, _ = read(GOLDEN / "evo2_tiny_longrope.vortex.safetensors")
    assert (config.layer_pattern, config.hidden_size, config.mlp_size) == ("SDH*SD", 64, 160)
    assert (config.rotary_base, config.rotary_scaling, config.max_length) == (1e6, 16, 4096)
    assert (config.mlp_activation, config.norm_eps_inside, config.num_filter_groups) == ("first_layer_gelu", False, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_scaling": 128.0, "rotary_base": 1e6},
        {"mlp_activation": "gelu", "attention_output_bias": False, "tie_embeddings": False},
        {"requires_fp8": True},
    ],
)
def test_the_configuration_survives_vortex_spelling(changes):
    config = read(TINY)[0].model_copy(update=changes)
    spelled = json.loads(json.dumps(config_to_vortex(config)))
    assert config_from_vortex(spelled, source=Path("x")) == config


def test_the_inner_size_is_derived_as_vortex_does():
    given = {**settings(), "hidden_size": 4096, "hcl_filter_groups": 4096, "num_attention_heads": 32}
    del given["inner_mlp_size"]
    assert config_from_vortex({**given, "inner_size_multiple_of": 128}, source=Path("x")).mlp_size == 11_008
    assert not config_from_vortex({**given, "use_fp8_input_projections": True}, source=Path("x")).requires_fp8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interleave": False}, "interleave"),
        ({"hyena_flip_x1x2": True}, "hyena_flip_x1x2"),
        ({"hcs_filter_groups": 8}, "hcs_filter_groups: must be 16"),
        ({"hcs_layer_idxs": [0, 4, 1]}, "layer 1 is in two lists"),
        ({"num_layers": 8}, "each of the 8 layers"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
    ],
)
def test_another_models_configuration_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        read(TINY, config=changes)


def test_a_missing_setting_is_named():
    given = settings()
    del given["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size"):
        config_from_vortex(given, source=Path("x"))


def rewritten(tmp_path, change, metadata=None):
    tensors = load_file(TINY)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata or {"config": json.dumps(settings())})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.2.filter.residues"), r"missing tensor blocks\.2\.filter\.residues"),
        (lambda t: t.update(surprise=torch.zeros(1)), "unexpected tensor surprise"),
        (
            lambda t: t.update({"blocks.1.filter.h": torch.zeros(16, 1, 127)}),
            r"blocks\.1\.filter\.h has shape \[16, 1, 127\]",
        ),
    ],
)
def test_a_wrong_tensor_is_named_before_any_is_read(tmp_path, change, words):
    path = rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        read_vortex(path, config=None, trust_pickle=False)


def test_a_copy_of_the_embedding_may_be_stored_but_not_differ(tmp_path):
    path = rewritten(tmp_path, lambda t: t.update({"unembed.weight": t["embedding_layer.weight"].clone()}))
    same(read(path)[1], read(TINY)[1])
    path = rewritten(tmp_path, lambda t: t.update({"unembed.weight": t["embedding_layer.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"unembed\.weight differs"):
        read(path)


def test_known_extras_are_dropped(tmp_path, caplog):
    def add(tensors):
        tensors["blocks.0.projections._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        tensors["blocks.2.mixer.mixer.filter.t"] = torch.zeros(4)

    with caplog.at_level("INFO"):
        same(read(rewritten(tmp_path, add))[1], read(TINY)[1])
    assert "dropping 2 entries" in caplog.text


def test_an_untied_model_keeps_its_output_layer(tmp_path):
    config, tensors = read(TINY)
    untied = config.model_copy(update={"tie_embeddings": False})
    tensors["unembed.weight"] = tensors["embedding.weight"] * 2
    write_vortex(untied, tensors.items(), tmp_path / "out.safetensors")
    again, native = read(tmp_path / "out.safetensors")
    assert again == untied
    same(native, tensors)


def pickled(path, **extra):
    torch.save({**load_file(TINY), **extra}, path)
    return path


@pytest.mark.parametrize("content", [b"scales", b""])
def test_a_pickle_is_read_with_its_byte_streams(content, tmp_path):
    path = pickled(tmp_path / "x.pt", **{"blocks.0.projections._extra_state": io.BytesIO(content)})
    same(read(path, config=settings())[1], read(TINY)[1])


def test_a_pickle_in_parts_is_joined(tmp_path):
    data = pickled(tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").unlink()
    size = len(data) // 11 + 1
    for number in range(11):
        (tmp_path / f"x.pt.part{number}").write_bytes(data[number * size : (number + 1) * size])
    for source in (tmp_path / "x.pt.part0", tmp_path / "x.pt", tmp_path):
        same(read(source, config=settings())[1], read(TINY)[1])
    assert len(list(tmp_path.iterdir())) == 11
    (tmp_path / "x.pt.part10").rename(tmp_path / "last")
    with pytest.raises(
        CheckpointError, match=r"joined from 10 parts, in bytes: part0 [\d,]+, .*is the last one missing"
    ):
        read(tmp_path / "x.pt.part0", config=settings())
    (tmp_path / "last").rename(tmp_path / "x.pt.part10")
    (tmp_path / "x.pt.part7").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"part7 does not exist"):
        read(tmp_path / "x.pt.part0", config=settings())


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_a_pickle_runs_no_code(tmp_path):
    path = pickled(tmp_path / "x.pt", bad=Code())
    with pytest.raises(CheckpointError, match=r"trust_pickle=true \(.*exec"):
        read(path, config=settings())


def test_a_value_that_is_no_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="epoch is a int"):
        read(pickled(tmp_path / "x.pt", epoch=3), config=settings())
    torch.save([1], tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="mapping of tensors"):
        read(tmp_path / "y.pt", config=settings())


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=re.escape(str(tmp_path / "x.pt"))):
        read(tmp_path / "x.pt")
    with pytest.raises(CheckpointNotFoundError, match="found none"):
        read(tmp_path)


def test_a_bare_file_needs_a_configuration_or_a_published_name(tmp_path):
    with pytest.raises(ConfigError, match="config="):
        read(pickled(tmp_path / "x.pt"))
    # The published shape is known by the name; these tensors are not of that shape.
    with pytest.raises(CheckpointError, match=r"blocks\.10\."):
        read(pickled(tmp_path / "evo2_1b_base.pt"))


def test_tensors_are_read_one_at_a_time(monkeypatch):
    loaded = []
    original = sources._load_safetensor
    monkeypatch.setattr(sources, "_load_safetensor", lambda files, name: loaded.append(name) or original(files, name))
    _, tensors = read_vortex(TINY, config=None, trust_pickle=False)
    assert loaded == []
    next(tensors)
    assert loaded == ["embedding_layer.weight"]


def test_a_training_form_is_written_as_what_it_computes(tmp_path):
    config = Evo2Config.from_json({**read(TINY)[0].to_json(), "parametrization": "training"})
    model = Evo2(config)
    write_vortex(config, model.state_dict().items(), tmp_path / "out.safetensors")
    again, tensors = read(tmp_path / "out.safetensors")
    assert again.parametrization == "inference"
    inference = Evo2(again)
    inference.load_state_dict(tensors)
    ids = torch.randint(60, 90, (1, 40))
    assert torch.equal(inference(ids).logits, model(ids).logits)


def test_a_feature_without_a_place_in_vortex_is_refused(tmp_path):
    config = read(TINY)[0].model_copy(update={"hcs_bias": True})
    with pytest.raises(CheckpointError, match="hcs_bias"):
        write_vortex(config, Evo2(config).state_dict().items(), tmp_path / "out.safetensors")


def test_a_key_that_is_no_text_is_an_unexpected_tensor(tmp_path):
    torch.save({**load_file(TINY), 7: torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="unexpected tensor 7"):
        read(tmp_path / "x.pt", config=settings())
