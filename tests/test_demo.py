import http.client
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from page_server import Server, make_page, send
from test_odd_files import spoiled

import demo
from annotation import page as page_module
from annotation.room import Room
from conftest import CLASSES, ROOT, gray_frames, save_untrained
from video.reader import Video
from video.writer import write_video

# One server is enough for all.
pytestmark = pytest.mark.xdist_group("demo")

LIMITS = ("--max_megabytes", "2", "--max_seconds", "6", "--max_waiting", "30")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("demo") / "model.pth", ("rgb",))


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, toy):
    started = Server(
        checkpoint, tmp_path_factory.mktemp("server"), *LIMITS, "--examples", str(toy / "UCF-101")
    )
    yield started
    started.end()


def test_an_upload_is_answered(server, toy, tmp_path):
    clip = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    action, video, segments, about = server.annotate(clip, smooth=0.5)
    assert action["label"] in CLASSES
    assert sum(one["confidence"] for one in action["confidences"]) == pytest.approx(1, abs=1e-3)
    assert Video(video).count() == Video(clip).count()
    assert segments["headers"][0] == "action"
    assert segments["data"][0][0] in CLASSES
    assert about["frames"] == Video(clip).count()
    # Nothing of this machine's folders is told.
    assert (about["video"], about["checkpoint"]) == (clip.name, "model.pth")


def test_examples_are_there_to_pick(server):
    answer = server.client().predict(1, "minimal", 0.0, api_name="/example")
    assert answer[0]["label"] in CLASSES


def test_twenty_at_once_are_all_answered_in_bounded_memory(server, toy, tmp_path):
    clips = sorted((toy / "UCF-101").glob("*/*_g0[12]_c01.avi"))[:10]
    # Half of them send the same file, which is stored once.
    clips += [clips[0]] * 10
    with ThreadPoolExecutor(20) as pool:
        # Threads that start have their own memory, which stays.
        list(pool.map(server.annotate, clips))
        before = server.peak_megabytes()
        answers = list(pool.map(server.annotate, clips))
    assert len(answers) == 20
    for (_, video, _, about), clip in zip(answers, clips, strict=True):
        assert Video(video).count() == Video(clip).count()
        assert about["video"] == clip.name, "each his own"
    # The frames of all videos would be 250 MB.
    assert server.peak_megabytes() - before < 120


def test_what_is_too_large_is_refused_unread(server):
    before = server.peak_megabytes(), len(server.files())
    status, text = server.upload(b"--x\r\n", {"Content-Length": str(2 * 2**30)})
    assert (status, "larger than 2 MB" in text) == (413, True)
    # A form may be a little larger than the file in it, and the file is counted.
    status, text = send(server, "x.mp4", b"x" * (2 * 2**20 + 1000))
    assert status == 413
    assert server.peak_megabytes() - before[0] < 50
    assert len(server.files()) == before[1]


@pytest.mark.parametrize(
    "name", ["../../evil.mp4", "/etc/evil.mp4", "..\\evil.mp4", "%2e%2e%2fevil.mp4", "..", "a/evil.mp4"]
)
def test_a_name_with_a_path_leads_nowhere_else(server, name):
    status, text = send(server, name)
    if status == 200:
        (stored,) = json.loads(text)
        assert Path(stored).resolve().is_relative_to(next(server.temporary.glob("action-recognition-*")))
        assert Path(stored).is_file()
    outside = [
        *server.temporary.parent.glob("*evil*"),
        *server.temporary.glob("*evil*"),
        *ROOT.glob("*evil*"),
    ]
    assert outside == []


def test_a_name_without_one_is_not(server):
    assert send(server, "v. 2 (final)..mp4")[0] == 200
    assert send(server, "Bogenschießen.mp4")[0] == 200


