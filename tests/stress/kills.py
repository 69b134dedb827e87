"""Kill a training at random instants and begin it again: the embeddings and weights of one go, bit for bit?

python3 tests/stress/kills.py --kills 20
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def train(data: Path, folder: Path, seconds: float | None = None) -> bool:
    """Train, or go on, and kill it after so many seconds; returns whether it came to its end.

    Raises: RuntimeError with what it printed if it failed.
    """
    flags = ["--output_path", folder / "out", "--cache_path", folder / "cache"]
    if (folder / "out" / "last.pth").exists():
        flags += ["--resume"]
    else:
        flags += ["--dataset_path", data / "UCF-101", "--split_path", data / "ucfTrainTestlist", "--no_flip"]
        flags += [
            "--encoder",
            "efficientnet_lite0",
            "--img_dim",
            112,
            "--sequence_length",
            16,
            "--latent_dim",
            128,
            "--num_epochs",
            8,
        ]
        flags += ["--save_seconds", 1]
    command = [sys.executable, "train.py", *map(str, flags)]
    try:
        # On the time limit it is killed by SIGKILL.
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return True


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of embeddings and of each tensor of the last checkpoint."""
    last = max((folder / "out").glob("ConvLSTM_*.pth"), key=lambda path: int(path.stem.split("_")[1]))
    contents = {name: tensor.numpy() for name, tensor in torch.load(last, weights_only=True)["state"].items()}
    contents |= {str(path.relative_to(folder)): np.load(path) for path in folder.rglob("*.npy")}
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in contents.items()}


def main() -> int:
    """Kill, and compare; returns 1 if anything differs."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--kills", type=int, default=20)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rng, kills, runs, same = np.random.default_rng(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        make = [sys.executable, "data/make_toy_actions.py", "--output_path", str(here / "toy")]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        clock = time.monotonic()
        train(here / "toy", here / "whole")
        seconds = time.monotonic() - clock
        expected = digests(here / "whole")
        while kills < args.kills:
            runs += 1
            # Several kills in each run: the start-up of a process takes some seconds.
            while not train(here / "toy", here / f"killed-{runs}", rng.uniform(0, 6 + seconds / 4)):
                kills += 1
            equal = digests(here / f"killed-{runs}") == expected
            same += equal
            print(f"run {runs}, {kills} kills so far: {'the same' if equal else 'DIFFERENT'}", flush=True)
    print(f"{kills} kills in {runs} runs ({seconds:.0f} s in one go): {same} of {runs} the same, bit for bit")
    return 0 if same == runs else 1


if __name__ == "__main__":
    sys.exit(main())
