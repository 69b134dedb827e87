"""Checkpoints: save and load what training made.

Our own file is a dictionary of tensors and plain values (`FORMAT`). It holds the trained parameters; the
frozen encoder stands in it by name and SHA-256, and with its weights only where they are not those that the
table of encoders gives. Where OpenVINO computed it in 8-bit integers, that network is in the file too.

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
from torch import Tensor

from features.openvino_network import Quantized
from features.streams import pace
from models import MODELS
from training import original
from training.classifier import FROZEN, Classifier
from utils.files import write_whole
from utils.process import MissingFileError, UserError

FORMAT = "action-recognition 2"


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def check_answers(finite: bool) -> None:
    """Refuse a model whose answers are not all `finite`: a damage that no file format shows.

    Raises: CheckpointError if they are not.
    """
    if not finite:
        raise CheckpointError(
            "the model's answers are no numbers: its checkpoint is damaged, or its training diverged; copy "
            "it again, or train it with a lower --learning_rate"
        )


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        model: in eval mode, on the CPU
        classes: class names, by label
        img_dim: height and width in pixels of the frames that it was trained on
        sequence_length: frames of the clips that it was trained on
        split_number: the official split whose training list it has seen; None where the file does not say
        epoch: epochs trained
        settings: flags of the training that it comes from, by name; plain values
        training: what training needs to go on from here, as `run.Run` keeps it; None where that is not kept
        temperature: of the model, fitted on held-out clips; 1 where there were none
    """

    model: Classifier
    classes: list[str]
    img_dim: int
    sequence_length: int
    split_number: int | str | None
    epoch: int
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    temperature: float = 1.0

    @property
    def frame_stride(self) -> int:
        """It was trained on every N-th frame of a video."""
        return int(self.settings.get("frame_stride", 1))

    @property
    def fps(self) -> float | None:
        """Frames/s that it wants of any video; None where it is every `frame_stride`-th of any."""
        return self.settings.get("fps")

    @property
    def window_step(self) -> int:
        """Embeddings from one of the clip that labels a frame to the next."""
        return pace(self.model.encoder.name, self.model.streams).window_step


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, with_encoder: bool = False) -> None:
    """Write a checkpoint beside and rename it, so that `path` is always a whole file.

    Args:
        with_encoder: put the frozen encoder into the file even if the table of encoders gives the same

    Raises: OSError with the bytes needed if it cannot be written.
    """
    model = checkpoint.model
    with_encoder = with_encoder or not model.encoder.pretrained
    state = {
        name: tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if with_encoder or FROZEN not in name
    }
    contents = {
        "format": FORMAT,
        "model": model.name,
        "config": model.config,
        "encoder_sha256": model.encoder.sha256(),
        "quantized": [
            {
                seen: {"graph": own.graph, "weights": own.weights, "sha256": own.sha256}
                for seen, own in encoder.quantized.items()
            }
            for encoder in model.encoders()
        ],
        "further_sha256": [encoder.sha256() for encoder in model.encoders()[1:]],
        "state": state,
        "classes": checkpoint.classes,
        "img_dim": checkpoint.img_dim,
        "sequence_length": checkpoint.sequence_length,
        "split_number": checkpoint.split_number,
        "epoch": checkpoint.epoch,
        "settings": checkpoint.settings,
        "training": checkpoint.training,
        "temperature": checkpoint.temperature,
        "versions": {name: version(name) for name in ("torch", "torchvision")},
    }
    # In memory first, so that the size is known if the disk is full.
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint of this project, or of the original repository in any of its three layouts.

    No weights are downloaded where the file holds the encoder.

    Raises: MissingFileError if there is no such file; CheckpointError if it is truncated, holds code, or is
        no checkpoint that fits; weights.WeightsError if it needs an encoder's weights that cannot be had.
    """
    if (path / "model.json").is_file():
        raise CheckpointError(
            f"{path} is an exported model; test_on_video.py takes it with --backend onnxruntime"
        )
    if not path.is_file():
        raise MissingFileError(f"{path}: no such checkpoint; train.py writes them to model_checkpoints/")
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
            model, classes = original.read(contents)
            if model.num_classes != len(classes):
                raise CheckpointError(
                    f"{path}: {model.num_classes} classes, and {original.UCF101_CLASSES.name} names "
                    f"{len(classes)}: put the names that it was trained with there"
                )
            return Checkpoint(model.eval(), classes, original.IMG_DIM, original.SEQUENCE_LENGTH, None, 0)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the checkpoint's contents do not fit together: {reason}") from error
    raise CheckpointError(f"{path}: not a checkpoint of this project nor of the original Action-Recognition")


def _quantized(path: Path, networks: Any) -> dict[str, Quantized]:
    """Quantised networks as a checkpoint holds them. Raises: CheckpointError if they are damaged."""
    try:
        found = {seen: Quantized(parts["graph"], parts["weights"]) for seen, parts in networks.items()}
        if all(network.sha256 == networks[seen]["sha256"] for seen, network in found.items()):
            return found
    except (AttributeError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path}: damaged; its quantised network is not the one that was written")


def _from_own(path: Path, contents: dict[str, Any]) -> Checkpoint:
    if contents["model"] not in MODELS:
        raise CheckpointError(
            f"{path}: unknown model {contents['model']!r}; this version has {', '.join(MODELS)}"
        )
    state: dict[str, Tensor] = contents["state"]
    with_encoder = any(FROZEN in name for name in state)
    model = Classifier(contents["model"], **contents["config"], pretrained=not with_encoder)
    if not with_encoder:
        encoder = {name: tensor for name, tensor in model.state_dict().items() if FROZEN in name}
        state = {**encoder, **state}
    model.load_state_dict(state)
    digests = [contents["encoder_sha256"], *contents["further_sha256"]]
    for own, digest in zip(model.encoders(), digests, strict=True):
        if own.sha256() != digest:
            raise CheckpointError(
                f"{path}: trained on other weights of {own.name} than the ones here "
                f"(SHA-256 {digest[:12]}... there); put those in their place"
            )
    for own, networks in zip(model.encoders(), contents["quantized"], strict=True):
        own.quantized = _quantized(path, networks)
    temperature = contents["temperature"]
    if not (isinstance(temperature, float) and math.isfinite(temperature) and temperature > 0):
        raise CheckpointError(f"{path}: damaged; its temperature is {temperature!r}")
    model.temperature = temperature
    if len(contents["classes"]) != model.num_classes:
        raise CheckpointError(f"{path}: {len(contents['classes'])} names for {model.num_classes} classes")
    return Checkpoint(
        model.eval(),
        list(contents["classes"]),
        int(contents["img_dim"]),
        int(contents["sequence_length"]),
        contents["split_number"],
        int(contents["epoch"]),
        dict(contents["settings"]),
        contents["training"],
        model.temperature,
    )
