import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from send_stream import number_of, numbered

import test_on_video
from annotation.live import LiveFrame, LiveLabels, LiveSequence, LiveVideo, is_live
from annotation.overlay import NONE
from annotation.recognizer import Recognizer
from annotation.settings import LabelSettings
from conftest import ROOT, free_port, save_untrained, untrained_checkpoint
from dataset import window_indices
from video.frames import resize_frames
from video.reader import Video


@pytest.fixture
def stream():
    """The address of a stream of 100 frames at 25 frames/s, which begins when somebody connects."""
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, ROOT / "tests/send_stream.py", address, "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    # It listens a moment after it says so.
    time.sleep(0.2)
    yield address
    process.kill()
    process.communicate()


def test_a_stream_is_written_with_its_labels_and_times(call, stream, tmp_path):
    model, output = save_untrained(tmp_path / "x.pth"), tmp_path / "shown" / "x.mp4"
    flags = ["--precision", "fp32", "--change_cost", 0.5, "--checkpoint_model", model, "--output", output]
    done = call(test_on_video, "--video_path", stream, *flags)
    assert done.status == 0, done.err
    assert "median latency" in done.out
    assert "frames/s" in done.err
    # Frames sent while the stream was being opened are lost, and few after that.
    numbers = [number_of(frame) for frame in Video(output).frames()]
    late = [number for number in numbers if number >= 50]
    assert numbers == sorted(set(numbers)), "in order, each once"
    assert len(late) >= 40
    assert late[-1] >= 98
    with av.open(str(output)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    # What came 1/25 s apart is shown so, whatever was lost in between.
    steps = np.diff(times[-len(late) :]) / np.diff(late)
    assert abs(np.median(steps) - 0.04) < 0.01
    rows = Path(f"{output}.csv").read_text().splitlines()[1:]
    assert len(rows) == len(numbers)
    assert float(rows[-1].split(",")[1]) == pytest.approx(times[-1], abs=0.001)
    about = json.loads(Path(f"{output}.json").read_text())
    assert about["segments"][-1]["end_seconds"] == pytest.approx(times[-1] + 0.04, abs=0.001)


def test_the_newest_frame_comes_first_and_late_ones_are_dropped(stream):
    video, shown = LiveVideo(stream), []
    video.remember(3)
    while not video.ended():
        frame = video.newest(1)
        if frame is not None:
            assert time.monotonic() - frame.arrived < 0.1 or frame.number == 99, "a newer one was there"
            shown.append(frame)
            time.sleep(0.2)
    video.close()
    assert 8 < len(shown) < 30
    counted = [frame.number for frame in shown]
    assert [number_of(frame.recent[-1]) for frame in shown] == counted, "lost frames count"
    for frame in shown[1:]:
        assert [number_of(image) for image in frame.frames(2, 2)] == [frame.number - 2, frame.number]
        assert [number_of(image) for image in frame.frames(4, 1)[:2]] == [frame.number - 2] * 2, "the oldest"
    assert np.median(np.diff(counted)) in (5, 6)
    assert video.newest(0) is None


def live(images, number):
    """A frame as it comes, with those up to it."""
    return LiveFrame(number, number / 25, tuple(images[max(0, number - 20) : number + 1]))


@pytest.fixture
def images(toy):
    return list(Video(toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi").frames())


def recognizer_of(length, step=1, every=10, encoder="tiny", **settings):
    model = untrained_checkpoint(encoder)
    model.encoder.spec = replace(model.encoder.spec, window_step=step)
    return Recognizer(model, LabelSettings(sequence_length=length, label_every=every, **settings))


@pytest.mark.parametrize(("length", "step", "every"), [(8, 2, 4), (8, 1, 1), (7, 3, 3), (2, 1, 5)])
def test_labels_come_from_the_clip_that_ends_at_the_frame(images, length, step, every):
    recognizer = recognizer_of(length, step, every)
    labels = LiveLabels(recognizer, Fraction(25))
    shown = torch.stack([labels.label(live(images, number)) for number in range(len(images))])
    with torch.no_grad():
        embeddings = recognizer.encoder.embed(resize_frames(images, 32)[:, None])[:, 0]
        for number in range(0, len(images), every):
            if number + 1 >= step * length:
                clip = window_indices(number + 1, length, step=step, start=number)
                assert clip[0, -1] == number
                expected = recognizer.head.classify(embeddings[clip]).softmax(dim=-1)[0]
                assert torch.allclose(shown[number], expected, atol=1e-5)
            assert (shown[number : number + every] == shown[number]).all(), "they share it"


def test_where_frames_are_lost_those_before_them_stand_in(images):
    recognizer, came = recognizer_of(8, 2, 1), [*range(0, 12), 19, 23, 24, 25, 39]
    labels = LiveLabels(recognizer, Fraction(25))
    for number in came:
        shown = labels.label(live(images, number))
    stand_in = [max(number for number in came if number <= wanted) for wanted in range(25, 40, 2)]
    with torch.no_grad():
        embeddings = recognizer.encoder.embed(resize_frames(images, 32)[:, None])[:, 0]
        expected = recognizer.head.classify(embeddings[stand_in][None]).softmax(dim=-1)[0]
    assert torch.allclose(shown, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "windows"), [(8, [(24, -1), (28, -1), (32, -1)]), (16, [(28, -2), (32, -2), (32, -1)])]
)
@torch.no_grad()
def test_a_video_encoder_works_beside_and_embeddings_hold_in_the_middle_of_windows(images, frames, windows):
    """At the end of a window an embedding lacks what follows: the next window's replaces it."""
    recognizer = recognizer_of(3, 1, 1, "tiny_video")
    encoder = recognizer.encoder
    encoder.spec = replace(encoder.spec, live_frames=frames)
    labels = LiveLabels(recognizer, Fraction(25))
    assert labels.memory == frames
    for number in range(0, 33, 4):
        labels.label(live(images, number))
        labels._beside.submit(lambda: None).result()
        shown = labels.label(live(images, number))
    labels.close()
    resized = resize_frames(images, encoder.img_dim, encoder.resize)
    held = [encoder.embed(resized[end - frames + 1 : end + 1][None])[0, row] for end, row in windows]
    expected = recognizer.head.classify(torch.stack(held)[None]).softmax(dim=-1)[0]
    assert torch.allclose(shown, expected, atol=1e-5)


def labeled(frames, **settings):
    """Labels of frames that come 0.1 s apart; `NONE` is one of which the model is not sure."""
    sequence = LiveSequence(recognizer_of(8, **settings))
    rows = {0: [0.9, 0.1], 1: [0.1, 0.9], NONE: [0.4, 0.3]}
    return [sequence.add(torch.tensor(rows[frame]), 0.1)[1] for frame in frames]


def test_live_a_label_follows_once_it_has_gained_what_a_change_costs():
    frames = [0, 0, 1, 1, 0, 1, NONE, 1, 1]
    assert labeled(frames, min_probability=0.5) == frames
    # log(0.9 / 0.1) x 0.1 s is 0.22 a frame.
    assert labeled(frames, min_probability=0.5, change_cost=0.5) == [0] * 7 + [1] * 2
    assert labeled([0] * 5 + [1] * 4, change_cost=0.5) == [0] * 7 + [1] * 2
    shown = labeled([NONE, NONE, 1], min_probability=0.5, only="WalkRight")
    assert shown == [NONE, NONE, 0], "of those that are chosen among"


# The command with the tiny encoder at hand.
RUN = "import conftest, test_on_video as t; t.run(t.main)"


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("gcc")), reason="needs Linux and gcc")
def test_a_camera(tmp_path):
    """The command as typed, on a camera that a small library pretends to be; Ctrl-C ends it well."""
    library, output = tmp_path / "camera.so", tmp_path / "camera.mp4"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/fake_camera.c", "-ldl"], check=True
    )
    model = save_untrained(tmp_path / "x.pth")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "--video_path", "0", "--checkpoint_model", model, "--output", output],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    printed = ""
    while "frames/s" not in printed and process.poll() is None:
        printed += process.stderr.read(1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "0: " in out
    assert "median latency" in out
    numbers = [number_of(frame) for frame in Video(output).frames()]
    assert len(numbers) > 30
    assert numbers == sorted(set(numbers)), "in order, each once"


def test_what_is_live(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("0", "rtsp://host/path", "clip.avi", "file:///clip.avi", "s3://bucket/clip.avi")
    assert [is_live(name) for name in names] == [True, True, False, False, False]
    Path("0").touch()
    assert not is_live("0"), "a file"


def test_sources_that_are_not_there_end_in_one_line(call, tmp_path, monkeypatch):
    flags = ["--checkpoint_model", save_untrained(tmp_path / "x.pth"), "--video_path"]
    for name in ("9", f"tcp://127.0.0.1:{free_port()}"):
        done = call(test_on_video, *flags, name, "--output", "x.mp4")
        assert (done.status, name in done.one_line_error()) == (1, True)
    assert not (tmp_path / "x.mp4").exists()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for more, words in (
        (["clip.avi"], "name it alone"),
        (["--output", "x.gif"], "goes into .mp4"),
        ([], "--output x.mp4"),
    ):
        if more or sys.platform == "linux":
            assert words in call(test_on_video, *flags, "0", *more).one_line_error()


@pytest.mark.parametrize("stated", [True, False])
def test_a_recording_behind_an_address_comes_at_its_own_rate(tmp_path, stated):
    """Also where the file states no length, as browsers record."""
    path, options = tmp_path / "x.webm", {} if stated else {"live": "1"}
    with av.open(str(path), "w", format="webm", options=options) as container:
        stream = container.add_stream("libvpx", rate=25, options={"deadline": "realtime"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    handler, frames = partial(SimpleHTTPRequestHandler, directory=tmp_path), []
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        video = LiveVideo(f"http://127.0.0.1:{server.server_port}/x.webm")
        while not video.ended():
            frames += filter(None, [video.newest(1)])
        video.close()
        server.shutdown()
    assert number_of(frames[-1].recent[-1]) == 49
    assert frames[-1].arrived - frames[0].arrived == pytest.approx(49 / 25, abs=0.3)
