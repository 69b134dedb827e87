"""What a page does with requests that a browser would not send, and with videos that ask for too much."""

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from page_server import RUN, Server, form, gradio_client, make_page, send

from annotation import allowed
from annotation import room as room_module
from annotation.room import Room
from conftest import gray_frames, save_untrained
from video.reader import Video
from video.writer import write_video

# One server is enough for all.
pytestmark = pytest.mark.xdist_group("demo")

# Limits that a test can reach, a video that decodes slowly, and one whose sound FFmpeg refuses.
SMALL = """
import time
from annotation import allowed, annotate
from video.opencv import av
from video.reader import Video

allowed.SPARE_SECONDS, allowed.MAX_WAITING = 1, 2**27
frames, write = Video.timed_frames, annotate.write_video

def slowly(self):
    for number, frame in enumerate(frames(self)):
        # Not the first ones, which are looked at before the work.
        time.sleep("slow" in self.path.name and number > 2)
        yield frame

def refusing(path, *args, **kwargs):
    if "refused" in path.name:
        raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")
    return write(path, *args, **kwargs)

Video.timed_frames, annotate.write_video = slowly, refusing
"""
LIMITS = ("--max_megabytes", "2", "--keep_megabytes", "8", "--max_seconds", "20", "--max_slowness", "5")
ADDRESS = "192.0.2.7"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("page") / "model.pth", ("rgb",))


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, toy):
    flags = (*LIMITS, "--examples", toy / "UCF-101", "--host", "0.0.0.0", "--host_names", "page.example")
    started = Server(checkpoint, tmp_path_factory.mktemp("page"), *flags, host="0.0.0.0", run=SMALL + RUN)
    yield started
    if started.process.poll() is None:
        started.end()


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Room(2**30) as made:
        yield made


@pytest.fixture
def nothing_stored(server):
    """All that a test sends is gone at its end."""
    before = server.files()
    yield
    deadline = time.monotonic() + 5
    while server.files() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.files() == before


def ask(server, method, path, body=None, headers=None):
    """Status, text and headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(errors="replace"), dict(answer.getheaders())
    connection.close()
    return found


def call(server, name, data):
    """The page's answer to inputs: the event that it ends in, and what that says."""
    status, text, _ = ask(server, "POST", f"/gradio_api/call/{name}", json.dumps({"data": data}), JSON)
    assert status == 200, text
    _, text, _ = ask(server, "GET", f"/gradio_api/call/{name}/{json.loads(text)['event_id']}")
    event, said = text.strip().split("\n\n")[-1].split("\n")
    return event.removeprefix("event: "), json.loads(said.removeprefix("data: "))


def error(server, name, data):
    event, said = call(server, name, data)
    assert event == "error"
    return said["error"]


