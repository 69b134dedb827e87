"""A model as ONNX files: written from PyTorch, and run by onnxruntime without it.

A folder holds

    encoder.onnx    frames (N, 3, img_dim, img_dim) uint8 RGB -> embeddings (N, D) float32
    head.onnx       embeddings (B, T, S D) float32 and padding (B, T) bool -> logits (B, C) float32
    model.json      class names, sizes and streams

N, B and T are free. Packages: onnx and onnxscript write, onnxruntime runs (requirements-onnx.txt).
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from features.encoder import Encoder, fold_batchnorm
from models import Classifier
from training.checkpoint import Checkpoint
from utils.files import json_bytes, write_whole
from utils.process import MissingFileError, UserError

FORMAT = "action-recognition onnx 1"
INSTALL = "run pip install -r requirements-onnx.txt"
# Frames that go through the encoder at once.
BATCH = 32
# How far an exported model's numbers may be from PyTorch's.
TOLERANCE = 1e-3


class OnnxError(UserError):
    """A model cannot be exported, or an exported one cannot be run; the message says what to do."""


class _Frames(nn.Module):
    """Normalisation and the frozen network in one."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = fold_batchnorm(copy.deepcopy(encoder.feature_extractor))
        self.mean, self.scale = encoder.mean.view(1, 3, 1, 1), encoder.scale.view(1, 3, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.network((frames.float() - self.mean) * self.scale)


class _Clips(nn.Module):
    """The heads, joined."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, padding: Tensor) -> Tensor:
        return self.model.classify(embeddings, padding)


def _write(
    path: Path, module: nn.Module, inputs: dict[str, Tensor], output: str, dims: tuple[str, ...]
) -> None:
    """Write a module; the first axes of all inputs, which `dims` names, may have any length."""
    free = {axis: Dim(name, min=1, max=2**20) for axis, name in enumerate(dims)}
    # What it has to say is of its own inside.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=[free] * len(inputs),
            verbose=False,
        )
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "model.onnx")
        write_whole(path, (Path(folder) / "model.onnx").read_bytes())


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
    model, dim, length = checkpoint.model.cpu().eval(), checkpoint.img_dim, checkpoint.sequence_length
    folder.mkdir(parents=True)
    numbers = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 3, dim, dim), dtype=torch.uint8, generator=numbers)
    with torch.no_grad():
        embeddings = model.encoder.embed(frames)
        # As large as real ones, and of clips that differ.
        clips = embeddings[torch.randint(3, (3, length), generator=numbers)].repeat(1, 1, len(model.streams))
        padding = torch.zeros(3, length, dtype=torch.bool)
        padding[0, : length // 3] = True
        logits = model.classify(clips, padding)
        _write(folder / "encoder.onnx", _Frames(model.encoder), {"frames": frames}, "embeddings", ("frames",))
        inputs = {"embeddings": clips, "padding": padding}
        _write(folder / "head.onnx", _Clips(model), inputs, "logits", ("clips", "time"))
    about = {
        "format": FORMAT,
        "model": model.name,
        "encoder": model.encoder.name,
        "encoder_sha256": model.encoder.sha256(),
        "streams": list(model.streams),
        "width": model.width,
        "img_dim": dim,
        "sequence_length": length,
        "frame_stride": checkpoint.frame_stride,
        "classes": checkpoint.classes,
    }
    write_whole(folder / "model.json", json_bytes(about))
    exported = OnnxModel(folder)
    difference = max(
        (exported.encode_frames(frames) - embeddings).abs().max().item(),
        (exported.classify(clips, padding) - logits).abs().max().item(),
    )
    if not difference <= TOLERANCE:
        raise OnnxError(f"{folder}: its numbers are {difference:.2g} from PyTorch's; do not use it")
    return difference


class OnnxModel:
    """An exported model, run by onnxruntime on the CPU.

    Args:
        folder: as `export` wrote it
        threads: to compute with; all cores by default

    Attributes:
        classes: class names, by label
        img_dim: height and width in pixels of the frames that it takes
        sequence_length: frames of the clips that it was trained on
        frame_stride: it was trained on every N-th frame of a video

    Raises: MissingFileError or OnnxError if the folder is no exported model, or onnxruntime is missing.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: Path, threads: int = 0) -> None:
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
            self.classes, self.streams = list(about["classes"]), tuple(about["streams"])
            self.width, self.img_dim = int(about["width"]), int(about["img_dim"])
            self.sequence_length = int(about["sequence_length"])
            self.frame_stride = int(about["frame_stride"])
            self._encoder, self._head = (
                onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
                for name in ("encoder.onnx", "head.onnx")
            )
        except OnnxError:
            raise
        # A damaged file makes the readers fail in any way there is.
        except Exception as error:
            raise OnnxError(f"{folder}: damaged; export it again") from error
        # What the head has no use for is no input of it.
        self._inputs = {entry.name for entry in self._head.get_inputs()}

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Embeddings of frames: (N, 3, img_dim, img_dim) uint8 -> (N, D) float32."""
        parts = [self._encoder.run(None, {"frames": part.numpy()})[0] for part in frames.split(BATCH)]
        return torch.from_numpy(np.concatenate(parts))

    def embed(self, images: Tensor) -> Tensor:
        """As `Classifier.embed`.

        Raises: UserError if the frames have another size than it was exported for.
        """
        if images.shape[-2:] != (self.img_dim, self.img_dim):
            raise UserError(
                f"the model was exported for frames of {self.img_dim} pixels; leave out --img_dim, or export "
                "it again"
            )
        return torch.cat(
            [self.encode_frames(stream.contiguous()) for stream in images.split(3, dim=1)], dim=1
        )

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """As `Classifier.classify`."""
        if padding is None:
            padding = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        inputs = {"embeddings": embeddings.numpy(), "padding": padding.numpy()}
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        return torch.from_numpy(self._head.run(None, given)[0])
