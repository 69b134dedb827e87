"""Write a video with the predicted action and its probability on every frame.

python3 test_on_video.py --video_path x.avi --checkpoint_model model_checkpoints/ConvLSTM_20.pth
python3 test_on_video.py --video_path x.avi --checkpoint_model y.pth --output x.gif
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import cli
from checkpoint import load_checkpoint
from dataset import MIN_FRAMES, StreamReader, check_length, padding_of, resize_frames, window_indices
from onnx_model import FrameModel, OnnxModel
from pipeline import OneAhead, Prefetch
from video import OUTPUT_SUFFIXES, Video, write_video

# Windows classified at once: with fewer the LSTM's weights are read too often, with more nothing is gained.
WINDOW_BATCH = 16
# Frames read, encoded and labelled at once: enough for such a batch, and fewer where they are large.
READ_FRAMES, READ_BYTES = 128, 2**27


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of test_on_video.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--video_path", type=Path, required=True, help="video to annotate; any format FFmpeg reads"
    )
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, .mp4 (H.264, plays in browsers; recommended) or .gif; "
        "default: a new file in the folder annotated",
    )
    parser.add_argument(
        "--img_dim",
        "--image_dim",
        dest="img_dim",
        type=cli.positive_int,
        help="frame size in pixels for the encoder; default (recommended): the checkpoint's",
    )
    parser.add_argument(
        "--sequence_length",
        type=cli.positive_int,
        help="frames of the window that decides a frame's label; default (recommended): the checkpoint's",
    )
    parser.add_argument(
        "--window_step",
        type=cli.positive_int,
        default=2,
        help="frames from one of the window to the next; 2 is the middle of what training draws on UCF-101",
    )
    parser.add_argument(
        "--label_every",
        type=cli.positive_int,
        default=10,
        help="frames that share a label, that of the window around their middle; 10, or 0.4 s at 25 fps, is "
        "as often as one can read; 1 takes up to half as long again",
    )
    parser.add_argument(
        "--backend",
        choices=("torch", "onnxruntime"),
        default="torch",
        help="onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names, on the CPU; "
        "torch (default) is as fast or faster",
    )
    cli.add_device_flags(parser)
    return parser


@dataclass
class Trained:
    """What a video is labelled with: a model, and how it wants its frames, as in `Checkpoint`."""

    model: FrameModel
    classes: list[str]
    img_dim: int
    sequence_length: int
    frame_stride: int


def open_model(args: argparse.Namespace, device: torch.device) -> Trained:
    """What --checkpoint_model and --backend name.

    Raises: as `load_checkpoint` and `OnnxModel`.
    """
    if args.backend == "onnxruntime":
        exported = OnnxModel(args.checkpoint_model)
        return Trained(
            exported,
            exported.classes,
            exported.img_dim,
            exported.sequence_length,
            exported.frame_stride,
        )
    checkpoint = load_checkpoint(args.checkpoint_model)
    model = checkpoint.model.to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    return Trained(
        model, checkpoint.classes, checkpoint.img_dim, checkpoint.sequence_length, checkpoint.frame_stride
    )


def new_path(folder: Path, stem: str) -> Path:
    """A path in `folder` where nothing is: <stem>.mp4, or <stem>-2.mp4, <stem>-3.mp4, ..."""
    path, number = folder / f"{stem}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.mp4"
    return path


# Frames (H, W, 3) uint8 RGB, and the same as uint8 (n, 3 S, img_dim, img_dim).
Batch = tuple[list[np.ndarray], Tensor]


@dataclass
class Labelled:
    """Consecutive frames of a video, (H, W, 3) uint8 RGB each, and their class probabilities (n, C)."""

    frames: list[np.ndarray]
    probabilities: Tensor


def read_and_resize(video: Video, img_dim: int, seen: StreamReader) -> Iterator[Batch]:
    """Frames of a video, some at a time, as they are and as the encoder takes them."""
    source = video.frames()
    first = next(source)
    source = chain([first], source)
    size = max(1, min(READ_FRAMES, READ_BYTES // first.nbytes))
    while frames := list(islice(source, size)):
        yield frames, seen.read(resize_frames(frames, img_dim))


@torch.no_grad()
def label_frames(
    model: FrameModel,
    batches: Iterable[Batch],
    sequence_length: int,
    step: int,
    every: int = 1,
) -> Generator[Labelled]:
    """Label frames by the windows around them, as `dataset.window_indices` lays windows, frames coming in.

    Each frame is encoded once. A frame is given out as soon as its window is complete, so only a window's
    worth of frames is held, however long the video. The numbers are those that the whole video would give.

    Args:
        batches: frames in order, any number at a time
        every: frames that share a label, that of the window around their middle one
    """
    # bf16 is more than twice as fast on a CPU too, and moves a probability by 2e-6.
    half = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)
    held: deque[np.ndarray] = deque()  # frames without a label yet
    embeddings = torch.empty(0, model.width, device=model.device)  # of frames first to read - 1
    first = done = read = 0  # frames, groups of frames, frames

    def labelled(windows: np.ndarray) -> Labelled:
        nonlocal done
        done += len(windows)
        # At both ends, and all through a short video, windows are the same.
        distinct, of_group = np.unique(windows - first, axis=0, return_inverse=True)
        padding = torch.from_numpy(padding_of(distinct)).to(model.device).split(WINDOW_BATCH)
        parts = torch.from_numpy(distinct).to(model.device).split(WINDOW_BATCH)
        with half:
            logits = [model.classify(embeddings[part], pad) for part, pad in zip(parts, padding, strict=True)]
        frames = [held.popleft() for _ in range(min(len(held), every * len(windows)))]
        of_frame = torch.from_numpy(of_group).view(-1).repeat_interleave(every)[: len(frames)]
        return Labelled(frames, torch.cat(logits).float().softmax(dim=-1).cpu()[of_frame])

    span = step * (sequence_length - 1)
    for frames, resized in batches:
        held.extend(frames)
        embeddings = torch.cat([embeddings, model.embed(resized.to(model.device))])
        read = first + len(embeddings)
        # Shorter videos have a smaller step, which is known at their end only.
        complete = read - span + span // 2 if read >= step * sequence_length else 0
        groups = min(read, max(0, complete + every - 1 - every // 2)) // every
        if groups > done:
            starts = np.maximum(every * np.arange(done, groups) + every // 2 - span // 2, 0)
            yield labelled(starts[:, None] + step * np.arange(sequence_length))
            # What comes needs nothing before its own window, or before the video's last one.
            drop = max(0, min(every * groups + every // 2 - span // 2, read - 1 - span) - first)
            embeddings, first = embeddings[drop:], first + drop
    if held:
        start = every * done
        middles = np.minimum(np.arange(start, read, every) + every // 2, read - 1)
        yield labelled(window_indices(read, sequence_length, step=step, start=start)[middles - start])


@lru_cache(maxsize=256)
def label_plate(text: str, height: int, width: int) -> np.ndarray:
    """`text` in white on a dark plate, (h, w, 3) uint8 RGB, for a frame of `height` x `width` pixels."""
    size = max(10, height // 14)
    font = ImageFont.load_default(size)
    while font.getlength(text) > 0.9 * width - 2 * (size // 3) and size > 4:
        size -= 1
        font = ImageFont.load_default(size)
    pad = size // 3
    plate = Image.new(
        "RGB", (round(font.getlength(text)) + 2 * pad, round(1.2 * size) + 2 * pad), (24, 24, 24)
    )
    ImageDraw.Draw(plate).text((pad, pad), text, font=font, fill=(255, 255, 255))
    return np.asarray(plate)


class Annotator:
    """Writes the most probable action of each frame into its corner, and sums the probabilities up.

    Attributes:
        frames: frames seen
        total: sum of their class probabilities (C,)
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes, self.frames, self.total = classes, 0, torch.zeros(len(classes), dtype=torch.float64)

    def draw(self, batches: Iterable[Labelled]) -> Iterator[np.ndarray]:
        """Frames (H, W, 3) uint8 RGB with their label."""
        for batch in batches:
            self.frames += len(batch.frames)
            self.total += batch.probabilities.sum(dim=0)
            best, labels = batch.probabilities.max(dim=1)
            for frame, probability, label in zip(batch.frames, best.tolist(), labels.tolist(), strict=True):
                height, width = frame.shape[:2]
                plate = label_plate(f"{self.classes[label]} {100 * probability:.0f} %", height, width)
                margin = height // 40
                corner = frame[margin : margin + plate.shape[0], margin : margin + plate.shape[1]]
                corner[:] = plate[: corner.shape[0], : corner.shape[1]]
                yield frame


