"""Torchvision's networks for videos, and where the weights of its networks come from.

Shapes: N clips, T frames, H x W pixels, K time steps, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from features.weights import State, WeightsError, first_line, load_weights


class _WithoutLastLayer(nn.Module):
    def __init__(self, layers: nn.Module, last_layer: nn.Linear) -> None:
        super().__init__()
        self.layers, self.last_layer = layers, last_layer


class WholeClip(_WithoutLastLayer):
    """A network that says one thing of a clip, without its last layer, which is kept beside it.

    Attributes:
        layers: (N, 3, T, H, W) -> (N, D)
        last_layer: the released network's, (..., D) -> (..., classes)
        averages_pairs: of neighbouring embeddings, before it
    """

    averages_pairs = False

    def forward(self, clips: Tensor) -> Tensor:
        """One embedding of each clip: (N, 3, T, H, W) normalised -> (N, 1, D)."""
        return self.layers(clips).unsqueeze(1)


class TimeSteps(_WithoutLastLayer):
    """S3D without its last layer, which is kept beside it.

    Xie et al., Rethinking Spatiotemporal Feature Learning, ECCV 2018: I3D whose kernels are split into one of
    space and one of time.

    Attributes:
        layers: (N, 3, T, H, W) -> (N, D, K, H / 32, W / 32), K = T / 8
        last_layer: the released network's 1 x 1 x 1 convolution, (..., D) -> (..., classes)
        averages_pairs: each two neighbouring time steps are averaged before it, over 7 x 7 positions, which
            at 224 pixels are all there are
    """

    averages_pairs = True

    def forward(self, clips: Tensor) -> Tensor:
        """Embeddings of every 8th frame: (N, 3, T, H, W) normalised -> (N, K, D); T is 16 or more."""
        return self.layers(clips).mean((3, 4)).transpose(1, 2)


@dataclass(frozen=True)
class VideoNetwork:
    """A network of `torchvision.models.video` without its last layer, by torchvision's name for it.

    They are r3d_18, mc3_18 and r2plus1d_18 (Tran et al., CVPR 2018), s3d (Xie et al., ECCV 2018), mvit_v1_b
    (Fan et al., ICCV 2021), mvit_v2_s (Li et al., CVPR 2022), and swin3d_t, swin3d_s and swin3d_b (Liu et
    al., CVPR 2022). Each was trained on Kinetics-400.
    """

    name: str

    def __call__(self, *, pretrained: bool, state: State | None = None) -> nn.Module:
        """Make it; a `state` is of the whole network, its last layer included.

        Raises: WeightsError if weights cannot be had, or do not fit.
        """
        import torchvision

        network = torchvision.models.get_model(self.name)
        if state is not None:
            load_weights(network, state, self.name)
        elif pretrained:
            download_weights(network, self.name, "KINETICS400_V1", "Kinetics-400", instead="i3d")
        return without_last_layer(network)


def without_last_layer(network: Any) -> WholeClip | TimeSteps:
    """A video network of torchvision as `Encoder` takes it; its layers are used, not copied."""
    if hasattr(network, "classifier"):  # S3D
        convolution = network.classifier[1]
        last = nn.Linear(convolution.in_channels, convolution.out_channels)
        last.weight.data, last.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
        return TimeSteps(network.features, last)
    name = "fc" if hasattr(network, "fc") else "head"
    head: Any = getattr(network, name)
    setattr(network, name, nn.Identity())
    # MViT's is dropout and the layer.
    return WholeClip(network, head if isinstance(head, nn.Linear) else head[-1])


def download_weights(network: nn.Module, name: str, weights: str, data: str, *, instead: str) -> None:
    """Load the weights that torchvision has for one of its networks, from its folder or by the network.

    Args:
        name: torchvision's, of the network
        weights: torchvision's name for them
        data: what they were trained on, for the error
        instead: an encoder that works offline, for the error

    Raises: WeightsError if they cannot be had; it says where to put them by hand.
    """
    import torchvision

    chosen = torchvision.models.get_model_weights(name)[weights]
    file = chosen.url.rsplit("/", 1)[-1]
    folder = torch.hub.get_dir() + "/checkpoints"
    try:
        network.load_state_dict(chosen.get_state_dict(progress=True, check_hash=True))
    # No network, no such host, a full disk, a wrong hash, a broken file: the way out is the same.
    except Exception as error:
        raise WeightsError(
            f"no {data} weights for {name} ({first_line(error)}); download {chosen.url} elsewhere and put "
            f"the file {file} into {folder}, or use --encoder {instead}, which works offline"
        ) from error
