"""How a command ends: errors of the user in one line, signals, and who prints."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Self

from tqdm import tqdm


class UserError(ValueError):
    """Wrong input: one line with the bad value and the next step is shown; other errors keep a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named, or that must be there, is not."""


def available_cores() -> int:
    """Cores that this process may use, which containers and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, if this process is the first one."""
    if is_first():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning to the standard error, above a bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Interrupted(KeyboardInterrupt):
    """Raised on SIGTERM, and on a second SIGINT; its argument is the number of the signal."""


class Deferred:
    """Notes the first SIGINT or SIGTERM as `signum`, so that a loop can come to a good end by itself.

    The second one stops at once, as it would outside of the `with`.
    """

    signum: int | None = None

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._note) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum


# What takes less memory.
LOWER = "lower --batch_size or --img_dim, or with --finetune --sequence_length or the number of blocks"


def _explain(error: Exception) -> str | None:
    """An error in one line that says what to do; None for a bug."""
    # Loading it takes seconds; where it is not loaded, this is not its error.
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        reason = str(error).split(".", 1)[0]
        return f"the accelerator's memory is full ({reason}); {LOWER}"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        more = str(error).partition("tried to allocate ")[2].partition(".")[0]
        return f"the memory is full ({more} more are needed); {LOWER}"
    # The system's errors (a full disk, no permission) have a number.
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
        # An error out of a data worker carries the worker's traceback; its last line is the message.
        text = str(error).strip() or type(error).__name__
        line = text.splitlines()[-1] if text.startswith("Caught ") else "\\n".join(text.splitlines())
        head, _, rest = line.partition(": ")
        is_type = rest and head.rsplit(".", 1)[-1].endswith("Error") and " " not in head
        return rest if is_type else line
    # Of a worker that was killed; an error in one says "in DataLoader worker process".
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return "a process that decodes video died, perhaps for lack of memory; lower --num_workers"
    return None


def run(main: Callable[[], int]) -> None:
    """Run a command's `main` and exit with its status.

    An error of the user or of the operating system ends in one line and status 1, a bug in its traceback.
    SIGTERM ends as SIGINT does, with what was begun cleared away and status 128 + its number.
    """

    def interrupt(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, interrupt)
    # A file's name may hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as error:
        signum = error.args[0] if isinstance(error, Interrupted) else signal.SIGINT
        print(f"interrupted by {signal.Signals(signum).name}", file=sys.stderr)
        status = 128 + signum
    sys.exit(status)
