from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cistron.errors import ConfigError, InputError, UnknownNameError
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.convert import read_vortex
from cistron.models.evo2.forms import to_inference_form
from cistron.models.evo2.initial import rotary_frequencies
from cistron.models.evo2.model import Evo2

GOLDEN = Path(__file__).parents[2] / "golden"
GOLDEN_MODELS = ("evo2_tiny", "evo2_tiny_longrope")

SIZES = {  # name: (hidden, pattern, heads, groups, mlp, published parameters)
    "1b_base": (1920, "SDH*SDHSDH*SDHSDH*SDHSDH*", 15, 128, 5120, 1_107_989_760),
    "7b_base": (4096, "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*", 32, 256, 11_008, 6_481_059_584),
    "7b": (4096, "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*", 32, 256, 11_264, 6_581_722_880),
    "20b": (8192, "SDH*SDHSDH*SDHSDH*SDHSDH", 64, 512, 22_528, 19_738_780_160),
    "40b_base": (8192, "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*SDH*SDHSDH*SDHSDH*", 64, 512, 21_888, 40_331_142_144),
    "40b": (8192, "SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*SDH*SDHSDH*SDHSDH*", 64, 512, 22_528, 41_117_574_144),
}


def tiny_config(**changes):
    shape = {
        "hidden_size": 16,
        "layer_pattern": "SDH*",
        "num_attention_heads": 2,
        "mlp_size": 24,
        "hcm_filter_length": 12,
        "num_filter_groups": 4,
        "state_size": 3,
        "max_length": 512,
    }
    return Evo2Config.model_validate({**shape, **changes})


