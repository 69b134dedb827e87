"""All that a GPU is asked to do, in one table: raw encoders, encoding, annotating, an epoch, memory.

Weights are random, which changes no time, and clips are drawn, so neither a network nor a data set is needed.
What a machine lacks is skipped, and said.

python3 benchmarks/gpu.py
python3 benchmarks/gpu.py --encoders i3d resnet152 --data ../shared/ucf101-subset
"""

import argparse
import tempfile
from pathlib import Path

import common
import torch
from original_way import OriginalProcess

from annotation.annotate import write_annotated
from annotation.recognizer import Recognizer
from dataset import EmbeddingClips, Sampling, batch_items, fill_store
from features.store import Store
from splits.split import Clip
from training.recipe import RECIPES, Optimization
from utils.device import choose_device
from utils.process import UserError, available_cores, run
from video.reader import Video

EPOCH_CLIPS, BATCH = 1024, 64


def epoch(store: Store, clips: list[Clip], device: torch.device) -> float:
    """Clips/s of a head that learns from embeddings."""
    many = (clips * (1 + EPOCH_CLIPS // len(clips)))[:EPOCH_CLIPS]
    head = common.random_checkpoint(store.encoder).head.to(device).train()
    sampling = Sampling(store.encoder.spec.sequence_length, training=True, flip=False)
    data, optimization = EmbeddingClips(store, many, sampling), Optimization(head, RECIPES["default"], 1000)

    def work() -> None:
        for items in batch_items(len(many), BATCH, seed=0):
            embeddings, padding, labels = (part.to(device, non_blocking=True) for part in data.batch(items))
            optimization.step(optimization.loss(head(embeddings, padding), labels) / len(labels))

    work()
    return sorted(len(many) / common.seconds(work, device) for _ in range(3))[1]


def finetuning(name: str, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Clips/s of an encoder that is trained, a window a clip and 8 a step, and GB at most on a GPU."""
    encoder = common.make_encoder(name, args, device, None)
    optimizer = torch.optim.AdamW([parameter for parameter, _ in encoder.unfreeze()], fused=True)
    shape = (8, encoder.windows.frames, 3, encoder.img_dim, encoder.img_dim)
    windows = torch.randint(0, 256, shape, dtype=torch.uint8)
    encoder.train()

    def work() -> None:
        for _ in range(1 if args.quick else 5):
            optimizer.zero_grad()
            encoder(windows).square().mean().backward()
            optimizer.step()

    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rate = (8 if args.quick else 40) / common.seconds(work, device)
    return rate, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0


def measure(name: str, args: argparse.Namespace, clips: list[Clip], device: torch.device) -> list[str]:
    """A row of the table."""
    encoder = common.make_encoder(name, args, device, None)
    raw = common.raw_rate(encoder, device, batches=2 if args.quick else 20)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        frames = sum(clip.video.count() for clip in clips)
        fill_store(Store(here / "warm", encoder), clips, available_cores())
        store = Store(here / "store", encoder)
        encoding = frames / common.seconds(lambda: fill_store(store, clips, available_cores()), device)
        learning = epoch(store, clips, device)
        longest = max(clips, key=lambda clip: clip.video.count()).video
        model = common.random_checkpoint(encoder)
        model.head.to(device)
        recognizer, video = Recognizer(model), Video(longest.path)

        def annotate() -> None:
            write_annotated(recognizer(video), video, here / "out.mp4")

        annotate()
        annotating = longest.count() / common.seconds(annotate, device)
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else "-"
    trained, most = finetuning(name, args, device)
    original = "-"
    if not encoder.spec.video:
        process = OriginalProcess(name, encoder.img_dim, device)
        original = f"{64 / process.encode(process.extract(longest), 64):,.0f}"
    return [
        name, str(encoder.img_dim), f"{raw:,.0f}", f"{encoding:,.0f}", f"{100 * encoding / raw:.0f} %",
        f"{annotating:,.0f}", original, f"{learning:,.0f}", peak, f"{trained:,.1f}",
        f"{most:.1f} GB" if most else "-",
    ]  # fmt: skip


def main() -> int:
    """Measure each encoder and print the table; returns the exit status: 1 if one failed."""
    flags = common.parser(__doc__.split("\n")[0])
    flags.set_defaults(data=None, random_weights=True)
    flags.add_argument("--encoders", nargs="+", default=["i3d", "resnet152", "efficientnet_lite0", "r3d_18"])
    flags.add_argument("--quick", action="store_true", help="to see whether all of it runs")
    args = flags.parse_args()
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        clips = common.clips(args.data or common.draw_toy(Path(folder) / "toy", 8 if args.quick else 16))
        clips = clips[:4] if args.quick else clips
        print(common.machine(device), flush=True)
        print(f"bf16 matrix peak: {common.matrix_peak(device) / 1000:.2f} TFLOP/s; {len(clips)} clips\n")
        print(
            "| encoder | px | raw, frames/s | encoding, frames/s | of raw | annotating, frames/s | "
            "original's way | head, clips/s | peak memory | finetuning, clips/s | its memory |"
        )
        print("| --- " * 11 + "|")
        status = 0
        for name in args.encoders:
            try:
                print(f"| {' | '.join(measure(name, args, clips, device))} |", flush=True)
            except (ImportError, UserError) as error:
                print(f"| {name} | skipped: {str(error).splitlines()[0]} |", flush=True)
            # The others count all the same.
            except RuntimeError as error:
                status = 1
                print(f"| {name} | failed: {str(error).splitlines()[0]} |", flush=True)
    return status


if __name__ == "__main__":
    run(main)
