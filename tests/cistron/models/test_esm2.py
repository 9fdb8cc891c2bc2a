from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cistron.errors import CapabilityError, ConfigError, InputError, UnknownNameError
from cistron.models.esm2 import contacts
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.convert import read_fair_esm
from cistron.models.esm2.model import Esm2, rotary_frequencies

GOLDEN = Path(__file__).parents[2] / "golden"
CLS, PAD, EOS, MASK = 0, 1, 2, 32
PUBLISHED = {  # name: (layers, heads, width, parameters)
    "8M": (6, 20, 320, 7_512_353),
    "35M": (12, 20, 480, 33_501_153),
    "150M": (30, 20, 640, 148_139_553),
    "650M": (33, 20, 1280, 651_042_593),
    "3B": (36, 40, 2560, 2_839_004_193),
    "15B": (48, 40, 5120, 15_129_098_273),
}


def tiny_config(**changes):
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return Esm2Config.model_validate({**shape, **changes})


def random_model(config=None, *, seed=0, scale=0.2):
    """A model whose every tensor is random, the norms and the contact head included, and far from the identity."""
    model = Esm2(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "inv_freq" not in name:
                tensor.normal_(generator=generator).mul_(scale).add_(float("Norm.weight" in name))
    return model.eval()


def proteins(lengths, *, seed=0, masks=True):
    """Rows of random ids with <cls> and <eos>; every other one holds <mask> tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        residues = torch.randint(4, 31, (length,), generator=generator)
        if masks and i % 2 == 0:
            residues[torch.rand(length, generator=generator) < 0.3] = MASK
        rows.append(torch.cat([torch.tensor([CLS]), residues, torch.tensor([EOS])]))
    return rows


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def packed(rows):
    lengths = torch.tensor([len(row) for row in rows])
    return torch.cat(rows), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "esm2_tiny.golden.safetensors")


@pytest.fixture(scope="module")
def golden_model():
    config, tensors = read_fair_esm(GOLDEN / "esm2_tiny.fair_esm.safetensors", config=None, trust_pickle=False)
    model = Esm2(config)
    model.load_state_dict(dict(tensors))
    return model.eval()


@torch.no_grad()
def test_fair_esm_golden_logits_and_representations(golden, golden_model):
    names = ["embedding", "blocks.0", "blocks.1", "final_norm"]
    out = golden_model(golden["input_ids"], hidden_states=names)
    torch.testing.assert_close(out.logits, golden["logits"], atol=1e-4, rtol=0)
    assert list(out.hidden_states) == names
    for i, name in enumerate(names):
        torch.testing.assert_close(out.hidden_states[name], golden[f"representation_{i}"], atol=1e-4, rtol=0)


def test_fair_esm_golden_contacts(golden, golden_model):
    got = golden_model.predict_contacts(golden["input_ids"])
    torch.testing.assert_close(got, golden["contacts"], atol=1e-6, rtol=0)
    assert golden["contacts"].std() > 1e-3  # otherwise the comparison would prove nothing


@torch.no_grad()
def test_packed_golden(golden, golden_model):
    rows = [row[row != PAD] for row in golden["input_ids"]]
    ids, offsets = packed(rows)
    logits = golden_model(ids, cu_seqlens=offsets).logits
    want = torch.cat([golden["logits"][i, : len(row)] for i, row in enumerate(rows)])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


def hugging_face_twin(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig.from_dict(model.config.to_json())
    config._attn_implementation = "eager"
    twin = transformers.EsmForMaskedLM(config)
    state = {**model.state_dict(), "lm_head.decoder.weight": model.esm.embeddings.word_embeddings.weight.detach()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [11, 3, 7]),
        ({"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}, [1, 40]),
        ({"token_dropout": False, "rope_theta": 500.0, "layer_norm_eps": 1e-3}, [9, 9]),
        ({"intermediate_size": 20, "num_attention_heads": 12}, [25, 2, 1, 30]),
    ],
)
def test_equals_hugging_face(changes, lengths):
    model = random_model(tiny_config(**changes), seed=len(lengths))
    twin = hugging_face_twin(model)
    ids = padded(proteins(lengths, seed=len(changes)))
    real = ids != PAD
    want = twin(ids, attention_mask=real.long(), output_hidden_states=True)
    got = model(ids, hidden_states=["embedding", 0, -1])
    assert want.logits.std() > 0.1
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    for name, theirs in zip(["embedding", "blocks.0", "final_norm"], [0, 1, -1], strict=True):
        torch.testing.assert_close(got.hidden_states[name], want.hidden_states[theirs], atol=1e-5, rtol=1e-5)
    assert torch.equal(got.logits, model(ids, attention_mask=real).logits)
    torch.testing.assert_close(
        model.predict_contacts(ids), twin.predict_contacts(ids, real.long()), atol=1e-5, rtol=0, equal_nan=False
    )


@torch.no_grad()
def test_mask_of_ones_switches_padding_detection_off():
    """Hugging Face's golden ids [0, 1, 2, 3, 4, 5] hold a pad id, and it is called without a mask."""
    model = random_model()
    ids = torch.arange(6)[None]
    want = hugging_face_twin(model)(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, want, atol=1e-5, rtol=1e-5)
    assert (model(ids).logits - want).abs().max() > 1e-2


@torch.no_grad()
def test_token_dropout_scales_per_sequence():
    model = random_model()
    table = model.esm.embeddings.word_embeddings.weight
    rows = [torch.tensor([CLS, 5, MASK, 7, EOS]), torch.tensor([CLS, 9, EOS])]
    ids = padded(rows)
    got = model(ids, hidden_states=["embedding"]).hidden_states["embedding"]
    torch.testing.assert_close(got[0, 1], table[5] * 0.88 / (1 - 1 / 5))
    assert not got[0, 2].any()
    torch.testing.assert_close(got[1, 1], table[9] * 0.88)
    assert not got[1, 3:].any()
    flat, offsets = packed(rows)
    in_pack = model(flat, cu_seqlens=offsets, hidden_states=["embedding"]).hidden_states["embedding"]
    torch.testing.assert_close(in_pack, torch.cat([got[0], got[1, :3]]))


@torch.no_grad()
def test_only_masks_stay_finite():
    model = random_model()
    ids = torch.full((2, 4), MASK)
    assert model(ids).logits.isfinite().all()
    assert model(ids.flatten(), cu_seqlens=torch.tensor([0, 4, 8])).logits.isfinite().all()


@torch.no_grad()
def test_packed_equals_padded_equals_single():
    model = random_model(seed=3)
    rows = proteins([17, 1, 30, 6], seed=4)
    ids, offsets = packed(rows)
    names = ["embedding", "blocks.1", "final_norm"]
    in_pack = model(ids, cu_seqlens=offsets, hidden_states=names)
    in_batch = model(padded(rows), hidden_states=names)
    for i, row in enumerate(rows):
        alone = model(row[None], hidden_states=names)
        start, stop = offsets[i], offsets[i + 1]
        torch.testing.assert_close(in_pack.logits[start:stop], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_batch.logits[i, : len(row)], alone.logits[0], atol=1e-5, rtol=1e-5)
        for name in names:
            torch.testing.assert_close(
                in_pack.hidden_states[name][start:stop], alone.hidden_states[name][0], atol=1e-5, rtol=1e-5
            )


def test_packed_gradients_equal_padded_and_reach_every_parameter():
    rows = proteins([12, 5, 20], seed=6)
    ids, offsets = packed(rows)
    model = random_model(seed=5)
    upstream = torch.randn(len(ids), 33, generator=torch.Generator().manual_seed(7))
    parameters = dict(model.named_parameters())
    in_pack = torch.autograd.grad((model(ids, cu_seqlens=offsets).logits * upstream).sum(), parameters.values())
    batch = padded(rows)
    in_batch = torch.autograd.grad((model(batch).logits[batch != PAD] * upstream).sum(), parameters.values())
    for name, mine, theirs in zip(parameters, in_pack, in_batch, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert mine.abs().max() > 1e-6, name


def test_gradients_equal_hugging_face():
    model = random_model(seed=8)
    twin = hugging_face_twin(model)
    ids = padded(proteins([10, 4], seed=9))
    upstream = torch.randn(*ids.shape, 33, generator=torch.Generator().manual_seed(10)) * (ids != PAD)[..., None]
    (model(ids).logits * upstream).sum().backward()
    (twin(ids, attention_mask=(ids != PAD).long()).logits * upstream).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size):
    layers, heads, width, parameters = PUBLISHED[size]
    config = Esm2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    model = Esm2(config, device="meta", dtype=torch.bfloat16)
    assert model.num_parameters() == parameters
    assert len(model.blocks) == layers
    assert sum(buffer.numel() for buffer in model.esm.contact_head.buffers()) == layers * heads + 1


@torch.no_grad()
@pytest.mark.parametrize("elements", [1, 2 * 62 * 62 * 2, 1 << 30])
def test_contacts_equal_those_from_all_maps_at_once(elements, monkeypatch):
    """One head at a time, groups of unequal size, and all together."""
    monkeypatch.setattr(contacts, "_MAP_ELEMENTS_ON_CPU", elements)
    model = random_model(seed=13)
    ids = padded(proteins([60, 33], seed=14))
    kept = ((ids != PAD) & (ids != EOS)).float()
    maps = torch.stack(hugging_face_twin(model)(ids, (ids != PAD).long(), output_attentions=True).attentions, dim=1)
    maps = (maps * kept[:, None, None, :, None] * kept[:, None, None, None, :]).flatten(1, 2)[..., 1:-1, 1:-1].double()
    symmetric = maps + maps.mT
    sums = symmetric.sum(-1, keepdim=True)
    corrected = symmetric - sums * sums.mT / sums.sum(-2, keepdim=True)
    head = model.esm.contact_head.regression
    want = torch.sigmoid(torch.einsum("c,bcij->bij", head.weight[0].double(), corrected) + head.bias)
    torch.testing.assert_close(model.predict_contacts(ids).double(), want, atol=1e-5, rtol=0)
    assert want[0].std() > 1e-3


def test_contacts_ignore_padding_and_order_of_the_batch():
    model = random_model(seed=11)
    rows = proteins([14, 6], seed=12)
    together = model.predict_contacts(padded(rows))
    for i, row in enumerate(rows):
        size = len(row) - 2
        alone = model.predict_contacts(row[None])
        assert alone.shape == (1, size, size)
        torch.testing.assert_close(alone, alone.transpose(1, 2))
        torch.testing.assert_close(together[i, :size, :size], alone[0], atol=1e-6, rtol=0)


def test_contacts_without_a_head_are_refused():
    model = Esm2(tiny_config())
    model.init_weights(seed=0)
    with pytest.raises(CapabilityError, match="no contact head"):
        model.predict_contacts(torch.tensor([[CLS, 5, EOS]]))
    with pytest.raises(InputError, match="2 tokens per row"):
        random_model().predict_contacts(torch.tensor([[CLS, EOS]]))


def test_init_weights_is_deterministic_and_published():
    config = tiny_config(hidden_size=48)
    first, second, other = (Esm2(config) for _ in range(3))
    first.init_weights(seed=1)
    torch.manual_seed(99)
    second.init_weights(seed=1)
    other.init_weights(seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    query = "esm.encoder.layer.0.attention.self.query.weight"
    key = query.replace("query", "key")
    state = first.state_dict()
    assert not torch.equal(state[query], other.state_dict()[query])
    assert not torch.equal(state[query], state[key])
    assert state[query].std().item() == pytest.approx(0.02, rel=0.1)
    assert not state["esm.embeddings.word_embeddings.weight"][PAD].any()
    assert (state["lm_head.layer_norm.weight"] == 1).all()
    assert not state["lm_head.bias"].any()
    assert torch.equal(state["esm.rotary_embeddings.inv_freq"], rotary_frequencies(config))


def test_decay_spares_biases_and_norms():
    model = Esm2(tiny_config(), device="meta")
    for name, parameter in model.named_parameters():
        assert model.decays(name) == (parameter.dim() == 2), name


def test_flops_follow_the_shape():
    config = Esm2Config(hidden_size=320, num_hidden_layers=6, num_attention_heads=20)
    model = Esm2(config, device="meta")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)  # the tied embedding is the head
    assert model.flops_per_token(0) == 2 * matrices
    assert model.flops_per_token(100) - model.flops_per_token(0) == 6 * 4 * 320 * 100


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half().float()])
def test_casting_keeps_frequencies_and_contact_head(cast):
    model = random_model()
    frequencies = model.esm.rotary_embeddings.inv_freq.clone()
    head = model.esm.contact_head.regression.weight.clone()
    cast(model)
    assert torch.equal(model.esm.rotary_embeddings.inv_freq, frequencies)
    assert torch.equal(model.esm.contact_head.regression.weight, head)
    assert Esm2(tiny_config(), dtype=torch.bfloat16).esm.rotary_embeddings.inv_freq.dtype == torch.float32


