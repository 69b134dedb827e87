"""Teaching in the browser: the table that is written, the model that learns, and what the page asks for."""

import csv
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_segments import PLAN, draw, write_table

import demo
import test_on_video
from annotation.heatmap import Maps, evidence, heat_at, video_heat
from annotation.learner import Learner
from annotation.recognizer import LastLayer, Recognizer
from conftest import KILLS, ROOT, Script, untrained_checkpoint
from features.encoder import Encoder
from features.store import file_stamp
from models import build_head
from splits.segments import read_segments
from splits.table import SegmentTable, Span
from training.checkpoint import Checkpoint, save_checkpoint
from utils.process import UserError
from video.reader import Video
from video.writer import write_video

starlette = pytest.importorskip("starlette.testclient", reason="the page's packages are not installed")

WAVE, JUMP = "Rød, wave", "jump"
# Adds segments as fast as it can, and says so of each that is saved.
WRITER = """
import sys
from pathlib import Path
from splits.table import SegmentTable, Span
table, first = SegmentTable(Path(sys.argv[1])), int(sys.argv[2])
for number in range(first, first + int(sys.argv[3])):
    table.edit([], [Span("a.mp4", number, number + 0.5, "jump")])
    print(number, flush=True)
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    return SegmentTable(tmp_path)


def spans(table):
    return sorted((span.start, span.end, span.action) for span in table.read())


def test_a_new_segment_cuts_others_and_is_undone(table):
    table.edit([], [Span("a.mp4", 1, 5, "run")])
    removed, added = table.edit([], [Span("a.mp4", 2, 3, "jump")])
    assert [span[:4] for span in removed] == [("a.mp4", 1, 5, "run")]
    assert spans(table) == [(1, 2, "run"), (2, 3, "jump"), (3, 5, "run")]
    table.edit(added, removed)
    assert spans(table) == [(1, 5, "run")]
    # Of one action they become one.
    table.edit([], [Span("a.mp4", 4, 7, "run"), Span("b.mp4", 0, 1, "No Action")])
    assert spans(table) == [(0, 1, "no action"), (1, 7, "run")]
    # Sent twice, a change is made once.
    table.edit([Span("a.mp4", 1, 7, "run")], [])
    assert table.edit([Span("a.mp4", 1, 7, "run")], []) == ([], [])
    table.edit(table.read(), [])
    assert table.read() == []


@pytest.mark.parametrize("name", ["a, b", "跳绳", "<script>alert(1)</script>", '"quoted"'])
def test_names_stay_as_they_are_typed(table, name):
    table.edit([], [Span("a.mp4", 0, 1, name)])
    assert read_segments(table.path)[0].action == name


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Span("a.mp4", 0, 1, "x" * 300), "300 characters; an action has at most 100"),
        (Span("a.mp4", 0, 1, " "), "must have a name"),
        (Span("a.mp4", 2, 1, "run"), "too short"),
        (Span("a.mp4", 0, float("nan"), "run"), "too short"),
        (Span("a.mp4", 0, float("inf"), "run"), "too short"),
    ],
)
def test_what_cannot_be_is_refused(table, span, message):
    with pytest.raises(UserError, match=message):
        table.edit([], [span])
    assert not table.path.exists()


def test_columns_and_rows_of_others_stay(table):
    rows = [["b", "0:01", "2,5", "run", "train", "seen twice"], ["gone.mp4", "3", "4", "jump", "test", ""]]
    write_table(table.path, rows, ("Video", "start", "end", "Behavior", "split", "remark"), ";")
    table.edit([], [Span("b.mp4", 3, 4, "jump"), Span("a.mp4", 0, 1, "run")])
    text = table.path.read_text()
    assert 'b,0:01,"2,5",run,train,seen twice' in text
    assert "b,3.000,4.000,jump,train," in text
    assert "gone.mp4,3,4,jump,test," in text
    assert "a.mp4,0.000,1.000,run,train," in text
    assert len(read_segments(table.path)) == 4
    # Undone, a row is what it was.
    for change in ([Span("b.mp4", 1, 2.5, "run")], []), ([], [Span("b.mp4", 1.5, 2, "jump")]):
        before = sorted(csv.reader(table.path.open(newline="")))
        removed, added = table.edit(*change)
        assert sorted(csv.reader(table.path.open(newline=""))) != before
        table.edit(added, removed)
        after = sorted(csv.reader(table.path.open(newline="")))
        assert [row[4:] for row in after] == [row[4:] for row in before]
        assert len(after) == len(before)


def test_a_large_table_is_changed_as_quickly_as_it_is_read(table):
    rows = [["a.mp4", 2 * number, 2 * number + 1, f"a{number % 7}"] for number in range(20_000)]
    write_table(table.path, rows)
    begun = time.process_time()
    table.read()
    read = time.process_time() - begun
    table.edit([Span("a.mp4", 4, 5, "a2")], [Span("a.mp4", 0.5, 0.8, "x")])
    # By rows, not by pairs of rows, which took minutes.
    assert time.process_time() - begun < 20 * read
    assert len(table.read()) == 20_001


def test_a_wrong_table_is_told_and_not_overwritten(table):
    wrong = "video,start,end,action\na.mp4,five,6,run\n"
    table.path.write_text(wrong)
    with pytest.raises(UserError, match="row 2: start 'five' is no time"):
        table.edit([], [Span("a.mp4", 0, 1, "run")])
    assert table.path.read_text() == wrong


def writer(folder, first, count):
    command = [sys.executable, "-c", WRITER, folder, str(first), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_no_row(table):
    both = [writer(table.folder, first, 60) for first in (0, 1000)]
    assert [each.wait(60) for each in both] == [0, 0]
    assert [span.start for span in sorted(table.read())] == [*range(60), *range(1000, 1060)]


def test_a_killed_writer_loses_nothing_that_was_saved(table):
    for turn in range(KILLS):
        process = writer(table.folder, 1000 * turn, 1000)
        lines = [process.stdout.readline() for _ in range(5 + 7 * turn)]
        process.kill()
        lines += process.stdout.read().splitlines()
        saved = {1000 * turn + number for number in range(len([line for line in lines if line.strip()]))}
        assert saved <= {round(span.start) for span in table.read()}
        read_segments(table.path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Five videos of colors, and the rows of their segments."""
    folder, rng = tmp_path_factory.mktemp("drawn") / "videos", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(5):
        rows += draw(folder / f"v{number}.mp4", [PLAN[place] for place in rng.permutation(len(PLAN))], rng)
    return folder, [Span(name, float(start), float(end), action) for name, start, end, action in rows]


