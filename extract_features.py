"""Write what an encoder makes of videos, for other programs: an array of embeddings for each video.

    python3 extract_features.py --video_path x.mp4 clips/ --output extracted
    python3 extract_features.py --dataset_path data/UCF-101 --output extracted --encoder r3d_18

<video>.npy     (K, D) float32: an embedding for every few frames, in order
<video>.json    which frames and seconds each stands for, the frame rate, and the encoder with its SHA-256

What is there already stays, so an interrupted run goes on. Training needs none of this: train.py keeps a
cache of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from annotation.segments import shown_at
from features.cache import file_stamp
from features.encoder import Encoder
from features.execution import prepare_encoders
from features.pipeline import embed_ahead, read_ahead
from features.settings import DeviceSettings, EncoderSettings
from features.streams import Stream, encoder_stream
from splits.folder import class_folders, clip_names
from utils.device import choose_device, seed_everything
from utils.files import json_bytes, make_writable_folder, shortened, write_whole
from utils.flags import COUNT, add_flags, read
from utils.process import MissingFileError, UserError, run, warn
from video.decoder import Frame
from video.files import find_videos, printable
from video.reader import Video

# What must be the same where features are there already.
SETTINGS = ("encoder", "encoder_sha256", "computed_in", "img_dim", "frame_stride")


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of extract_features.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--video_path", nargs="+", help="videos, folders of videos, or patterns")
    sources.add_argument(
        "--dataset_path", type=Path, help="videos or extracted frames, in a folder for each class"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("extracted"),
        help="folder for the files, default extracted; for a data set with a folder for each class in it",
    )
    parser.add_argument(
        "--frame_stride",
        type=COUNT,
        help="use every N-th frame only; default (recommended): what the encoder was trained at, for videos "
        "of 25 frames/s; 2 halves the time",
    )
    add_flags(parser, EncoderSettings, without=("streams", "no_flip", "flip"), encoder="i3d")
    add_flags(parser, DeviceSettings)
    return parser


class CountedVideo(Video):
    """A video that knows how many frames it had and when they are shown, once they have been read.

    Attributes:
        read: frames so far
        times: when each of them is shown, in seconds; of a folder of frames there are none
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read, self.times = 0, list[Fraction]()

    def frames(self, *args: Any, **options: Any) -> Iterator[np.ndarray]:
        """As `Video.frames`."""
        for frame in super().frames(*args, **options):
            self.read += 1
            yield frame

    def timed_frames(self) -> Iterator[Frame]:
        """As `Video.timed_frames`."""
        for frame in super().timed_frames():
            self.times.append(frame.second)
            yield frame


def find_sources(args: argparse.Namespace) -> dict[Path, Path]:
    """Videos, and for each the file without its suffix that it goes into.

    Raises: MissingFileError if there are none; UserError for two that would go into one file.
    """
    if args.dataset_path:
        found = [
            (path, args.output / name)
            for folder in class_folders(args.dataset_path)
            for name, path in clip_names(folder)
        ]
        if not found:
            raise UserError(f"{args.dataset_path}: no clips in its folders; name videos with --video_path")
    else:
        found = [(path, args.output / shortened(path.stem)) for path in find_videos(args.video_path)]
        for path, _ in found:
            if not path.exists():
                raise MissingFileError(f"{path}: no such video file; check the path")
    targets: dict[Path, Path] = {}
    for path, target in found:
        stem = target if args.video_path else target.with_suffix("")
        if stem in targets:
            raise UserError(
                f"{path} and {targets[stem]} would both go into {stem}.npy; rename one of the two"
            )
        targets[stem] = path
    return {path: stem for stem, path in targets.items()}


