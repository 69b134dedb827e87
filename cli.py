"""What the commands share: values of flags, the device, seeds, and errors in one line."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

# cuBLAS gives the same sums twice only with a fixed workspace; it reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch

T = TypeVar("T")


def positive_int(text: str) -> int:
    """Value of a flag that counts something: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: it takes a whole number of 1 or more")
    return value


def non_negative_int(text: str) -> int:
    """Value of a flag that may be none: 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is too small: it takes a whole number of 0 or more")
    return value


def positive_float(text: str) -> float:
    """Value of a flag that measures something: more than 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} does not fit: it takes a number above 0")
    return value


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A flag's type out of a function that raises ValueError: its message is what the user sees."""

    def value(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value


def passing(check: Callable[[str], object]) -> Callable[[str], str]:
    """A flag's type out of a function that raises ValueError for what will not do; the text stays."""

    def value(text: str) -> str:
        checked(check)(text)
        return text

    return value


def non_negative_float(text: str) -> float:
    """Value of a flag that measures something or nothing: 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} does not fit: it takes a number of 0 or more")
    return value


def fraction(text: str) -> float:
    """Value of a flag that is a share: from 0 to less than 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not fit: it takes a share from 0 to less than 1")
    return value


def share(text: str) -> float:
    """Value of a flag that is a share: from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not fit: it takes a share from 0 to 1")
    return value


def positive_share(text: str) -> float:
    """Value of a flag that is a share, and not none: above 0, to 1."""
    positive_float(text)
    return share(text)


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, if this process is the one that does."""
    if is_first():
        print(text, flush=True)


def available_cores() -> int:
    """Cores that this process may use, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def beside(path: Path, suffix: str) -> Path:
    """<path><suffix>, beside a folder; a link to the folder is not followed."""
    # Absolute, so that "." has a name too.
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow the link
    return path.with_name(path.name + suffix)


def add_data_flags(parser: argparse.ArgumentParser, *, cache: bool = True) -> None:
    """Add the flags that say where clips are, and, with `cache`, their embeddings."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_path",
        type=Path,
        default=Path("data/UCF-101"),
        help="videos or extracted frames; the videos (default) take a fifth of the disk",
    )
    group.add_argument(
        "--split_path", type=Path, default=Path("data/ucfTrainTestlist"), help="folder of the official lists"
    )
    if not cache:
        return
    group.add_argument(
        "--cache",
        choices=("disk", "off"),
        default="disk",
        help="disk (default) encodes each frame once and trains from there; off encodes in every epoch anew",
    )
    group.add_argument(
        "--cache_path",
        type=Path,
        help="folder of the embeddings; default: <dataset_path>-embeddings; a local SSD is best",
    )
    group.add_argument(
        "--frame_stride",
        type=positive_int,
        default=1,
        help="use every N-th frame only; default: 1 in training, which is best for UCF-101, then the "
        "checkpoint's; 2 halves time and disk of the cache",
    )


def add_split_flag(group: Any, *, default: int | None, choices: Sequence[int | str], help: str) -> None:
    """Add --split_number, to a parser or a group of one."""

    def number(text: str) -> int | str:
        return text if text in choices else int(text)

    group.add_argument(
        "--split_number",
        type=number,
        choices=choices,
        default=default,
        help=f"{help}; random, a fifth of all clips as in the original, leaks and is for comparison only",
    )


