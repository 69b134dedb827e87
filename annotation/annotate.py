"""A video with what a model says of it drawn on, and tables beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from annotation.labels import (
    ClipLayout,
    FrameModel,
    Smoother,
    encode_ahead,
    label_frames,
    read_windows,
    thin_out,
)
from annotation.onnx_model import OnnxModel
from annotation.overlay import Overlay
from annotation.pretrained import choose
from annotation.segments import (
    NONE,
    Segment,
    label_of,
    name_of,
    segments,
    shown_at,
    steady,
    write_tables,
)
from annotation.settings import BackendSettings, LabelSettings
from features.pipeline import Prefetch
from features.settings import DeviceSettings
from features.windows import joint_hop, nearest_stride
from training.checkpoint import Checkpoint
from training.setup import prepare
from utils.device import choose_device
from utils.files import make_writable_folder
from utils.process import UserError
from video.decoder import Frame
from video.files import VideoError
from video.reader import MIN_FRAMES, Video, check_length
from video.writer import write_video


def open_model(
    backend: BackendSettings, device_settings: DeviceSettings, threads: int = 0
) -> tuple[FrameModel, Checkpoint | OnnxModel]:
    """The model that labels frames, and what tells how it wants them.

    Args:
        threads: to compute with on a CPU; 0 takes all cores

    Raises: UserError if flags do not go together; else as `choose_device`, `ModelSettings.load`, `OnnxModel`.
    """
    device = choose_device(device_settings.device)
    if backend.backend == "onnxruntime":
        if backend.checkpoint_model is None:
            raise UserError(
                "--backend onnxruntime runs what export.py wrote; name its folder with --checkpoint_model"
            )
        asked = {
            "--compile": device_settings.compile,
            f"--precision {device_settings.precision}": device_settings.precision in ("bf16", "int8"),
            f"--engine {device_settings.engine}": device_settings.engine != "auto",
        }
        if typed := [flag for flag, is_typed in asked.items() if is_typed]:
            raise UserError(
                f"{typed[0]} is for --backend torch; an exported model is fp32, and onnxruntime computes it"
            )
        exported = OnnxModel(backend.checkpoint_model, threads)
        return exported, exported
    if threads:
        torch.set_num_threads(threads)
    checkpoint = backend.load()
    return prepare(checkpoint.model, device_settings, device), checkpoint


@dataclass(frozen=True)
class Annotated:
    """The labels of a video, and what was written about it.

    Attributes:
        classes: class names, by label
        probabilities: of each frame, (frames, C)
        fps: frames per second
        segments: runs of frames with one action
        mean: probabilities (C,) over the frames that show an action; over all where none does
        label: the most probable action of `mean`; `NONE` where no frame shows one
        tables: the JSON and the CSV file
        color: of an action by its label, as it was drawn, RGB
        second: when a frame is shown, by its number
        problems: with the file, in sentences
    """

    classes: list[str]
    probabilities: np.ndarray
    fps: Fraction
    segments: list[Segment]
    mean: np.ndarray
    label: int
    tables: tuple[Path, Path]
    color: Callable[[int], tuple[int, int, int]]
    second: Callable[[int], float]
    problems: list[str]

    @property
    def probability(self) -> float:
        """Of the most probable action of the whole."""
        return float(self.mean.max())

    def summary(self) -> dict[str, float]:
        """Mean probability of each action over the frames that show one; where none does, of that alone."""
        if self.label == NONE:
            return {name_of(NONE, self.classes): 1 - self.probability}
        return dict(zip(self.classes, self.mean.tolist(), strict=True))


class Annotator:
    """Writes what a model says of videos into copies of them, and into tables beside these.

    Args:
        settings: how to label, and what to draw
        model: what labels frames
        trained: its class names, and how it wants its frames
        name: of the model's file, for the tables
    """

    def __init__(
        self, settings: LabelSettings, model: FrameModel, trained: Checkpoint | OnnxModel, name: str
    ) -> None:
        self.settings, self.model, self.trained, self.name = settings, model, trained, name
        self.chosen = choose(settings.only, trained.classes)
        self.classes = [trained.classes[label] for label in self.chosen]
        self.img_dim = settings.img_dim or trained.img_dim
        self.streams = model.open_streams(self.img_dim)

    def layout(self, fps: Fraction) -> ClipLayout:
        """How clips lie in a video of `fps` frames/s."""
        settings, trained = self.settings, self.trained
        # A network that is used as it was released wants its own rate; a head is used as it was trained.
        stride = nearest_stride(fps, trained.fps) if trained.fps else trained.frame_stride
        unit = stride * joint_hop([stream.windows for stream in self.streams])
        return ClipLayout(
            settings.sequence_length or trained.sequence_length,
            settings.window_step or trained.window_step,
            max(1, round(settings.label_every / unit)),
            stride,
        )

    def annotate(
        self,
        video: Video,
        output: Path,
        *,
        name: str | None = None,
        progress: Callable[[int, int], object] = lambda done, stated: None,
        max_frames: int | None = None,
    ) -> Annotated:
        """Annotate a video.

        Args:
            video: the video, a file
            output: the copy; tables go to <output>.json and <output>.csv
            name: what the tables call the video; its path by default
            progress: told after each frame how many are done, and how many the file states
            max_frames: a longer video is an error, whatever length the file states

        Raises: MissingFileError or VideoError if it cannot be read or is too long, OSError if the output
            cannot be written.
        """
        model = self.model
        # All that can fail, before threads begin.
        fps, stated = video.fps(), video.stated_count()
        check_length(video.path, len(list(islice(video.frames(), MIN_FRAMES))))
        make_writable_folder(output.parent)
        layout = self.layout(fps)
        frames = read_windows(video, self.streams, layout.stride, shots=not self.settings.no_cuts)
        # Frames are read, encoded, labelled, and drawn and written, all at a time.
        reader = Prefetch(frames, 1)
        coming = encode_ahead(thin_out(reader, self.streams, layout), self.streams)
        labels = Prefetch(label_frames(model, self.streams, coming, layout), 1)
        rows: list[np.ndarray] = []
        settled: list[int] = []
        times: list[Fraction] = []
        overlay = Overlay(self.classes, stated, self.settings.overlay)

        def labelled() -> Iterator[tuple[Frame, np.ndarray, bool]]:
            for part in Smoother(self.settings.smooth).smooth(labels):
                begins = part.begins
                chosen = part.probabilities.numpy()[:, self.chosen]
                for frame, row in zip(part.frames, chosen, strict=True):
                    yield frame, row, begins
                    begins = False

        def lasting() -> Iterator[tuple[tuple[Frame, np.ndarray], int, bool, float]]:
            source = labelled()
            coming = next(source, None)
            while coming is not None:
                (frame, row, begins), coming = coming, next(source, None)
                shown = coming[0].second - frame.second if coming else 1 / fps
                yield (frame, row), label_of(row, self.settings.min_probability), begins, float(shown)

        def drawn() -> Iterator[np.ndarray]:
            for (frame, row), label in steady(lasting(), self.settings.min_seconds):
                rows.append(row)
                settled.append(label)
                times.append(frame.second)
                if max_frames is not None and len(settled) > max_frames:
                    raise VideoError(
                        f"{video.path}: more than the {max_frames:,} frames allowed; cut it shorter"
                    )
                progress(len(settled), stated)
                yield overlay.draw(frame.image, row, label)
            # When the last frame ends.
            times.append(video.end)

        try:
            write_video(output, drawn(), fps, times=times, sound=video.path, begin=video.begin)
        finally:
            labels.close()
            reader.close()
        return self.write_tables(name or video.name, output, rows, settled, overlay, fps, times, video)

    def write_tables(
        self,
        source: str,
        output: Path,
        rows: Sequence[np.ndarray],
        settled: Sequence[int],
        overlay: Overlay,
        fps: Fraction,
        times: Sequence[Fraction],
        video: Video | None = None,
    ) -> Annotated:
        """Sum up the labels of a video, and write them beside it.

        Args:
            source: what the video is a copy of
            output: the copy
            rows: probabilities of each frame, (C,)
            settled: label of each frame
            overlay: what drew them
            times: when each frame is shown, in seconds, and when the last one ends, where that is known
            video: that was read, which knows what was wrong with it
        """
        classes, probabilities, labels = self.classes, np.stack(rows), np.array(settled)
        # Of the frames that show an action, where there are any.
        active = labels != NONE
        mean = probabilities[active if active.any() else slice(None)].mean(axis=0, dtype=np.float64)
        label = int(mean.argmax()) if active.any() else NONE
        runs = segments(probabilities, labels)
        about = {
            "video": source,
            "checkpoint": self.name,
            "action": name_of(label, classes),
            "mean_probability": round(float(mean.max()), 6),
            "lost_frames": video.lost if video else 0,
        }
        tables = write_tables(output, probabilities, labels, runs, classes, fps, about, times)
        second = partial(shown_at, fps=fps, times=times)
        return Annotated(
            classes,
            probabilities,
            fps,
            runs,
            mean,
            label,
            tables,
            overlay.color,
            second,
            video.problems if video else [],
        )
