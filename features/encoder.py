"""A network that turns frames into embeddings: frozen, and as fast as its device allows; or trained further.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from features.blocks import blocks_of, depths_of, keep_activations, used_parameters
from features.folding import BATCHNORMS, Normalized, channels_last, fold_batchnorm, keep_freed_memory
from features.networks import encoder_spec
from features.quantized import QuantizedNetwork, can_quantize, quantized_network
from features.weights import State
from utils.device import choose_dtype
from utils.process import UserError

# Share of the learning rate that a block of a Transformer has of that of the next one.
LAYER_DECAY = 0.75


class Encoder(nn.Module):
    """A frozen network, pretrained on images or on videos.

    No gradient reaches `feature_extractor` but what `unfreeze` frees, and its BatchNorm layers stay in eval
    mode whatever `.train()` says.

    Args:
        name: as `encoder_spec` takes it
        pretrained: load the weights that it was released with; without, they are random, to be loaded from a
            checkpoint
        state: load these weights instead, named as the network's library names them
        img_dim: height and width of the frames in pixels; by default those that it was trained at
        window: frames of a window, where it was trained further on shorter ones
        finetuned: it was trained further

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
        window: int | None = None,
        finetuned: bool = False,
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
        self.windows, self.resize, self.finetuned = self.spec.windows, self.spec.resize, finetuned
        if window:
            self.shorten(window)
        self.dtype, self.precision = torch.float32, "float32"
        self._fast: Callable[[Tensor], Tensor] | None = None
        self._quantized: QuantizedNetwork | None = None
        # Lowered where memory is too small for the batches that are fastest.
        self._batch_limit = self.spec.accelerator_batch
        self._sha256: str | None = None
        self._one_at_a_time = threading.Lock()
        self._blocks: tuple[list[nn.Parameter], list[nn.Module]] | None = None
        self.feature_extractor = channels_last(self.spec.build(pretrained=pretrained, state=state))
        self.feature_extractor.requires_grad_(False).eval()
        self.register_buffer("mean", 255 * torch.tensor(self.spec.mean), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(self.spec.std)), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_sha256", None))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, but for what `unfreeze` has freed; of that BatchNorms stay too."""
        mode = mode and any(parameter.requires_grad for parameter in self.parameters())
        super().train(mode)
        if self._blocks is not None:
            keep_activations(self.feature_extractor, not mode)
        if mode:
            for part in self.modules():
                own = [parameter.requires_grad for parameter in part.parameters()]
                if isinstance(part, BATCHNORMS) or (own and not any(own)):
                    part.eval()
            self._sha256 = None
        return self

    def blocks(self) -> tuple[list[nn.Parameter], list[nn.Module]]:
        """The parameters that embeddings depend on, but BatchNorms', and the blocks, or stages, in order."""
        if self._blocks is None:
            network, side = self.feature_extractor, self.img_dim
            shown = torch.zeros(1, self.windows.least, 3, side, side, dtype=torch.uint8)
            with torch.enable_grad():
                network.requires_grad_(True)
                used = used_parameters(network, self(shown).sum())
            network.requires_grad_(False)
            self._blocks = used, blocks_of(network, used)
        return self._blocks

    def check_blocks(self, number: int) -> None:
        """Raises: UserError if there are not so many blocks."""
        if number > (most := len(self.blocks()[1])):
            raise UserError(f"--finetune {number}: {self.name} has fewer blocks; take {most} at most")

    def unfreeze(self, number: int | None = None) -> list[tuple[nn.Parameter, float]]:
        """Let `forward` train the network: its last blocks and what follows, or all of it without a number.

        BatchNorms stay as they are, and so does what embeddings do not depend on, a classifier for one.

        Returns: what is trained, and the share of the learning rate that each has: 1, but less from block to
            block where there are LayerNorms (Clark et al., ICLR 2020, section 3.1; 0.75 as He et al., CVPR
            2022).
        Raises: as `check_blocks`.
        """
        self.check_blocks(number or 0)
        self.pretrained, self.finetuned = False, True
        used, blocks = self.blocks()
        least = len(blocks) - number + 1 if number else 0
        layered = any(isinstance(part, nn.LayerNorm) for part in self.feature_extractor.modules())
        decay = LAYER_DECAY if layered else 1.0
        depths = depths_of(used, blocks)
        trained = [(each, decay ** (len(blocks) + 1 - depth)) for each, depth in depths if depth >= least]
        self.feature_extractor.requires_grad_(False)
        for parameter, _ in trained:
            parameter.requires_grad_(True)
        return trained

    def shorten(self, frames: int) -> None:
        """Have windows of so many frames, within what the network takes: as long as what it is trained on."""
        layout = self.spec.windows
        self.windows = replace(layout, frames=min(layout.frames, max(layout.least, frames)))
        self._sha256 = None

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of the network's tensors and its settings, in hexadecimal."""
        if self._sha256 is None:
            digest = hashlib.sha256(self.spec.settings.encode())
            if self.windows != self.spec.windows:
                digest.update(str(self.windows.frames).encode())
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
            # What training has made of it was not measured in int8.
            precision == "auto"
            and self.spec.int8
            and not self.finetuned
            and self.device.type == "cpu"
            and can_quantize()
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
        return min(self.spec.live_frames, self.windows.frames)

    def resized(self, img_dim: int) -> Encoder:
        """An encoder with the same weights for frames of another size. Raises: UserError as `Encoder`."""
        window, finetuned = self.windows.frames, self.finetuned
        other = Encoder(self.name, pretrained=False, img_dim=img_dim, window=window, finetuned=finetuned)
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
        count = len(batch)
        if self.device.type != "cpu":
            # cuDNN tunes itself at each new size, so there are few: powers of two.
            size = min(self.batch_size, 1 << (count - 1).bit_length())
            batch = torch.cat([batch, batch[:1].expand(size - count, *batch.shape[1:])])
        fast = self._fast or self.feature_extractor
        return self._compute(fast, batch, self.dtype).float()[:count]

    def _compute(self, network: Callable[[Tensor], Tensor], batch: Tensor, dtype: torch.dtype) -> Tensor:
        batch = batch.to(self.device, non_blocking=True)
        # By rows of pixels: the three values of a pixel are too few for a CPU's vectors.
        rows, width = batch.permute(0, 1, 3, 4, 2).flatten(3).float(), batch.shape[-1]
        rows.sub_(self.mean.repeat(width)).mul_(self.scale.repeat(width))
        batch = rows.unflatten(-1, (width, 3)).permute(0, 1, 4, 2, 3)
        if self.spec.video:
            clips = batch.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
            return network(clips.to(dtype))
        images = batch[:, -1].contiguous(memory_format=torch.channels_last)
        return network(images.to(dtype))[:, None]

    def forward(self, windows: Tensor) -> Tensor:
        """Embeddings that gradients go through, of windows of one batch; else as `embed`.

        In bfloat16 where `prepare` has chosen it (torch.autocast), but not on a CPU where kernels reach over
        the ends of a clip: if that is shorter, oneDNN's gradient in bfloat16 is memory that nobody wrote
        (seen with PyTorch 2.14).
        """
        convolutions = [part for part in self.modules() if isinstance(part, nn.Conv3d)]
        exact = self.device.type == "cpu" and any(part.padding[0] for part in convolutions)
        fast = self.dtype == torch.bfloat16 and not exact
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast):
            return self._compute(self.feature_extractor, windows, torch.float32).float()
