"""Save and load what training made, the original repository's checkpoints included.

Our own file is a dictionary of tensors and plain values (`FORMAT`). It holds the trained parameters; the
frozen encoder stands in it by name and SHA-256, and with its weights only where they are not those that the
table of encoders gives.

The original (E. Linder-Noren, 2019) saved a bare state dict, in three layouts over time:

    a   lstm.final.*            one-directional, the last time step classifies
    b   lstm.output_layers.*    bi-directional, every time step classifies, probabilities are averaged
    c   output_layers.*         bi-directional, pooled by attention_layer; without it, the last time step

Nothing is loaded that could run code: `weights_only=True` everywhere.

    python3 checkpoint.py export model_checkpoints/best.pth best_with_encoder.pth
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import cli
from files import write_whole
from models import FROZEN, MODELS, Classifier
from splits import read_classes

FORMAT = "action-recognition 2"
# Before there were several models and streams: the only head had no name of its own.
FORMAT_1 = "action-recognition 1"
OLD_NAMES = {
    "encoder.final.": "projection.",
    **{name: name for name in ("lstm.", "attention_layer.", "output_layers.")},
}
UCF101_CLASSES = Path(__file__).resolve().parent / "data" / "ucf101_classes.txt"
# What the original's test_on_video.py took where no flag said otherwise.
ORIGINAL_IMG_DIM, ORIGINAL_SEQUENCE_LENGTH = 112, 40


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


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
    """

    model: Classifier
    classes: list[str]
    img_dim: int
    sequence_length: int
    split_number: int | str | None
    epoch: int
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None

    @property
    def frame_stride(self) -> int:
        """Every how manieth frame of a video it was trained on."""
        return int(self.settings.get("frame_stride", 1))


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
        if with_encoder or not name.startswith(FROZEN)
    }
    contents = {
        "format": FORMAT,
        "model": model.name,
        "config": model.config,
        "encoder_sha256": model.encoder.sha256(),
        "state": state,
        "classes": checkpoint.classes,
        "img_dim": checkpoint.img_dim,
        "sequence_length": checkpoint.sequence_length,
        "split_number": checkpoint.split_number,
        "epoch": checkpoint.epoch,
        "settings": checkpoint.settings,
        "training": checkpoint.training,
        "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
    }
    # In memory first, so that the size is known if the disk is full.
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint of this project, or of the original repository in any of its three layouts.

    Of the original's, layout, widths, layers and the number of classes are read from the shapes; class names
    are those of data/ucf101_classes.txt. No weights are downloaded where the file holds the encoder.

    Raises: FileNotFoundError if there is no such file; CheckpointError if it is truncated, holds code, or is
        no checkpoint that fits; encoders.WeightsError if it needs an encoder's weights that cannot be had.
    """
    if (path / "model.json").is_file():
        raise CheckpointError(
            f"{path} is an exported model; test_on_video.py takes it with --backend onnxruntime"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; train.py writes them to model_checkpoints/")
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
        if isinstance(contents, dict) and contents.get("format") in (FORMAT, FORMAT_1):
            return _from_own(path, contents)
        if isinstance(contents, dict) and "encoder.final.0.weight" in contents:
            return _from_original(path, contents)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: the checkpoint's contents do not fit together: {reason}") from error
    raise CheckpointError(f"{path}: not a checkpoint of this project nor of the original Action-Recognition")


def _from_own(path: Path, contents: dict[str, Any]) -> Checkpoint:
    if contents["model"] not in MODELS:
        raise CheckpointError(
            f"{path}: unknown model {contents['model']!r}; this version has {', '.join(MODELS)}"
        )
    state: dict[str, Tensor] = contents["state"]
    if contents["format"] == FORMAT_1:
        state = _renamed(state, OLD_NAMES)
    with_encoder = any(name.startswith(FROZEN) for name in state)
    model = Classifier(contents["model"], **contents["config"], pretrained=not with_encoder)
    if not with_encoder:
        encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(FROZEN)}
        state = {**encoder, **state}
    model.load_state_dict(state)
    if model.encoder.sha256() != contents["encoder_sha256"]:
        raise CheckpointError(
            f"{path}: trained on other weights of {model.encoder.name} than the ones here "
            f"(SHA-256 {contents['encoder_sha256'][:12]}... there); put those in their place"
        )
    if len(contents["classes"]) != model.num_classes:
        raise CheckpointError(f"{path}: {len(contents['classes'])} names for {model.num_classes} classes")
    return Checkpoint(
        model.eval(),
        list(contents["classes"]),
        int(contents["img_dim"]),
        int(contents["sequence_length"]),
        contents["split_number"],
        int(contents["epoch"]),
        dict(contents.get("settings") or {}),
        contents.get("training"),
    )


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a model without streams, under the names they have in one; the longest match holds."""
    found = {}
    for name, tensor in state.items():
        old = max((one for one in names if name.startswith(one)), key=len, default="")
        found[f"heads.rgb.{names[old]}{name.removeprefix(old)}" if old else name] = tensor
    return found


def _from_original(path: Path, state: Mapping[str, Tensor]) -> Checkpoint:
    bidirectional = "lstm.lstm.weight_ih_l0_reverse" in state
    if "lstm.final.0.weight" in state:
        head, pooling = "lstm.final.", "last"
    elif "lstm.output_layers.0.weight" in state:
        head, pooling = "lstm.output_layers.", "average"
    else:
        head, pooling = "output_layers.", "attention" if "attention_layer.weight" in state else "last"
    state = _renamed(state, {**OLD_NAMES, "lstm.lstm.": "lstm.", head: "output_layers."})
    num_classes = len(state["heads.rgb.output_layers.3.bias"])
    model = Classifier(
        "ConvLSTM",
        num_classes,
        encoder="resnet152",
        latent_dim=len(state["heads.rgb.projection.0.bias"]),
        hidden_dim=state["heads.rgb.lstm.weight_hh_l0"].shape[1],
        lstm_layers=sum(
            name.startswith("heads.rgb.lstm.weight_ih_l") and "reverse" not in name for name in state
        ),
        bidirectional=bidirectional,
        pooling=pooling,
        pretrained=False,
    )
    # BatchNorm's count of batches is of no use here, and files from before PyTorch 0.4.1 lack it.
    counts = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")
    }
    model.load_state_dict({**counts, **state})
    classes = read_classes(UCF101_CLASSES)
    if num_classes != len(classes):
        raise CheckpointError(
            f"{path}: {num_classes} classes, and {UCF101_CLASSES.name} names {len(classes)}: "
            "put the names that it was trained with there"
        )
    return Checkpoint(model.eval(), classes, ORIGINAL_IMG_DIM, ORIGINAL_SEQUENCE_LENGTH, None, 0)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of checkpoint.py."""
    parser = argparse.ArgumentParser(description="Work on a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write one file that holds the frozen encoder too, and works without any download"
    )
    export.add_argument("source", type=Path, help="checkpoint of this project or of the original")
    export.add_argument("target", type=Path, help="new file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.target.exists():
        parser.error(f"{args.target} is there already; choose another name")
    checkpoint = replace(load_checkpoint(args.source), training=None)
    cli.make_writable_folder(args.target.parent)
    save_checkpoint(args.target, checkpoint, with_encoder=True)
    print(
        f"wrote {args.target}: {args.target.stat().st_size / 1e6:,.1f} MB, with "
        f"{checkpoint.model.encoder.name}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
