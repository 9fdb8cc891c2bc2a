"""The schema at ``/openapi.json``: what FastAPI derives, with errors under their own media type and shape."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cistron_serve.schemas.native import Problem

Responses = dict[int | str, dict[str, Any]]


def _problems(*statuses: int) -> Responses:
    return {status: {"model": Problem} for status in statuses}


UNREADY: Final[Responses] = _problems(503)
"""Errors of routes that ask every model."""
PROBLEMS: Final[Responses] = _problems(400, 404, 413, 415, 422, 429, 500, 503)
"""Errors of routes that name a model."""
EVENT_STREAM: Final[Responses] = {
    200: {
        "description": "The generations; with `stream`, the events chunk, usage, done and error.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def install_openapi(app: FastAPI) -> None:
    """Make `app` describe its errors as what they are."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    _retype_errors(operation["responses"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to change the schema.


def _retype_errors(responses: dict[str, Any]) -> None:
    """Move the bodies of errors from JSON to problem+json."""
    for status, response in responses.items():
        content = response.get("content", {})
        if status >= "4" and "application/json" in content:
            content["application/problem+json"] = content.pop("application/json")
