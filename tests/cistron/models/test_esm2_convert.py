import argparse
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cistron.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from cistron.models.checkpoint import write_checkpoint
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.convert import read_fair_esm, read_hf, write_fair_esm, write_hf
from cistron.models.esm2.model import Esm2
from cistron.models.registry import get_spec
from cistron.tokenizers import ProteinTokenizer

SOURCE = Path(__file__).parents[2] / "golden" / "esm2_tiny.fair_esm.safetensors"
FIELDS = {"encoder_layers": 3, "encoder_embed_dim": 40, "encoder_attention_heads": 4, "token_dropout": True}
TENSORFLOW = {"weight": "gamma", "bias": "beta"}
CONTACTS = {"contact_head.regression.weight", "contact_head.regression.bias"}


def native(reader, source, *, config=None, trust_pickle=False):
    parsed, tensors = reader(source, config=config, trust_pickle=trust_pickle)
    return parsed, dict(tensors)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def fair_esm():
    return load_file(SOURCE)


@pytest.fixture(scope="module")
def reference():
    return native(read_fair_esm, SOURCE)


@pytest.fixture
def hf_folder(tmp_path, reference):
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf(reference[0], reference[1].items(), folder)
    return folder


def save_fair_esm(path, tensors, config=FIELDS):
    save_file(tensors, path, metadata={"config": json.dumps(config)} if config is not None else None)
    return path


def save_published_pt(folder, tensors):
    """The published form: prefixed names, a namespace of settings, and the contact regression in its own file."""
    prefix = {name: "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder." for name in tensors}
    model = {prefix[name] + name: tensor for name, tensor in tensors.items() if name not in CONTACTS}
    namespace = argparse.Namespace(**FIELDS, dropout=0.0, arch="roberta_large", data=None)
    torch.save({"cfg": {"model": namespace}, "model": model}, folder / "esm2_tiny.pt")
    regression = {name: tensors[name] for name in CONTACTS}
    torch.save({"model": regression}, folder / "esm2_tiny-contact-regression.pt")
    return folder / "esm2_tiny.pt"


def test_native_names_and_shapes_are_the_models(reference):
    config, tensors = reference
    expected = Esm2(config, device="meta").state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in expected.items()}
    assert (config.num_layers, config.hidden_size, config.num_attention_heads) == (3, 40, 4)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, fair_esm):
    path = save_fair_esm(tmp_path / "m.safetensors", fair_esm)
    _, tensors = read_fair_esm(path, config=None, trust_pickle=False)
    path.unlink()
    with pytest.raises(CheckpointNotFoundError):
        next(tensors)


def test_configuration_from_shapes(tmp_path, fair_esm, reference):
    path = save_fair_esm(tmp_path / "m.safetensors", fair_esm, config=None)
    config, tensors = native(read_fair_esm, path)
    assert config == reference[0]
    assert_same(tensors, reference[1])


def test_configuration_given_takes_precedence(tmp_path, fair_esm):
    path = save_fair_esm(tmp_path / "m.safetensors", fair_esm)
    assert not native(read_fair_esm, path, config={"token_dropout": False})[0].token_dropout
    with pytest.raises(ConfigError, match="unknown fair-esm setting 'token_dropuot'"):
        native(read_fair_esm, path, config={"token_dropuot": False})
    with pytest.raises(
        CheckpointError, match=r"regression\.weight has shape \[1, 12\], the configuration says \[1, 6\]"
    ):
        native(read_fair_esm, path, config={"encoder_attention_heads": 2})


def test_published_pickle_with_regression_beside(tmp_path, fair_esm, reference):
    path = save_published_pt(tmp_path, fair_esm)
    for trust_pickle in (False, True):
        config, tensors = native(read_fair_esm, path, trust_pickle=trust_pickle)
        assert config == reference[0]
        assert_same(tensors, reference[1])


