"""Kill the filling of a cache at random instants; is the finished one byte-identical to one made in one go?

python3 benchmarks/kills.py --kills 10
"""

import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "lock"
    }


def main() -> int:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--kills", type=int, default=10)
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    rng = np.random.default_rng(args.seed)

    with tempfile.TemporaryDirectory() as folder:

        def begin(cache_path: Path) -> subprocess.Popen[bytes]:
            data = ["--dataset_path", args.data / "UCF-101", "--split_path", args.data / "ucfTrainTestlist"]
            encoder = ["--encoder", args.encoder, "--img_dim", args.img_dim, "--cache_path", cache_path]
            command = [sys.executable, "features.py", *map(str, data), *map(str, encoder), "--no_flip"]
            null = subprocess.DEVNULL
            return subprocess.Popen(command, cwd=common.ROOT, stdout=null, stderr=null)

        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        start = time.monotonic()
        begin(whole).wait()
        seconds = time.monotonic() - start
        kills = 0
        while kills < args.kills:
            process = begin(killed)
            time.sleep(float(rng.uniform(0, seconds / args.kills * 2)) + 4)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            elif process.returncode == 0 and kills < args.kills:
                print(f"finished after {kills} kills; begun again")
                break
            process.wait()
            rows = next(iter(killed.glob("*/embeddings.npy")), None)
            print(
                f"kill {kills}: {rows.stat().st_size / 1e6 if rows else 0:.1f} MB of rows on disk", flush=True
            )
        begin(killed).wait()
        (one,), (other,) = whole.iterdir(), killed.iterdir()
        same = digests(one) == digests(other)
        print(f"{kills} kills; byte-identical to one go ({seconds:.0f} s): {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
