"""Networks for videos of the package transformers, as hf/<name or folder>; no code of a hub is run.

V-JEPA 2 (Assran et al., 2025), VideoMAE (Tong et al., NeurIPS 2022), TimeSformer (Bertasius et al., ICML
2021) and ViViT (Arnab et al., ICCV 2021). One with a classifier names its own classes, and its embedding is
what stands before that; without one it is the mean of its tokens. X-CLIP (Ni et al., ECCV 2022) compares a
clip with words.

Shapes: N clips, T frames, H x W pixels, D embedding width, C words.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
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
# Names of classes that say nothing.
NAMELESS = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Kind:
    """How a kind of networks differs from the others in transformers.

    Attributes:
        fps: frames/s that it was trained at, by its paper, where its processor says nothing
        head: beginnings of the names of tensors of its classifier
        unused: of others that an encoder has no use for
        frames, side: what its configuration calls the frames of a clip, and their height and width
        words: it has a text tower
        call: arguments of each call without a classifier
        options: arguments that build it without one
    """

    fps: float
    head: tuple[str, ...] = ("classifier.",)
    unused: tuple[str, ...] = ()
    frames: str = "num_frames"
    side: str = "image_size"
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    words: bool = False


# By the `model_type` of a configuration. VideoMAE saw every 4th frame of 30 a second, TimeSformer every 32nd,
# ViViT every 2nd of 25.
KINDS = {
    "vjepa2": Kind(
        4.0, ("pooler.", "classifier."), ("predictor.",), "frames_per_clip", "crop_size",
        call={"skip_predictor": True},
    ),
    "videomae": Kind(7.5, ("fc_norm.", "classifier."), ("decoder.", "encoder_to_decoder.", "mask_token")),
    "timesformer": Kind(30 / 32),
    "vivit": Kind(12.5, unused=("pooler.",), options={"add_pooling_layer": False}),
    # It saw eight frames of a whole clip; a window of two seconds.
    "xclip": Kind(
        4.0, unused=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"), words=True
    ),
}  # fmt: skip


class Said(nn.Module):
    """Stands for a text tower that has read all there is to read: features (C, width)."""

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, **_: Any) -> tuple[None, Tensor]:
        """As the tower answers."""
        return None, self.features


class VideoTransformer(nn.Module):
    """A network of transformers.

    Attributes:
        last_layer: its classifier, (..., D) -> (..., classes); None where it has none. Once it was told words
            embeddings are logits already, and it changes nothing
        averages_pairs: as `networks.VideoNetwork` has it
    """

    averages_pairs = False

    def __init__(self, network: Any, kind: Kind) -> None:
        super().__init__()
        self.network, self._kind = network, kind
        self.last_layer: nn.Module | None = getattr(network, "classifier", None)
        if self.last_layer is not None:
            network.classifier = nn.Identity()
        for part in filter(lambda part: hasattr(part, "predictor"), list(network.modules())):
            del part.predictor

    def forward(self, clips: Tensor) -> Tensor:
        """Embeddings of clips: (N, 3, T, H, W) normalized -> (N, 1, D)."""
        clips = clips.transpose(1, 2)
        if self._kind.words:
            if self.last_layer is None:
                return self.network.get_video_features(clips).pooler_output.unsqueeze(1)
            logits = self.network(input_ids=None, pixel_values=clips).logits_per_video
            # All are alike large, and kept in few bits.
            return (logits - logits.mean(1, keepdim=True)).unsqueeze(1)
        if self.last_layer is not None:
            return self.network(clips).logits.unsqueeze(1)
        return self.network(clips, **self._kind.call).last_hidden_state.mean(1, keepdim=True)

    @torch.no_grad()
    def compare_with(self, words: list[str], tokenizer: Any) -> None:
        """From now on answer how well each of some words fits: (N, 3, T, H, W) -> (N, 1, C)."""
        read = tokenizer(words, padding=True, return_tensors="pt")
        tower = self.network.text_model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        self.network.text_model = Said(tower[1])
        self.last_layer = nn.Linear(len(words), len(words), bias=False)
        self.last_layer.weight.copy_(torch.eye(len(words)))


def tokenizer_of(name: str) -> Any:
    """The tokenizer of hf/<name>. Raises: WeightsError if it cannot be had."""
    from transformers import AutoTokenizer

    return _from_hub(AutoTokenizer.from_pretrained, name.removeprefix(HF))


def _load(
    auto: Any, name: str, config: Any, kind: Kind, options: dict[str, Any], state: State | None
) -> nn.Module:
    """A network with weights, each of which is used, or is of the kind's `unused`.

    Raises: WeightsError if they cannot be had or do not fit, or if a tensor of them would go unused.
    """
    options = options | {
        "config": config, "dtype": torch.float32, "output_loading_info": True,
        "ignore_mismatched_sizes": True, "use_safetensors": True,
    }  # fmt: skip
    model: Any = auto._model_mapping[type(config)]
    if state is not None:
        network, found = model.from_pretrained(None, state_dict=dict(state), **options)
    else:
        network, found = _from_hub(auto.from_pretrained, name, **options)
    unused = kind.unused + (() if hasattr(network, "classifier") else kind.head)

    def counts(key: str) -> bool:
        return not key.removeprefix(model.base_model_prefix + ".").startswith(unused)

    wrong = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if wrong := set(filter(counts, wrong)):
        raise WeightsError(
            f"the weights are not those of {HF}{name}: {len(wrong)} of its {len(network.state_dict())} "
            f"tensors are not there or have another shape, {min(wrong)} for one; name the encoder that they "
            "are of"
        )
    if left := sorted(filter(counts, found["unexpected_keys"])):
        raise WeightsError(
            f"{HF}{name}: transformers has no use for {left[0]} of the weights, so that its embeddings would "
            "be wrong; pip install -U transformers, or use --encoder i3d"
        )
    return network


def huggingface_entry(name: str) -> dict[str, Any]:
    """What the files of a network say of it, as fields of `networks.EncoderSpec`; weights are not read.

    Args:
        name: of a model on the hub, such as facebook/vjepa2-vitl-fpc64-256, or a folder that holds one

    Raises: WeightsError without transformers, or if the files cannot be had; UserError if it is no network
        for videos, or one that cannot be an encoder.
    """
    try:
        import transformers
        from transformers.utils import cached_file, logging
    except ImportError as error:
        raise WeightsError(
            f"{HF}{name} needs the package transformers; run pip install -r requirements-hf.txt"
        ) from error
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise MissingFileError(f"{HF}{name}: no such folder; name the one that holds a model's config.json")
    # Its own reports come between those of the commands.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    path = _from_hub(cached_file, name, filename="config.json")
    config = _from_hub(transformers.AutoConfig.from_pretrained, name)
    if config.model_type not in KINDS:
        is_of = ", ".join(config.architectures or ()) or config.model_type
        raise UserError(
            f"{HF}{name} is {is_of}, of the kind {config.model_type!r}; choose one of {', '.join(KINDS)}"
        )
    kind = KINDS[config.model_type]
    seen = config.vision_config if kind.words else config
    side, frames = getattr(seen, kind.side), getattr(seen, kind.frames)
    height, width = (side, side) if isinstance(side, int) else side
    channels = getattr(seen, "num_channels", None) or getattr(seen, "in_chans", None)
    if (channels, height) != (3, width):
        raise UserError(
            f"{HF}{name} takes frames of {channels} x {height} x {width}; an encoder's are square RGB"
        )
    processor: Any = transformers.AutoImageProcessor if kind.words else transformers.AutoVideoProcessor
    preprocessing = _preprocessing(name, _from_hub(processor.from_pretrained, name))
    # Before, there were several embeddings of a window.
    digest = hashlib.sha256(Path(path).read_bytes() + repr(preprocessing).encode() + b"one of a window")
    classifies = any(each.endswith("ForVideoClassification") for each in config.architectures or ())
    auto: Any = transformers.AutoModelForVideoClassification if classifies else transformers.AutoModel
    options = {} if classifies else kind.options

    def build(*, pretrained: bool, state: State | None = None) -> VideoTransformer:
        if state is None and not pretrained:
            return VideoTransformer(auto.from_config(config, **options), kind)
        return VideoTransformer(_load(auto, name, config, kind, options, state), kind)

    def categories() -> list[str]:
        classes = [config.id2label[label] for label in range(config.num_labels)]
        if all(map(NAMELESS.fullmatch, classes)):
            raise UserError(
                f"{HF}{name}: its {len(classes)} classes have no names, LABEL_0 and so on; write them into "
                "id2label of its config.json, or train a head over it with train.py"
            )
        return classes

    return preprocessing | {
        "build": build, "width": config.projection_dim if kind.words else config.hidden_size,
        "words": kind.words, "input_size": height, "fixed_size": True,
        "windows": Windows(frames, frames, frames), "live_frames": frames,
        "fps": preprocessing["fps"] or kind.fps, "settings": digest.hexdigest(),
        "categories": categories if classifies else None,
    }  # fmt: skip


def _preprocessing(name: str, processor: Any) -> dict[str, Any]:
    """Mean, standard deviation, resizing and frames/s of a processor."""
    try:
        size = _size(processor.size)
        crop = _size(processor.crop_size) if processor.do_center_crop else size
        resize = Resize(crop if isinstance(crop, int) else crop[0], size, RESAMPLING[processor.resample])
        # What becomes of 0 and of 255: each kind has its own way to scale and to shift.
        video = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
        normalized = processor(video, return_tensors="pt", do_resize=False, do_center_crop=False)
        black, white = next(iter(normalized.values())).reshape(-1, 3, 8, 8)[:2, :, 0, 0].double()
        std = 1 / (white - black)
        mean = -black * std
    except Exception as error:
        raise WeightsError(
            f"{HF}{name}: its processor resizes or normalizes in a way that is not known here "
            f"({first_line(error)}); use the file that was released with the network"
        ) from error
    mean, std = (tuple(round(value, 7) for value in values.tolist()) for values in (mean, std))
    return {"mean": mean, "std": std, "resize": resize, "fps": getattr(processor, "fps", None)}


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
