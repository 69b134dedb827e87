"""All that a GPU is asked to do, in one table: raw encoders, filling, annotating, an epoch, memory.

Weights are random, which changes no time, and clips are drawn, so neither a network nor a data set is needed.
What a machine lacks is skipped, and said.

python3 benchmarks/gpu.py
python3 benchmarks/gpu.py --encoders i3d resnet152 --data ../shared/ucf101-subset
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import torch
from original_way import OriginalProcess

from annotation.annotate import Annotator
from annotation.settings import LabelSettings
from dataset import Sampling
from features.fill import open_cache
from splits.split import Clip
from training.batches import ClipBatches, EmbeddingClips
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from utils.device import choose_device
from utils.process import UserError, available_cores, run
from video.reader import Video

EPOCH_CLIPS, BATCH = 1024, 64


def draw_clips(path: Path, groups: int) -> Path:
    """A drawn data set in UCF-101's layout."""
    script = common.ROOT / "data/make_toy_actions.py"
    command = [sys.executable, script, "--output_path", path, "--groups", groups]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return path


def epoch(model: Classifier, clips: list[Clip], folder: Path, device: torch.device) -> float:
    """Clips/s of a head that learns from the cache."""
    side, spec = model.encoder.spec.input_size, model.encoder.spec
    cache = open_cache(folder, clips, model.encoder, side, flip=False, threads=available_cores())
    many = (clips * (1 + EPOCH_CLIPS // len(clips)))[:EPOCH_CLIPS]
    batches = ClipBatches(len(many), BATCH, shuffle=True)
    sampling = Sampling(spec.sequence_length, training=True, flip=False)
    loader = EmbeddingClips([cache.view(clips)], [spec.windows], many, sampling, batches, device)
    optimizer = common.head_optimizer(model)
    model.train()

    def work() -> None:
        for embeddings, _, labels in loader:
            common.head_step(model, optimizer, embeddings, labels)

    work()
    rates = [len(many) / common.seconds(work, device) for _ in range(3)]
    model.eval()
    return sorted(rates)[1]


def measure(name: str, clips: list[Clip], device: torch.device, *, quick: bool) -> list[str]:
    """A row of the table."""
    model, lacking = common.make_model(name, device, random_weights=True), "-"
    encoder, side = model.encoder, model.encoder.spec.input_size
    batches = 2 if quick else 20
    raw = common.raw_rate(encoder, side, device, batches=batches)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        frames = sum(clip.video.count() for clip in clips)

        def fill(path: Path) -> Callable[[], object]:
            return lambda: open_cache(path, clips, encoder, side, flip=False, threads=available_cores())

        fill(here / "warm")()
        filling = frames / common.seconds(fill(here / "cache"), device)
        learning = epoch(model, clips, here / "cache", device)
        longest = max(clips, key=lambda clip: clip.video.count()).video
        names = [f"class {number}" for number in range(101)]
        trained = Checkpoint(model, names, side, encoder.spec.sequence_length, None, 0)
        annotator = Annotator(LabelSettings(), model, trained, name)
        annotator.annotate(Video(longest.path), here / "warm.mp4")
        seconds = common.seconds(lambda: annotator.annotate(Video(longest.path), here / "out.mp4"), device)
        annotating = f"{longest.count() / seconds:,.0f}"
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else lacking
    compiled = lacking
    if not quick:
        encoder.prepare(encoder.dtype, compile=True)
        compiled = f"{common.raw_rate(encoder, side, device) / raw:.2f} x"
    original = lacking
    if not encoder.spec.video:
        process = OriginalProcess(name, side, device)
        original = f"{64 / process.encode(process.extract(longest), 64):,.0f}"
    return [
        name, str(side), f"{raw:,.0f}", compiled, f"{filling:,.0f}", f"{100 * filling / raw:.0f} %",
        annotating, original, f"{learning:,.0f}", peak,
    ]  # fmt: skip


def main() -> int:
    """Measure each encoder and print the table; returns the exit status: 1 if one failed."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--device", default="auto")
    flags.add_argument("--encoders", nargs="+", default=["i3d", "resnet152", "efficientnet_lite0", "r3d_18"])
    flags.add_argument("--data", type=Path, help="clips of UCF-101 and their lists; default: drawn ones")
    flags.add_argument("--quick", action="store_true", help="to see whether all of it runs")
    args = flags.parse_args()
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        clips = common.clips(args.data or draw_clips(Path(folder) / "toy", 8 if args.quick else 16))
        clips = clips[:4] if args.quick else clips
        print(common.machine(device), flush=True)
        print(f"bf16 matrix peak: {common.matrix_peak(device) / 1000:.2f} TFLOP/s; {len(clips)} clips\n")
        print(
            "| encoder | px | raw, frames/s | compiled | filling, frames/s | of raw | annotating, frames/s | "
            "original's way | head, clips/s | peak memory |"
        )
        print("| --- " * 10 + "|")
        status = 0
        for name in args.encoders:
            try:
                print(f"| {' | '.join(measure(name, clips, device, quick=args.quick))} |", flush=True)
            except (ImportError, UserError) as error:
                print(f"| {name} | skipped: {str(error).splitlines()[0]} |", flush=True)
            # The others count all the same.
            except RuntimeError as error:
                status = 1
                print(f"| {name} | failed: {str(error).splitlines()[0]} |", flush=True)
    return status


if __name__ == "__main__":
    run(main)
