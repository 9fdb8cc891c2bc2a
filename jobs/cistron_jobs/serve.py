"""``cistron serve model=DIR``: serve models over HTTP until interrupted.

On a cluster the same settings go into a Serve config file; see ``serve/configs``.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, Self

from pydantic import Field, model_validator
from ray import serve

from cistron.config import Config
from cistron.errors import CapabilityError, ConfigError
from cistron.models.checkpoint import read_config
from cistron.models.registry import get_spec
from cistron_jobs.ray_session import ray_session
from cistron_serve.app import ServeConfig, build
from cistron_serve.deployments import ModelEntry, ModelSettings
from cistron_serve.ingress import IngressSettings
from cistron_serve.schemas.native import ModelId

logger = logging.getLogger(__name__)

_APPLICATION: Final = "cistron"
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class ServeJobConfig(Config):
    """Settings of ``cistron serve``."""

    model: str | None = Field(default=None, min_length=1)
    """One model: its checkpoint folder, or a registry name; requests name it by the folder's name."""
    models: dict[ModelId, ModelEntry] = Field(default={}, max_length=256)
    """Several models by identifier: a checkpoint folder each, or a section of settings with its `source`."""
    ingress: IngressSettings = IngressSettings()
    """How to answer HTTP."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=1, le=65_535)
    """Port to listen on."""
    request_timeout_s: float | None = Field(default=600.0, gt=0.0)
    """Time after which a request that is not answered is given up; None waits."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the local Ray that is started when no cluster is running; None means all."""
    dashboard: bool = False
    """Start the Ray dashboard with it."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.model is None) == (not self.models):
            raise ValueError("give either model=DIR or models={name: DIR, ...}")
        return self

    def serve_config(self) -> ServeConfig:
        """Return the settings of the Serve application.

        Raises:
            ConfigError: the model's folder has a name that no request could use.
        """
        if self.model is None:
            return ServeConfig(models=self.models, ingress=self.ingress)
        name = Path(self.model).expanduser().resolve().name
        try:
            return ServeConfig(models={name: ModelSettings(source=self.model)}, ingress=self.ingress)
        except ValueError as error:
            raise ConfigError(f"model: {name!r} cannot be an identifier; use models={{name: {self.model}}}") from error


def run(config: ServeJobConfig) -> None:
    """Serve until SIGINT or SIGTERM; return when everything that was started has ended.

    Raises:
        CistronError: a setting, or a checkpoint, that cannot be served.
    """
    application = config.serve_config()
    for settings in application.models.values():
        _check_source(settings.source)
    if config.host not in _LOOPBACK:
        logger.warning("listening on %s without authentication: put a gateway in front", config.host)
    num_cpus = config.num_cpus or max(os.cpu_count() or 1, application.num_cpus())
    # The order matters: Ray takes SIGTERM for itself when it starts.
    with ray_session(num_cpus=num_cpus, dashboard=config.dashboard), _terminable(), _serve_session(config):
        try:
            serve.run(build(application), name=_APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise CapabilityError(f"the models could not be started: {error}") from error
        names = ", ".join(application.models)
        logger.info("serving %s at http://%s:%s (stop with Ctrl-C)", names, config.host, config.port)
        _wait_for_interrupt()


def _check_source(source: str) -> None:
    """Refuse a local checkpoint that is not there, or an unknown name, before anything starts."""
    path = Path(source).expanduser()
    if "://" in source:
        return
    if path.exists() or len(path.parts) != 1:
        read_config(path)
    else:
        get_spec(source)


@contextmanager
def _serve_session(config: ServeJobConfig) -> Iterator[None]:
    """Start Serve, or join the one that runs on this cluster; end only what was started."""
    is_running = bool(serve.status().proxies)
    if is_running:
        logger.warning("Ray Serve is running on this cluster already: its own host and port stay in force")
    else:
        http_options = {"host": config.host, "port": config.port, "request_timeout_s": config.request_timeout_s}
        serve.start(http_options=http_options)
    try:
        yield
    finally:
        if is_running:
            serve.delete(_APPLICATION)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _wait_for_interrupt() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("stopping")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, which stops a container, end the service in the orderly way that Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
