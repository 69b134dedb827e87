"""Latency of a live stream from when a frame is sent to when it has been written with its label.

python3 benchmarks/latency.py --encoder efficientnet_lite0 --img_dim 224
python3 benchmarks/latency.py --encoder i3d --label_every 8

A second process sends clips over the loopback interface, as MPEG-TS with H.264, at a steady rate. A number
drawn into each frame tells when it was sent.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, cycle, islice, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import common
import numpy as np

import test_on_video
from training.checkpoint import save_checkpoint
from utils.device import choose_device
from video.reader import Video

# The number of a frame, one square of this many pixels for each binary digit, from the upper right corner.
SQUARE, DIGITS = 8, 14
PLACES = [slice(-(digit + 1) * SQUARE, -digit * SQUARE or None) for digit in range(DIGITS)]
WHITE, BLACK = 235, 20
# Opening a stream takes a second, whose frames come all at once.
WARM_UP = 2.0


def write_number(frame: np.ndarray, number: int) -> None:
    for digit, place in enumerate(PLACES):
        frame[:SQUARE, place] = WHITE if number >> digit & 1 else BLACK


def read_number(frame: np.ndarray) -> int:
    return sum(1 << digit for digit, place in enumerate(PLACES) if frame[:SQUARE, place].mean() > 128)


def send(address: str, videos: list[Path], frames: int, fps: int, ready: Connection) -> None:
    source = islice(chain.from_iterable(Video(path).frames() for path in cycle(videos)), frames)
    with av.open(f"{address}?listen=1", "w", format="mpegts") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "tune": "zerolatency"}
        )
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 320, 240, "yuv420p", fps
        ready.send(None)
        container.start_encoding()
        begun = time.monotonic()
        ready.send(begun)
        for number, frame in enumerate(source):
            write_number(frame, number)
            time.sleep(max(0.0, begun + number / fps - time.monotonic()))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--img_dim", type=int)
    flags.add_argument("--fps", type=int, default=25)
    flags.add_argument("--seconds", type=int, default=60)
    flags.add_argument("--label_every", type=int, default=10)
    flags.add_argument("--port", type=int, default=9177)
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, args, device, args.img_dim)
    videos = [clip.video.path for clip in common.clips(args.data)][::10]
    address = f"tcp://127.0.0.1:{args.port}"
    frames = args.fps * args.seconds
    shown: list[tuple[int, float]] = []
    write = test_on_video.write_video

    def write_stamped(output: Path, frames: Iterable[np.ndarray], fps: Fraction, **more: Any) -> int:
        def stamped() -> Iterator[np.ndarray]:
            for frame in frames:
                number = read_number(frame)
                yield frame
                shown.append((number, time.monotonic()))

        return write(output, stamped(), fps, **more)

    vars(test_on_video)["write_video"] = write_stamped
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        save_checkpoint(here / "model.pth", common.random_checkpoint(encoder))
        ready, theirs = multiprocessing.Pipe()
        sender = multiprocessing.get_context("spawn").Process(
            target=send, args=(address, videos, frames, args.fps, theirs), daemon=True
        )
        sender.start()
        ready.recv()
        time.sleep(0.5)
        words = ["--video_path", address, "--checkpoint_model", here / "model.pth", "--device", args.device]
        words += ["--output", here / "out.mp4", "--label_every", args.label_every]
        test_on_video.main([str(word) for word in words])
        begun = ready.recv()
        sender.join()
    first = round(WARM_UP * args.fps)
    # The encoder draws over nothing, so a number that cannot be read would show as a frame out of order.
    assert all(one < other for (one, _), (other, _) in pairwise(shown)), "unreadable numbers"
    latencies = sorted(1000 * (at - begun - number / args.fps) for number, at in shown if number >= first)
    sent = frames - first
    print(common.machine(device))
    common.table(
        f"Live, {args.encoder} at {encoder.img_dim} px, {sent} frames at {args.fps} frames/s",
        [
            ("frames shown", f"{len(latencies)} of {sent} ({100 * len(latencies) / sent:.1f} %)"),
            ("latency from sent to written, median", f"{statistics.median(latencies):.0f} ms"),
            ("95 % of the frames within", f"{latencies[int(0.95 * len(latencies))]:.0f} ms"),
            ("the latest", f"{latencies[-1]:.0f} ms"),
        ],
    )


if __name__ == "__main__":
    main()