def test_files_of_the_machine_are_not_to_be_had(server):
    for path in ("/etc/passwd", str(ROOT / "README.md"), f"{server.temporary}/../x", "../README.md"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", f"/gradio_api/file={path}")
        assert connection.getresponse().status in (403, 404)
        # Nor by calling one an upload.
        call = json.dumps(
            {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "full", 0, ""], "fn_index": 0}
        )
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/gradio_api/call/annotate", call, {"Content-Type": "application/json"})
        event = json.loads(connection.getresponse().read())["event_id"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", f"/gradio_api/call/annotate/{event}")
        assert "event: error" in connection.getresponse().read().decode()
    assert (ROOT / "README.md").is_file()


def test_other_names_for_this_host_are_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 400


def test_what_is_no_video_gets_a_sentence(server, tmp_path, toy):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(200 * 2**20))
    (tmp_path / "bomb.mp4").write_bytes(bomb.getvalue())
    (tmp_path / "text.avi").write_text("this is not a video")
    good = next((toy / "UCF-101").rglob("*.avi")).read_bytes()
    (tmp_path / "half.avi").write_bytes(good[: len(good) // 2])
    write_video(tmp_path / "long.mp4", gray_frames([90] * 175), Fraction(25))
    write_video(tmp_path / "large.mp4", gray_frames([90] * 2, 4400, 4400), Fraction(25))
    before = server.peak_megabytes()
    for name, reason in (
        ("bomb.mp4", "is it a video?"),
        ("text.avi", "is it a video?"),
        ("half.avi", "truncated"),
        ("long.mp4", "7 seconds are too long for this page; cut it to 6"),
        ("large.mp4", "too large for this page"),
    ):
        with pytest.raises(Exception, match=reason) as caught:
            server.annotate(tmp_path / name)
        assert str(server.temporary) not in str(caught.value)
        assert name in str(caught.value)
    assert server.peak_megabytes() - before < 400


def test_more_frames_than_the_file_states_end_at_the_limit(checkpoint, room, tmp_path, monkeypatch):
    """As in a file that says that it has few."""
    write_video(tmp_path / "x.mp4", gray_frames([90] * 60), Fraction(25))
    monkeypatch.setattr(Video, "stated_count", lambda self: 2)
    page = make_page(checkpoint, room, "--max_seconds", "1")
    with pytest.raises(Exception, match="2 seconds are too long for this page; cut it to 1"):
        page.label(tmp_path / "x.mp4", "full", 0.0, "", lambda *_, **__: None)
    assert list((room.files / "results").rglob("*.*")) == []


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Room(2**30) as made:
        yield made


def test_progress_is_told_and_curves_have_the_colours_of_the_timeline(checkpoint, room, tmp_path):
    write_video(tmp_path / "x.mp4", gray_frames([90] * 60), Fraction(25))
    told = []
    page = make_page(checkpoint, room)
    found = page.label(tmp_path / "x.mp4", "full", 0.0, "", lambda done, unit: told.append(done))
    assert told == [(number, 60) for number in range(10, 61, 10)]
    assert found[2].color_map[found[3][0][0]] == "#56b4e9"


def test_old_files_are_swept_and_new_ones_stay(room):
    for name in ("old/a.mp4", "old/b.csv", "new/c.mp4"):
        (room.files / name).parent.mkdir(exist_ok=True)
        (room.files / name).touch()
    for path in (room.files / "old").iterdir():
        os.utime(path, (time.time() - 100,) * 2)
    room.sweep(60)
    assert sorted(path.name for path in room.files.rglob("*")) == ["c.mp4", "new", "old"]
    os.utime(room.files / "old", (time.time() - 100,) * 2)
    room.sweep(60)
    assert sorted(path.name for path in room.files.rglob("*")) == ["c.mp4", "new"]


def test_results_go_after_a_while_and_all_at_the_end(checkpoint, tmp_path, toy):
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = Server(checkpoint, folder, "--keep_minutes", "0.05")
    server.annotate(toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi")
    shutil.rmtree(folder / "client")
    for _ in range(100):
        if not server.files():
            break
        time.sleep(0.1)
    assert server.files() == []
    assert "Traceback" not in server.end()
    assert server.process.returncode == 0
    assert list(folder.glob("action-recognition-*")) == []


def test_it_ends_in_the_middle_of_a_video(checkpoint, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    write_video(tmp_path / "long.mp4", gray_frames([90]) * 7000, Fraction(60))
    server = Server(checkpoint, folder, "--label_every", "1", "--examples", str(tmp_path))
    client = server.client()
    job = client.submit(0, "full", 0.0, "", api_name="/example")
    while not list(folder.rglob("*.partial.mp4")):
        assert not job.done()
        time.sleep(0.02)
    assert "Traceback" not in server.end()
    assert server.process.returncode == 0
    assert list(folder.glob("action-recognition-*")) == []


def test_closing_gives_up_the_video_under_way_at_its_next_frame(checkpoint, room, tmp_path):
    write_video(tmp_path / "long.mp4", gray_frames([90]) * 500, Fraction(25))
    page, told = make_page(checkpoint, room, "--max_seconds", "60"), []
    closing = threading.Thread(target=page.close)

    def progress(done, unit):
        told.append(done[0])
        closing.start()
        while not page._closed:
            time.sleep(0.01)

    with pytest.raises(Exception, match=r"long\.mp4: the page was closed down"):
        page.label(tmp_path / "long.mp4", "full", 0.0, "", progress)
    closing.join(30)
    assert not closing.is_alive()
    assert told == [10]
    assert list((room.files / "results").rglob("*.*")) == []


def test_what_cannot_be_served_ends_in_one_line(call, checkpoint, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call(demo, "--checkpoint_model", checkpoint, "--port", port)
    assert done.status == 1
    assert f"--port {port}" in done.one_line_error()
    assert "gone.pth" in call(demo, "--checkpoint_model", tmp_path / "gone.pth").one_line_error()
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = call(demo, "--checkpoint_model", checkpoint)
    assert "requirements-demo.txt" in done.one_line_error()


def test_examples_are_the_first_of_each_folder(toy, tmp_path):
    found = page_module.find_examples(toy / "UCF-101")
    assert len(found) == 8
    assert {path.parent.name for path in found} >= {"WalkLeft", "WalkRight"}
    assert all("_g01_c01" in path.name for path in found)
    assert page_module.find_examples(tmp_path / "nothing") == []


def test_curves_have_few_points(checkpoint, room, tmp_path):
    write_video(tmp_path / "x.mp4", gray_frames(list(np.arange(700) % 200)), Fraction(25))
    page = make_page(checkpoint, room)
    found = page.annotator.annotate(Video(tmp_path / "x.mp4"), tmp_path / "out.mp4")
    rows, _ = page_module.curves(found)
    assert len(rows) == 2 * page_module.POINTS
    assert (rows[0]["second"], rows[-1]["second"]) == (0, pytest.approx(699 / 25, abs=0.001))


def test_what_is_wrong_with_a_file_is_said_on_the_page(checkpoint, room, tmp_path, monkeypatch):
    import gradio

    said = []
    monkeypatch.setattr(gradio, "Warning", said.append)
    spoiled(tmp_path / "x.avi", gray_frames([2 * number for number in range(100)]), [40])
    page = make_page(checkpoint, room)
    page.label(tmp_path / "x.avi", "full", 0.0, "", lambda *_, **__: None)
    assert said == ["x.avi: 99 of 100 frames decoded"]
