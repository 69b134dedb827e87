"""Encoding videos, against the raw encoder on random frames and the original's way, and hours for UCF-101.

python3 benchmarks/encoding.py --encoder resnet152 --img_dim 112
python3 benchmarks/encoding.py --encoder i3d --frames 6000
python3 benchmarks/encoding.py --encoder i3d --img_dim 160 --frame_stride 2
"""

import tempfile
from pathlib import Path

import common
from original_way import OriginalProcess

from dataset import fill_store
from features.store import Store
from utils.device import choose_device
from utils.process import available_cores

# Of all clips, about.
UCF101_FRAMES = 2_500_000


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="resnet152")
    flags.add_argument("--img_dim", type=int)
    flags.add_argument("--frames", type=int, default=3000, help="about how many are encoded each time")
    flags.add_argument("--frame_stride", type=int, default=1)
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, args, device, args.img_dim)
    views = 2 if encoder.spec.flip else 1
    every = common.clips(args.data)
    # Clips from all over the data set, as many as hold the frames asked for.
    chosen, held = [], 0
    for clip in every[:: max(1, len(every) // 100)]:
        if held < args.frames:
            chosen.append(clip)
            held += -(-clip.video.count() // args.frame_stride)

    def encode() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder), encoder, stride=args.frame_stride, flip=views == 2)
            fill_store(store, chosen, available_cores())

    original = None if encoder.spec.video else OriginalProcess(args.encoder, encoder.img_dim, device)
    folder = original and original.extract(max(chosen, key=lambda clip: clip.video.count()).video)
    encode()
    encoded, raw, old = [], [], []
    batches = max(4, args.frames // encoder.batch_size // encoder.windows.frames // 4)
    for _ in range(args.pairs):
        before = common.raw_rate(encoder, device, batches=batches)
        encoded.append(views * held / common.seconds(encode, device))
        # The machine's speed drifts: the limit is what it was around the measurement.
        raw.append((before + common.raw_rate(encoder, device, batches=batches)) / 2)
        if original and folder:
            old.append(64 / original.encode(folder, 64))
    hours = [UCF101_FRAMES * views / args.frame_stride / rate / 3600 for rate in encoded]
    rows = [
        ("raw encoder on random frames", common.spread(raw, "frames/s")),
        ("encoding, videos to .npy files, each view counted", common.spread(encoded, "frames/s")),
        ("encoding / raw", common.ratios(encoded, raw, "%", 100)),
        ("all of UCF-101", common.spread(hours, "h", 2)),
    ]
    if old:
        rows.insert(0, ("the original's way: JPEG, PIL, fp32", common.spread(old, "frames/s")))
        rows.append(("encoding / the original's way", common.ratios(encoded, old)))
    print(common.machine(device))
    common.table(
        f"Encoding, {args.encoder} at {encoder.img_dim} px, stride {args.frame_stride}, {held:,} frames "
        f"of {len(chosen)} clips, {views} view{'s' * (views - 1)} of each, {encoder.precision}",
        rows,
    )


if __name__ == "__main__":
    main()