def main(argv: list[str] | None = None) -> int:
    """Annotate and write; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    output = args.output or new_path(Path("annotated"), args.video_path.stem)
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        parser.error(f"--output {output}: cannot write this format; choose {' or '.join(OUTPUT_SUFFIXES)}")
    if output.resolve() in (args.video_path.resolve(), args.checkpoint_model.resolve()):
        parser.error(f"--output {output} is an input; choose another file")
    device = cli.choose_device(args.device)
    if args.backend == "onnxruntime":
        if args.compile or args.precision == "bf16":
            parser.error("--compile and --precision bf16 are for --backend torch; an exported model is fp32")
        device = torch.device("cpu")
    video = Video(args.video_path)
    fps = video.fps()
    trained = open_model(args, device)
    check_length(args.video_path, len(list(islice(video.frames(), MIN_FRAMES))))
    cli.make_writable_folder(output.parent)

    annotator, model = Annotator(trained.classes), trained.model
    windows = (args.sequence_length or trained.sequence_length, args.window_step, args.label_every)
    seen = StreamReader(model.streams, trained.frame_stride)
    frames = read_and_resize(video, args.img_dim or trained.img_dim, seen)
    reader: OneAhead[Batch] | Prefetch[Batch]
    labels: Generator[Labelled] | Prefetch[Labelled]
    if device.type == "cpu":
        # The encoder needs all cores; drawing and writing leave one to read the next frames.
        reader = OneAhead(frames)
        labels = _reading_meanwhile(label_frames(model, reader, *windows), reader)
    else:
        reader = Prefetch(frames, 1)
        labels = Prefetch(label_frames(model, reader, *windows), 1)
    bar = tqdm(desc="annotating", total=video.stated_count() or None, unit="frame", dynamic_ncols=True)
    try:
        write_video(output, _counted(annotator.draw(labels), bar), fps)
    finally:
        labels.close()
        reader.close()
        bar.close()

    best, label = (annotator.total / annotator.frames).max(dim=0)
    print(f"{args.video_path}: {trained.classes[int(label)]}, mean probability {100 * best:.1f} %")
    print(f"wrote {output}: {annotator.frames} frames at {float(fps):.2f} frames/s")
    return 0


def _reading_meanwhile(labels: Iterable[Labelled], reader: OneAhead) -> Generator[Labelled]:
    for labelled in labels:
        reader.start()
        yield labelled


def _counted(frames: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for frame in frames:
        bar.update()
        yield frame


if __name__ == "__main__":
    cli.run(main)
