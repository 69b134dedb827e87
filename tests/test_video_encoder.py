"""Every command with an encoder that sees windows of frames, alone and beside one that sees photographs."""

import csv
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import compare
import export as export_script
import pretrain
import test as test_script
import test_on_video
import train
from annotation.annotate import Annotator
from annotation.labels import ClipLayout
from annotation.live import LiveLabels, Shot
from annotation.onnx_model import OnnxModel
from annotation.pretrained import untrained
from annotation.settings import LabelSettings
from conftest import ucf101_at
from dataset import window_indices
from features import fill
from features.encoder import Encoder
from features.fill import open_cache
from features.pipeline import embed_ahead, read_ahead
from features.streams import Stream, encoder_stream, parse_streams
from features.windows import Windows
from splits.datasets import load_split
from training.checkpoint import load_checkpoint
from training.classifier import Classifier
from utils.process import UserError
from video.frames import SQUEEZE, resize_frames
from video.opencv import cv2
from video.reader import Video

DATA = ("--num_workers", 0, "--precision", "fp32")


def data_flags(path):
    return ["--dataset_path", path / "UCF-101", "--split_path", path / "ucfTrainTestlist", *DATA]


@pytest.fixture(params=["rgb", "rgb,tiny", "rgb,diff,tiny_video"])
def trained(request, call, small, tmp_path):
    """A checkpoint of ConvLSTM, and the flags of its encoders."""
    first = "tiny" if "diff" in request.param else "tiny_video"
    flags = ["--encoder", first, "--streams", request.param]
    done = call(train, *data_flags(small), *flags, "--num_epochs", 2, "--latent_dim", 16)
    assert done.status == 0, done.err
    return tmp_path / "model_checkpoints/ConvLSTM_2.pth", flags


def test_every_command(call, small, trained, tmp_path):
    path, flags = trained
    checkpoint = load_checkpoint(path)
    names = [encoder.name for encoder in checkpoint.model.encoders()]
    assert names == {"tiny_video": ["tiny_video"], "tiny": ["tiny", "tiny_video"]}.get(
        names[0] if len(checkpoint.model.streams) != 2 else "", ["tiny_video", "tiny"]
    )
    video_first = names[0] == "tiny_video"
    assert (checkpoint.sequence_length, checkpoint.window_step) == (6, 1), "of the longest hop"
    assert checkpoint.img_dim == (24 if video_first else 224)
    caches = {folder.name.rsplit("-", 1)[0] for folder in (small / "UCF-101-embeddings").iterdir()}
    assert "tiny_video-24px-float32" in caches
    assert not any("flip" in name for name in caches), "mirrored only where the pace is a photograph's"
    tested = call(test_script, *data_flags(small), "--checkpoint_model", path)
    assert tested.status == 0, tested.err
    uncached = call(test_script, *data_flags(small), "--checkpoint_model", path, "--cache", "off")
    assert uncached.status == 0, uncached.err
    losses = [float(done.out.split("loss ")[1].split()[0]) for done in (tested, uncached)]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    filled = call(fill, *data_flags(small), *flags)
    assert filled.status == 0, filled.err
    assert "encoding" not in filled.out, "all of it is there"
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    exported = call(export_script, "--checkpoint_model", path, "--output", tmp_path / "exported")
    assert exported.status == 0, exported.err
    rows = []
    for model in (
        ["--checkpoint_model", path],
        ["--checkpoint_model", "exported", "--backend", "onnxruntime"],
    ):
        done = call(test_on_video, "--video_path", clip, *model, "--precision", "fp32", "--output", "x.mp4")
        assert done.status == 0, done.err
        table = list(csv.reader((tmp_path / "x.mp4.csv").open()))[1:]
        assert len(table) == Video(clip).count()
        rows.append(np.array([[float(value) for value in row[3:]] for row in table]))
    # The last window has another length there, where the encoder's may differ.
    assert np.abs(rows[0] - rows[1]).mean() < 0.02


