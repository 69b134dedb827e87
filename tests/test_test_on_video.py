import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import test_on_video
from conftest import (
    CLASSES,
    TINY_ACTIONS,
    Script,
    gray_frames,
    run_script,
    save_untrained,
    untrained_checkpoint,
)
from features.encoder import Encoder
from training.checkpoint import save_checkpoint
from video.reader import Video
from video.writer import write_video

FP32 = ("--precision", "fp32")


@pytest.fixture
def model(tmp_path):
    return save_untrained(tmp_path / "model.pth")


def test_mp4_has_every_frame_of_the_source_with_a_label_on_it(call, toy, model, tmp_path):
    source = toy / "UCF-101/WalkRight/v_WalkRight_g01_c01.avi"
    flags = ["--video_path", source, "--checkpoint_model", model, "--overlay", "minimal", *FP32]
    # What the original's command had besides, and a second spelling.
    original = ["--dataset_path", "x", "--channels", 3, "--latent_dim", 512, "--image_dim", 16]
    done = call(test_on_video, *flags, *original)
    assert done.status == 0, done.err
    output = tmp_path / "annotated" / "v_WalkRight_g01_c01.mp4"
    assert str(output.relative_to(tmp_path)) in done.out
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 25
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    for frame, original in zip(frames, Video(source).frames(), strict=True):
        assert frame.shape == original.shape
        assert (frame[8:12, 8:12] < 60).all(), "the dark plate"
        assert np.abs(frame[60:].astype(int) - original[60:]).mean() < 8, "the image below"
    first = output.with_name(f"{output.name}.csv").read_text()
    # A second run finds another name: nothing is overwritten. Other sizes of frames have other labels.
    assert call(test_on_video, *flags).status == 0
    assert len(list(output.parent.iterdir())) == 8
    assert output.with_name("v_WalkRight_g01_c01-2.mp4.csv").read_text() != first
    assert output.with_name(f"{output.name}.csv").read_text() == first


def test_a_gif_has_every_frame(call, model, tmp_path):
    write_video(tmp_path / "odd.mp4", gray_frames(list(range(0, 240, 8)), 50, 70), Fraction(30000, 1001))
    flags = ["--checkpoint_model", model, "--output", "x.gif"]
    assert call(test_on_video, "--video_path", tmp_path / "odd.mp4", *flags).status == 0
    with Image.open(tmp_path / "x.gif") as image:
        assert (image.n_frames, image.size[0]) == (30, 70)
        assert image.size[1] > 50, "the timeline below"


def test_a_video_shorter_than_a_clip_is_padded(call, model, gray_video):
    done = call(test_on_video, "--video_path", gray_video(count=2), "--checkpoint_model", model, *FP32)
    assert done.status == 0, done.err
    assert "2 frames" in done.out


def test_without_a_checkpoint_the_encoder_names_its_own_actions(call, toy, tmp_path, monkeypatch):
    for module in ("annotation.settings", "annotation.recognizer", "test_on_video"):
        monkeypatch.setattr(f"{module}.DEFAULT_ENCODER", "tiny_video")
    clip = toy / "UCF-101/WalkRight/v_WalkRight_g01_c01.avi"
    done = call(test_on_video, "--video_path", clip, "--output", "x.mp4", "--min_probability", 0.999)
    assert "no --checkpoint_model: tiny_video names the 4 actions" in done.out
    assert f"{clip}: no action\n" in done.out
    about = json.loads((tmp_path / "x.mp4.json").read_text())
    assert (about["action"], about["checkpoint"]) == ("no action", "tiny_video, as it was released")
    assert (tmp_path / "x.mp4.csv").read_text().splitlines()[0].split(",")[3:5] == ["name1", "probability1"]


def test_actions_are_listed(call, model, tmp_path):
    for flags, names in (
        (["--encoder", "tiny_video"], TINY_ACTIONS),
        (["--checkpoint_model", model], CLASSES),
    ):
        assert call(test_on_video, "--list_actions", *flags).out.splitlines() == names
    listed = call(test_on_video, "--list_actions").out.splitlines()
    assert (len(listed), listed[0]) == (400, "abseiling")
    call(test_on_video, "--list_actions", "--encoder_weights", tmp_path / "none").one_line_error()


def test_a_checkpoint_whose_logits_are_not_finite(call, gray_video, tmp_path):
    """Damaged in a way that no file format shows."""
    model = untrained_checkpoint()
    next(model.head.output_layers.parameters()).data.fill_(float("nan"))
    save_checkpoint(tmp_path / "x.pth", model)
    done = call(
        test_on_video, "--video_path", gray_video(), "--checkpoint_model", "x.pth", "--output", "x.mp4"
    )
    assert (done.status, "logits are not finite" in done.one_line_error()) == (1, True)
    assert not list(tmp_path.glob("*x.mp4*"))


