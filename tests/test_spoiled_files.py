"""Videos, checkpoints, lists and embeddings, spoiled at random: each ends well, or in a one-line error."""

import io
import os
import pickle
import random
import shutil
import zipfile

import numpy as np
import pytest
from test_odd_files import KINDS, draw_kind

from conftest import ROOT, TRAIN_FLAGS, Script, data_flags, make_small
from video.files import VideoError
from video.reader import Video

# Of each kind; with many more it is a stress test.
CASES = int(os.environ.get("CASES", "5"))
# Films that are cut can be told in all but those of ASF, which states no end.
TOLD = [kind for kind in KINDS if not kind[0].endswith(("wmv", "asf"))]
# What a list or a table may hold that it should not.
WORDS = (
    b"../../outside/x.avi", b"/etc/passwd", b"-1", b"0", b"99999999999999999999", b"1e9", b"NaN", b"null",
    b"WalkLeft/../WalkLeft/x.avi", b"\xff\xfe", b"\x00", b"$(touch executed)", b"`touch executed`", b"{}",
    b"[]", b"WalkLeft\\x.avi", b" ", b"\r", b'"', b"WalkLeft/", b"x" * 5000,
)  # fmt: skip


class Payload:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return open, (str(ROOT / "executed"), "w")


def spoil(data, rng, words):
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


def hostile_checkpoint(data, rng):
    """A checkpoint that holds code, bare or in place of its own pickle."""
    code = pickle.dumps(Payload(), protocol=rng.choice((2, 4)))
    if rng.random() < 0.3:
        return code
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            new.writestr(item, code if item.filename.endswith("data.pkl") else old.read(item))
    return target.getvalue()


@pytest.fixture(scope="module")
def good(toy, tmp_path_factory):
    """A folder with what is sound: a data set, its embeddings and a checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    flags = train_flags(make_small(toy, folder / "data"), folder)
    done = Script("train.py", *flags).outcome()
    assert done.status == 0, done.err
    return folder


def train_flags(data, folder):
    flags = [*data_flags(data), *TRAIN_FLAGS, "--num_epochs", 1, "--latent_dim", 4, "--num_workers", 0]
    flags += ["--cache_path", folder / "cache", "--output_path", folder / "model"]
    return [*flags, "--run_path", folder / "run"]


def spoiled_case(kind, good, out, rng):
    """A file that is spoiled, and the command that reads it."""
    clip = good / "data/UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    model, training = good / "model/ConvLSTM_1.pth", ["train.py", *train_flags(good / "data", out)]
    if kind == "list":
        shutil.copytree(good / "data/ucfTrainTestlist", out / "lists")
        target = rng.choice(sorted((out / "lists").iterdir()))
        check = ["dataset.py", "check", "--dataset_path", good / "data/UCF-101"]
        command = [*(check if rng.random() < 0.3 else training), "--split_path", out / "lists"]
    elif kind == "embeddings":
        shutil.copytree(good / "cache", out / "cache")
        files = (path for path in (out / "cache").rglob("*") if path.is_file() and path.name != "lock")
        target, command = rng.choice(sorted(files)), training
    else:
        if kind == "checkpoint":
            target = model = shutil.copy(model, out / "x.pth")
        elif kind == "video":
            clip = target = shutil.copy(clip, out / rng.choice(("x.avi", "x.mp4", "x.mov")))
        else:
            name, codec, pixels = rng.choice(TOLD)
            clip = target = draw_kind(out / name, codec, pixels)[0]
        command = ["test_on_video.py", "--video_path", clip, "--checkpoint_model", model]
        command += ["--precision", "fp32", "--output", out / "y.mp4"]
    data = target.read_bytes()
    if kind == "bit":
        data = bytearray(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "checkpoint" and rng.random() < 0.3:
        data = hostile_checkpoint(data, rng)
    else:
        data = spoil(data, rng, kind == "list" or (kind == "embeddings" and target.suffix != ".npy"))
    target.write_bytes(data)
    return target, command


def decoded(path, fill):
    """The frames of a video, or the error, when memory has held other things."""
    dirty = [np.full((400, 400, 3), fill, np.uint8) for _ in range(50)]
    del dirty
    try:
        return [frame.tobytes() for frame in Video(path).frames()]
    except VideoError as error:
        return str(error)


def snapshot(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["list", "embeddings", "checkpoint", "video", "bit"])
def test_spoiled_files_end_well_or_in_one_line(good, kind, tmp_path):
    before = snapshot(good)
    for number in range(CASES):
        out = tmp_path / str(number)
        out.mkdir()
        target, command = spoiled_case(kind, good, out, random.Random(f"{kind} {number}"))
        done = Script(*command).outcome()
        said = f"case {number}, {target.name}: {done.out}{done.err}"
        assert "Traceback" not in said
        assert done.status in (0, 1, 2), said
        assert not done.status or sum("error:" in line for line in said.splitlines()) == 1, said
        assert not (ROOT / "executed").exists(), "code was run"
        assert snapshot(good) == before, "a file outside of the output folder changed"
        if kind == "bit" and done.status == 0:
            assert Video(out / "y.mp4").count() == 8 or "frames decoded" in said, "not a word"
            assert decoded(target, 0) == decoded(target, 255), "other frames the second time"
