"""The original's way of training, written fresh: JPEG files, PIL, fp32, encoding in each step."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from features.networks import encoder_spec
from video.reader import Video

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Original(nn.Module):
    """The original's network: fp32, contiguous, BatchNorm as it is, everything in train mode."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        spec = encoder_spec(name)
        self.feature_extractor, width = spec.build(pretrained=False), spec.width
        self.final = nn.Sequential(nn.Linear(width, 512), nn.BatchNorm1d(512, momentum=0.01))
        self.lstm = nn.LSTM(512, 1024, 1, batch_first=True, bidirectional=True)
        self.attention_layer = nn.Linear(2048, 1)
        self.output_layers = nn.Sequential(
            nn.Linear(2048, 1024),
            nn.BatchNorm1d(1024, momentum=0.01),
            nn.ReLU(),
            nn.Linear(1024, num_classes),
            nn.Softmax(dim=-1),
        )

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.feature_extractor(frames)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        batch, time_steps = clips.shape[:2]
        latent = self.final(self.encode(clips.flatten(0, 1))).view(batch, time_steps, -1)
        hidden = self.lstm(latent)[0]
        weights = self.attention_layer(hidden).softmax(dim=1)
        return self.output_layers((weights * hidden).sum(dim=1))


class OriginalClips:
    """Clips as the original reads them: JPEG files, one by one, through PIL and torchvision's transforms."""

    def __init__(self, img_dim: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.transform = transforms.Compose(
            [
                transforms.Resize((img_dim, img_dim), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def extract(self, video: Video) -> Path:
        folder = Path(self.folder.name) / video.path.stem
        folder.mkdir(exist_ok=True)
        for number, frame in enumerate(video.frames()):
            Image.fromarray(frame).save(folder / f"{number}.jpg")
        return folder

    def read(self, folder: Path, length: int) -> torch.Tensor:
        paths = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
        paths = [paths[0]] * max(0, length - len(paths)) + paths
        return torch.stack([self.transform(Image.open(path)) for path in paths[:length]])


class OriginalProcess:
    """The original in a process of its own: there the C library manages memory as it did for the original.

    Args:
        name: of the encoder
        img_dim: height and width of the frames in pixels
    """

    def __init__(self, name: str, img_dim: int, device: torch.device) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(_start, name, img_dim, device).result()

    def extract(self, video: Video) -> Path:
        """Write the frames of a clip as JPEG files."""
        return self._pool.submit(_extract, video.path).result()

    def step(self, folders: list[Path], labels: list[int], length: int) -> float:
        """Seconds of a training step."""
        return self._pool.submit(_step, folders, labels, length).result()

    def encode(self, folder: Path, length: int) -> float:
        """Seconds of encoding frames of a clip."""
        return self._pool.submit(_encode, folder, length).result()


# Of the original's process.
_device: torch.device
_original: Original
_original_clips: OriginalClips
_original_optimizer: torch.optim.Optimizer


def _start(name: str, img_dim: int, device: torch.device) -> None:
    global _original, _original_clips, _original_optimizer, _device
    _device, _original_clips = device, OriginalClips(img_dim)
    _original = Original(name, 101).to(device).train()
    head = [parameter for name, parameter in _original.named_parameters() if "feature" not in name]
    _original_optimizer = torch.optim.Adam(head, lr=1e-5)


def _extract(path: Path) -> Path:
    return _original_clips.extract(Video(path))


def _step(folders: list[Path], labels: list[int], length: int) -> float:
    def work() -> None:
        frames = torch.stack([_original_clips.read(folder, length) for folder in folders]).to(_device)
        loss = F.cross_entropy(_original(frames), torch.tensor(labels, device=_device))
        _original_optimizer.zero_grad()
        loss.backward()
        _original_optimizer.step()

    return common.seconds(work, _device)


def _encode(folder: Path, length: int) -> float:
    with torch.no_grad():
        return common.seconds(
            lambda: _original.encode(_original_clips.read(folder, length).to(_device)), _device
        )
