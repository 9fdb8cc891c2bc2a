from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.cistron.models.test_fp8 import inputs, projection
from torch import nn

from cistron.models.layers.e4m3 import product_in_fp32, round_to_e4m3
from cistron.models.layers.fp8 import Fp8Projection, set_fp8_path
from cistron.models.layers.fp8_hardware import fp8_hardware


def test_the_hardware_product_gets_whole_sixteens(monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = torch._scaled_mm

    def spy(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append((tuple(x.shape), x.float()[-1].abs().max().item(), options["use_fast_accum"]))
        return real(x, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    module = projection("scaled_mm", dtype=torch.bfloat16)
    assert module(inputs(2, 9).bfloat16()).shape == (2, 9, 32)
    assert seen == [((32, 48), 0.0, True)]


class TransformerEngineStandIn(nn.Module):
    """Computes what the library's linear layer does in FP8, with the scales found where the library keeps them."""

    recipes: list[Any] = []  # noqa: RUF012

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: Any, device: Any) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype, device=device))
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        assert self.fp8_meta["num_gemms"] == 1
        self.fp8_meta["scaling_fwd"] = SimpleNamespace(scale=torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(self.recipes) == 1, "not inside autocast"
        assert not torch.is_grad_enabled(), "the library would let the scales follow the data"
        assert len(x) % 16 == 0
        scale = self.fp8_meta["scaling_fwd"].scale
        left, right = round_to_e4m3(x, scale[0]), round_to_e4m3(self.weight, scale[1])
        result = product_in_fp32(left, right) / (scale[0] * scale[1])
        scale.fill_(99.0)  # As when another model of the process trains.
        return result.to(x.dtype)


@pytest.fixture(params=["autocast", "fp8_autocast"])
def transformer_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    class Linear(TransformerEngineStandIn):
        recipes: list[Any] = []  # noqa: RUF012

    @contextmanager
    def autocast(*, enabled: bool, recipe: Any = None, fp8_recipe: Any = None) -> Any:
        assert enabled
        assert (recipe or fp8_recipe) == {"fp8_format": "hybrid", "amax_history_len": 16, "amax_compute_algo": "max"}
        Linear.recipes.append(recipe or fp8_recipe)
        yield
        Linear.recipes.pop()

    package, library = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    common, recipe = ModuleType("transformer_engine.common"), ModuleType("transformer_engine.common.recipe")
    library.Linear = Linear  # type: ignore[attr-defined]
    setattr(library, request.param, autocast)
    recipe.DelayedScaling, recipe.Format = dict, SimpleNamespace(HYBRID="hybrid")  # type: ignore[attr-defined]
    package.pytorch, package.common, common.recipe = library, common, recipe  # type: ignore[attr-defined]
    for module in (package, library, common, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Linear


def test_transformer_engine_is_called_with_the_stored_scales(transformer_engine: type[nn.Module]):
    module, x = projection("transformer_engine", scales=(12.0, 50.0)), inputs(2, 9)
    expected = projection("emulated", scales=(12.0, 50.0))(x)
    for _ in range(2):
        torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)
    assert module.state_dict().keys() == {"weight", "fp8.input_scale", "fp8.weight_scale"}
    assert copy.deepcopy(module)._engine is None
    with torch.no_grad():
        module.weight.zero_()
    assert not module(x).any()
    module.weight = nn.Parameter(torch.ones_like(module.weight))
    assert module(x).any()


@pytest.mark.parametrize(
    ("capability", "path", "generation"),
    [
        ((8, 0), None, None),
        ((8, 9), "scaled_mm", "ada"),
        ((9, 0), "scaled_mm", "hopper"),
        ((12, 0), "scaled_mm", "blackwell"),
    ],
)
def test_what_a_gpu_can_do(
    capability: tuple[int, int], path: str | None, generation: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    found = fp8_hardware(torch.device("cuda"))
    assert (found.path, found.generation) == (path, generation)
    assert f"NVIDIA X1 (compute capability {capability[0]}.{capability[1]})" in found.reason


def test_the_library_is_preferred_where_it_is(transformer_engine: type[nn.Module], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(torch.version, "hip", None)
    assert fp8_hardware(torch.device("cuda")).path == "transformer_engine"


def test_no_fp8_on_cpus_and_other_makers(monkeypatch: pytest.MonkeyPatch):
    assert "this is cpu" in fp8_hardware(torch.device("cpu")).reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert fp8_hardware(torch.device("cuda")).path is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8")
def test_hardware_agrees_with_its_emulation():
    """Has not run on any GPU so far; what it asserts for Hopper is what the emulation claims."""
    device = torch.device("cuda")
    hardware = fp8_hardware(device)
    if hardware.path is None:
        pytest.skip(hardware.reason)
    module = Fp8Projection(512, 768, stored_scales=False).to(device).eval()
    x = torch.randn(48, 512, device=device)
    found = {}
    for path in ("emulated", "hopper_emulated", hardware.path, "scaled_mm"):
        set_fp8_path(module, path)
        with torch.inference_mode():
            found[path] = module(x)
    torch.testing.assert_close(found[hardware.path], found["scaled_mm"], rtol=0, atol=0)
    torch.testing.assert_close(found["scaled_mm"], found["emulated"], rtol=5e-3, atol=5e-3)
    if hardware.generation == "hopper":
        torch.testing.assert_close(found["scaled_mm"], found["hopper_emulated"], rtol=0, atol=0)
