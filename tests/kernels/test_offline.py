"""Every kernel compiles for Ampere, Hopper and Blackwell without a GPU, within the resources it was designed for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.kernels.offline.compiler import OPS

pytest.importorskip("triton", reason="needs triton's compiler")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.offline.compiler"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_op_with_kernels_has_cases():
    with_kernels = {path.parent.name for path in ROOT.glob("kernels/cistron_kernels/*/kernel.py")}
    assert with_kernels == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_within_their_resources(op: str, reports: list[dict[str, Any]]):
    found = [report for report in reports if report["op"] == op]
    assert {report["architecture"] for report in found} == {80, 90, 100}
    assert not [report for report in found if report["complaints"]]
