"""Networks for videos of Hugging Face's package transformers, as hf/<name>; no code of a hub is run.

V-JEPA 2 (Assran et al., 2025), VideoMAE (Tong et al., NeurIPS 2022), TimeSformer (Bertasius et al., ICML
2021) and ViViT (Arnab et al., ICCV 2021).

Shapes: N clips, T frames, H x W pixels, K embeddings, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.hub import CONFIG, HF, hub_file, read_json, transformers_package
from features.weights import State, WeightsError, first_line, read_weights
from features.windows import Windows
from utils.process import MissingFileError, UserError
from video.frames import Resize

PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Pillow's numbers for them; those that PyTorch has too.
RESAMPLING = {2: "bilinear", 3: "bicubic"}

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """What sets a kind of networks apart in transformers.

    Attributes:
        model: its class
        unused: beginnings of the names of tensors that an encoder has no use for
        frames, side: what its configuration calls the frames of a clip, and their height and width
        before: tokens that stand before those of the clip
        by_time: tokens go through the positions of one time step first; otherwise through time
        offset: pixels go to [-1, 1] before they are normalised, unless its processor's file says otherwise
        made_with, called_with: further arguments
    """

    model: str
    unused: tuple[str, ...]
    frames: str = "num_frames"
    side: str = "image_size"
    before: int = 0
    by_time: bool = True
    offset: bool = False
    made_with: Mapping[str, Any] = field(default_factory=dict)
    called_with: Mapping[str, Any] = field(default_factory=dict)


# By the `model_type` of a configuration. TimeSformer's tokens are (position, time), others' (time, position).
KINDS = {
    "vjepa2": Kind(
        "VJEPA2Model",
        ("predictor.", "pooler.", "classifier."),
        frames="frames_per_clip",
        side="crop_size",
        called_with={"skip_predictor": True},
    ),
    "videomae": Kind(
        "VideoMAEModel", ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")
    ),
    "timesformer": Kind("TimesformerModel", ("classifier.",), before=1, by_time=False),
    "vivit": Kind(
        "VivitModel",
        ("pooler.", "classifier."),
        before=1,
        offset=True,
        made_with={"add_pooling_layer": False},
    ),
}


class VideoTransformer(nn.Module):
    """A network of transformers whose tokens are averaged over space.

    Args:
        network: gives (N, tokens, D) of (N, T, 3, H, W)
        steps: K
    """

    def __init__(self, network: nn.Module, kind: Kind, steps: int) -> None:
        super().__init__()
        self.network, self._kind, self._steps = network, kind, steps

    def forward(self, clips: Tensor) -> Tensor:
        """Embeddings of each few frames: (N, 3, T, H, W) normalised -> (N, K, D)."""
        tokens = self.network(clips.transpose(1, 2), **self._kind.called_with).last_hidden_state
        tokens = tokens[:, self._kind.before :]
        if self._kind.by_time:
            return tokens.unflatten(1, (self._steps, -1)).mean(2)
        return tokens.unflatten(1, (-1, self._steps)).mean(1)


@dataclass(frozen=True)
class HuggingFace:
    """A network of transformers: what its own files say of it, and how it is made.

    Attributes:
        name: of a model on the hub, or of a folder
        kind: a key of `KINDS`
        width: D
        side: H = W, the only one that it takes
        settings: SHA-256 of its files of settings
        windows, mean, std, resize, fps: as `EncoderSpec` has them
    """

    name: str
    kind: str
    width: int
    side: int
    settings: str
    windows: Windows
    mean: Colour
    std: Colour
    resize: Resize
    fps: float | None

    def __call__(self, *, pretrained: bool, state: State | None = None) -> VideoTransformer:
        """Make it; a `state` has the names of a file that transformers writes.

        Raises: WeightsError if weights cannot be had or do not fit, or if a tensor of them would go unused.
        """
        kind, config = KINDS[self.kind], _config(self.name, KINDS[self.kind])
        if state is None and pretrained:
            state = _read(self.name)
        if state is None:
            network = _model(kind, self.name)(config, **kind.made_with)
        else:
            network = _loaded(self.name, kind, config, state)
        if hasattr(network, "predictor"):
            del network.predictor
        return VideoTransformer(network, kind, self.windows.frames // self.windows.hop)


def huggingface_network(name: str) -> HuggingFace:
    """What the files of a network say of it: its configuration and its processor's; weights are not read.

    Args:
        name: of a model on the hub, such as facebook/vjepa2-vitl-fpc64-256, or a folder that holds one

    Raises: WeightsError without transformers, or if the files cannot be had; UserError if it is no network
        for videos, or one that cannot be an encoder.
    """
    path = hub_file(name, CONFIG)
    if path is None:
        raise WeightsError(f"{HF}{name} has no {CONFIG}; name the folder that transformers wrote")
    kind_name = read_json(path).get("model_type")
    if kind_name not in KINDS:
        raise UserError(f"{HF}{name} is of the kind {kind_name!r}; choose one of {', '.join(KINDS)}")
    kind = KINDS[kind_name]
    config = _config(name, kind)
    side, tubelet = getattr(config, kind.side), getattr(config, "tubelet_size", 1)
    height, width = (side, side) if isinstance(side, int) else side
    hop, frames = tubelet if isinstance(tubelet, int) else tubelet[0], getattr(config, kind.frames)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None)
    if (channels, height) != (3, width) or hop < 1 or frames % hop:
        raise UserError(
            f"{HF}{name} takes {frames} frames, {hop} at a time, of {channels} x {height} x {width}; an "
            "encoder's are square RGB, and whole steps"
        )
    if getattr(config, "attention_type", None) == "space_only":
        raise UserError(f"{HF}{name} sees each frame by itself; use a network for photographs, timm/<name>")
    return HuggingFace(
        name,
        kind_name,
        config.hidden_size,
        height,
        hashlib.sha256(b"\0".join(file.read_bytes() for file in (path, _processor(name)))).hexdigest(),
        Windows(frames, hop, frames),
        *_preprocessing(name, kind),
    )


def _processor(name: str) -> Path:
    path = hub_file(name, *PROCESSORS)
    if path is None:
        raise WeightsError(
            f"{HF}{name} has no {PROCESSORS[0]} or {PROCESSORS[1]}, which tells how frames are normalised; "
            f"put the one that was released with it beside {CONFIG}"
        )
    return path


def _preprocessing(name: str, kind: Kind) -> tuple[Colour, Colour, Resize, float | None]:
    """Mean, standard deviation, resizing and frames/s that the file of its processor tells."""
    path = _processor(name)
    told = read_json(path)
    offset = told.get("offset", kind.offset)
    scale = 255 * told.get("rescale_factor", 1 / 127.5 if offset else 1 / 255)
    if not told.get("do_rescale", True):
        scale, offset = 255.0, False
    mean, std = [0.0] * 3, [1.0] * 3
    try:
        if told.get("do_normalize", True):
            mean, std = told["image_mean"], told["image_std"]
        size = _size(told["size"])
        crop = _size(told["crop_size"]) if told.get("do_center_crop", "crop_size" in told) else size
        mode = RESAMPLING[told.get("resample", 2)]
        if len(mean) != 3 or len(std) != 3:
            raise KeyError("a mean and a deviation for each of three colours")
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: {first_line(error)} is missing, or of a kind that is not known here; use the file that "
            "was released with the network"
        ) from error
    # Pixels in [0, 1] become (pixels scale - offset - mean) / std.
    means, stds = [(value + bool(offset)) / scale for value in mean], [value / scale for value in std]
    resize = Resize(crop if isinstance(crop, int) else crop[0], size, mode)
    fps = told.get("fps")
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2]), resize, float(fps) if fps else None


def _size(told: int | Mapping[str, int]) -> int | tuple[int, int]:
    """Of the shorter side, or height and width."""
    if isinstance(told, int):
        return told
    return told["shortest_edge"] if "shortest_edge" in told else (told["height"], told["width"])


def _model(kind: Kind, name: str) -> Any:
    return getattr(transformers_package(name), kind.model)


def _config(name: str, kind: Kind) -> Any:
    path = hub_file(name, CONFIG)
    assert path
    with _quiet(name):
        try:
            return _model(kind, name).config_class.from_pretrained(path.parent, local_files_only=True)
        # Each version of transformers checks its fields in its own way.
        except Exception as error:
            raise WeightsError(f"{path}: damaged ({first_line(error)}); download it again") from error


def _loaded(name: str, kind: Kind, config: Any, state: State) -> nn.Module:
    """The network with these weights, each of which is used, or has no use and a name that says so."""
    model = _model(kind, name)
    with _quiet(name):
        network, found = model.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, **kind.made_with,
        )  # fmt: skip

    def counts(key: str) -> bool:
        return not key.removeprefix(model.base_model_prefix + ".").startswith(kind.unused)

    unknown, missing = found["unexpected_keys"], found["missing_keys"]
    wrong = sorted(filter(counts, {*missing, *(key for key, *_ in found["mismatched_keys"])}))
    if wrong:
        raise WeightsError(
            f"the weights are not those of {HF}{name}: {len(wrong)} of its {len(network.state_dict())} "
            f"tensors are not there or have another shape, {wrong[0]} for one; name the encoder that they "
            "are of"
        )
    unused = sorted(filter(counts, unknown))
    # Two names of a file, an old and a new one, may mean the same tensor; one of them would be lost.
    if not unused and len(state) - len(unknown) > len(network.state_dict()) - len(missing):
        unused = sorted(key for key in state if key not in network.state_dict() and counts(key))
    if unused:
        raise WeightsError(
            f"{HF}{name}: transformers has no use for {unused[0]} of the weights, so that its embeddings "
            "would be wrong; pip install -U transformers, or use --encoder i3d"
        )
    return network


def _read(name: str) -> State:
    """The released weights."""
    path = hub_file(name, *WEIGHTS)
    if path is None:
        raise WeightsError(
            f"{HF}{name} has no {WEIGHTS[0]}; put it beside {CONFIG}, or use --encoder_weights"
        )
    if path.suffix != ".json":
        return read_weights(path)[0]
    state: dict[str, Tensor] = {}
    for file in sorted(set(read_json(path)["weight_map"].values())):
        part = hub_file(name, file)
        if part is None:
            raise MissingFileError(f"{path.parent / file}: a part of the weights is missing")
        state |= read_weights(part)[0]
    return state


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without transformers' own bars and reports, which come between those of the commands."""
    logging = transformers_package(name).utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
