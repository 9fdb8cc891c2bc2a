"""The Ray cluster that a program runs on: the one that ``RAY_ADDRESS`` names, or its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
import ray.data

from cistron.errors import CapabilityError

_QUIET: Final = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read by Ray when it starts."""

MIN_CPUS: Final = 6
"""Logical CPUs of a cluster of our own; they limit what runs at once, and tiny tasks share real cores well."""


@contextmanager
def ray_session(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[str | None]:
    """Connect to Ray, or start it here, and yield the dashboard's URL.

    ``RAY_ADDRESS`` names a cluster (``ray job submit`` sets it; ``auto`` finds one on this machine). Without it one is
    started: a program must not land on a stranger's cluster that happens to be up. Only what was started here is
    stopped, and a connection that existed before stays.

    Args:
        num_cpus: logical CPUs of a cluster that is started here, at least 6.
        dashboard: start the dashboard with it.

    Yields:
        The URL of the dashboard; None when there is none, or when a connection existed before.

    Raises:
        CapabilityError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    _silence()
    if ray.is_initialized():
        yield None
        return
    context = _connect(num_cpus, dashboard)
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        ray.shutdown()


def _silence() -> None:
    """Keep Ray's own progress off the terminal: programs here draw theirs."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _connect(num_cpus: int | None, dashboard: bool) -> Any:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            return ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise CapabilityError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    cpus = max(num_cpus or os.cpu_count() or 1, MIN_CPUS)
    return ray.init(address="local", num_cpus=cpus, include_dashboard=dashboard, **quiet)
