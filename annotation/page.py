"""The web page: what it shows of a video, and how it is laid out. Gradio makes it."""

from __future__ import annotations

import contextvars
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gradio
import numpy as np
import pandas

from annotation.allowed import EXAMPLES, MAX_COST, PageSettings, WatchedVideo, check_inputs
from annotation.annotate import write_annotated
from annotation.folder import no_room
from annotation.overlay import OVERLAYS, Overlay, hex_color
from annotation.recognizer import Recognition, Recognizer
from splits.split import NO_ACTION
from utils.files import shortened
from utils.process import UserError
from video.files import VIDEO_SUFFIXES, VideoError, video_files
from video.opencv import av
from video.reader import Video

T = TypeVar("T")
TITLE = "Action-Recognition"
# Actions with a curve, and points of each.
CURVES, POINTS = 5, 300


def find_examples(folder: Path) -> list[Path]:
    """The first video of a folder and of each folder in it."""
    first: dict[Path, Path] = {}
    for path in video_files(folder):
        first.setdefault(path.parent, path)
    return list(first.values())[:EXAMPLES]


def curves(recognition: Recognition) -> tuple[pandas.DataFrame, dict[str, str]]:
    """Second, action and probability of the most probable actions along a video, and the color of each."""
    classes, probabilities = recognition.classes, recognition.probabilities
    shown = np.argsort(-probabilities.mean(axis=0), kind="stable")[:CURVES].tolist()
    frames = np.unique(np.linspace(0, len(probabilities) - 1, POINTS).round().astype(int))
    table = pandas.DataFrame(
        {
            "second": np.tile(recognition.times[frames].round(3), len(shown)),
            "action": np.repeat([classes[label] for label in shown], len(frames)),
            "probability": probabilities[np.ix_(frames, shown)].T.ravel().astype(float).round(4),
        }
    )
    # In the order in which they come up, as they are drawn.
    colors = Overlay(classes, 0)
    for label in [*(segment.label for segment in recognition.segments), *shown]:
        colors.color(label)
    return table, {classes[label]: hex_color(colors.color(label)) for label in shown}


