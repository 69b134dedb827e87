"""Frames into mp4: their times, the sound of their source, turned sources."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from conftest import gray_frames
from video.reader import Video
from video.writer import write_video


def look(path):
    """Frame times, and seconds and codec of the sound, of a video."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return times, 0.0, None
        stream = container.streams.audio[0]
        seconds = sum(frame.samples / frame.rate for frame in container.decode(stream))
        return times, seconds, stream.codec_context.codec.canonical_name


def with_sound(path, codec, seconds=2, rate=44100, late=0.0, gap=(0.0, 0.0)):
    """A video of so many seconds at 25 frames/s with a tone, which begins late and has a gap, in seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout="mono")
        for frame in gray_frames([5 * n % 250 for n in range(25 * seconds)]):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = (8000 * np.sin(np.arange(rate * seconds) / 20)).astype(np.int16)
        for start in range(round(late * rate), len(tone), 1024):
            if gap[0] <= start / rate < gap[1]:
                continue
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(sound.encode(frame))
        for stream in (video, sound):
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "expected"),
    [("a.mp4", "aac", "aac"), ("b.avi", "libmp3lame", "mp3"), ("c.avi", "pcm_s16le", "aac")],
)
def test_the_sound_is_kept(tmp_path, name, codec, expected):
    source = with_sound(tmp_path / name, codec)
    video = Video(source)
    assert write_video(tmp_path / "out.mp4", video.frames(), video.fps(), sound=source) == 50
    times, seconds, kept = look(tmp_path / "out.mp4")
    assert len(times) == 50
    assert kept == expected
    assert seconds == pytest.approx(2, abs=0.1)


def test_a_silent_source_gives_a_silent_file_and_damaged_sound_ends_early(tmp_path):
    write_video(tmp_path / "silent.mp4", gray_frames([9] * 10), Fraction(25))
    write_video(tmp_path / "out.mp4", gray_frames([9] * 10), Fraction(25), sound=tmp_path / "silent.mp4")
    assert look(tmp_path / "out.mp4")[2] is None
    source = with_sound(tmp_path / "sound.avi", "libmp3lame")
    data = bytearray(source.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    source.write_bytes(data)
    assert write_video(tmp_path / "half.mp4", gray_frames([9] * 50), Fraction(25), sound=source) == 50
    assert len(look(tmp_path / "half.mp4")[0]) == 50


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_steady_rates_are_exact(tmp_path, rate):
    write_video(tmp_path / "in.mp4", gray_frames(list(range(60))), rate)
    video = Video(tmp_path / "in.mp4")
    frames = list(video.timed_frames())
    assert [frame.second for frame in frames] == [number / rate for number in range(60)]
    times = [frame.second for frame in frames]
    write_video(tmp_path / "out.mp4", [frame.image for frame in frames], video.fps(), times=times)
    assert look(tmp_path / "out.mp4")[0] == [number / rate for number in range(60)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_that_come_unsteadily_keep_their_times(tmp_path, suffix):
    """As phones record: slower in the dark."""
    rng = np.random.default_rng(0)
    times = np.cumsum([0, *rng.choice([20, 33, 40, 120], 59)]).tolist()  # ms
    source = tmp_path / f"in{suffix}"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, frame in zip(times, gray_frames([4 * n for n in range(60)]), strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    video = Video(source)
    found = [frame.second for frame in video.timed_frames()]
    assert [round(1000 * time) for time in found] == times
    write_video(tmp_path / "out.mp4", video.frames(), video.fps(), times=found)
    assert [round(1000 * time) for time in look(tmp_path / "out.mp4")[0]] == times
    # Frames beyond the times that the file tells follow at its rate.
    write_video(tmp_path / "more.mp4", gray_frames([1] * 62), Fraction(25), times=found)
    assert [round(1000 * time) for time in look(tmp_path / "more.mp4")[0]] == [
        *times,
        times[-1] + 40,
        times[-1] + 80,
    ]


def test_the_index_stands_in_front_so_that_it_plays_while_it_loads(tmp_path):
    write_video(tmp_path / "out.mp4", gray_frames([1] * 30), Fraction(25))
    data = (tmp_path / "out.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_a_turned_phone_is_turned_back(tmp_path):
    """The file says "turn by a quarter" in its track header (ISO/IEC 14496-12, 8.3.2)."""
    write_video(tmp_path / "lying.mp4", gray_frames([30] * 5, 48, 64), Fraction(25))
    data = bytearray((tmp_path / "lying.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one, unit = 1 << 16, 1 << 30
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, unit)
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, unit)
    (tmp_path / "standing.mp4").write_bytes(data)
    video = Video(tmp_path / "standing.mp4")
    assert next(video.frames()).shape == (64, 48, 3)
    write_video(tmp_path / "out.mp4", video.frames(), video.fps())
    assert next(Video(tmp_path / "out.mp4").frames()).shape == (64, 48, 3)
