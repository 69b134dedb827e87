import json
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
import torch
from PIL import Image

import test_on_video
import train
from annotation import labels
from annotation.annotate import Annotator
from annotation.overlay import draw_text, font_size
from annotation.settings import LabelSettings
from conftest import CLASSES, gray_frames, run_script
from dataset import window_indices
from features.streams import Cutter
from training.checkpoint import Checkpoint, load_checkpoint
from training.classifier import Classifier
from video.frames import resize_frames
from video.reader import Video
from video.writer import write_video


@pytest.fixture
def trained(call, small, train_flags, tmp_path):
    done = call(train, *train_flags(small), "--num_epochs", 1)
    assert done.status == 0, done.err
    return tmp_path / "model_checkpoints" / "ConvLSTM_1.pth"


FP32 = ("--precision", "fp32")


def test_mp4_has_every_frame_of_the_source_with_a_label_on_it(call, small, trained, tmp_path):
    source = small / "UCF-101/WalkRight/v_WalkRight_g01_c01.avi"
    minimal = (*FP32, "--overlay", "minimal")
    done = call(test_on_video, "--video_path", source, "--checkpoint_model", trained, *minimal)
    assert done.status == 0, done.err
    output = tmp_path / "annotated" / "v_WalkRight_g01_c01.mp4"
    assert str(output.relative_to(tmp_path)) in done.out
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 25
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    originals = list(Video(source).frames())
    assert len(frames) == len(originals)
    for frame, original in zip(frames, originals, strict=True):
        assert frame.shape == original.shape
        assert (frame[8:12, 8:12] < 60).all(), "the dark plate"
        assert np.abs(frame[60:].astype(int) - original[60:]).mean() < 8, "the picture below"
    # A second run finds another name: nothing is overwritten.
    assert call(test_on_video, "--video_path", source, "--checkpoint_model", trained).status == 0
    assert sorted(path.name for path in output.parent.iterdir()) == [
        f"v_WalkRight_g01_c01{name}"
        for number in ("-2", "")
        for name in (f"{number}.mp4", f"{number}.mp4.csv", f"{number}.mp4.json")
    ]


def pieces_of(frames, streams):
    """Batches of 7 frames, or how many are left."""
    cutter = Cutter(streams)
    for start in range(0, len(frames), 7):
        some = frames[start : start + 7]
        yield labels.Batch(some, cutter.read(some))
    yield labels.Batch([], cutter.end(), ended=True)


