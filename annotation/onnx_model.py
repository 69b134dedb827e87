"""A model as ONNX files: written from PyTorch, and run by onnxruntime without it.

A folder holds

    encoder.onnx    windows (N, L, 3, img_dim, img_dim) uint8 RGB -> embeddings (N, K, D) float32, L as in
                    model.json; each further encoder has a file of its own, encoder2.onnx and so on
    head.onnx       embeddings (B, T, sum of D) float32 and padding (B, T) bool -> logits (B, C) float32
    model.json      class names, and for each stream its encoder's file, its windows and its frames' size

N, B and T are free. An encoder of videos has windows of one length there: pooling in ONNX pads by constants,
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

from features.encoder import Encoder, difference_images
from features.streams import Stream, open_streams
from features.windows import Windows
from training.checkpoint import Checkpoint
from training.classifier import Classifier
from utils.files import json_bytes, write_whole
from utils.process import MissingFileError, UserError
from video.frames import Resize

FORMAT = "action-recognition onnx 2"
INSTALL = "run pip install -r requirements-onnx.txt"
# How far an exported model's numbers may be from PyTorch's.
TOLERANCE = 1e-3


class OnnxError(UserError):
    """A model cannot be exported, or an exported one cannot be run; the message says what to do."""


class _Clips(nn.Module):
    """The heads, joined."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, padding: Tensor) -> Tensor:
        return self.model.classify(embeddings, padding)


def _write(
    path: Path, module: nn.Module, inputs: dict[str, Tensor], output: str, free: dict[int, Any]
) -> None:
    """Write a module; `free` says which axes of all inputs may have other lengths, and which."""
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
    about: dict[str, Any] = {
        "format": FORMAT,
        "model": model.name,
        "encoder": model.encoder.name,
        "encoder_sha256": model.encoder.sha256(),
        "width": model.width,
        "img_dim": dim,
        "sequence_length": length,
        "frame_stride": checkpoint.frame_stride,
        "fps": checkpoint.fps,
        "window_step": checkpoint.window_step,
        "classes": checkpoint.classes,
        "streams": [],
    }
    encoders, samples, parts = model.encoders(), [], []
    with torch.no_grad():
        for number, encoder in enumerate(encoders):
            file = f"encoder{number + 1 if number else ''}.onnx"
            size = dim if encoder is model.encoder else encoder.spec.input_size
            samples.append((file, _export_encoder(folder / file, encoder, size, numbers)))
        for encoder, stream in open_streams(model.encoder, model.further, model.streams, dim):
            file, (_, embeddings) = samples[encoders.index(encoder)]
            layout = replace(stream.windows, least=stream.windows.frames)
            about["streams"].append(
                {
                    "name": stream.name, "file": file, "width": stream.width, "img_dim": stream.img_dim,
                    "live_frames": layout.frames, "batch_size": encoder.spec.cpu_batch,
                    "windows": asdict(layout), "resize": asdict(stream.resize),
                }
            )  # fmt: skip
            # As large as real ones, and of clips that differ.
            parts.append(embeddings.flatten(0, 1)[torch.randint(3, (3, length), generator=numbers)])
        clips, padding = torch.cat(parts, dim=-1), torch.zeros(3, length, dtype=torch.bool)
        padding[0, : length // 3] = True
        logits = model.classify(clips, padding)
        free = {axis: Dim(name, min=1, max=2**20) for axis, name in enumerate(("clips", "time"))}
        _write(folder / "head.onnx", _Clips(model), {"embeddings": clips, "padding": padding}, "logits", free)
    write_whole(folder / "model.json", json_bytes(about))
    exported = OnnxModel(folder)
    differences = [
        exported.run_encoder(file, windows) - embeddings for file, (windows, embeddings) in samples
    ]
    differences.append(exported.classify(clips, padding) - logits)
    difference = max(values.abs().max().item() for values in differences)
    if not difference <= TOLERANCE:
        raise OnnxError(f"{folder}: its numbers are {difference:.2g} from PyTorch's; do not use it")
    return difference


def _export_encoder(
    path: Path, encoder: Encoder, size: int, numbers: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Write an encoder; returns random windows, and what PyTorch makes of them."""
    shape = (3, encoder.spec.windows.frames, 3, size, size)
    windows = torch.randint(0, 256, shape, dtype=torch.uint8, generator=numbers)
    free = {0: Dim("windows", min=1, max=2**20)}
    _write(path, encoder.normalized(by_pixel=False), {"windows": windows}, "embeddings", free)
    return windows, encoder.embed(windows)


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
        fps: frames/s that it wants of any video; None where it is every `frame_stride`-th of any

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
            self.classes = list(about["classes"])
            self.width, self.img_dim = int(about["width"]), int(about["img_dim"])
            self.sequence_length = int(about["sequence_length"])
            self.fps = about.get("fps")
            self.frame_stride, self.window_step = int(about["frame_stride"]), int(about["window_step"])
            self._streams = [self._stream(**entry) for entry in about["streams"]]
            files = {"head.onnx", *(entry["file"] for entry in about["streams"])}
            self._sessions = {
                name: onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
                for name in files
            }
        except OnnxError:
            raise
        # A damaged file makes the readers fail in any way there is.
        except Exception as error:
            raise OnnxError(f"{folder}: damaged; export it again") from error
        # What the head has no use for is no input of it.
        self._inputs = {entry.name for entry in self._sessions["head.onnx"].get_inputs()}

    def _stream(self, *, file: str, batch_size: int, **entry: Any) -> Stream:
        layout, resize = Windows(**entry.pop("windows")), entry.pop("resize")
        size = resize.pop("size")
        resize = Resize(size=size if isinstance(size, int) else tuple(size), **resize)

        def embed(windows: Tensor) -> Tensor:
            images = difference_images(windows) if layout.context else windows
            return torch.cat([self.run_encoder(file, part) for part in images.split(batch_size)])

        return Stream(layout, resize, **entry, embed=embed, device=self.device, batch_size=batch_size)

    def run_encoder(self, file: str, windows: Tensor) -> Tensor:
        """Embeddings of windows: (N, L, 3, img_dim, img_dim) uint8 -> (N, K, D) float32."""
        given = np.ascontiguousarray(windows.numpy())
        return torch.from_numpy(self._sessions[file].run(None, {"windows": given})[0])

    def open_streams(self, img_dim: int | None = None) -> list[Stream]:
        """As `Classifier.open_streams`.

        Raises: UserError if the frames have another size than it was exported for.
        """
        if img_dim not in (None, self.img_dim):
            raise UserError(
                f"the model was exported for frames of {self.img_dim} pixels; leave out --img_dim, or export "
                "it again"
            )
        return self._streams

    def classify(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """As `Classifier.classify`."""
        if padding is None:
            padding = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        inputs = {"embeddings": embeddings.numpy(), "padding": padding.numpy()}
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        return torch.from_numpy(self._sessions["head.onnx"].run(None, given)[0])