def test_epochs_and_pretraining_and_comparisons(call, small, tmp_path):
    flags = [*data_flags(small), "--encoder", "tiny_video", "--latent_dim", 16]
    done = call(pretrain, *flags, "--num_epochs", 1, "--model", "ActionBERT", "--streams", "rgb,tiny")
    assert done.status == 0, done.err
    one = call(train, *flags, "--num_epochs", 2, "--cache", "off", "--batch_size", 3, "--no_flip")
    other = call(train, *flags, "--num_epochs", 2, "--batch_size", 3)
    assert one.status == other.status == 0, one.err
    losses = [
        [float(line.split("loss ")[1].split()[0]) for line in run.out.splitlines() if "train loss" in line]
        for run in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    resumed = call(train, "--resume")
    assert resumed.status == 0, resumed.err
    flags = [*data_flags(small), "--split_number", 1, "--encoders", "tiny_video", "--num_epochs", 1]
    compared = call(compare, *flags, "--models", "MeanPool", "--seeds", 1)
    assert compared.status == 1
    assert "tiny_video" in compared.err, "a command of its own does not know the test's encoder"


def test_cached_rows_are_the_embeddings_of_the_windows(small, tmp_path):
    """Clips of all lengths: shorter than a window, several windows, a last one that reaches back."""
    split = load_split(ucf101_at(small), 1)
    clips, encoder = split.train + split.test, Encoder("tiny_video")
    view = encoder_stream(encoder, "rgb", 24)
    for stride in (1, 3, 9):
        cache = open_cache(tmp_path, clips, encoder, 24, flip=False, frame_stride=stride)
        kept = cache.view(clips)
        for clip in clips:
            frames = resize_frames(list(clip.video.frames())[::stride], 24, view.resize)
            rows = [
                encoder.embed(frames[window.frames][None])[0, window.skip : window.skip + window.count]
                for window in view.windows.windows(len(frames))
            ]
            expected = torch.cat(rows)
            assert kept.count(clip) == len(expected) == -(-len(frames) // 4)
            found = kept.gather([clip], np.arange(len(expected))[None], np.array([False]))[0]
            assert torch.allclose(found.float(), expected, rtol=2**-10, atol=1e-4)


def test_differences_are_for_photographs_and_flags_exclude_each_other(call, small):
    flags = [*data_flags(small), "--encoder", "tiny_video", "--num_epochs", 1]
    done = call(train, *flags, "--streams", "rgb,diff")
    assert (done.status, "use --streams rgb" in done.one_line_error()) == (1, True)
    done = call(train, *flags, "--flip", "--no_flip")
    assert (done.status, "exclude each other" in done.one_line_error()) == (1, True)
    with pytest.raises(UserError, match="unknown stream 'flow'"):
        parse_streams("rgb,flow")
    with pytest.raises(UserError, match="use --encoder tiny instead"):
        parse_streams("tiny")
    done = call(train, *flags, "--streams", "rgb,tiny_video")
    assert (done.status, "is --encoder already" in done.one_line_error()) == (1, True)


def test_labels_stand_on_the_frames_of_their_embeddings(small, tmp_path):
    """A model that tells which embedding it reads: the table's rows change where its spans do."""
    model = Classifier("MeanPool", 2, encoder="tiny_video").eval()
    checkpoint = type("Trained", (), {"classes": ["a", "b"], "img_dim": 24, "sequence_length": 1,
                                      "frame_stride": 2, "fps": None, "window_step": 1})()  # fmt: skip
    annotator = Annotator(LabelSettings(label_every=1, overlay="minimal"), model, checkpoint, "x.pth")
    assert annotator.layout(Fraction(25)) == ClipLayout(1, 1, 1, 2)
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    annotated = annotator.annotate(Video(clip), tmp_path / "x.mp4")
    rows = annotated.probabilities[:, 0]
    starts = np.flatnonzero(np.abs(np.diff(rows)) > 0) + 1
    assert len(rows) == Video(clip).count()
    assert len(starts) > 3
    assert (starts % 8 == 0).all(), "four frames of every second one"
    json.loads((tmp_path / "x.mp4.json").read_text())


def test_live_labels_are_made_beside_and_lag_behind(small):
    model = Classifier("ConvLSTM", 2, encoder="tiny_video", hidden_dim=8, sequence_length=3).eval()
    streams = model.open_streams(24)
    frames = list(Video(small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi").frames())[:33]
    labels = LiveLabels(model, streams, ClipLayout(3, 1, 1))
    assert labels.memory == 8
    bgr = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in frames]
    for number in range(0, 33, 4):
        recent = tuple(bgr[max(0, number - 7) : number + 1])
        shot = Shot(number, number / 25, frames[number], recent)
        labels.label(shot)
        labels._beside.submit(lambda: None).result()
        said = labels.label(shot)
    labels.close()
    assert list(labels._numbers) == [24, 28, 32]
    with torch.no_grad():
        small_frames = resize_frames(frames, 24, streams[0].resize)
        # Each from the newest window of 8 frames: its second half is what the window before had not.
        each = [streams[0].embed(small_frames[end - 7 : end + 1][None])[0, 1] for end in (24, 28, 32)]
        expected = model.classify(torch.stack(each)[None]).softmax(dim=-1)[0]
    assert torch.allclose(said, expected, atol=1e-5)
    assert window_indices(9, 3, step=1, start=8).tolist() == [[6, 7, 8]]


def stub(hop, live_frames):
    """A stream whose embeddings are the mean numbers of each hop's frames."""

    def embed(windows):
        own = windows[:, :, 0, 0, 0].float()
        return own.unflatten(1, (-1, hop)).mean(dim=2)[..., None]

    layout = Windows(max(hop, live_frames), hop, max(hop, live_frames))
    return Stream(
        layout, SQUEEZE, 1, name="rgb", width=1, live_frames=live_frames, embed=embed,
        device=torch.device("cpu"), batch_size=8,
    )  # fmt: skip


@pytest.mark.parametrize(("hop", "frames"), [(1, 1), (2, 8), (4, 16)])
def test_live_streams_of_other_hops_stand_beside_each_other(hop, frames):
    labels = LiveLabels(None, [stub(8, 16), stub(hop, frames)], ClipLayout(9))
    for number in (0, 23, 47):
        shown = [np.full((4, 4, 3), max(0, number - back), np.uint8) for back in reversed(range(16))]
        labels._encode(Shot(number, 0.0, shown[-1], tuple(shown)))
    # Two new ones each time, but for the first.
    assert list(labels._numbers) == [0, 15, 23, 39, 47]
    for number, pair in zip(labels._numbers, torch.stack(list(labels._embeddings)).tolist(), strict=True):
        if number:
            # In the middle of the hop, or as near as the window of the frame that came reaches.
            came = 23 if number <= 23 else 47
            row = min((came - number + 4) // hop, frames // hop - 1)
            assert pair == [number - 3.5, came - row * hop - (hop - 1) / 2]


def test_short_batches_are_not_filled_up_where_windows_differ_in_length(small):
    """Or an accelerator would encode several times as many."""
    seen = []
    encoder = Encoder("tiny_video")
    stream = encoder_stream(encoder, "rgb", 24)
    embed = stream.embed
    stream = replace(stream, embed=lambda windows: seen.append(len(windows)) or embed(windows), batch_size=8)
    videos = [Video(path) for path in sorted((small / "UCF-101").glob("*/*.avi"))]
    rows = [item for _, item in embed_ahead(stream, read_ahead(videos, stream, 1, 1), flip=False)]
    windows = sum(len(stream.windows.windows(video.count())) for video in videos)
    assert sum(seen) == windows
    kept = sum(len(item) for item in rows if item is not None)
    assert kept == sum(stream.windows.count(video.count()) for video in videos)


def test_an_exported_encoder_of_videos_has_windows_of_one_length(call, small, tmp_path):
    done = call(train, *data_flags(small), "--encoder", "tiny_video", "--num_epochs", 1, "--latent_dim", 8)
    assert done.status == 0, done.err
    path = tmp_path / "model_checkpoints/ConvLSTM_1.pth"
    assert call(export_script, "--checkpoint_model", path, "--output", "exported").status == 0
    (stream,) = OnnxModel(tmp_path / "exported").open_streams()
    assert (stream.windows.frames, stream.windows.least, stream.windows.hop) == (16, 16, 4)
    windows = torch.randint(0, 256, (3, 16, 3, 24, 24), dtype=torch.uint8)
    expected = load_checkpoint(path).model.encoder.embed(windows)
    assert torch.allclose(stream.embed(windows), expected, atol=1e-3)


def test_live_an_embedding_holds_as_it_is_in_the_middle_of_a_window():
    """At the end of a window it lacks what follows."""
    model = untrained("tiny_video").model
    streams = [replace(stream, live_frames=16) for stream in model.open_streams(24)]
    labels = LiveLabels(model, streams, ClipLayout(6, 1, 1))
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(40)]
    embedded = {}
    for number in range(15, 40, 4):
        recent = tuple(images[number - 15 : number + 1])
        frames = [image[..., ::-1] for image in recent]
        embedded[number] = streams[0].embed(resize_frames(frames, 24, streams[0].resize)[None])[0]
        labels._encode(Shot(number, 0.0, frames[-1], recent))
    held = dict(zip(labels._numbers, labels._embeddings, strict=True))
    assert list(held) == list(range(19, 40, 4))
    for number in range(19, 36, 4):
        assert torch.equal(held[number], embedded[number + 4][-2]), "with four frames behind it"
    assert torch.equal(held[39], embedded[39][-1])
