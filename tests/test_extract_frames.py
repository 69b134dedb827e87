import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import pytest

import extract_frames
from conftest import ROOT, Script
from video.reader import Video

LEFT = "WalkLeft/v_WalkLeft_g01_c01"


def count_frames(path):
    return {clip.name: len(list(clip.iterdir())) for clip in sorted(path.glob("*/*"))}


def test_every_video_becomes_a_folder_of_numbered_frames(call, small):
    done = call(extract_frames, "--dataset_path", f"{small}/UCF-101/")
    assert done.status == 0, done.err
    folder, video = small / "UCF-101-frames" / LEFT, Video(small / f"UCF-101/{LEFT}.avi")
    assert {path.name for path in folder.iterdir()} == {f"{number}.jpg" for number in range(video.count())}
    for frame, number in zip(video.frames([0, 7]), (0, 7), strict=True):
        jpeg = cv2.imread(str(folder / f"{number}.jpg"), cv2.IMREAD_COLOR_RGB)
        assert jpeg.shape == (240, 320, 3)
        assert cv2.absdiff(jpeg, frame).mean() < 3
    assert len(count_frames(small / "UCF-101-frames")) == 6


def test_again_does_only_what_is_missing_and_quality_counts(call, small, monkeypatch):
    monkeypatch.chdir(small / "UCF-101")
    assert call(extract_frames, "--dataset_path", ".", "--quality", 30).status == 0
    clip = small / "UCF-101-frames" / LEFT
    small_size = (clip / "0.jpg").stat().st_size
    kept = small / "UCF-101-frames/WalkRight/v_WalkRight_g01_c01/0.jpg"
    kept.write_bytes(b"mine")
    shutil.rmtree(clip)
    again = call(extract_frames, "--dataset_path", "../UCF-101", "--quality", 95)
    assert again.status == 0, again.err
    assert (clip / "0.jpg").stat().st_size > 1.5 * small_size
    assert kept.read_bytes() == b"mine"


def test_unreadable_clips_are_listed_and_the_others_done(call, small):
    (small / "UCF-101/WalkLeft/bad.avi").write_text("no video")
    (small / f"UCF-101/{LEFT}.mp4").touch()
    (small / "UCF-101/WalkLeft/notes.txt").touch()
    done = call(extract_frames, "--dataset_path", small / "UCF-101")
    assert done.status == 1
    failed = [line for line in done.err.replace("\r", "\n").splitlines() if line.startswith("not extracted:")]
    assert len(failed) == 2
    for text in ("bad.avi", "has the same frame folder"):
        assert sum(text in line for line in failed) == 1
    assert len(count_frames(small / "UCF-101-frames")) == 6
    assert "Traceback" not in done.err


def test_a_killed_run_leaves_no_half_clip_and_goes_on(small):
    source = small / f"UCF-101/{LEFT}.avi"
    for number in range(60):
        os.link(source, source.with_name(f"v_copy_{number}.avi"))
    command = [sys.executable, ROOT / "extract_frames.py", "--dataset_path", small / "UCF-101"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    frames = small / "UCF-101-frames"
    deadline = time.monotonic() + 60
    while len(list(frames.glob("*/[!.]*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 5 <= len(list(frames.glob("*/[!.]*"))) < 66
    expected = Video(source).count()
    assert {len(list(clip.iterdir())) for clip in frames.glob("WalkLeft/v_copy*")} <= {expected}
    again = Script("extract_frames.py", "--dataset_path", small / "UCF-101").outcome()
    assert again.status == 0, again.err
    assert len(list(frames.glob("*/[!.]*"))) == 66
    assert not list(frames.glob("*/.*"))


def test_frames_come_beside_a_link_to_the_data_set(call, small, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/UCF-101").symlink_to(small / "UCF-101")
    done = call(extract_frames, "--dataset_path", tmp_path / "data/UCF-101")
    assert done.status == 0, done.err
    assert len(count_frames(tmp_path / "data/UCF-101-frames")) == 6


@pytest.mark.parametrize(
    ("path", "flags", "status", "message"),
    [
        (".", ["--quality", 0], 2, "quality"),
        (".", ["--quality", "high"], 2, "quality"),
        ("gone", [], 1, "gone"),
        (".", [], 1, "no video"),
    ],
)
def test_wrong_flags_and_data(call, tmp_path, path, flags, status, message):
    done = call(extract_frames, "--dataset_path", tmp_path / path, *flags)
    assert (done.status, message in done.one_line_error()) == (status, True)
