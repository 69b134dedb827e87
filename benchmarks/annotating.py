"""Annotating a video against the raw encoder, and its memory on a long video against a short one.

python3 benchmarks/annotating.py --encoder resnet152 --img_dim 112
python3 benchmarks/annotating.py --encoder i3d --img_dim 224
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import common
import numpy as np

from training.checkpoint import Checkpoint, save_checkpoint
from training.classifier import Classifier
from utils.device import choose_device
from video.reader import Video
from video.writer import write_video

# What the original's test_on_video.py reached on 2 cores of this kind, in frames/s.
ORIGINAL_RATE = 7.7


def annotate(video: Path, checkpoint: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak memory in MB of one run of the command; the seconds without its start-up."""
    code = (
        "import resource, sys, time, test_on_video\nfrom annotation import annotate\n"
        "start, read = [0.0], annotate.read_windows\n"
        "def reading(*a, **k): start[0] = time.perf_counter(); return read(*a, **k)\n"
        "annotate.read_windows = reading; test_on_video.main(sys.argv[1:])\n"
        "print(time.perf_counter() - start[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    command = [sys.executable, "-c", code, "--video_path", video, "--checkpoint_model", checkpoint]
    done = subprocess.run(
        [*map(str, command), "--output", str(output)],
        cwd=common.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    elapsed, memory = map(float, done.stdout.splitlines()[-1].split())
    return elapsed, memory


def lengthen(source: Path, target: Path, frames: int) -> None:
    """A video of `frames` frames, made of `source` over and over."""

    def again() -> Iterator[np.ndarray]:
        given = 0
        while True:
            for frame in Video(source).frames():
                if given == frames:
                    return
                given += 1
                yield frame

    write_video(target, again(), Fraction(25))


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="resnet152")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--frames", type=int, default=600, help="length of the video whose speed is measured")
    flags.add_argument(
        "--minutes", type=float, nargs=2, default=(1, 10), help="lengths for memory, at 25 fps"
    )
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, device, random_weights=args.random_weights)
    model = Classifier("ConvLSTM", 101, encoder=args.encoder, pretrained=not args.random_weights)
    source, length = common.clips(args.data)[0].video.path, encoder.spec.sequence_length
    names = [f"class {number}" for number in range(101)]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        save_checkpoint(here / "model.pth", Checkpoint(model, names, args.img_dim, length, None, 0))
        lengthen(source, here / "video.mp4", args.frames)
        rates, raw = [], []
        for _ in range(args.pairs):
            before = common.raw_rate(encoder, args.img_dim, device, batches=8)
            elapsed, _ = annotate(here / "video.mp4", here / "model.pth", here / "out.mp4")
            rates.append(args.frames / elapsed)
            raw.append((before + common.raw_rate(encoder, args.img_dim, device, batches=8)) / 2)
        shares = [100 * rate / limit for rate, limit in zip(rates, raw, strict=True)]
        print(common.machine(device))
        common.table(
            f"Annotating, {args.encoder} at {args.img_dim} px, a video of {args.frames} frames of 320 x 240",
            [
                ("raw encoder on random data", common.spread(raw, "frames/s")),
                ("annotating, video to H.264", common.spread(rates, "frames/s")),
                ("annotating / raw", common.spread(shares, "%")),
                (f"annotating / the original's {ORIGINAL_RATE} frames/s",
                 common.spread([rate / ORIGINAL_RATE for rate in rates], "x")),
            ],
        )  # fmt: skip
        memory = []
        for minutes in args.minutes:
            path = here / f"{minutes}.mp4"
            lengthen(source, path, round(minutes * 60 * 25))
            start = time.perf_counter()
            memory.append(annotate(path, here / "model.pth", here / "out.mp4")[1])
            print(f"{minutes} minutes: {memory[-1]:,.0f} MB at most, {time.perf_counter() - start:.0f} s")
        print(f"memory, long / short: {memory[1] / memory[0]:.3f}")


if __name__ == "__main__":
    main()
