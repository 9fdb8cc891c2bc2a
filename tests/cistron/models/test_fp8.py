from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cistron.models.test_e4m3 import MAGNITUDES
from tests.tiny_models import tiny_evo2
from torch import nn
from torch.nn import functional

from cistron.errors import CapabilityError, CheckpointError
from cistron.models.checkpoint import load_checkpoint, save_checkpoint, write_checkpoint
from cistron.models.families import config_of
from cistron.models.layers import fp8
from cistron.models.layers.fp8 import Fp8Path, Fp8Projection, set_fp8_path
from cistron.models.registry import load_model
from cistron.train.export import training_form

PATHS: list[Fp8Path] = ["emulated", "hopper_emulated", "scaled_mm"]
IDS = torch.tensor([[65, 67, 71, 84] * 9, [84, 71, 71, 65] * 9])


def projection(
    path: Fp8Path | None, *, scales: tuple[float, float] = (1.0, 1.0), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Fp8Projection:
    module = Fp8Projection(48, 32, stored_scales=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_(torch.randn(32, 48, generator=generator))
        assert module.fp8 is not None
        module.fp8.input_scale.fill_(scales[0])
        module.fp8.weight_scale.fill_(scales[1])
    set_fp8_path(module, path)
    return module.to(dtype).eval()


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


def rounded(value: float) -> float:
    """Nearest E4M3 number by search; test data hold no ties."""
    magnitude = min(MAGNITUDES, key=lambda candidate: abs(abs(value) - candidate))
    return float(magnitude) if value > 0 else -float(magnitude)


@pytest.mark.parametrize("path", PATHS)
def test_the_projection_is_the_naive_one(path: Fp8Path):
    """Element by element: the large scales make some operands saturate and others subnormal."""
    module, x = projection(path, scales=(300.0, 0.01)), inputs(3)
    expected = []
    for row in x.tolist():
        left = [rounded(value * 300.0) for value in row]
        expected.append(
            [
                sum(a * rounded(b * 0.01) for a, b in zip(left, weights, strict=True)) / (300.0 * 0.01)
                for weights in module.weight.tolist()
            ]
        )
    tolerance = 1e-3 if path == "hopper_emulated" else 1e-5
    torch.testing.assert_close(module(x), torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_scales_change_the_result_as_they_change_the_rounding():
    x = inputs(5)
    with torch.no_grad():
        exact = projection(None)(x)
        errors = {
            scales: (projection("emulated", scales=scales)(x) - exact).abs().max()
            for scales in [(1.0, 1.0), (64.0, 64.0), (2.0**-8, 2.0**-8), (1e4, 1.0)]
        }
    assert 1e-3 < errors[1.0, 1.0] < 1
    # Powers of two change nothing until numbers become subnormal or saturate.
    assert errors[64.0, 64.0] <= errors[1.0, 1.0] * 1.01
    assert errors[2.0**-8, 2.0**-8] > 2 * errors[1.0, 1.0]
    assert errors[1e4, 1.0] > 2 * errors[1.0, 1.0]


@pytest.mark.parametrize("path", PATHS)
def test_bf16_results_are_the_rounded_fp32_ones(path: Fp8Path):
    x = inputs(7).bfloat16()
    found = projection(path, dtype=torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    reference = copy.deepcopy(projection(path, dtype=torch.bfloat16)).float()(x.float())
    torch.testing.assert_close(found.float(), reference, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_rows_do_not_depend_on_each_other_nor_on_padding(path: Fp8Path, rows: int):
    module, x = projection(path, scales=(8.0, 4.0), dtype=torch.bfloat16), inputs(33).bfloat16()
    assert torch.equal(module(x[:rows]), module(x)[:rows])
    grid = inputs(3, rows).bfloat16()
    assert torch.equal(module(grid)[1], module(grid[1]))
    assert module(grid).shape == (3, rows, 32)


def test_the_emulation_is_the_product_of_pytorch():
    """Its CPU kernel is an independent implementation of what runs on the GPU, but for the order of the sum."""
    x = inputs(64, seed=4)
    options = {"scales": (20.0, 37.0)}
    torch.testing.assert_close(
        projection("emulated", **options)(x), projection("scaled_mm", **options)(x), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("path", PATHS)
def test_autocast_does_not_shorten_the_sums(path: Fp8Path):
    module, x = projection(path, scales=(20.0, 37.0)), inputs(6)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("stored", [True, False])
def test_the_weight_is_rounded_once(stored: bool):
    module = Fp8Projection(48, 32, stored_scales=stored).eval()
    set_fp8_path(module, "emulated")
    module(inputs(2))
    first = module._rounded
    module(inputs(3))
    assert module._rounded is first is not None


def test_a_changed_weight_or_scale_is_rounded_again():
    module, x = projection("emulated"), inputs(4)
    module(x)
    with torch.no_grad():
        module.weight.mul_(2)
    expected = projection("emulated")
    expected.weight = module.weight
    assert torch.equal(module(x), expected(x))
    module.weight = nn.Parameter(torch.zeros_like(module.weight))
    assert not module(x).any()
    other = projection(None, seed=3)
    module.load_state_dict(other.state_dict())
    set_fp8_path(other, "emulated")
    assert torch.equal(module(x), other(x))
    assert module.fp8 is not None
    module.fp8.weight_scale.fill_(1e-4)
    assert not torch.equal(module(x), other(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_leave_the_rounded_weight_behind(again: Any):
    module, x = projection("emulated"), inputs(4)
    expected = module(x)
    twin = again(module)
    assert twin.path == "emulated"
    assert twin._rounded is None
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("path", PATHS)
def test_fp8_gives_no_gradients(path: Fp8Path):
    module, x = projection(path), inputs(4)
    loss = module(x.requires_grad_()).sum()
    with pytest.raises(CapabilityError, match="precision=bf16 or fp32"):
        loss.backward()
    set_fp8_path(module, None)
    module(x).sum().backward()
    assert module.weight.grad is not None


def test_odd_widths_are_for_the_emulation():
    module = Fp8Projection(24, 72, stored_scales=False).eval()
    with pytest.raises(CapabilityError, match="maps 24 to 72 channels; use precision=fp8_emulated"):
        set_fp8_path(module, "scaled_mm")
    assert module.path is None
    set_fp8_path(module, "emulated")
    assert module(torch.randn(3, 24)).shape == (3, 72)


@pytest.mark.parametrize("path", ["emulated", "hopper_emulated"])
def test_a_model_in_fp8_is_close_to_itself_but_not_equal(path: Fp8Path):
    model = tiny_evo2(requires_fp8=True)
    with torch.inference_mode():
        exact = model(IDS).logits
        set_fp8_path(model, path)
        found = model(IDS).logits
        set_fp8_path(model, None)
        assert torch.equal(model(IDS).logits, exact)
    assert not torch.equal(found, exact)
    similarity = functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    assert 0.97 < similarity < 0.99999


@pytest.mark.parametrize("path", ["emulated", "hopper_emulated"])
def test_decoding_batches_and_packing_agree_in_fp8(path: Fp8Path):
    model = tiny_evo2(requires_fp8=True)
    set_fp8_path(model, path)
    with torch.inference_mode():
        whole = model(IDS).logits
        torch.testing.assert_close(model(IDS[:1]).logits, whole[:1], rtol=0, atol=1e-4)
        packed = model(IDS.flatten(), cu_seqlens=torch.tensor([0, 36, 72])).logits
        torch.testing.assert_close(packed.view_as(whole), whole, rtol=0, atol=1e-4)
        cache = model.new_cache(2)
        steps = [model(IDS[:, at : at + size], cache=cache).logits for at, size in [(0, 7), (7, 28), (35, 1)]]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


def scaled_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_evo2(fp8_scales=True, requires_fp8=True)
    for number, module in enumerate(m for m in model.modules() if isinstance(m, fp8.StaticScales)):
        module.input_scale.fill_(3.1 + number)
        module.weight_scale.fill_(70.7 + number)
    return model.to(dtype)


def test_scales_are_stored_and_come_back(tmp_path: Path):
    model = scaled_model(torch.bfloat16)
    plain = tiny_evo2().state_dict().keys()
    extra = {f"blocks.{i}.mixer.projection.fp8.{kind}_scale" for i in (0, 1, 2, 4) for kind in ("input", "weight")}
    assert model.state_dict().keys() - plain == extra
    assert extra <= model.fp32_names
    directory = save_checkpoint(model, tmp_path / "model")
    loaded = load_model(directory, precision="fp8_emulated")
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.state_dict()["blocks.2.mixer.projection.fp8.input_scale"] == torch.tensor(5.1)
    assert load_checkpoint(directory, dtype=torch.bfloat16).state_dict()[min(extra)].dtype == torch.float32
    set_fp8_path(model, "emulated")
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert not torch.equal(load_model(directory, precision="bf16")(IDS).logits, loaded(IDS).logits)


def test_a_missing_scale_is_an_error(tmp_path: Path):
    model = scaled_model()
    tensors = {name: t for name, t in model.state_dict().items() if name != "blocks.1.mixer.projection.fp8.input_scale"}
    with pytest.raises(CheckpointError, match=r"missing tensor blocks\.1\.mixer\.projection\.fp8\.input_scale"):
        write_checkpoint(config_of(model), tensors.items(), tmp_path / "model")


def test_fresh_scales_are_one_and_training_has_none():
    model = tiny_evo2(fp8_scales=True)
    scales = [tensor for name, tensor in model.state_dict().items() if name.endswith("_scale")]
    assert len(scales) == 8
    assert all(tensor == 1 for tensor in scales)
    form = training_form(config_of(model).to_json())
    assert not form.fp8_scales
    assert not form.requires_fp8
