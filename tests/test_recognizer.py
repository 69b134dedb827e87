"""Videos in, labels out: models with and without a checkpoint, how frames are read, and stores."""

import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_labels import defined_labels
from test_shots import scene
from torch import nn

from annotation.labels import ClipLayout
from annotation.overlay import NONE
from annotation.recognizer import LastLayer, Recognizer
from annotation.settings import LabelSettings
from conftest import CLASSES, TINY_ACTIONS, gray_frames, save_untrained, untrained_checkpoint
from features.embed import embed_video
from features.encoder import Encoder
from utils.process import UserError
from video.reader import Video
from video.writer import write_video


@pytest.fixture
def clip(toy):
    return toy / "UCF-101/WalkLeft/v_WalkLeft_g05_c01.avi"


@pytest.fixture
def encoded(monkeypatch):
    """How many windows each call of an encoder has."""
    counts, embed = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda *args: counts.append(len(args[1])) or embed(*args))
    return counts


def film(path, *lengths):
    """A video of shots with colors of their own."""
    frames = (frame for seed, count in enumerate(lengths) for frame in scene(seed, count))
    write_video(path, frames, Fraction(25))
    return path


@pytest.mark.parametrize("model", ["checkpoint", "released"])
def test_three_lines_name_the_actions_of_a_video(clip, tmp_path, model):
    trained, classes = model == "checkpoint", CLASSES if model == "checkpoint" else TINY_ACTIONS
    path = save_untrained(tmp_path / "x.pth")
    recognizer = Recognizer.load(path) if trained else Recognizer.pretrained("tiny_video")
    shown = recognizer(clip)
    assert recognizer.classes == shown.classes == classes
    assert {segment.action for segment in shown.segments} <= set(classes)
    assert (shown.segments[0].start, shown.segments[-1].end) == (0, pytest.approx(Video(clip).count() / 25))
    assert shown.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 6])
@torch.no_grad()
def test_a_released_layer_names_the_mean_of_the_embeddings_that_are_no_padding(pairs, steps):
    network = nn.Module()
    network.averages_pairs, network.last_layer = pairs, nn.Linear(5, 3)
    head, embeddings = LastLayer(network), torch.randn(2, steps, 5)
    means = (embeddings[:, 1:] + embeddings[:, :-1]) / 2 if pairs and steps > 1 else embeddings
    expected = network.last_layer(means.mean(1))
    assert torch.allclose(head(embeddings), expected, atol=1e-6)
    padded = torch.cat([embeddings[:, :1].expand(2, 3, 5), embeddings], 1)
    assert torch.allclose(head(padded, torch.arange(steps + 3).expand(2, -1) < 3), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "settings", "layout"),
    [
        # An image encoder's clips hold every second frame, and only those are encoded where that is the same.
        ("tiny", {"label_every": 1}, ClipLayout(8, 2, 1)),
        ("tiny", {"label_every": 4, "sequence_length": 7}, ClipLayout(7, 2, 4)),
        ("tiny_video", {"label_every": 1, "sequence_length": 3}, ClipLayout(3, 2, 1)),
        ("tiny_video", {"label_every": 12, "sequence_length": 3}, ClipLayout(3, 2, 3)),
    ],
)
@pytest.mark.parametrize("shots", [(61,), (41, 33), (5,)])
def test_labels_are_those_of_the_definition_and_begin_anew_at_cuts(
    tmp_path, encoded, encoder, settings, layout, shots
):
    model, video = untrained_checkpoint(encoder), Video(film(tmp_path / "x.mp4", *shots))
    layout = replace(layout, step=model.encoder.window_step)
    embedded = embed_video(video, model.encoder, cuts=True)
    assert embedded.begins == [0, *shots[:-1]]
    encoded.clear()
    shown = Recognizer(model, LabelSettings(**settings))(video)
    assert np.allclose(shown.probabilities, defined_labels(model.head.classify, embedded, layout), atol=2e-3)
    if encoder == "tiny" and len(shown.labels) > 5:
        half = layout.every == 4
        assert sum(encoded) == sum((shot + half) // (1 + half) for shot in shots)
    whole = Recognizer(model, LabelSettings(**settings, no_cuts=True))(video)
    assert np.allclose(whole.probabilities, shown.probabilities, atol=1e-6) == (len(shots) == 1)


def test_frames_are_read_at_the_rate_that_a_network_wants_and_a_head_was_trained_at(clip, tmp_path):
    """Each frame twice, at twice the rate, shows the same; a head reads every N-th frame of any video."""
    frames = list(Video(clip).frames())
    write_video(tmp_path / "once.mp4", frames, Fraction(25))
    write_video(tmp_path / "twice.mp4", [frame for frame in frames for _ in range(2)], Fraction(50))
    recognizer = Recognizer.pretrained("tiny_video", label_every=4, sequence_length=1)
    once, twice = (recognizer(tmp_path / name).probabilities for name in ("once.mp4", "twice.mp4"))
    assert np.abs(np.repeat(once, 2, axis=0) - twice).mean() < 0.03 * np.ptp(once, axis=0).mean()
    for stride in (1, 4):
        trained = Recognizer(replace(untrained_checkpoint(), frame_stride=stride))
        assert trained.stride(Fraction(50)) == stride
        assert trained.layout(Fraction(50)) == ClipLayout(8, 2, round(10 / stride))


def test_settings_act_on_the_probabilities_of_the_video(clip):
    def shown(**settings):
        return Recognizer.pretrained("tiny_video", label_every=1, **settings)(clip)

    plain = shown()
    most = plain.probabilities.max(1)
    middle = float(np.median(most))
    assert set(most < middle) == {True, False}
    gated = shown(min_probability=middle)
    assert (gated.labels == np.where(most < middle, NONE, plain.labels)).all()
    some = shown(only=" Push UP, bow,,")
    assert some.classes == ["push up", "bow"]
    assert np.array_equal(some.probabilities, plain.probabilities[:, [2, 0]]), "those among all actions"
    assert (some.labels == some.probabilities.argmax(1)).all()
    calm = shown(min_probability=middle, change_cost=0.05)
    assert len(calm.segments) < len(gated.segments)
    assert np.array_equal(calm.probabilities, gated.probabilities)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("bow,Bow", "--only Bow: this action stands there twice"),
        ("bow,pull up", "near it are pull ups"),
        ("jerk", "near it are clean and jerk;"),
        (" ,", "names no action"),
    ],
)
def test_actions_that_a_model_does_not_know_are_refused(only, words):
    with pytest.raises(UserError, match=words):
        Recognizer.pretrained("tiny_video", only=only)


