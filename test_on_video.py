"""Write a video with the predicted action and its probability on every frame.

python3 test_on_video.py --video_path x.avi --checkpoint_model model_checkpoints/ConvLSTM_20.pth
python3 test_on_video.py --video_path x.avi --checkpoint_model y.pth --output x.gif
python3 test_on_video.py --video_path clips/ "more/*.mp4" --checkpoint_model y.pth --output shown/
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
from checkpoint import Checkpoint, load_checkpoint
from dataset import MIN_FRAMES, StreamReader, check_length
from labels import Batch, Labelled, Smoother, label_frames, read_and_resize, segments, write_tables
from onnx_model import FrameModel, OnnxModel
from overlay import OVERLAYS, Overlay
from pipeline import OneAhead, Prefetch
from video import VIDEO_SUFFIXES, Video, VideoError
from writer import OUTPUT_SUFFIXES, write_video


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of test_on_video.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--video_path",
        nargs="+",
        required=True,
        help="videos to annotate, in any format FFmpeg reads; folders and patterns in quotes stand for all "
        "the videos in them",
    )
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, .mp4 (H.264, plays in browsers; recommended) or .gif, or a folder for new "
        "files; default: the folder annotated; <output>.json has the segments, <output>.csv each frame",
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
        "--overlay",
        choices=OVERLAYS,
        default="full",
        help="full (default): the three most probable actions and a timeline below the picture; minimal: the "
        "most probable one",
    )
    parser.add_argument(
        "--smooth",
        type=cli.non_negative_float,
        default=0.0,
        help="average probabilities over so many seconds of the past; 0 (default) shows each as it is, 1 "
        "calms labels that flicker",
    )
    parser.add_argument(
        "--backend",
        choices=("torch", "onnxruntime"),
        default="torch",
        help="onnxruntime runs what export.py wrote, whose folder --checkpoint_model then names, on the CPU; "
        "torch (default) is faster where the hardware has bf16, and 15 %% slower where it has not",
    )
    cli.add_device_flags(parser)
    return parser


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[FrameModel, Checkpoint | OnnxModel]:
    """What --checkpoint_model and --backend name: the model, and what tells how it wants its frames.

    Raises: as `load_checkpoint` and `OnnxModel`.
    """
    if args.backend == "onnxruntime":
        exported = OnnxModel(args.checkpoint_model)
        return exported, exported
    checkpoint = load_checkpoint(args.checkpoint_model)
    model = checkpoint.model.to(device)
    model.encoder.prepare(cli.choose_dtype(args.precision, device), compile=args.compile)
    return model, checkpoint


def new_path(folder: Path, stem: str) -> Path:
    """A path in `folder` where nothing is: <stem>.mp4, or <stem>-2.mp4, <stem>-3.mp4, ..."""
    path, number = folder / f"{stem}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.mp4"
    return path


def find_videos(names: Sequence[str]) -> list[Path]:
    """The videos that --video_path names: files, and those in folders and in patterns, each once.

    A file that is named is not looked at. Raises: FileNotFoundError if a folder or a pattern has none.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        some = [path]
        if path.is_dir():
            some = sorted(one for one in path.rglob("*") if one.suffix.lower() in VIDEO_SUFFIXES)
        elif not path.exists() and glob.has_magic(name):
            # Path.glob takes no pattern that begins at the root.
            some = sorted(map(Path, glob.glob(name, recursive=True)))  # noqa: PTH207
        if not some:
            raise FileNotFoundError(f"{name}: no videos there, which end in {', '.join(VIDEO_SUFFIXES)}")
        found += [one for one in some if one not in found]
    return found


