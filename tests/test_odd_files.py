"""Files as people have them: each kind drawn, and what is right for it."""

import json
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from test_writer import look

import dataset as dataset_script
import test_on_video
from conftest import ROOT, gray_frames
from video.reader import Video, check_whole
from video.writer import write_video

ODD = ROOT.parent / "shared" / "odd-files"
FLAGS = ("--encoder", "tiny_video", "--precision", "fp32", "--overlay", "minimal")


def scene(number, height=144, width=176):
    """A smooth picture in color that moves."""
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(3 * x + 0.2 * number), np.cos(4 * y - 0.1 * number), np.sin(2 * (x + y))]
    return (127 + 90 * np.stack(waves, -1)).astype(np.uint8)


def draw(
    path, frames, codec="mpeg4", pixels="yuv420p", rate=25, ms=None, prepare=lambda stream: None, **options
):
    """Write frames, (H, W, 3) uint8 RGB, with times in ms where `ms` has them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        prepare(stream)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if ms is not None:
                frame.pts, frame.time_base = ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def off(frames, drawn):
    """Mean difference of pictures in levels, the largest."""
    return max(np.abs(one.astype(int) - other).mean() for one, other in zip(frames, drawn, strict=True))


@pytest.mark.parametrize(
    ("name", "frames", "rate", "shape", "seconds"),
    [
        ("interlaced.mpg", 75, 25, (576, 720, 3), 3),
        ("damaged_packet.avi", 199, 25, (240, 320, 3), 8),
        ("no_frame_rate.webm", 120, 30.3, (240, 320, 3), 3.956),
        ("edit_list.mp4", 66, 10, (240, 320, 3), 6.1),
        ("piped.avi", 75, 25, (240, 320, 3), 3),
        ("av1.mp4", 50, 25, (240, 320, 3), 2),
        ("wide_pixels.mp4", 50, 25, (256, 428, 3), 2),
        ("late_pcm_sound.mov", 100, 25, (240, 320, 3), 4),
        ("sound_6khz.avi", 75, 25, (240, 320, 3), 3),
        ("unknown_sound_codec.mp4", 75, 25, (240, 320, 3), 3),
    ],
)
def test_odd_files_are_annotated(call, tmp_path, name, frames, rate, shape, seconds):
    if not ODD.is_dir():
        pytest.skip(f"no odd files at {ODD}")
    done = call(test_on_video, "--video_path", ODD / name, *FLAGS, "--output", tmp_path / "x.mp4")
    assert done.status == 0, done.err
    output = Video(tmp_path / "x.mp4")
    assert (output.count(), next(output.frames()).shape) == (frames, shape)
    about = json.loads((tmp_path / "x.mp4.json").read_text())
    assert about["frames"] == frames
    assert float(Fraction(about["fps"])) == pytest.approx(rate, abs=0.1)
    assert about["segments"][-1]["end_seconds"] == pytest.approx(seconds, abs=0.01)
    assert ("199 of 200 frames decoded" in done.err) == (name == "damaged_packet.avi")
    sound = look(tmp_path / "x.mp4")
    if name == "unknown_sound_codec.mp4":
        assert "without its sound" in done.err
    elif "sound" in name:
        assert sound[1] == pytest.approx(2.5 if "late" in name else 3, abs=0.13)
        with av.open(str(tmp_path / "x.mp4")) as container:
            begin = float(container.streams.audio[0].start_time * container.streams.audio[0].time_base)
        assert begin == pytest.approx(1.5 if "late" in name else 0, abs=0.03)


def spoiled(path, drawn, packets):
    """An MJPEG AVI with packets whose bytes are zeros."""
    draw(path, drawn, "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in packets:
        position, size = places[number]
        data[position + 8 : position + 8 + size - 8] = bytes(size - 8)
    path.write_bytes(data)
    return path


def test_a_frame_that_does_not_decode_is_left_out_counted_and_told(call, small, tmp_path):
    drawn = [scene(number, 72, 88) for number in range(100)]
    video = Video(spoiled(tmp_path / "x.avi", drawn, [40]))
    assert off(video.frames(), drawn[:40] + drawn[41:]) < 6
    assert (video.lost, video.count()) == (1, 99)
    done = call(test_on_video, "--video_path", tmp_path / "x.avi", *FLAGS, "--output", tmp_path / "y.mp4")
    assert done.status == 0, done.err
    assert "99 of 100 frames decoded" in done.err
    times = [round(25 * time) for time in look(tmp_path / "y.mp4")[0]]
    assert times == [*range(40), *range(41, 100)], "what follows keeps its time"

    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    data = ["check", "--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    spoiled(clip, drawn, [40])
    done = call(dataset_script, *data)
    assert (done.status, "99 of 100 frames decode" in done.out) == (0, True), "1 %: a remark"
    spoiled(clip, drawn, [40, 50, 60])
    done = call(dataset_script, *data)
    assert (done.status, "97 of 100 frames decode" in done.out) == (1, True), "3 %: a fault"


@pytest.mark.parametrize("name", ["x.webm", "x.mkv"])
def test_the_frame_rate_is_what_the_times_say(tmp_path, name):
    """Browsers state none, or the ticks of their clock."""
    ms = np.cumsum([0, *np.random.default_rng(1).choice([30, 33, 34, 36], 89)]).tolist()
    codec = "libvpx" if name == "x.webm" else "mjpeg"
    pixels = "yuv420p" if name == "x.webm" else "yuvj420p"
    path = draw(tmp_path / name, gray_frames([2 * n for n in range(90)]), codec, pixels, rate=1000, ms=ms)
    video = Video(path)
    assert float(video.fps()) == pytest.approx(30, abs=0.6)
    assert video.count() == 90


def test_frames_that_an_edit_list_cuts_away_are_not_shown(tmp_path):
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number, image in enumerate(gray_frames([4 * number for number in range(60)])):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number - 20, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = Video(path)
    frames = list(video.timed_frames())
    assert [round(frame.image.mean() / 4) for frame in frames] == list(range(20, 60))
    assert [25 * frame.second for frame in frames] == list(range(40))
    assert (video.lost, video.fps()) == (0, 25)


def test_b_frames_in_an_avi_come_in_steady_order(tmp_path):
    path = draw(tmp_path / "x.avi", gray_frames([4 * n for n in range(50)]), "libx264", bf="2")
    frames = list(Video(path).timed_frames())
    assert [25 * frame.second for frame in frames] == list(range(50))
    assert [round(frame.image.mean() / 4) for frame in frames] == list(range(50))


def test_pixels_are_made_square(tmp_path):
    drawn = [scene(number, 120, 160) for number in range(5)]

    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)

    path = draw(tmp_path / "x.mp4", drawn, prepare=wide)
    frame = next(Video(path).frames())
    assert frame.shape == (120, 240, 3)
    expected = np.asarray(Image.fromarray(drawn[0]).resize((240, 120), Image.Resampling.BICUBIC))
    assert off([frame], [expected]) < 4


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, turned, mirrored):
    drawn = [scene(number, 96, 64) for number in range(3)]

    def turn(stream):
        stream.set_display_rotation(turned, hflip=mirrored)

    path = draw(tmp_path / "x.mp4", drawn, prepare=turn)
    # Turned against the clock first, then mirrored (libavutil/display.h).
    expected = np.rot90(drawn[0], turned // 90)
    expected = expected[:, ::-1] if mirrored else expected
    assert off([next(Video(path).frames())], [expected]) < 4


@pytest.mark.parametrize("stated", [None, 1, 5])
@pytest.mark.parametrize("height", [240, 720])
def test_colors_are_by_the_matrix_that_is_stated_or_usual(tmp_path, stated, height):
    """BT.709 (1) makes another green of the same numbers than BT.601 (5)."""
    matrix = "bt709" if (stated or (1 if height >= 720 else 5)) == 1 else "bt470bg"
    green = np.full((height, 128, 3), (20, 200, 40), np.uint8)
    spaces = {"bt709": "ITU709", "bt470bg": "ITU601"}
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, 128, "yuv420p"
        if stated:
            stream.codec_context.colorspace = stated
        rgb = av.VideoFrame.from_ndarray(green, format="rgb24")
        frame = rgb.reformat(format="yuv420p", dst_colorspace=spaces[matrix])
        for number in range(3):
            frame.pts = number
            frame.colorspace = stated or 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert off([next(Video(path).frames())], [green]) < 4


def test_the_output_states_its_colors(tmp_path):
    drawn = [scene(number, 720, 96) for number in range(3)]
    write_video(tmp_path / "x.mp4", drawn, Fraction(25))
    with av.open(str(tmp_path / "x.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (6, 1)
    assert off(Video(tmp_path / "x.mp4").frames(), drawn) < 3


# Every container and codec that PyAV writes, and what files state about their pixels.
KINDS = [
    *((f"h264.{end}", "libx264", "yuv420p") for end in ("mp4", "mov", "mkv", "avi", "ts", "flv", "3gp")),
    *((f"mpeg4.{end}", "mpeg4", "yuv420p") for end in ("avi", "mp4", "mkv")),
    *((f"mpeg2.{end}", "mpeg2video", "yuv420p") for end in ("mpg", "ts", "vob", "mkv")),
    *((f"mjpeg.{end}", "mjpeg", "yuvj420p") for end in ("avi", "mov", "mkv")),
    ("hevc.mp4", "libx265", "yuv420p"),
    ("mpeg1.mpg", "mpeg1video", "yuv420p"),
    ("vp8.webm", "libvpx", "yuv420p"),
    ("vp9.webm", "libvpx-vp9", "yuv420p"),
    ("av1.mp4", "libsvtav1", "yuv420p"),
    ("wmv2.wmv", "wmv2", "yuv420p"),
    ("msmpeg4.asf", "msmpeg4", "yuv420p"),
    ("flv1.flv", "flv", "yuv420p"),
    ("huffyuv.avi", "huffyuv", "yuv422p"),
    ("rgb.mov", "qtrle", "rgb24"),
    ("rgba.mov", "png", "rgba"),
    ("alpha.mov", "prores_ks", "yuva444p10le"),
    ("gray.mkv", "ffv1", "gray"),
    ("ten_bit.mp4", "libx264", "yuv420p10le"),
    ("full_range.mp4", "libx264", "yuvj420p"),
    ("interlaced.mpg", "mpeg2video", "yuv420p"),
]


def draw_kind(path, codec, pixels):
    """A file of a kind, and its frames."""
    interlaced = path.name == "interlaced.mpg"
    drawn = [scene(number, *(576, 720) if interlaced else (144, 176)) for number in range(8)]
    if pixels == "gray":
        drawn = [np.repeat(image[..., :1], 3, axis=2) for image in drawn]
    options = {"flags": "+ildct+ilme", "b": "8000000"} if interlaced else {"b": "2000000"}
    return draw(path, drawn, codec, pixels, **options), drawn


@pytest.mark.parametrize(("name", "codec", "pixels"), KINDS)
def test_frames_and_times_of_every_kind_of_file(tmp_path, name, codec, pixels):
    path, drawn = draw_kind(tmp_path / name, codec, pixels)
    frames = list(Video(path).timed_frames())
    assert off([frame.image for frame in frames], drawn) < 3
    assert [float(frame.second) for frame in frames] == pytest.approx([n / 25 for n in range(8)], abs=1e-3)


def test_frames_have_the_size_of_the_first_one(tmp_path):
    one = draw(tmp_path / "one.ts", [scene(number) for number in range(10)], "mpeg2video")
    other = draw(tmp_path / "other.ts", [scene(number, 96, 128) for number in range(10)], "mpeg2video")
    (tmp_path / "x.ts").write_bytes(one.read_bytes() + other.read_bytes())
    frames = list(Video(tmp_path / "x.ts").timed_frames())
    assert len(frames) >= 18
    assert {frame.image.shape for frame in frames} == {(144, 176, 3)}
    assert off([frames[-1].image], [scene(9)]) < 12
    times = [float(frame.second) for frame in frames]
    assert times == sorted(set(times)), "the clock began anew, and goes on"


@pytest.mark.parametrize("cover", [True, False])
def test_the_stream_that_plays_is_read(tmp_path, cover):
    """Not the picture on the cover, nor a still that stands first."""
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        still = container.add_stream("mjpeg", rate=25)
        still.width, still.height, still.pix_fmt = 320, 240, "yuvj420p"
        if cover:
            still.disposition = av.stream.Disposition.attached_pic
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 176, 144, "yuv420p"
        container.mux(still.encode(av.VideoFrame.from_ndarray(scene(0, 240, 320), format="rgb24")))
        container.mux(still.encode(None))
        for number in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(scene(number), format="rgb24")))
        container.mux(video.encode(None))
    assert off(Video(path).frames(), [scene(number) for number in range(20)]) < 12


def test_whole_files_that_state_odd_sizes_are_whole(tmp_path):
    drawn = gray_frames([4 * number for number in range(50)])
    avi = bytearray(draw(tmp_path / "x.avi", drawn).read_bytes())
    mp4 = draw(tmp_path / "x.mp4", drawn).read_bytes()
    stated = struct.unpack("<I", avi[4:8])[0]
    piped = bytearray(avi)
    piped[4:8] = b"\xff" * 4
    at = piped.index(b"avih")
    piped[at + 24 : at + 28] = struct.pack("<I", 2**30)
    cases = {
        "size_of_minus_one.avi": piped,
        "eight_too_many.avi": avi[:4] + struct.pack("<I", stated + 8) + avi[8:],
        "without_index.avi": avi[: avi.index(b"idx1")],
        "bytes_behind.mp4": mp4 + b"\x7f\xff\xff\xffnone of a box" + bytes(20),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        check_whole(tmp_path / name)
        video = Video(tmp_path / name)
        assert (video.count(), video.fps(), video.lost) == (50, 25, 0), name


NAMES = [
    os.fsdecode(b"not utf-8 \xff\xe9.avi"),
    "http:x.avi",
    "a:b.avi",
    "100%d.avi",
    "-dash.avi",
    'it\'s "quoted" $(x).avi',
    "line\nbreak.avi",
    "跳跃 ñ.avi",
    "x" * 235 + ".avi",
]


def test_files_and_folders_of_any_name(call, tmp_path, toy):
    """As inputs and as outputs, in a folder with a file that is bad."""
    clip = (toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi").read_bytes()
    folder = tmp_path / os.fsdecode(b"-a folder: 50%\xff'\n")
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(clip)
    (folder / "bad.avi").write_text("not a video")
    (folder / "closed.avi").symlink_to("nowhere.avi")
    output = tmp_path / os.fsdecode(b"out: %\xff")
    done = call(test_on_video, "--video_path", folder, *FLAGS, "--output", output)
    assert done.status == 1
    assert "Traceback" not in done.err
    assert sum(line.startswith("not annotated: ") for line in done.err.splitlines()) == 2, done.err
    assert "2 of 11 videos could not be annotated" in done.err
    written = sorted(path.name for path in output.glob("*.mp4"))
    assert len(written) == len(NAMES)
    frames = Video(folder / NAMES[0]).count()
    assert all(Video(output / name).count() == frames for name in written)
    assert {name.removesuffix(".mp4") for name in written} >= {"a:b", "line\nbreak", "-dash", "100%d"}
    for name in ("a:b.avi", "-dash.avi"):
        done = call(
            test_on_video, f"--video_path={folder / name}", *FLAGS, "--output", tmp_path / f"{name}.mp4"
        )
        assert done.status == 0, done.err
    done = call(
        test_on_video, "--video_path", folder / NAMES[2], *FLAGS, "--output", tmp_path / ("x" * 248 + ".mp4")
    )
    assert done.status == 2
    assert "the name is too long" in done.err


def test_healthy_files_are_not_called_damaged(tmp_path):
    """A pause in the middle, a recorder that drops frames, a picture that begins late, a held last frame."""
    frames = gray_frames(list(range(0, 240, 3)))
    pause = [40 * number + 10_000 * (number >= 40) for number in range(80)]
    uneven = np.cumsum([0, *np.random.default_rng(0).choice([16, 17, 33, 100, 250], 79)]).tolist()
    drops = [40 * number for number in range(83) if number % 28]
    cases = {
        "pause.mp4": pause, "pause.mkv": pause, "drops.mp4": drops, "drops.mkv": drops, "drops.avi": drops,
        "late.mkv": [1500 + 40 * number for number in range(80)], "uneven.mp4": uneven, "uneven.mkv": uneven,
    }  # fmt: skip
    for name, ms in cases.items():
        # An AVI has no times: what is left out has no bytes.
        video = Video(draw(tmp_path / name, frames, ms=None if name.endswith("avi") else ms))
        assert (video.count(), video.lost) == (80, 0), name
        said = [f"no frame for {10.0:.1f} s from second 1.6 on"] if name == "pause.mkv" else []
        assert video.problems == said, name
    short = Video(draw(tmp_path / "short.flv", frames[:25], codec="libx264", bf="2"))
    assert (short.count(), short.problems) == (25, [])
    write_video(tmp_path / "held.gif", frames[:3], Fraction(25), times=[*map(Fraction, (0, 1, 2, 5))])
    video = Video(tmp_path / "held.gif")
    assert (video.count(), video.lost, video.end) == (3, 0, 5)


def test_a_film_of_uneven_times_that_was_cut_is_told(tmp_path):
    ms = np.cumsum([0, *np.random.default_rng(0).choice([16, 33, 100], 199)]).tolist()
    path = draw(tmp_path / "x.mkv", [scene(number, 72, 88) for number in range(200)], ms=ms)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = Video(path)
    assert 60 < video.count() < 140
    assert video.lost == pytest.approx(200 - video.count(), rel=0.15)


def test_one_wrong_time_does_not_move_what_follows(tmp_path):
    ms = [40 * number for number in range(50)]
    path = draw(
        tmp_path / "x.mkv", gray_frames([4 * number for number in range(50)]), "mjpeg", "yuvj420p", ms=ms
    )
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][40]
    # The time of a block in its cluster (Matroska, 10.2), before its flags and the picture.
    at = data.index(bytes(packet)) - 3
    (since,) = struct.unpack(">h", data[at : at + 2])
    path.write_bytes(data[:at] + struct.pack(">h", since - 1500) + data[at + 2 :])
    times = [round(1000 * frame.second) for frame in Video(path).timed_frames()]
    assert times == ms


def test_damage_that_the_decoder_patched_up_is_told(tmp_path):
    path = draw(tmp_path / "x.mp4", [scene(number, 240, 320) for number in range(60)], "libx264", bf="0")
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    for place in np.random.default_rng(3).integers(at + 3000, len(data) - 3000, 12).tolist():
        data[place] ^= 255
    path.write_bytes(data)
    video = Video(path)
    video.count()
    assert video.problems
