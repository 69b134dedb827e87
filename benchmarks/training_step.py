"""A training step and an epoch from the cache, against the original's step and against the head alone.

python3 benchmarks/training_step.py                       # ResNet-152 at 112 px, 16 clips of 40 frames
python3 benchmarks/training_step.py --random_weights      # without ImageNet weights: the same times
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import common
import torch
from original_way import OriginalProcess

from dataset import Sampling
from features.fill import open_cache
from features.windows import PHOTOGRAPHS
from training.batches import ClipBatches, EmbeddingClips
from utils.device import choose_device

BATCH, LENGTH = 16, 40


def get_args() -> argparse.Namespace:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="resnet152")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--clips", type=int, default=64, help="clips of the epoch; 64 are 4 steps")
    return flags.parse_args()


def print_hours(old: list[float], new: list[float]) -> None:
    """What 200 epochs of UCF-101 take, by seconds of a step."""
    full_steps = 9537 / BATCH
    hours = [200 * full_steps * statistics.median(values) / 3600 for values in (old, new)]
    print(
        f"\n200 epochs of UCF-101 split 1 (9,537 training clips), training steps alone: "
        f"{hours[0]:,.0f} h the original's way, {hours[1]:,.1f} h from the cache"
    )


def main() -> None:
    args = get_args()
    device = choose_device(args.device)
    every = common.clips(args.data)
    chosen = every[:: max(1, len(every) // args.clips)][: args.clips]
    model = common.make_model(args.encoder, device, random_weights=args.random_weights)
    original = OriginalProcess(args.encoder, args.img_dim, device)
    folders = [original.extract(clip.video) for clip in chosen[:BATCH]]
    labels = [clip.label for clip in chosen[:BATCH]]

    with tempfile.TemporaryDirectory() as folder:
        # Strided: only the time of reading and training is measured here.
        cache = open_cache(
            Path(folder), chosen, model.encoder, args.img_dim, flip=True, frame_stride=4, threads=2
        )
        batches = ClipBatches(len(chosen), BATCH, shuffle=True)
        sampling = Sampling(LENGTH, training=True, frame_stride=4)
        loader = EmbeddingClips([cache.view(chosen)], [PHOTOGRAPHS], chosen, sampling, batches, device)
        optimizer = common.head_optimizer(model)
        model.train()

        def head(embeddings: torch.Tensor, targets: torch.Tensor) -> None:
            common.head_step(model, optimizer, embeddings, targets)

        def epoch() -> float:
            inside = 0.0
            for embeddings, _, targets in loader:
                inside += common.seconds(lambda: head(embeddings, targets), device)  # noqa: B023
            return inside

        epoch()
        old, new, shares = [], [], []
        for number in range(args.pairs):
            old.append(original.step(folders, labels, LENGTH))
            batches.epoch = number
            inside = 0.0

            def timed() -> None:
                nonlocal inside
                inside = epoch()

            whole = common.seconds(timed, device)
            new.append(whole / len(batches))
            shares.append(100 * inside / whole)
    print(common.machine(device))
    common.table(
        f"Training step, {args.encoder} at {args.img_dim} px, {BATCH} clips of {LENGTH} frames",
        [
            ("the original's way: JPEG, PIL, fp32, encoding in each step", common.spread(old, "s", 2)),
            ("from the cache: reading, forward, backward, optimizer", common.spread(new, "s", 3)),
            ("ratio", common.spread([a / b for a, b in zip(old, new, strict=True)], "x")),
            ("share of an epoch inside the head", common.spread(shares, "%")),
        ],
    )
    print_hours(old, new)


if __name__ == "__main__":
    main()