def is_done(video: Path, target: Path, settings: dict[str, Any]) -> bool:
    """Whether the features of a video are there, with these settings, and it has not changed since.

    Raises: UserError where there are some with other settings, which are not written over.
    """
    about_path = Path(f"{target}.json")
    if not Path(f"{target}.npy").is_file() or not about_path.is_file():
        return False
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        differ = [name for name in SETTINGS if about[name] != settings[name]]
        stamp = about["size"], about["mtime_ns"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{about_path}: not a file of this command; choose another --output") from error
    if differ:
        raise UserError(
            f"{target}.npy is there with {differ[0]} {about[differ[0]]}, not {settings[differ[0]]}; choose "
            "another --output"
        )
    return stamp == file_stamp(Video(video))


def describe(video: CountedVideo, stream: Stream, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """What the JSON file says of a video with `count` embeddings."""
    size, mtime_ns = file_stamp(video)
    span = settings["frame_stride"] * stream.windows.hop
    spans = [[span * row, min(span * (row + 1), video.read)] for row in range(count)]
    about = {
        "video": str(video.path),
        "size": size,
        "mtime_ns": mtime_ns,
        "frames": video.read,
        "lost_frames": video.lost,
        **settings,
    }
    if video.path.is_dir():
        return {**about, "fps": None, "spans": spans, "seconds": None}
    fps, video.times = video.fps(), [*video.times, video.end]
    seconds = [[round(shown_at(frame, fps, video.times), 4) for frame in ends] for ends in spans]
    return {**about, "fps": float(fps), "spans": spans, "seconds": seconds}


def extract(targets: dict[Path, Path], stream: Stream, settings: dict[str, Any], threads: int) -> list[str]:
    """Write the features of videos; returns a line for each that cannot be read.

    Raises: OSError if a file cannot be written.
    """
    videos = [CountedVideo(path) for path in targets]
    failures, rows = [], []
    with (
        tqdm(total=len(videos), desc="encoding", unit="video", dynamic_ncols=True) as bar,
        contextlib.closing(read_ahead(videos, stream, settings["frame_stride"], threads)) as pieces,
    ):
        for number, item in embed_ahead(stream, pieces, flip=False):
            if isinstance(item, np.ndarray):
                rows.append(item[:, 0])
                continue
            video, embeddings, rows = videos[number], rows, []
            bar.update()
            if item is not None:
                failures.append(str(item))
                continue
            target = targets[video.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate(embeddings).astype(np.float32))
            write_whole(Path(f"{target}.npy"), buffer.getbuffer())
            # Last: what it stands beside is whole.
            about = describe(video, stream, settings, sum(map(len, embeddings)))
            write_whole(Path(f"{target}.json"), json_bytes(about))
            for problem in video.problems:
                warn(f"{video.name}: {problem}")
    return failures


def main(argv: list[str] | None = None) -> int:
    """Extract and write; returns the exit status: 1 if a video could not be read."""
    args = get_args_parser().parse_args(argv)
    targets = find_sources(args)
    seen, device_settings = read(EncoderSettings, args), read(DeviceSettings, args)
    device = choose_device(device_settings.device)
    seed_everything(0)
    encoder = Encoder(seen.encoder, state=seen.state()).to(device)
    stream = encoder_stream(encoder, "rgb", seen.img_dim or encoder.spec.input_size)
    prepare_encoders([(encoder, stream)], device_settings)
    make_writable_folder(args.output)
    stride = args.frame_stride or encoder.spec.frame_stride
    settings = {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256(),
        "computed_in": encoder.variant(),
        "img_dim": stream.img_dim,
        "frame_stride": stride,
    }
    todo = {path: target for path, target in targets.items() if not is_done(path, target, settings)}
    failures = extract(todo, stream, settings, max(1, device_settings.num_workers)) if todo else []
    done, span = len(targets) - len(failures), stride * stream.windows.hop
    each = f"one for every {span} frames" if span > 1 else "one for every frame"
    print(
        f"{done:,} of {len(targets):,} videos in {args.output}, {len(todo) - len(failures):,} of them now: "
        f"embeddings of {encoder.width} numbers, {each}"
    )
    for failure in failures:
        print(f"not extracted: {printable(failure)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
