"""The real architectures under every strategy: one step on two processes equals one step on one process."""

from __future__ import annotations

import pytest
import torch

from cistron.data.pack import PackedBatch
from cistron.models.base import SequenceModel
from cistron.models.esm2.config import Esm2Config
from cistron.models.evo2.config import Evo2Config
from cistron.models.families import ModelConfig, build
from cistron.parallel.build import build_strategy
from cistron.parallel.mesh import World
from cistron.parallel.module import Precision, recompute_blocks
from cistron.parallel.strategy import DdpConfig, DeepSpeedConfig, Fsdp2Config, StrategyConfig
from cistron.testing import assert_all_close, run_distributed

SHAPES: dict[str, ModelConfig] = {
    "esm2": Esm2Config(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32),
    "evo2": Evo2Config(
        hidden_size=16,
        layer_pattern="SDH*",
        num_attention_heads=2,
        mlp_size=32,
        num_filter_groups=4,
        hcm_filter_length=16,
        filter_cache_length=64,
        max_length=64,
        parametrization="training",
    ),
}
LEARNING_RATE = 0.5


def make(family: str, device: torch.device, *, recompute: bool = False) -> SequenceModel:
    model = build(SHAPES[family], device=device, dtype=torch.float32).train()
    if device.type != "meta":
        model.init_weights(seed=3)
    return recompute_blocks(model) if recompute else model


def batches(family: str, rank: int) -> list[PackedBatch]:
    generator = torch.Generator().manual_seed(rank)
    made = []
    for lengths in ([5, 2], [3]) if rank == 0 else ([17, 30, 4], [40]):
        total = sum(lengths)
        letters = torch.tensor([65, 67, 71, 84]) if family == "evo2" else torch.arange(4, 24)
        ids = letters[torch.randint(len(letters), (total,), generator=generator)]
        targets = torch.where(torch.rand(total, generator=generator) < 0.6, ids.roll(-1), -100)
        made.append(
            PackedBatch(
                input_ids=ids,
                targets=targets,
                weights=torch.where(torch.rand(total, generator=generator) < 0.3, 0.1, 1.0),
                cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
                sample_index=torch.arange(len(lengths)),
            )
        )
    return made


def weight_of(rank_batches: list[PackedBatch]) -> float:
    return sum(float(batch.weights[batch.targets != -100].sum()) for batch in rank_batches)


def on_one_process(family: str) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = make(family, torch.device("cpu"))
    everything = [batch for rank in range(2) for batch in batches(family, rank)]
    loss = torch.zeros(())
    for batch in everything:
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            logits = model(batch.input_ids[start:stop][None]).logits[0]
            scored = batch.targets[start:stop] != -100
            log_likelihood = logits.log_softmax(-1)[scored, batch.targets[start:stop][scored]]
            loss = loss - (log_likelihood * batch.weights[start:stop][scored]).sum()
    loss = loss / weight_of(everything)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    return loss.item(), gradients, model.state_dict()


def on_this_rank(
    family: str, config: StrategyConfig, precision: Precision, recompute: bool
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    world = World.current()
    strategy = build_strategy(config, world=world, precision=precision, grad_clip=None)
    strategy.prepare(
        lambda device: make(family, device, recompute=recompute),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
    )
    mine = batches(family, world.rank)
    (weight,) = world.all_sum([weight_of(mine)])
    losses = [strategy.accumulate(b, scale=1 / weight, last=i == len(mine) - 1) for i, b in enumerate(mine)]
    gradients = strategy.full_gradients()
    strategy.step(LEARNING_RATE)
    (loss,) = world.all_sum([torch.stack(losses).sum().item()])
    return loss / weight, gradients, dict(strategy.full_state())


def every_variant(config: StrategyConfig) -> dict:
    return {
        (family, precision, recompute): on_this_rank(family, config, precision, recompute)
        for family in SHAPES
        for precision, recompute in (("fp32", False), ("fp32", True), ("bf16", False))
    }


@pytest.fixture(scope="module")
def expected() -> dict:
    return {family: on_one_process(family) for family in SHAPES}


@pytest.mark.parametrize(
    "config", [Fsdp2Config(), DdpConfig(), DeepSpeedConfig(zero_stage=2), DeepSpeedConfig(zero_stage=3)], ids=str
)
def test_real_models_match_one_process(config: StrategyConfig, expected: dict) -> None:
    for results in run_distributed(every_variant, config):
        for (family, precision, _), (loss, gradients, state) in results.items():
            want_loss, want_gradients, want_state = expected[family]
            exact = precision == "fp32"
            assert loss == pytest.approx(want_loss, rel=1e-6 if exact else 5e-3)
            assert_all_close(gradients, want_gradients, relative=1e-5 if exact else 0.05)
            assert_all_close(state, want_state, relative=1e-5 if exact else 0.05)
