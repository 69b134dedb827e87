"""Weights of frozen networks: read from files, loaded, and told apart."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.process import MissingFileError, UserError

State = Mapping[str, Tensor]


class WeightsError(UserError):
    """Pretrained weights cannot be had or do not fit; the message says what to do instead."""


def load_weights(network: nn.Module, state: State, name: str) -> None:
    """Load `state`, which may hold more than the network: a classifier, most often.

    Raises: WeightsError if a tensor of the network is not there, or has another shape.
    """
    own = network.state_dict()
    # Files from before PyTorch 0.4.1 lack BatchNorm's count of batches, which nothing uses here.
    needed = [key for key in own if not key.endswith("num_batches_tracked") or key in state]
    wrong = [key for key in needed if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise WeightsError(
            f"the weights are not those of {name}: {len(wrong)} of its {len(own)} tensors are not there or "
            f"have another shape, {wrong[0]} for one; name the encoder that they are of"
        )
    network.load_state_dict({**own, **{key: state[key] for key in needed}})


def read_weights(path: Path) -> tuple[State, str]:
    """Tensors of a file of weights, .safetensors or what torch.save writes, and the file's SHA-256.

    A dictionary that holds them under "state_dict" or "model" is opened. No code in the file is run.

    Raises: MissingFileError if there is no such file, WeightsError if it is none of tensors.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of weights")
    contents = path.read_bytes()
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(contents)
        else:
            state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors; run pip install safetensors") from error
    # A damaged file makes the readers fail in any way there is.
    except Exception as error:
        raise WeightsError(
            f"{path}: damaged, or no file of plain tensors; others could run code and are not loaded"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: not a dictionary of tensors by name")
    return state, hashlib.sha256(contents).hexdigest()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]