def random_model(config=None, *, seed=0, dtype=None):
    """A model in which every part matters: all tensors random, and poles that decay over some ten tokens."""
    model = Evo2(config or tiny_config(), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("log_poles"):
                tensor.copy_(-drawn.abs() * 0.2 - 0.01)
            elif name.endswith("decay"):
                tensor.copy_(drawn.abs())
            elif not name.endswith("inv_freq"):
                tensor.copy_(drawn * 0.3 + float("norm" in name))
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(60, 90, shape, generator=torch.Generator().manual_seed(seed))


def packed(rows):
    lengths = torch.tensor([len(row) for row in rows])
    return torch.cat(rows), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@pytest.fixture(scope="module", params=GOLDEN_MODELS)
def golden(request):
    """A model of the published package, and what that package computes with it."""
    config, tensors = read_vortex(GOLDEN / f"{request.param}.vortex.safetensors", config=None, trust_pickle=False)
    model = Evo2(config)
    model.load_state_dict(dict(tensors))
    return model.eval(), load_file(GOLDEN / f"{request.param}.golden.safetensors")


def test_logits_and_every_block_equal_the_published_package(golden):
    model, expected = golden
    blocks = range(model.config.num_layers)
    with torch.inference_mode():
        output = model(expected["input_ids"], hidden_states=list(blocks))
    assert (output.logits - expected["logits"]).abs().max() < 2e-4
    for index in blocks:
        block = expected[f"block_{index}"]
        assert (output.hidden_states[f"blocks.{index}"] - block).abs().max() < 2e-5 * block.abs().max()


def test_greedy_continuation_equals_the_published_package(golden):
    model, expected = golden
    ids = expected["prompt_ids"]
    with torch.inference_mode():
        for _ in range(expected["greedy_ids"].shape[1]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids[:, expected["prompt_ids"].shape[1] :], expected["greedy_ids"])


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    width, pattern, heads, groups, mlp, parameters = SIZES[size]
    config = Evo2Config(
        hidden_size=width,
        layer_pattern=pattern,
        num_attention_heads=heads,
        num_filter_groups=groups,
        mlp_size=mlp,
        max_length=8192,
    )
    model = Evo2(config, device="meta")
    assert model.num_parameters() == parameters
    training = Evo2(config.model_copy(update={"parametrization": "training"}), device="meta")
    assert training.num_parameters() - parameters == config.count("H") * 16 * width


@pytest.mark.parametrize("lengths", [(9, 9, 9), (1, 30, 2, 17, 3), (5, 0, 40), (33,)])
def test_packed_documents_equal_separate_ones_with_gradients(lengths):
    rows = [tokens(length, seed=length) for length in lengths]
    results = []
    for form in ("packed", "separate"):
        model = random_model()
        if form == "packed":
            ids, cu_seqlens = packed(rows)
            logits = model(ids, cu_seqlens=cu_seqlens).logits
        else:
            logits = torch.cat([model(row[None]).logits[0] for row in rows if len(row)])
        weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        (logits.log_softmax(-1) * weights).sum().div(len(logits)).backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (logits, gradients), (expected, expected_gradients) = results
    assert (logits - expected).abs().max() < 1e-5
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() < 1e-5 * max(scale, 1), name


def test_padding_on_the_right_changes_nothing():
    model = random_model()
    rows = [tokens(length, seed=length) for length in (3, 11, 20)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = torch.tensor([[t < len(row) for t in range(20)] for row in rows])
    with torch.inference_mode():
        for logits in (model(ids, attention_mask=mask).logits, model(ids).logits):
            for row, got in zip(rows, logits, strict=True):
                assert (got[: len(row)] - model(row[None]).logits[0]).abs().max() < 1e-5


def test_a_token_sees_its_past_and_not_its_future():
    model = random_model()
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 20] = 77 if ids[0, 20] != 77 else 78
    with torch.inference_mode():
        difference = (model(ids).logits - model(changed).logits)[0].abs().amax(-1)
    assert difference[:20].max() < 1e-6
    assert difference[20:].min() > 1e-6


@pytest.mark.parametrize("parametrization", ["inference", "training"])
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(parametrization):
    model = Evo2(tiny_config(parametrization=parametrization, layer_pattern="SDH*SDH"))
    logits = model(tokens(2, 50)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(2, 50)[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("parametrization", ["inference", "training"])
@pytest.mark.parametrize(
    ("pattern", "size", "tolerance"),
    [("SDHS", 1e-6, 1e-4), ("S*", 1e-3, 1e-2)],  # rotary positions are fp32, which a small step would drown in
)
def test_gradients_agree_with_finite_differences(parametrization, pattern, size, tolerance):
    inside = parametrization == "training"
    config = tiny_config(parametrization=parametrization, norm_eps_inside=inside, norm_eps=1e-2, layer_pattern=pattern)
    model = random_model(config).double()
    ids, cu_seqlens = packed([tokens(7), tokens(12, seed=1), tokens(3, seed=2)])
    assert {tensor.dtype for tensor in model.state_dict().values()} <= {torch.float64, torch.float32}

    def loss():
        return model(ids, cu_seqlens=cu_seqlens).logits.log_softmax(-1)[:, 65].mean()

    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(), parameters.values())
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        values = []
        for step in (size, -size):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(loss().item())
                parameter.sub_(direction, alpha=step)
        numeric = (values[0] - values[1]) / (2 * size)
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=tolerance, abs=tolerance / 1e3), name


def test_the_training_form_becomes_the_inference_form_exactly():
    training = random_model(tiny_config(parametrization="training", layer_pattern="SDH*SDH"))
    config, tensors = to_inference_form(training.config, training.state_dict().items())
    inference = Evo2(config)
    inference.load_state_dict(dict(tensors))
    ids = tokens(2, 70)
    with torch.inference_mode():
        assert torch.equal(inference(ids).logits, training(ids).logits)
    assert to_inference_form(config, inference.state_dict().items())[0] == config


def test_both_parametrizations_start_as_the_same_function():
    ids = tokens(1, 30)
    logits = []
    for parametrization in ("inference", "training"):
        model = Evo2(tiny_config(parametrization=parametrization))
        model.init_weights(seed=5)
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_initialisation_is_that_of_the_publication_and_follows_the_seed():
    config = tiny_config(hidden_size=64, num_attention_heads=4, parametrization="training", mlp_size=128)
    first, second = Evo2(config), Evo2(config, dtype=torch.bfloat16)
    first.init_weights(seed=3)
    second.init_weights(seed=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor.to(second.state_dict()[name].dtype), second.state_dict()[name]), name
    second.init_weights(seed=4)
    assert not torch.equal(first.embedding.weight.bfloat16(), second.embedding.weight)
    state = first.state_dict()
    assert state["blocks.0.mlp.gate.weight"].std() == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)
    assert state["blocks.0.mlp.output.weight"].std() == pytest.approx(2 / (4 * 64**0.5), rel=0.05)
    assert 0.3 < state["blocks.0.mixer.filter.taps"].abs().max() < 3**-0.5
    assert state["blocks.1.mixer.filter.taps"].std() == pytest.approx(1e-5 / 8192**0.5, rel=0.3)
    gamma = state["blocks.2.mixer.filter.gamma"].exp()
    assert 0.01 <= gamma.min() <= gamma.max() <= 0.1
    assert (state["blocks.2.mixer.filter.p"] == -1).all()
    decay = state["blocks.1.mixer.filter.decay"]
    assert decay[:, 0].eq(1).all()
    assert decay[-1, 11].item() == pytest.approx(2.718281828 ** (-100 * 11 / 8191), rel=1e-5)
    assert decay[0, 11].item() == pytest.approx(2.718281828 ** (-0.01 * 11 / 8191), rel=1e-5)


