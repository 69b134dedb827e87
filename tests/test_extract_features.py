"""Embeddings of videos as files for other programs."""

import json
import shutil

import numpy as np
import pytest

import extract_features
from conftest import ucf101_at
from features.encoder import Encoder
from features.fill import open_cache
from splits.datasets import load_split
from video.reader import Video
from video.writer import write_video

FLAGS = ("--encoder", "tiny_video", "--precision", "fp32", "--num_workers", 0)


def load(folder, name):
    return np.load(folder / f"{name}.npy"), json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("encoder", ["tiny", "tiny_video"])
def test_a_data_set_gives_what_the_cache_holds(call, small, tmp_path, encoder):
    done = call(
        extract_features, "--dataset_path", small / "UCF-101", "--output", tmp_path / "out",
        "--encoder", encoder, "--precision", "fp32", "--img_dim", 24,
    )  # fmt: skip
    assert done.status == 0, done.err
    split = load_split(ucf101_at(small), 1)
    clips = split.train + split.test
    kept = open_cache(tmp_path / "cache", clips, Encoder(encoder), 24, flip=False).view(clips)
    assert len(list((tmp_path / "out").rglob("*.npy"))) == len(clips)
    for clip in clips:
        rows, about = load(tmp_path / "out", clip.name.removesuffix(".avi"))
        indices = np.arange(kept.count(clip))[None]
        assert rows.dtype == np.float32
        assert np.allclose(rows, kept.gather([clip], indices, np.zeros(1, bool))[0], atol=2e-3)
        assert about["frames"] == clip.video.count()
        hop = {"tiny": 1, "tiny_video": 4}[encoder]
        assert about["spans"][0] == [0, hop]
        assert about["spans"][-1] == [hop * (len(rows) - 1), clip.video.count()]
        assert (about["fps"], about["seconds"][1]) == (25, [hop / 25, 2 * hop / 25])
        assert about["encoder"] == encoder


def test_what_is_there_stays_and_what_has_changed_is_made_anew(call, toy, tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for number in (1, 2):
        shutil.copy(toy / f"UCF-101/SitDown/v_SitDown_g0{number}_c01.avi", clips / f"a.{number}.avi")
    flags = ("--video_path", clips, "--output", out, *FLAGS)
    assert "2 of 2 videos" in call(extract_features, *flags).out
    first, second = (out / f"a.{number}.npy" for number in (1, 2))
    times = [path.stat().st_mtime_ns for path in (first, second)]
    assert "0 of them now" in call(extract_features, *flags).out
    shutil.copy(toy / "UCF-101/SitDown/v_SitDown_g03_c01.avi", clips / "a.2.avi")
    assert "1 of them now" in call(extract_features, *flags).out
    assert [path.stat().st_mtime_ns == time for path, time in zip((first, second), times, strict=True)] == [
        True, False,
    ]  # fmt: skip
    # Half written, as by a kill between the two files.
    (out / "a.1.json").unlink()
    assert "1 of them now" in call(extract_features, *flags).out
    before = second.read_bytes()
    refused = call(extract_features, *flags, "--img_dim", 16)
    assert "is there with img_dim 24, not 16; choose another --output" in refused.one_line_error()
    assert second.read_bytes() == before


def test_other_rates_and_strides(call, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "short.mp4", iter(frames), 10)
    done = call(
        extract_features, "--video_path", tmp_path / "short.mp4", "--output", tmp_path / "out", *FLAGS
    )
    assert done.status == 0, done.err
    rows, about = load(tmp_path / "out", "short")
    assert (len(rows), about["frames"], about["spans"], about["seconds"]) == (1, 3, [[0, 3]], [[0.0, 0.3]])


def test_wrong_videos_are_told_and_the_others_are_done(call, toy, tmp_path):
    clips = tmp_path / "clips"
    (clips / "deeper").mkdir(parents=True)
    shutil.copy(toy / "UCF-101/SitDown/v_SitDown_g01_c01.avi", clips / "good.avi")
    (clips / "bad.mp4").write_bytes(b"no video")
    flags = ("--output", tmp_path / "out", *FLAGS)
    done = call(extract_features, "--video_path", clips, *flags)
    assert (done.status, "1 of 2 videos" in done.out) == (1, True)
    assert "not extracted: " in done.err
    assert "bad.mp4: no video in this file" in done.err
    assert load(tmp_path / "out", "good")[1]["frames"] == Video(clips / "good.avi").count()
    shutil.copy(clips / "good.avi", clips / "deeper/good.avi")
    same = call(extract_features, "--video_path", clips, *flags)
    assert "good.npy; rename one of the two" in same.one_line_error()
    assert (
        "no class folders"
        in call(extract_features, "--dataset_path", clips / "deeper", *flags).one_line_error()
    )
    done = call(extract_features, "--video_path", clips / "good.avi", "gone.mp4", *flags)
    assert (done.one_line_error(), done.out) == ("error: gone.mp4: no such video file; check the path", "")
    for wrong in ((), ("--video_path", "x", "--dataset_path", "y")):
        assert call(extract_features, *wrong, *flags).status == 2