@pytest.mark.parametrize("every", [1, 4, 9])
@pytest.mark.parametrize(
    ("count", "length", "step"), [(60, 8, 2), (13, 8, 2), (5, 8, 2), (16, 8, 2), (60, 7, 3), (60, 2, 1)]
)
def test_labels_come_from_the_window_around_each_frame(toy, trained, count, length, step, every):
    checkpoint = load_checkpoint(trained)
    video = Video(toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi")
    frames = list(islice(video.frames(), count))
    resized = resize_frames(frames, 32)
    # In pieces of any size, as they come in.
    streams = checkpoint.model.open_streams(32)
    layout = labels.ClipLayout(length, step, every)
    labelled = list(labels.label_frames(checkpoint.model, streams, pieces_of(frames, streams), layout))
    given = [frame for batch in labelled for frame in batch.frames]
    assert all(np.array_equal(one, other) for one, other in zip(given, frames, strict=True))
    actual = torch.cat([batch.probabilities for batch in labelled])
    windows = window_indices(len(frames), length, step=step)
    with torch.no_grad():
        each = checkpoint.model(torch.stack([resized[window] for window in windows])).softmax(dim=-1)
    middles = [min(number // every * every + every // 2, len(frames) - 1) for number in range(len(frames))]
    assert torch.allclose(actual, each[middles], atol=1e-5)
    if count == 60:
        assert not torch.allclose(actual[0], actual[-1], atol=1e-4)


def test_labels_in_bf16_are_those_of_fp32(toy, trained):
    model = load_checkpoint(trained).model
    frames = list(Video(toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi").frames())
    probabilities = []
    for dtype in (torch.float32, torch.bfloat16):
        model.encoder.prepare(dtype)
        streams = model.open_streams(32)
        labelled = labels.label_frames(model, streams, pieces_of(frames, streams), labels.ClipLayout(8, 2))
        probabilities.append(torch.cat([batch.probabilities for batch in labelled]))
    assert torch.allclose(*probabilities, atol=0.02)
    assert not torch.equal(*probabilities)


def test_gif_rate_size_and_image_dim(call, trained, tmp_path):
    source = tmp_path / "odd.mp4"
    write_video(source, gray_frames(list(range(0, 240, 8)), 50, 70), Fraction(30000, 1001))
    for flag in ("--image_dim", "--img_dim"):
        done = call(
            test_on_video,
            "--video_path",
            source,
            "--checkpoint_model",
            trained,
            flag,
            16,
            "--output",
            "x.gif",
            *FP32,
        )
        assert done.status == 0, done.err
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 30
        assert image.size[0] == 70
        assert image.size[1] > 50, "the timeline below"


def test_videos_shorter_than_a_window_are_padded(call, trained, gray_video):
    done = call(test_on_video, "--video_path", gray_video(count=2), "--checkpoint_model", trained, *FP32)
    assert done.status == 0, done.err
    assert "2 frames" in done.out


def test_bad_videos_end_in_one_line(call, trained, toy, tmp_path, gray_video):
    good = next((toy / "UCF-101").rglob("*.avi")).read_bytes()

    def error(name, status=1, **flags):
        flags = {"video_path": tmp_path / name, "checkpoint_model": trained, "output": "out.mp4", **flags}
        done = call(test_on_video, *(part for key, value in flags.items() for part in (f"--{key}", value)))
        assert done.status == status, done
        assert not (tmp_path / "out.mp4").exists()
        return done.one_line_error()

    (tmp_path / "text.avi").write_text("this is not a video")
    (tmp_path / "empty.avi").touch()
    (tmp_path / "half.avi").write_bytes(good[: len(good) // 2])
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
    one = gray_video("one.mp4", count=1)

    # As a user types it: the libraries are loaded in another order, and say nothing of their own either.
    typed = run_script(
        "test_on_video.py", "--video_path", tmp_path / "text.avi", "--checkpoint_model", trained
    )
    assert (typed.status, "decoded" in typed.one_line_error()) == (1, True)
    assert "gone.avi" in error("gone.avi")
    assert "decoded" in error("text.avi")
    assert "empty" in error("empty.avi")
    assert "truncated" in error("half.avi")
    assert "sound.mp4" in error("sound.mp4")
    assert "header.avi" in error("header.avi")
    assert "single frame" in error(one.name)
    video = gray_video().name
    assert ".mp4 or .gif" in error(video, 2, output="x.mov")
    assert "is an input" in error(video, 2, output=tmp_path / video)
    assert "sequence_length" in error(video, 2, sequence_length=0)
    assert "image_dim" in error(video, 2, image_dim=0)
    assert "gone.pth" in error(video, checkpoint_model=tmp_path / "gone.pth")
    assert "text.avi" in error(video, checkpoint_model=tmp_path / "text.avi")
    assert "empty.avi" in error(video, output=tmp_path / "empty.avi" / "x.mp4")


def test_long_labels_fit_into_small_frames():
    assert draw_text("BodyWeightSquats 100 %", font_size(48, 64), (255, 255, 255), 50).shape[1] <= 50
    large = draw_text("BodyWeightSquats 100 %", font_size(2160, 3840), (255, 255, 255), 3000)
    assert 100 < large.shape[0] < 400


def test_several_videos_and_a_broken_one(call, small, trained, tmp_path, gray_video):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    gray_video("one.mp4").rename(folder / "one.mp4")
    gray_video("two.mp4").rename(folder / "deep/one.mp4")
    (folder / "broken.avi").write_text("no video")
    (folder / "notes.txt").write_text("no video either, and not named as one")
    flags = ["--checkpoint_model", trained, *FP32, "--output", tmp_path / "shown"]
    pattern = str(small / "UCF-101" / "*" / "*_g01_c01.avi")
    done = call(test_on_video, *flags, "--smooth", 0.5, "--video_path", folder, pattern)
    assert done.status == 1
    assert "1 of 5 videos" in done.err
    assert "Traceback" not in done.err
    assert sum(line.startswith("not annotated:") for line in done.err.replace("\r", "\n").splitlines()) == 1
    names = {path.name for path in (tmp_path / "shown").glob("*.mp4")}
    assert names == {"one.mp4", "one-2.mp4", "v_WalkLeft_g01_c01.mp4", "v_WalkRight_g01_c01.mp4"}
    for name in names:
        about = json.loads((tmp_path / "shown" / f"{name}.json").read_text())
        assert about["frames"] == Video(tmp_path / "shown" / name).count()
        assert about["segments"][-1]["last_frame"] == about["frames"] - 1
    for wrong, reason in (
        (["--video_path", tmp_path / "nothing*"], "no videos there"),
        (["--video_path", folder, "--output", "x.mp4"], "name a folder"),
    ):
        done = call(test_on_video, *flags[:-2], *wrong)
        assert reason in done.one_line_error()


def test_windows_step_over_the_frames_that_the_model_was_trained_on(tmp_path):
    model = Classifier("MeanPool", 2, encoder="tiny")
    for stride in (1, 4):
        trained = Checkpoint(model, CLASSES, 32, 8, None, 0, {"frame_stride": stride})
        annotator = Annotator(LabelSettings(window_step=3), model, trained, "x.pth")
        assert annotator.layout(Fraction(50)) == labels.ClipLayout(8, 3, round(10 / stride), stride)
        assert Annotator(LabelSettings(), model, trained, "x.pth").layout(Fraction(25)).step == 2
