"""A web page that names the action in a video, for a browser on this machine.

python3 demo.py --checkpoint_model model_checkpoints/ConvLSTM_150.pth
python3 demo.py --checkpoint_model y.pth --examples clips/ --port 8000
"""

from __future__ import annotations

import argparse
import contextvars
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import cli
from annotate import Annotated, Annotator, add_label_flags, add_model_flags, open_model
from overlay import OVERLAYS
from video import VIDEO_SUFFIXES, Video, VideoError, video_files

INSTALL = "run pip install -r requirements-demo.txt"
TITLE = "Action-Recognition"
MEGABYTE = 2**20
# Of a frame: 4K. Larger ones would keep everybody waiting.
MAX_PIXELS = 4096 * 2304
# A file may claim any frame rate, and hold more frames for a second than anybody films.
MAX_FPS = 60
# Actions with a curve, points of each, and examples on the page.
CURVES, POINTS, EXAMPLES = 5, 300, 8
# What the form around a file takes in an upload.
FORM_BYTES = 2**16
HEADER_BYTES = 2**13

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of demo.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 127.0.0.1 (recommended) is for this machine alone, 0.0.0.0 lets in "
        "anybody who can reach it: the page asks for no password",
    )
    parser.add_argument("--port", type=cli.non_negative_int, default=7860, help="0 takes any that is free")
    parser.add_argument(
        "--examples",
        type=Path,
        default=Path("data/toy-actions/UCF-101"),
        help=f"folder of videos to pick from, the first of each of its folders, {EXAMPLES} at most; default: "
        "the toy data, where it has been drawn",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max_megabytes",
        type=cli.positive_int,
        default=100,
        help="of an upload; 100 (default) is some minutes of HD",
    )
    group.add_argument(
        "--max_seconds",
        type=cli.positive_int,
        default=120,
        help="of a video; 120 (default) takes half a minute of work on 2 cores, and others wait",
    )
    group.add_argument(
        "--max_waiting",
        type=cli.positive_int,
        default=40,
        help="users in the queue; more are asked to come back",
    )
    group.add_argument(
        "--keep_minutes",
        type=cli.positive_float,
        default=60.0,
        help="after which results are deleted, default 60; an upload is deleted as soon as it has been read",
    )
    add_model_flags(parser)
    add_label_flags(parser)
    return parser


class Uploads:
    """How many users still wait for each file that was uploaded; what nobody waits for is deleted.

    Gradio stores a file under the SHA-256 of its bytes, so two users who send the same one share it. While
    an upload comes in, nobody knows which file it will be, and all stay.
    """

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._coming = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Note that an upload comes in."""
        with self._lock:
            self._coming += 1

    def end(self, paths: Iterable[str]) -> None:
        """Note that an upload has come in, and where it was stored; nowhere if it failed."""
        with self._lock:
            self._coming -= 1
            self._waiting.update(paths)
            self._clear()

    def done(self, path: str) -> None:
        """Note that one user has what was wanted of a file."""
        with self._lock:
            self._waiting[path] -= 1
            self._clear()

    def _clear(self) -> None:
        for path in [path for path, users in self._waiting.items() if users <= 0 and not self._coming]:
            del self._waiting[path]
            Path(path).unlink(missing_ok=True)


class UploadGuard:
    """Turns away uploads that are too large, or whose file name leads elsewhere, before they are stored.

    An ASGI middleware. Gradio itself counts the bytes of each file, and stores them under its own folder
    whatever their name is; here the whole request counts, and a name with a path in it is an error.

    Args:
        app: what comes behind it
        limit: bytes of a file
        uploads: is told of files that were stored
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limit: int, uploads: Uploads
    ) -> None:
        self.app, self.limit, self.uploads = app, limit, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400, 411 or 413."""
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"")
        if not stated.isdigit():
            await _refuse(send, 411, "an upload must state its length")
        elif int(stated) > self.limit + FORM_BYTES:
            await _refuse(send, 413, f"the file is larger than {self.limit // MEGABYTE} MB")
        else:
            await self._look_at_name(scope, receive, send)

    async def _look_at_name(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages, head = [], b""
        while b"\r\n\r\n" not in head and len(head) < HEADER_BYTES:
            message = await receive()
            messages.append(message)
            head += message.get("body", b"")
            if not message.get("more_body"):
                break
        for name in re.findall(rb'filename\*?="?([^"\r\n]*)', head.split(b"\r\n\r\n")[0], re.IGNORECASE):
            if re.search(rb"[/\\\x00]|%2f|%5c|^\.\.?$", name, re.IGNORECASE):
                await _refuse(send, 400, "a file name must not have a path in it")
                return
        messages.reverse()
        status, answer, stored = 0, b"", []

        async def replay() -> MutableMapping[str, Any]:
            return messages.pop() if messages else await receive()

        async def overhear(message: MutableMapping[str, Any]) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body") and status == 200:
                stored.extend(json.loads(answer))
            await send(message)

        self.uploads.begin()
        try:
            await self.app(scope, replay, overhear)
        finally:
            self.uploads.end(stored)


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def check_video(path: Path, max_seconds: int) -> int:
    """How many frames of an uploaded video may be read, by what its file states.

    Raises: FileNotFoundError or VideoError as `Video.frames`; VideoError if it is too long or its frames are
        too large.
    """
    video = Video(path)
    fps, stated = video.fps(), video.stated_count()
    frame = next(video.frames())
    if frame.shape[0] * frame.shape[1] > MAX_PIXELS:
        raise VideoError(
            f"{path}: frames of {frame.shape[1]} x {frame.shape[0]} pixels are too large for this page; "
            "make it 4K or smaller"
        )
    if stated / fps > max_seconds:
        raise VideoError(
            f"{path}: {float(stated / fps):.0f} seconds are too long for this page; cut it to {max_seconds}"
        )
    return max_seconds * min(MAX_FPS, max(1, round(fps)))


def find_examples(folder: Path) -> list[Path]:
    """The first video of a folder and of each folder in it."""
    first: dict[Path, Path] = {}
    for path in video_files(folder):
        first.setdefault(path.parent, path)
    return list(first.values())[:EXAMPLES]


def curves(found: Annotated) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Rows of second, action and probability for the most probable actions, and the colour of each."""
    shown = np.argsort(-found.probabilities.mean(axis=0), kind="stable")[:CURVES].tolist()
    places = np.unique(np.linspace(0, len(found.probabilities) - 1, POINTS).round().astype(int))
    rows = [
        {
            "second": round(found.second(place), 3),
            "action": found.classes[label],
            "probability": round(float(found.probabilities[place, label]), 4),
        }
        for label in shown
        for place in places.tolist()
    ]
    return rows, {found.classes[label]: "#{:02x}{:02x}{:02x}".format(*found.color(label)) for label in shown}


