"""Spoil videos, checkpoints, lists and embeddings at random: does each end well, or in a one-line error?

python3 tests/stress/fuzz.py --cases 500
"""

import argparse
import io
import json
import multiprocessing
import os
import pickle
import random
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
# What a list or a table may hold that it should not.
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
            at = 1 + rng.choice([place for place, value in enumerate(spoiled) if value in b" \n:,/"] or [0])
            spoiled[at : at + rng.choice((0, 1, 8))] = rng.choice(WORDS)
    return bytes(spoiled)


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    """A file with one bit flipped."""
    flipped = bytearray(data)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


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


def draw_kinds(folder: Path) -> dict[str, int]:
    """Write a video of each kind, and tell how many frames each has."""
    import decoders

    from video.reader import Video

    folder.mkdir()
    frames = {}
    for kind in decoders.KINDS:
        if kind.size[0] < 1000:
            decoders.draw(kind, folder / kind.name)
            frames[kind.name] = Video(folder / kind.name).count()
    return frames


def command(module: str, argv: list[str], log: Path) -> None:
    """Run a command as its script does, in a process of its own."""
    import torch

    from conftest import add_tiny_encoder
    from utils import process

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(log.parent)
    add_tiny_encoder()
    torch.set_num_threads(1)
    process.run(lambda: __import__(module).main(argv))


def run(module: str, argv: list[object], log: Path, limit: float = SECONDS) -> tuple[object, float]:
    """The exit status, or what happened instead, and seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "test_on_video", "dataset", "conftest"])
    log.unlink(missing_ok=True)
    start = time.monotonic()
    process = context.Process(target=command, args=(module, [str(word) for word in argv], log))
    process.start()
    process.join(limit)
    status: object = process.exitcode
    if status is None:
        status = f"no end after {limit} s"
        process.kill()
        process.join()
    return status, time.monotonic() - start


def snapshot(folder: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file that no command has to touch."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and out not in path.parents and path.suffix != ".log"
    }


def complaint(status: object, log: str) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    if "Traceback" in log:
        return "a traceback"
    if status not in (0, 1, 2):
        return f"ended with {status}"
    if status and sum("error:" in line for line in log.splitlines()) != 1:
        return f"status {status} and not one line of error"
    return None


def main() -> int:
    """Spoil, run and count; returns 1 if anything ended badly."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--cases", type=int, default=500)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])  # for the processes of `run`
    rng, bad, longest = random.Random(args.seed), list[str](), 0.0
    counts: Counter[tuple[str, object]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        here, good, out = Path(folder), Path(folder) / "good", Path(folder) / "out"
        make = [sys.executable, "data/make_toy_actions.py", "--output_path", str(good), "--groups", "8"]
        subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
        for action in (good / "UCF-101").iterdir():
            if action.name not in ("WalkLeft", "WalkRight"):
                shutil.rmtree(action)
        cache, log, checkpoint = here / "cache", here / "case.log", here / "model/ConvLSTM_1.pth"
        data = ["--dataset_path", good / "UCF-101", "--split_path", good / "ucfTrainTestlist"]
        small = ["--encoder", "tiny", "--img_dim", 16, "--sequence_length", 4, "--latent_dim", 4]
        plain = ["--precision", "fp32", "--num_workers", 0]
        train = [*data, *small, *plain, "--num_epochs", 1, "--cache_path", cache, "--run_path", out / "run"]
        status, _ = run("train", [*train, "--output_path", here / "model"], log, 20 * SECONDS)
        assert status == 0, log.read_text()
        frames_of = draw_kinds(here / "drawn")
        sources = {
            "bit": sorted((here / "drawn").iterdir()),
            "video": sorted(good.glob("UCF-101/*/*.avi")),
            "checkpoint": [checkpoint],
            "list": sorted((good / "ucfTrainTestlist").iterdir()),
            "cache": sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "lock"),
        }
        before = snapshot(here, out)
        for number in range(args.cases):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            kind = KINDS[number % len(KINDS)]
            source = rng.choice(sources[kind])
            text = kind in ("list", "cache") and source.suffix != ".npy"
            spoiled = (
                flip_bit(source.read_bytes(), rng) if kind == "bit" else spoil(source.read_bytes(), rng, text)
            )
            again = [*train, "--output_path", out / "model", "--cache_path", out / "cache"]
            if kind == "list":
                shutil.copytree(good / "ucfTrainTestlist", out / "lists")
                target, lists = out / "lists" / source.name, ["--split_path", out / "lists"]
                job = (
                    ("dataset", ["check", *data, *lists])
                    if rng.random() < 0.3
                    else ("train", [*again, *lists])
                )
            elif kind == "cache":
                shutil.copytree(cache, out / "cache")
                target, job = out / "cache" / source.relative_to(cache), ("train", again)
            elif kind == "checkpoint":
                target = out / "x.pth"
                if rng.random() < 0.2:
                    spoiled = hostile_checkpoint(source.read_bytes(), str(here / "executed"), rng)
                job = ("test_on_video", ["--video_path", sources["video"][0], "--checkpoint_model", target])
            else:
                target = out / (source.name if kind == "bit" else rng.choice(("x.avi", "x.mp4", "x.mov")))
                job = ("test_on_video", ["--video_path", target, "--checkpoint_model", checkpoint])
            if job[0] == "test_on_video":
                job[1].extend([*plain, "--output", out / "y.mp4"])
            target.write_bytes(spoiled)
            status, elapsed = run(*job, log)
            longest = max(longest, elapsed)
            counts[kind, status if status in (0, 1, 2) else "bad"] += 1
            said = log.read_text(errors="replace")
            wrong = complaint(status, said)
            if kind == "bit" and not wrong and (out / "y.mp4.json").exists():
                found = json.loads((out / "y.mp4.json").read_text())["frames"]
                if found < 0.98 * frames_of[source.name] and "frames decoded" not in said:
                    wrong = f"{found} of {frames_of[source.name]} frames, and not a word"
                elif run("decoders", ["--twice", target], here / "twice.log")[0]:
                    wrong = "decoded to other frames the second time"
            if list(here.rglob("executed")):
                wrong = "code was executed"
            if snapshot(here, out) != before:
                wrong, before = "a file outside of the output folder changed", snapshot(here, out)
            if wrong:
                bad.append(wrong)
                print(f"case {number}, {kind} {source.name}: {wrong}", said[-1500:], sep="\n", flush=True)
    print("| kind | success | one-line error | bad |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        print(f"| {kind} | {counts[kind, 0]} | {counts[kind, 1] + counts[kind, 2]} | {counts[kind, 'bad']} |")
    print(f"{args.cases} cases, seed {args.seed}: {len(bad)} ended badly; the longest took {longest:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