def test_pickle_that_runs_code_is_refused(tmp_path, fair_esm):
    class Payload:
        def __reduce__(self):
            return subprocess.getoutput, (f"touch {tmp_path / 'ran'}",)

    torch.save({"cfg": Payload(), "model": dict(fair_esm)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="trust_pickle"):
        read_fair_esm(tmp_path / "m.pt", config=None, trust_pickle=False)
    assert not (tmp_path / "ran").exists()


def test_missing_contact_head_becomes_zeros_with_a_warning(tmp_path, fair_esm, caplog):
    bare = {name: tensor for name, tensor in fair_esm.items() if name not in CONTACTS}
    _, tensors = native(read_fair_esm, save_fair_esm(tmp_path / "m.safetensors", bare))
    assert not tensors["esm.contact_head.regression.weight"].any()
    assert "no contact head" in caplog.text


@pytest.mark.parametrize(
    "name", ["layers.1.fc1.bias", "lm_head.weight", "layers.2.self_attn.rot_emb.inv_freq", *sorted(CONTACTS)]
)
def test_missing_tensor_is_named(tmp_path, fair_esm, name):
    rest = {key: tensor for key, tensor in fair_esm.items() if key != name}
    path = save_fair_esm(tmp_path / "m.safetensors", rest)
    with pytest.raises(CheckpointError, match=rf"missing tensor .*{name.rpartition('.')[0]}"):
        read_fair_esm(path, config=None, trust_pickle=False)


def test_unexpected_misshaped_and_differing_tensors_are_named(tmp_path, fair_esm):
    path = tmp_path / "m.safetensors"
    save_fair_esm(path, {**fair_esm, "layers.0.fc3.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected tensor layers\.0\.fc3\.bias"):
        read_fair_esm(path, config=None, trust_pickle=False)
    save_fair_esm(path, {**fair_esm, "layers.0.fc2.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.bias has shape \[2\].*\[40\]"):
        read_fair_esm(path, config=None, trust_pickle=False)
    for name in ("lm_head.weight", "layers.1.self_attn.rot_emb.inv_freq"):
        save_fair_esm(path, {**fair_esm, name: fair_esm[name] + 1})
        with pytest.raises(CheckpointError, match=f"{name}.* must equal|must equal .*{name}"):
            native(read_fair_esm, path)


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere\.pt"):
        read_fair_esm(tmp_path / "nowhere.pt", config=None, trust_pickle=False)
    (tmp_path / "cut.safetensors").write_bytes(SOURCE.read_bytes()[:1000])
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no archive")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.safetensors", "cut.pt", "list.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_fair_esm(tmp_path / name, config=None, trust_pickle=False)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="encoder_"):
        read_fair_esm(tmp_path / "other.safetensors", config=None, trust_pickle=False)


def test_fair_esm_round_trip_is_exact(tmp_path, fair_esm, reference):
    path = tmp_path / "back.safetensors"
    write_fair_esm(reference[0], reference[1].items(), path)
    assert_same(load_file(path), fair_esm)
    with safe_open(path, "pt") as stream:
        assert json.loads(stream.metadata()["config"]) == FIELDS


def test_fair_esm_pickles_load_without_trust_as_its_loader_reads_them(tmp_path, fair_esm, reference):
    """The loader takes settings as attributes, and adds the tensors of the second file to those of the first."""
    write_fair_esm(reference[0], reference[1].items(), tmp_path / "esm2_tiny.pt")
    content = torch.load(tmp_path / "esm2_tiny.pt", weights_only=True)
    settings = content["cfg"]["model"]
    assert {name: getattr(settings, name) for name in FIELDS} == FIELDS
    assert dict(settings) == FIELDS
    regression = torch.load(tmp_path / "esm2_tiny-contact-regression.pt", weights_only=True)["model"]
    assert regression.keys() == CONTACTS
    assert_same({**content["model"], **regression}, fair_esm)
    embedding, tied = (content["model"][name] for name in ("embed_tokens.weight", "lm_head.weight"))
    assert embedding.data_ptr() == tied.data_ptr()


def test_fair_esm_pickles_without_a_contact_head(tmp_path, reference, caplog):
    tensors = {n: torch.zeros_like(t) if "contact_head" in n else t for n, t in reference[1].items()}
    write_fair_esm(reference[0], tensors.items(), tmp_path / "esm2_tiny.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["esm2_tiny.pt"]
    assert "wants a contact regression beside it, and there is none" in caplog.text
    assert_same(native(read_fair_esm, tmp_path / "esm2_tiny.pt")[1], tensors)


def test_fair_esm_settings_under_args(tmp_path, fair_esm, reference):
    settings = argparse.Namespace(**FIELDS | {"token_dropout": False}, arch="x")
    torch.save({"args": settings, "model": dict(fair_esm)}, tmp_path / "m.pt")
    config, tensors = native(read_fair_esm, tmp_path / "m.pt")
    assert config == reference[0].model_copy(update={"token_dropout": False})
    assert_same(tensors, reference[1])


def test_fair_esm_refuses_what_it_cannot_express(tmp_path, reference):
    config = reference[0].model_copy(update={"layer_norm_eps": 1e-6})
    with pytest.raises(CheckpointError, match="layer_norm_eps"):
        write_fair_esm(config, reference[1].items(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "esm2_m.pt"])
def test_fair_esm_files_keep_settings_that_fair_esm_passes_by(tmp_path, reference, name):
    changes = {"max_position_embeddings": 260, "rope_theta": 500.0, "initializer_range": 0.01}
    config = reference[0].model_copy(update=changes)
    model = Esm2(config)
    model.init_weights(seed=0)
    state = model.state_dict()
    write_fair_esm(config, state.items(), tmp_path / name)
    back, tensors = native(read_fair_esm, tmp_path / name)
    assert back == config
    assert back.max_length == 256
    assert_same(tensors, state)


def test_rounded_frequencies_are_kept(tmp_path, fair_esm):
    rounded = {n: t.half() if n.endswith("inv_freq") else t for n, t in fair_esm.items()}
    _, tensors = native(read_fair_esm, save_fair_esm(tmp_path / "m.safetensors", rounded))
    kept = tensors["esm.rotary_embeddings.inv_freq"]
    assert kept.dtype == torch.float16
    assert torch.equal(kept, rounded["layers.0.self_attn.rot_emb.inv_freq"])


def test_hf_round_trip_is_exact(hf_folder, reference):
    config, tensors = native(read_hf, hf_folder)
    assert config == reference[0]
    assert_same(tensors, reference[1])


@torch.no_grad()
def test_transformers_loads_what_we_write(hf_folder, reference):
    transformers = pytest.importorskip("transformers")
    twin, info = transformers.EsmForMaskedLM.from_pretrained(hf_folder, output_loading_info=True)
    assert not any(info.values()), info
    model = Esm2(reference[0])
    model.load_state_dict(reference[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_folder)
    sequence = "MKTAYIA<mask>QRXBUZO"
    batch = tokenizer([sequence, "MKT"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == ProteinTokenizer().encode(sequence).tolist()
    want = twin.eval()(**batch).logits
    torch.testing.assert_close(model.eval()(batch["input_ids"]).logits, want, atol=1e-5, rtol=1e-5)
    state = twin.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in reference[1].items())


def test_rounded_frequencies_reach_transformers(tmp_path, reference):
    transformers = pytest.importorskip("transformers")
    name = "esm.rotary_embeddings.inv_freq"
    tensors = {**reference[1], name: reference[1][name].half().float()}
    write_hf(reference[0], tensors.items(), tmp_path)
    twin = transformers.EsmForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(twin.state_dict()[name], tensors[name])
    assert not torch.equal(tensors[name], reference[1][name])


def test_what_transformers_saves_is_read(tmp_path, reference):
    transformers = pytest.importorskip("transformers")
    twin = transformers.EsmForMaskedLM(transformers.EsmConfig.from_dict(reference[0].to_json()))
    state = twin.state_dict()
    for max_shard_size in ("1GB", "60KB"):
        folder = tmp_path / max_shard_size
        twin.save_pretrained(folder, max_shard_size=max_shard_size)
        config, tensors = native(read_hf, folder)
        assert config == reference[0]
        assert_same(tensors, {name: state[name] for name in tensors})


def old_hugging_face_state(reference):
    """Names of the files on the hub: frequencies per layer, a stored decoder, an unused position table."""
    state = dict(reference[1])
    inv_freq = state.pop("esm.rotary_embeddings.inv_freq")
    for i in range(reference[0].num_layers):
        state[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = inv_freq.clone()
    state["lm_head.decoder.weight"] = state["esm.embeddings.word_embeddings.weight"].clone()
    state["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 40)
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    return state


@pytest.mark.parametrize("sharded", [False, True])
def test_old_hub_pickles_are_read(tmp_path, reference, sharded):
    state = old_hugging_face_state(reference)
    config = {**reference[0].to_json(), "_name_or_path": "x", "torch_dtype": "float32", "transformers_version": "4.25"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if sharded:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    parsed, tensors = native(read_hf, tmp_path)
    assert parsed == reference[0]
    assert_same(tensors, reference[1])


def test_what_old_hub_files_hold_beside_weights_is_dropped_aloud(tmp_path, reference, caplog):
    state = old_hugging_face_state(reference)
    state["esm.pooler.dense.weight"], state["esm.pooler.dense.bias"] = torch.zeros(40, 40), torch.zeros(40)
    state["lm_head.decoder.bias"] = state["lm_head.bias"].clone()
    for name in list(state):
        module, _, leaf = name.rpartition(".")
        if module.endswith("LayerNorm"):
            state[f"{module}.{TENSORFLOW[leaf]}"] = state.pop(name)
        elif "contact_head" in name:
            state[name.removeprefix("esm.")] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference[0].to_json()))
    with caplog.at_level("INFO", logger="cistron"):
        assert_same(native(read_hf, tmp_path)[1], reference[1])
    assert "dropping what ESM-2 does not read: esm.embeddings.position_embeddings.weight, esm.embedd" in caplog.text


def test_a_model_with_positions_that_are_read_is_refused(tmp_path, reference):
    save_file(old_hugging_face_state(reference), tmp_path / "model.safetensors")
    settings = {key: value for key, value in reference[0].to_json().items() if key != "position_embedding_type"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="does not say position_embedding_type"):
        read_hf(tmp_path, config=None, trust_pickle=False)
    with pytest.raises(ConfigError, match="ESM-2 has 'rotary', got 'absolute'"):
        read_hf(tmp_path, config={"position_embedding_type": "absolute"}, trust_pickle=False)
    assert_same(native(read_hf, tmp_path, config={"position_embedding_type": "rotary"})[1], reference[1])


def test_two_spellings_of_one_tensor_are_refused(tmp_path, hf_folder, reference):
    state = load_file(hf_folder / "model.safetensors")
    state["esm.encoder.layer.0.LayerNorm.gamma"] = state["esm.encoder.layer.0.LayerNorm.weight"] + 1
    save_file(state, hf_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two spellings of one tensor"):
        read_hf(hf_folder, config=None, trust_pickle=False)


def test_hf_files_have_the_names_that_older_software_reads(hf_folder, reference):
    state = load_file(hf_folder / "model.safetensors")
    copies = {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq" for i in range(3)}
    assert state.keys() == reference[1].keys() - {"esm.rotary_embeddings.inv_freq"} | copies
    assert all(torch.equal(state[name], reference[1]["esm.rotary_embeddings.inv_freq"]) for name in copies)


@pytest.mark.parametrize("size", ["8m", "35m", "150m", "650m", "3b", "15b", "20b_unpublished"])
def test_every_size_has_the_names_and_shapes_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = get_spec(f"esm2_{size}").config
    with torch.device("meta"):
        theirs = transformers.EsmForMaskedLM(transformers.EsmConfig.from_dict(config.to_json())).state_dict()
    ours = Esm2(config, device="meta").state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items() if "decoder" not in n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_a_native_checkpoint_bit_by_bit(tmp_path, reference, dtype):
    """It widens a narrow one to fp32, which changes no value."""
    transformers = pytest.importorskip("transformers")
    kept = ("inv_freq", "contact_head")
    tensors = {n: t.half().float() if n.endswith(kept[0]) else t for n, t in reference[1].items()}
    tensors = {n: t if any(part in n for part in kept) else t.to(dtype) for n, t in tensors.items()}
    folder = write_checkpoint(reference[0], tensors.items(), tmp_path / "native")
    twin, info = transformers.EsmForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    state = twin.state_dict()
    assert state.keys() == tensors.keys() | {"lm_head.decoder.weight"}
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tensors.items())


def test_hf_without_frequencies_computes_them(tmp_path, reference, caplog):
    state = {name: tensor for name, tensor in reference[1].items() if "inv_freq" not in name}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference[0].to_json()))
    _, tensors = native(read_hf, tmp_path)
    torch.testing.assert_close(
        tensors["esm.rotary_embeddings.inv_freq"], reference[1]["esm.rotary_embeddings.inv_freq"]
    )
    assert "no rotary frequencies" in caplog.text


def test_hf_faults_are_named(tmp_path, hf_folder, reference):
    with pytest.raises(CheckpointNotFoundError, match="not a folder"):
        read_hf(tmp_path / "nowhere", config=None, trust_pickle=False)
    with pytest.raises(ConfigError, match="emb_layer_norm_before"):
        read_hf(hf_folder, config={"emb_layer_norm_before": True}, trust_pickle=False)
    with pytest.raises(CheckpointError, match=r"missing tensor esm\.encoder\.layer\.3"):
        read_hf(hf_folder, config={"num_hidden_layers": 4}, trust_pickle=False)
    save_file({**reference[1], "classifier.weight": torch.zeros(1)}, hf_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor classifier\.weight"):
        read_hf(hf_folder, config=None, trust_pickle=False)
    (hf_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors"):
        read_hf(hf_folder, config=None, trust_pickle=False)


def test_custom_width_of_the_mlp_survives_hf(tmp_path):
    config = Esm2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = Esm2(config)
    model.init_weights(seed=0)
    write_hf(config, model.state_dict().items(), tmp_path)
    parsed, tensors = native(read_hf, tmp_path)
    assert parsed == config
    assert_same(tensors, dict(model.state_dict()))
