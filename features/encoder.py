"""A frozen network made as fast as its device allows.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from features.folding import Normalized, channels_last, fold_batchnorm, keep_freed_memory
from features.networks import encoder_spec
from features.quantized import QuantizedNetwork, can_quantize, quantized_network
from features.weights import State
from utils.device import choose_dtype
from utils.process import UserError


class Encoder(nn.Module):
    """A frozen network, pretrained on images or on videos.

    Frozen for good: no gradient reaches `feature_extractor`, and its BatchNorm layers stay in eval mode
    whatever `.train()` says.

    Args:
        name: as `encoder_spec` takes it
        pretrained: load the weights that it was released with; without, they are random, to be loaded from a
            checkpoint
        state: load these weights instead, named as the network's library names them
        img_dim: height and width of the frames in pixels; by default those that it was trained at

    Attributes:
        spec: its entry in the table
        pretrained: its weights are those that it was released with
        width: D
        windows, resize: as in the entry
        precision: what `embed` computes in, in a word; the result is float32 all the same

    Raises: UserError for an unknown name or a size that it does not take, WeightsError where the weights
        cannot be had or do not fit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str = "resnet152",
        *,
        pretrained: bool = True,
        state: State | None = None,
        img_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = encoder_spec(name)
        self.img_dim = img_dim or self.spec.input_size
        if self.spec.fixed_size and self.img_dim != self.spec.input_size:
            raise UserError(
                f"{name} takes frames of {self.spec.input_size} pixels only, not of {self.img_dim}; use "
                f"--img_dim {self.spec.input_size}"
            )
        self.name, self.pretrained, self.width = name, pretrained and state is None, self.spec.width
        self.windows, self.resize = self.spec.windows, self.spec.resize
        self.dtype, self.precision = torch.float32, "float32"
        self._fast: Callable[[Tensor], Tensor] | None = None
        self._quantized: QuantizedNetwork | None = None
        # Lowered where memory is too small for the batches that are fastest.
        self._batch_limit = self.spec.accelerator_batch
        self._sha256: str | None = None
        self._one_at_a_time = threading.Lock()
        self.feature_extractor = channels_last(self.spec.build(pretrained=pretrained, state=state))
        self.feature_extractor.requires_grad_(False).eval()
        self.register_buffer("mean", 255 * torch.tensor(self.spec.mean), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(self.spec.std)), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_sha256", None))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of the network's tensors and its settings, in hexadecimal."""
        if self._sha256 is None:
            digest = hashlib.sha256(self.spec.settings.encode())
            for name, tensor in self.feature_extractor.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._sha256 = digest.hexdigest()
        return self._sha256

    @property
    def device(self) -> torch.device:
        """Where it is, and where `embed` computes."""
        return self.mean.device

    @property
    def batch_size(self) -> int:
        """Windows that are best encoded at once."""
        most = self.spec.cpu_batch if self.device.type == "cpu" else self.spec.accelerator_batch
        return min(most, self._batch_limit)

    def prepare(self, precision: str = "auto") -> Self:
        """Make a copy of the network that is as fast as the device allows, for `embed` to use.

        Call it when the encoder is on its device and has its final weights. BatchNorms are folded, weights
        have the dtype of `precision`. int8 is for CPUs: OpenVINO computes a network that is quantized once
        and kept for the user.

        Args:
            precision: fp32, bf16, int8, or auto: int8 where OpenVINO is installed and the encoder loses
                nothing by it, else bf16 where the hardware has it

        Raises: UserError for int8 on another device, or without its packages.
        """
        self.dtype, self._quantized, self._fast = choose_dtype(precision, self.device), None, None
        self.precision = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cpu":
            keep_freed_memory()
        if precision == "int8" or (
            precision == "auto" and self.spec.int8 and self.device.type == "cpu" and can_quantize()
        ):
            if self.device.type != "cpu":
                raise UserError(f"--precision int8 is for the CPU, not for {self.device}; use bf16")
            self._quantized = quantized_network(self, self.normalized(by_pixel=True))
            self.precision = f"int8-{self.precision}"
            return self
        network = channels_last(fold_batchnorm(copy.deepcopy(self.feature_extractor)).to(self.dtype))
        # In a closure, not an attribute: it has no part in state_dict, parameters or train.
        self._fast = lambda batch: network(batch)
        if self.device.type != "cpu":
            torch.backends.cudnn.benchmark = True
            tf32 = self.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
            self.precision = f"{self.device.type}-{'tf32' if tf32 else self.precision}"
        return self

    @property
    def window_step(self) -> int:
        """Embeddings from one of the clip that labels a frame to the next."""
        return self.spec.window_step

    @property
    def live_frames(self) -> int:
        """Frames of a window in a live video, where a label must not wait for a whole one."""
        return self.spec.live_frames

    def resized(self, img_dim: int) -> Encoder:
        """An encoder with the same weights for frames of another size. Raises: UserError as `Encoder`."""
        other = Encoder(self.name, pretrained=False, img_dim=img_dim)
        other.load_state_dict(self.state_dict())
        other.pretrained = self.pretrained
        return other

    @property
    def kind(self) -> str:
        """The precision as --precision names it."""
        if self._quantized:
            return "int8"
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def normalized(self, *, by_pixel: bool) -> Normalized:
        """A copy of the network behind the normalization of frames, BatchNorms folded, for other engines."""
        network = fold_batchnorm(copy.deepcopy(self.feature_extractor))
        return Normalized(network, self.mean, self.scale, video=self.spec.video, by_pixel=by_pixel).eval()

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Frozen embeddings of windows of frames: (N, L, 3, H, W) -> (N, K, D) float32, on its device.

        uint8 frames are RGB in [0, 255]. Threads may call it side by side; on an accelerator they take
        turns. Where its memory is too small for a batch, the batch is halved for good.

        Raises: UserError if memory is too small for a single window.
        """
        if self._quantized:
            return self._quantized(windows.permute(0, 1, 3, 4, 2))
        on_cpu = self.device.type == "cpu"
        with contextlib.nullcontext() if on_cpu else self._one_at_a_time:
            parts, done = list[Tensor](), 0
            while done < len(windows):
                batch = windows[done : done + self.batch_size]
                try:
                    parts.append(self._embed_batch(batch))
                    done += len(batch)
                    continue
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise UserError(
                            f"the accelerator's memory is too small for {self.name} on {windows.shape[1]} "
                            f"frames of {self.img_dim} pixels; lower --img_dim"
                        ) from error
                # Outside of `except`, where the error's traceback would hold on to the memory.
                self._batch_limit = len(batch) // 2
                if not on_cpu:
                    torch.accelerator.empty_cache()
            return torch.cat(parts)

    def _embed_batch(self, batch: Tensor) -> Tensor:
        count, batch = len(batch), batch.to(self.device, non_blocking=True)
        if self.device.type != "cpu":
            # cuDNN tunes itself at each new size, so there are few: powers of two.
            size = min(self.batch_size, 1 << (count - 1).bit_length())
            batch = torch.cat([batch, batch[:1].expand(size - count, *batch.shape[1:])])
        # By rows of pixels: the three values of a pixel are too few for a CPU's vectors.
        rows, width = batch.permute(0, 1, 3, 4, 2).flatten(3).float(), batch.shape[-1]
        rows.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        batch = rows.unflatten(-1, (width, 3)).permute(0, 1, 4, 2, 3)
        fast = self._fast or self.feature_extractor
        if self.spec.video:
            clips = batch.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            return fast(clips.to(self.dtype)).float()[:count]
        images = batch[:, -1].contiguous(memory_format=torch.channels_last)
        return fast(images.to(self.dtype)).float()[:count, None]

    def forward(self, windows: Tensor) -> Tensor:
        """As `embed`."""
        return self.embed(windows)