@pytest.mark.parametrize(("base", "discrepancy"), [(1e4, 5.2014e-06), (1e6, -2.5293e-05)])
def test_fresh_rotary_frequencies_are_rounded_like_the_released_ones(base, discrepancy):
    config = tiny_config(hidden_size=256, rotary_base=base)
    exact = base ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    rounded = rotary_frequencies(config)
    assert (rounded.double() - exact).mean().item() == pytest.approx(discrepancy, rel=1e-3)


@pytest.mark.parametrize("parametrization", ["inference", "training"])
def test_a_cast_keeps_what_needs_fp32(parametrization):
    model = random_model(tiny_config(parametrization=parametrization))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.bfloat16()
    state = model.state_dict()
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float32} == model.fp32_names
    assert {name.rsplit(".", 1)[1] for name in model.fp32_names} >= {"residues", "inv_freq"}
    for name in model.fp32_names:
        assert torch.equal(state[name], before[name])
    built = Evo2(model.config, dtype=torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in built.items()} == {n: t.dtype for n, t in state.items()}
    assert model(tokens(1, 9)).logits.dtype == torch.bfloat16


def test_bf16_is_close_to_fp32():
    model = random_model(tiny_config(norm_eps=1e-2))
    ids = tokens(2, 60)
    with torch.inference_mode():
        exact = model(ids).logits
        rounded = model.bfloat16()(ids).logits.float()
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_autocast_trains_fp32_weights_with_bf16_products():
    model = random_model(tiny_config(norm_eps=1e-2, parametrization="training"))
    ids, cu_seqlens = packed([tokens(20), tokens(9, seed=1)])
    exact = model(ids, cu_seqlens=cu_seqlens).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, cu_seqlens=cu_seqlens).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05
    rounded.float().log_softmax(-1)[:, 65].mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters())


def test_only_matrices_decay():
    model = Evo2(tiny_config(parametrization="training", hcs_bias=True, tie_embeddings=False), device="meta")
    decaying = {name for name, _ in model.named_parameters() if model.decays(name)}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and ".filter." not in name and "taps" not in name
        assert (name in decaying) == is_matrix, name


def test_flops_are_twice_the_multiply_adds():
    config = tiny_config()
    model = Evo2(config, device="meta")
    width, mlp = config.hidden_size, config.mlp_size
    dense = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n)
    assert dense == width * 512 + 4 * (4 * width**2 + 3 * width * mlp)
    visible = [sum(4 * width for _ in range(t + 1)) for t in range(64)]
    filters = width * (3 * 18 + 2 * 7 + 2 * 12 + 10 * 6)
    assert model.flops_per_token(64) == pytest.approx(2 * dense + sum(visible) / 64 + filters)


def test_hidden_states_by_name_index_and_alias():
    model = random_model()
    ids = tokens(1, 6)
    with torch.inference_mode():
        output = model(ids, hidden_states=["embedding_layer", 0, "decoder.layers.3", -1])
        canonical = {"embedding_layer": "embedding", "decoder.layers.3": "blocks.3"}
        assert set(output.hidden_states) == {"blocks.0", "final_norm", *canonical, *canonical.values()}
        assert all(output.hidden_states[alias] is output.hidden_states[name] for alias, name in canonical.items())
        assert torch.equal(output.hidden_states["embedding"], model.embedding(ids))
        assert torch.equal(output.hidden_states["final_norm"], model.final_norm(output.hidden_states["blocks.3"]))
        assert torch.equal(output.hidden_states["final_norm"] @ model.embedding.weight.T, output.logits)
    with pytest.raises(UnknownNameError, match=r"blocks\.3"):
        model(ids, hidden_states=["blocks.4"])


