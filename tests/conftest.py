"""What the tests share: small drawn clips, a tiny encoder, and ways to run the commands."""

import contextlib
import multiprocessing
import os
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from features import networks
from features.encoder import Encoder
from features.windows import Windows
from models import ConvLSTM, build_head
from splits.datasets import DataSettings
from training.checkpoint import Checkpoint, save_checkpoint
from utils import process
from video.frames import Resize
from video.writer import write_video

ROOT = Path(__file__).resolve().parent.parent
# A part of UCF-101 with the official lists: beside the checkout, or where this variable says.
SUBSET = Path(os.environ.get("UCF101_SUBSET", ROOT.parent / "shared" / "ucf101-subset"))


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status, and what it printed."""

    status: int
    out: str
    err: str

    def one_line_error(self) -> str:
        """The error, having checked that it is one line and no traceback."""
        printed = self.err.replace("\r", "\n").splitlines()
        # Bars may stand before it.
        lines = [line for line in printed if line.strip() and "it/s" not in line and "/s]" not in line]
        lines = [line for line in lines if "%|" not in line]
        assert len(lines) == 1, self.err
        assert "error:" in lines[0]
        return lines[0]


def run_script(script: str, *args: object, cwd: Path = ROOT, **env: str) -> Outcome:
    """Run a command of the repository as a user does."""
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# A process of these has what takes seconds to import already.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["train", "test", "extract_features", "test_on_video", "torch._dynamo", "matplotlib.backends.backend_agg"]
)
# The ConvLSTM of tests has 64 numbers, that of users 1024: checkpoints took most of many tests' time.
_LSTM_SIZES = ConvLSTM.__init__.__kwdefaults__
FULL_SIZE, _LSTM_SIZES["hidden_dim"] = _LSTM_SIZES["hidden_dim"], 64
# How often a command is killed and begun again; with many more it is a stress test.
KILLS = int(os.environ.get("KILLS", "3"))


def _run_as_script(script: Path, words: list[str], out: Path, more: dict[str, Any]) -> None:
    os.chdir(ROOT)
    os.environ.update(more["env"])
    for number, path in ((1, out / "out"), (2, out / "err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if limit := more["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


class Script:
    """A command of the repository in a process of its own, to be killed or waited for.

    Forked, with the tiny encoders and a narrow ConvLSTM, so that it begins within a moment; `run_script`
    starts Python anew, as a user does.

    Args:
        script: its file
        words: its flags
        file_limit: bytes that a file may have, as on a disk that is full then; 0 for no limit
        env: more variables of its environment
    """

    def __init__(self, script: str, *words: object, file_limit: int = 0, **env: str) -> None:
        self._out = Path(tempfile.mkdtemp())
        for name in ("out", "err"):
            (self._out / name).touch()
        given, more = [str(word) for word in words], {"file_limit": file_limit, "env": env}
        self._process = _SERVER.Process(target=_run_as_script, args=(ROOT / script, given, self._out, more))
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def outcome(self) -> Outcome:
        """Wait for its end; the status is negative after a signal."""
        self._process.join(120)
        status = self._process.exitcode
        assert status is not None, "it takes too long"
        out, err = ((self._out / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._out)
        return Outcome(status, out, err)


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Run a command's `main` in this process, in an empty folder, with the tiny encoder at hand."""
    monkeypatch.chdir(tmp_path)

    def run(module: ModuleType, *args: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            process.run(module.main)
        out, err = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)

    return run


class TinyNetwork(nn.Module):
    """Frame -> 48 numbers: a 4 x 4 thumbnail, mixed by fixed random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.mix = nn.Conv2d(3, 3, 1)
        self.pool = nn.AdaptiveAvgPool2d(4)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.pool(self.mix(self.norm(frames))).flatten(1)


def build_tiny(*, pretrained: bool, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    network = TinyNetwork()
    if state is not None:
        network.load_state_dict(state)
    elif pretrained:
        values = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.data = torch.rand(parameter.shape, generator=values) + 0.1
    return network


TINY_ACTIONS = ["bow", "clean and jerk", "push up", "pull ups"]


class TinyVideoNetwork(nn.Module):
    """Window -> 27 numbers for every 4 frames: how a 3 x 3 thumbnail of it changes, mixed."""

    averages_pairs = True

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(3, 3, (4, 1, 1), (4, 1, 1))
        self.norm = nn.BatchNorm3d(3)
        self.last_layer = nn.Linear(27, len(TINY_ACTIONS))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool2d(clips.flatten(0, 1), 3).unflatten(0, clips.shape[:2])
        return self.norm(self.mix(small)).transpose(1, 2).flatten(2)


def build_tiny_video(*, pretrained: bool, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    network = TinyVideoNetwork()
    if state is not None:
        network.load_state_dict(state)
    elif pretrained:
        values = torch.Generator().manual_seed(2)
        for parameter in network.parameters():
            parameter.data = torch.rand(parameter.shape, generator=values) - 0.3
    return network


TINY = networks.EncoderSpec(build_tiny, 48)
TINY_VIDEO = networks.EncoderSpec(
    build_tiny_video, 27, input_size=24, cpu_batch=2, windows=Windows(16, 4, 8), live_frames=8, fps=25,
    resize=Resize(24, 28, "bilinear"), flip=False, sequence_length=6, window_step=1,
    categories=lambda: list(TINY_ACTIONS),
)  # fmt: skip


networks.ENCODERS |= {"tiny": lambda: TINY, "tiny_video": lambda: TINY_VIDEO}


def embed_frames(encoder: Encoder, frames: torch.Tensor) -> torch.Tensor:
    """Embeddings (N, D) of frames (N, 3, H, W), each by itself."""
    return encoder.embed(frames[:, None])[:, 0]


CLASSES = ["WalkLeft", "WalkRight"]


def untrained_checkpoint(encoder: str = "tiny", model: str = "ConvLSTM", **sizes: int) -> Checkpoint:
    """A small head that has learned nothing, over a tiny encoder for frames of 32 pixels."""
    torch.manual_seed(0)
    made = Encoder(encoder, img_dim=32 if encoder == "tiny" else None)
    if model == "ConvLSTM":
        sizes = {"hidden_dim": 16} | sizes
    head, sizes = build_head(model, made.width, len(CLASSES), latent_dim=16, sequence_length=8, **sizes)
    return Checkpoint(made, head.eval(), model, sizes, CLASSES, 8)


def save_untrained(path: Path, encoder: str = "tiny") -> Path:
    """A file with such a checkpoint."""
    save_checkpoint(path, untrained_checkpoint(encoder))
    return path


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Quantized networks of tests are not those of the user; the list of fonts, made in seconds, is."""
    os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    # What processes are forked from finds the modules of the folder that it begins in.
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()


