"""A video with what a model says of it drawn on, and tables beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import MIN_FRAMES, StreamReader, check_length
from labels import (
    Batch,
    Labelled,
    Segment,
    Smoother,
    label_frames,
    read_and_resize,
    segments,
    shown_at,
    write_tables,
)
from onnx_model import FrameModel, OnnxModel
from overlay import OVERLAYS, Overlay
from pipeline import OneAhead, Prefetch
from video import Video, VideoError
from writer import write_video


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model labels frames, and where it runs."""
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    parser.add_argument(
        "--backend",
        choices=("torch", "onnxruntime"),
        default="torch",
        help="onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names, on the CPU; "
        "torch (default) is faster where the hardware has bf16, and 15 %% slower where it has not",
    )
    cli.add_device_flags(parser)


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how frames are labelled, and what is drawn."""
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--img_dim",
        "--image_dim",
        dest="img_dim",
        type=cli.positive_int,
        help="frame size in pixels for the encoder; default (recommended): the checkpoint's",
    )
    group.add_argument(
        "--sequence_length",
        type=cli.positive_int,
        help="frames of the window that decides a frame's label; default (recommended): the checkpoint's",
    )
    group.add_argument(
        "--window_step",
        type=cli.positive_int,
        default=2,
        help="frames from one of the window to the next; 2 is the middle of what training draws on UCF-101",
    )
    group.add_argument(
        "--label_every",
        type=cli.positive_int,
        default=10,
        help="frames that share a label, that of the window around their middle; 10, or 0.4 s at 25 fps, is "
        "as often as one can read; 1 takes up to half as long again",
    )
    group.add_argument(
        "--overlay",
        choices=OVERLAYS,
        default="full",
        help="full (default): the three most probable actions and a timeline below the picture; minimal: the "
        "most probable one",
    )
    group.add_argument(
        "--smooth",
        type=cli.non_negative_float,
        default=0.0,
        help="average probabilities over so many seconds of the past; 0 (default) shows each as it is, 1 "
        "calms labels that flicker",
    )


def open_model(args: argparse.Namespace, threads: int = 0) -> tuple[FrameModel, Checkpoint | OnnxModel]:
    """What the flags of `add_model_flags` name: the model, and what tells how it wants its frames.

    Args:
        threads: to compute with on a CPU; 0 takes all cores

    Raises: ValueError if flags do not go together; else as `choose_device`, `load_checkpoint`, `OnnxModel`.
    """
    device = cli.choose_device(args.device)
    if args.backend == "onnxruntime":
        if args.compile or args.precision == "bf16":
            raise ValueError(
                "--compile and --precision bf16 are for --backend torch; an exported model is fp32"
            )
        exported = OnnxModel(args.checkpoint_model, threads)
        return exported, exported
    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(args.checkpoint_model)
    model = checkpoint.model.to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    return model, checkpoint


@dataclass(frozen=True)
class Annotated:
    """What was found in a video.

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
        args: the flags of `add_model_flags` and `add_label_flags`
        model: what labels frames
        trained: its class names, and how it wants its frames
    """

    def __init__(self, args: argparse.Namespace, model: FrameModel, trained: Checkpoint | OnnxModel) -> None:
        self.args, self.model, self.trained = args, model, trained
        self.img_dim = args.img_dim or trained.img_dim
        self.windows = (args.sequence_length or trained.sequence_length, args.window_step, args.label_every)

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

        Raises: FileNotFoundError or VideoError if it cannot be read or is too long, OSError if the output
            cannot be written.
        """
        args, model = self.args, self.model
        video = Video(path)
        fps, stated = video.fps(), video.stated_count()
        check_length(path, len(list(islice(video.frames(), MIN_FRAMES))))
        cli.make_writable_folder(output.parent)
        seen = StreamReader(model.streams, self.trained.frame_stride)
        frames = read_and_resize(video, self.img_dim, seen)
        reader: OneAhead[Batch] | Prefetch[Batch]
        labels: Generator[Labelled] | Prefetch[Labelled]
        if model.device.type == "cpu":
            # The encoder needs all cores; drawing and writing leave one to read the next frames.
            reader = OneAhead(frames)
            labels = _reading_meanwhile(label_frames(model, reader, *self.windows), reader)
        else:
            reader = Prefetch(frames, 1)
            labels = Prefetch(label_frames(model, reader, *self.windows), 1)
        said: list[np.ndarray] = []
        times = video.times()
        overlay = Overlay(self.trained.classes, stated, args.overlay)

        def drawn() -> Iterator[np.ndarray]:
            done = 0
            for labelled in Smoother(args.smooth).smooth(labels, fps):
                said.append(labelled.probabilities.numpy())
                for frame, probabilities in zip(labelled.frames, said[-1], strict=True):
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
        return self.write_tables(name or str(path), output, np.concatenate(said), overlay, fps, times)

    def write_tables(
        self,
        source: str,
        output: Path,
        probabilities: np.ndarray,
        overlay: Overlay,
        fps: Fraction,
        times: Sequence[Fraction] | None = None,
    ) -> Annotated:
        """Sum up what was said of frames, and write it beside the video.

        Args:
            source: what the video is a copy of
            output: the copy
            probabilities: (frames, C)
            overlay: what drew them
            times: when each frame is shown, in seconds; None at a steady `fps`
        """
        classes = self.trained.classes
        mean = probabilities.mean(axis=0, dtype=np.float64)
        label, found = int(mean.argmax()), segments(probabilities)
        about = {
            "video": source,
            "checkpoint": str(self.args.checkpoint_model),
            "action": classes[label],
            "mean_probability": round(float(mean[label]), 6),
        }
        tables = write_tables(output, probabilities, found, classes, fps, about, times)
        second = partial(shown_at, fps=fps, times=times)
        return Annotated(
            classes, probabilities, fps, found, label, float(mean[label]), tables, overlay.color, second
        )


def _reading_meanwhile(labels: Iterable[Labelled], reader: OneAhead) -> Generator[Labelled]:
    for labelled in labels:
        reader.start()
        yield labelled
