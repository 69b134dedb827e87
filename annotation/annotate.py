"""A video with what a model says of it drawn on, and tables beside it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from annotation.labels import (
    Batch,
    ClipLayout,
    FrameModel,
    Labelled,
    Segment,
    Smoother,
    label_frames,
    read_windows,
    segments,
    shown_at,
    write_tables,
)
from annotation.onnx_model import OnnxModel
from annotation.overlay import OVERLAYS, Overlay
from features.pipeline import OneAhead, Prefetch
from features.windows import joint_hop
from training.checkpoint import Checkpoint, load_checkpoint
from training.setup import prepare
from utils.device import DeviceSettings, choose_device
from utils.files import make_writable_folder
from utils.flags import COUNT, NON_NEGATIVE, setting
from utils.process import UserError
from video.files import VideoError
from video.reader import MIN_FRAMES, Video, check_length
from video.writer import write_video


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """Which model labels frames."""

    checkpoint_model: Path = setting(MISSING, "of this project or of the original", Path)
    backend: str = setting(
        "torch",
        "onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names, on the CPU; "
        "torch (default) is faster where the hardware has bf16, and 15 %% slower where it has not",
        choices=("torch", "onnxruntime"),
    )


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How frames are labelled, and what is drawn."""

    img_dim: int | None = setting(
        None,
        "frame size in pixels for the encoder; default (recommended): the checkpoint's",
        COUNT,
        flags=("--img_dim", "--image_dim"),
    )
    sequence_length: int | None = setting(
        None,
        "embeddings of the clip that decides a frame's label; default (recommended): the checkpoint's",
        COUNT,
    )
    window_step: int | None = setting(
        None,
        "embeddings from one of the clip to the next, of those that the checkpoint was trained on: with its "
        "--frame_stride 4 and an encoder of photographs, 2 is every 8th frame; default (recommended): 2 for "
        "those, the middle of what training draws on UCF-101, and 1 for encoders of videos",
        COUNT,
    )
    label_every: int = setting(
        10,
        "frames that share a label, that of the clip around their middle, as nearly as embeddings that stand "
        "for several frames allow; 10, or 0.4 s at 25 fps, is as often as one can read; 1 takes up to half "
        "as long again",
        COUNT,
    )
    overlay: str = setting(
        "full",
        "full (default): the three most probable actions and a timeline below the picture; minimal: the most "
        "probable one",
        choices=OVERLAYS,
    )
    smooth: float = setting(
        0.0,
        "average probabilities over so many seconds of the past; 0 (default) shows each as it is, 1 calms "
        "labels that flicker",
        NON_NEGATIVE,
    )


def open_model(
    backend: BackendSettings, device_settings: DeviceSettings, threads: int = 0
) -> tuple[FrameModel, Checkpoint | OnnxModel]:
    """The model that labels frames, and what tells how it wants them.

    Args:
        threads: to compute with on a CPU; 0 takes all cores

    Raises: UserError if flags do not go together; else as `choose_device`, `load_checkpoint`, `OnnxModel`.
    """
    device = choose_device(device_settings.device)
    if backend.backend == "onnxruntime":
        if device_settings.compile or device_settings.precision == "bf16":
            raise UserError(
                "--compile and --precision bf16 are for --backend torch; an exported model is fp32"
            )
        exported = OnnxModel(backend.checkpoint_model, threads)
        return exported, exported
    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(backend.checkpoint_model)
    return prepare(checkpoint.model, device_settings, device), checkpoint


