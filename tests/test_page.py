"""What a page does with requests that a browser would not send, and with videos that ask for too much."""

import io
import json
import os
import shutil
import socket
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from page_server import FORM, JSON, RUN, Server, form, gradio_client, make_page

from annotation import folder as folder_module
from conftest import ROOT, gray_frames, save_untrained
from video.reader import Video
from video.writer import write_video

# A limit that a test can reach, a video that decodes slowly, and one whose sound FFmpeg refuses.
SLOW = """
import time
from annotation import allowed, annotate
from video.opencv import av
from video.reader import Video

allowed.SPARE_SECONDS = 1
frames, write = Video.timed_frames, annotate.write_video

def slowly(self):
    for number, frame in enumerate(frames(self)):
        time.sleep("slow" in self.path.name and number > 2)
        yield frame

def refusing(path, *args, **kwargs):
    if "refused" in path.name:
        raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")
    return write(path, *args, **kwargs)

Video.timed_frames, annotate.write_video = slowly, refusing
"""
ADDRESS = "192.0.2.7"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("page") / "model.pth")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, toy):
    flags = ("--max_megabytes", 2, "--max_seconds", 6, "--max_slowness", 5, "--examples", toy / "UCF-101")
    flags += ("--host", "0.0.0.0", "--host_names", "page.example")
    started = Server(checkpoint, tmp_path_factory.mktemp("page"), *flags, host="0.0.0.0", run=SLOW + RUN)
    yield started
    started.end()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/gradio_api/{name}") for name in ("process_recording", "component_server", "cancel")),
        *(
            ("POST", f"/gradio_api/{name}")
            for name in ("run/annotate", "api/annotate", "call/other", "reset")
        ),
        *(("GET", f"/gradio_api/{name}") for name in ("file=http://127.0.0.1:1/x", "proxy=http://x", "user")),
        *(("GET", f"/gradio_api/{name}") for name in ("deep_link?session_hash=x", "openapi.json", "upload")),
        *(("GET", "/monitoring"), ("GET", "/logout"), ("POST", "/login"), ("PUT", "/"), ("OPTIONS", "/")),
    ],
)
def test_only_what_the_page_uses_answers(server, method, path):
    before = server.files()
    body = form("x.mp4", b"x" * 10_000) if method == "POST" else None
    assert server.ask(method, path, body, FORM)[:2] == (404, "there is nothing here")
    assert server.files() == before


def test_what_is_too_large_or_of_no_stated_size_is_refused(server):
    before, files = server.peak_megabytes(), server.files()
    megabyte = b" " * 2**20
    assert server.send("x.mp4", 3 * megabyte)[0] == 413
    # A form may be a little larger than the file in it, and the file is counted.
    assert server.send("x.mp4", 2 * megabyte + b"x")[0] == 413
    assert server.send("x.mp4", b"x", {**FORM, "Content-Length": "9" * 18})[0] == 413
    for path, kind in (("upload", FORM), ("queue/join", JSON), ("call/annotate", JSON)):
        chunked = {**kind, "Transfer-Encoding": "chunked"}
        assert server.ask("POST", f"/gradio_api/{path}", iter([megabyte] * 9), chunked)[0] == 413
    assert server.ask("POST", "/gradio_api/queue/join", megabyte + b" ", JSON)[0] == 413
    assert server.peak_megabytes() - before < 30
    assert server.files() == files


def test_the_folder_has_a_limit_and_half_an_upload_does_not_stay(checkpoint, tmp_path):
    server = Server(checkpoint, tmp_path, "--max_megabytes", 2, "--keep_megabytes", 6)
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        head = "".join(f"{name}: {value}\r\n" for name, value in {**FORM, "Content-Length": 2**20}.items())
        request = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n".encode()
        leaving.sendall(request + form("left.mp4", b"x" * 2**19)[:-9])
    sent = [server.send("x.mp4", bytes([number]) * 2 * 10**6) for number in range(4)]
    assert [status for status, _ in sent] == [200, 200, 200, 507]
    assert "room for 6 MB" in sent[-1][1]
    until = time.monotonic() + 20
    while len(server.files()) > 3 and time.monotonic() < until:
        time.sleep(0.1)
    assert [path.name for path in server.files()] == ["x.mp4"] * 3, "nothing that is half written"
    # A result has no room either.
    stored = json.loads(sent[0][1])[0]
    Path(stored).write_bytes(bytes(2**22))
    inputs = [{"path": stored, "meta": {"_type": "gradio.FileData"}}, "full", 0, ""]
    assert "room for 6 MB" in server.error("annotate", inputs)
    server.end()


