"""One error type inside, one shape outside: every refusal is an ``ApiError``, answered as ``application/problem+json``.

Details never quote a sequence: they name its index, a position and at most one letter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cistron.errors import CapabilityError, CistronError, InputError, SequenceError, UnknownNameError
from cistron_serve.schemas.native import Problem

_LIBRARY: Final[dict[type[CistronError], tuple[int, str]]] = {
    SequenceError: (422, "sequence.invalid"),
    InputError: (422, "request.invalid"),
    UnknownNameError: (422, "request.unknown_name"),
    CapabilityError: (500, "model.unsupported"),
}
"""Status and code of the library's errors; the first class that fits counts."""

_HTTP_CODES: Final = {404: "route.not_found", 405: "route.method_not_allowed"}
_LOCATIONS: Final = frozenset({"body", "query", "path", "header"})


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        code: stable dotted name.
        detail: one sentence for people.
        param: path of the field at fault.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.headers = headers or {}


def retry_later(status: int, code: str, detail: str, *, retry_after_s: float = 1.0) -> ApiError:
    """Return a 429 or 503 that says when to come back."""
    return ApiError(status, code, detail, headers={"Retry-After": str(math.ceil(retry_after_s))})


def from_library(error: CistronError, *, param: str | None = None) -> ApiError:
    """Translate an error that the library raised on purpose; what is not about the request stays hidden."""
    for kind, (status, code) in _LIBRARY.items():
        if isinstance(error, kind):
            return ApiError(status, code, str(error), param=param)
    return internal_error()


def internal_error() -> ApiError:
    """Return the 500 that hides what went wrong; the log has it under the request id."""
    return ApiError(500, "server.internal", "the server failed on this request; its log names the cause by request id")


def problem(error: ApiError, request_id: str) -> Problem:
    """Return the body of an error's answer."""
    return Problem(
        type=f"urn:cistron:error:{error.code}",
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        code=error.code,
        param=error.param,
        request_id=request_id,
    )


def problem_response(error: ApiError, request_id: str) -> JSONResponse:
    """Return the answer to a request that ended in `error`."""
    return JSONResponse(
        problem(error, request_id).model_dump(),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )


def install_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one shape; the guard around it answers what is not handled here."""
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = from_validation(error.errors())
    elif isinstance(error, HTTPException):
        error = _from_http(request, error)
    assert isinstance(error, ApiError), f"no answer for {type(error).__name__}"
    return problem_response(error, request.state.request_id)


def from_validation(faults: Sequence[Any]) -> ApiError:
    """Translate pydantic's faults; the first one gives `param`, and no value of the request is repeated."""
    if any(fault["type"] == "json_invalid" for fault in faults):
        place = faults[0]["loc"][-1]
        reason = faults[0].get("ctx", {}).get("error", "")
        return ApiError(400, "request.malformed_json", f"the body is not valid JSON: {reason} at character {place}")
    lines = [f"{_path(fault['loc']) or 'body'}: {fault['msg']}" for fault in faults[:5]]
    if len(faults) > len(lines):
        lines.append(f"and {len(faults) - len(lines)} more")
    return ApiError(422, "request.invalid", "; ".join(lines), param=_path(faults[0]["loc"]) or None)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path[:200]}"
    details = {404: f"no such route: {where}", 405: f"the route does not answer this method: {where}"}
    return ApiError(
        error.status_code,
        _HTTP_CODES.get(error.status_code, "request.refused"),
        details.get(error.status_code, str(error.detail)),
        headers=dict(error.headers or {}),
    )


def _path(location: Sequence[str | int]) -> str:
    """Return ``sequences[3]`` for ``("body", "sequences", 3)``; names of union members are not part of a path."""
    parts = list(location[1:] if location and location[0] in _LOCATIONS else location)
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    return path
