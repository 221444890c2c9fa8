"""What stands before the service: every request passes here first.

Comes in: ASGI requests. Goes out: the same, counted, timed and limited. A request is refused before its body is read where
too many are inside or the service is stopping, and ended where its body is too large or its time is over. Every error is
JSON, `{"error": sentence}`.
"""

import json
import logging
import time

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving.metrics import Metrics

LOG = logging.getLogger("altmoe.serve")
SEARCH = "/search"


async def refuse(send, status: int, message: str, **headers: str) -> None:
    """Answer with an error."""
    body = json.dumps({"error": message}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Gate:
    """
    ASGI middleware.

    Args:
        app: what answers.
        metrics: where requests are counted.
        max_bytes: of a request's body.
        max_requests: searches inside at once; more are answered with 503.
        timeout: seconds for one request, its upload included.
    """

    def __init__(self, app, metrics: Metrics, max_bytes: int, max_requests: int, timeout: float):
        self.app, self.metrics = app, metrics
        self.max_bytes, self.max_requests, self.timeout = max_bytes, max_requests, timeout
        self.inside = 0
        self.stopping = False
        metrics.inside.set_function(lambda: self.inside)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != SEARCH:
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def send_on(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.stopping:
                return await refuse(send_on, 503, "The service is stopping.", connection="close")
            if self.inside >= self.max_requests:
                message = f"{self.inside} requests are being answered; try again in a moment."
                return await refuse(send_on, 503, message, **{"retry-after": "1"})
            self.inside += 1
            try:
                announced = dict(scope["headers"]).get(b"content-length")
                body = LimitedBody(receive, announced, self.max_bytes)
                await self._within_time(scope, body, send_on, lambda: status)
            finally:
                self.inside -= 1
        finally:
            seconds = time.perf_counter() - start
            self.metrics.request(status, seconds)
            LOG.info("%s %s %d %.1f ms%s", scope["method"], SEARCH, status, 1000 * seconds, scope.get("about", ""))

    async def _within_time(self, scope, receive, send, status) -> None:
        try:
            with anyio.move_on_after(self.timeout) as time_limit:
                await self.app(scope, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:  # the app has answered with 500
            LOG.error("a search failed (%s)", type(error).__name__, exc_info=error)
            return
        if time_limit.cancelled_caught and not status():
            if receive.complete:
                await refuse(send, 504, f"No answer within {self.timeout:g} seconds.")
            else:  # what is still to come would be taken for the next request
                message = f"The request was not complete within {self.timeout:g} seconds."
                await refuse(send, 408, message, connection="close")


class LimitedBody:
    """The body of a request, piece by piece, up to a limit; `complete` when all was received."""

    def __init__(self, receive, announced: bytes | None, most: int):
        self.receive, self.most, self.size, self.complete = receive, most, 0, False
        self.announced = int(announced) if announced and announced.isdigit() else 0

    async def __call__(self):
        if self.announced > self.most:
            self._too_large()
        message = await self.receive()
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            if self.size > self.most:
                self._too_large()
            self.complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> None:
        self.complete = True
        raise HTTPException(413, f"The request is larger than {self.most} bytes.")