def test_other_sites_are_refused(server):
    for name in (f"127.0.0.1:{server.port}", f"{ADDRESS}:{server.port}"):
        for origin in ("http://elsewhere.example", "null", "http://localhost:1", f"http://{name}1"):
            headers = {"Host": name, "Origin": origin, **FORM}
            for method, path in (("POST", "/gradio_api/upload"), ("GET", "/config"), ("OPTIONS", "/config")):
                status, _, answered = server.ask(method, path, form("x.mp4"), headers)
                assert status == 403, (headers, method)
                assert not [each for each in answered if each.lower().startswith("access-control")]
    assert server.send("x.mp4", headers={"Sec-Fetch-Site": "cross-site", **FORM})[0] == 403
    # A link from elsewhere opens the page, and its own browser's requests are answered.
    assert server.ask("GET", "/", None, {"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert server.ask("GET", "/config", None, {"Origin": f"http://127.0.0.1:{server.port}"})[0] == 200


def test_a_page_has_known_names_only(server):
    for host in ("127.0.0.1", ADDRESS, "[2001:db8::7]", "localhost", socket.gethostname(), "page.example"):
        assert server.ask("GET", "/theme.css", None, {"Host": f"{host.upper()}:{server.port}"})[0] == 200, (
            host
        )
    for host in ("elsewhere.example", "127.0.0.1.elsewhere.example", "page.example.org", "", "[", "a:b:c"):
        status, text, _ = server.ask("GET", "/theme.css", None, {"Host": host})
        assert (status, "--host_names" in text) == (400, True), host


def test_nothing_is_fetched_from_elsewhere_and_no_file_of_the_machine_is_read(server, toy):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.mp4"
        with pytest.raises(Exception, match="nothing is fetched from elsewhere"):
            server.client().predict(gradio_client.handle_file(url), "full", 0.0, "", api_name="/annotate")
        own = server.upload(next((toy / "UCF-101").rglob("*.avi")))
        fetched = {"path": url, "meta": {"_type": "gradio.FileData"}}
        secret = next(server.temporary.glob("action-*")).parent / "secret.mp4"
        secret.write_bytes(b"x")
        paths = [{**own, "path": path} for path in ("/etc/passwd", str(secret), "../x.mp4", "a\0b", None)]
        for video in (fetched, {**own, "url": url}, url, [fetched], *paths):
            assert "nothing is fetched from elsewhere" in server.error("annotate", [video, "full", 0, ""])
        # Nor in another place.
        assert "choose one of full, minimal" in server.error("annotate", [own, fetched, 0, ""])
        assert "names of actions" in server.error("annotate", [own, "full", 0, fetched])
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    for path in (
        "/etc/passwd",
        str(ROOT / "README.md"),
        str(secret),
        f"{server.temporary}/../x",
        "../README.md",
    ):
        assert server.ask("GET", f"/gradio_api/file={path}")[0] in (403, 404)
    secret.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "v. 2 (final)..mp4",
        "Bogenschießen.mp4",
        "../../evil.mp4",
        "/etc/evil.mp4",
        "..\\evil.mp4",
        "%2e%2e%2fevil",
        "..",
    ],
)
def test_a_name_with_a_path_leads_nowhere_else(server, name):
    status, text = server.send(name)
    assert status == 200 or ".." in name
    if status == 200:
        (stored,) = json.loads(text)
        assert Path(stored).resolve().is_relative_to(next(server.temporary.glob("action-recognition-*")))
        assert Path(stored).is_file()
    for folder in (server.temporary.parent, server.temporary, ROOT):
        assert not list(folder.glob("*evil*"))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([99, "full", 0, ""], "example 99: there are 8"),
        ([-1, "full", 0, ""], "example -1: there are 8"),
        ([True, "full", 0, ""], "example True: there are 8"),
        ([None, "full", 0, ""], "choose a video first"),
        ([0, ["full"], 0, ""], "choose one of full, minimal"),
        ([0, "full", "1", ""], "choose a number from 0 to 3"),
        ([0, "full", float("nan"), ""], "choose a number from 0 to 3"),
        ([0, "full", -5, ""], "cost of a change -5: choose a number from 0 to 3"),
        ([0, "full", 0, None], "only None: write fewer names of actions"),
        ([0, "full", 0, "x" * 900_000], "write fewer names of actions"),
        ([0, "full", 0, ", ,"], "only names no action; write names between commas"),
        ([0, "full", 0, "WalkLefd"], "near it are WalkLeft"),
        ([0], "choose a video first"),
    ],
)
def test_wrong_inputs_are_sentences(server, inputs, reason):
    told = server.error("example", inputs)
    assert reason in told
    assert len(told) < 400