def test_the_gate_is_a_gelu_in_the_first_layer_only_or_everywhere():
    arc = [block.mlp.activation for block in Evo2(tiny_config(), device="meta").blocks]
    nvidia = [block.mlp.activation for block in Evo2(tiny_config(mlp_activation="gelu"), device="meta").blocks]
    assert arc == ["gelu", "identity", "identity", "identity"]
    assert set(nvidia) == {"gelu"}


def test_the_nvidia_variant_adds_a_skip_per_group():
    config = tiny_config(layer_pattern="S", hcs_bias=True, attention_output_bias=False, tie_embeddings=False)
    model = random_model(config)
    skip = model.blocks[0].mixer.filter.skip
    with torch.inference_mode():
        z = torch.randn(1, 16, 9)
        # Both gates are open, and the projection's filter lets its input pass.
        projected = torch.stack([torch.ones_like(z), torch.ones_like(z), z], dim=2).flatten(1, 2)
        passing = torch.tensor([0.0, 0.0, 1.0]).expand(48, 3)
        with_skip = model.blocks[0].mixer.filter(projected, passing)
        saved = skip.clone()
        skip.zero_()
        without = model.blocks[0].mixer.filter(projected, passing)
    torch.testing.assert_close(with_skip - without, saved.repeat_interleave(4)[:, None] * z)
    assert "unembed.weight" in model.state_dict()


def test_the_two_norms_differ_where_eps_matters():
    x = torch.full((1, 16), 1e-3)
    outside, inside = (
        Evo2(tiny_config(norm_eps_inside=flag, norm_eps=1e-3)).final_norm(x)[0, 0].item() for flag in (False, True)
    )
    assert outside == pytest.approx(0.5, rel=1e-5)
    assert inside == pytest.approx(1e-3 / (1e-6 + 1e-3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "cu_seqlens"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.zeros(1, 3)}, "int64 or int32"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 2)}, r"\[1, 2\]"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.tensor([[0, 1, 1]])}, "on the right"),
        ({"input_ids": tokens(3), "cu_seqlens": torch.tensor([0, 2])}, "0 to 3"),
        ({"input_ids": tokens(3), "cu_seqlens": torch.tensor([0, 2, 1, 3])}, "decrease"),
        ({"input_ids": tokens(1, 3), "cu_seqlens": torch.tensor([0, 3])}, r"must be \[T\]"),
        (
            {"input_ids": tokens(3), "cu_seqlens": torch.tensor([0, 3]), "attention_mask": torch.ones(3)},
            "attention_mask",
        ),
    ],
)
def test_bad_input_is_refused_with_what_was_got(arguments, words):
    with pytest.raises(InputError, match=words):
        Evo2(tiny_config())(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_pattern": "SDX"}, "layer_pattern"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_filter_groups": 3}, "num_filter_groups"),
        ({"filter_cache_length": 5}, "hcm_filter_length"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
    ],
)
def test_a_bad_configuration_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Evo2Config.from_json({**tiny_config().to_json(), **changes})


def test_the_configuration_survives_json():
    config = tiny_config(rotary_scaling=16, parametrization="training", requires_fp8=True)
    assert Evo2Config.from_json(config.to_json()) == config


def test_documents_of_similar_length_share_a_view():
    from cistron.models.evo2.layout import packed_layout

    ids, cu_seqlens = packed([tokens(length) for length in (1, 100, 5, 90, 7, 4)])
    layout = packed_layout(ids, None, cu_seqlens, vocab_size=512)
    assert [bucket.shape for bucket in layout.buckets] == [(1, 1), (3, 7), (2, 100)]
    assert sorted(torch.cat([bucket.tokens for bucket in layout.buckets]).tolist()) == list(range(len(ids)))
    starts = [layout.positions[start].item() for start, _ in pairwise(cu_seqlens.tolist())]
    assert starts == [0] * 6
