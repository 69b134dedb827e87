"""Encode videos and keep their embeddings as files that any program can read.

    python3 extract_features.py --dataset_path data/UCF-101                     # ahead of training
    python3 extract_features.py --video_path x.mp4 clips/ --output extracted
    torchrun --nproc_per_node=4 extract_features.py --dataset_path data/UCF-101

    <video>.npy     float16 (V, K, D): an embedding for every few frames, in order; V = 2 with --flip
    <video>.json    frames, frame rate, hop, stride; embedding k stands for frames [k, k + 1) x hop x stride
    encoder.json    the encoder, with the SHA-256 of its weights

What is there already is skipped, so an interrupted run goes on. train.py encodes what is missing by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from features.settings import DeviceSettings, EncoderSettings, StoreSettings, open_encoder
from features.store import Store, default_folder
from splits.folder import class_folders, clip_names
from utils.device import choose_device, seed_everything
from utils.files import shortened
from utils.flags import Parser, add_flags, read
from utils.process import MissingFileError, UserError, run, say
from utils.ranks import Ranks
from video.files import find_videos, printable
from video.reader import Video


def get_args_parser() -> Parser:
    """The flags of extract_features.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--video_path", nargs="+", help="videos, folders of videos, or patterns")
    sources.add_argument(
        "--dataset_path", type=Path, help="videos or extracted frames, in a folder for each class"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the files; default: extracted, for a data set the folder that train.py reads",
    )
    add_flags(parser, StoreSettings)
    add_flags(parser, EncoderSettings, encoder="i3d")
    add_flags(parser, DeviceSettings)
    return parser


def find_sources(args: argparse.Namespace) -> dict[str, Video]:
    """Videos by the name of their files in the store.

    Raises: MissingFileError if there are none; UserError for two that would go into one file.
    """
    if args.dataset_path:
        folders = class_folders(args.dataset_path)
        clips = [clip for folder in folders for clip in clip_names(folder)]
        found = [(name.rsplit(".", 1)[0], path) for name, path in clips]
        if not found:
            raise UserError(f"{args.dataset_path}: no clips in its folders; name videos with --video_path")
    else:
        found = [(shortened(path.stem), path) for path in find_videos(args.video_path)]
    videos: dict[str, Video] = {}
    for name, path in found:
        if not path.exists():
            raise MissingFileError(f"{path}: no such video file; check the path")
        if name in videos:
            raise UserError(
                f"{path} and {videos[name].path} would both go into {name}.npy; rename one of the two"
            )
        videos[name] = Video(path)
    return videos


def main(argv: list[str] | None = None) -> int:
    """Encode and write; returns the exit status: 1 if a video could not be read."""
    args = get_args_parser().parse_args(argv)
    videos = find_sources(args)
    seen, computed = read(EncoderSettings, args), read(DeviceSettings, args)
    seed_everything(0)
    with contextlib.closing(Ranks.from_environment(choose_device(computed.device))) as ranks:
        encoder = open_encoder(seen, computed)
        stride = args.frame_stride or encoder.spec.frame_stride
        folder = args.output or Path("extracted")
        if args.dataset_path and not args.output:
            folder = default_folder(args.cache_path, args.dataset_path, encoder, stride)
        # For other programs mirrored frames are rarely wanted; training says what it wants.
        flip = seen.mirrors(encoder.spec) if args.dataset_path else seen.flip
        store = Store(folder, encoder, stride=stride, flip=flip, advice="name another --output")
        store.check_stride(videos)
        before = sum(store.entry(name, video) is not None for name, video in videos.items())
        failures = store.fill(videos, threads=computed.num_workers, ranks=ranks)
        done, span = len(videos) - len(failures), stride * encoder.windows.hop
        each = f"one for every {span} frames" if span > 1 else "one for every frame"
        say(
            f"{done:,} of {len(videos):,} videos in {folder}, {done - before:,} of them now: embeddings of "
            f"{encoder.width} numbers, {each}"
        )
        for name, failure in failures.items() if ranks.rank == 0 else ():
            print(f"not extracted: {name}: {printable(failure)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
