"""The page that learns from what is marked in it: plain HTML and JavaScript, and what they ask for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from annotation.heatmap import Maps, draw_heat, heat_at
from annotation.labels import runs
from annotation.learner import Entry, Learner
from annotation.overlay import EMPTY, PALETTE, hex_color
from splits.table import Span, SpanError
from utils.process import MissingFileError, UserError
from video.decoder import Frame
from video.opencv import cv2
from video.reader import Video

FILES = Path(__file__).with_name("teach")
# Pixels of the widest picture that is sent, and of a small one.
WIDE, SMALL = 720, 160
# Videos that stay open, each where somebody looks at it.
OPEN = 4
# Seconds that a browser waits for news at a time, and between two looks.
WAIT, LOOK = 20.0, 0.03
# All that the page asks for is here.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:",
    "Cache-Control": "no-store",
}


def _jpeg(image: np.ndarray, width: int) -> bytes:
    """A picture (H, W, 3) uint8 RGB as a JPEG file of `width` pixels at most."""
    if image.shape[1] > width:
        size = width, max(1, round(image.shape[0] * width / image.shape[1]))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _refused(_: Request, error: Exception) -> Response:
    """What is wrong, in a line."""
    text = (
        f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    )
    return PlainTextResponse(text, 400)


def _frames_from(entry: Entry, second: float) -> Iterator[Frame]:
    """Frames from that on which is shown at a second, of a file of its own: the other may be encoded now."""
    embedded = entry.embedded
    return Video(entry.video.path).frames_from(second, embedded.seconds()[:-1] if embedded else None)


class Player:
    """Pictures of videos by the second; who goes on where the last answer ended waits for no search."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int], Iterator[Frame]] = OrderedDict()

    def frames(self, entry: Entry, second: int) -> list[Frame]:
        """The frame that is shown at a whole second, and those that begin before the next one."""
        until = second + 1
        with self._lock:
            frames = self._open.pop((entry.name, second), None) or _frames_from(entry, second)
            found: list[Frame] = []
            for frame in frames:
                if frame.second >= until:
                    # The next answer begins with what is shown then.
                    again = chain(
                        [frame] if frame.second == until else [found[-1] if found else frame, frame], frames
                    )
                    self._open[entry.name, until] = again
                    if len(self._open) > OPEN:
                        self._open.popitem(last=False)
                    break
                found.append(frame)
            return found