class Annotator:
    """Writes what a model says of videos into copies of them, and into tables beside these.

    Args:
        args: the flags
        model: what labels frames
        trained: its class names, and how it wants its frames
    """

    def __init__(self, args: argparse.Namespace, model: FrameModel, trained: Checkpoint | OnnxModel) -> None:
        self.args, self.model, self.trained = args, model, trained
        self.windows = (args.sequence_length or trained.sequence_length, args.window_step, args.label_every)

    def annotate(self, path: Path, output: Path) -> None:
        """Annotate a video, and say what it shows.

        Raises: FileNotFoundError or VideoError if it cannot be read, OSError if the output cannot be written.
        """
        args, model = self.args, self.model
        video = Video(path)
        fps, stated = video.fps(), video.stated_count()
        check_length(path, len(list(islice(video.frames(), MIN_FRAMES))))
        cli.make_writable_folder(output.parent)
        seen = StreamReader(model.streams, self.trained.frame_stride)
        frames = read_and_resize(video, args.img_dim or self.trained.img_dim, seen)
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
        overlay = Overlay(self.trained.classes, stated, args.overlay)
        bar = tqdm(desc=path.name, total=stated or None, unit="frame", dynamic_ncols=True)

        def drawn() -> Iterator[np.ndarray]:
            for labelled in Smoother(args.smooth, fps).smooth(labels):
                said.append(labelled.probabilities.numpy())
                for frame, probabilities in zip(labelled.frames, said[-1], strict=True):
                    bar.update()
                    yield overlay.draw(frame, probabilities)

        try:
            write_video(output, drawn(), fps, times=video.times(), sound=path)
        finally:
            labels.close()
            reader.close()
            bar.close()
        self._tell(path, output, np.concatenate(said), fps)

    def _tell(self, path: Path, output: Path, probabilities: np.ndarray, fps: Fraction) -> None:
        classes = self.trained.classes
        mean = probabilities.mean(axis=0, dtype=np.float64)
        label = int(mean.argmax())
        found = segments(probabilities)
        about = {
            "video": str(path),
            "checkpoint": str(self.args.checkpoint_model),
            "action": classes[label],
            "mean_probability": round(float(mean[label]), 6),
        }
        tables = write_tables(output, probabilities, found, classes, fps, about)
        print(f"{path}: {classes[label]}, mean probability {100 * mean[label]:.1f} %")
        print(
            f"wrote {output}: {len(probabilities)} frames at {float(fps):.2f} frames/s, "
            f"{len(found)} segment{'s'[: len(found) != 1]} in {tables[0].name}, frames in {tables[1].name}"
        )


def main(argv: list[str] | None = None) -> int:
    """Annotate and write; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    videos = find_videos(args.video_path)
    folder = args.output or Path("annotated")
    to_file = folder.suffix and not folder.is_dir()
    if to_file and folder.suffix.lower() not in OUTPUT_SUFFIXES:
        parser.error(f"--output {folder}: cannot write this format; choose {' or '.join(OUTPUT_SUFFIXES)}")
    if to_file and len(videos) > 1:
        parser.error(f"--output {folder}: {len(videos)} videos do not go into one file; name a folder")
    if to_file and folder.resolve() in (videos[0].resolve(), args.checkpoint_model.resolve()):
        parser.error(f"--output {folder} is an input; choose another file")
    device = cli.choose_device(args.device)
    if args.backend == "onnxruntime":
        if args.compile or args.precision == "bf16":
            parser.error("--compile and --precision bf16 are for --backend torch; an exported model is fp32")
        device = torch.device("cpu")
    # What is wrong with a single video is told before a model is loaded.
    if len(videos) == 1:
        Video(videos[0]).fps()
    annotator = Annotator(args, *open_model(args, device))
    failed = 0
    for path in videos:
        try:
            annotator.annotate(path, folder if to_file else new_path(folder, path.stem))
        except (VideoError, FileNotFoundError) as error:
            if len(videos) == 1:
                raise
            failed += 1
            print(f"not annotated: {error}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(videos)} videos could not be annotated", file=sys.stderr)
    return 1 if failed else 0


def _reading_meanwhile(labels: Iterable[Labelled], reader: OneAhead) -> Generator[Labelled]:
    for labelled in labels:
        reader.start()
        yield labelled


if __name__ == "__main__":
    cli.run(main)
