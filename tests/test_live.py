import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from send_stream import number_of, numbered

import test_on_video
from annotation.labels import ClipLayout, Smoother
from annotation.live import Chooser, LiveLabels, LiveVideo, Log, Shot, is_live, watch
from annotation.overlay import Overlay
from annotation.segments import Steady
from conftest import ROOT, free_port, save_untrained
from dataset import window_indices
from training.checkpoint import load_checkpoint
from video.files import VideoError
from video.frames import resize_frames
from video.opencv import cv2
from video.reader import Video
from video.writer import write_video


@pytest.fixture
def stream(request):
    """The address of a stream at 25 frames/s, of 100 frames or more, which begins when somebody connects."""
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, ROOT / "tests/send_stream.py", address, str(getattr(request, "param", 100))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    # It listens a moment after it says so.
    time.sleep(0.2)
    yield address
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that sees motion too; what it says does not matter."""
    return save_untrained(tmp_path_factory.mktemp("live") / "model.pth", ("rgb", "diff"))


def test_a_stream_is_written_with_its_labels_and_times(call, stream, trained, tmp_path):
    output = tmp_path / "shown" / "x.mp4"
    flags = ["--video_path", stream, "--checkpoint_model", trained, "--output", output]
    done = call(test_on_video, *flags, "--precision", "fp32", "--overlay", "minimal", "--smooth", 0.5)
    assert done.status == 0, done.err
    assert "median latency" in done.out
    assert "frames/s" in done.err
    numbers = [number_of(frame) for frame in Video(output).frames()]
    assert numbers == sorted(set(numbers)), "in order, each once"
    # Frames sent while the stream was being opened are lost, and few after that.
    late = [number for number in numbers if number >= 50]
    assert len(late) >= 40
    assert late[-1] >= 98
    with av.open(str(output)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    # What came 1/25 s apart is shown so, whatever was lost in between.
    steps = np.diff(times[-len(late) :]) / np.diff(late)
    assert abs(np.median(steps) - 0.04) < 0.01
    rows = list(csv.DictReader((tmp_path / "shown" / "x.mp4.csv").open()))
    assert len(rows) == len(numbers)
    assert float(rows[-1]["second"]) == pytest.approx(times[-1], abs=0.001)
    about = json.loads((tmp_path / "shown" / "x.mp4.json").read_text())
    assert about["segments"][-1]["end_seconds"] == pytest.approx(times[-1] + 0.04, abs=0.001)


def test_the_newest_frame_comes_first_and_late_ones_are_dropped(stream):
    video = LiveVideo(stream)
    video.remember(3)
    shots = []
    while not video.ended():
        shot = video.newest(1)
        if shot is not None:
            waited = time.monotonic() - shot.arrived
            assert waited < 0.1 or shot.number == 99, "a newer one was there"
            shots.append(shot)
            time.sleep(0.2)
    video.close()
    assert 8 < len(shots) < 30
    images = [number_of(shot.image) for shot in shots]
    counted = [shot.number for shot in shots]
    assert images == counted, "lost frames count"
    for shot in shots[1:]:
        assert [number_of(frame) for frame in shot.frames(2, 2)] == [shot.number - 2, shot.number]
        assert [number_of(frame) for frame in shot.frames(4, 1)[:2]] == [shot.number - 2] * 2, "the oldest"
    assert np.median(np.diff(counted)) in (5, 6)
    assert video.newest(0) is None


def shots_of(frames, numbers):
    bgr = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in frames]
    return [
        Shot(number, number / 25, frames[number], tuple(bgr[max(0, number - 20) : number + 1]))
        for number in numbers
    ]


@pytest.mark.parametrize(("length", "step", "every"), [(8, 2, 4), (8, 1, 1), (7, 3, 3), (2, 1, 5)])
def test_labels_come_from_the_past_alone_and_from_the_window_that_ends_there(
    toy, trained, length, step, every
):
    model = load_checkpoint(trained).model
    frames = list(Video(toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi").frames())
    streams, layout = model.open_streams(32), ClipLayout(length, step, every)
    labels = LiveLabels(model, streams, layout)
    said = torch.stack([labels.label(shot) for shot in shots_of(frames, range(len(frames)))])
    with torch.no_grad():
        embeddings = model.encode(resize_frames(frames, 32)[None])[0]
        for number in range(0, len(frames), every):
            if number + 1 >= step * length:
                window = window_indices(number + 1, length, step=step, start=number)
                assert window[0, -1] == number
                expected = model.classify(embeddings[window]).softmax(dim=-1)[0]
                assert torch.allclose(said[number], expected, atol=1e-5)
            assert (said[number : number + every] == said[number]).all(), "they share it"
    # The future changes nothing.
    again = LiveLabels(model, streams, layout)
    assert torch.equal(torch.stack([again.label(shot) for shot in shots_of(frames, range(20))]), said[:20])


def test_where_frames_are_lost_those_before_them_stand_in(toy, trained):
    model = load_checkpoint(trained).model
    frames = list(Video(toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi").frames())[:40]
    kept = [*range(0, 12), 19, 23, 24, 25, 39]
    labels = LiveLabels(model, model.open_streams(32), ClipLayout(8, 2, 1))
    for shot in shots_of(frames, kept):
        said = labels.label(shot)
    stand_in = [max(number for number in kept if number <= wanted) for wanted in range(25, 40, 2)]
    with torch.no_grad():
        embeddings = model.encode(resize_frames(frames, 32)[None])[0]
        assert torch.allclose(said, model.classify(embeddings[stand_in][None]).softmax(dim=-1)[0], atol=1e-5)
    assert len(labels._numbers) < 10


def test_a_camera(trained, tmp_path):
    """The command as typed, on a camera that a small library pretends to be; Ctrl-C ends it well."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("the fake camera needs Linux and gcc")
    library, output = tmp_path / "camera.so", tmp_path / "camera.mp4"
    source = ROOT / "tests" / "fake_camera.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    command = [
        sys.executable,
        "-c",
        RUN,
        "--video_path",
        "0",
        "--checkpoint_model",
        trained,
        "--output",
        output,
    ]
    process = subprocess.Popen(
        [*map(str, command), "--overlay", "minimal"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT / "tests")},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    printed = ""
    while "frames/s" not in printed and process.poll() is None:
        printed += process.stderr.read(1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "0: " in out
    assert "median latency" in out
    frames = list(Video(output).frames())
    numbers = [number_of(frame) for frame in frames]
    assert len(numbers) > 30
    assert numbers == sorted(set(numbers)), "in order, each once"
    assert json.loads((tmp_path / "camera.mp4.json").read_text())["frames"] == len(frames)


# The command with the tiny encoder at hand.
RUN = """
import sys
import threading
import conftest, test_on_video
from utils import process
conftest.add_tiny_encoder()
process.run(test_on_video.main)
"""


def test_what_is_live():
    assert is_live("0")
    assert is_live("rtsp://host/path")
    assert not is_live("clip.avi")
    assert not is_live("file:///clip.avi")
    assert not is_live("s3://bucket/clip.avi")


def test_a_file_named_by_a_number_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("0").touch()
    assert not is_live("0")


def test_sources_that_are_not_there_end_in_one_line(call, trained, tmp_path, monkeypatch):
    nobody = f"tcp://127.0.0.1:{free_port()}"
    flags = ["--checkpoint_model", trained]
    output = ["--output", tmp_path / "x.mp4"]
    for name in ("9", nobody):
        done = call(test_on_video, "--video_path", name, *flags, *output)
        assert done.status == 1
        assert name in done.one_line_error()
    assert not (tmp_path / "x.mp4").exists()
    done = call(test_on_video, "--video_path", "0", "clip.avi", *flags)
    assert "name it alone" in done.one_line_error()
    done = call(test_on_video, "--video_path", "0", *flags, "--output", "x.gif")
    assert "goes into .mp4" in done.one_line_error()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if sys.platform == "linux":
        assert "--output x.mp4" in call(test_on_video, "--video_path", "0", *flags).one_line_error()


def test_a_recording_behind_an_address_comes_at_its_own_rate(tmp_path):
    write_video(tmp_path / "x.mp4", map(numbered, range(50)), Fraction(25))
    port = str(free_port())
    command = [sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                video = LiveVideo(f"http://127.0.0.1:{port}/x.mp4")
                break
            except VideoError:
                time.sleep(0.1)
        begun, seen = time.monotonic(), 0
        while not video.ended():
            seen += video.newest(0.1) is not None
        assert 1.7 < time.monotonic() - begun < 4
        assert seen > 40
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("stream", [1000], indirect=True)  # on a busy machine each frame takes a second
def test_watching_fills_the_log(stream, trained):
    model = load_checkpoint(trained)
    video, log, seen = LiveVideo(stream), Log(), []
    labels = LiveLabels(model.model, model.model.open_streams(32), ClipLayout(8, 2, 10))
    overlay = Overlay(model.classes, 0)
    chooser = Chooser(range(len(model.classes)), 0.0, Steady(0))
    for frame in watch(video, labels, Smoother(0), chooser, overlay, log, lambda: len(seen) >= 20):
        seen.append(frame)
        time.sleep(0.1)
    video.close()
    assert (
        len(seen) == len(log.times) == len(log.latencies) == len(log.probabilities) == len(log.labels) == 20
    )
    assert all(latency > 0.1 for latency in log.latencies)
    assert log.lost > 20
    assert seen[0].shape[0] > 120, "with a timeline"
    assert str(log).endswith(" ms")


def test_a_recording_behind_an_address_plays_at_its_pace_without_a_stated_length(tmp_path):
    """As a browser records: no length in the file, and it comes in chunks as fast as they can be had."""
    path = tmp_path / "x.webm"
    with av.open(str(path), "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx", rate=25, options={"deadline": "realtime"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(data), 4096):
                chunk = data[start : start + 4096]
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        video = LiveVideo(f"http://127.0.0.1:{server.server_port}/x.webm")
        arrived = []
        while not video.ended():
            shot = video.newest(1)
            if shot is not None:
                arrived.append((shot.arrived, number_of(shot.image)))
        video.close()
        server.shutdown()
    (first, _), (last, number) = arrived[0], arrived[-1]
    assert number == 49
    assert last - first == pytest.approx(49 / 25, abs=0.3)
