"""Actions named by the last layer that an encoder was released with, without a checkpoint."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

import export as export_script
import test_on_video
from annotation.pretrained import LastLayer, choose, untrained
from conftest import TINY_ACTIONS
from features.encoder import Encoder
from utils.process import UserError
from video.reader import Video
from video.writer import write_video


class Released(nn.Module):
    def __init__(self, pairs):
        super().__init__()
        self.averages_pairs = pairs
        self.last_layer = nn.Linear(5, 3)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 6])
@torch.no_grad()
def test_padding_does_not_count(pairs, steps):
    head = LastLayer(Released(pairs))
    embeddings = torch.randn(2, steps, 5)
    padded = torch.cat([embeddings[:, :1].expand(2, 3, 5), embeddings], 1)
    padding = torch.arange(steps + 3).expand(2, -1) < 3
    assert torch.allclose(head(padded, padding), head(embeddings), atol=1e-6)
    mean = head.output(embeddings.mean(1))
    assert torch.allclose(head(embeddings), mean, atol=1e-6) != (pairs and steps > 2)


@torch.no_grad()
def test_it_is_the_encoders_own_layer():
    checkpoint = untrained("tiny_video")
    assert checkpoint.classes == TINY_ACTIONS
    assert (checkpoint.img_dim, checkpoint.sequence_length, checkpoint.frame_stride) == (24, 6, 1)
    frames = torch.randint(0, 256, (2, 16, 3, 24, 24), dtype=torch.uint8)
    embeddings = Encoder("tiny_video").embed(frames)
    pairs = (embeddings[:, 1:] + embeddings[:, :-1]) / 2
    expected = Encoder("tiny_video").feature_extractor.last_layer(pairs.mean(1))
    assert torch.allclose(checkpoint.model.eval()(frames), expected, atol=1e-5)


def test_only_names_actions_in_its_order_whatever_their_capitals():
    assert choose(None, TINY_ACTIONS) == [0, 1, 2, 3]
    assert choose(" Pull UPS, bow,,", TINY_ACTIONS) == [3, 0]
    with pytest.raises(UserError, match="--only pull ups: this action stands there twice"):
        choose(" Pull UPS, bow,,pull ups", TINY_ACTIONS)
    with pytest.raises(UserError, match=r"--only pull up: .*near it are pull ups.*--list_actions"):
        choose("bow,pull up", TINY_ACTIONS)
    with pytest.raises(UserError, match="near it are clean and jerk;"):
        choose("jerk", TINY_ACTIONS)
    with pytest.raises(UserError, match="names no action"):
        choose(" ,", TINY_ACTIONS)


@pytest.fixture
def clip(small):
    return small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"


def annotate(call, clip, output, *flags):
    done = call(test_on_video, "--video_path", clip, "--output", output, *flags)
    assert done.status == 0, done.err
    with output.with_name(output.name + ".csv").open(newline="") as file:
        return done, list(csv.DictReader(file))


def test_a_video_is_annotated_without_a_checkpoint(call, clip, tmp_path, monkeypatch):
    monkeypatch.setattr("annotation.settings.DEFAULT_ENCODER", "tiny_video")
    done, rows = annotate(call, clip, tmp_path / "all.mp4")
    assert "no --checkpoint_model: tiny_video names the 4 actions" in done.out
    assert list(rows[0])[3:] == TINY_ACTIONS
    assert sum(float(rows[0][name]) for name in TINY_ACTIONS) == pytest.approx(1, abs=1e-4)
    about = json.loads((tmp_path / "all.mp4.json").read_text())
    assert about["checkpoint"] == "tiny_video, as it was released"
    _, some = annotate(call, clip, tmp_path / "some.mp4", "--only", "push up,bow")
    assert list(some[0])[3:] == ["push up", "bow"]
    for row, all_of_it in zip(some, rows, strict=True):
        assert (row["push up"], row["bow"]) == (all_of_it["push up"], all_of_it["bow"])
        assert row["action"] == max(("push up", "bow"), key=lambda name: float(row[name]))


def test_an_encoder_sees_frames_at_its_own_rate_whatever_the_videos(call, clip, tmp_path):
    """Each frame twice, at twice the rate, shows the same."""
    frames, rate = list(Video(clip).frames()), Video(clip).fps()
    write_video(tmp_path / "once.mp4", iter(frames), rate)
    write_video(tmp_path / "twice.mp4", (frame for frame in frames for _ in range(2)), 2 * rate)
    flags = ("--encoder", "tiny_video", "--label_every", 1, "--sequence_length", 1)
    _, once = annotate(call, tmp_path / "once.mp4", tmp_path / "x.mp4", *flags)
    _, twice = annotate(call, tmp_path / "twice.mp4", tmp_path / "y.mp4", *flags)
    assert len(twice) == 2 * len(once)
    expected = np.array([[float(row[name]) for name in TINY_ACTIONS] for row in once for _ in range(2)])
    given = np.array([[float(row[name]) for name in TINY_ACTIONS] for row in twice])
    # What compression makes of the frames moves them by a twentieth of that.
    assert np.abs(given - expected).mean() < 0.03 * np.ptp(expected, axis=0).mean()


def test_less_than_the_least_probability_is_no_action(call, clip, tmp_path):
    flags = ("--encoder", "tiny_video", "--label_every", 1)
    _, rows = annotate(call, clip, tmp_path / "x.mp4", *flags)
    highest = sorted({max(float(row[name]) for name in TINY_ACTIONS) for row in rows})
    between = (highest[0] + highest[-1]) / 2
    done, cut = annotate(call, clip, tmp_path / "y.mp4", *flags, "--min_probability", between)
    for row, other in zip(cut, rows, strict=True):
        best = max(float(row[name]) for name in TINY_ACTIONS)
        assert row["action"] == (other["action"] if best >= between else "no action")
    assert {"no action"} < {row["action"] for row in cut}
    done, cut = annotate(call, clip, tmp_path / "z.mp4", *flags, "--min_probability", 0.999)
    assert "no action, mean probability" in done.out
    assert {row["action"] for row in cut} == {"no action"}
    assert json.loads((tmp_path / "z.mp4.json").read_text())["action"] == "no action"


def test_actions_are_listed(call, tmp_path):
    done = call(test_on_video, "--list_actions", "--encoder", "tiny_video")
    assert done.out.splitlines() == TINY_ACTIONS
    done = call(test_on_video, "--list_actions")
    assert len(done.out.splitlines()) == 400
    assert done.out.splitlines()[0] == "abseiling"
    for flags in (("--backend", "onnxruntime"), ("--encoder_weights", tmp_path / "none")):
        call(test_on_video, "--list_actions", *flags).one_line_error()


def test_it_is_exported_and_labels_alike(call, clip, tmp_path):
    folder = tmp_path / "exported"
    done = call(export_script, "--encoder", "tiny_video", "--output", folder)
    assert done.status == 0, done.err
    flags = ("--only", "bow,push up")
    _, ours = annotate(
        call, clip, tmp_path / "x.mp4", "--encoder", "tiny_video", "--precision", "fp32", *flags
    )
    backend = ("--backend", "onnxruntime", "--checkpoint_model", folder)
    _, theirs = annotate(call, clip, tmp_path / "y.mp4", *backend, *flags)
    assert len(ours) == len(theirs)
    for row, other in zip(ours[:32], theirs[:32], strict=True):
        assert float(row["bow"]) == pytest.approx(float(other["bow"]), abs=1e-3)
    assert call(test_on_video, "--list_actions", *backend).out.splitlines() == TINY_ACTIONS


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--encoder", "resnet18"), "no last layer of its own"),
        (("--encoder", "i4d"), "unknown encoder 'i4d'"),
        (("--encoder", "i3d", "--checkpoint_model", "x.pth"), "leave out --encoder"),
        (("--backend", "onnxruntime"), "name its folder with --checkpoint_model"),
        (("--only", "fly", "--encoder", "tiny_video"), "--only fly"),
        (("--min_probability", "1.2"), "[0, 1)"),
    ],
)
def test_flags_that_do_not_go_are_refused_in_a_line(call, clip, flags, words):
    assert words in call(test_on_video, "--video_path", clip, *flags).one_line_error()


def test_without_a_video_the_flag_is_asked_for(call):
    assert "--video_path is missing" in call(test_on_video, "--encoder", "tiny_video").one_line_error()