def test_fsdp2_mixed_precision_keeps_fp32_frequencies():
    from torch.distributed import device_mesh, fsdp

    model = random_model()
    seen = []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = device_mesh.init_device_mesh("cpu", (1,))
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for block in model.blocks:
            fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
            block.register_forward_pre_hook(lambda _, args: seen.append([args[0].dtype, args[1].rotation[0].dtype]))
        fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
        model(torch.tensor([[CLS, 5, EOS]])).logits.float().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [[torch.bfloat16, torch.float32]] * 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_bf16_stays_near_fp32():
    model = random_model(scale=0.1)
    rows = proteins([20, 9])
    want = model(padded(rows)).logits
    model.bfloat16()
    ids, offsets = packed(rows)
    got = model(ids, cu_seqlens=offsets).logits
    assert got.dtype == torch.bfloat16
    real = padded(rows) != PAD
    torch.testing.assert_close(got.float(), want[real], atol=0.05, rtol=0.05)


@torch.no_grad()
def test_names_and_aliases_of_representations():
    model = random_model()
    ids = torch.tensor([[CLS, 5, EOS]])
    out = model(ids, hidden_states=[1, "norm", "decoder.layers.0", "embedding"])
    canonical = {"norm": "final_norm", "decoder.layers.0": "blocks.0"}
    assert set(out.hidden_states) == {"blocks.1", "embedding", *canonical, *canonical.values()}
    assert all(out.hidden_states[alias] is out.hidden_states[name] for alias, name in canonical.items())
    with pytest.raises(UnknownNameError, match=r"blocks\.2"):
        model(ids, hidden_states=["blocks.2"])


