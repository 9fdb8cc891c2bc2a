"""The Serve application: ``build`` turns settings into an ingress over one deployment per model.

The same settings come from a Serve config file (``import_path: cistron_serve.app:build`` with ``args``) and from
``cistron serve``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from ray import serve
from ray.serve.config import BackpressureConfig

from cistron.config import Config, resolve
from cistron_serve.deployments import ModelEntry, deployment
from cistron_serve.ingress import Ingress, IngressSettings
from cistron_serve.schemas.native import ModelId

_PROBES = 64
"""Room in the ingress for health probes and listings, which are never refused."""


class ServeConfig(Config):
    """What to serve."""

    models: Annotated[dict[ModelId, ModelEntry], Field(min_length=1, max_length=256)]
    """Models by identifier: a checkpoint folder, or a section of settings with its `source`."""
    ingress: IngressSettings = IngressSettings()
    """How to answer HTTP."""

    def num_cpus(self) -> int:
        """Return the CPUs that Ray must have for all of it."""
        models = sum(settings.num_replicas * settings.num_cpus for settings in self.models.values())
        return math.ceil(models + self.ingress.num_replicas * self.ingress.num_cpus)


def build(args: ServeConfig | Mapping[str, Any]) -> serve.Application:
    """Return the application.

    Raises:
        ConfigError: a misspelt key or a bad value, with its dotted path.
    """
    config = args if isinstance(args, ServeConfig) else resolve(ServeConfig, args)
    models = {model_id: deployment(model_id, settings) for model_id, settings in config.models.items()}
    options = serve.deployment(
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        max_ongoing_requests=config.ingress.max_inflight_requests + _PROBES,
        max_queued_requests=config.ingress.max_inflight_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    )
    return options(Ingress).bind(models, config.ingress)
