"""Compile kernels to machine code without a GPU, and read from it what they would cost.

`python -m tests.kernels.offline.compiler OP ...` prints one JSON line per case and architecture of the ``CASES`` of
these ops, or of all. It is a program because Triton's functions are interpreted in the process of the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
OPS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "compiler")


@dataclass(frozen=True)
class Case:
    """One kernel with one set of constants, and what is expected of its machine code.

    Attributes:
        name: of the case in the report.
        kernel: ``module:function``.
        pointers: argument name to element type, such as ``bf16``; all are taken to be aligned to 16 bytes.
        scalars: argument name to type, such as ``i32``; those in `divisible` are taken to be multiples of 16.
        constants: the constexpr arguments.
        divisible: names of integer arguments that are multiples of 16.
        num_warps: warps of a program.
        num_stages: stages of its pipelined loops.
        matrix: whether matrix instructions are expected (warp-group ones on Hopper unless ``"mma"``).
        wide_loads: whether global memory must be read 16 bytes at a time somewhere.
        most_registers: of a thread.
        most_shared: bytes of shared memory.
        architectures: where it runs with these constants.
    """

    name: str
    kernel: str
    pointers: Mapping[str, str]
    scalars: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    matrix: str | None = None
    wide_loads: bool = True
    most_registers: int = 255
    most_shared: int = 99 * 1024
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        case: name of the case.
        architecture: 80, 90 or 100.
        registers: of a thread.
        spilled: bytes of a thread's local memory.
        shared: bytes of shared memory.
        loads: bits of a global load instruction to how often it stands in the code.
        matrix: kinds of matrix instructions in the code.
    """

    case: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    loads: dict[str, int]
    matrix: list[str]


def compiled(case: Case, architecture: int) -> Resources:
    """Compile one case for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    types = {**{name: f"*{kind}" for name, kind in case.pointers.items()}, **case.scalars}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: case.constants.get(name) for name in kernel.arg_names if name not in types}
    aligned = {*case.pointers, *case.divisible}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, code = _disassembled(binary.asm["cubin"])
    return Resources(
        case.name,
        architecture,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)),
        shared=binary.metadata.shared,
        loads=_loads(code),
        matrix=sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)", code))),
    )


def complaints(case: Case, found: Resources) -> Iterator[str]:
    """Yield what is wrong with a compiled case."""
    if found.spilled:
        yield f"{found.spilled} bytes of registers are spilled"
    if found.registers > case.most_registers:
        yield f"{found.registers} registers (allowed {case.most_registers})"
    if found.shared > case.most_shared:
        yield f"{found.shared} bytes of shared memory (allowed {case.most_shared})"
    if case.wide_loads and not found.loads.get("128"):
        yield f"no 16-byte loads, only of bits {found.loads}"
    if case.matrix and not found.matrix:
        yield "no matrix instructions"
    if case.matrix == "wgmma" and found.architecture == 90 and "HGMMA" not in found.matrix:
        yield f"no warp-group matrix instructions, only {found.matrix}"


def _disassembled(cubin: bytes) -> tuple[str, str]:
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


def _loads(code: str) -> dict[str, int]:
    """Count global loads by width, asynchronous copies to shared memory and bulk copies included."""
    widths: dict[str, int] = {}
    for name in re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+|\bUBLKCP\b|\bUTMALDG\b", code):
        bulk = name.startswith("U")
        width = "128" if bulk else next((w for w in ("256", "128", "64", "U16", "U8", "S8") if f".{w}" in name), "32")
        width = {"256": "128", "U16": "16", "U8": "8", "S8": "8"}.get(width, width)
        widths[width] = widths.get(width, 0) + 1
    return widths


def report(op: str, index: int, architecture: int) -> dict[str, Any]:
    """Return the resources of one case of an op, and what is wrong with them."""
    case = importlib.import_module(f"tests.kernels.offline.{op}").CASES[index]
    found = compiled(case, architecture)
    return {"op": op, **asdict(found), "complaints": list(complaints(case, found))}


def main(ops: Sequence[str]) -> None:
    """Print the reports of all cases of some ops."""
    jobs = [
        (op, index, architecture)
        for op in ops
        for index, case in enumerate(importlib.import_module(f"tests.kernels.offline.{op}").CASES)
        for architecture in case.architectures
    ]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for found in pool.map(report, *zip(*jobs, strict=True)):
            print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:] or OPS)
