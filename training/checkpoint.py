"""Checkpoints: save and load what training made.

Our own file is a dictionary of tensors and plain values (`FORMAT`). It holds the trained head. The frozen
encoder stands in it by name and SHA-256, and with its weights only where they are not the released ones.

Nothing is loaded that could run code: `weights_only=True` everywhere.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from features.encoder import Encoder
from models import MODELS, Head, build_head
from training import original
from utils.files import write_whole
from utils.process import MissingFileError, UserError

FORMAT = "action-recognition 3"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def check_finite(finite: bool) -> None:
    """Refuse a model whose logits are not all `finite`: a damage that no file format shows.

    Raises: CheckpointError if they are not.
    """
    if not finite:
        raise CheckpointError(
            "the model's logits are not finite: its checkpoint is damaged, or its training diverged; copy it "
            "again, or train it with a lower --learning_rate"
        )


@dataclass
class Checkpoint:
    """A trained model, and how it wants its frames.

    Attributes:
        encoder: frozen, on the CPU, its `img_dim` that of the training
        head: trained, in eval mode
        model: name of the head in `MODELS`
        sizes: what the head was built with, by keyword
        classes: class names, by label
        sequence_length: embeddings of a clip
        frame_stride: it was trained on every N-th frame of a video
        split_number: split whose training list it has seen; None where the file does not say
        epoch: epochs trained
        settings: flags of its training, by name; plain values
        training: what it takes to go on from here; None where that is not kept
        fps: frames/s that it wants of any video; None where it wants every `frame_stride`-th frame
        change_cost: what a change of labels along a video costs; None where nothing was chosen
    """

    encoder: Encoder
    head: Head
    model: str
    sizes: dict[str, Any]
    classes: list[str]
    sequence_length: int
    frame_stride: int = 1
    split_number: int | None = None
    epoch: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    fps: float | None = None
    change_cost: float | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, with_encoder: bool = False) -> None:
    """Write a checkpoint beside and rename it, so that `path` is always a whole file.

    Args:
        with_encoder: put the frozen encoder into the file even if its weights are the released ones

    Raises: UserError with the bytes needed if it cannot be written.
    """
    encoder, head = checkpoint.encoder, checkpoint.head
    with_encoder = with_encoder or not encoder.pretrained

    def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}

    contents = {
        "format": FORMAT,
        "model": checkpoint.model,
        "sizes": checkpoint.sizes,
        "head": tensors(head),
        "temperature": head.temperature,
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256(),
        "encoder_state": tensors(encoder) if with_encoder else None,
        "img_dim": encoder.img_dim,
        "window": encoder.windows.frames,
        "finetuned": encoder.finetuned,
        "classes": checkpoint.classes,
        "sequence_length": checkpoint.sequence_length,
        "frame_stride": checkpoint.frame_stride,
        "fps": checkpoint.fps,
        "change_cost": checkpoint.change_cost,
        "split_number": checkpoint.split_number,
        "epoch": checkpoint.epoch,
        "settings": checkpoint.settings,
        "training": checkpoint.training,
        "versions": {name: version(name) for name in ("torch", "torchvision")},
    }
    # In memory first, so that the size is known if the disk is full.
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load a checkpoint of this project, or of the original repository in any of its three layouts.

    No weights are downloaded where the file holds the encoder.

    Raises: MissingFileError if there is no such file; CheckpointError if it is truncated, holds code, or is
        no checkpoint that fits; WeightsError if it needs an encoder's weights that cannot be had.
    """
    path = Path(path)
    if (path / "model.json").is_file():
        raise CheckpointError(
            f"{path} is an exported model; test_on_video.py takes it with --backend onnxruntime"
        )
    if not path.is_file():
        files = sorted(str(file.relative_to(path.parent)) for file in path.parent.rglob("*.pth"))
        there = ", ".join(files[:10]) or "none"
        raise MissingFileError(
            f"{path.absolute()}: no such checkpoint; in that folder: {there}; train.py writes some"
        )
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it is no checkpoint, or one that could run code; only plain tensors are loaded"
        ) from error
    # A damaged file makes the unpickler fail in any way there is.
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint is truncated or damaged; copy or train it again"
        ) from error
    try:
        if isinstance(contents, dict) and "format" in contents:
            if contents["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: of another version of this project, {contents['format']!r}, and this one has "
                    f"{FORMAT!r}; train it anew"
                )
            return _from_own(path, contents)
        if isinstance(contents, dict) and original.MARK in contents:
            return Checkpoint(**original.read(path, contents))
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the checkpoint's contents do not fit together: {reason}") from error
    raise CheckpointError(f"{path}: not a checkpoint of this project nor of the original Action-Recognition")


def _from_own(path: Path, contents: dict[str, Any]) -> Checkpoint:
    name, classes = contents["model"], list(contents["classes"])
    if name not in MODELS:
        raise CheckpointError(f"{path}: unknown model {name!r}; this version has {', '.join(MODELS)}")
    state = contents["encoder_state"]
    encoder = Encoder(
        contents["encoder"], pretrained=state is None, img_dim=contents["img_dim"],
        window=contents.get("window"), finetuned=contents.get("finetuned", False),
    )  # fmt: skip
    if state is not None:
        encoder.load_state_dict(state)
    if encoder.sha256() != contents["encoder_sha256"]:
        raise CheckpointError(
            f"{path}: trained on other weights of {encoder.name} than the ones here (SHA-256 "
            f"{contents['encoder_sha256'][:12]}... there); put those in their place"
        )
    head, sizes = build_head(name, encoder.width, len(classes), **contents["sizes"])
    head.load_state_dict(contents["head"])
    temperature = contents["temperature"]
    if not (isinstance(temperature, float) and math.isfinite(temperature) and temperature > 0):
        raise CheckpointError(f"{path}: damaged; its temperature is {temperature!r}")
    head.temperature = temperature
    return Checkpoint(
        encoder, head.eval(), name, sizes, classes, int(contents["sequence_length"]),
        int(contents["frame_stride"]), contents["split_number"], int(contents["epoch"]),
        dict(contents["settings"]), contents["training"], contents["fps"], contents.get("change_cost"),
    )  # fmt: skip
