"""What the benchmarks share: their flags, clips and models, and timing."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import make_toy_actions
import torch
import torchvision

from features.encoder import Encoder
from features.folding import BATCHNORMS
from features.workers import map_on_cores
from models import build_head
from splits.datasets import DataSettings, Listed
from splits.split import Clip
from training.checkpoint import Checkpoint
from utils.device import choose_dtype
from utils.process import available_cores


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of all benchmarks."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "ucf101-subset",
        help="folder with UCF-101/ and ucfTrainTestlist/; a part of UCF-101 is enough",
    )  # fmt: skip
    flags.add_argument("--cache_path", type=Path, help="of train.py; default: beside the data set")
    flags.add_argument("--pairs", type=int, default=5, help="measurements of each side; medians are quoted")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "int8"))
    flags.add_argument(
        "--random_weights", action="store_true", help="without released weights; changes no time"
    )
    return flags


def data_settings(path: Path) -> DataSettings:
    """Clips of UCF-101 and their lists in a folder."""
    return DataSettings(dataset_path=path / "UCF-101", split_path=path / "ucfTrainTestlist")


def data_flags(args: argparse.Namespace) -> list[str]:
    """Flags of train.py that name the clips and their embeddings."""
    words = ["--dataset_path", args.data / "UCF-101", "--split_path", args.data / "ucfTrainTestlist"]
    words += ["--cache_path", args.cache_path] if args.cache_path else []
    return [str(word) for word in words]


def draw_toy(path: Path, groups: int = 50) -> Path:
    """The drawn data set, in UCF-101's layout."""
    make_toy_actions.main(["--output_path", str(path), "--groups", str(groups)])
    return path


def clips(data: Path) -> list[Clip]:
    split = Listed(data_settings(data)).split(1)
    return split.train + split.test


def make_encoder(name: str, args: argparse.Namespace, device: torch.device, img_dim: int | None) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(name, pretrained=not args.random_weights, img_dim=img_dim).to(device)
    if args.random_weights:
        # Untrained residual layers add up beyond float16.
        for layer in encoder.modules():
            if isinstance(layer, BATCHNORMS):
                layer.weight.data.mul_(0.5)
    return encoder.prepare(args.precision)


def random_checkpoint(encoder: Encoder) -> Checkpoint:
    """A ConvLSTM of 101 classes that has learned nothing, over an encoder."""
    torch.manual_seed(0)
    head, sizes = build_head("ConvLSTM", encoder.width, 101)
    names = [f"class {number}" for number in range(101)]
    return Checkpoint(encoder, head.eval(), "ConvLSTM", sizes, names, encoder.spec.sequence_length)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def raw_rate(encoder: Encoder, device: torch.device, *, batches: int = 4) -> float:
    """Frames/s of the encoder on random frames in memory: on a CPU each core has a batch of its own."""
    count, side = encoder.batch_size, encoder.img_dim
    shape = (count, encoder.windows.frames, side, side, 3)
    windows = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3).to(device)

    def work() -> None:
        for _ in (map_on_cores if device.type == "cpu" else map)(encoder.embed, [windows] * batches):
            pass

    work()
    return batches * count * encoder.windows.frames / seconds(work, device)


def matrix_peak(device: torch.device) -> float:
    """GFLOP/s of products of 2048 x 2048 matrices in bfloat16, where the hardware has it."""
    dtype = choose_dtype("auto", device)
    one, other = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))

    def work() -> None:
        for _ in range(20):
            one @ other

    work()
    return 20 * 2 * 2048**3 / min(seconds(work, device) for _ in range(3)) / 1e9


def table(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n### {title}\n")
    print("| what | median |\n| --- | --- |")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")


def spread(values: list[float], unit: str, digits: int = 1) -> str:
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} {unit} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(over: list[float], under: list[float], unit: str = "x", factor: float = 1) -> str:
    return spread([factor * a / b for a, b in zip(over, under, strict=True)], unit, 2 if factor == 1 else 1)


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {available_cores()} cores, PyTorch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, {platform.system()}"
    )
