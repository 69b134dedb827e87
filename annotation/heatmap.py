"""Where in a picture a model sees an action: class activation maps.

Encoders that average over space have a map before it. The weights of the class times the map are where the
logit comes from, exactly so for a linear head (CAM; Zhou et al., CVPR 2016). For other heads the gradient of
the logit by the embedding takes the weights' place (Grad-CAM; Selvaraju et al., ICCV 2017).

Shapes: N windows or clips, L frames of a window, K embeddings, T of a clip, D their width, h x w places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from annotation.labels import ClipLayout
from annotation.overlay import NONE
from annotation.recognizer import Recognition, Recognizer
from dataset import clips_around, padding_of
from features.embed import Embedded, embed_video
from features.encoder import Encoder
from models import Head, LinearProbe, mean_over_time
from utils.process import UserError
from video.frames import resize_frames
from video.opencv import cv2
from video.reader import Video

# Share of the picture that the hottest place hides, the heat that shows at all as a share of the hottest,
# and that of a picture's hottest place below which it is not drawn as bright as in other pictures.
OPACITY, LEAST, FAINT = 0.7, 0.25, 0.1


def evidence(head: Head, clips: Tensor, padding: Tensor, labels: Tensor) -> Tensor:
    """What each embedding of clips is multiplied by in the logit of a class: (N, T, D) -> (N, T, D).

    For a linear head the sum of the products is the logit less its bias. The length that LinearProbe divides
    by is taken as a number.
    """
    rows = clips.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        if isinstance(head, LinearProbe):
            mean = mean_over_time(rows, padding)
            logits = head.output(head.scale * mean / mean.norm(dim=-1, keepdim=True).detach())
        else:
            logits = head(rows, padding)
        return torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), rows)[0]


class Maps:
    """The map of an encoder before it averages over space; takes the place of an encoder in `embed_video`.

    Raises: UserError for an encoder without such a map.
    """

    def __init__(self, encoder: Encoder) -> None:
        # The network as it was released: a quantized one shows no layer.
        self._plain = copy.copy(encoder)
        self._plain._fast = self._plain._quantized = None
        self._plain.dtype = torch.float32
        self.windows, self.resize, self.img_dim = encoder.windows, encoder.resize, encoder.img_dim
        self.batch_size, self.width, self.grid = encoder.batch_size, encoder.width, (0, 0)
        self._layer: nn.Module | None = None
        noise = torch.randint(0, 256, (1, max(1, encoder.windows.least), 3, encoder.img_dim, encoder.img_dim))
        wanted = self._plain.embed(noise.to(torch.uint8))

        def look(layer: nn.Module, _: Any, output: Any) -> None:
            of_places = isinstance(output, Tensor) and output.ndim >= 4 and output.shape[-2:] != (1, 1)
            if of_places and output.shape[1] == encoder.width:
                averaged = self._by_time(output, wanted.shape[1]).mean((3, 4))
                if averaged.shape == wanted.shape and torch.allclose(averaged, wanted, rtol=1e-3, atol=1e-4):
                    self._layer, self.grid = layer, (output.shape[-2], output.shape[-1])

        hooks = [each.register_forward_hook(look) for each in encoder.feature_extractor.modules()]
        self._plain.embed(noise.to(torch.uint8))
        for hook in hooks:
            hook.remove()
        if self._layer is None:
            raise UserError(
                f"{encoder.name} does not average a map over the picture, so there is no heat map; i3d, s3d, "
                "the ResNets and efficientnet_lite0 do"
            )

    @staticmethod
    def _by_time(output: Tensor, steps: int) -> Tensor:
        """(N, D, [t,] h, w) -> (N, K, D, h, w)."""
        by_time = (output.unsqueeze(2) if output.ndim == 4 else output).transpose(1, 2)
        return by_time if by_time.shape[1] == steps else by_time.mean(1, keepdim=True)

    def embed(self, windows: Tensor) -> Tensor:
        """Maps of windows, flat: (N, L, 3, img_dim, img_dim) uint8 -> (N, K, D h w)."""
        assert self._layer
        kept: list[Tensor] = []
        hook = self._layer.register_forward_hook(lambda layer, given, output: kept.append(output.detach()))
        try:
            steps = self._plain.embed(windows).shape[1]
        finally:
            hook.remove()
        return torch.cat([self._by_time(each, steps).float().flatten(2) for each in kept])


def _weights(
    recognizer: Recognizer, embedded: Embedded, layout: ClipLayout, places: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """By what the embeddings at some places of a video are multiplied, in the clips around them, (n, D)."""
    head, device = recognizer.head, recognizer.encoder.device
    assert isinstance(head, Head)
    chosen = clips_around(embedded, layout.sequence_length, layout.step)[places]
    found: list[np.ndarray] = []
    for some, place, label in zip(chosen, places, labels, strict=True):
        clip = torch.from_numpy(np.asarray(embedded.embeddings[0, some], np.float32))[None].to(device)
        padding = torch.from_numpy(padding_of(some))[None].to(device)
        of_clip = evidence(head, clip, padding, torch.tensor([int(label)], device=device))[0]
        found.append(of_clip[torch.from_numpy(some == place)].sum(0).cpu().numpy())
    return np.array(found, np.float32)


def video_heat(
    recognizer: Recognizer,
    maps: Maps,
    video: Video,
    embedded: Embedded,
    layout: ClipLayout,
    recognition: Recognition,
) -> np.ndarray:
    """How much each place says for the action that is named, (frames, h, w); 0 where none is.

    Raises: as `embed_video`.
    """
    bounds = embedded.bounds()
    labels = recognition.labels[(bounds[:-1] + bounds[1:]) // 2]
    weights = np.zeros((len(labels), maps.width), np.float32)
    named = np.flatnonzero(labels != NONE)
    chosen = np.array(recognizer.chosen)[labels[named]]
    if len(named):
        weights[named] = _weights(recognizer, embedded, layout, named, chosen)

    def weighted(embed: Callable[[Any], np.ndarray], parts: Iterable[Any]) -> Iterator[np.ndarray]:
        at = 0
        for part in parts:
            found = embed(part)[0]
            own = weights[at : at + len(found)]
            yield _weighted(own, found, maps)[None]
            at += len(found)

    heat = embed_video(video, maps, stride=embedded.stride, cuts=embedded.cuts, map=weighted).embeddings[0]
    return heat.repeat(np.diff(bounds), axis=0).reshape(-1, *maps.grid)


def _weighted(weights: np.ndarray, found: np.ndarray, maps: Maps) -> np.ndarray:
    """Weights (n, D) times flat maps (n, D h w) -> (n, h w); their sum is that with the averages."""
    places = maps.grid[0] * maps.grid[1]
    return np.einsum("nd,ndp->np", weights, found.reshape(len(found), -1, places)) / places


def heat_at(
    recognizer: Recognizer, maps: Maps, video: Video, embedded: Embedded, second: float, label: int
) -> tuple[np.ndarray, np.ndarray]:
    """The frame that is shown at a second, and how much each of its places says for a class, (h, w).

    Args:
        label: of the class, among all that the model knows

    Raises: as `Video.frames_from`.
    """
    times, span, windows = embedded.seconds(), embedded.hop * embedded.stride, maps.windows
    shown, at = int(np.searchsorted(times[:-1], second, side="right")) - 1, 0
    for first, count, rows in embedded.shots():
        if shown < first + count:
            break
        at += rows.shape[1]
    place = (shown - first) // span
    kept = -(-count // embedded.stride)
    numbers, new = windows.window(place * windows.hop // windows.frames * windows.frames, kept)
    wanted = dict.fromkeys((first + numbers * embedded.stride).tolist())
    images, image, number = dict[int, np.ndarray](), np.empty(0), min(*wanted, shown)
    for frame in video.frames_from(float(times[number]), times):
        if number in wanted:
            images[number] = frame.image
        if number == shown:
            image = frame.image
        if number >= max(*wanted, shown):
            break
        number += 1
    window = resize_frames([images[number] for number in (first + numbers * embedded.stride).tolist()],
                           maps.img_dim, maps.resize)  # fmt: skip
    found = maps.embed(window[None])[0, new].cpu().numpy()[place % (windows.frames // windows.hop)]
    layout = recognizer.layout(embedded.fps or Fraction(25))
    weights = _weights(recognizer, embedded, layout, np.array([at + place]), np.array([label]))
    return image, _weighted(weights, found[None], maps)[0].reshape(maps.grid)


def draw_heat(image: np.ndarray, heat: np.ndarray, top: float, maps: Maps) -> np.ndarray:
    """A frame (H, W, 3) uint8 RGB with the heat of its places over it.

    Args:
        heat: (h, w), of the square that the encoder saw
        top: the greatest heat of the video
    """
    height, width = image.shape[:2]
    rows, columns = maps.resize.shape(height, width, maps.img_dim)
    seen, side = np.zeros((max(rows, maps.img_dim), max(columns, maps.img_dim)), np.float32), maps.img_dim
    above, left = round((rows - side) / 2), round((columns - side) / 2)
    share = heat.astype(np.float32) / max(float(heat.max()), FAINT * top, 1e-9)
    share = np.clip((share - LEAST) / (1 - LEAST), 0, 1)
    seen[above : above + side, left : left + side] = cv2.resize(
        share, (side, side), interpolation=cv2.INTER_CUBIC
    )
    share = cv2.resize(seen[:rows, :columns], (width, height)).clip(0, 1)
    colors = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return (image + OPACITY * share[..., None] * (colors.astype(np.float32) - image)).astype(np.uint8)