def add_encoder_flags(
    parser: argparse.ArgumentParser,
    *,
    check_encoder: Callable[[str], object],
    check_streams: Callable[[str], object],
) -> None:
    """Add the flags that say what becomes of a frame.

    Args:
        check_encoder, check_streams: raise ValueError for a value that will not do
    """
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        type=passing(check_encoder),
        default="resnet152",
        help="frozen network: resnet152 (default) is the original's, efficientnet_lite0 is over 10 times "
        "as fast and works offline; also resnet18 to resnet101, and timm/<name> for any network of timm",
    )
    group.add_argument(
        "--encoder_weights",
        type=Path,
        help="file with other weights for it, .safetensors or .pth, named as torchvision or timm names them; "
        "default: those of ImageNet",
    )
    group.add_argument(
        "--streams",
        type=passing(check_streams),
        default="rgb",
        help="what a frame is seen as: rgb (default), diff (what changed since the frame before), or "
        "rgb,diff for both, joined at the end; diff is another cache of the same size",
    )
    group.add_argument(
        "--img_dim",
        type=positive_int,
        help="height and width of the frames in pixels; default: what the encoder was trained at, 224 for "
        "most, which is the most accurate; 112 is 4 times as fast",
    )
    group.add_argument(
        "--no_flip",
        action="store_true",
        help="do not mirror training clips; for classes that differ in left and right, not for UCF-101; "
        "halves the cache",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add --device, --precision and --num_workers, which mean the same everywhere."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, ...; auto (default) takes the accelerator where there is one",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the frozen encoder; auto (default) is bf16 where the hardware has it, 2 to 5 times as fast",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder: some 20 %% faster after a minute or two, pays for more than 10,000 frames",
    )
    group.add_argument(
        "--num_workers",
        type=non_negative_int,
        # On a machine that torchrun shares out, each process gets its part.
        default=max(1, min(8, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))),
        help="threads or processes that decode video; one per core (default) keeps the encoder fed",
    )


def choose_device(name: str) -> torch.device:
    """The device that --device names; of several of a kind, each process of torchrun gets its own.

    Raises: ValueError if PyTorch has no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] + ([accelerator.type] if accelerator else [])
    try:
        device = (accelerator or torch.device("cpu")) if name == "auto" else torch.device(name)
    except RuntimeError:
        device = None
    if (
        device is None
        or device.type not in here
        or (device.index or 0) >= max(1, torch.accelerator.device_count())
    ):
        raise ValueError(f"device {name!r} is not available; choose one of auto, {', '.join(here)}")
    if device.type != "cpu" and "LOCAL_RANK" in os.environ:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the frozen encoder computes in: bfloat16 if asked for, or if `auto` and the hardware has it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers, and ask for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def make_writable_folder(folder: Path) -> None:
    """Make an output folder, and see that a file can be written there, before the work starts.

    Raises: OSError naming the folder if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{folder}: cannot write into this folder ({reason}); choose another one") from error


class Interrupted(KeyboardInterrupt):
    """A signal that asks the command to end; `signum` is which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Deferred:
    """Takes SIGINT and SIGTERM and only notes the first, so that a loop can come to a good end by itself.

    The second one stops at once, as it would outside of the `with`.

    Attributes:
        signum: the signal that came, None if none did
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _explain(error: Exception) -> str | None:
    """An error in one line that says what to do; None for one that is not the user's."""
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).split(".", 1)[0]
        return (
            f"the accelerator's memory is full ({reason}); lower --batch_size, or --img_dim while frames are "
            "encoded"
        )
    if isinstance(error, (ValueError, OSError)):
        # An error out of a data worker carries the worker's traceback; its last line is the message.
        line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        head, _, rest = line.partition(": ")
        named = rest and head.rsplit(".", 1)[-1].endswith("Error") and " " not in head
        return rest if named else line
    if "DataLoader worker" in str(error):
        return (
            "a process that decodes video died, perhaps for lack of memory; lower --num_workers, or encode "
            "once with --cache disk"
        )
    return None


def run(main: Callable[[], int]) -> None:
    """Run a command's `main` and exit with its status.

    Wrong data ends in one line and status 1. SIGTERM ends as SIGINT does, with what was begun cleared away
    and status 128 + its number.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = main()
    except (ValueError, OSError, RuntimeError) as error:
        line = _explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        print(f"interrupted by {signal.Signals(signum).name}", file=sys.stderr)
        status = 128 + signum
    sys.exit(status)
