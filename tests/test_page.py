"""The web page: the command as typed, with the tiny encoder, and what a visitor of the page gets."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_odd_files import spoiled

import demo
from annotation.overlay import PALETTE
from annotation.recognizer import Recognizer
from conftest import CLASSES, ROOT, free_port, gray_frames, save_untrained
from video.reader import Video
from video.writer import write_video

gradio_client = pytest.importorskip("gradio_client", reason="the page's packages are not installed")
# The command with the tiny encoder at hand.
RUN = "import conftest, demo; demo.run(demo.main)"


class Server:
    """The command as typed, and its temporary folder."""

    def __init__(self, checkpoint, folder, *flags):
        self.temporary, self.port = folder, free_port()
        flags = ["--checkpoint_model", checkpoint, "--port", self.port, "--precision", "fp32", *flags]
        paths = {"PYTHONPATH": str(ROOT / "tests"), "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, flags)], cwd=ROOT, text=True,
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert f"http://127.0.0.1:{self.port}" in line, line + self.process.stdout.read()

    def client(self):
        folder = str(self.temporary / "client")
        return gradio_client.Client(f"http://127.0.0.1:{self.port}", verbose=False, download_files=folder)

    def annotate(self, path, overlay="full", smooth=0.0, only=""):
        """The answer of the page: action, video, segments and the JSON file's contents."""
        action, video, _, segments, tables = self.client().predict(
            gradio_client.handle_file(str(path)), overlay, smooth, only, api_name="/annotate"
        )
        about = next(path for path in tables if path.endswith(".json"))
        return action, Path(video), segments, json.loads(Path(about).read_text())

    def get(self, **headers):
        """Status and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/config", None, headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders())
        connection.close()
        return found

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=30)
        assert "Traceback" not in out
        assert self.process.returncode == 0
        assert list(self.temporary.glob("action-recognition-*")) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("demo") / "model.pth")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, toy):
    started = Server(checkpoint, tmp_path_factory.mktemp("server"), "--examples", toy / "UCF-101")
    yield started
    started.end()


def test_an_upload_is_answered_and_nothing_of_this_machines_folders_is_told(server, toy):
    clip = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    action, video, segments, about = server.annotate(clip, smooth=0.5)
    assert action["label"] in CLASSES
    assert sum(one["confidence"] for one in action["confidences"]) == pytest.approx(1, abs=1e-3)
    assert Video(video).count() == Video(clip).count() == about["frames"]
    assert segments["headers"][0] == "action"
    assert segments["data"][0][0] in CLASSES
    assert (about["video"], about["checkpoint"]) == (clip.name, "model.pth")


def test_an_example_shows_its_labels_before_its_video(server):
    job = server.client().submit(1, "minimal", 0.0, "WalkRight", api_name="/example")
    job.result()
    first, last = job.outputs()
    assert first[0]["label"] == last[0]["label"] == "WalkRight"
    assert "_g01_c01" in last[1], "the first of its folder"
    assert first[3]["data"] == last[3]["data"] != []
    assert not isinstance(first[1], str)
    assert isinstance(last[1], str)


def test_several_at_once_are_all_answered(server, toy):
    clips = sorted((toy / "UCF-101").glob("*/*_g0[12]_c01.avi"))[:4] * 2
    with ThreadPoolExecutor(8) as pool:
        for (_, video, _, about), clip in zip(pool.map(server.annotate, clips), clips, strict=True):
            assert Video(video).count() == Video(clip).count()
            assert about["video"] == clip.name, "each his own"


def test_other_sites_are_refused(server):
    assert server.get()[0] == 200
    assert server.get(Host=f"localhost:{server.port}")[0] == 200
    # A page elsewhere that sends its visitors' browsers here under a name of its own, and one under its own.
    assert server.get(Host=f"elsewhere.example:{server.port}")[0] == 400
    headers = {
        name.lower(): value for name, value in server.get(Origin="http://elsewhere.example")[1].items()
    }
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("name", "only", "reason"),
    [
        ("text.avi", "", "text.avi: no video in this file"),
        ("half.avi", "", "half.avi: the file is truncated"),
        ("good.avi", ", ,", "only names no action; write names between commas"),
        ("good.avi", "WalkLefd", "near it are WalkLeft"),
    ],
)
def test_what_is_wrong_is_a_sentence(server, toy, tmp_path, name, only, reason):
    good = next((toy / "UCF-101").rglob("*.avi")).read_bytes()
    content = {"text": b"this is not a video", "half": good[: len(good) // 2], "good": good}
    (tmp_path / name).write_bytes(content[name[:4]])
    with pytest.raises(Exception, match=reason) as caught:
        server.annotate(tmp_path / name, only=only)
    assert str(server.temporary) not in str(caught.value)


def test_it_ends_in_the_middle_of_a_video(checkpoint, tmp_path):
    (tmp_path / "temporary").mkdir()
    write_video(tmp_path / "long.mp4", gray_frames([90]) * 3000, Fraction(60))
    server = Server(checkpoint, tmp_path / "temporary", "--label_every", 1, "--examples", tmp_path)
    job = server.client().submit(0, "full", 0.0, "", api_name="/example")
    while not list(tmp_path.rglob("*.partial.mp4")):
        assert not job.done()
    server.end()


def shown(checkpoint, folder, path, progress=lambda *_, **__: None):
    page = page_module().Page(folder, Recognizer.load(checkpoint), folder)
    return page, list(page.label(str(path), "full", 0.0, "", progress))


def page_module():
    from annotation import page

    return page


def test_progress_curves_and_their_colors(checkpoint, tmp_path):
    write_video(tmp_path / "x.mp4", gray_frames(list(np.arange(700) % 200)), Fraction(25))
    told = []
    page, (first, last) = shown(
        checkpoint, tmp_path, tmp_path / "x.mp4", lambda done, unit: told.append((*done, unit))
    )
    assert told[::70] == [(10, 1400, "frames"), (710, 1400, "frames")]
    assert first[2] is last[2]
    assert last[2].color_map[last[3][0][0]] == "#{:02x}{:02x}{:02x}".format(*PALETTE[0]), "the timeline's"
    recognition = page.recognizer(tmp_path / "x.mp4")
    table, _ = page_module().curves(recognition)
    assert len(table) == 2 * page_module().POINTS
    assert table["second"].iloc[[0, -1]].tolist() == pytest.approx([0, 699 / 25], abs=0.001)
    for _, (second, action, probability) in table.iloc[::50].iterrows():
        label, frame = CLASSES.index(action), round(25 * second)
        assert probability == pytest.approx(recognition.probabilities[frame, label], abs=1e-4)


def test_what_is_wrong_with_a_file_is_told_on_the_page(checkpoint, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(page_module().gradio, "Warning", told.append)
    spoiled(tmp_path / "x.avi", gray_frames([2 * number for number in range(100)]), [40])
    shown(checkpoint, tmp_path, tmp_path / "x.avi")
    assert told == ["x.avi: 99 of 100 frames decoded"]


def test_what_cannot_be_served_ends_in_one_line(call, checkpoint, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call(demo, "--checkpoint_model", checkpoint, "--port", port)
    assert (done.status, f"--port {port} is taken" in done.one_line_error()) == (1, True)
    assert "gone.pth" in call(demo, "--checkpoint_model", tmp_path / "gone.pth").one_line_error()
    monkeypatch.delitem(sys.modules, "annotation.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = call(demo, "--checkpoint_model", checkpoint)
    assert "requirements-demo.txt" in done.one_line_error()
