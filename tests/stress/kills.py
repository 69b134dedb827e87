"""Kill at random instants and start again; is the result the same as in one go?

python3 tests/stress/kills.py cache --kills 10         # files byte-identical, on UCF-101
python3 tests/stress/kills.py training --kills 20      # weights bit-identical, on the toy data
"""

import argparse
import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
Begin = Callable[[Path], subprocess.Popen[bytes]]


def begin(script: str, *flags: object) -> subprocess.Popen[bytes]:
    """Start a command, its output thrown away but for errors."""
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command.

    Raises: RuntimeError with what it printed if it failed.
    """
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])


def killed(start: Begin, folder: Path, kills: int, longest: float, rng: np.random.Generator) -> int:
    """Run to the end with up to `kills` kills on the way, each within `longest` seconds; returns how many."""
    done = 0
    while done < kills:
        process = start(folder)
        try:
            process.communicate(timeout=float(rng.uniform(0, longest)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
            continue
        if process.returncode:
            raise RuntimeError(f"status {process.returncode} after {done} kills")
        return done
    finish(start(folder))
    return done


def cache_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of the one cache in a folder."""
    (cache,) = folder.iterdir()
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.iterdir())
        if path.name != "lock"
    }


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor of the last checkpoint of a training."""
    path = max((folder / "out").glob("ConvLSTM_*.pth"), key=lambda path: int(path.stem.split("_")[1]))
    state = torch.load(path, weights_only=True)["state"]
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def main() -> int:
    """Kill, and compare; returns 1 if anything differs."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "ucf101-subset",
        help="folder with UCF-101/ and ucfTrainTestlist/; a part of UCF-101 is enough",
    )
    flags.add_argument("what", choices=("cache", "training"))
    flags.add_argument("--kills", type=int, default=10)
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rng = np.random.default_rng(args.seed)
    encoder = ["--encoder", args.encoder, "--img_dim", args.img_dim]

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        if args.what == "training":
            finish(begin("data/make_toy_actions.py", "--output_path", here / "toy"))
            args.data = here / "toy"
        data = ["--dataset_path", args.data / "UCF-101", "--split_path", args.data / "ucfTrainTestlist"]

        def filling(at: Path) -> subprocess.Popen[bytes]:
            return begin("features.py", *data, *encoder, "--no_flip", "--cache_path", at)

        def training(at: Path) -> subprocess.Popen[bytes]:
            files = ["--output_path", at / "out", "--cache_path", at / "cache"]
            if (at / "out" / "last.pth").exists():
                return begin("train.py", "--resume", *files)
            model = ["--sequence_length", 16, "--latent_dim", 128, "--no_flip", "--num_epochs", 8]
            return begin("train.py", *data, *encoder, *model, *files, "--save_seconds", 1)

        start, result = {"cache": (filling, cache_digests), "training": (training, weights)}[args.what]
        clock = time.monotonic()
        finish(start(here / "whole"))
        seconds = time.monotonic() - clock
        expected, kills, runs, same = result(here / "whole"), 0, 0, 0
        while kills < args.kills:
            runs += 1
            at = here / f"killed-{runs}"
            # Several kills in each run: the start-up of a process takes some seconds.
            kills += killed(start, at, args.kills - kills, 6 + seconds / 4, rng)
            equal = result(at) == expected
            same += equal
            print(f"run {runs}, {kills} kills so far: {'the same' if equal else 'DIFFERENT'}", flush=True)
    print(f"{kills} kills in {runs} runs ({seconds:.0f} s in one go): {same} of {runs} the same, bit for bit")
    return 0 if same == runs else 1


if __name__ == "__main__":
    sys.exit(main())
