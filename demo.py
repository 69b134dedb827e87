"""A web page that names the action in a video, for a browser on this machine.

python3 demo.py                                                   # 400 actions, nothing to train
python3 demo.py --checkpoint_model model_checkpoints/ConvLSTM_150.pth
python3 demo.py --checkpoint_model y.pth --examples clips/ --port 8000
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotation.settings import BackendSettings, LabelSettings, PageSettings
from features.settings import DeviceSettings
from utils.flags import NATURAL, POSITIVE, add_flags, flags_first, read, setting
from utils.process import UserError, run

INSTALL = "run pip install -r requirements-demo.txt"
MEGABYTE = 2**20
# What the form around a file takes in an upload.
FORM_BYTES = 2**16

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the page is, and how long it keeps what it was given."""

    host: str = setting(
        "127.0.0.1",
        "address to listen at; 127.0.0.1 (recommended) is for this machine alone, 0.0.0.0 lets in anybody "
        "who can reach it: the page asks for no password",
    )
    port: int = setting(7860, "0 takes any that is free", NATURAL)
    keep_minutes: float = setting(
        60.0,
        "after which uploads and results are deleted, default 60; all of them when the page ends",
        POSITIVE,
    )


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of demo.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for settings in (ServerSettings, PageSettings, BackendSettings, LabelSettings, DeviceSettings):
        add_flags(parser, settings)
    return parser


flags_first(__name__, get_args_parser)

from annotation.annotate import Annotator, open_model
from annotation.page import Page


class UploadLimit:
    """Turns away uploads that are too large before a byte of them is read: an ASGI middleware.

    Gradio counts the bytes of each file of a request while they come in; here the whole request counts.

    Args:
        app: what comes behind it
        limit: bytes of a file
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 411 or 413."""
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                await _refuse(send, 411, "an upload must state its length")
                return
            if int(length) > self.limit + FORM_BYTES:
                await _refuse(send, 413, f"the file is larger than {self.limit // MEGABYTE} MB")
                return
        await self.app(scope, receive, send)


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def sweep(folder: Path, seconds: float) -> None:
    """Delete what has not changed in a folder for some seconds: files, and folders that are empty.

    Gradio's `delete_cache` knows its own copies of results, not the files that they are copied from.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        try:
            if time.time() - path.stat().st_mtime > seconds:
                path.rmdir() if path.is_dir() else path.unlink()
        except OSError:  # in use, not empty, or gone by itself
            continue


def launch(page: Page, server: ServerSettings) -> tuple[Any, str]:
    """Start to serve a page; returns it and its address.

    Raises: UserError if the port is taken.
    """
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    limit = page.settings.max_megabytes * MEGABYTE
    # A page elsewhere that sends its visitors' browsers here under a name of its own is refused.
    local = server.host in ("127.0.0.1", "localhost", "::1")
    hosts = ["127.0.0.1", "localhost", "[::1]"] if local else ["*"]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        Middleware(UploadLimit, limit=limit),
    ]
    blocks = page.build()
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    try:
        with socket.socket(family) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((server.host, server.port))
            port = free.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host {server.host} --port {server.port}: {error.strerror or error}; another page may run "
            "there, choose another --port"
        ) from error
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    blocks.launch(
        server_name=server.host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=limit,
        allowed_paths=[str(page.results)],
        app_kwargs={"middleware": middleware},
        footer_links=[],
        run_history=False,
        state_session_capacity=2 * page.settings.max_waiting,
        enable_monitoring=False,
        ssr_mode=False,
        theme=gradio.themes.Default(font=fonts[0], font_mono=fonts[1]),
    )
    return blocks, f"http://{server.host}:{port}"


def main(argv: list[str] | None = None) -> int:
    """Serve until the user ends it; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    server, backend = read(ServerSettings, args), read(BackendSettings, args)
    # They are read when Gradio is loaded: no word about us to anybody, nothing fetched from elsewhere.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="action-recognition-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(f"the page needs the package {error.name}; {INSTALL}") from error
        model = open_model(backend, read(DeviceSettings, args))
        annotator = Annotator(read(LabelSettings, args), *model, backend.name)
        page = Page(read(PageSettings, args), annotator, Path(folder) / "results")
        blocks, address = launch(page, server)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(min(60.0, 20 * server.keep_minutes))
                sweep(Path(folder), 60 * server.keep_minutes)
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
        finally:
            page.close()
            blocks.close(verbose=False)
    return 0


if __name__ == "__main__":
    run(main)
