"""What a user sees: the page in a real browser, and the window of a live stream on a screen."""

import contextlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageGrab

from conftest import ROOT, free_port
from video.reader import Video
from video.writer import write_video

pytestmark = pytest.mark.browser

# Made by `make demo`.
MODEL = ROOT / "model_checkpoints/demo/ConvLSTM_12.pth"
CLIPS = ROOT / "data/toy-actions/UCF-101"
# Screenshots are left here, to be looked at.
SHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / "runs" / "screenshots"))
# Chromium without a sandbox of its own, since tests run as root in containers, and without a word to anybody.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def serve(folder, *flags):
    """The address of a page."""
    port = free_port()
    command = [sys.executable, "demo.py", "--port", port, "--max_seconds", 10, *flags]
    server = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert any(f"http://127.0.0.1:{port}" in line for line in iter(server.stdout.readline, ""))
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "--checkpoint_model", MODEL) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    assert chromium, "make test-browser installs it"
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=chromium, args=list(FLAGS),
            viewport={"width": 1280, "height": 1500}, bypass_csp=True,
        )  # fmt: skip


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as opened:
        yield opened


@contextlib.contextmanager
def open_page(browser, address):
    """A page in the browser that asks nothing of any other host, and nothing that its own refuses."""
    opened = browser.new_page()
    elsewhere, broken, refused = [], [], []
    opened.on("request", lambda request: elsewhere.append(request.url))
    opened.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#upload input[type=file]", state="attached")
    yield opened
    opened.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    assert (broken, refused) == ([], [])


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def check_result(page, action):
    """The action as text, a video that plays, curves and segments."""
    video = page.locator("#video video")
    video.wait_for(timeout=60_000)
    assert page.locator("#action h2").inner_text().strip() == action
    page.wait_for_function("document.querySelector('#video video').readyState >= 2")
    video.evaluate("video => { video.muted = true; video.loop = true; return video.play() }")
    begun = video.evaluate("video => video.currentTime")
    page.wait_for_function(
        "begun => Math.abs(document.querySelector('#video video').currentTime - begun) > 0.3", arg=begun
    )
    assert video.evaluate("video => [video.videoWidth, video.error]") == [320, None]
    assert video.evaluate("video => video.duration") > 1
    assert action in page.locator("#segments").inner_text()
    page.wait_for_selector("#curves canvas, #curves svg.marks")


def test_an_uploaded_video_is_named_and_plays(page):
    shot(page, "empty")
    clip = CLIPS / "JumpingJack/v_JumpingJack_g01_c01.avi"
    page.set_input_files("#upload input[type=file]", clip)
    check_result(page, "JumpingJack")
    assert re.search(r"JumpingJack\s+\d+%", page.locator("#action").inner_text())
    shot(page, "result")
    # The place is free for the next one.
    assert page.locator("#upload").get_by_text("Drop File Here").is_visible()


def test_without_a_checkpoint_a_real_video_is_named(browser, subset, tmp_path):
    clip = subset / "UCF-101/PushUps/v_PushUps_g01_c01.avi"
    with serve(tmp_path) as address, open_page(browser, address) as page:
        page.set_input_files("#upload input[type=file]", clip)
        check_result(page, "push up")
        shot(page, "untrained")
        # Among names of one's own choice only.
        page.locator("#only textarea, #only input").fill("juggling balls, pull ups")
        page.set_input_files("#upload input[type=file]", clip)
        page.wait_for_function(
            "document.querySelector('#action h2').innerText.trim() !== 'push up'", timeout=60_000
        )
        assert page.locator("#action h2").inner_text().strip() in ("juggling balls", "pull ups")


def test_an_example_is_named_and_plays(page):
    page.locator("#examples").get_by_text("Squat").click()
    check_result(page, "Squat")
    shot(page, "example")


def test_progress_is_shown(page, tmp_path):
    source = Video(CLIPS / "Wave/v_Wave_g01_c01.avi")
    frames = [*source.frames()] * 4
    write_video(tmp_path / "long.mp4", frames, source.fps())
    page.set_input_files("#upload input[type=file]", tmp_path / "long.mp4")
    page.wait_for_function(
        "n => new RegExp('[0-9]+/' + n + ' frames').test(document.querySelector('#action').innerText)",
        arg=2 * len(frames),
        polling=20,
    )
    shot(page, "progress")
    check_result(page, "Wave")


