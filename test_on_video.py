"""Write a video with the predicted action and its probability on every frame.

python3 test_on_video.py --video_path x.avi --checkpoint_model model_checkpoints/ConvLSTM_20.pth
python3 test_on_video.py --video_path x.avi --checkpoint_model y.pth --output x.gif
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import cli
from checkpoint import load_checkpoint
from dataset import MIN_FRAMES, resize_frames, window_indices
from models import ENCODER_BATCH, ConvLSTM
from video import OUTPUT_SUFFIXES, Video, VideoError, write_video

# Windows classified at once: the LSTM is as fast with more, and memory stays small.
WINDOW_BATCH = 32


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
    cli.add_device_flags(parser)
    return parser


def new_path(folder: Path, stem: str) -> Path:
    """A path in `folder` where nothing is: <stem>.mp4, or <stem>-2.mp4, <stem>-3.mp4, ..."""
    path, number = folder / f"{stem}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.mp4"
    return path


@torch.no_grad()
def embed_video(model: ConvLSTM, video: Video, img_dim: int, device: torch.device) -> Tensor:
    """Embeddings of all frames of a video, each encoded once: (N, D) float32 on `device`.

    Raises: FileNotFoundError or video.VideoError for a video that cannot be used.
    """
    embeddings = []
    source = video.frames()
    bar = tqdm(desc="encoding", unit="frame", dynamic_ncols=True)
    while frames := list(islice(source, ENCODER_BATCH)):
        embeddings.append(model.encoder.embed(resize_frames(frames, img_dim).to(device)))
        bar.update(len(frames))
    bar.close()
    return torch.cat(embeddings)


@torch.no_grad()
def classify_windows(model: ConvLSTM, embeddings: Tensor, sequence_length: int, step: int) -> Tensor:
    """Class probabilities of each frame from the window around it: (N, D) -> (N, C), on the CPU."""
    windows = window_indices(len(embeddings), sequence_length, step=step)
    # At both ends, and all through a short video, many frames share a window.
    distinct, of_frame = np.unique(windows, axis=0, return_inverse=True)
    batches = torch.from_numpy(distinct).to(embeddings.device).split(WINDOW_BATCH)
    bar = tqdm(batches, desc="classifying", unit="batch", dynamic_ncols=True)
    probabilities = torch.cat([model.classify(embeddings[batch]).softmax(dim=-1).cpu() for batch in bar])
    return probabilities[torch.from_numpy(of_frame).view(-1)]


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


def annotate(frames: Iterator[np.ndarray], probabilities: Tensor, classes: list[str]) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB with the most probable action of each written into the corner."""
    best, labels = probabilities.max(dim=1)
    for frame, probability, label in zip(frames, best.tolist(), labels.tolist(), strict=True):
        height, width = frame.shape[:2]
        plate = label_plate(f"{classes[label]} {100 * probability:.0f} %", height, width)
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
    video = Video(args.video_path)
    fps = video.fps()
    checkpoint = load_checkpoint(args.checkpoint_model)
    model = checkpoint.model.to(device)
    model.encoder.dtype = cli.choose_dtype(args.precision, device)
    cli.make_writable_folder(output.parent)

    embeddings = embed_video(model, video, args.img_dim or checkpoint.img_dim, device)
    if len(embeddings) < MIN_FRAMES:
        raise VideoError(f"{args.video_path}: a single frame shows no action; choose a longer video")
    sequence_length = args.sequence_length or checkpoint.sequence_length
    probabilities = classify_windows(model, embeddings, sequence_length, args.window_step)
    frames = tqdm(video.frames(), total=len(embeddings), desc="writing", unit="frame", dynamic_ncols=True)
    write_video(output, annotate(iter(frames), probabilities, checkpoint.classes), fps)

    best, label = probabilities.mean(dim=0).max(dim=0)
    print(f"{args.video_path}: {checkpoint.classes[int(label)]}, mean probability {100 * best:.1f} %")
    print(f"wrote {output}: {len(embeddings)} frames at {float(fps):.2f} frames/s")
    return 0


if __name__ == "__main__":
    cli.run(main)