class Teach:
    """What the page asks for, as an ASGI app.

    Args:
        learner: begun
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.player = learner, Player()
        self._maps: Maps | None = None
        # PyTorch keeps threads and memory for each thread that it is used from.
        self._looking = ThreadPoolExecutor(1)
        routes = [
            Route("/", self._page), Route("/changes", self._changes), Route("/video", self._video),
            Route("/second", self._second), Route("/picture", self._picture),
            Route("/ask", self._ask), Route("/similar", self._similar),
            Route("/edit", self._edit, methods=["POST"]), Route("/save", self._save, methods=["POST"]),
            Mount("/", StaticFiles(directory=FILES)),
        ]  # fmt: skip
        self.app = Starlette(
            routes=routes, exception_handlers=dict.fromkeys((UserError, OSError, KeyError), _refused)
        )

    def _page(self, request: Request) -> Response:
        return Response((FILES / "index.html").read_bytes(), media_type="text/html", headers=HEADERS)

    async def _changes(self, request: Request) -> Response:
        """What has changed since a version, as soon as something has."""
        since, learner = int(request.query_params.get("since", 0)), self.learner
        for _ in range(round(WAIT / LOOK)):
            if learner.version != since or await request.is_disconnected():
                break
            await asyncio.sleep(LOOK)
        return JSONResponse(await run_in_threadpool(self._news, since))

    def _news(self, since: int) -> dict[str, Any]:
        learner = self.learner
        version = learner.version
        colors = [EMPTY, *(PALETTE[number % len(PALETTE)] for number in range(len(learner.actions) - 1))]
        changed = [entry for entry in learner.entries.values() if entry.version > since or not since]
        return {
            "version": version, "told": learner.told, "problem": learner.problem or learner.trouble,
            "actions": [
                {"name": name, "color": hex_color(color)}
                for name, color in zip(learner.actions, colors, strict=True)
            ],
            "videos": [self._row(entry) for entry in changed],
        }  # fmt: skip

    def _row(self, entry: Entry) -> dict[str, Any]:
        """A video in the list."""
        spans, end = self.learner.spans.get(entry.name, []), float(entry.edges[-1]) if len(entry.edges) else 0
        strip = [
            [int(entry.labels[first]), round(float(entry.edges[last + 1]) / end, 4)]
            for first, last in (runs(entry.labels) if len(entry.labels) else ())
        ]
        return {
            "name": entry.name, "version": entry.version, "problem": entry.problem, "share": entry.share,
            "ready": entry.ready, "end": end, "strip": strip,
            "labeled": round(sum(span.end - span.start for span in spans), 2),
        }  # fmt: skip

    def _video(self, request: Request) -> Response:
        """A video that is opened, or that has changed."""
        entry = self.learner.open(request.query_params["name"])
        end = float(entry.edges[-1]) if len(entry.edges) else float(entry.video.length())
        embedded = entry.embedded
        fps = embedded.fps if embedded else entry.video.fps()
        spans = [list(span[1:4]) for span in sorted(self.learner.spans.get(entry.name, []))]
        return JSONResponse(self._row(entry) | {
            "end": end, "spans": spans, "fps": float(fps or 25),
            "edges": np.round(entry.edges, 3).tolist(), "labels": entry.labels.tolist(),
            "percents": entry.percents.tolist(),
        })  # fmt: skip

    def _second(self, request: Request) -> Response:
        """The pictures of a second: times and sizes as a line of JSON, and JPEG files."""
        entry, second = self.learner.entry(request.query_params["name"]), int(request.query_params["k"])
        frames = self.player.frames(entry, second)
        files = [_jpeg(frame.image, WIDE) for frame in frames]
        about = {"times": [float(frame.second) for frame in frames], "sizes": [len(file) for file in files]}
        return Response(json.dumps(about).encode() + b"\n" + b"".join(files))

    def _picture(self, request: Request) -> Response:
        """A small picture of a moment, or a large one with the places that speak for an action."""
        query = request.query_params
        entry, second, learner = self.learner.entry(query["name"]), float(query["second"]), self.learner
        embedded = entry.embedded
        if "heat" not in query:
            shown = next(_frames_from(entry, second))
            return Response(_jpeg(shown.image, SMALL), media_type="image/jpeg")
        recognizer = learner.recognizer
        if recognizer is None or embedded is None or query["heat"] not in recognizer.model.classes:
            raise UserError(f"nothing is learned of {query['heat'][:100]} here yet; mark segments of it")
        label = recognizer.model.classes.index(query["heat"])

        def look() -> np.ndarray:
            self._maps = self._maps or Maps(learner.encoder)
            image, heat = heat_at(recognizer, self._maps, Video(entry.video.path), embedded, second, label)
            return draw_heat(image, heat, 0.0, self._maps)

        return Response(_jpeg(self._looking.submit(look).result(), WIDE), media_type="image/jpeg")

    def _ask(self, request: Request) -> Response:
        return JSONResponse(self.learner.ask())

    def _similar(self, request: Request) -> Response:
        query = request.query_params
        return JSONResponse(self.learner.similar(query["name"], float(query["start"]), float(query["end"])))

    async def _edit(self, request: Request) -> Response:
        """Change segments; answers what undoes it."""
        asked = await request.json()
        remove, add = (
            [
                Span(str(video), float(start), float(end), str(action), *map(str, row))
                for video, start, end, action, *row in asked[kind]
            ]
            for kind in ("remove", "add")
        )
        try:
            removed, added = await run_in_threadpool(self.learner.edit, remove, add)
        except (MissingFileError, SpanError):
            raise
        except (UserError, OSError) as error:
            # Another time it may go: the page keeps the change.
            return PlainTextResponse(str(error), 503)
        return JSONResponse({"remove": added, "add": removed})

    def _save(self, request: Request) -> Response:
        return JSONResponse({"path": str(self.learner.save())})