@pytest.fixture(autouse=True)
def full_size_lstm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ConvLSTM that users have, for a test that is marked `full_size`; `run_script` has it too."""
    if request.node.get_closest_marker("full_size"):
        monkeypatch.setitem(_LSTM_SIZES, "hidden_dim", FULL_SIZE)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 8 classes and 8 groups: 64 clips."""
    path = tmp_path_factory.mktemp("data") / "toy"
    made = run_script("data/make_toy_actions.py", "--output_path", path, "--groups", 8)
    assert made.status == 0, made.err
    return path


def ucf101_at(path: Path) -> DataSettings:
    """Clips of UCF-101 and their lists in a folder."""
    return DataSettings(dataset_path=path / "UCF-101", split_path=path / "ucfTrainTestlist")


@pytest.fixture
def small(toy: Path, tmp_path: Path) -> Path:
    """A data set of one's own to spoil: 3 groups of the toy's first two classes, with lists of its own."""
    return make_small(toy, tmp_path / "small")


def make_small(toy: Path, path: Path) -> Path:
    """That data set, in a folder."""
    lists = path / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 WalkLeft\n2 WalkRight\n")
    train, test = [], []
    for label, name in enumerate(("WalkLeft", "WalkRight"), 1):
        (path / "UCF-101" / name).mkdir(parents=True)
        for group in (1, 2, 3):
            clip = f"{name}/v_{name}_g{group:02d}_c01.avi"
            shutil.copy(toy / "UCF-101" / clip, path / "UCF-101" / clip)
            (test.append(clip) if group == 1 else train.append(f"{clip} {label}"))
    for split in (1, 2, 3):
        (lists / f"trainlist0{split}.txt").write_text("\r\n".join(train) + "\r\n")
        (lists / f"testlist0{split}.txt").write_text("\r\n".join(test) + "\r\n")
    return path


@pytest.fixture(scope="session")
def subset() -> Path:
    """391 original clips of UCF-101."""
    if not (SUBSET / "UCF-101").is_dir():
        pytest.skip(f"no part of UCF-101 at {SUBSET}; name one with UCF101_SUBSET")
    return SUBSET


def gray_frames(values: list[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames of one gray value each, which survive any codec."""
    return [np.full((height, width, 3), value, np.uint8) for value in values]


@pytest.fixture
def gray_video(tmp_path: Path) -> Callable[..., Path]:
    """Write an mp4 whose frame i has the gray value 3 i."""

    def write(name: str = "gray.mp4", count: int = 30, fps: int = 25) -> Path:
        from fractions import Fraction

        path = tmp_path / name
        write_video(path, gray_frames([3 * i for i in range(count)]), Fraction(fps))
        return path

    return write


TRAIN_FLAGS = ("--encoder", "tiny", "--img_dim", 32, "--sequence_length", 8, "--precision", "fp32")


def data_flags(path: Path) -> list[object]:
    """Flags that name a data set."""
    return ["--dataset_path", path / "UCF-101", "--split_path", path / "ucfTrainTestlist"]


@pytest.fixture
def train_flags() -> Callable[[Path], list[object]]:
    """Flags that train on a data set in seconds."""
    return lambda path: [*data_flags(path), *TRAIN_FLAGS]


def trained_in(folder: Path, data: Path, *words: object) -> Outcome:
    """What a training printed; checkpoints and reports are in `out` and `run`."""
    places = ["--output_path", folder / "out", "--run_path", folder / "run"]
    done = Script("train.py", *data_flags(data), *TRAIN_FLAGS, *places, *words).outcome()
    assert done.status == 0, done.err
    return done
