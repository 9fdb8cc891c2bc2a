"""The guard around every route: request ids, body limits, admission, and the last answer to what went wrong.

Ray Serve's HTTP server sets no limit on a body, so the guard reads it, counting, and hands it on only when it is small
enough and neither compressed nor of another media type. It is plain ASGI: streams pass through unbuffered.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cistron_serve.errors import ApiError, internal_error, problem_response, retry_later
from cistron_serve.metrics import RequestObserver

logger = logging.getLogger(__name__)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BODY_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
_CLIENT_CLOSED: Final = 499


class Guard:
    """ASGI middleware; one per ingress replica."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, max_inflight_requests: int, observe: RequestObserver
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_inflight_requests = max_inflight_requests
        self._observe = observe
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        try:
            await self._admitted(scope, receive, exchange)
        except ApiError as error:
            await exchange.refuse(error)
        except Exception:
            # The traceback may pass through code that holds sequences, but it prints none of their values.
            logger.exception("request %s failed", exchange.request_id)
            await exchange.refuse(internal_error())
        finally:
            self._observe(route=exchange.route, status=exchange.status, seconds=exchange.seconds)

    async def _admitted(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        if scope["method"] not in _BODY_METHODS:
            await self._app(scope, receive, exchange.send)
            return
        if self._inflight >= self._max_inflight_requests:
            raise retry_later(429, "server.overloaded", "the service has as many requests open as it accepts")
        self._inflight += 1
        try:
            check_headers(Headers(scope=scope), self._max_body_bytes)
            body = await read_body(receive, self._max_body_bytes)
            await self._app(scope, replay(body, receive), exchange.send)
        finally:
            self._inflight -= 1


class _Exchange:
    """What the guard remembers of one request and its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._start = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = _CLIENT_CLOSED  # Until an answer starts; then the client was there to see its status.
        self._started = False
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        """Pass a message on and remember the status."""
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with `error`, unless an answer has started, which then stays cut off."""
        if not self._started:
            await problem_response(error, self.request_id)(self._scope, _no_more, self.send)

    @property
    def route(self) -> str:
        """Template of the route that answered: a bounded number of values, whatever paths are asked for."""
        return getattr(self._scope.get("route"), "path", "unmatched")

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return time.monotonic() - self._start


def check_headers(headers: Headers, max_body_bytes: int) -> None:
    """Refuse a body by its headers, before reading it.

    Raises:
        ApiError: compressed, not JSON, or longer than allowed by its own account.
    """
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "request.unsupported_encoding", "send the body without Content-Encoding")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "request.unsupported_media_type", "send the body as application/json")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_body_bytes:
        raise too_large(max_body_bytes)


async def read_body(receive: Receive, max_body_bytes: int) -> bytes:
    """Return the whole body, or stop reading at the limit.

    Raises:
        ApiError: the body is longer.
    """
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > max_body_bytes:
            raise too_large(max_body_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once and then what really comes, such as the disconnect."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def too_large(max_body_bytes: int) -> ApiError:
    """Return the 413 of a body above the limit."""
    return ApiError(413, "request.too_large", f"the body is longer than {max_body_bytes:,} bytes; split the request")


async def _no_more() -> Message:
    return {"type": "http.disconnect"}