def test_what_is_wrong_is_said(page, tmp_path):
    (tmp_path / "notes.mp4").write_text("this is not a video")
    page.set_input_files("#upload input[type=file]", tmp_path / "notes.mp4")
    page.get_by_text("notes.mp4: no video in this file").wait_for(timeout=30_000)
    page.get_by_text("Drop File Here").wait_for()
    time.sleep(1)  # until the message has slid in
    shot(page, "error")
    # And one that is larger than the page takes, which the browser does not even send.
    with (tmp_path / "large.mp4").open("wb") as file:
        file.truncate(2 * 2**30)
    page.set_input_files("#upload input[type=file]", tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").first.wait_for(timeout=30_000)


def test_a_live_stream_is_shown_in_a_window(tmp_path):
    number = next(free for free in range(90, 200) if not Path(f"/tmp/.X{free}-lock").exists())
    display, address = f":{number}", f"tcp://127.0.0.1:{free_port()}"
    screen = subprocess.Popen(["Xvfb", display, "-screen", "0", "800x600x24"], stderr=subprocess.DEVNULL)
    sending = [sys.executable, ROOT / "tests/send_stream.py", address, "150"]
    sender = subprocess.Popen(sending, stdout=subprocess.PIPE, text=True)
    try:
        assert sender.stdout.readline() == "ready\n"
        command = [sys.executable, "test_on_video.py", "--video_path", address, "--checkpoint_model", MODEL]
        shown = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env={**os.environ, "DISPLAY": display}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        best = np.zeros((1, 1, 3), np.uint8)
        while shown.poll() is None:
            with contextlib.suppress(OSError):  # the screen is not there yet
                best = max(
                    best, np.asarray(ImageGrab.grab(xdisplay=display)), key=lambda one: len(np.unique(one))
                )
            time.sleep(0.3)
        out, err = shown.communicate()
        assert shown.returncode == 0, err
        assert "median latency" in out
        assert "Qt" not in err
        SHOTS.mkdir(parents=True, exist_ok=True)
        Image.fromarray(best).save(SHOTS / "window.png")
        # The squares of the frames' numbers, twice as large, below the plate.
        assert (best > 220).all(axis=2).sum() > 500
        assert len(np.unique(best)) > 50
    finally:
        sender.kill()
        sender.communicate()
        screen.kill()
        screen.wait()


def write_untrimmed(folder, root, actions):
    """Six videos of clips with a second of gray behind each; returns name, start, end and action."""
    rows, rng = [], np.random.default_rng(0)
    for number in range(6):
        frames, name = [], f"v{number}.mp4"
        for action in rng.permutation(actions):
            # A group each, so that no video is seen in two.
            clip = sorted((root / action).glob(f"v_{action}_g{8 + 2 * number:02d}_c*.avi"))
            images = list(itertools.islice(Video(clip[0]).frames(), 100))
            rows.append([name, len(frames) / 25, (len(frames) + len(images)) / 25, str(action)])
            frames += [*images, *[np.full(images[0].shape, 128, np.uint8)] * 25]
        rows.append([name, rows[-1][2], len(frames) / 25, "no action"])
        write_video(folder / name, iter(frames), Fraction(25))
    return rows


@contextlib.contextmanager
def teaching(browser, folder, port):
    """The page for a folder, and its server."""
    command = [sys.executable, "demo.py", "--port", port, "--teach", folder]
    server = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "TMPDIR": str(folder.parent)}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    assert any(f"{address}/teach/" in line for line in iter(server.stdout.readline, ""))
    try:
        yield server, f"{address}/teach/"
    finally:
        server.kill()
        server.wait()


def mark(page, start, end, action):
    """Mark a segment of the open video by keys alone."""
    for second, key in ((start, "i"), (end, "o")):
        page.keyboard.press("Home")
        for _ in range(second):
            page.keyboard.press("Shift+ArrowRight")
        page.wait_for_function("second => at === Math.min(second, last())", arg=second)
        page.keyboard.press(key)
    known = page.evaluate("actions.map(action => action.name)")
    if action in known:
        page.keyboard.press(str(known.index(action)))
    else:
        page.keyboard.type(action)
        page.keyboard.press("Enter")
    page.wait_for_function("!unsaved.length && $('state').textContent === 'saved'")


