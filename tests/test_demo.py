"""What a visitor of the page gets."""

import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from page_server import Server, make_page
from test_odd_files import spoiled

import demo
from annotation import page as page_module
from annotation.overlay import PALETTE
from conftest import CLASSES, gray_frames, save_untrained
from video.reader import Video
from video.writer import write_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("demo") / "model.pth")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, toy):
    folder = tmp_path_factory.mktemp("server")
    started = Server(checkpoint, folder, "--max_waiting", 30, "--examples", toy / "UCF-101")
    yield started
    started.end()


def test_an_upload_is_answered_and_nothing_of_this_machines_folders_is_told(server, toy):
    clip = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    action, video, segments, about = server.annotate(clip, change_cost=0.5)
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


def test_twenty_at_once_are_all_answered_in_bounded_memory(server, toy):
    clips = sorted((toy / "UCF-101").glob("*/*_g0[12]_c01.avi"))[:10]
    # Half of them send the same file, which is stored once.
    clips += [clips[0]] * 10
    with ThreadPoolExecutor(20) as pool:
        # Threads that start have their own memory, which stays.
        list(pool.map(server.annotate, clips[:4] * 5))
        before = server.peak_megabytes()
        for (_, video, _, about), clip in zip(pool.map(server.annotate, clips), clips, strict=True):
            assert Video(video).count() == Video(clip).count()
            assert about["video"] == clip.name, "each his own"
    # The frames of all videos would be 250 MB.
    assert server.peak_megabytes() - before < 120


def test_results_go_after_a_while_and_all_at_the_end(checkpoint, tmp_path, toy):
    server = Server(checkpoint, tmp_path, "--keep_minutes", 0.05)
    server.annotate(toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi")
    shutil.rmtree(tmp_path / "client")
    until = time.monotonic() + 20
    while server.files() and time.monotonic() < until:
        time.sleep(0.1)
    assert server.files() == []
    server.end()


def test_it_ends_in_the_middle_of_a_video(checkpoint, tmp_path):
    (tmp_path / "temporary").mkdir()
    write_video(tmp_path / "long.mp4", gray_frames([90]) * 7000, Fraction(60))
    server = Server(checkpoint, tmp_path / "temporary", "--label_every", 1, "--examples", tmp_path)
    job = server.client().submit(0, "full", 0.0, "", api_name="/example")
    while not list(tmp_path.rglob("*.partial.mp4")):
        assert not job.done()
        time.sleep(0.02)
    server.end()


def shown(page, path, progress=lambda *_, **__: None):
    return list(page.label(str(path), "full", 0.0, "", progress))


def test_progress_curves_and_their_colors(checkpoint, tmp_path):
    write_video(tmp_path / "x.mp4", gray_frames(list(np.arange(700) % 200)), Fraction(25))
    page, told = make_page(checkpoint, tmp_path), []
    first, last = shown(page, tmp_path / "x.mp4", lambda done, unit: told.append((*done, unit)))
    assert told[::70] == [(10, 1400, "frames"), (710, 1400, "frames")]
    assert first[2] is last[2]
    assert last[2].color_map[last[3][0][0]] == "#{:02x}{:02x}{:02x}".format(*PALETTE[0]), "the timeline's"
    shown_by_page = page.recognizer(tmp_path / "x.mp4")
    table, _ = page_module.curves(shown_by_page)
    assert len(table) == 2 * page_module.POINTS
    assert table["second"].iloc[[0, -1]].tolist() == pytest.approx([0, 699 / 25], abs=0.001)
    for _, (second, action, probability) in table.iloc[::50].iterrows():
        label, frame = CLASSES.index(action), round(25 * second)
        assert probability == pytest.approx(shown_by_page.probabilities[frame, label], abs=1e-4)


def test_what_is_wrong_with_a_file_is_told_on_the_page(checkpoint, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(page_module.gradio, "Warning", told.append)
    spoiled(tmp_path / "x.avi", gray_frames([2 * number for number in range(100)]), [40])
    shown(make_page(checkpoint, tmp_path), tmp_path / "x.avi")
    assert told == ["x.avi: 99 of 100 frames decoded"]


def test_what_cannot_be_served_ends_in_one_line(call, checkpoint, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call(demo, "--checkpoint_model", checkpoint, "--port", port)
    assert (done.status, f"--port {port}" in done.one_line_error()) == (1, True)
    assert "gone.pth" in call(demo, "--checkpoint_model", tmp_path / "gone.pth").one_line_error()
    monkeypatch.delitem(sys.modules, "annotation.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = call(demo, "--checkpoint_model", checkpoint)
    assert "requirements-demo.txt" in done.one_line_error()