IDS = torch.tensor([CLS, 5, 6, EOS])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS}, r"\[B, L\]"),
        ({"input_ids": IDS[None, :0]}, "at least one token"),
        ({"input_ids": IDS[None].float()}, "int64 or int32"),
        ({"input_ids": IDS[None], "attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"input_ids": IDS[None], "cu_seqlens": torch.tensor([0, 4])}, r"must be \[T\]"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 3])}, "from 0 to 4"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([1, 4])}, "from 0 to 4"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 3, 2, 4])}, "not decrease"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(4)}, "does not apply"),
    ],
)
def test_contradictory_input_is_refused(arguments, message):
    model = Esm2(tiny_config())
    with pytest.raises(InputError, match=message):
        model(arguments.pop("input_ids"), **arguments)


def test_config_round_trip_and_refusals():
    config = tiny_config(token_dropout=False)
    assert config.intermediate_size == 96
    assert Esm2Config.from_json(config.to_json()) == config
    assert config.max_length == 1022
    with pytest.raises(ConfigError, match=r"hiden_size: no such setting; did you mean 'hidden_size'"):
        Esm2Config.from_json({**config.to_json(), "hiden_size": 3})
    with pytest.raises(ConfigError, match="position_embedding_type"):
        Esm2Config.from_json({**config.to_json(), "position_embedding_type": "absolute"})
    with pytest.raises(ConfigError, match="multiple of 2 x num_attention_heads"):
        Esm2Config.from_json({**config.to_json(), "num_attention_heads": 24})


def test_config_is_complete_for_hugging_face():
    transformers = pytest.importorskip("transformers")
    ours = tiny_config().to_json()
    theirs = transformers.EsmConfig.from_dict(ours)
    own_fields = transformers.EsmConfig().to_dict().keys() - transformers.PreTrainedConfig().to_dict().keys()
    assert own_fields <= ours.keys()
    assert {key: getattr(theirs, key) for key in own_fields} == {key: ours[key] for key in own_fields}
