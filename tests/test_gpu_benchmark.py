"""The GPU benchmark, rehearsed on the CPU; its numbers need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.budget import Allowance, Share
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.cases.case import Ceilings, Cost, Shape, relative_error
from benchmarks.gpu.check import _judged
from benchmarks.gpu.flops import esm2_flops, evo2_flops
from benchmarks.gpu.plan import EVO2_7B, measurement
from benchmarks.gpu.processes import isolated
from benchmarks.gpu.random_models import config_of

OPS = {path.parent.name for path in Path("kernels/cistron_kernels").glob("*/reference.py")}


def test_a_rehearsal_runs_every_section_and_claims_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = command.main(["--toy", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert record["kind"] == "rehearsal"
    assert {"date", "commit", "machine", "versions"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    assert {row["section"] for row in record["rows"]} == set(command.SECTIONS)
    assert [row.problem for row in rows if row.problem and not row.problem.startswith("skipped: CUDA graphs")] == []
    assert not any(row["figures"] or row["share"] or row["beside"] for row in record["rows"])
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
    assert [row.section for row in rows] == ["ceilings", "ceilings", "checks", "kernels"]
    assert "is off by" in rows[2].problem
    assert rows[3].problem == "not timed: its check failed"


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
