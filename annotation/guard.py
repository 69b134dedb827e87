"""Which requests reach Gradio: those of the page itself and of Gradio's clients, by names of this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from annotation.folder import no_room, remove_strays

# All that the page asks for, and Gradio's clients for Python and JavaScript. Others of Gradio's paths fetch
# what is elsewhere, or run programs on what was sent.
READ = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static)/.+|/gradio_api/file=/.+"
    r"|/gradio_api/(info|startup-events|upload_progress|queue/data|heartbeat/[^/]+)"
    r"|/gradio_api/call/(annotate|example)/[^/]+|/teach(/.*)?"
)
UPLOAD = "/gradio_api/upload"
WRITE = re.compile(r"/gradio_api/(upload|queue/join|call/(annotate|example))|/teach/(edit|save)")
# Of a request that is no upload, and of the form around one.
OTHER_BYTES, FORM_BYTES = 2**20, 2**16

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI middleware that refuses what the page does not use, what is too large, and other sites.

    Gradio allows any other site to read its answers where the page has another name than localhost, so this
    must stand before what Gradio itself adds.

    Args:
        app: what comes behind it
        names: of this machine that its visitors may use, besides addresses
        upload_bytes: of a file
        folder: where uploads and results lie
        folder_megabytes: of all that may lie there
    """

    def __init__(
        self, app: App, names: Collection[str], upload_bytes: int, folder: Path, folder_megabytes: int
    ) -> None:
        self.app, self.names, self.upload_bytes = app, {name.lower() for name in names}, upload_bytes
        self.folder, self.folder_megabytes = folder, folder_megabytes
        # Bytes of each upload under way.
        self._coming: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400, 403, 404, 413 or 507 and a sentence."""
        if scope["type"] == "websocket":  # which the page does not use
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        answer = PlainTextResponse(refusal[1], refusal[0]) if refusal else self.app
        if refusal or scope["path"] != UPLOAD:
            await answer(scope, receive, send)
            return
        size = int(dict(scope["headers"]).get(b"content-length", b"0"))
        self._coming.append(size)
        try:
            # Who has gone needs no answer.
            with contextlib.suppress(ClientDisconnect):
                await answer(scope, receive, send)
        finally:
            self._coming.remove(size)
            if not self._coming:
                remove_strays(self.folder)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method, path, host = scope["method"], scope["path"], headers.get("host", "").lower()
        if not self._is_name(host):
            # A page elsewhere that sends its visitors' browsers here under a name of its own.
            return 400, "this page has no such name; whoever serves it can add it with --host_names"
        origin = headers.get("origin")
        is_foreign = origin is not None and origin.lower().partition("://")[2] != host
        if is_foreign or (method == "POST" and headers.get("sec-fetch-site") == "cross-site"):
            return 403, "this page answers no other site"
        if method not in ("GET", "HEAD", "POST") or not (WRITE if method == "POST" else READ).fullmatch(path):
            return 404, "there is nothing here"
        limit = self.upload_bytes + FORM_BYTES if path.endswith("/upload") else OTHER_BYTES
        length = headers.get("content-length", "0")
        # Browsers and Gradio's clients state it; the server reads no more than that.
        if "transfer-encoding" in headers or not re.fullmatch(r"\d{1,15}", length) or int(length) > limit:
            return 413, f"this is larger than {limit // 2**20} MB, or its size is not stated"
        coming = sum(self._coming) + int(length)
        if path == UPLOAD and (problem := no_room(self.folder, self.folder_megabytes, coming)):
            return 507, problem
        return None

    def _is_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