def upload(server, path):
    """A video that has been sent, as the page names it."""
    status, text = send(server, path.name, path.read_bytes())
    assert status == 200, text
    return {"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}}


def chunked(server, path, content_type, head, size, end=b""):
    """Answer to a body that states ten bytes and comes in chunks, `size` bytes after a head."""
    lines = f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {content_type}"
    lines += "Content-Length: 10", "Transfer-Encoding: chunked", "Connection: close"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sender:
        sender.sendall("\r\n".join((*lines, "", "")).encode())
        parts = [head, *[bytes(2**16).replace(b"\0", b" ")] * (size // 2**16), end]
        try:
            for part in filter(None, parts):
                sender.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            sender.sendall(b"0\r\n\r\n")
        except ConnectionError:  # it has answered already
            pass
        answer = sender.makefile("rb").read().decode(errors="replace")
    return int(answer.split()[1]), answer.split("\r\n\r\n", 1)[1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/gradio_api/{name}") for name in ("process_recording", "component_server", "cancel")),
        *(
            ("POST", f"/gradio_api/{name}")
            for name in ("run/annotate", "api/annotate", "call/other", "reset")
        ),
        *(("GET", f"/gradio_api/{name}") for name in ("file=http://127.0.0.1:1/x", "proxy=http://x", "user")),
        *(("GET", f"/gradio_api/{name}") for name in ("deep_link?session_hash=x", "app_id", "openapi.json")),
        *(("GET", path) for path in ("/monitoring", "/monitoring/summary", "/robots.txt", "/logout")),
        *(("POST", "/login"), ("PUT", "/"), ("OPTIONS", "/"), ("GET", "/gradio_api/upload")),
    ],
)
@pytest.mark.usefixtures("nothing_stored")
def test_only_what_the_page_uses_answers(server, method, path):
    body = form("x.mp4", b"x" * 10_000) if method == "POST" else None
    status, text, _ = ask(server, method, path, body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert (status, text) == (404, "there is nothing here")


@pytest.mark.usefixtures("nothing_stored")
def test_bytes_are_counted_as_they_come(server):
    before = server.peak_megabytes()
    size, head = 12 * 2**20, form("x.mp4")[: -len(b"x\r\n--x--\r\n")]
    kind = "multipart/form-data; boundary=x"
    status, text = chunked(server, "/gradio_api/upload", kind, head, size, b"\r\n--x--\r\n")
    assert (status, text) == (413, "the file is larger than 2 MB")
    for path in ("queue/join", "call/annotate"):
        status, text = chunked(server, f"/gradio_api/{path}", "application/json", b"[", size)
        assert (status, text) == (413, "the request is larger than 1 MB")
    status, text, _ = ask(server, "POST", "/gradio_api/queue/join", b" " * (2**20 + 1), JSON)
    assert (status, text) == (413, "the request is larger than 1 MB")
    assert server.peak_megabytes() - before < 30
    # A file that is small enough may come in chunks too.
    status, text = chunked(server, "/gradio_api/upload", kind, head, 2**20, b"\r\n--x--\r\n")
    assert status == 200
    shutil.rmtree(Path(json.loads(text)[0]).parent)


def test_a_folder_that_is_full_takes_no_more(server):
    sent = [send(server, "x.mp4", str(number).encode() * (2**21 - 50_000)) for number in range(5)]
    assert [status for status, _ in sent] == [200, 200, 200, 200, 507]
    assert "room for 8 MB of videos at a time" in sent[-1][1]
    head = form("y.mp4")[: -len(b"x\r\n--x--\r\n")]
    found = chunked(server, "/gradio_api/upload", "multipart/form-data; boundary=x", head, 2**21 - 2**16)
    assert found[0] == 507
    assert sorted(path.name for path in server.files()) == ["x.mp4"] * 4, "nothing that is half written"
    # A result has no room either.
    Path(json.loads(sent[0][1])[0]).write_bytes(bytes(2**21 + 2**18))
    assert "room for 8 MB" in error(server, "example", [0, "full", 0, ""])
    for _, text in sent[:4]:
        shutil.rmtree(Path(json.loads(text)[0]).parent)


@pytest.mark.usefixtures("nothing_stored")
def test_a_client_that_leaves_leaves_nothing(server):
    lines = "POST /gradio_api/upload HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 1500000"
    with socket.create_connection(("127.0.0.1", server.port)) as sender:
        kind = "Content-Type: multipart/form-data; boundary=x"
        sender.sendall("\r\n".join((*lines, kind, "", "")).encode() + form("x.mp4", b"x" * 10**6)[:-9])
        until = time.monotonic() + 20
        while not [path for path in server.files() if path.name.startswith("tmp")]:
            assert time.monotonic() < until, "nothing of it has come"
            time.sleep(0.01)
    # What Gradio does not take for an upload at all.
    kinds = {"Content-Type": "multipart/form-data; boundary=x"}
    for old, new in ((b'"files"', b'"other"'), (b'; filename="x.mp4"', b"")):
        ask(server, "POST", "/gradio_api/upload?upload_id=x", form("x.mp4").replace(old, new), kinds)


@pytest.mark.usefixtures("nothing_stored")
def test_other_sites_are_refused(server):
    host = f"127.0.0.1:{server.port}"
    body = form("x.mp4")
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for name in (host, f"{ADDRESS}:{server.port}"):
        for origin in ("http://elsewhere.example", "null", "http://localhost:1", f"http://{name}1"):
            headers = {"Host": name, "Origin": origin, **kind}
            for method, path in (("POST", "/gradio_api/upload"), ("GET", "/config"), ("OPTIONS", "/config")):
                more = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
                status, _, answered = ask(server, method, path, body, {**headers, **more})
                assert status == 403, (headers, method)
                assert not [each for each in answered if each.lower().startswith("access-control")]
    assert ask(server, "POST", "/gradio_api/upload", body, {"Sec-Fetch-Site": "cross-site", **kind})[0] == 403
    # A link from elsewhere opens the page, and its own browser's requests are answered.
    assert ask(server, "GET", "/", None, {"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert ask(server, "GET", "/config", None, {"Origin": f"http://{host}"})[0] == 200


def test_a_page_for_others_has_known_names_only(server):
    for host in ("127.0.0.1", ADDRESS, "[2001:db8::7]", "localhost", socket.gethostname(), "page.example"):
        assert ask(server, "GET", "/theme.css", None, {"Host": f"{host}:{server.port}"})[0] == 200, host
        assert ask(server, "GET", "/theme.css", None, {"Host": host.upper()})[0] == 200, host
    for host in ("elsewhere.example", "127.0.0.1.elsewhere.example", "page.example.org", "", "[", "a:b:c"):
        status, text, _ = ask(server, "GET", "/theme.css", None, {"Host": host})
        assert (status, "--host_names" in text) == (400, True), host


def test_a_url_in_place_of_an_upload_is_not_fetched(server, toy):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.mp4"
        with pytest.raises(Exception, match="nothing is fetched from elsewhere"):
            server.client().predict(gradio_client.handle_file(url), "full", 0.0, "", api_name="/annotate")
        own = upload(server, next((toy / "UCF-101").rglob("*.avi")))
        fetched = {"path": url, "meta": {"_type": "gradio.FileData"}}
        for data in (
            *([fetched, "full", 0, ""], [{**own, "url": url}, "full", 0, ""], [url, "full", 0, ""]),
            *([{**own, "path": "/etc/passwd"}, "full", 0, ""], [{**own, "path": "a\0b"}, "full", 0, ""]),
        ):
            assert "nothing is fetched from elsewhere" in error(server, "annotate", data)
        # Nor in another place.
        assert "choose one of full, minimal" in error(server, "annotate", [own, fetched, 0, ""])
        assert "names of actions" in error(server, "annotate", [own, "full", 0, fetched])
        with pytest.raises(TimeoutError):
            asked.append(elsewhere.accept())
    assert asked == []


WRONG = [
    ([99, "full", 0, ""], "example 99: there are 8, from 0 to 7"),
    ([-1, "full", 0, ""], "example -1: there are 8"),
    (["x", "full", 0, ""], "example x: there are 8"),
    ([True, "full", 0, ""], "example True: there are 8"),
    ([0, "big", 0, ""], "overlay big: choose one of full, minimal"),
    ([0, ["full"], 0, ""], "choose one of full, minimal"),
    ([0, "full", "1", ""], "seconds from 0 to 3"),
    ([0, "full", float("nan"), ""], "seconds from 0 to 3"),
    ([0, "full", -5, ""], "average over -5: choose a number of seconds from 0 to 3"),
    ([0, "full", 0, 5], "only 5: write names of actions between commas"),
    ([0, "full", 0, None], "only None: write names of actions between commas"),
    ([0, "full", 0, ", ,"], "only names no action; write names between commas"),
    ([0, "full", 0, "x" * 900_000], "900,000 characters are too many"),
    ([0, "full", 0, "WalkLeft," * 90_000], "810,000 characters are too many"),
    ([0, "full", 0, "WalkLefd"], "near it are WalkLeft"),
    ([0], "send a video or the number of an example"),
]


@pytest.mark.parametrize(("data", "reason"), WRONG)
def test_wrong_inputs_are_sentences(server, data, reason):
    said = error(server, "example", data)
    assert reason in said
    assert len(said) < 400


def test_requests_that_gradio_trips_over_are_refused(server):
    for wrong in ({"fn_index": 99}, {"fn_index": 1}, {"fn_index": "x"}, {"data": 5}):
        body = json.dumps({"data": [], "fn_index": 0, "session_hash": "x", **wrong})
        status, text, _ = ask(server, "POST", "/gradio_api/queue/join", body, JSON)
        assert (status, wrong) in ((200, {"fn_index": 1}), (422, wrong), (400, wrong)), text
    assert ask(server, "GET", "/?page=x")[0] == 400
    assert "not found" in ask(server, "GET", "/gradio_api/queue/data?session_hash=gone")[1].lower()


def test_sound_that_ffmpeg_refuses_is_a_sentence(server):
    path = server.temporary / "refused.mp4"
    write_video(path, gray_frames([90] * 20), Fraction(25))
    said = error(server, "annotate", [upload(server, path), "full", 0, ""])
    assert said == "refused.mp4: Invalid data found when processing input; convert it to mp4 first"


def test_a_video_has_its_time_and_others_wait(server, toy):
    path = server.temporary / "slow.mp4"
    write_video(path, gray_frames([90] * 20), Fraction(50))
    slow = upload(server, path)
    with ThreadPoolExecutor(2) as pool:
        begun = time.monotonic()
        given_up = pool.submit(error, server, "annotate", [slow, "full", 0, ""])
        time.sleep(0.5)
        assert pool.submit(call, server, "example", [0, "full", 0, ""]).result()[0] == "complete"
        # Not one frame had its label by then.
        assert "takes more than 3 seconds, 5 times its length and 1" in given_up.result()
    assert time.monotonic() - begun < 20


def test_more_pixels_than_memory_are_refused(server, checkpoint, room, monkeypatch):
    """128 MB here: 5 frames of 4K."""
    path = room.folder / "large.mp4"
    write_video(path, gray_frames([90] * 10, 2160, 3840), Fraction(25))
    before = server.peak_megabytes()
    said = error(server, "annotate", [upload(server, path), "full", 0, ""])
    assert "large.mp4: 10 frames of 3840 x 2160 pixels take more memory than this page has" in said
    assert said.endswith("make it full HD, or cut it to 5 frames")
    assert server.peak_megabytes() - before < 150, "it is refused for what it states"
    # And for what comes, where the file states a single frame.
    monkeypatch.setattr(Video, "stated_count", lambda self: 1)
    monkeypatch.setattr(allowed, "MAX_WAITING", 2**27)
    page = make_page(checkpoint, room)
    with pytest.raises(Exception, match=r"large\.mp4: 6 frames of 3840 x 2160 pixels"):
        page.label(path, "full", 0.0, "", lambda *_, **__: None)
    assert list((room.files / "results").rglob("*.*")) == []


def test_a_clip_is_right_among_forty_odd_requests(server, subset):
    clip = subset / "UCF-101/PushUps/v_PushUps_g01_c01.avi"
    alone = server.annotate(clip)
    others = [lambda data=data: error(server, "example", data) for data, _ in WRONG * 2][:20]
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    recording = form("x.mp4", b"x" * 10**5)
    others += [lambda: ask(server, "POST", "/gradio_api/process_recording", recording, kind)] * 5
    others += [lambda: ask(server, "GET", "/config", None, {"Origin": "null"})] * 5
    others += [lambda: chunked(server, "/gradio_api/call/annotate", "application/json", b"[", 2**22)] * 5
    others += [lambda: ask(server, "POST", "/gradio_api/upload", form("x.mp4", b"x" * 2**22), kind)] * 5
    random.Random(0).shuffle(others)
    with ThreadPoolExecutor(9) as pool:
        result = pool.submit(server.annotate, clip)
        for done in [pool.submit(_quietly, other) for other in others]:
            done.result()
        action, _, segments, about = result.result()
    assert (action, segments, about) == (alone[0], alone[2], alone[3])


def _quietly(request):
    # The answer may come before the whole of the body is sent.
    with contextlib.suppress(ConnectionError):
        request()


def test_nothing_is_left_at_the_end(server):
    assert next(server.temporary.glob("action-recognition-*"), None)
    for path in server.files():
        assert not path.name.startswith("tmp"), "half written"
    out = server.end()
    assert "Traceback" not in out
    assert server.process.returncode == 0
    assert list(server.temporary.glob("action-recognition-*")) == []


def test_a_page_removes_what_killed_pages_left(checkpoint, room):
    """One at an IPv6 address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    beside = room.folder.parent
    killed = Server(checkpoint, beside, "--host", "::1", host="[::1]")
    with socket.create_connection(("::1", killed.port)) as reader:
        reader.sendall(b"GET /theme.css HTTP/1.0\r\nHost: [::1]\r\n\r\n")
        assert b" 200 " in reader.recv(100)
    assert room.folder.is_dir(), "a page that runs keeps its folder"
    (left,) = set(beside.glob("action-recognition-*")) - {room.folder}
    (left / "files" / "x.mp4").write_bytes(b"x")
    foreign = beside / "action-recognition-of-another-program"
    foreign.mkdir()
    link = beside / "action-recognition-link"
    link.symlink_to(left)
    room_module.remove_left(room.folder)
    assert (left / "files" / "x.mp4").is_file()
    killed.process.kill()
    killed.process.wait()
    room_module.remove_left(room.folder)
    assert sorted(beside.glob("action-recognition-*")) == sorted([room.folder, foreign, link])


def test_another_users_folder_is_left_alone(room):
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    other = room.folder.parent / "action-recognition-other"
    other.mkdir()
    (other / "held").touch()
    os.chown(other, 12345, 12345)
    room_module.remove_left(room.folder)
    assert other.is_dir()
    os.chown(other, 0, 0)
    room_module.remove_left(room.folder)
    assert not other.exists()
