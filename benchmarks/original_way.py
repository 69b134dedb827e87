"""The original's way of encoding, written fresh: JPEG files, PIL, fp32, frames of one clip at a time."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import torch
from PIL import Image
from torchvision import transforms

from features.networks import encoder_spec
from video.reader import Video

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Original:
    """The original's network and its clips: contiguous, BatchNorm as it is, everything in train mode."""

    def __init__(self, name: str, img_dim: int, device: torch.device) -> None:
        self.folder, self.device = tempfile.TemporaryDirectory(), device
        self.network = encoder_spec(name).build(pretrained=False).to(device).train()
        self.transform = transforms.Compose(
            [
                transforms.Resize((img_dim, img_dim), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def extract(self, path: Path) -> Path:
        folder = Path(self.folder.name) / path.stem
        folder.mkdir(exist_ok=True)
        for number, frame in enumerate(Video(path).frames()):
            Image.fromarray(frame).save(folder / f"{number}.jpg")
        return folder

    @torch.no_grad()
    def encode(self, folder: Path, length: int) -> float:
        paths = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
        paths = [paths[0]] * max(0, length - len(paths)) + paths

        def work() -> None:
            frames = torch.stack([self.transform(Image.open(path)) for path in paths[:length]])
            self.network(frames.to(self.device))

        return common.seconds(work, self.device)


class OriginalProcess:
    """The original in a process of its own: there the C library manages memory as it did for the original."""

    def __init__(self, name: str, img_dim: int, device: torch.device) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, _start, (name, img_dim, device))

    def extract(self, video: Video) -> Path:
        """Write the frames of a clip as JPEG files."""
        return self._pool.submit(_call, "extract", video.path).result()

    def encode(self, folder: Path, length: int) -> float:
        """Seconds of encoding frames of a clip."""
        return self._pool.submit(_call, "encode", folder, length).result()


# Of the original's process.
_original: Original


def _start(name: str, img_dim: int, device: torch.device) -> None:
    global _original
    _original = Original(name, img_dim, device)


def _call(method: str, *args: object) -> Any:
    return getattr(_original, method)(*args)
