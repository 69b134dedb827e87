import struct
import zlib
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import gray_frames
from video.files import VideoError
from video.reader import Video, check_whole
from video.writer import write_video


def probe(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate, frames


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(15)])
def test_mp4_has_codec_rate_frames_and_starts_fast(tmp_path, fps):
    path = tmp_path / "x.mp4"
    assert write_video(path, gray_frames(list(range(0, 250, 10))), fps) == 25
    codec, pixels, rate, frames = probe(path)
    assert (codec, pixels, rate, len(frames)) == ("h264", "yuv420p", fps, 25)
    assert [round(float(frame.mean())) for frame in frames] == pytest.approx(range(0, 250, 10), abs=3)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert Video(path).fps() == fps
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mp4"]


@given(height=st.integers(16, 50), width=st.integers(16, 50))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    path = tmp_path / "odd.mp4"
    write_video(path, gray_frames([0, 90, 180], height, width), Fraction(25))
    frames = probe(path)[3]
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    assert len(frames) == 3


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
def test_gif_keeps_time_without_drift(tmp_path, fps):
    path = tmp_path / "x.gif"
    assert write_video(path, gray_frames(list(range(0, 200, 4))), fps) == 50
    with Image.open(path) as image:
        durations = []
        for number in range(image.n_frames):
            image.seek(number)
            durations.append(image.info["duration"])
    assert len(durations) == 50
    assert sum(durations) == pytest.approx(1000 * 50 / fps, abs=10)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")

    def broken():
        yield from gray_frames([0, 1])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_video(path, broken(), Fraction(25))
    with pytest.raises(ValueError, match="no frames"):
        write_video(path, [], Fraction(25))
    with pytest.raises(ValueError, match=r"choose \.mp4 or \.gif"):
        write_video(tmp_path / "x.mkv", [], Fraction(25))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_frames_in_rgb_and_by_number(tmp_path, gray_video):
    video = Video(gray_video(count=20))
    assert video.count() == 20
    assert len(list(video.frames())) == 20
    wanted = [0, 0, 0, 5, 6, 19]
    chosen = [round(float(frame.mean()) / 3) for frame in video.frames(wanted)]
    assert chosen == wanted
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
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    # Of the last byte of an AVI, its index alone is short.
    last = {"mp4": 1, "avi": 2000}[suffix]
    for length in {20, 100, len(data) // 3, len(data) // 2, len(data) - last}:
        cut.write_bytes(data[:length])
        with pytest.raises(VideoError, match="truncated"):
            check_whole(cut)


def test_files_that_are_no_video(tmp_path, gray_video):
    text, empty = tmp_path / "text.avi", tmp_path / "empty.avi"
    text.write_text("this is not a video\n" * 100)
    empty.touch()
    with pytest.raises(VideoError, match="decoded"):
        Video(text).count()
    with pytest.raises(VideoError, match="empty"):
        Video(empty).count()
    with pytest.raises(FileNotFoundError, match=r"gone\.avi"):
        Video(tmp_path / "gone.avi").count()
    with pytest.raises(VideoError, match="only"):
        list(Video(gray_video(count=3)).frames([0, 99]))


def test_original_clips_have_the_frames_that_decode(subset):
    import csv

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
        for packet in (*stream.encode(av.VideoFrame(16000, 8192, "yuvj420p")), *stream.encode(None)):
            container.mux(packet)
    with pytest.raises(VideoError, match="16000 x 8192 pixels are too large"):
        list(Video(path).frames())

    header = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    header[16:24] = struct.pack(">II", 20000, 20000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(header)
    with pytest.raises(VideoError, match=r"0\.png: a damaged image, or one of more"):
        list(Video(tmp_path / "frames").frames())