@pytest.mark.parametrize("kind", ["drawn", "real"])
def test_a_folder_is_taught_by_keys(browser, kind, request, tmp_path):
    folder, root, actions = tmp_path / "videos", CLIPS, ["Bow", "JumpingJack", "Squat", "WalkLeft", "Wave"]
    folder.mkdir()
    if kind == "real":
        root = request.getfixturevalue("subset") / "UCF-101"
        actions = ["JugglingBalls", "JumpingJack", "PullUps", "PushUps", "Surfing"]
    rows = write_untrimmed(folder, root, actions)
    port, elsewhere, broken = free_port(), [], []
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 720})
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    with teaching(browser, folder, port) as (server, address):
        page.goto(address)
        page.wait_for_function("now && now.ready", timeout=120_000)
        shot(page, f"{kind}-empty")
        for number in range(3):
            page.wait_for_function(f"now.name === 'v{number}.mp4' && now.ready", timeout=120_000)
            for name, start, end, action in rows:
                if name == f"v{number}.mp4":
                    # Whole seconds inside of it.
                    mark(page, math.ceil(start), max(math.ceil(start) + 1, math.floor(end)), action)
            page.keyboard.press("ArrowDown")
        page.wait_for_function("$('told').textContent.includes('held out')", timeout=120_000)
        page.wait_for_function("[...rows.values()].every(row => row.ready)", timeout=240_000)
        right = total = 0
        for number in range(3, 6):
            page.wait_for_function(f"now.name === 'v{number}.mp4' && now.labels.length", timeout=120_000)
            video = page.evaluate("now")
            names = page.evaluate("actions.map(action => action.name)")
            frames = (np.arange(round(25 * video["end"])) + 0.5) / 25
            said = np.array(video["labels"])[np.searchsorted(video["edges"], frames) - 1]
            truth = np.full(len(frames), "no action", object)
            for name, start, end, action in rows:
                if name == f"v{number}.mp4":
                    truth[(frames >= start) & (frames < end)] = action
            right, total = right + (np.array(names, object)[said] == truth).sum(), total + len(frames)
            if number < 5:
                page.keyboard.press("ArrowDown")
        assert right / total > 0.9, right / total
        page.keyboard.press("a")
        page.wait_for_function("asking && pending", timeout=30_000)
        shot(page, f"{kind}-ask")
        page.keyboard.press("Escape")
        page.keyboard.press("s")
        page.wait_for_function(
            "found && [...document.querySelectorAll('#found img')].every(one => one.complete)"
        )
        shot(page, f"{kind}-similar")
        page.keyboard.press("Escape")
        page.keyboard.press("h")
        page.wait_for_function("heated", timeout=60_000)
        shot(page, f"{kind}-heat")
        page.keyboard.press("Escape")
        # Undone, and again after a reload all is there.
        page.evaluate("open(rows.keys().next().value)")
        page.wait_for_function("now.name === 'v0.mp4'")
        before = page.evaluate("now.spans")
        page.keyboard.press("Home")
        page.keyboard.press("Delete")
        page.wait_for_function("count => now.spans.length === count - 1", arg=len(before))
        page.keyboard.press("Control+z")
        page.wait_for_function("count => now.spans.length === count", arg=len(before))
        page.reload()
        page.wait_for_function("now && now.labels.length")
        assert page.evaluate("now.spans") == before
        page.evaluate("seek(3.5)")
        page.wait_for_function(
            "$('told').textContent.includes('held out') && $('picture').dataset.second > 3"
        )
        shot(page, f"{kind}-taught")
        # Killed while a segment is typed: what was saved is there, what was not stays in the page.
        other = browser.new_page()
        other.goto(address)
        other.wait_for_function("now && now.name === 'v0.mp4' && now.labels.length")
        page.evaluate(
            "for (let n = 0; n < 40; n++) change([], [['v5.mp4', n / 4, n / 4 + 0.2, `quick ${n}`]])"
        )
        page.wait_for_function("undos.length >= 5")
        server.kill()
        server.wait()
        # Those that were shown as saved are there.
        written = (folder / "segments.csv").read_text()
        assert [n for n in range(page.evaluate("undos.length")) if f"quick {n}" not in written] == []
        page.keyboard.press("End")
        page.keyboard.press("Shift+ArrowLeft")
        page.keyboard.press("i")
        page.keyboard.press("End")
        page.keyboard.press("o")
        page.keyboard.type("a <b>new</b> one, 新")
        page.keyboard.press("Enter")
        page.wait_for_function("$('state').className === 'bad'")
        shot(page, f"{kind}-unsaved")
    with teaching(browser, folder, port):
        page.wait_for_function("!unsaved.length && $('state').textContent === 'saved'", timeout=60_000)
        assert "a <b>new</b> one, 新" in (folder / "segments.csv").read_text()
        assert [n for n in range(40) if f"quick {n}" not in (folder / "segments.csv").read_text()] == []
        # The other window hears of it.
        for window in (page, other):
            window.wait_for_function("now.spans.some(span => span[2].startsWith('a <b>'))")
        other.close()
        page.locator("#actions").get_by_text("a <b>new</b> one, 新").wait_for()
    page.close()
    assert [
        url for url in elsewhere if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))
    ] == []
    assert broken == []
