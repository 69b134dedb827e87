"""Frames into mp4 and gif: their times, the sound of their source, turned sources."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

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


def gif_durations(path):
    with Image.open(path) as image:
        return [image.seek(number) or image.info["duration"] for number in range(image.n_frames)]


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
    ("name", "codec", "rate", "expected"),
    [
        ("a.mp4", "aac", 44100, "aac"),
        ("b.avi", "libmp3lame", 44100, "aac"),
        ("c.avi", "pcm_s16le", 44100, "aac"),
        # Rates that AAC has not.
        ("d.mov", "pcm_u8", 6000, "aac"),
        ("e.mov", "pcm_s16le", 96000, "aac"),
    ],
)
def test_the_sound_is_kept(tmp_path, name, codec, rate, expected):
    source = with_sound(tmp_path / name, codec, rate=rate)
    video = Video(source)
    assert write_video(tmp_path / "out.mp4", video.frames(), video.fps(), sound=source) == 50
    times, seconds, kept = look(tmp_path / "out.mp4")
    assert (len(times), kept) == (50, expected)
    assert seconds == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("codec", ["pcm_s16le", "aac", "flac"])
def test_sound_keeps_its_begin_and_its_gap(tmp_path, codec):
    source = with_sound(tmp_path / "x.mkv", codec, seconds=4, late=0.8, gap=(1.5, 2.5))
    video = Video(source)
    frames = list(video.timed_frames())
    images, times = [frame.image for frame in frames], [frame.second for frame in frames]
    write_video(tmp_path / "out.mp4", images, video.fps(), times=times, sound=source, begin=video.begin)
    with av.open(str(tmp_path / "out.mp4")) as container:
        loud = np.zeros(5 * 44100)
        for frame in container.decode(container.streams.audio[0]):
            at = round(frame.pts * frame.time_base * 44100)
            loud[at : at + frame.samples] = np.abs(frame.to_ndarray().mean(0))
    heard = loud.reshape(-1, 441).max(1) > 0.05  # every 1/100 s
    assert np.flatnonzero(heard)[0] == pytest.approx(80, abs=4)
    assert not heard[155:245].any()
    assert heard[255:375].all()


def test_sound_that_nobody_decodes_is_left_out_with_a_warning(tmp_path, capfd):
    source = with_sound(tmp_path / "x.mp4", "aac")
    before, sound, after = source.read_bytes().partition(b"mp4a")
    assert sound
    source.write_bytes(before + b"zzzz" + after.replace(b"esds", b"free", 1))
    video = Video(source)
    assert write_video(tmp_path / "out.mp4", video.frames(), video.fps(), sound=source) == 50
    assert look(tmp_path / "out.mp4")[2] is None
    assert "x.mp4: the output is without its sound" in capfd.readouterr().err


def test_a_silent_source_gives_a_silent_file_and_damaged_sound_ends_early(tmp_path):
    frames = gray_frames([9] * 50)
    write_video(tmp_path / "silent.mp4", frames, Fraction(25))
    write_video(tmp_path / "out.mp4", frames, Fraction(25), sound=tmp_path / "silent.mp4")
    assert look(tmp_path / "out.mp4")[2] is None
    source = with_sound(tmp_path / "sound.avi", "libmp3lame")
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    write_video(tmp_path / "half.mp4", frames, Fraction(25), sound=source)
    assert len(look(tmp_path / "half.mp4")[0]) == 50


def test_the_last_frame_is_held_and_sound_behind_the_picture_is_told(tmp_path, capfd):
    times = [*(Fraction(number, 25) for number in range(50)), Fraction(5)]
    sound = with_sound(tmp_path / "sound.mov", "pcm_s16le", seconds=4)
    write_video(tmp_path / "x.mp4", gray_frames([9] * 50), Fraction(25), times=times, sound=sound)
    assert "sound" not in capfd.readouterr().err
    assert Video(tmp_path / "x.mp4").count() == 50
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == 5
    assert look(tmp_path / "x.mp4")[1] == pytest.approx(4, abs=0.1)
    write_video(tmp_path / "y.mp4", gray_frames([9] * 50), Fraction(25), sound=sound)
    assert "the last 2.0 s of its sound go" in capfd.readouterr().err


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(15)])
def test_steady_rates_are_exact(tmp_path, rate):
    values = list(range(0, 240, 4))
    assert write_video(tmp_path / "in.mp4", gray_frames(values), rate) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    data = (tmp_path / "in.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat"), "it plays while it loads"
    video = Video(tmp_path / "in.mp4")
    frames = list(video.timed_frames())
    times = [number / rate for number in range(60)]
    assert [frame.second for frame in frames] == times
    assert [frame.image.mean() for frame in frames] == pytest.approx(values, abs=3)
    write_video(tmp_path / "out.mp4", [frame.image for frame in frames], video.fps(), times=times)
    assert look(tmp_path / "out.mp4")[0] == times


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_that_come_unsteadily_keep_their_times(tmp_path, suffix):
    """As phones record: slower in the dark."""
    times = np.cumsum([0, *np.random.default_rng(0).choice([20, 33, 40, 120], 59)]).tolist()  # ms
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
    # Frames beyond the times that the file tells follow at the usual rate.
    write_video(tmp_path / "out.mp4", gray_frames([1] * 62), Fraction(25), times=found)
    more = [times[-1] + 40, times[-1] + 80]
    assert [round(1000 * time) for time in look(tmp_path / "out.mp4")[0]] == [*times, *more]


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
def test_gif_keeps_time_without_drift(tmp_path, fps):
    assert write_video(tmp_path / "x.gif", gray_frames(list(range(0, 200, 4))), fps) == 50
    durations = gif_durations(tmp_path / "x.gif")
    assert len(durations) == 50
    assert sum(durations) == pytest.approx(1000 * 50 / fps, abs=10)


def test_a_gif_keeps_its_speed_whatever_the_rate(tmp_path):
    """Browsers show a frame of less than 1/50 s for 1/10 s."""
    write_video(tmp_path / "fast.gif", gray_frames([2 * n for n in range(120)]), Fraction(120))
    durations = gif_durations(tmp_path / "fast.gif")
    assert min(durations) >= 20
    assert sum(durations) == pytest.approx(1000, abs=20)
    times = [Fraction(ms, 1000) for ms in (0, 40, 80, 500, 1500, 1505, 1510, 1600)]
    write_video(tmp_path / "uneven.gif", gray_frames(list(range(0, 240, 30))), Fraction(25), times=times)
    assert gif_durations(tmp_path / "uneven.gif") == [40, 40, 420, 1000, 100, 40]


@given(height=st.integers(16, 50), width=st.integers(16, 50))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    write_video(tmp_path / "odd.mp4", gray_frames([0, 90, 180], height, width), Fraction(25))
    frames = list(Video(tmp_path / "odd.mp4").frames())
    assert [frame.shape for frame in frames] == [(height + height % 2, width + width % 2, 3)] * 3


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")

    def broken():
        yield from gray_frames([0, 1])
        raise RuntimeError("stop")

    for target, frames, message in (
        (path, broken(), "stop"),
        (path, [], "no frames"),
        (tmp_path / "x.mkv", [], r"choose \.mp4 or \.gif"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            write_video(target, frames, Fraction(25))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
