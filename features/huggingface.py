"""Networks for videos of the package transformers, as hf/<name or folder>; no code of a hub is run.

V-JEPA 2 (Assran et al., 2025), VideoMAE (Tong et al., NeurIPS 2022), TimeSformer (Bertasius et al., ICML
2021) and ViViT (Arnab et al., ICCV 2021).

Shapes: N clips, T frames, H x W pixels, K embeddings, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.weights import State, WeightsError, first_line
from features.windows import Windows
from utils.process import MissingFileError, UserError
from video.frames import Resize

HF = "hf/"
# Pillow's numbers for the modes of PyTorch's interpolation.
RESAMPLING = {2: "bilinear", 3: "bicubic"}

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """How a kind of networks differs from the others in transformers.

    Attributes:
        unused: beginnings of the names of tensors that an encoder has no use for
        frames, side: what its configuration calls the frames of a clip, and their height and width
        before: tokens that stand before those of the clip
        by_time: tokens go through the positions of one time step first; otherwise through time
        options: arguments that build it without its last layers
        call: arguments of each call
    """

    unused: tuple[str, ...]
    frames: str = "num_frames"
    side: str = "image_size"
    before: int = 0
    by_time: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


# By the `model_type` of a configuration. TimeSformer's tokens are (position, time), others' (time, position).
KINDS = {
    "vjepa2": Kind(
        ("predictor.", "pooler.", "classifier."),
        "frames_per_clip",
        "crop_size",
        call={"skip_predictor": True},
    ),
    "videomae": Kind(("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")),
    "timesformer": Kind(("classifier.",), before=1, by_time=False),
    "vivit": Kind(("pooler.", "classifier."), before=1, options={"add_pooling_layer": False}),
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
        """Embeddings of each few frames: (N, 3, T, H, W) normalized -> (N, K, D)."""
        tokens = self.network(clips.transpose(1, 2), **self._kind.call).last_hidden_state
        tokens = tokens[:, self._kind.before :]
        if self._kind.by_time:
            return tokens.unflatten(1, (self._steps, -1)).mean(2)
        return tokens.unflatten(1, (-1, self._steps)).mean(1)


@dataclass(frozen=True)
class HuggingFace:
    """A network of transformers: what its own files say of it, and how it is built.

    Attributes:
        name: of a model on the hub, or of a folder
        kind: its entry in `KINDS`
        config: its configuration
        side: height and width of its frames, the only ones that it takes
        settings: SHA-256 of what its files say, weights aside
        windows, mean, std, resize, fps: as `EncoderSpec` has them
    """

    name: str
    kind: Kind
    config: Any
    side: int
    settings: str
    windows: Windows
    mean: Color
    std: Color
    resize: Resize
    fps: float | None

    def __call__(self, *, pretrained: bool, state: State | None = None) -> VideoTransformer:
        """Build it; a `state` has the names of a file that transformers writes.

        Raises: WeightsError if weights cannot be had or do not fit, or if a tensor of them would go unused.
        """
        from transformers import AutoModel

        if state is None and not pretrained:
            network = AutoModel.from_config(self.config, **self.kind.options)
        else:
            network = self._loaded(state)
        if hasattr(network, "predictor"):
            del network.predictor
        return VideoTransformer(network, self.kind, self.windows.frames // self.windows.hop)

    def _loaded(self, state: State | None) -> nn.Module:
        """With these weights or the released ones, each of which is used, or is of the kind's `unused`."""
        from transformers import MODEL_MAPPING, AutoModel

        options = {
            "config": self.config, "dtype": torch.float32, "output_loading_info": True,
            "ignore_mismatched_sizes": True, **self.kind.options,
        }  # fmt: skip
        model: Any = MODEL_MAPPING[type(self.config)]
        with _quiet():
            if state is not None:
                network, found = model.from_pretrained(None, state_dict=dict(state), **options)
            else:
                network, found = _from_hub(AutoModel.from_pretrained, self.name, **options)

        def counts(key: str) -> bool:
            return not key.removeprefix(model.base_model_prefix + ".").startswith(self.kind.unused)

        wrong = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        if wrong := set(filter(counts, wrong)):
            raise WeightsError(
                f"the weights are not those of {HF}{self.name}: {len(wrong)} of its "
                f"{len(network.state_dict())} tensors are not there or have another shape, {min(wrong)} for "
                "one; name the encoder that they are of"
            )
        if unused := sorted(filter(counts, found["unexpected_keys"])):
            raise WeightsError(
                f"{HF}{self.name}: transformers has no use for {unused[0]} of the weights, so that its "
                "embeddings would be wrong; pip install -U transformers, or use --encoder i3d"
            )
        return network


