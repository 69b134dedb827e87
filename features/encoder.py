"""A frozen network made as fast as its device allows, and windows of frames on their way through it.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from features.folding import Normalized, channels_last, fold_batchnorm, keep_freed_memory
from features.networks import EncoderSpec, encoder_spec
from features.openvino_network import OpenVinoNetwork, Quantized, convert, quantize
from features.weights import State
from features.windows import CHANGES, Windows
from utils.process import UserError

# What a frame may be seen as: itself, and what has changed since the frame before it.
STREAMS = ("rgb", "diff")
# What computes a network.
ENGINES = TORCH, OPENVINO, INT8 = "torch", "openvino", "openvino-int8"
# Neighbouring frames differ little; the embeddings tell actions apart best so (see benchmarks/README.md).
GRAY, DIFF_GAIN = 128, 2


# Tracing a network changes PyTorch's own functions meanwhile.
_converting = threading.Lock()


def check_size(name: str, spec: EncoderSpec, *sides: int) -> None:
    """Raises: UserError if an encoder takes frames of one size only, and a side of theirs has another."""
    if spec.fixed_size and (others := [side for side in sides if side != spec.input_size]):
        raise UserError(
            f"{name} takes frames of {spec.input_size} pixels only, not of {others[0]}; "
            f"use --img_dim {spec.input_size}"
        )


def difference_images(windows: Tensor) -> Tensor:
    """What has changed from frame to frame, as images: (N, 2, ...) -> (N, 1, ...), values in [0, 255].

    What moves is seen, as in the RGB differences of TSN (Wang et al., ECCV 2016), around the middle gray that
    a network for photographs expects. Integers stay integers, so in float32 it is exact.
    """
    change = windows[:, 1:].float() - windows[:, :-1].float()
    return change.mul_(DIFF_GAIN).add_(GRAY).clamp_(0, 255).to(windows.dtype)


def computation(dtype: torch.dtype, device_type: str, *, compile: bool) -> str:
    """All that may change a rounding of the encoder on this machine, in a word, as cache keys hold it.

    On a CPU that is the dtype. On CUDA float32 convolutions may compute in TF32, and deterministic kernels
    round in another order.
    """
    words = [str(dtype).removeprefix("torch.")]
    if device_type != "cpu":
        words.append(device_type)
        if device_type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
            words.append("tf32")
        if torch.are_deterministic_algorithms_enabled():
            words.append("deterministic")
    return "-".join([*words, "compiled"] if compile else words)


class Encoder(nn.Module):
    """A frozen network, pretrained on ImageNet or on videos.

    Frozen for good: no gradient reaches `feature_extractor`, and its BatchNorm layers stay in eval mode
    whatever `.train()` says.

    Args:
        name: as `encoder_spec` takes it
        pretrained: load the weights that it is known for; without, they are random, to be loaded from a
            checkpoint
        state: load these weights instead, named as the network's library names them

    Attributes:
        pretrained: its weights are those that its name stands for
        width: D
        dtype: what `embed` computes in; the answer is float32 all the same
        engine: what computes it, one of `ENGINES`
        quantized: networks by what they see, one of `STREAMS`, for the engine `INT8`

    Raises: UserError for an unknown name, WeightsError where the weights cannot be had or do not fit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, name: str = "resnet152", *, pretrained: bool = True, state: State | None = None
    ) -> None:
        super().__init__()
        self.spec = encoder_spec(name)
        self.name, self.pretrained, self.width = name, pretrained and state is None, self.spec.width
        self.dtype, self.engine = torch.float32, TORCH
        self.quantized: dict[str, Quantized] = {}
        # By what they see and the side of the frames.
        self._networks: dict[tuple[str, int], OpenVinoNetwork] = {}
        self._fast: Callable[[Tensor], Tensor] | None = None
        self._compiled = False
        # Set where memory is too small for the batches that are fastest.
        self._batch_limit = self.spec.accelerator_batch
        self._sha256: str | None = None
        self.feature_extractor = channels_last(self.spec.build(pretrained=pretrained, state=state))
        self.feature_extractor.requires_grad_(False).eval()
        self.register_buffer("mean", 255 * torch.tensor(self.spec.mean), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(self.spec.std)), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_sha256", None))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of the frozen network's tensors, as 64 hexadecimal digits.

        The settings of its entry are part of it, where it has some. Computed once for the weights that were
        loaded.
        """
        if self._sha256 is None:
            digest = hashlib.sha256(self.spec.settings.encode())
            for name, tensor in self.feature_extractor.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._sha256 = digest.hexdigest()
        return self._sha256

    @property
    def device(self) -> torch.device:
        """Where it is, and where `embed` wants its frames."""
        return self.mean.device

    @property
    def batch_size(self) -> int:
        """Windows that `embed` puts through the network at once."""
        most = self.spec.cpu_batch if self.device.type == "cpu" else self.spec.accelerator_batch
        return min(most, self._batch_limit)

    def prepare(self, dtype: torch.dtype, *, compile: bool = False, engine: str = TORCH) -> None:
        """Make a copy of the frozen network that is as fast as the device allows, for `embed` to use.

        Its BatchNorms are folded and its weights are of `dtype`. Call it when the encoder is on its device
        and has its final weights. With `compile` the copy is compiled at its first use, which takes a minute
        or more; OpenVINO's is made at its first use too, in some seconds, or less where it is `quantized`.
        """
        self.engine, self._networks = engine, {}
        if engine != TORCH:
            self.dtype, self._compiled, self._fast = dtype, False, None
            return
        network = fold_batchnorm(copy.deepcopy(self.feature_extractor))
        network = channels_last(network.to(dtype))
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.dtype, self._compiled = dtype, compile
        if compile and torch.are_deterministic_algorithms_enabled():
            # Tells the compiler, which `seed_everything` does not load.
            torch.use_deterministic_algorithms(True, warn_only=True)
        # In a closure, not an attribute: it has no part in state_dict, parameters or train.
        fast = torch.compile(network, dynamic=False, options={"freezing": True}) if compile else network
        self._fast = lambda batch: fast(batch)

    def variant(self, stream: str = "rgb") -> str:
        """All that may change a rounding of its embeddings on this machine, as cache keys hold it."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.engine == INT8:
            return f"{self.engine}-{self.quantized[stream].sha256[:12]}-{dtype}"
        word = computation(self.dtype, self.device.type, compile=self._compiled)
        return word if self.engine == TORCH else f"{self.engine}-{dtype}"

    def quantize(self, stream: str, windows: Iterable[np.ndarray]) -> Quantized:
        """Its network in 8-bit integers, for what a stream shows it.

        Args:
            windows: that measure the ranges, (1, L, H, W, 3) uint8 each, all frames of one size

        Raises: UserError as `convert`.
        """
        seen = [self._seen(torch.from_numpy(window), stream).numpy() for window in windows]
        return quantize(self._converted(seen[0].shape[2]), seen)

    def _converted(self, side: int) -> Any:
        # Of changes, it is shown the images that they make.
        windows = self.spec.windows
        example = torch.zeros(2, windows.frames, side, side, 3, dtype=torch.uint8)
        return convert(self.name, self.normalized(by_pixel=True), example, windows.least)

    def normalized(self, *, by_pixel: bool) -> Normalized:
        """A copy of its network behind the normalisation of frames, BatchNorms folded, for other engines."""
        network = fold_batchnorm(copy.deepcopy(self.feature_extractor))
        return Normalized(network, self.mean, self.scale, video=self.spec.video, by_pixel=by_pixel).eval()

    def check_side(self, stream: str, side: int) -> None:
        """Raises: UserError where a stream's network is quantised for frames of another side, in pixels."""
        if self.engine == INT8:
            self._network(stream, side)

    def _network(self, stream: str, side: int) -> OpenVinoNetwork:
        """Raises: UserError where it is quantised for frames of another size."""
        with _converting:
            if (stream, side) not in self._networks:
                model = self.quantized[stream] if self.engine == INT8 else self._converted(side)
                network = OpenVinoNetwork(model, self.dtype)
                if network.side != side:
                    raise UserError(
                        f"{self.name} was quantised for frames of {network.side} pixels, not {side}; leave "
                        "out --img_dim, or use --engine torch"
                    )
                self._networks[stream, side] = network
            return self._networks[stream, side]

    @staticmethod
    def _seen(windows: Tensor, stream: str) -> Tensor:
        """What the network is shown of windows of frames, whatever their layout: itself, or the changes."""
        return difference_images(windows) if stream == "diff" else windows

    def windows(self, stream: str) -> Windows:
        """How it goes along a video in a stream, one of `STREAMS`.

        Raises: UserError for differences of frames, where the network sees more than one frame itself.
        """
        if stream == "rgb":
            return self.spec.windows
        if self.spec.video:
            raise UserError(f"{self.name} sees how frames change by itself; use --streams rgb")
        return CHANGES

    @torch.no_grad()
    def embed(self, windows: Tensor, stream: str = "rgb") -> Tensor:
        """Frozen embeddings of windows of frames: (N, L, 3, H, W) -> (N, K, D) float32.

        uint8 frames are RGB in [0, 255] and are normalised here, as the network was trained; floating-point
        frames, which the engine `TORCH` alone takes, are normalised already. Where an accelerator's memory is
        too small for a batch, it is halved for good.

        Args:
            stream: "rgb", or "diff" for windows of a frame and the one before it

        Raises: UserError if the network takes frames of one size only, and these have another, or if memory
            is too small for a single window.
        """
        check_size(self.name, self.spec, *windows.shape[-2:])
        embeddings: list[Tensor] = []
        done = 0
        while done < len(windows):
            batch = windows[done : done + self.batch_size]
            try:
                embeddings.append(self._embed_batch(batch, stream))
                done += len(batch)
                continue
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise UserError(
                        f"the accelerator's memory is too small for {self.name} on {windows.shape[1]} frames "
                        f"of {batch.shape[-1]} pixels; lower --img_dim"
                    ) from error
            # Outside of `except`, where the error's traceback would hold on to the memory.
            self._batch_limit = len(batch) // 2
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
        return torch.cat(embeddings)

    def _embed_batch(self, batch: Tensor, stream: str) -> Tensor:
        if self.engine != TORCH:
            assert batch.dtype == torch.uint8
            network = self._network(stream, batch.shape[-1])
            return network(self._seen(batch.permute(0, 1, 3, 4, 2), stream))
        count, batch = len(batch), self._filled_up(batch)
        if batch.dtype == torch.uint8:
            # By rows of pixels: the three values of a pixel are too few for a CPU's vectors.
            rows, width = batch.permute(0, 1, 3, 4, 2).flatten(3).float(), batch.shape[-1]
            if stream == "diff":
                rows = difference_images(rows)
            rows.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
            batch = rows.unflatten(-1, (width, 3)).permute(0, 1, 4, 2, 3)
        fast = self._fast or self.feature_extractor
        if self.spec.video:
            clips = batch.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            return fast(clips.to(self.dtype)).float()[:count]
        images = batch[:, -1].contiguous(memory_format=torch.channels_last)
        return fast(images.to(self.dtype)).float()[:count, None]

    def _filled_up(self, batch: Tensor) -> Tensor:
        """The batch, filled up to a power of two: at each new size cuDNN tunes, or a network is compiled."""
        if self.device.type == "cpu" and not self._compiled:
            return batch
        size = min(self.batch_size, 1 << (len(batch) - 1).bit_length())
        return torch.cat([batch, batch[:1].expand(size - len(batch), *batch.shape[1:])])

    def forward(self, windows: Tensor) -> Tensor:
        """As `embed`."""
        return self.embed(windows)