def test_what_is_no_video_or_too_much_of_one_is_a_sentence(server, tmp_path, toy):
    bomb, files = io.BytesIO(), set(server.files())
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(200 * 2**20))
    (tmp_path / "bomb.mp4").write_bytes(bomb.getvalue())
    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "notes.txt").write_text("this is not named as one")
    good = next((toy / "UCF-101").rglob("*.avi")).read_bytes()
    (tmp_path / "half.avi").write_bytes(good[: len(good) // 2])
    write_video(tmp_path / "long.mp4", gray_frames([90] * 175), Fraction(25))
    write_video(tmp_path / "large.mp4", gray_frames([90] * 2, 4400, 4400), Fraction(25))
    write_video(tmp_path / "refused.mp4", gray_frames([90] * 20), Fraction(25))
    before = server.peak_megabytes()
    for name, reason in (
        ("bomb.mp4", "is it a video?"),
        ("text.avi", "is it a video?"),
        ("notes.txt", "not a video"),
        ("half.avi", "truncated"),
        ("long.mp4", "7 seconds are too long for this page; cut it to 6"),
        ("large.mp4", "frames of 4400 x 4400 pixels are too large"),
        ("refused.mp4", "Invalid data found when processing input; convert it to mp4 first"),
    ):
        told = server.error("annotate", [server.upload(tmp_path / name), "full", 0, ""])
        assert told.startswith(name)
        assert reason in told
        assert str(server.temporary) not in told
    assert server.peak_megabytes() - before < 400
    assert not [path for path in set(server.files()) - files if "results" in path.parts]


def test_all_that_the_page_takes_and_gives_has_a_name(server):
    assert "value_" not in json.dumps(server.client().view_api(return_format="dict"))


def test_a_video_has_its_time_and_others_wait(server, toy):
    path = server.temporary / "slow.mp4"
    write_video(path, gray_frames([90] * 20), Fraction(50))
    slow, begun = server.upload(path), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        given_up = pool.submit(server.error, "annotate", [slow, "full", 0, ""])
        time.sleep(0.5)
        assert server.client().predict(0, "full", 0.0, "", api_name="/example")
        assert "it takes more than 3 seconds, and others wait" in given_up.result()
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("stated", [2, 60])
def test_more_than_a_file_states_ends_at_the_limit(checkpoint, tmp_path, monkeypatch, stated):
    write_video(tmp_path / "x.mp4", gray_frames([90] * 60), Fraction(25))
    monkeypatch.setattr(Video, "length", lambda self: self.fps() and Fraction(1))
    monkeypatch.setattr(Video, "stated_count", lambda self: stated)
    page = make_page(checkpoint, tmp_path, "--max_seconds", 1)
    with pytest.raises(Exception, match="too many for this page; cut it to 1 seconds"):
        list(page.label(str(tmp_path / "x.mp4"), "full", 0.0, "", lambda *_, **__: None))
    assert not (tmp_path / "results").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folder_module.page_folder() as made:
        yield made


def test_old_files_are_swept_and_new_ones_stay(folder):
    for name in ("old/a.mp4", "old/b.csv", "new/c.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for path in [*(folder / "old").iterdir(), folder / "lock"]:
        os.utime(path, (time.time() - 100,) * 2)
    folder_module.sweep(folder, 60)
    assert sorted(path.name for path in folder.rglob("*")) == ["c.mp4", "lock", "new", "old"]
    os.utime(folder / "old", (time.time() - 100,) * 2)
    folder_module.sweep(folder, 60)
    assert sorted(path.name for path in folder.rglob("*")) == ["c.mp4", "lock", "new"]


def test_a_page_removes_what_killed_pages_left_and_nothing_else(checkpoint, folder, monkeypatch):
    """One at an IPv6 address."""
    beside = folder.parent
    monkeypatch.setattr(tempfile, "tempdir", str(beside))
    killed = Server(checkpoint, beside, "--host", "::1", host="[::1]")
    with socket.create_connection(("::1", killed.port)) as reader:
        reader.sendall(b"GET /theme.css HTTP/1.0\r\nHost: [::1]\r\n\r\n")
        assert b" 200 " in reader.recv(100)
    (left,) = set(beside.glob("action-recognition-*")) - {folder}
    foreign, link = beside / "action-recognition-of-another-program", beside / "action-recognition-link"
    foreign.mkdir()
    link.symlink_to(left)
    folder_module.remove_left(folder)
    assert (left / "lock").is_file(), "a page that runs keeps its folder"
    killed.process.kill()
    killed.process.wait()
    if os.geteuid() == 0:
        shutil.copytree(left, beside / "action-recognition-other")
        os.chown(beside / "action-recognition-other", 12345, 12345)
    others = [path for path in beside.glob("action-recognition-*") if path != left]
    with folder_module.page_folder() as next_page:
        assert sorted(beside.glob("action-recognition-*")) == sorted([*others, next_page])
