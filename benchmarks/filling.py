"""Filling the cache, against the raw encoder on random data and against the original's way of encoding.

python3 benchmarks/filling.py --encoder resnet152 --img_dim 112
python3 benchmarks/filling.py --encoder efficientnet_lite0 --frames 12000
"""

import tempfile
from pathlib import Path

import common

from features.fill import open_cache
from utils.device import available_cores, choose_device


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="resnet152")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--frames", type=int, default=1000, help="about how many frames are encoded each time")
    flags.add_argument("--no_flip", action="store_true", help="one view of each frame, not two")
    args = flags.parse_args()
    views = 1 if args.no_flip else 2
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, device, random_weights=args.random_weights)
    original = common.OriginalProcess(args.encoder, args.img_dim, device)
    every = common.clips(args.data)
    # Clips from all over the data set, as many as hold the frames asked for.
    chosen, held = [], 0
    for clip in every[:: max(1, len(every) // 100)]:
        if held < args.frames:
            chosen.append(clip)
            held += clip.video.count()
    old_length = 64
    folder_of_one = original.extract(max(chosen, key=lambda clip: clip.video.count()).video)

    def fill() -> None:
        with tempfile.TemporaryDirectory() as folder:
            open_cache(
                Path(folder),
                chosen,
                encoder,
                args.img_dim,
                flip=not args.no_flip,
                threads=available_cores(),
            )

    fill()
    filled, raw, old = [], [], []
    batches = max(4, args.frames // encoder.batch_size // 4)
    for _ in range(args.pairs):
        before = common.raw_rate(encoder, args.img_dim, device, batches=batches)
        filled.append(views * held / common.seconds(fill, device))
        after = common.raw_rate(encoder, args.img_dim, device, batches=batches)
        # The machine's speed drifts: the limit is what it was around the measurement.
        raw.append((before + after) / 2)
        old.append(old_length / original.encode(folder_of_one, old_length))
    print(common.machine(device))
    common.table(
        f"Filling the cache, {args.encoder} at {args.img_dim} px, {held:,} frames of {len(chosen)} clips, "
        f"{views} view{'s' * (views - 1)} of each, "
        f"batches of {encoder.batch_size} in {str(encoder.dtype).removeprefix('torch.')}",
        [
            ("the original's way: JPEG, PIL, fp32", common.spread(old, "frames/s")),
            ("raw encoder on random data", common.spread(raw, "frames/s")),
            ("filling, videos to embeddings on disk, each view counted", common.spread(filled, "frames/s")),
            ("filling / raw", common.spread([100 * a / b for a, b in zip(filled, raw, strict=True)], "%")),
            ("filling / original", common.spread([a / b for a, b in zip(filled, old, strict=True)], "x")),
        ],
    )


if __name__ == "__main__":
    main()
