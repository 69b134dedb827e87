"""What the benchmarks share: their flags, clips and models, and timing."""

import argparse
import contextlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import torch
import torchvision
from torch.nn import functional as F

from features.encoder import INT8, TORCH, Encoder
from features.execution import calibration_windows, choose_clips
from features.folding import BATCHNORMS
from features.streams import encoder_stream
from features.workers import in_worker
from splits.datasets import DataSettings, Listed, load_split
from splits.split import Clip
from training.classifier import Classifier
from utils.device import choose_dtype
from utils.process import available_cores


def data_parser(description: str) -> argparse.ArgumentParser:
    """The flag of all benchmarks: where the clips are."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "ucf101-subset",
        help="folder with UCF-101/ and ucfTrainTestlist/; a part of UCF-101 is enough",
    )
    return flags


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of those that measure speed."""
    flags = data_parser(description)
    flags.add_argument("--pairs", type=int, default=5, help="measurements of each side; medians are quoted")
    flags.add_argument("--device", default="auto")
    flags.add_argument(
        "--random_weights", action="store_true", help="measure without ImageNet weights, which change no time"
    )
    return flags


def data_settings(path: Path) -> DataSettings:
    """Clips of UCF-101 and their lists in a folder."""
    return DataSettings(dataset_path=path / "UCF-101", split_path=path / "ucfTrainTestlist")


@contextlib.contextmanager
def folder_for_logs() -> Iterator[Path]:
    """A new folder, which stays only if something fails in it."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def clips(data: Path) -> list[Clip]:
    split = load_split(data_settings(data), 1)
    return split.train + split.test


def make_encoder(
    name: str,
    device: torch.device,
    *,
    random_weights: bool,
    img_dim: int = 0,
    engine: str = TORCH,
    calibration: Sequence[Clip] = (),
) -> Encoder:
    """An encoder in bfloat16, where the hardware has it, or in int8.

    Args:
        img_dim: of the frames, where it is quantised
        engine: of `features.encoder.ENGINES`
        calibration: clips that it is quantised on
    """
    torch.manual_seed(0)
    encoder = Encoder(name, pretrained=not random_weights).to(device)
    if random_weights:
        calm(encoder)
    if engine == INT8:
        stream = encoder_stream(encoder, "rgb", img_dim)
        encoder.quantized["rgb"] = encoder.quantize("rgb", calibration_windows(calibration, stream, 1))
    encoder.prepare(choose_dtype("auto", device), engine=engine)
    return encoder


def calm(encoder: Encoder) -> None:
    """Make random weights smaller: untrained residual layers add up beyond float16."""
    for layer in encoder.modules():
        if isinstance(layer, BATCHNORMS):
            layer.weight.data.mul_(0.5)


def never_tested(data: Path) -> list[Clip]:
    """Some clips that no split tests, the ones that training quantises on."""
    listed = Listed(data_settings(data))
    names = listed.never_tested()
    return choose_clips([clip for clip in clips(data) if clip.name in names])


def make_model(name: str, device: torch.device, *, random_weights: bool) -> Classifier:
    torch.manual_seed(0)
    model = Classifier("ConvLSTM", 101, encoder=name, pretrained=not random_weights).to(device)
    if random_weights:
        calm(model.encoder)
    model.encoder.prepare(choose_dtype("auto", device))
    return model


def head_optimizer(model: Classifier) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-4)


def head_step(
    model: Classifier, optimizer: torch.optim.Optimizer, embeddings: torch.Tensor, labels: torch.Tensor
) -> None:
    """A step of training on embeddings, on the model's device."""
    loss = F.cross_entropy(model.classify(embeddings), labels.to(embeddings.device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def raw_rate(
    encoder: Encoder, img_dim: int, device: torch.device, *, batches: int = 4, side_by_side: bool = False
) -> float:
    """Frames/s of the bare network on random data in memory, in the dtype in use.

    OpenVINO's has frames as they are decoded.

    Args:
        batches: that are timed together
        side_by_side: each core computes a batch, as `features.workers` has it; if not, a batch is computed
            by all cores, which is what a bare loop does
    """
    spec = encoder.spec
    if spec.video:
        shape: tuple[int, ...] = (encoder.batch_size, 3, spec.windows.frames, img_dim, img_dim)
        layout = torch.channels_last_3d
    else:
        bare = device.type == "cpu" and not side_by_side
        shape = (32 if bare else encoder.batch_size, 3, img_dim, img_dim)
        layout = torch.channels_last
    network: Callable[[torch.Tensor], object]
    if encoder.engine == TORCH:
        data = torch.randn(shape, device=device).to(encoder.dtype).contiguous(memory_format=layout)
        assert encoder._fast is not None
        network = encoder._fast
    else:
        frames = spec.windows.frames if spec.video else 1
        data = torch.randint(0, 256, (shape[0], frames, img_dim, img_dim, 3), dtype=torch.uint8)
        network = encoder._network("rgb", img_dim)

    def once() -> None:
        with torch.no_grad():
            network(data)

    def work() -> None:
        if side_by_side:
            for done in [in_worker(once) for _ in range(batches)]:
                done.result()
        else:
            for _ in range(batches):
                once()

    work()
    return batches * shape[0] * (spec.windows.frames if spec.video else 1) / seconds(work, device)


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


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line.split(": ", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = lines[0] if lines else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {available_cores()} cores, PyTorch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, {platform.system()}"
    )
