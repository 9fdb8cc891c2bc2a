"""The GPU benchmark, rehearsed on the CPU; its numbers need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.batches import dna, proteins
from benchmarks.gpu.budget import Allowance, Share
from benchmarks.gpu.cases import all_cases, run_by
from benchmarks.gpu.cases.case import Ceilings, Cost, Shape, relative_error
from benchmarks.gpu.check import Finding, _judged
from benchmarks.gpu.checks import _problem, compile_what_is_timed
from benchmarks.gpu.contenders import times
from benchmarks.gpu.context import Context
from benchmarks.gpu.flops import esm2_flops, evo2_flops
from benchmarks.gpu.measure import Clock
from benchmarks.gpu.plan import EVO2_7B, Training, measurement, rehearsal
from benchmarks.gpu.processes import isolated
from benchmarks.gpu.random_models import config_of, random_esm2, random_evo2

from cistron.parallel.module import LossModule
from cistron_kernels.dispatch import Decision

OPS = {path.parent.name for path in Path("kernels/cistron_kernels").glob("*/reference.py")}


# torch.compile itself does that, where the op in plain PyTorch has a backward pass of its own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_rehearsal_runs_every_section_and_claims_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = command.main(["--toy", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert record["kind"] == "rehearsal"
    assert {"date", "commit", "machine", "versions"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    assert {row["section"] for row in record["rows"]} == set(command.SECTIONS)
    assert [row.problem for row in rows if row.problem and not row.problem.startswith("skipped: CUDA graphs")] == []
    assert not any(row["figures"] or row["share"] or row["beside"] for row in record["rows"])
    assert {problem for row in rows for problem in row.contenders.values()} <= {"", "runs on GPUs only"}
    assert sum("compiled" in row.contenders for row in rows) == sum(case.compiled for case in all_cases().values())
    assert "no number means anything" in capsys.readouterr().out


def test_every_op_has_a_case():
    assert {case.op for case in all_cases().values()} == OPS


def test_without_a_gpu_the_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA GPU is visible"):
        command.main([])


def test_a_failed_check_withholds_the_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from cistron_kernels import bias_gelu

    right = bias_gelu.reference.bias_gelu
    monkeypatch.setattr(bias_gelu.reference, "bias_gelu", lambda x, bias, **options: 1.1 * right(x, bias, **options))
    only = {"bias_gelu": all_cases()["bias_gelu"]}
    for module in ("checks", "kernels"):
        monkeypatch.setattr(f"benchmarks.gpu.{module}.all_cases", lambda: only)
    rows = command.main(["--toy", "--sections", "kernels", "--output", str(tmp_path)])
    assert [row.section for row in rows] == ["ceilings", "ceilings", "checks", "kernels", "kernels"]
    assert "is off by" in rows[2].problem
    assert {row.problem for row in rows[3:]} == {"not timed: no check was passed by bias_gelu"}


def test_a_failed_op_leaves_no_training_figure_of_its_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    right, wrong = Finding("bf16", "rows", 0, 0), Finding("bf16", "rows", 0, 1, "gradient 0 is off by 1.0e+00")
    monkeypatch.setattr("benchmarks.gpu.checks.check", lambda name, plan: [wrong if name == "bias_gelu" else right])
    rows = command.main(["--toy", "--sections", "training", "--output", str(tmp_path)])
    problems = {row.what: row.problem for row in rows if row.section == "training"}
    assert problems.pop("ESM-2 tiny") == "not timed: no check was passed by bias_gelu"
    assert set(problems.values()) == {""}


def test_what_nobody_looked_at_is_not_checked():
    case = all_cases()["bias_gelu"]
    assert _problem(case, []) == "not checked"
    assert _problem(case, [Finding("bf16", "rows", 0, 0), Finding("fp32", "rows", 0, None)]) == "not checked"
    assert _problem(case, [Finding("bf16", "rows", 0, 0)]) == ""


def test_checks_that_die_leave_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("benchmarks.gpu.checks.isolated", lambda *names, **options: 1 / 0)
    rows = command.main(["--toy", "--output", str(tmp_path)])
    timed = [row for row in rows if row.section not in ("ceilings", "checks")]
    assert {row.section for row in timed} == {"kernels", "length", "training", "decode"}
    assert all(row.problem.startswith("not timed: no check was passed by") for row in timed)


@pytest.mark.parametrize("section", ["kernels", "length", "training", "decode"])
def test_nothing_is_timed_before_the_checks(section: str):
    assert command._with_their_needs([section]) == ["ceilings", "checks", section]


@pytest.mark.parametrize("training", rehearsal().trainings, ids=lambda training: training.model)
def test_training_waits_for_the_ops_that_it_runs(monkeypatch: pytest.MonkeyPatch, training: Training):
    ran = set[str]()
    monkeypatch.setattr("cistron_kernels.dispatch.decision", lambda op: ran.add(op) or Decision("torch", ""))
    evo2 = training.model.startswith("evo2")
    build, make = (random_evo2, partial(dna, 16)) if evo2 else (random_esm2, proteins)
    plan = rehearsal()
    model = build(training.model, device=plan.device, dtype=torch.float32, **plan.changes[training.model])
    LossModule(model, "bf16")(**make(plan.device, 16, 0)).backward()
    assert ran == {all_cases()[name].op for name in run_by("evo2" if evo2 else "esm2", "training")}


def test_what_a_peer_overwrites_is_fresh_at_each_call():
    case, seen = all_cases()["cross_entropy, evo2"], list[float]()

    def overwriting(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(float(logits.detach().square().sum()))
        loss = logits.sum()
        logits.detach().zero_()
        return loss

    plan = rehearsal()
    context = Context(plan, Clock(plan.device))
    (peer,) = case.peers
    times(context, case, Shape(plan.models["evo2"][0], 1, 12), overwriting, peer, compared=False)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert seen[0] > 0


def test_what_is_compiled_ahead_is_what_is_timed():
    for name in ("glu, gelu", "cross_entropy, esm2", "gated_fir_step, HCS"):
        compile_what_is_timed(name, rehearsal())


def test_errors_are_judged_by_a_limit_and_by_plain_pytorch():
    bf16, fp32 = torch.bfloat16, torch.float32
    assert _judged(bf16, [2e-3, 3e-3], [1.8e-3, 2.5e-3], 1) == ("bf16", "")
    assert "output 0 is off by 6.0e-03" in _judged(bf16, [6e-3], [6e-3], 1)[1]
    assert "plain PyTorch by 1.0e-03" in _judged(bf16, [2e-3], [1e-3], 1)[1]
    assert _judged(bf16, [4e-4], [1e-7], 1) == ("bf16", "")
    assert _judged(fp32, [5e-6, 5e-5], [0, 0], 1) == ("fp32", "")
    assert _judged(fp32, [5e-4, 5e-5], [0, 0], 1) == ("tf32", "")
    assert "gradient 0" in _judged(fp32, [5e-6, float("inf")], [0, 0], 1)[1]
    assert relative_error(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")


@pytest.mark.parametrize(
    ("name", "length", "forward", "both"),
    [
        ("evo2_1b_base", 8_192, 2.35, 7.13),
        ("evo2_7b", 131_072, 18.56, 58.38),
        ("esm2_t33_650M_UR50D", 300, 1.35, 4.08),
        ("esm2_t36_3B_UR50D", 1_024, 6.05, 18.33),
    ],
)
def test_flops_of_published_models(name: str, length: int, forward: float, both: float):
    config = config_of(name)
    found = (evo2_flops if "evo2" in name else esm2_flops)(config, length)  # type: ignore[arg-type]
    assert found[0] / 1e9 == pytest.approx(forward, rel=2e-3)
    assert sum(found) / 1e9 == pytest.approx(both, rel=2e-3)


def test_costs_are_the_bytes_of_the_operands():
    shape = Shape(EVO2_7B, 1, 1_000)
    for name in ("gated_fir, HCS", "gated_fir, HCM", "gated_modal_scan, HCL"):
        case = all_cases()[name]
        assert case.forward(shape).bytes == 8 * 4096 * 1_000
        assert case.backward is not None
        assert case.backward(shape).bytes == 14 * 4096 * 1_000
    assert all_cases()["add_rms_norm"].forward(shape).bytes == 8 * 4096 * 1_000
    assert Cost(3e12, 1e12).least_seconds(Ceilings(3e12, 8e14)) == 1.0


def test_the_plan_of_a_measurement_fits_into_eight_minutes():
    assert sum(measurement(torch.device("cuda")).shares.values()) < 450


def test_every_op_is_timed_at_the_widths_of_both_evo2():
    for models in measurement(torch.device("cuda")).models.values():
        assert [model.width for model in models] == [1_920, 4_096]


def test_processes_are_isolated():
    # In a process of its own: a spawned process imports the main module, which must not be this test run.
    code = (
        "import os; from benchmarks.gpu.processes import isolated\n"
        "if __name__ == '__main__':\n"
        "    print(sorted(isolated(os.strerror, [2], workers=2, seconds=60)))\n"
        "    print(sorted(isolated(os._exit, [3, 4], workers=2, seconds=60)))\n"
        "    print(list(isolated(__import__('time').sleep, [60], workers=1, seconds=1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    answered, died, late = done.stdout.splitlines()
    assert "No such file" in answered
    assert "exit code 3" in died
    assert "exit code 4" in died
    assert "no result within the section's 1 s" in late


def test_a_function_that_fails_here_is_an_outcome():
    (outcome,) = isolated(int, ["x"], workers=0, seconds=1)
    assert outcome[1] is None
    assert outcome[2].startswith("ValueError")


def test_budgets_end():
    share, allowance = Share(0.01), Allowance(0.01)
    assert not share.spent
    with allowance.used():
        time.sleep(0.02)
    assert share.spent
    assert allowance.spent