def test_with_a_store_a_second_look_encodes_nothing(call, toy, model, tmp_path, monkeypatch):
    flags = ["--video_path", toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi", "--output", "x.mp4", *FP32]
    flags += ["--store", tmp_path / "store"]
    assert call(test_on_video, *flags, "--encoder", "tiny_video").status == 0
    monkeypatch.setattr(Encoder, "embed", None)
    done = call(test_on_video, *flags, "--encoder", "tiny_video", "--min_probability", 0.999)
    assert (done.status, "no action" in done.out) == (0, True), done.err
    assert "another --store" in call(test_on_video, *flags, "--checkpoint_model", model).one_line_error()


@pytest.fixture
def bad(toy, tmp_path, gray_video):
    """A folder of files that are no videos, and one that is, `good.mp4`."""
    whole = next((toy / "UCF-101").rglob("*.avi")).read_bytes()
    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "empty.avi").touch()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "header.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    gray_video("one.mp4", count=1)
    gray_video("good.mp4")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"video_path": "gone.avi"}, "gone.avi"),
        ({"video_path": "text.avi"}, "decoded"),
        ({"video_path": "empty.avi"}, "empty"),
        ({"video_path": "half.avi"}, "truncated"),
        ({"video_path": "sound.mp4"}, "sound.mp4"),
        ({"video_path": "header.avi"}, "header.avi"),
        ({"video_path": "one.mp4"}, "single frame"),
        ({"video_path": "nothing*"}, "no videos there"),
        ({"output": "x.mov"}, ".mp4 or .gif"),
        ({"output": "good.mp4"}, "is an input"),
        ({"output": "model.pth.mp4", "checkpoint_model": "model.pth.mp4"}, "is an input"),
        ({"output": f"{'x' * 240}.mp4"}, "the name is too long"),
        ({"output": "empty.avi/x.mp4"}, "empty.avi"),
        ({"video_path": ".", "output": "x.mp4"}, "name a folder"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"image_dim": 0}, "image_dim"),
        ({"min_probability": 1.2}, "[0, 1)"),
        ({"only": "fly"}, "--only fly"),
        ({"checkpoint_model": "gone.pth"}, "gone.pth"),
        ({"checkpoint_model": "text.avi"}, "text.avi"),
        ({"checkpoint_model": None, "encoder": "resnet18"}, "no last layer of its own"),
        ({"checkpoint_model": None, "encoder": "i4d"}, "unknown encoder 'i4d'"),
        ({"encoder": "i3d"}, "leave out --encoder"),
        ({"checkpoint_model": None, "backend": "onnxruntime"}, "name its folder with --checkpoint_model"),
        ({"video_path": None}, "--video_path is missing"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_nothing_is_written(call, bad, model, flags, words):
    flags = {"video_path": "good.mp4", "checkpoint_model": model, "output": "out.mp4", **flags}
    before = sorted(bad.iterdir())
    pairs = [(f"--{key}", value) for key, value in flags.items() if value is not None]
    done = call(test_on_video, *(word for pair in pairs for word in pair))
    assert done.status in (1, 2)
    assert words in done.one_line_error()
    assert sorted(bad.iterdir()) == before


def test_as_typed_no_library_says_anything_of_its_own(bad, model):
    done = run_script("test_on_video.py", "--video_path", bad / "text.avi", "--checkpoint_model", model)
    assert (done.status, "decoded" in done.one_line_error()) == (1, True)


def test_a_full_disk_leaves_nothing_half_written(toy, tmp_path):
    clip = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    flags = ["--video_path", clip, "--encoder", "tiny_video", *FP32, "--output"]
    done = Script("test_on_video.py", *flags, tmp_path / "out/x.mp4", file_limit=10_000).outcome()
    assert done.status == 1
    assert "File too large" in done.one_line_error()
    assert not list((tmp_path / "out").iterdir())


def test_several_videos_and_a_broken_one(call, toy, model, tmp_path, gray_video):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    gray_video("one.mp4").rename(folder / "one.mp4")
    gray_video("two.mp4").rename(folder / "deep/one.mp4")
    (folder / "broken.avi").write_text("no video")
    (folder / "notes.txt").write_text("no video either, and not named as one")
    flags = ["--checkpoint_model", model, *FP32, "--output", tmp_path / "shown"]
    pattern = str(toy / "UCF-101" / "Walk*" / "*_g01_c01.avi")
    done = call(test_on_video, *flags, "--change_cost", 0.5, "--video_path", folder, pattern)
    assert done.status == 1
    assert "1 of 5 videos" in done.err
    assert "Traceback" not in done.err
    assert sum(line.startswith("not annotated:") for line in done.err.replace("\r", "\n").splitlines()) == 1
    names = {path.name for path in (tmp_path / "shown").glob("*.mp4")}
    assert names == {"one.mp4", "one-2.mp4", "v_WalkLeft_g01_c01.mp4", "v_WalkRight_g01_c01.mp4"}
    for name in names:
        about = json.loads(Path(tmp_path / "shown" / f"{name}.json").read_text())
        assert about["frames"] == Video(tmp_path / "shown" / name).count()
        assert about["segments"][-1]["last_frame"] == about["frames"] - 1