@dataclass(frozen=True)
class Annotated:
    """The labels of a video, and what was written about it.

    Attributes:
        classes: class names, by label
        probabilities: of each frame, (frames, C)
        fps: frames per second
        segments: runs of frames with one action
        label, probability: the action of the whole, by the mean over its frames, and that mean
        tables: the JSON and the CSV file
        color: of an action by its label, as it was drawn, RGB
        second: when a frame is shown, by its number
    """

    classes: list[str]
    probabilities: np.ndarray
    fps: Fraction
    segments: list[Segment]
    label: int
    probability: float
    tables: tuple[Path, Path]
    color: Callable[[int], tuple[int, int, int]]
    second: Callable[[int], float]


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
        self.img_dim = settings.img_dim or trained.img_dim
        self.streams = model.open_streams(self.img_dim)
        unit = trained.frame_stride * joint_hop([stream.windows for stream in self.streams])
        self.layout = ClipLayout(
            settings.sequence_length or trained.sequence_length,
            settings.window_step or trained.window_step,
            max(1, round(settings.label_every / unit)),
            trained.frame_stride,
        )

    def annotate(
        self,
        path: Path,
        output: Path,
        *,
        name: str | None = None,
        progress: Callable[[int, int], object] = lambda done, stated: None,
        max_frames: int | None = None,
    ) -> Annotated:
        """Annotate a video.

        Args:
            path: the video
            output: the copy; tables go to <output>.json and <output>.csv
            name: what the tables call the video; its path by default
            progress: told after each frame how many are done, and how many the file states
            max_frames: a longer video is an error, whatever length the file states

        Raises: MissingFileError or VideoError if it cannot be read or is too long, OSError if the output
            cannot be written.
        """
        model = self.model
        video = Video(path)
        fps, stated = video.fps(), video.stated_count()
        check_length(path, len(list(islice(video.frames(), MIN_FRAMES))))
        make_writable_folder(output.parent)
        frames = read_windows(video, self.streams, self.layout.stride)
        reader: OneAhead[Batch] | Prefetch[Batch]
        labels: Generator[Labelled] | Prefetch[Labelled]
        if model.device.type == "cpu":
            # The encoder needs all cores; drawing and writing leave one to read the next frames.
            reader = OneAhead(frames)
            labels = _reading_meanwhile(label_frames(model, self.streams, reader, self.layout), reader)
        else:
            reader = Prefetch(frames, 1)
            labels = Prefetch(label_frames(model, self.streams, reader, self.layout), 1)
        rows: list[np.ndarray] = []
        times = video.times()
        overlay = Overlay(self.trained.classes, stated, self.settings.overlay)

        def drawn() -> Iterator[np.ndarray]:
            done = 0
            for labelled in Smoother(self.settings.smooth).smooth(labels, fps):
                rows.append(labelled.probabilities.numpy())
                for frame, probabilities in zip(labelled.frames, rows[-1], strict=True):
                    done += 1
                    if max_frames is not None and done > max_frames:
                        raise VideoError(
                            f"{path}: more than the {max_frames:,} frames allowed; cut it shorter"
                        )
                    progress(done, stated)
                    yield overlay.draw(frame, probabilities)

        try:
            write_video(output, drawn(), fps, times=times, sound=path)
        finally:
            labels.close()
            reader.close()
        return self.write_tables(name or str(path), output, np.concatenate(rows), overlay, fps, times)

    def write_tables(
        self,
        source: str,
        output: Path,
        probabilities: np.ndarray,
        overlay: Overlay,
        fps: Fraction,
        times: Sequence[Fraction] | None = None,
    ) -> Annotated:
        """Sum up the labels of a video, and write them beside it.

        Args:
            source: what the video is a copy of
            output: the copy
            probabilities: (frames, C)
            overlay: what drew them
            times: when each frame is shown, in seconds; None at a steady `fps`
        """
        classes = self.trained.classes
        mean = probabilities.mean(axis=0, dtype=np.float64)
        label, runs = int(mean.argmax()), segments(probabilities)
        about = {
            "video": source,
            "checkpoint": self.name,
            "action": classes[label],
            "mean_probability": round(float(mean[label]), 6),
        }
        tables = write_tables(output, probabilities, runs, classes, fps, about, times)
        second = partial(shown_at, fps=fps, times=times)
        return Annotated(
            classes, probabilities, fps, runs, label, float(mean[label]), tables, overlay.color, second
        )


def _reading_meanwhile(labels: Iterable[Labelled], reader: OneAhead) -> Generator[Labelled]:
    for labelled in labels:
        reader.start()
        yield labelled
