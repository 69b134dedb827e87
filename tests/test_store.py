"""embed_video, the store of .npy and .json files, and extract_features.py, which fills it."""

import json
import random
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dataset
import extract_features
from conftest import KILLS, Script, gray_frames
from features.embed import embed_video
from features.encoder import Encoder
from features.store import Store, StoreError
from features.windows import Cutter, Windows
from features.workers import map_on_cores
from video.frames import resize_frames
from video.reader import Video
from video.writer import write_video

WALK = "WalkLeft/v_WalkLeft_g01_c01"
TINY = ("--encoder", "tiny", "--img_dim", 32, "--precision", "fp32")


def noise_video(path, count, size=(48, 64), seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    write_video(path, list(images), Fraction(25))
    return Video(path)


def expected_embeddings(encoder, images, *, flip=False):
    """By the definition: windows one after the other, the last one as long as is needed."""
    layout, kept = encoder.windows, resize_frames(images, encoder.img_dim, encoder.resize)
    kept = kept.flip(-1) if flip else kept
    rows = []
    for start in range(0, len(images), layout.frames):
        numbers, new = layout.window(start, len(images))
        rows.append(encoder.embed(kept[numbers][None])[0, new])
    return torch.cat(rows).numpy()


@given(
    frames=st.integers(1, 90), chunk=st.integers(1, 40), batch=st.integers(1, 4), per=st.integers(1, 5),
    least=st.integers(1, 5), hop=st.integers(1, 4),
)  # fmt: skip
def test_windows_give_each_embedding_once_whatever_the_chunks(frames, chunk, batch, per, least, hop):
    layout = Windows(hop * max(per, least), hop, hop * least)
    images = np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    cutter, spans = Cutter(layout, batch), []
    parts = [part for at in range(0, frames, chunk) for part in cutter.add(images[at : at + chunk])]
    for windows, new in [*parts, *cutter.end()]:
        assert windows.shape[1] % hop == 0
        assert min(layout.least, layout.frames) <= windows.shape[1] <= layout.frames
        for window in windows:
            numbers = window[:, 0, 0, 0].tolist()
            spans += [numbers[at : at + hop] for at in range(0, len(numbers), hop)][new]
    assert len(spans) == layout.count(frames)
    if frames >= layout.least:
        # The last window ends with the video; before it, embedding k is of frames [hop k, hop (k + 1)).
        assert spans[-1][-1] == frames - 1
        whole = frames // layout.frames * layout.frames // hop
        assert spans[:whole] == [list(range(hop * k, hop * (k + 1))) for k in range(whole)]


@pytest.mark.parametrize("name", ["tiny", "tiny_video"])
@pytest.mark.parametrize("count", [2, 7, 16, 39])
def test_a_video_is_encoded_as_its_windows_are(tmp_path, name, count):
    video, encoder = noise_video(tmp_path / "x.mp4", count), Encoder(name)
    images = list(video.frames())
    plain = embed_video(video, encoder)
    assert plain.embeddings.dtype == np.float16
    assert (plain.frames, plain.begins, plain.fps, plain.times) == (count, [0], 25, None)
    assert np.allclose(plain.embeddings[0], expected_embeddings(encoder, images), atol=2e-3)
    mirrored = embed_video(video, encoder, stride=2, flip=True, map=map_on_cores)
    assert mirrored.embeddings.shape[:2] == (2, encoder.windows.count(-(-count // 2)))
    for flip in (False, True):
        expected = expected_embeddings(encoder, images[::2], flip=flip)
        assert np.allclose(mirrored.embeddings[int(flip)], expected, atol=2e-3)


def test_windows_begin_anew_at_a_cut(tmp_path):
    bright = [np.full((48, 64, 3), (250, 200, 40), np.uint8)] * 33
    write_video(tmp_path / "x.mp4", gray_frames([20] * 41) + bright, Fraction(25))
    encoder = Encoder("tiny_video")
    whole = embed_video(Video(tmp_path / "x.mp4"), encoder)
    cut = embed_video(Video(tmp_path / "x.mp4"), encoder, cuts=True, stride=2)
    assert (whole.begins, cut.begins) == ([0], [0, 41])
    shots = list(cut.shots())
    assert [(first, frames, rows.shape[1]) for first, frames, rows in shots] == [(0, 41, 6), (41, 33, 5)]
    assert sum(rows.shape[1] for *_, rows in shots) == cut.embeddings.shape[1]
    assert cut.seconds()[[0, 50, 74]].tolist() == [0, 2, 74 / 25]


def test_uneven_frames_keep_their_times(tmp_path):
    times = [Fraction(number * number, 100) for number in range(12)]
    write_video(
        tmp_path / "x.mp4", gray_frames([9 * number for number in range(12)]), Fraction(25), times=times
    )
    found = embed_video(Video(tmp_path / "x.mp4"), Encoder("tiny"))
    assert found.seconds()[:12].tolist() == pytest.approx([float(time) for time in times], abs=1e-3)


def extract(call, small, *flags):
    return call(extract_features, "--dataset_path", small / "UCF-101", *TINY, *flags)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_store_is_files_that_any_program_can_read(call, small, tmp_path):
    done = extract(call, small, "--output", "out", "--frame_stride", 2)
    assert done.status == 0, done.err
    assert "6 of 6 videos in out, 6 of them now: embeddings of 48 numbers, one for every 2 frames" in done.out
    array = np.load(tmp_path / f"out/{WALK}.npy")
    about = json.loads((tmp_path / f"out/{WALK}.json").read_text())
    clip = small / "UCF-101" / f"{WALK}.avi"
    frames = Video(clip).count()
    assert (array.dtype, array.shape) == (np.float16, (2, -(-frames // 2), 48))
    assert (about["frames"], about["stride"], about["hop"], about["begins"]) == (frames, 2, 1, [0])
    assert (about["size"], about["mtime_ns"]) == (clip.stat().st_size, clip.stat().st_mtime_ns)
    written = json.loads((tmp_path / "out/encoder.json").read_text())
    assert (written["encoder"], written["img_dim"], written["precision"]) == ("tiny", 32, "float32")
    assert written["encoder_sha256"] == Encoder("tiny").sha256()


def test_what_is_there_is_skipped_and_what_does_not_fit_is_made_anew(call, small, tmp_path):
    assert extract(call, small, "--output", "out").status == 0
    before = contents(tmp_path / "out")
    out = tmp_path / "out"
    (out / f"{WALK}.npy").unlink()
    (out / "WalkLeft/v_WalkLeft_g02_c01.json").unlink()
    (out / "WalkLeft/v_WalkLeft_g03_c01.json").write_text("{")
    (out / "WalkRight/v_WalkRight_g01_c01.npy").write_bytes(b"half")
    done = extract(call, small, "--output", "out")
    assert "6 of 6 videos in out, 4 of them now" in done.out
    assert contents(out) == before
    assert "6 of 6 videos in out, 0 of them now" in extract(call, small, "--output", "out").out
    clip = small / "UCF-101/WalkRight/v_WalkRight_g02_c01.avi"
    clip.write_bytes((small / "UCF-101" / f"{WALK}.avi").read_bytes())
    assert "1 of them now" in extract(call, small, "--output", "out").out


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--img_dim", 24, "--img_dim 32, not 24"), ("--frame_stride", 3, "--frame_stride 1, not 3"),
     ("--encoder", "tiny_video", "--encoder tiny, not tiny_video")],
)  # fmt: skip
def test_another_setting_is_named_and_nothing_is_written_over(call, small, tmp_path, flag, value, words):
    assert extract(call, small, "--output", "out").status == 0
    before = contents(tmp_path / "out")
    flags = (flag, value, "--img_dim", 24) if flag == "--encoder" else (flag, value)
    done = extract(call, small, "--output", "out", *flags)
    assert (done.status, words in done.one_line_error()) == (1, True), done.err
    assert contents(tmp_path / "out") == before


def test_videos_that_cannot_be_read_are_named_and_the_others_go_on(call, small, tmp_path):
    (small / "UCF-101" / f"{WALK}.avi").write_text("no video")
    done = extract(call, small, "--output", "out")
    assert done.status == 1
    assert "5 of 6 videos in out" in done.out
    assert f"not extracted: {WALK}" in done.err
    folder = small / "UCF-101/WalkLeft"
    done = call(extract_features, "--video_path", folder, "--encoder", "tiny", "--output", "own")
    assert (done.status, "2 of 3 videos in own" in done.out) == (1, True)
    assert sorted(path.name for path in (tmp_path / "own").glob("*.npy")) == [
        "v_WalkLeft_g02_c01.npy",
        "v_WalkLeft_g03_c01.npy",
    ]


def test_bad_paths_end_in_a_line(call, small, tmp_path):
    assert "no such video" in call(extract_features, "--video_path", "gone.mp4").one_line_error()
    both = [small / "UCF-101" / f"{WALK}.avi", tmp_path / "v_WalkLeft_g01_c01.mp4"]
    both[1].touch()
    assert "rename one" in call(extract_features, "--video_path", *both).one_line_error()
    (tmp_path / "file").touch()
    done = extract(call, small, "--output", "file")
    assert (done.status, "file" in done.one_line_error()) == (1, True)


def test_a_full_disk_keeps_what_is_whole_and_tells_what_is_missing(small, tmp_path):
    flags = ["extract_features.py", "--dataset_path", small / "UCF-101", *TINY, "--output", tmp_path / "out"]
    assert Script(*flags).outcome().status == 0
    whole = contents(tmp_path / "out")
    sizes = sorted(len(data) for name, data in whole.items() if name.endswith(".npy"))
    for path in (tmp_path / "out").rglob("*.npy"):
        path.unlink()
    done = Script(*flags, file_limit=sizes[2]).outcome()
    assert done.status == 1
    error = done.one_line_error()
    assert "the disk became full" in error
    assert "of 6 videos are missing, about" in error
    assert all(whole[name] == data for name, data in contents(tmp_path / "out").items())
    assert Script(*flags).outcome().status == 0
    assert contents(tmp_path / "out") == whole


def test_two_at_once_and_kills_at_any_instant_leave_the_same_arrays(small, tmp_path):
    def start(folder):
        return Script("extract_features.py", "--dataset_path", small / "UCF-101",
                      "--output", tmp_path / folder, *TINY)  # fmt: skip

    assert start("whole").outcome().status == 0
    expected = contents(tmp_path / "whole")
    for done in [one.outcome() for one in (start("pair"), start("pair"))]:
        assert done.status == 0, done.err
    assert contents(tmp_path / "pair") == expected
    rng = random.Random(0)
    for _ in range(KILLS):
        running = start("cut")
        time.sleep(rng.uniform(0.2, 1.0))
        running.kill()
        running.outcome()
    assert start("cut").outcome().status == 0
    found = {name: data for name, data in contents(tmp_path / "cut").items() if ".partial" not in name}
    assert found == expected


def test_damaged_embeddings_are_found_by_the_check(call, small, tmp_path):
    root = tmp_path / "cache"
    assert extract(call, small, "--cache_path", root).status == 0
    checking = ["check", "--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist",
                "--cache_path", root]  # fmt: skip
    done = call(dataset, *checking)
    assert done.status == 0, done.out
    assert "embeddings of 6 clips read" in done.out
    (path,) = root.rglob(f"{WALK}.npy")
    array = np.load(path)
    array[0, 0, 0] = np.nan
    np.save(path, array)
    done = call(dataset, *checking)
    assert (done.status, f"1 clips are damaged, the first {WALK}" in done.out) == (1, True)
    path.write_bytes(path.read_bytes().replace(b"(", b" ", 1))
    done = call(dataset, *checking)
    assert (done.status, f"1 clips are damaged, the first {WALK}" in done.out) == (1, True)


def test_near_copies_on_both_sides_of_a_split_are_remarked(call, small, tmp_path):
    for label, name in enumerate(("WalkLeft", "WalkRight")):
        copy = small / f"UCF-101/{name}/v_{name}_g01_c01.avi"
        # The test clip of the one class is a training clip of the other.
        other = ("WalkRight", "WalkLeft")[label]
        copy.write_bytes((small / f"UCF-101/{other}/v_{other}_g02_c01.avi").read_bytes())
    assert extract(call, small, "--cache_path", tmp_path / "cache").status == 0
    done = call(dataset, "check", "--dataset_path", small / "UCF-101", "--split_path",
                small / "ucfTrainTestlist", "--cache_path", tmp_path / "cache")  # fmt: skip
    assert "v_WalkLeft_g01_c01.avi is nearly the same as WalkRight/v_WalkRight_g02_c01.avi" in done.out


def test_an_unknown_file_in_the_place_of_a_store_is_told(tmp_path):
    (tmp_path / "encoder.json").write_text("[]")
    with pytest.raises(StoreError, match="damaged; delete the folder"):
        Store(tmp_path, Encoder("tiny").prepare("fp32"))


def test_embeddings_of_real_clips_are_those_of_whole_videos(subset, tmp_path):
    """On i3d, windows of 64 frames: an embedding for every 8 frames, whatever the length."""
    paths = sorted((subset / "UCF-101").glob("*/*_g01_c01.avi"))[:2]
    encoder = Encoder("i3d", img_dim=64).prepare("fp32")
    for path in paths:
        found = embed_video(Video(Path(path)), encoder, map=map_on_cores)
        assert found.frames == Video(path).count()
        assert found.embeddings.shape == (1, -(-found.frames // 8), 1024)
