"""Which requests reach Gradio, how large they may be, and where they may come from: an ASGI middleware."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import sys
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from annotation.room import MEGABYTE, Room
from utils.process import UserError

# What the form around a file takes in an upload.
FORM_BYTES = 2**16
# Of any other request; the page sends some hundred bytes.
OTHER_BYTES = MEGABYTE
# For a browser to send what nobody reads, since it looks for no answer before.
DRAIN_SECONDS = 10
MISUNDERSTOOD = "the page does not understand this request"
UPLOAD = "/gradio_api/upload"
# All that the page asks for, and Gradio's clients for Python and JavaScript.
READ = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static)/.+"
    r"|/gradio_api/(info|startup-events|upload_progress|queue/data|heartbeat/[^/]+)"
    r"|/gradio_api/call/(annotate|example)/[^/]+"
)
WRITE = re.compile(rf"{UPLOAD}|/gradio_api/queue/join|/gradio_api/call/(annotate|example)")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(MultiPartException):
    """A request that is refused.

    Gradio deletes what it has stored of an upload on errors of this kind only.

    Args:
        status: of the answer
        text: one sentence
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Guard:
    """Refuses what the page does not use, what is too large, and what another site sends.

    Gradio allows any other site to read its answers where the page has another name than localhost, so this
    must stand before what Gradio itself adds.

    Args:
        app: what comes behind it
        room: where uploads lie
        names: of this host that its visitors may use, besides addresses
        upload_bytes: of a file
    """

    def __init__(self, app: App, room: Room, names: Collection[str], upload_bytes: int) -> None:
        self.app, self.room, self.upload_bytes = app, room, upload_bytes
        self.names = {name.lower() for name in names}
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400, 403, 404, 413 or 507 and a sentence."""
        if scope["type"] == "websocket":  # which the page does not use
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        is_upload = scope["path"] == UPLOAD
        limit = self.upload_bytes + FORM_BYTES if is_upload else OTHER_BYTES
        body = _Body(receive, limit, self.room if is_upload else None)
        begun = False

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message.get("status") == 500:
                body.refusal = body.refusal or Refusal(400, MISUNDERSTOOD)
            # What Gradio says of a body that broke off is not what is wrong with it.
            if body.refusal is None:
                begun = True
                await send(message)

        self._uploading += is_upload
        try:
            self._check_sender(scope["method"], headers)
            self._check_path(scope["method"], scope["path"])
            await body.check_stated(headers.get("content-length", ""))
            await self.app(scope, body.receive, answer)
        except Refusal as refusal:
            body.refusal = body.refusal or refusal
        except Exception as error:
            # Of a stream of news about a session that there is not, which has begun by then.
            is_stream = begun and isinstance(error.__cause__ or error, HTTPException)
            if body.refusal is None and not is_stream:
                raise
            if is_stream:
                await send({"type": "http.response.body"})
            elif body.refusal and body.refusal.text == MISUNDERSTOOD:
                # No video is labelled here, so it is Gradio that trips over what it was sent.
                print(f"{scope['method']} {scope['path']}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            self._uploading -= is_upload
            if is_upload and not self._uploading:
                self.room.remove_strays()
        if body.refusal is not None and not begun:
            await _refuse(send, body.refusal)

    def _check_sender(self, method: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in self.names and not _is_address(name):
            # A page elsewhere that sends its visitors' browsers here under a name of its own.
            raise Refusal(400, "this page has no such name; whoever serves it can add it with --host_names")
        origin = headers.get("origin")
        is_foreign = origin is not None and origin.lower().partition("://")[2] != host
        if is_foreign or (method == "POST" and headers.get("sec-fetch-site") == "cross-site"):
            raise Refusal(403, "this page answers no other site")

    def _check_path(self, method: str, path: str) -> None:
        if method in ("GET", "HEAD"):
            is_file = path.startswith(f"/gradio_api/file={self.room.files}/")
            is_known = is_file or READ.fullmatch(path) is not None
        else:
            is_known = method == "POST" and WRITE.fullmatch(path) is not None
        if not is_known:
            raise Refusal(404, "there is nothing here")


class _Body:
    """The body of a request, whose bytes are counted while they come, whatever length it states.

    Args:
        receive: what gives it
        limit: bytes of it
        room: where it is stored; None where it is not
    """

    def __init__(self, receive: Receive, limit: int, room: Room | None) -> None:
        self._receive, self.limit, self._room = receive, limit, room
        self._read = 0
        self.ended = False
        self.refusal: Refusal | None = None

    async def check_stated(self, length: str) -> None:
        """Refuse a body for the length that it states. Raises: Refusal."""
        stated = int(length) if length.isdigit() and len(length) < 20 else 0
        if stated > self.limit:
            raise self._too_large()
        await self._check_room(stated)

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part. Raises: Refusal if it is too much, or if the client has gone."""
        message = await self._receive()
        if message["type"] != "http.request":
            if not self.ended:
                self.refusal = Refusal(400, "the request ends in the middle")
                raise self.refusal
            return message
        before = self._read
        self._read += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        if self._read > self.limit:
            self.refusal = self._too_large()
            await self._drain()
            raise self.refusal
        if self._read // MEGABYTE > before // MEGABYTE:
            await self._check_room(0)
        return message

    def _too_large(self) -> Refusal:
        what = "the file" if self._room else "the request"
        return Refusal(413, f"{what} is larger than {self.limit // MEGABYTE} MB")

    async def _check_room(self, more: int) -> None:
        try:
            if self._room:
                self._room.check(more)
        except UserError as error:
            self.refusal = Refusal(507, str(error))
            await self._drain()
            raise self.refusal from error

    async def _drain(self) -> None:
        """Read on without a use for it, as much as might have come."""
        left = self.limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0 and not self.ended:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self.ended = not message.get("more_body", False)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _refuse(send: Send, refusal: Refusal) -> None:
    text = refusal.text.encode()
    headers = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(text))}
    # What may be left of the body is not read.
    headers["connection"] = "close"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": text})
