"""Checkpoints of the original repository (E. Linder-Noren, 2019), which saved a bare state dict.

It had three layouts over time:

    a   lstm.final.*            one-directional, the last time step classifies; the released file
    b   lstm.output_layers.*    bi-directional, every time step classifies, probabilities are averaged
    c   output_layers.*         bi-directional, pooled by attention_layer; without it, the last time step
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from features.encoder import Encoder
from models import build_head
from splits.ucf101 import read_classes
from utils.process import UserError

UCF101_CLASSES = Path(__file__).resolve().parent.parent / "data" / "ucf101_classes.txt"
# What the original's test_on_video.py took where no flag set them.
IMG_DIM, SEQUENCE_LENGTH = 112, 40
# A tensor that every layout has, and none of our own files.
MARK = "encoder.final.0.weight"
ENCODER = "encoder.feature_extractor."


def read(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of the `Checkpoint` that a state dict is of.

    Layout, widths, layers and the number of classes are read from names and shapes.

    Raises: KeyError or RuntimeError if the tensors do not fit together; UserError for other classes.
    """
    classes = read_classes(UCF101_CLASSES)
    if "lstm.final.0.weight" in state:
        output, pooling = "lstm.final.", "last"
        # Its labels came from the sorted folders, those of the later layouts from classInd.txt.
        classes = sorted(classes)
    elif "lstm.output_layers.0.weight" in state:
        output, pooling = "lstm.output_layers.", "average"
    else:
        output, pooling = "output_layers.", "attention" if "attention_layer.weight" in state else "last"
    names = {
        "encoder.final.": "projection.",
        output: "output_layers.",
        "lstm.lstm.": "lstm.",
        "lstm.": "lstm.",
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(ENCODER):
            old = next((prefix for prefix in names if name.startswith(prefix)), "")
            tensors[names.get(old, "") + name.removeprefix(old)] = tensor
    if len(tensors["output_layers.3.bias"]) != len(classes):
        raise UserError(
            f"{path}: {len(tensors['output_layers.3.bias'])} classes, and {UCF101_CLASSES.name} names "
            f"{len(classes)}: put the names that it was trained with there"
        )
    encoder = Encoder("resnet152", pretrained=False, img_dim=IMG_DIM)
    head, sizes = build_head(
        "ConvLSTM", encoder.width, len(classes),
        latent_dim=len(tensors["projection.0.bias"]), sequence_length=SEQUENCE_LENGTH,
        hidden_dim=tensors["lstm.weight_hh_l0"].shape[1],
        lstm_layers=sum(name.startswith("lstm.weight_ih_l") and "reverse" not in name for name in tensors),
        bidirectional="lstm.weight_ih_l0_reverse" in tensors, pooling=pooling,
    )  # fmt: skip
    own = {
        name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith(ENCODER)
    }
    for module, given in ((encoder, own), (head, tensors)):
        # BatchNorm's count of batches is of no use here, and files from before PyTorch 0.4.1 lack it.
        counts = {name: count for name, count in module.state_dict().items() if name.endswith("_tracked")}
        module.load_state_dict({**counts, **given})
    return {
        "encoder": encoder, "head": head.eval(), "model": "ConvLSTM", "sizes": sizes, "classes": classes,
        "sequence_length": SEQUENCE_LENGTH,
    }  # fmt: skip
