"""The loop without Ray: any number of ranks is the same run, and a stopped run continues as if it had not stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.cistron.data.corpora import make_corpus
from tests.cistron.train.settings import tiny_run

from cistron.config import merge, resolve
from cistron.data.pack import PackedBatch
from cistron.data.plan import SamplePlan, worker_block
from cistron.data.samples import iterate_samples, to_table
from cistron.errors import CheckpointError, CistronError, InputError
from cistron.models.families import build
from cistron.parallel.mesh import World
from cistron.testing import run_distributed
from cistron.train.callbacks.callback import Callback, Run
from cistron.train.callbacks.checkpointer import Checkpointer
from cistron.train.checkpoint import CheckpointStore, Manifest
from cistron.train.config import PretrainConfig
from cistron.train.export import training_form
from cistron.train.loop import evaluate_blocks, forward_flops, train
from cistron.train.metrics import Meter
from cistron.train.stream import evaluation_blocks, training_steps
from cistron.train.worker import begin, check_layout, initial_model


class Recorder(Callback):
    def __init__(self) -> None:
        self.before = 0.0
        self.losses: list[float] = []
        self.evaluated: list[float] = []
        self.tokens: list[int] = []

    def on_metrics(self, run, metrics) -> None:
        self.losses.append(metrics.loss)
        self.tokens.append(metrics.tokens)

    def on_evaluation(self, run, values) -> None:
        self.evaluated.append(values["valid_loss"])


class Crash(Callback):
    """Fails on every rank after a step, as a lost node would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run) -> None:
        if run.step == self._step:
            raise InterruptedError


def open_plan(config: PretrainConfig) -> SamplePlan:
    from cistron.data.config import build_plan

    return build_plan(config.data, split="train", objective="next_token")


def blocks(plan: SamplePlan, run: Run) -> Iterator:
    """What Ray Data would deal to this rank."""
    size = run.config.train.samples_per_block
    deal = partial(worker_block, start=run.cursor, rank=run.world.rank, num_workers=run.world.size)
    return (to_table(iterate_samples(plan, deal(block, samples_per_block=size))) for block in count())


def go(config: PretrainConfig, *, crash_at: int | None = None) -> Recorder:
    world = World.current()
    store = CheckpointStore(str(config.run_dir))
    shape = training_form(config.model)
    plan = open_plan(config)
    run = begin(config, store, world, partial(initial_model, shape, config))
    recorder = Recorder()
    held_out = evaluation_blocks(plan, config.train, world=world)
    recorder.before = evaluate_blocks(run.strategy, held_out)
    try:
        train(
            run,
            training_steps(blocks(plan, run), config.train, world=world, cursor=run.cursor),
            flops=partial(forward_flops, build(shape, device="meta")),
            meter=Meter(world, peak_flops=None),
            callbacks=[
                recorder,
                Checkpointer(store, lambda _, complete: complete(), corpus="f00d"),
                *([Crash(crash_at)] if crash_at else []),
            ],
            evaluate=lambda: {"valid_loss": evaluate_blocks(run.strategy, held_out)},
        )
    except InterruptedError:
        assert crash_at is not None
    return recorder


def with_workers(config: PretrainConfig, folder: str) -> PretrainConfig:
    changes = {"run_dir": f"{config.run_dir}/{folder}", "train": {"num_workers": World.current().size}}
    return resolve(PretrainConfig, merge(config.model_dump(), changes))