def huggingface_network(name: str) -> HuggingFace:
    """What the files of a network say of it: its configuration and its processor's; weights are not read.

    Args:
        name: of a model on the hub, such as facebook/vjepa2-vitl-fpc64-256, or a folder that holds one

    Raises: WeightsError without transformers, or if the files cannot be had; UserError if it is no network
        for videos, or one that cannot be an encoder.
    """
    try:
        from transformers import AutoConfig, AutoVideoProcessor
        from transformers.utils import cached_file
    except ImportError as error:
        raise WeightsError(
            f"{HF}{name} needs the package transformers; run pip install -r requirements-hf.txt"
        ) from error
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise MissingFileError(f"{HF}{name}: no such folder; name the one that holds a model's config.json")
    with _quiet():
        path = _from_hub(cached_file, name, filename="config.json")
        config = _from_hub(AutoConfig.from_pretrained, name)
        if config.model_type not in KINDS:
            raise UserError(
                f"{HF}{name} is of the kind {config.model_type!r}; choose one of {', '.join(KINDS)}"
            )
        processor = _from_hub(AutoVideoProcessor.from_pretrained, name)
    kind = KINDS[config.model_type]
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
        raise UserError(f"{HF}{name} sees each frame by itself; use an image network, timm/<name>")
    preprocessing = _preprocessing(name, processor)
    digest = hashlib.sha256(Path(path).read_bytes() + repr(preprocessing).encode())
    return HuggingFace(
        name, kind, config, height, digest.hexdigest(), Windows(frames, hop, frames), *preprocessing
    )


def _preprocessing(name: str, processor: Any) -> tuple[Color, Color, Resize, float | None]:
    """Mean, standard deviation, resizing and frames/s of a processor."""
    try:
        size = _size(processor.size)
        crop = _size(processor.crop_size) if processor.do_center_crop else size
        resize = Resize(crop if isinstance(crop, int) else crop[0], size, RESAMPLING[processor.resample])
        # What becomes of 0 and of 255: each kind has its own way to scale and to shift.
        video = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
        normalized = processor(video, return_tensors="pt", do_resize=False, do_center_crop=False)
        black, white = next(iter(normalized.values()))[0, :, :, 0, 0].double()
        std = 1 / (white - black)
        mean = -black * std
    except Exception as error:
        raise WeightsError(
            f"{HF}{name}: its processor resizes or normalizes in a way that is not known here "
            f"({first_line(error)}); use the file that was released with the network"
        ) from error
    means, stds = [tuple(round(value, 7) for value in values.tolist()) for values in (mean, std)]
    return means, stds, resize, float(processor.fps) if processor.fps else None


def _size(size: Any) -> int | tuple[int, int]:
    """Of the shorter side, or height and width."""
    return int(size.shortest_edge) if size.shortest_edge else (int(size.height), int(size.width))


def _from_hub(load: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """What one of transformers' functions loads: of a folder, of this machine, or of the hub.

    Raises: WeightsError if it cannot be had.
    """
    # What was downloaded before works without a network, and without waiting for one.
    with contextlib.suppress(Exception):
        return load(name, local_files_only=True, **arguments)
    try:
        return load(name, **arguments)
    # No network, no such model, a damaged file, a full disk: the way out is the same.
    except Exception as error:
        raise WeightsError(
            f"{HF}{name} cannot be had ({first_line(error)}); download its folder, with configuration, "
            f"processor and weights, and name it as {HF}<folder>, or use --encoder i3d, which works offline"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and reports, which come between those of the commands."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
