"""Annotating a video: speed against the raw encoder, a second look with kept embeddings, memory over length.

python3 benchmarks/annotating.py --encoder i3d --frames 1500
python3 benchmarks/annotating.py --encoder efficientnet_lite0 --img_dim 112 --size 1920 1080
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import common
import numpy as np

from training.checkpoint import save_checkpoint
from utils.device import choose_device
from video.opencv import cv2
from video.reader import Video
from video.writer import write_video

CODE = """
import resource, sys, time, test_on_video
from annotation import recognizer
opened = recognizer.Recognizer.embed
def embed(*a, **k): start.append(time.perf_counter()); return opened(*a, **k)
start, recognizer.Recognizer.embed = [], embed
test_on_video.main(sys.argv[1:])
print(time.perf_counter() - start[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def annotate(video: Path, checkpoint: Path, output: Path, *more: object) -> tuple[float, float]:
    """Seconds and peak memory in MB of one run of the command; the seconds without its start-up."""
    words = ["--video_path", video, "--checkpoint_model", checkpoint, "--output", output, *more]
    command = [sys.executable, "-c", CODE, *map(str, words)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
    elapsed, memory = map(float, done.stdout.splitlines()[-1].split())
    return elapsed, memory


def lengthen(source: Path, target: Path, frames: int, size: tuple[int, int]) -> None:
    """A video of `frames` frames, made of `source` over and over."""

    def again() -> Iterator[np.ndarray]:
        written = 0
        while written < frames:
            for frame in Video(source).frames():
                if written < frames:
                    yield np.asarray(cv2.resize(frame, size))
                written += 1

    write_video(target, again(), Fraction(25))


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="i3d")
    flags.add_argument("--img_dim", type=int)
    flags.add_argument("--frames", type=int, default=600, help="of the video whose speed is measured")
    flags.add_argument("--size", type=int, nargs=2, default=(320, 240), help="width and height of its frames")
    flags.add_argument("--minutes", type=float, nargs="*", default=(1, 10), help="lengths for memory")
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, args, device, args.img_dim)
    source = common.clips(args.data)[0].video.path
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        save_checkpoint(here / "model.pth", common.random_checkpoint(encoder))
        lengthen(source, here / "video.mp4", args.frames, tuple(args.size))
        first, second, raw = list[float](), list[float](), list[float]()
        for number in range(args.pairs):
            before = common.raw_rate(encoder, device, batches=8)
            for rates in (first, second):
                elapsed, _ = annotate(
                    here / "video.mp4", here / "model.pth", here / "out.mp4", "--store", here / str(number),
                    "--precision", args.precision, "--device", args.device,
                )  # fmt: skip
                rates.append(args.frames / elapsed)
            raw.append((before + common.raw_rate(encoder, device, batches=8)) / 2)
        print(common.machine(device))
        common.table(
            f"Annotating, {args.encoder} at {encoder.img_dim} px, {args.frames} frames of "
            f"{args.size}, {encoder.precision}",
            [
                ("raw encoder on random frames", common.spread(raw, "frames/s")),
                ("annotating, video to H.264", common.spread(first, "frames/s")),
                ("annotating / raw", common.ratios(first, raw, "%", 100)),
                ("a second look with --store / the first", common.ratios(second, first)),
            ],
        )
        for minutes in args.minutes:
            path = here / f"{minutes}.mp4"
            lengthen(source, path, round(minutes * 60 * 25), (320, 240))
            most = annotate(path, here / "model.pth", here / "out.mp4")[1]
            print(f"{minutes} minutes: {most:,.0f} MB at most")


if __name__ == "__main__":
    main()
