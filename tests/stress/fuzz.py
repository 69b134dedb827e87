"""Spoil videos, checkpoints, lists and caches at random: does each end well, or in a one-line error?

python3 tests/stress/fuzz.py --cases 500
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/stress")]

SECONDS = 10
KINDS = ("video", "checkpoint", "list", "cache", "bit")
# What a list or an index may hold that it should not.
WORDS = (
    b"../../outside/x.avi", b"/etc/passwd", b"-1", b"0", b"99999999999999999999", b"1e9", b"NaN", b"null",
    b"WalkLeft/../WalkLeft/x.avi", b"\xff\xfe", b"\x00", b"$(touch executed)", b"`touch executed`", b"{}",
    b"[]", b"WalkLeft\\x.avi", b" ", b"\r", b'"', b"WalkLeft/", b"x" * 5000,
)  # fmt: skip


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, (self.marker, "w")


def spoil(data: bytes, rng: random.Random, words: bool) -> bytes:
    """Some bytes of a file changed, cut, moved, repeated or replaced."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        if not spoiled:
            break
        at = rng.randrange(len(spoiled)) if rng.random() < 0.5 else rng.randrange(min(512, len(spoiled)))
        size = rng.choice((1, 2, 4, 16, 256))
        way = rng.randrange(7 if words else 6)
        if way == 0:
            spoiled[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            spoiled[at : at + size] = rng.randbytes(size)
        elif way == 2:
            del spoiled[at : at + size]
        elif way == 3:
            spoiled[at:at] = spoiled[at : at + size]
        elif way == 4:
            del spoiled[at:]
        elif way == 5:
            spoiled[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"))
        else:
            ends = [place for place, value in enumerate(spoiled) if value in b" \n:,/"] or [0]
            at = rng.choice(ends) + 1
            spoiled[at : at + rng.choice((0, 1, 8))] = rng.choice(WORDS)
    return bytes(spoiled)


def hostile_checkpoint(data: bytes, marker: str, rng: random.Random) -> bytes:
    """A checkpoint that holds code, bare or in place of its own pickle."""
    code = pickle.dumps(Payload(marker), protocol=rng.choice((2, 4)))
    if rng.random() < 0.3:
        return code
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            new.writestr(item, code if item.filename.endswith("data.pkl") else old.read(item))
    return target.getvalue()


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    """A file with one bit flipped."""
    flipped = bytearray(data)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def draw_kinds(folder: Path) -> dict[str, int]:
    """Write a video of each kind, and tell how many frames each has."""
    import decoders

    from video.reader import Video

    folder.mkdir()
    frames = {}
    for kind in decoders.kinds():
        if kind.size[0] < 1000:
            decoders.draw(kind, folder / kind.name)
            frames[kind.name] = Video(folder / kind.name).count()
    return frames


def silent_loss(tables: Path, frames: int, log: Path) -> str | None:
    """Whether more than 2 % of the frames are missing in an output, and nobody was told."""
    if not tables.exists():
        return None
    found = json.loads(tables.read_text())["frames"]
    if found < 0.98 * frames and "frames decoded" not in log.read_text(errors="replace"):
        return f"{found} of {frames} frames, and not a word"
    return None


def work() -> None:
    """The process that runs the commands, one for each line of input."""
    import torch

    from conftest import add_tiny_encoder
    from utils import process

    add_tiny_encoder()
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        module = __import__(job["module"])
        with open(job["log"], "w") as log:  # noqa: PTH123
            saved = os.dup(1), os.dup(2)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status: object = "no exit"
            try:
                process.run(lambda: module.main(job["argv"]))  # noqa: B023
            except SystemExit as stop:
                status = stop.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
        print(json.dumps({"status": status}), flush=True)


class Worker:
    """Runs commands in a process that is begun anew when it dies or takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, module: str, argv: list[object], log: Path, limit: float = SECONDS) -> tuple[object, float]:
        """The exit status, or what happened instead, and seconds."""
        if self._process is None:
            command = [sys.executable, __file__, "--work"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=log.parent
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        start = time.monotonic()
        job = {"module": module, "argv": [str(value) for value in argv], "log": str(log)}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], limit)
        elapsed = time.monotonic() - start
        line = process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)["status"], elapsed
        self.close()
        return ("died" if ready else f"took over {limit} s"), elapsed

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


def snapshot(folder: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file that no command has to touch."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and out not in path.parents and path.suffix not in (".log", ".spoiled")
    }


def complaint(status: object, log: str) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    if status not in (0, 1, 2):
        return f"ended with {status}"
    if "Traceback" in log:
        return "a traceback"
    if status and sum("error:" in line for line in log.splitlines()) != 1:
        return f"status {status} and not one line of error"
    return None


def main() -> int:
    """Spoil, run and count; returns 1 if anything ended badly."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--cases", type=int, default=500)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.work:
        work()
        return 0

    rng = random.Random(args.seed)
    bad: list[str] = []
    counts: Counter[tuple[str, object]] = Counter()
    longest = 0.0
    worker = Worker()
    with tempfile.TemporaryDirectory() as folder:
        here, good, out = Path(folder), Path(folder) / "good", Path(folder) / "out"
        make = [sys.executable, "data/make_toy_actions.py", "--output_path", str(good), "--groups", "8"]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for video in list(good.glob("UCF-101/*/*.avi")):
            if video.parent.name not in ("WalkLeft", "WalkRight"):
                video.unlink()
        cache = here / "cache"
        data = ["--dataset_path", good / "UCF-101", "--split_path", good / "ucfTrainTestlist"]
        small = ["--encoder", "tiny", "--img_dim", 16, "--sequence_length", 4, "--latent_dim", 4]
        plain = ["--precision", "fp32", "--num_workers", 0]
        train = [*data, *small, *plain, "--num_epochs", 1, "--cache_path", cache, "--run_path", out / "run"]
        log = here / "case.log"
        status, _ = worker.run("train", [*train, "--output_path", here / "model"], log, 20 * SECONDS)
        assert status == 0, log.read_text()
        shutil.copy(here / "model" / "ConvLSTM_1.pth", here / "small.pth")
        checkpoint = here / "small.pth"
        videos = sorted(good.glob("UCF-101/*/*.avi"))
        frames_of = draw_kinds(here / "drawn")
        drawn = sorted((here / "drawn").iterdir())
        lists = sorted((good / "ucfTrainTestlist").iterdir())
        before = snapshot(here, out)
        for number in range(args.cases):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            kind = KINDS[number % len(KINDS)]
            source = {
                "bit": rng.choice(drawn),
                "video": rng.choice(videos),
                "checkpoint": checkpoint,
                "list": rng.choice(lists),
                "cache": rng.choice(sorted(path for path in cache.rglob("*") if path.name != "lock")),
            }[kind]
            if source.is_dir():
                source = next(path for path in sorted(source.iterdir()) if path.suffix == ".jsonl")
            spoiled = (
                flip_bit(source.read_bytes(), rng)
                if kind == "bit"
                else spoil(source.read_bytes(), rng, kind in ("list", "cache") and source.suffix != ".npy")
            )
            module, argv = "test_on_video", ["--output", out / "x.mp4", *plain]
            if kind == "bit":
                target = out / source.name
                argv += ["--video_path", target, "--checkpoint_model", checkpoint]
            elif kind == "video":
                target = out / rng.choice(("x.avi", "x.mp4", "x.mov"))
                argv += ["--video_path", target, "--checkpoint_model", checkpoint]
            elif kind == "checkpoint":
                target = out / "x.pth"
                if rng.random() < 0.2:
                    spoiled = hostile_checkpoint(source.read_bytes(), str(here / "executed"), rng)
                argv += ["--video_path", videos[0], "--checkpoint_model", target]
            elif kind == "list":
                shutil.copytree(good / "ucfTrainTestlist", out / "lists")
                target = out / "lists" / source.name
                checking = rng.random() < 0.3
                module = "dataset" if checking else "train"
                argv = ["check", *data] if checking else [*train, "--output_path", out / "model"]
                argv += ["--split_path", out / "lists"]
                argv += [] if checking else ["--cache_path", out / "cache"]
            else:
                shutil.copytree(cache, out / "cache")
                target = out / "cache" / source.relative_to(cache)
                module, argv = (
                    "train",
                    [*train, "--cache_path", out / "cache", "--output_path", out / "model"],
                )
            target.write_bytes(spoiled)
            status, elapsed = worker.run(module, argv, log)
            longest = max(longest, elapsed)
            counts[kind, status if status in (0, 1, 2) else "bad"] += 1
            wrong = complaint(status, log.read_text(errors="replace"))
            if kind == "bit" and not wrong:
                wrong = silent_loss(out / "x.mp4.json", frames_of[source.name], log)
                twice, _ = worker.run("decoders", ["--twice", target], here / "twice.log")
                wrong = wrong or (None if twice == 0 else f"decoded twice: {twice}")
            if (here / "executed").exists() or list(here.rglob("executed")):
                wrong = "code was executed"
            if snapshot(here, out) != before:
                wrong, before = "a file outside of the output folder changed", snapshot(here, out)
            if wrong:
                bad.append(f"case {number}, {kind} {source.name}: {wrong}")
                print(bad[-1], log.read_text(errors="replace")[-1500:], sep="\n", flush=True)
        worker.close()
    print("| kind | success | one-line error | bad |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        errors = counts[kind, 1] + counts[kind, 2]
        print(f"| {kind} | {counts[kind, 0]} | {errors} | {counts[kind, 'bad']} |")
    print(f"{args.cases} cases, seed {args.seed}: {len(bad)} ended badly; the longest took {longest:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
