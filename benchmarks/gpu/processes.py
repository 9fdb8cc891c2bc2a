"""Run a function on many names, each in a process of its own.

A kernel that reads where it must not leaves its process without a usable GPU, and one that never ends can only be
killed: neither may take the other measurements with it. Most of a first run is compilation, so the processes work at
the same time, and what they compile lies in Triton's cache when the timings begin.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

Outcome: TypeAlias = tuple[str, Any, str]
"""A name, what the function returned for it, and why it returned nothing."""


def isolated(
    function: Callable[..., Any],
    names: Sequence[str],
    *arguments: Any,
    workers: int,
    seconds: float,
    then: Callable[..., object] | None = None,
) -> Iterator[Outcome]:
    """Yield the outcome for each name as it comes.

    Args:
        function: importable by name; called with a name and `arguments`.
        names: what to run it on.
        *arguments: the same for all.
        workers: processes at a time; 0 runs everything in this one.
        seconds: when they have passed, running processes are killed and the rest is not started.
        then: called likewise in the same process once the outcome is out; whatever becomes of it.
    """
    end = time.monotonic() + seconds
    if not workers:
        for name in names:
            yield _here(function, name, arguments) if time.monotonic() < end else (name, None, _late(seconds))
        return
    waiting, running, answered = list(names), dict[Connection, tuple[str, BaseProcess]](), set[str]()
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                receiver, process = _started(function, name, arguments, then)
                running[receiver] = (name, process)
            for ready in connection.wait(list(running), timeout=max(0.0, end - time.monotonic())):
                assert isinstance(ready, Connection)
                name, process = running[ready]
                outcome = _received(ready)
                if outcome is None:
                    del running[ready]
                    process.join()
                    outcome = name, None, f"its process died with exit code {process.exitcode}"
                if name not in answered:
                    answered.add(name)
                    yield outcome
        yield from ((name, None, _late(seconds)) for name in names if name not in answered)
    finally:
        for _, process in running.values():
            process.kill()


def _here(function: Callable[..., Any], name: str, arguments: Sequence[Any]) -> Outcome:
    try:
        return name, function(name, *arguments), ""
    except Exception as error:
        return name, None, f"{type(error).__name__}: {error}"


def _started(
    function: Callable[..., Any], name: str, arguments: Sequence[Any], then: Callable[..., object] | None
) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_there, args=(sender, function, name, arguments, then), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _there(
    sender: Connection,
    function: Callable[..., Any],
    name: str,
    arguments: Sequence[Any],
    then: Callable[..., object] | None,
) -> None:
    outcome = _here(function, name, arguments)
    sender.send(outcome)
    if then is not None and not outcome[2]:
        with contextlib.suppress(Exception):
            then(name, *arguments)


def _received(receiver: Connection) -> Outcome | None:
    """Return what a process says, or None when it has ended."""
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        return None
    return outcome


def _late(seconds: float) -> str:
    return f"no result within the section's {seconds:.0f} s"
