"""Frames out of videos and folders, and files that are cut, empty, too large or none."""

import csv
import struct
import zlib
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from video.files import VideoError
from video.reader import Video, check_whole
from video.writer import write_video


def test_frames_in_rgb_and_by_number(tmp_path, gray_video):
    video = Video(gray_video(count=20))
    assert video.count() == len(list(video.frames())) == 20
    wanted = [0, 0, 0, 5, 6, 19]
    assert [round(float(frame.mean()) / 3) for frame in video.frames(wanted)] == wanted
    with pytest.raises(VideoError, match="only"):
        list(video.frames([0, 99]))
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 255
    write_video(tmp_path / "red.mp4", [red] * 3, Fraction(25))
    first = next(Video(tmp_path / "red.mp4").frames())
    assert first[..., 0].min() > 200
    assert first[..., 1:].max() < 60


def test_a_folder_of_frames_is_in_the_order_of_numbers(tmp_path):
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), np.full((8, 8, 3), 20 * number, np.uint8))
    video = Video(tmp_path)
    assert video.count() == 12
    assert [round(float(frame.mean()) / 20) for frame in video.frames()] == list(range(12))
    assert [round(float(frame.mean()) / 20) for frame in video.frames([2, 2, 10])] == [2, 2, 10]
    (tmp_path / "3.jpg").write_text("no image")
    with pytest.raises(VideoError, match=r"3\.jpg"):
        list(video.frames())
    (tmp_path / "cover.jpg").write_text("stray")
    with pytest.raises(VideoError, match=r"cover\.jpg"):
        Video(tmp_path).count()


@pytest.mark.parametrize("suffix", ["avi", "mp4"])
def test_a_cut_file_is_found_at_every_length(tmp_path, toy, gray_video, suffix):
    whole = gray_video() if suffix == "mp4" else next((toy / "UCF-101").rglob("*.avi"))
    check_whole(whole)
    data, cut = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    # Of the last bytes of an AVI, its index alone is short.
    last = {"mp4": 1, "avi": 2000}[suffix]
    for length in {20, 100, len(data) // 3, len(data) // 2, len(data) * 3 // 4, len(data) - last}:
        cut.write_bytes(data[:length])
        with pytest.raises(VideoError, match="truncated"):
            check_whole(cut)


PLAYLIST = "#EXTM3U\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("this is not a video\n" * 100, "no video in this file"),
        ("", "empty"),
        (None, "no such video file"),
        # Nothing is opened that another file names.
        ("ffconcat version 1.0\nfile '{0}'\n", "no video in this file"),
        (PLAYLIST, "no video in this file"),
    ],
)
def test_files_that_are_no_video(tmp_path, gray_video, text, message):
    if text is not None:
        (tmp_path / "x.mp4").write_text(text.format(gray_video()))
    with pytest.raises((VideoError, FileNotFoundError), match=message):
        Video(tmp_path / "x.mp4").count()


def test_original_clips_have_the_frames_that_decode(subset):
    with (subset / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    lying = [row for row in rows if row["frames_decoded"] != row["frames_in_index"]]
    assert lying
    for row in lying + rows[::40]:
        path = subset / "UCF-101" / row["path"]
        check_whole(path)
        assert Video(path).count() == int(row["frames_decoded"])
        assert float(Video(path).fps()) == pytest.approx(float(row["fps"]), abs=0.01)


def test_frames_that_are_too_large_are_refused(tmp_path):
    """A header can claim any size, and memory is asked for before the first frame shows."""
    path = tmp_path / "large.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16000, 8192, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(16000, 8192, "yuvj420p")))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="16000 x 8192 pixels are too large"):
        list(Video(path).frames())

    header = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    header[16:24] = struct.pack(">II", 20000, 20000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(header)
    with pytest.raises(VideoError, match=r"0\.png: a damaged image, or one of more"):
        list(Video(tmp_path / "frames").frames())


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_frames_from_a_second_on_are_those_of_the_whole(tmp_path, toy, suffix):
    source = Video(next((toy / "UCF-101").rglob("*.avi")))
    images = [*source.frames()] * 3
    path = tmp_path / f"x{suffix}"
    if suffix == ".mp4":
        write_video(path, iter(images), Fraction(25))
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", 25, options={"bf": "2", "g": "12"})
            stream.height, stream.width = images[0].shape[:2]
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode(None))
    whole = list(Video(path).timed_frames())
    times = np.array([float(frame.second) for frame in whole])
    for second in (0.0, 0.05, 2.5, 3.333, times[-1], times[-1] + 9):
        first = int(np.searchsorted(times, second, side="right")) - 1
        found = list(Video(path).frames_from(second, times))
        assert [frame.second for frame in found] == [frame.second for frame in whole[first:]]
        assert all((a.image == b.image).all() for a, b in zip(found, whole[first:], strict=True))
    # Where what a search finds is not among the times, all is read.
    assert len(list(Video(path).frames_from(2.5, times + 0.02))) == len(list(Video(path).frames_from(2.5)))
