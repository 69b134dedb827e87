"""Filling the cache, against the raw encoder on random data and against the original's way of encoding.

An encoder of videos is compared with the raw ResNet-152 at 112 px instead of the original's way.

python3 benchmarks/filling.py --encoder resnet152 --img_dim 112
python3 benchmarks/filling.py --encoder efficientnet_lite0 --frames 12000
python3 benchmarks/filling.py --encoder i3d --img_dim 224 --frames 3000
python3 benchmarks/filling.py --encoder i3d --img_dim 224 --frames 6000 --engine openvino-int8
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import torch
from original_way import OriginalProcess

from features.encoder import ENGINES, TORCH, Encoder
from features.fill import open_cache
from splits.split import Clip
from utils.device import choose_device
from utils.process import available_cores


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="resnet152")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--frames", type=int, default=1000, help="about how many frames are encoded each time")
    flags.add_argument("--no_flip", action="store_true", help="one view of each frame, not two")
    flags.add_argument("--engine", default=TORCH, choices=ENGINES, help="what computes the encoder")
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(
        args.encoder, device, random_weights=args.random_weights, img_dim=args.img_dim, engine=args.engine,
        calibration=common.never_tested(args.data),
    )  # fmt: skip
    views = 2 if encoder.spec.flip and not args.no_flip else 1
    every = common.clips(args.data)
    # Clips from all over the data set, as many as hold the frames asked for.
    chosen, held = [], 0
    for clip in every[:: max(1, len(every) // 100)]:
        if held < args.frames:
            chosen.append(clip)
            held += clip.video.count()

    def fill() -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_cache(
                Path(folder), chosen, encoder, args.img_dim, flip=views == 2, threads=available_cores()
            )

    other_name, other = other_rate(args, encoder, chosen, device)
    fill()
    filled, raw, old = [], [], []
    aside: list[float] = []
    batches = 2 * max(2, args.frames // encoder.batch_size // encoder.spec.windows.frames // 8)
    for _ in range(args.pairs):
        before = common.raw_rate(encoder, args.img_dim, device, batches=batches)
        filled.append(views * held / common.seconds(fill, device))
        after = common.raw_rate(encoder, args.img_dim, device, batches=batches)
        # The machine's speed drifts: the limit is what it was around the measurement.
        raw.append((before + after) / 2)
        if device.type == "cpu":
            aside.append(common.raw_rate(encoder, args.img_dim, device, batches=batches, side_by_side=True))
        old.append(other())
    # An accelerator computes one batch at a time.
    by_core = (
        []
        if not aside
        else [
            ("raw, each core a batch of its own", common.spread(aside, "frames/s")),
            (
                "filling / raw, each core a batch",
                common.spread([100 * a / b for a, b in zip(filled, aside, strict=True)], "%"),
            ),
        ]
    )
    print(common.machine(device))
    common.table(
        f"Filling the cache, {args.encoder} at {args.img_dim} px, {held:,} frames of {len(chosen)} clips, "
        f"{views} view{'s' * (views - 1)} of each, "
        f"batches of {encoder.batch_size}, {encoder.variant()}",
        [
            (other_name, common.spread(old, "frames/s")),
            ("raw encoder on random data", common.spread(raw, "frames/s")),
            ("filling, videos to embeddings on disk, each view counted", common.spread(filled, "frames/s")),
            ("filling / raw", common.spread([100 * a / b for a, b in zip(filled, raw, strict=True)], "%")),
            *by_core,
            ("raw / first row", common.spread([a / b for a, b in zip(raw, old, strict=True)], "x")),
            (
                "filling / the first row",
                common.spread([a / b for a, b in zip(filled, old, strict=True)], "x"),
            ),
        ],
    )


def other_rate(
    args: argparse.Namespace, encoder: Encoder, chosen: list[Clip], device: torch.device
) -> tuple[str, Callable[[], float]]:
    """What the encoder is compared with, and its frames/s."""
    if encoder.spec.video:
        photographs = common.make_encoder("resnet152", device, random_weights=True)
        return "raw ResNet-152 at 112 px", lambda: common.raw_rate(photographs, 112, device, batches=4)
    length = 64
    original = OriginalProcess(args.encoder, args.img_dim, device)
    folder = original.extract(max(chosen, key=lambda clip: clip.video.count()).video)
    return "the original's way: JPEG, PIL, fp32", lambda: length / original.encode(folder, length)


if __name__ == "__main__":
    main()