def whole_and_resumed(config: PretrainConfig) -> dict[str, object]:
    whole = go(with_workers(config, "whole"))
    broken = go(with_workers(config, "broken"), crash_at=4)
    resumed = go(with_workers(config, "broken"))
    return {
        "before": whole.before,
        "losses": whole.losses,
        "tokens": whole.tokens,
        "evaluated": whole.evaluated,
        "broken": broken.losses,
        "resumed": resumed.losses,
        "resumed_tokens": resumed.tokens,
        "resumed_evaluated": resumed.evaluated,
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "corpus"
    letters = random.Random(0)
    make_corpus(folder, ["".join(letters.choices("ACGTacgN", k=n)) for n in (500, 9, 333, 61, 2, 150)])
    return folder


@pytest.mark.parametrize(
    "strategy", [{"kind": "fsdp2"}, {"kind": "deepspeed", "zero_stage": 2}], ids=["fsdp2", "zero2"]
)
def test_ranks_and_restarts_do_not_matter(corpus: Path, tmp_path: Path, strategy: dict) -> None:
    config = tiny_run(corpus, tmp_path / "two", strategy=strategy, evaluate_every=2, evaluate_samples=11)
    two = run_distributed(whole_and_resumed, config, world_size=2)
    for rank in two:
        assert len(rank["losses"]) == 6
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["broken"] == rank["losses"][:4]
        assert rank["resumed"] == rank["losses"][3:], "step 4 was repeated from the checkpoint of step 3"
        assert rank["resumed_tokens"] == rank["tokens"][3:]
        assert rank["resumed_evaluated"] == rank["evaluated"][1:]
    config = tiny_run(corpus, tmp_path / "one", strategy=strategy, evaluate_every=2, evaluate_samples=11)
    (one,) = run_distributed(whole_and_resumed, config, world_size=1)
    assert one["before"] == two[0]["before"] == two[1]["before"], "same weights and samples: the very same number"
    assert one["losses"] == pytest.approx(two[0]["losses"], abs=1e-5)
    assert one["evaluated"] == pytest.approx(two[0]["evaluated"], abs=1e-5)
    assert one["tokens"] == two[0]["tokens"]


def test_a_record_ends_at_each_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, tmp_path, log_every=2)
    (whole,) = run_distributed(whole_and_resumed, config, world_size=1)
    assert len(whole["losses"]) == 4, "steps 2, 3, 4 and 6: checkpoints are at 3 and 6"
    assert whole["resumed"] == whole["losses"][2:]


def test_held_out_samples_without_a_target_are_refused() -> None:
    class Blank:
        world = World(rank=0, size=1, device=torch.device("cpu"))

        def evaluate(self, batch: PackedBatch) -> torch.Tensor:
            return torch.zeros(())

    zeros = torch.zeros(9)
    batch = PackedBatch(zeros.long(), zeros.long(), zeros, torch.tensor([0, 9]).int(), torch.arange(1))
    with pytest.raises(InputError, match="no target"):
        evaluate_blocks(Blank(), {0: [batch]})


def test_blocks_out_of_order_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, tmp_path)
    plan = open_plan(config)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    wrong = (to_table(iterate_samples(plan, range(first, first + 2))) for first in (0, 4))
    with pytest.raises(CistronError, match=r"holds samples \[4, 5\].*expected 2\.\.3"):
        list(training_steps(wrong, config.train, world=world, cursor=0))


def test_flops_count_every_document_at_its_length() -> None:
    class Quadratic:
        def flops_per_token(self, length: int) -> float:
            return float(length)

    zeros = torch.zeros(9)
    batch = PackedBatch(zeros.long(), zeros.long(), zeros, torch.tensor([0, 2, 4, 9]).int(), torch.arange(3))
    assert forward_flops(Quadratic(), [batch, batch]) == 2 * (4 + 4 + 25)
    assert forward_flops(Quadratic(), []) == 0


def test_a_checkpoint_is_refused_where_it_cannot_be_read(corpus: Path, tmp_path: Path) -> None:
    zero = tiny_run(corpus, tmp_path, num_workers=4, strategy={"kind": "deepspeed", "zero_stage": 1}).train
    fsdp2 = tiny_run(corpus, tmp_path, num_workers=4).train
    written = Manifest(step=3, cursor=24, tokens=9, world_size=2, folder="deepspeed", rng=(), config={}, corpus="")
    with pytest.raises(CheckpointError, match=r"written by 2 workers.*num_workers=2"):
        check_layout(written, zero)
    with pytest.raises(CheckpointError, match=r"keep train\.strategy"):
        check_layout(written, fsdp2)
    check_layout(replace(written, folder="dcp"), fsdp2)