@pytest.fixture
def learner(drawn, tmp_path):
    """A learner over these videos that has begun; what it writes goes away."""
    folder, encoder = drawn[0], Encoder("tiny", img_dim=32).prepare("fp32")
    (folder / "segments.csv").unlink(missing_ok=True)
    made = Learner(folder, encoder, tmp_path / "models")
    made.start()
    wait(lambda: all(entry.ready or entry.problem for entry in made.entries.values()))
    yield made
    made.close()
    (folder / "segments.csv").unlink(missing_ok=True)


def wait(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def gaps(own, end=10.0):
    """What lies between the segments of a video."""
    edges = [0.0, *(edge for span in sorted(own) for edge in span[1:3]), end]
    return [
        Span(own[0].video, a, b, "no action")
        for a, b in zip(edges[::2], edges[1::2], strict=True)
        if b - a > 0.3
    ]


def taught(learner, rows):
    """Mark two videos, and wait until all are labeled again."""
    for name in ("v0.mp4", "v1.mp4"):
        own = [span for span in rows if span.video == name]
        learner.edit([], [*own, *gaps(own)])
    learner.settle()
    assert "held out" in learner.told


def test_it_learns_as_segments_are_marked(learner, drawn, tmp_path):
    rows = drawn[1]
    assert "two actions" in learner.told
    asked = learner.ask()
    assert asked["action"] == ""
    assert 0 < asked["end"] - asked["start"] <= 1
    learner.edit([], [rows[0]])
    assert rows[0].action in learner.actions
    taught(learner, rows)
    right = total = 0
    for name in ("v2.mp4", "v3.mp4", "v4.mp4"):
        entry = learner.entries[name]
        middles = entry.embedded.middles()
        truth = np.zeros(len(middles), int)
        for span in rows:
            if span.video == name:
                truth[(middles >= span.start) & (middles < span.end)] = learner.actions.index(span.action)
        right, total = right + (truth == entry.labels).sum(), total + len(truth)
        assert len(entry.edges) == len(entry.labels) + 1 == len(entry.percents) + 1
        assert (entry.percents > 30).all()
    assert right / total > 0.9
    # What is asked is not marked yet, and not asked twice.
    moments = [learner.ask() for _ in range(4)]
    assert all(moment["video"] not in ("v0.mp4", "v1.mp4") for moment in moments)
    assert len({(moment["video"], moment["second"]) for moment in moments}) == 4
    wave = next(span for span in rows if span.video == "v2.mp4" and span.action == WAVE)
    found = learner.similar(wave.video, wave.start, wave.end)
    assert found[0]["cosine"] > 0.99
    best = next(
        span
        for span in rows
        if span.video == found[0]["video"] and span.start <= found[0]["second"] < span.end
    )
    assert best.action == WAVE
    # The file does what the page does.
    path = learner.save()
    assert learner.save() != path
    recognizer = Recognizer.load(path)
    assert recognizer.classes == sorted([WAVE, JUMP])
    rows_there = learner.table.path
    # Without "no action" marked too, training goes on from it.
    learner.edit([span for span in learner.table.read() if span.action == "no action"], [])
    learner.settle()
    path = learner.save()
    out = Script(
        "train.py", "--checkpoint_model", path, "--dataset_path", drawn[0], "--segments", rows_there,
        "--output_path", tmp_path / "out", "--run_path", tmp_path / "run", "--precision", "fp32",
        "--num_epochs", 2, "--cache_path", tmp_path / "cache",
    ).outcome()  # fmt: skip
    assert out.status == 0, out.err
    recognizer = Recognizer.load(path)
    assert recognizer.classes == sorted([WAVE, JUMP])
    segments = recognizer(drawn[0] / "v3.mp4").segments
    assert WAVE in [segment.action for segment in segments]


def test_the_table_may_be_changed_by_others(learner, drawn):
    taught(learner, drawn[1])
    rows = [
        [span.video, span.start, span.end, "stand" if span.action == JUMP else span.action]
        for span in drawn[1]
    ]
    write_table(learner.table.path, rows)
    wait(lambda: "stand" in learner.actions and f"from {len(rows)} segments of 2 actions" in learner.told)
    # A number that was there stays.
    assert learner.actions.index(JUMP) < learner.actions.index("stand")
    learner.table.path.write_text("nonsense\n")
    wait(lambda: "no column video" in learner.problem)
    with pytest.raises(UserError, match="no column video"):
        learner.edit([], [drawn[1][0]])
    assert learner.table.path.read_text() == "nonsense\n"
    learner.table.path.unlink()
    wait(lambda: not learner.problem and learner.recognizer is None)


def test_videos_that_cannot_be_used_are_told_and_others_go_on(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "videos"
    folder.mkdir()
    draw(folder / "good.mp4", PLAN[:2], rng)
    (folder / "bad.mp4").write_text("this is not a video")
    (folder / "good.avi").write_text("a second one of this name")
    for count in (1, 3):
        write_video(folder / f"of{count}.mp4", np.zeros((count, 48, 64, 3), np.uint8), Fraction(25))
    learner = Learner(folder, Encoder("tiny", img_dim=32).prepare("fp32"))
    learner.start()
    try:
        wait(lambda: all(entry.ready or entry.problem for entry in learner.entries.values()))
        problems = {name: entry.problem for name, entry in learner.entries.items()}
        assert "can be decoded" in problems["bad.mp4"]
        assert "same name" in problems["good.mp4"]
        assert "single frame" in problems["of1.mp4"]
        assert problems["of3.mp4"] == ""
        assert learner.ask()["video"] == "of3.mp4"
    finally:
        learner.close()


def test_many_videos_need_few_open_files(tmp_path):
    """Each keeps an open file only while it is looked at."""
    folder = tmp_path / "videos"
    folder.mkdir()
    draw(folder / "v0.mp4", PLAN[:1], np.random.default_rng(0))
    for number in range(1, 700):
        (folder / f"v{number}.mp4").hardlink_to(folder / "v0.mp4")
    encoder = Encoder("tiny", img_dim=32).prepare("fp32")
    learner = Learner(folder, encoder)
    embedded = learner.store.embed("v0", learner.entries["v0.mp4"].video)
    for name, entry in learner.entries.items():
        learner.store.save(name.removesuffix(".mp4"), entry.video, file_stamp(entry.video), embedded)
    learner = Learner(folder, encoder)
    learner.start()
    try:
        wait(lambda: all(entry.ready or entry.problem for entry in learner.entries.values()))
        assert {entry.problem for entry in learner.entries.values()} == {""}
        assert len(list(Path("/proc/self/fd").iterdir())) < 650
    finally:
        learner.close()


@pytest.fixture
def page(learner):
    from annotation.teach_page import Teach

    with starlette.TestClient(Teach(learner).app) as client:
        yield client


def test_what_the_page_asks_for(page, learner, drawn):
    assert "teach.js" in page.get("/").text
    assert "default-src 'self'" in page.get("/").headers["content-security-policy"]
    assert page.get("/teach.js").status_code == page.get("/teach.css").status_code == 200
    taught(learner, drawn[1])
    news = page.get("/changes", params={"since": 0}).json()
    assert [row["name"] for row in news["videos"]] == [f"v{number}.mp4" for number in range(5)]
    assert next(action["name"] for action in news["actions"]) == "no action"
    assert "held out" in news["told"]
    video = page.get("/video", params={"name": "v2.mp4"}).json()
    assert video["end"] == pytest.approx(10.0)
    assert len(video["labels"]) == len(video["edges"]) - 1 == 250
    # A second is 25 frames, whichever was asked for before.
    for second in (3, 4, 8, 0):
        head, _, files = page.get("/second", params={"name": "v2.mp4", "k": second}).content.partition(b"\n")
        about = json.loads(head)
        assert about["times"] == pytest.approx(second + np.arange(25) / 25)
        assert sum(about["sizes"]) == len(files)
    assert page.get("/picture", params={"name": "v2.mp4", "second": 3.2}).content[:2] == b"\xff\xd8"
    answer = page.get("/picture", params={"name": "v2.mp4", "second": 3.2, "heat": JUMP})
    assert answer.status_code == 400
    assert "no heat map; i3d" in answer.text
    assert page.get("/ask").json()["video"] in ("v2.mp4", "v3.mp4", "v4.mp4")
    assert page.get("/similar", params={"name": "v2.mp4", "start": 1, "end": 2}).json()
    assert page.post("/save").json()["path"].endswith(".pth")
    assert (
        page.get("/video", params={"name": "../x.mp4"}).status_code == page.get("/video").status_code == 400
    )


def test_a_change_is_saved_or_refused_or_to_be_sent_again(page, learner, monkeypatch):
    def edit(*add, remove=()):
        return page.post("/edit", json={"remove": list(remove), "add": list(add)})

    row = ["v0.mp4", 1.0, 2.0, WAVE]
    undo = edit(row).json()
    assert undo == {"remove": [[*row, ""]], "add": []}
    assert page.get("/video", params={"name": "v0.mp4"}).json()["spans"] == [row[1:]]
    # Nor one that begins behind its video, which no other time would take either.
    assert edit(["v0.mp4", 99, 100, WAVE]).status_code == 400
    assert (edit(["v0.mp4", 3, 4, "x" * 300]).status_code, edit(["none.mp4", 3, 4, "x"]).status_code) == (
        400,
        400,
    )
    # A full disk: the page keeps the change and sends it again.
    with monkeypatch.context() as full:
        full.setattr(
            "utils.files.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        answer = edit(["v0.mp4", 3, 4, WAVE])
        assert (answer.status_code, "No space left" in answer.text) == (503, True)
    assert len(learner.table.read()) == 1
    assert edit(*undo["add"], remove=undo["remove"]).status_code == 200
    assert learner.table.read() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teach", "nowhere"], "nowhere: no such folder"),
        (["--teach", "."], "no video in it"),
        (["--teach", ".", "--host", "0.0.0.0"], "for this machine alone"),
    ],
)
def test_wrong_folders_are_refused_in_a_line(call, tmp_path, flags, message):
    save_checkpoint(tmp_path / "m.pth", untrained_checkpoint())
    done = call(demo, *flags, "--checkpoint_model", "m.pth", "--precision", "fp32", "--port", 0)
    assert done.status == 1
    assert message in done.one_line_error()


# Heat maps.


@pytest.mark.parametrize(
    ("name", "grid", "kind"),
    [
        ("resnet18", (2, 2), "LinearProbe"), ("r3d_18", (4, 4), "LinearProbe"),
        ("i3d", (2, 2), "LinearProbe"), ("r3d_18", (4, 4), "LastLayer"), ("i3d", (2, 2), "LastLayer"),
    ],
)  # fmt: skip
def test_of_linear_heads_the_heat_is_the_logit_less_its_bias(name, grid, kind):
    torch.manual_seed(0)
    encoder = Encoder(name, pretrained=False, img_dim=64)
    maps = Maps(encoder)
    assert maps.grid == grid
    frames = torch.randint(0, 256, (2, max(1, encoder.windows.least), 3, 64, 64), dtype=torch.uint8)
    found = maps.embed(frames)
    found = found.reshape(1, -1, encoder.width, *grid)
    clips = encoder.embed(frames).reshape(1, -1, encoder.width)
    torch.testing.assert_close(found.mean((3, 4)), clips, rtol=1e-4, atol=1e-5)
    if kind == "LastLayer":
        head = LastLayer(encoder.feature_extractor)
    else:
        head = build_head("LinearProbe", encoder.width, 5)[0]
        torch.nn.init.normal_(head.output.weight)
        torch.nn.init.normal_(head.output.bias)
    padding, label = torch.zeros(clips.shape[:2], dtype=torch.bool), torch.tensor([3])
    weights = evidence(head, clips, padding, label)
    heat = (weights[..., None, None] * found).sum(2) / (grid[0] * grid[1])
    logit = head(clips, padding)[0, 3] - head.output.bias[3]
    torch.testing.assert_close(heat.sum(), logit, rtol=1e-3, atol=1e-4)


def test_a_video_is_written_with_its_heat(tmp_path, call):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", pretrained=False, img_dim=64)
    save_resnet(tmp_path / "m.pth", encoder)
    recognizer = Recognizer.load(tmp_path / "m.pth")
    frames = np.random.default_rng(0).integers(0, 60, (30, 48, 64, 3), np.uint8)
    write_video(tmp_path / "x.mp4", frames, Fraction(25))
    video, maps = Video(tmp_path / "x.mp4"), Maps(recognizer.encoder)
    embedded, layout = recognizer.embed(video)
    found = recognizer.recognize(embedded, recognizer.probabilities(embedded, layout))
    heat = video_heat(recognizer, maps, video, embedded, layout, found)
    assert heat.shape == (30, 2, 2)
    shown = list(Video(tmp_path / "x.mp4").frames())
    for number in (0, 17, 29):
        label = recognizer.chosen[int(found.labels[number])]
        image, own = heat_at(recognizer, maps, video, embedded, float(found.times[number]), label)
        assert (image == shown[number]).all()
        if embedded.stride == 1:
            np.testing.assert_allclose(own, heat[number], rtol=0.02, atol=1e-3)
    plain = call(test_on_video, "--video_path", tmp_path / "x.mp4", "--checkpoint_model", tmp_path / "m.pth",
                 "--output", "a.mp4", "--overlay", "minimal")  # fmt: skip
    hot = call(test_on_video, "--video_path", tmp_path / "x.mp4", "--checkpoint_model", tmp_path / "m.pth",
               "--output", "b.mp4", "--overlay", "minimal", "--heatmap")  # fmt: skip
    assert (plain.status, hot.status) == (0, 0)
    pair = [np.stack(list(Video(tmp_path / name).frames())).astype(int) for name in ("a.mp4", "b.mp4")]
    assert np.abs(pair[0] - pair[1]).max() > 60


def save_resnet(path, encoder):
    head, sizes = build_head("LinearProbe", encoder.width, 2)
    torch.nn.init.normal_(head.output.weight)
    encoder.pretrained = False
    save_checkpoint(path, Checkpoint(encoder, head.eval(), "LinearProbe", sizes, ["run", "jump"], 4))
    return path


def test_heat_maps_are_refused_where_there_is_none(call, tmp_path, gray_video):
    save_checkpoint(tmp_path / "m.pth", untrained_checkpoint())
    flags = ["--video_path", gray_video(), "--checkpoint_model", tmp_path / "m.pth", "--heatmap"]
    assert "does not average a map" in call(test_on_video, *flags, "--precision", "fp32").one_line_error()
    flags[1] = "tcp://127.0.0.1:1"
    assert "--heatmap is for files" in call(test_on_video, *flags).err


def test_the_command_serves_both_pages_to_this_machine_alone(drawn, tmp_path):
    pytest.importorskip("gradio", reason="the page's packages are not installed")
    from page_server import JSON, Server

    (drawn[0] / "segments.csv").unlink(missing_ok=True)
    save_checkpoint(tmp_path / "m.pth", untrained_checkpoint())
    server = Server(tmp_path / "m.pth", tmp_path, "--teach", drawn[0])
    try:
        assert "teach.js" in server.ask("GET", "/teach/")[1]
        assert server.ask("GET", "/")[0] == server.ask("GET", "/teach/teach.css")[0] == 200
        body = json.dumps({"remove": [], "add": [["v0.mp4", 0, 1, "run"]]})
        assert server.ask("POST", "/teach/edit", body, JSON | {"Origin": "http://elsewhere.org"})[0] == 403
        assert server.ask("POST", "/teach/edit", body, JSON | {"Host": "elsewhere.org"})[0] == 400
        assert server.ask("POST", "/teach/video", body, JSON)[0] == 404
        assert server.ask("GET", "/teach/../demo.py")[0] == 404
        assert not (drawn[0] / "segments.csv").exists()
        assert server.ask("POST", "/teach/edit", body, JSON)[0] == 200
        assert (drawn[0] / "segments.csv").is_file()
    finally:
        server.end()
        (drawn[0] / "segments.csv").unlink(missing_ok=True)
