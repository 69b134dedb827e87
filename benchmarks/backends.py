"""PyTorch and onnxruntime label the same videos: whether they agree, and how fast each is.

    python3 benchmarks/backends.py --checkpoint_model model_checkpoints/ConvLSTM_20.pth

Every frame gets a label of its own here. Both read and resize the frames anew in each run.
"""

import statistics
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from tqdm import tqdm

from annotation.labels import ClipLayout, FrameModel, label_frames, read_windows
from annotation.onnx_model import OnnxModel, export
from training.checkpoint import Checkpoint, load_checkpoint
from utils.device import choose_dtype
from utils.process import available_cores
from video.reader import Video


def label(model: FrameModel, video: Video, trained: Checkpoint) -> np.ndarray:
    """Probabilities of each frame (frames, C)."""
    streams = model.open_streams(trained.img_dim)
    layout = ClipLayout(trained.sequence_length, trained.window_step, stride=trained.frame_stride)
    batches = read_windows(video, streams, layout.stride)
    parts = label_frames(model, streams, batches, layout)
    return torch.cat([part.probabilities for part in parts]).numpy()


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--checkpoint_model", type=Path, required=True)
    flags.add_argument("--clips", type=int, default=20)
    args = flags.parse_args()
    device = torch.device("cpu")
    every = common.clips(args.data)
    chosen = every[:: len(every) // args.clips][: args.clips]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(args.checkpoint_model)
        difference = export(checkpoint, Path(folder) / "exported")
        models: dict[str, FrameModel] = {}
        for name, dtype in (
            ("PyTorch, fp32", torch.float32),
            ("PyTorch, auto", choose_dtype("auto", device)),
        ):
            model = load_checkpoint(args.checkpoint_model).model
            model.encoder.prepare(dtype)
            models[name] = model
        models["onnxruntime, fp32"] = OnnxModel(Path(folder) / "exported", available_cores())
        found: dict[str, list[np.ndarray]] = {name: [] for name in models}
        rates: dict[str, list[float]] = {name: [] for name in models}
        for clip in tqdm(chosen, unit="clip"):
            for name in models:
                started = time.perf_counter()
                found[name].append(label(models[name], clip.video, checkpoint))
                rates[name].append(len(found[name][-1]) / (time.perf_counter() - started))
    print(common.machine(device))
    print(f"exported: numbers within {difference:.1g} of PyTorch's")
    reference = found["PyTorch, fp32"]
    frames = sum(map(len, reference))
    for name in models:
        agree = sum(
            int((one.argmax(1) == other.argmax(1)).sum())
            for one, other in zip(found[name], reference, strict=True)
        )
        apart = max(
            float(np.abs(one - other).max()) for one, other in zip(found[name], reference, strict=True)
        )
        ratios = [rate / base for rate, base in zip(rates[name], rates["PyTorch, fp32"], strict=True)]
        print(
            f"{name}: {agree:,} of {frames:,} frames of {len(chosen)} clips have PyTorch's fp32 label, "
            f"probabilities within {apart:.1g}; {statistics.median(rates[name]):.0f} frames/s, "
            f"{statistics.median(ratios):.2f} x PyTorch's fp32"
        )


if __name__ == "__main__":
    main()