def test_bf16_labels_as_fp32_does(clip):
    probabilities = []
    for precision in ("fp32", "bf16"):
        model = untrained_checkpoint()
        model.encoder.prepare(precision)
        probabilities.append(Recognizer(model)(clip).probabilities)
    assert np.allclose(*probabilities, atol=0.02)
    assert not np.array_equal(*probabilities)


def test_uneven_times_stay(tmp_path):
    """Frames that come at a fourth of the rate from the tenth on."""
    times = [Fraction(number, 25) if number < 10 else Fraction(number - 7, 25) * 3 for number in range(20)]
    write_video(tmp_path / "x.mp4", gray_frames([90] * 20), Fraction(25), times=[*times, Fraction(2)])
    shown = Recognizer(untrained_checkpoint())(tmp_path / "x.mp4")
    assert shown.times[:20] == pytest.approx([float(time) for time in times], abs=1e-3)
    assert shown.segments[-1].end == pytest.approx(shown.times[-1], abs=1e-3)


def test_a_store_spares_the_encoding_whatever_the_other_flags(clip, tmp_path, encoded):
    store, video = tmp_path / "store", film(tmp_path / "x.mp4", 40, 30)
    first = Recognizer.pretrained("tiny_video")(video, store=store)
    assert encoded
    encoded.clear()
    again = Recognizer.pretrained("tiny_video")(video, store=store)
    assert np.array_equal(again.probabilities, first.probabilities)
    assert np.array_equal(again.times, first.times)
    other = Recognizer.pretrained("tiny_video", only="bow", label_every=1, min_probability=0.9)
    assert set(other(video, store=store).labels.tolist()) == {NONE}
    assert encoded == []
    # One of the same name beside it takes nothing from it.
    (tmp_path / "deep").mkdir()
    for again in (film(tmp_path / "deep/x.mp4", 30), video):
        Recognizer.pretrained("tiny_video")(again, store=store)
        assert bool(encoded) == (again != video)
        encoded.clear()
    # Without cuts windows lie otherwise, and a video that has changed is another one.
    Recognizer.pretrained("tiny_video", no_cuts=True)(video, store=store)
    assert encoded
    for change in (lambda: film(video, 50), lambda: os.utime(video, (1, 1))):
        change()
        encoded.clear()
        Recognizer.pretrained("tiny_video")(video, store=store)
        assert encoded
    with pytest.raises(UserError, match="are of --encoder tiny_video, not tiny; name another --store"):
        Recognizer(untrained_checkpoint())(video, store=store)