class Page:
    """The page, and what it does with a video.

    Args:
        settings: what it takes
        recognizer: what labels videos
        folder: where uploads lie, and annotated videos and tables
    """

    def __init__(self, settings: PageSettings, recognizer: Recognizer, folder: Path) -> None:
        self.settings, self.recognizer, self.folder = settings, recognizer, folder
        self.examples = find_examples(settings.examples)
        # PyTorch keeps threads and memory for each thread that it is used from, and Gradio has 40.
        self._worker, self._closed = ThreadPoolExecutor(1), False
        # Whether there is a page beside it that learns.
        self.teach = False

    def label(
        self,
        chosen: str | int,
        overlay: str,
        change_cost: float,
        only: str,
        # Gradio finds it by its being a default.
        progress: Any = gradio.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, ...]]:
        """What the page shows of a video, once those before it are done: first without the annotated video.

        Args:
            chosen: path of an upload, or the number of an example
            overlay, change_cost, only: as in `LabelSettings`

        Raises: gradio.Error with what is wrong, in one sentence.
        """
        path = self.examples[chosen] if isinstance(chosen, int) else Path(chosen)
        output = self.folder / "results" / secrets.token_hex(8) / f"{shortened(path.stem)}.mp4"

        def watch(done: int, total: int) -> None:
            if self._closed:
                raise VideoError(f"{path}: the page was closed down")
            if done % 10 == 0:
                progress((done, total), unit="frames")

        def recognize() -> tuple[Recognition, Video]:
            settings = replace(
                self.recognizer.settings, overlay=overlay, change_cost=change_cost, only=only.strip() or None
            )
            video = WatchedVideo(path, self.settings, watch)
            return Recognizer(self.recognizer.model, settings)(video), video

        def write() -> tuple[Path, ...]:
            write_annotated(recognition, video, output, overlay=overlay)
            # Nobody needs to know where things are on this machine.
            return recognition.write_tables(output, path.name, Path(self.recognizer.name).name)

        try:
            if problem := no_room(self.folder, self.settings.keep_megabytes):
                raise UserError(problem)
            recognition, video = self._in_worker(recognize)
            action, *rest = _shown(recognition)
            yield (action, gradio.skip(), *rest, gradio.skip())
            tables = self._in_worker(write)
        except (UserError, OSError, av.FFmpegError) as error:
            shutil.rmtree(output.parent, ignore_errors=True)
            message = str(error).replace(str(path), path.name).replace("--only", "only")
            if not isinstance(error, UserError):
                message = f"{path.name}: {getattr(error, 'strerror', None) or error}; convert it to mp4 first"
            raise _error(message.replace(f"{self.folder}/", "")) from error
        for problem in recognition.problems:
            gradio.Warning(f"{path.name}: {problem}")
        yield (action, str(output), *rest, [str(table) for table in tables])

    def _in_worker(self, function: Callable[[], T]) -> T:
        # Progress finds its way to the browser by the variables of the context.
        return self._worker.submit(contextvars.copy_context().run, function).result()

    def close(self) -> None:
        """Give up the video under way, and those that wait."""
        self._closed = True
        self._worker.shutdown(cancel_futures=True)

    def build(self) -> Any:
        """The page as a gradio.Blocks."""
        settings, folder, count = self.settings, self.folder, len(self.examples)
        classes = [name for name in self.recognizer.model.classes if name != NO_ACTION]

        class CheckedBlocks(gradio.Blocks):
            async def preprocess_data(
                self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any
            ) -> Any:
                try:
                    check_inputs(inputs, folder, count)
                except UserError as error:
                    raise _error(str(error)) from error
                return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

        with CheckedBlocks(title=TITLE, analytics_enabled=False) as page:
            if self.teach:
                gradio.HTML('<nav><b>Watch</b> &nbsp; <a href="/teach/">Teach</a></nav>')
            gradio.Markdown(
                f"# {TITLE}\nDrop a video of up to {settings.max_seconds} seconds and "
                f"{settings.max_megabytes} MB. The model knows {len(classes)} actions: "
                + ", ".join(classes[:12])
                + (", ..." if len(classes) > 12 else ".")
            )
            with gradio.Row():
                with gradio.Column(scale=1):
                    file, examples, *flags = self._inputs()
                with gradio.Column(scale=2):
                    outputs = _outputs()
            shown: dict[str, Any] = {"show_progress_on": [outputs[0]], "concurrency_id": "model"}
            read = file.upload(self.label, [file, *flags], outputs, api_name="annotate", **shown)
            # Whatever became of it, the next one can be dropped.
            for then in (read.success, read.failure):
                then(None, None, file, js="() => null", api_visibility="private")
            examples.click(self.label, [examples, *flags], outputs, api_name="example", **shown)
        # One at a time: the model takes the whole machine.
        page.queue(max_size=settings.max_waiting, default_concurrency_limit=1)
        return page

    def _inputs(self) -> list[Any]:
        """File, examples, overlay, smoothing and actions."""
        settings = self.recognizer.settings
        file = gradio.File(label="Video", file_types=list(VIDEO_SUFFIXES), elem_id="upload")
        overlay = gradio.Radio(list(OVERLAYS), value=settings.overlay, label="Overlay")
        change_cost = gradio.Slider(
            0,
            MAX_COST,
            min(MAX_COST, self.recognizer.change_cost),
            step=0.1,
            label="Cost of a change, against flicker",
        )
        examples = gradio.Dataset(
            components=[gradio.Textbox(visible=False)], type="index", visible=bool(self.examples),
            samples=[[path.parent.name] for path in self.examples], label="Or pick an example",
            elem_id="examples",
        )  # fmt: skip
        only = gradio.Textbox(
            settings.only or "", label="Only these actions, between commas", elem_id="only",
            placeholder=", ".join(self.recognizer.model.classes[:3]),
        )  # fmt: skip
        return [file, examples, overlay, change_cost, only]


def _error(message: str) -> Exception:
    return gradio.Error(message, duration=None, print_exception=False)


def _shown(recognition: Recognition) -> tuple[Any, ...]:
    """Actions, curves and segments."""
    table, colors = curves(recognition)
    segments = [
        [each.action, round(each.start, 2), round(each.end, 2), round(100 * each.probability, 1)]
        for each in recognition.segments
    ]
    return recognition.summary(), gradio.LinePlot(table, color_map=colors), segments


def _outputs() -> list[Any]:
    """Action, video, curves, segments and tables."""
    return [
        gradio.Label(label="Action", num_top_classes=3, elem_id="action"),
        gradio.Video(
            label="Annotated", autoplay=True, interactive=False, buttons=["download"], elem_id="video"
        ),
        gradio.LinePlot(
            x="second", y="probability", color="action", y_lim=[0, 1], height=320, show_label=False,
            title="Probabilities over time", label="Probabilities over time", elem_id="curves",
        ),
        gradio.Dataframe(
            headers=["action", "from, s", "to, s", "mean probability, %"], label="Segments",
            interactive=False, elem_id="segments",
        ),
        gradio.File(label="Segments and frames", file_count="multiple", interactive=False),
    ]  # fmt: skip
