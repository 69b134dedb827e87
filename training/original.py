"""Checkpoints of the original repository (E. Linder-Noren, 2019), which saved a bare state dict.

It had three layouts over time:

    a   lstm.final.*            one-directional, the last time step classifies; the released file
    b   lstm.output_layers.*    bi-directional, every time step classifies, probabilities are averaged
    c   output_layers.*         bi-directional, pooled by attention_layer; without it, the last time step
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from splits.ucf101 import read_classes
from training.classifier import Classifier

UCF101_CLASSES = Path(__file__).resolve().parent.parent / "data" / "ucf101_classes.txt"
# What the original's test_on_video.py took where no flag set them.
IMG_DIM, SEQUENCE_LENGTH = 112, 40
# A tensor that every layout has, and none of our own files.
MARK = "encoder.final.0.weight"
# Of the head, then and in a model whose heads have names.
OLD_NAMES = {
    "encoder.final.": "projection.",
    **{name: name for name in ("lstm.", "attention_layer.", "output_layers.")},
}


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a model without streams, under the names they have in one; the longest match holds."""
    tensors = {}
    for name, tensor in state.items():
        old = max((prefix for prefix in names if name.startswith(prefix)), key=len, default="")
        tensors[f"heads.rgb.{names[old]}{name.removeprefix(old)}" if old else name] = tensor
    return tensors


def read(state: Mapping[str, Tensor]) -> tuple[Classifier, list[str]]:
    """The model that a state dict is of, and the names of UCF-101's classes in the order of its labels.

    Layout, widths, layers and the number of classes are read from names and shapes.

    Raises: KeyError or RuntimeError if the tensors do not fit together.
    """
    bidirectional = "lstm.lstm.weight_ih_l0_reverse" in state
    classes = read_classes(UCF101_CLASSES)
    if "lstm.final.0.weight" in state:
        head, pooling = "lstm.final.", "last"
        # Its labels came from the sorted folders, those of the later layouts from classInd.txt.
        classes = sorted(classes)
    elif "lstm.output_layers.0.weight" in state:
        head, pooling = "lstm.output_layers.", "average"
    else:
        head, pooling = "output_layers.", "attention" if "attention_layer.weight" in state else "last"
    state = renamed(state, {**OLD_NAMES, "lstm.lstm.": "lstm.", head: "output_layers."})
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
    return model, classes
