"""Two gloo processes compute what one plain process computes, under every strategy.

The plain process is written out here: a model, torch's optimiser, a loss over the concatenation of all micro-batches.
Ranks get very different numbers of tokens and of micro-batches with targets, so an average of averages cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.cistron.parallel.tiny_model import VOCAB, build_tiny

from cistron.parallel.build import build_strategy
from cistron.parallel.mesh import World
from cistron.parallel.module import Precision
from cistron.parallel.strategy import DdpConfig, DeepSpeedConfig, Fsdp2Config, Strategy, StrategyConfig
from cistron.testing import assert_all_close, run_distributed

STRATEGIES = {
    "fsdp2": Fsdp2Config(),
    "ddp": DdpConfig(),
    "zero1": DeepSpeedConfig(zero_stage=1),
    "zero2": DeepSpeedConfig(zero_stage=2),
    "zero3": DeepSpeedConfig(zero_stage=3),
}
STEPS = 10
SAVED_AT = 4
CLIP = 0.05
"""Far below the gradients' norm, so that clipping matters in every step."""


@dataclass(frozen=True)
class Micro:
    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    cu_seqlens: torch.Tensor


def micro_batches(step: int, rank: int) -> list[Micro]:
    """Three micro-batches per rank and step; rank 1 has long ones, and its last has no target at all."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    batches = []
    for index in range(3):
        lengths = [3 + step % 3, 2] if rank == 0 else [9 + index, 4, 17]
        total = sum(lengths)
        targets = torch.randint(VOCAB, (total,), generator=generator)
        targets[torch.rand(total, generator=generator) < 0.3] = -100
        weights = torch.where(torch.rand(total, generator=generator) < 0.4, 0.1, 1.0)
        if rank == 1 and index == 2:
            weights = torch.zeros(total)
        batches.append(
            Micro(
                input_ids=torch.randint(VOCAB, (total,), generator=generator),
                targets=targets,
                weights=weights,
                cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            )
        )
    return batches


def weight_of(batches: list[Micro]) -> float:
    return sum(float(batch.weights[batch.targets != -100].sum()) for batch in batches)


def make_optimizer(kind: str):
    def build(model) -> torch.optim.Optimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if model.decays(name)], "weight_decay": 0.1},
            {"params": [p for name, p in trained if not model.decays(name)], "weight_decay": 0.0},
        ]
        if kind == "sgd":
            return torch.optim.SGD(groups, lr=0.0)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)

    return build


def learning_rate(step: int) -> float:
    return 0.02 / (1 + step)


class Plain:
    """One process, no wrapper: the yardstick."""

    def __init__(self, kind: str) -> None:
        self.model = build_tiny(torch.device("cpu"))
        self.optimizer = make_optimizer(kind)(self.model)

    def loss(self, step: int) -> torch.Tensor:
        batches = [batch for rank in range(2) for batch in micro_batches(step, rank)]
        total = torch.zeros(())
        for batch in batches:
            logits = self.model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
            scored = batch.targets != -100
            log_likelihood = logits.log_softmax(-1)[scored, batch.targets[scored]]
            total = total - (log_likelihood * batch.weights[scored]).sum()
        return total / weight_of(batches)

    def step(self, step: int) -> tuple[float, dict[str, torch.Tensor], float]:
        loss = self.loss(step)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients.values()))
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, CLIP / (float(norm) + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), gradients, norm.item()


def prepared(
    config: StrategyConfig, kind: str, world: World, *, seed: int = 7, precision: Precision = "fp32"
) -> Strategy:
    strategy = build_strategy(config, world=world, precision=precision, grad_clip=CLIP)
    strategy.prepare(lambda device: build_tiny(device, seed=seed), make_optimizer(kind))
    return strategy


def run_step(strategy: Strategy, world: World, step: int, *, inspect: bool = False):
    batches = micro_batches(step, world.rank)
    (weight,) = world.all_sum([weight_of(batches)])
    losses = [
        strategy.accumulate(batch, scale=1 / weight, last=index == len(batches) - 1)
        for index, batch in enumerate(batches)
    ]
    gradients = strategy.full_gradients() if inspect else {}
    norm = float(strategy.step(learning_rate(step)))
    (loss,) = world.all_sum([float(sum(losses))])
    return loss / weight, gradients, norm


def train_on_this_rank(config: StrategyConfig, folder: str) -> dict[str, object]:
    world = World.current()
    sgd = prepared(config, "sgd", world)
    loss, gradients, norm = run_step(sgd, world, 0, inspect=True)
    result: dict[str, object] = {"loss": loss, "gradients": gradients, "norm": norm, "sgd": dict(sgd.full_state())}

    low = prepared(config, "sgd", world, precision="bf16")
    result["bf16"] = run_step(low, world, 0, inspect=True)
    result["bf16_dtypes"] = {tensor.dtype for _, tensor in low.full_state()}

    adam = prepared(config, "adamw", world)
    losses, save = [], None
    for step in range(STEPS):
        losses.append(run_step(adam, world, step)[0])
        if step + 1 == SAVED_AT:
            save = adam.save(folder)  # Later steps change the weights while this is being written.
    save.wait()
    world.barrier()
    result |= {"losses": losses, "adamw": dict(adam.full_state())}
    result["evaluated"] = world.all_sum([float(adam.evaluate(micro_batches(0, world.rank)[0]))])[0]

    resumed = prepared(config, "adamw", world, seed=8)
    resumed.load(folder)
    result["resumed"] = [run_step(resumed, world, step)[0] for step in range(SAVED_AT, STEPS)]
    result["resumed_state"] = dict(resumed.full_state())
    return result


@pytest.fixture(scope="module", params=STRATEGIES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    results = run_distributed(train_on_this_rank, STRATEGIES[request.param], str(folder))
    return [{**result, "folder": folder, "strategy": request.param} for result in results]


@pytest.fixture(scope="module")
def adamw() -> tuple[Plain, list[float]]:
    plain = Plain("adamw")
    return plain, [plain.step(step)[0] for step in range(STEPS)]


def test_one_sgd_step_equals_one_process(ranks: list[dict]) -> None:
    plain = Plain("sgd")
    loss, gradients, norm = plain.step(0)
    assert norm > 2 * CLIP, "the test must clip"
    for rank in ranks:
        assert rank["loss"] == pytest.approx(loss, rel=1e-6)
        assert rank["norm"] == pytest.approx(norm, rel=1e-5)
        assert_all_close(rank["gradients"], gradients, relative=1e-5)
        assert_all_close(rank["sgd"], plain.model.state_dict(), relative=1e-5)


def test_bf16_stays_near_fp32_and_keeps_fp32_masters(ranks: list[dict]) -> None:
    loss, gradients, norm = Plain("sgd").step(0)
    for rank in ranks:
        low_loss, low_gradients, low_norm = rank["bf16"]
        assert low_loss == pytest.approx(loss, rel=0.01)
        assert low_loss != pytest.approx(loss, rel=1e-7), "nothing was computed in bf16"
        assert low_norm == pytest.approx(norm, rel=0.03)
        assert_all_close(low_gradients, gradients, relative=0.03)
        assert rank["bf16_dtypes"] == {torch.float32}


def test_ten_adamw_steps_equal_one_process(ranks: list[dict], adamw: tuple[Plain, list[float]]) -> None:
    plain, losses = adamw
    assert losses[-1] < losses[0]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, abs=1e-5)
        assert_all_close(rank["adamw"], plain.model.state_dict(), relative=1e-4)


def test_evaluation_uses_the_trained_weights(ranks: list[dict], adamw: tuple[Plain, list[float]]) -> None:
    model = adamw[0].model
    expected = 0.0
    for rank in range(2):
        batch = micro_batches(0, rank)[0]
        logits = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        expected += (losses * batch.weights).sum().item()
    assert [rank["evaluated"] for rank in ranks] == pytest.approx([expected, expected], rel=1e-4)


def test_resuming_continues_the_curve_exactly(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["resumed"] == rank["losses"][SAVED_AT:]
        for name, tensor in rank["adamw"].items():
            assert torch.equal(rank["resumed_state"][name], tensor), name


def resume_alone(folder: str) -> list[float]:
    world = World.current()
    strategy = prepared(Fsdp2Config(), "adamw", world, seed=9)
    strategy.load(folder)
    losses = []
    for step in range(SAVED_AT, STEPS):
        batches = [batch for rank in range(2) for batch in micro_batches(step, rank)]
        weight = weight_of(batches)
        parts = [strategy.accumulate(b, scale=1 / weight, last=i == len(batches) - 1) for i, b in enumerate(batches)]
        strategy.step(learning_rate(step))
        losses.append(float(sum(parts)) / weight)
    return losses


def test_native_checkpoints_resume_as_fsdp2_on_one_rank(ranks: list[dict], adamw: tuple[Plain, list[float]]) -> None:
    if not STRATEGIES[ranks[0]["strategy"]].reshards:
        assert not list(ranks[0]["folder"].glob("*.py")), "DeepSpeed left its scripts behind"
        return
    (losses,) = run_distributed(resume_alone, str(ranks[0]["folder"]), world_size=1)
    assert losses == pytest.approx(adamw[1][SAVED_AT:], abs=1e-5)
