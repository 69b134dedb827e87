"""A model as ONNX files: written from PyTorch, and run by onnxruntime without it.

A folder holds

    encoder.onnx    windows (N, L, 3, img_dim, img_dim) uint8 RGB -> embeddings (N, K, D) float32
    head.onnx       embeddings (B, T, D) float32 and padding (B, T) bool -> logits (B, C) float32
    model.json      class names, the encoder's windows, and the size of its frames

N, B and T are free. A video encoder has windows of one length L there: pooling in ONNX pads by constants,
which would be wrong at another. Packages: onnx and onnxscript write, onnxruntime runs
(requirements-onnx.txt).
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from features.windows import Windows
from models import Head
from training.checkpoint import Checkpoint
from utils.files import json_bytes, write_whole
from utils.process import MissingFileError, UserError
from video.frames import Resize

FORMAT = "action-recognition onnx 3"
INSTALL = "run pip install -r requirements-onnx.txt"
# How far an exported model's numbers may be from PyTorch's.
TOLERANCE = 1e-3


class OnnxError(UserError):
    """A model cannot be exported, or an exported one cannot be run; the message says what to do."""


class _Classify(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, embeddings: Tensor, padding: Tensor) -> Tensor:
        return self.head.classify(embeddings, padding)


def _write(path: Path, module: nn.Module, inputs: dict[str, Tensor], output: str, free: list[str]) -> None:
    """Write a module whose inputs' first axes, named by `free`, may have any length."""
    axes = {axis: Dim(name, min=1, max=2**20) for axis, name in enumerate(free)}
    # What it has to say is of its own inside.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, input_names=list(inputs),
            output_names=[output], dynamic_shapes=[axes] * len(inputs), verbose=False,
        )  # fmt: skip
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "model.onnx")
        write_whole(path, (Path(folder) / "model.onnx").read_bytes())


@torch.no_grad()
def export(checkpoint: Checkpoint, folder: Path) -> float:
    """Write a checkpoint's model into a folder, and compare its numbers with PyTorch.

    Returns: the largest difference of an embedding or a logit.
    Raises: OnnxError if a package is missing, or the difference is above `TOLERANCE`; OSError if the folder
        is there already or cannot be written.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError as error:
        raise OnnxError(f"exporting needs the package {error.name}; {INSTALL}") from error
    encoder, head = checkpoint.encoder.cpu(), checkpoint.head.cpu().eval()
    side, length = encoder.img_dim, checkpoint.sequence_length
    layout = replace(encoder.windows, least=encoder.windows.frames)
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 256, (3, layout.frames, 3, side, side), dtype=torch.uint8, generator=random)
    network = encoder.normalized(by_pixel=False)
    _write(folder / "encoder.onnx", network, {"windows": windows}, "embeddings", ["windows"])
    embeddings = encoder.embed(windows)
    # As large as real ones, and of clips that differ.
    clips = embeddings.flatten(0, 1)[torch.randint(3, (3, length), generator=random)]
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[0, : length // 3] = True
    inputs = {"embeddings": clips, "padding": padding}
    _write(folder / "head.onnx", _Classify(head), inputs, "logits", ["clips", "time"])
    about = {
        "format": FORMAT, "model": checkpoint.model, "encoder": encoder.name,
        "encoder_sha256": encoder.sha256(), "width": encoder.width, "img_dim": side,
        "windows": asdict(layout), "resize": asdict(encoder.resize), "batch_size": encoder.spec.cpu_batch,
        "sequence_length": length, "window_step": encoder.window_step,
        "frame_stride": checkpoint.frame_stride, "fps": checkpoint.fps, "classes": checkpoint.classes,
        "change_cost": checkpoint.change_cost,
    }  # fmt: skip
    write_whole(folder / "model.json", json_bytes(about))
    exported = OnnxModel(folder)
    pairs = (
        (exported.encoder.embed(windows), embeddings),
        (exported.head.classify(clips, padding), head.classify(clips, padding)),
    )
    difference = max((one - other).abs().max().item() for one, other in pairs)
    if not difference <= TOLERANCE:
        raise OnnxError(f"{folder}: its numbers are {difference:.2g} from PyTorch's; do not use it")
    return difference


class OnnxModel:
    """An exported model, run by onnxruntime on the CPU.

    Args:
        folder: as `export` wrote it
        img_dim: frame size that is asked for; None for that of the export
        threads: to compute with; all cores by default

    Attributes:
        encoder, head: as those of a `Checkpoint`
        classes, sequence_length, frame_stride, fps, change_cost: as in `Checkpoint`

    Raises: MissingFileError or OnnxError if the folder is no exported model, onnxruntime is missing, or the
        frames were of another size.
    """

    def __init__(self, folder: Path, img_dim: int | None = None, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise OnnxError(f"running {folder} needs the package onnxruntime; {INSTALL}") from error
        if not (folder / "model.json").is_file():
            raise MissingFileError(
                f"{folder}: no exported model; python3 export.py makes one out of a checkpoint"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            about: dict[str, Any] = json.loads((folder / "model.json").read_text())
            if about["format"] != FORMAT:
                raise OnnxError(f"{folder}: of another version, {about['format']}; export it again")
            sessions = [
                onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
                for name in ("encoder.onnx", "head.onnx")
            ]
            self.encoder, self.head = OnnxEncoder(sessions[0], about), OnnxHead(sessions[1])
            self.classes, self.sequence_length = list(about["classes"]), int(about["sequence_length"])
            self.frame_stride, self.fps = int(about["frame_stride"]), about["fps"]
            self.change_cost = about.get("change_cost")
        except OnnxError:
            raise
        # A damaged file makes the readers fail in any way there is.
        except Exception as error:
            raise OnnxError(f"{folder}: damaged; export it again") from error
        if img_dim not in (None, self.encoder.img_dim):
            raise OnnxError(
                f"the model was exported for frames of {self.encoder.img_dim} pixels; leave out --img_dim, "
                "or export it again"
            )


class OnnxEncoder:
    """The encoder of an exported model, with what `embed_video` needs."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, session: Any, about: dict[str, Any]) -> None:
        self._session, size = session, about["resize"]["size"]
        self.windows = Windows(**about["windows"])
        self.live_frames = self.windows.frames
        self.resize = Resize(**about["resize"] | {"size": size if isinstance(size, int) else tuple(size)})
        self.img_dim, self.batch_size = int(about["img_dim"]), int(about["batch_size"])
        self.window_step = int(about["window_step"])

    def embed(self, windows: Tensor) -> Tensor:
        """Embeddings of windows: (N, L, 3, img_dim, img_dim) uint8 -> (N, K, D) float32."""
        parts = [
            self._session.run(None, {"windows": np.ascontiguousarray(part.numpy())})[0]
            for part in windows.split(self.batch_size)
        ]
        return torch.from_numpy(np.concatenate(parts))


class OnnxHead:
    """The head of an exported model."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """As `Head.classify`."""
        if padding is None:
            padding = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        inputs = {"embeddings": embeddings.numpy(), "padding": padding.numpy()}
        # What the head has no use for is no input of it.
        wanted = [entry.name for entry in self._session.get_inputs()]
        return torch.from_numpy(self._session.run(None, {name: inputs[name] for name in wanted})[0])