def sweep(folder: Path, seconds: float) -> None:
    """Delete what has not changed in a folder for some seconds: files, and folders that are empty."""
    for path in sorted(folder.rglob("*"), reverse=True):
        try:
            if time.time() - path.stat().st_mtime > seconds:
                path.rmdir() if path.is_dir() else path.unlink()
        except OSError:  # in use, not empty, or gone by itself
            continue


class Page:
    """The page, and what it does with a video.

    Args:
        args: the flags
        annotator: what labels videos
        folder: where uploads and results are while they are needed
    """

    def __init__(self, args: argparse.Namespace, annotator: Annotator, folder: Path) -> None:
        self.args, self.annotator, self.folder = args, annotator, folder
        self.results, self.uploads = folder / "results", Uploads()
        self.examples = find_examples(args.examples)
        # PyTorch keeps threads and memory for each thread that it is used from, and Gradio has 40.
        self._worker = ThreadPoolExecutor(1)
        self._closed = False

    def label(
        self, path: Path, overlay: str, smooth: float, progress: Callable[..., object]
    ) -> tuple[Any, ...]:
        """What the page shows of a video, once those before it are done.

        Raises: gradio.Error with what is wrong, in one sentence.
        """
        # Progress finds its way to the browser by them.
        variables = contextvars.copy_context()
        return self._worker.submit(variables.run, self._label, path, overlay, smooth, progress).result()

    def _label(
        self, path: Path, overlay: str, smooth: float, progress: Callable[..., object]
    ) -> tuple[Any, ...]:
        import gradio
        import pandas

        # Nobody needs to know where things are on this machine.
        model = Path(self.args.checkpoint_model.name)
        settings = {**vars(self.args), "overlay": overlay, "smooth": smooth, "checkpoint_model": model}
        annotator = Annotator(argparse.Namespace(**settings), self.annotator.model, self.annotator.trained)
        output = self.results / secrets.token_hex(8) / f"{path.stem}.mp4"

        def tell(done: int, stated: int) -> None:
            if self._closed:
                raise VideoError(f"{path}: the page was closed down")
            if done % 10 == 0:
                progress((done, max(done, stated)), unit="frames")

        try:
            limit = check_video(path, self.args.max_seconds)
            found = annotator.annotate(path, output, name=path.name, progress=tell, max_frames=limit)
        except (ValueError, OSError) as error:
            shutil.rmtree(output.parent, ignore_errors=True)
            message = str(error).replace(str(path), path.name)
            raise gradio.Error(message, duration=None, print_exception=False) from error
        rows, colors = curves(found)
        mean = found.probabilities.mean(axis=0, dtype=np.float64)
        segments = [
            [
                found.classes[one.label],
                round(found.second(one.first), 2),
                round(found.second(one.last + 1), 2),
                round(100 * one.probability, 1),
            ]
            for one in found.segments
        ]
        return (
            {name: float(share) for name, share in zip(found.classes, mean, strict=True)},
            str(output),
            gradio.LinePlot(pandas.DataFrame(rows), color_map=colors),
            segments,
            [str(table) for table in found.tables],
        )

    def close(self) -> None:
        """Give up the video under way, and those that wait."""
        self._closed = True
        self._worker.shutdown(cancel_futures=True)

    def build(self) -> Any:
        """The page as a gradio.Blocks."""
        import gradio

        # gradio.Progress is found by being a default.
        def upload(
            file: str | None,
            overlay: str,
            smooth: float,
            progress: Any = gradio.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:
            if file is None:
                raise gradio.Error("choose a video first", print_exception=False)
            try:
                return self.label(Path(file), overlay, smooth, progress)
            finally:
                self.uploads.done(str(file))

        def example(
            number: int,
            overlay: str,
            smooth: float,
            progress: Any = gradio.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:
            return self.label(self.examples[number], overlay, smooth, progress)

        classes = self.annotator.trained.classes
        with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
            gradio.Markdown(
                f"# {TITLE}\nDrop a video of up to {self.args.max_seconds} seconds and "
                f"{self.args.max_megabytes} MB. The model knows {len(classes)} actions: "
                + ", ".join(classes[:12])
                + (", ..." if len(classes) > 12 else ".")
            )
            with gradio.Row():
                with gradio.Column(scale=1):
                    file = gradio.File(label="Video", file_types=list(VIDEO_SUFFIXES), elem_id="upload")
                    overlay = gradio.Radio(list(OVERLAYS), value=self.args.overlay, label="Overlay")
                    smooth = gradio.Slider(
                        0,
                        3,
                        value=min(3.0, self.args.smooth),
                        step=0.1,
                        label="Average over the last seconds",
                    )
                    if self.examples:
                        names = [[path.parent.name] for path in self.examples]
                        picked = gradio.Dataset(
                            components=[gradio.Textbox(visible=False)],
                            samples=names,
                            label="Or pick an example",
                            type="index",
                            elem_id="examples",
                        )
                with gradio.Column(scale=2):
                    action = gradio.Label(label="Action", num_top_classes=3, elem_id="action")
                    video = gradio.Video(
                        label="Annotated",
                        autoplay=True,
                        interactive=False,
                        buttons=["download"],
                        elem_id="video",
                    )
                    plot = gradio.LinePlot(
                        x="second",
                        y="probability",
                        color="action",
                        y_lim=[0, 1],
                        height=320,
                        title="Probabilities over time",
                        show_label=False,
                        elem_id="curves",
                    )
                    table = gradio.Dataframe(
                        headers=["action", "from, s", "to, s", "mean probability, %"],
                        label="Segments",
                        interactive=False,
                        elem_id="segments",
                    )
                    tables = gradio.File(
                        label="Segments and frames", file_count="multiple", interactive=False
                    )
            outputs = [action, video, plot, table, tables]
            shown: dict[str, Any] = {"show_progress_on": [action], "concurrency_id": "model"}
            read = file.upload(upload, [file, overlay, smooth], outputs, api_name="annotate", **shown)
            # Whatever became of it, the place is free for the next one.
            for then in (read.success, read.failure):
                then(lambda: None, None, file, queue=False, api_visibility="private")
            if self.examples:
                picked.click(example, [picked, overlay, smooth], outputs, api_name="example", **shown)
        # One at a time: the model takes the whole machine.
        page.queue(max_size=self.args.max_waiting, default_concurrency_limit=1)
        return page


def launch(page: Page) -> tuple[Any, str]:
    """Start to serve a page; returns it and its address.

    Raises: OSError if the port is taken.
    """
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    args = page.args
    limit = args.max_megabytes * MEGABYTE
    # A page elsewhere that sends its visitors' browsers here under a name of its own is refused.
    local = args.host in ("127.0.0.1", "localhost", "::1")
    hosts = ["127.0.0.1", "localhost", "[::1]"] if local else ["*"]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        Middleware(UploadGuard, limit=limit, uploads=page.uploads),
    ]
    blocks = page.build()
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        with socket.socket(family) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((args.host, args.port))
            port = free.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"--host {args.host} --port {args.port}: {error.strerror or error}; another page may run there, "
            "choose another --port"
        ) from error
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    blocks.launch(
        server_name=args.host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=limit,
        allowed_paths=[str(page.results)],
        app_kwargs={"middleware": middleware},
        footer_links=[],
        run_history=False,
        state_session_capacity=2 * args.max_waiting,
        enable_monitoring=False,
        ssr_mode=False,
        theme=gradio.themes.Default(font=fonts[0], font_mono=fonts[1]),
    )
    return blocks, f"http://{args.host}:{port}"


def main(argv: list[str] | None = None) -> int:
    """Serve until the user ends it; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    # They are looked at when Gradio is loaded: no word about us to anybody, nothing fetched from elsewhere.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="action-recognition-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ValueError(f"the page needs the package {error.name}; {INSTALL}") from error
        page = Page(args, Annotator(args, *open_model(args)), Path(folder))
        blocks, address = launch(page)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(min(60.0, 20 * args.keep_minutes))
                sweep(page.folder, 60 * args.keep_minutes)
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
        finally:
            page.close()
            blocks.close(verbose=False)
    return 0


if __name__ == "__main__":
    cli.run(main)
