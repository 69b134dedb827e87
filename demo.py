"""A web page that names the action in a video, for a browser on this machine.

python3 demo.py                                                   # 400 actions, nothing to train
python3 demo.py --checkpoint_model model_checkpoints/ConvLSTM_150.pth
python3 demo.py --checkpoint_model y.pth --examples clips/ --port 8000
python3 demo.py --teach my_videos/                                # mark segments; it learns as you go
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotation.allowed import PageSettings
from annotation.folder import page_folder, sweep
from annotation.recognizer import Recognizer
from annotation.settings import BackendSettings, LabelSettings
from features.encoder import Encoder
from features.settings import DeviceSettings
from utils.flags import NATURAL, POSITIVE, Parser, add_flags, read, setting
from utils.process import UserError, run

INSTALL = "run pip install -r requirements-demo.txt"
MEGABYTE = 2**20
# Addresses that only this machine reaches.
HOME = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the page is, and how long it keeps files."""

    host: str = setting(
        "127.0.0.1",
        "address to listen at; 127.0.0.1 (default) is for this machine alone; 0.0.0.0 lets in anybody, "
        "without a password",
    )
    host_names: str = setting(
        "",
        "names between commas under which others open the page, as behind a proxy; default: addresses, "
        "localhost and this machine's name",
    )
    port: int = setting(7860, "0 takes any that is free", NATURAL)
    teach: Path | None = setting(
        None,
        "folder of videos whose segments are marked in a page of its own, which learns from them; kept in "
        "segments.csv there; default: none",
        Path,
    )
    keep_minutes: float = setting(
        60.0, "after which uploads and results are deleted, default 60; all of them at the end", POSITIVE
    )


def get_args_parser() -> Parser:
    """The flags of demo.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    for settings in (ServerSettings, PageSettings, BackendSettings, LabelSettings, DeviceSettings):
        add_flags(parser, settings)
    return parser


def launch(page: Any, server: ServerSettings, teach: Any = None) -> tuple[Any, str]:
    """Start to serve a page; returns it and its address.

    Args:
        teach: an ASGI app for the paths below /teach

    Raises: UserError if the port is taken.
    """
    import gradio
    from starlette.routing import Mount

    from annotation.guard import Guard

    limit, host = page.settings.max_megabytes * MEGABYTE, server.host.strip("[]")
    names = {"localhost", socket.gethostname(), *filter(None, map(str.strip, server.host_names.split(",")))}
    if host not in HOME:
        names.add(socket.getfqdn())

    @contextlib.asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        # What `add_middleware` adds stands behind Gradio's own, which answers other sites by itself.
        app.middleware_stack = Guard(
            app.middleware_stack, names, limit, page.folder, page.settings.keep_megabytes
        )
        if teach:
            # Gradio's own takes all that is left.
            app.router.routes.insert(0, Mount("/teach", teach))
        yield

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((host, server.port))
            port = free.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host {server.host} --port {server.port}: {error.strerror or error}; choose an address of "
            "this machine, or another --port where a page runs already"
        ) from error
    in_url, blocks = f"[{host}]" if ":" in host else host, page.build()
    blocks.launch(
        server_name=in_url, server_port=port, prevent_thread_lock=True, quiet=True, show_error=True,
        max_file_size=limit, app_kwargs={"lifespan": guarded}, footer_links=[], run_history=False,
        state_session_capacity=2 * page.settings.max_waiting, enable_monitoring=False, ssr_mode=False,
        # Those of Gradio itself would be fetched from elsewhere.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )  # fmt: skip
    return blocks, f"http://{in_url}:{port}"


def main(argv: list[str] | None = None) -> int:
    """Serve until the user ends it; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    server, backend = read(ServerSettings, args), read(BackendSettings, args)
    if server.teach and server.host not in HOME:
        raise UserError(f"--host {server.host}: --teach is for this machine alone; leave --host out")
    if server.teach and backend.backend == "onnxruntime":
        raise UserError("--teach trains with PyTorch; leave out --backend onnxruntime")
    with page_folder() as folder:
        # They are read when Gradio is loaded: no word about us to anybody, nothing fetched from elsewhere.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder)
        }  # fmt: skip
        try:
            from annotation.page import Page
        except ImportError as error:
            raise UserError(f"the page needs the package {error.name}; {INSTALL}") from error
        recognizer = Recognizer.open(backend, read(LabelSettings, args), read(DeviceSettings, args))
        page, learner, teach = Page(read(PageSettings, args), recognizer, folder), None, None
        if server.teach:
            from annotation.learner import Learner
            from annotation.teach_page import Teach

            assert isinstance(recognizer.encoder, Encoder)
            learner = Learner(server.teach, recognizer.encoder)
            page.teach, teach = True, Teach(learner).app
        blocks, address = launch(page, server, teach)
        print(f"open {address}{'/teach/' * bool(teach)} in a browser; Ctrl-C ends it", flush=True)
        try:
            if learner:
                learner.start()
            while True:
                time.sleep(min(60.0, 20 * server.keep_minutes))
                sweep(folder, 60 * server.keep_minutes)
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
        finally:
            if learner:
                learner.close()
            page.close()
            blocks.close(verbose=False)
    return 0


if __name__ == "__main__":
    run(main)
