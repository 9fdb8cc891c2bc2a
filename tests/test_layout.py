"""Guards of the house: what must stay true of the folders, the public surface and the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("platform", "kernels", "jobs", "serve")


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_a_source_root_holds_one_package_and_is_none_itself(root: str):
    folder = ROOT / root
    assert not (folder / "__init__.py").exists(), f"{root}/__init__.py would shadow another module of that name"
    assert not list(folder.glob("*.py")), f"a module in {root}/ would be importable as a top-level name"
    packages = [child for child in folder.iterdir() if (child / "__init__.py").exists()]
    assert len(packages) == 1
    assert (packages[0] / "py.typed").exists()


def test_the_standard_library_wins_with_the_repository_root_on_the_path():
    code = "import platform, uuid, torch, ray; assert platform.system()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_the_library_imports_without_ray_and_the_kernels_without_triton():
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['triton'] = None; sys.modules['deepspeed'] = None;"
        "import cistron, cistron_kernels"
    )
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


def test_the_public_surface_is_what_all_says():
    import cistron

    public = {name for name, value in vars(cistron).items() if not name.startswith("_") and not _is_module(value)}
    assert public == {name for name in cistron.__all__ if not name.startswith("_")}


def test_the_makefile_has_the_targets_of_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    used = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "check", "bench", "serve"} <= targets
    assert {"demo", "test"} <= used
    assert used <= targets, f"the README names targets that do not exist: {used - targets}"


def test_the_readme_names_jobs_and_files_that_exist():
    from cistron_jobs.cli import JOBS

    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 200
    jobs = set(
        re.findall(r"\bcistron ([a-z_]+)", "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", readme, flags=re.DOTALL)))
    )
    assert jobs
    assert jobs <= set(JOBS), f"the README names jobs that do not exist: {jobs - set(JOBS)}"
    for path in re.findall(r"\b(?:jobs|serve|deploy|platform|kernels|tests|benchmarks)/[\w./-]+\.\w+", readme):
        assert (ROOT / path).exists(), f"the README names {path}"


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"
