import csv
import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from annotation import labels as labels_module
from annotation.labels import (
    Batch,
    ClipLayout,
    Labelled,
    Smoother,
    encode_ahead,
    label_frames,
    read_windows,
    thin_out,
)
from annotation.segments import segments, write_tables
from features.streams import Stream, View
from features.windows import CHANGES, PHOTOGRAPHS, WindowReader, Windows
from video.decoder import Frame
from video.frames import SQUEEZE

CLASSES = 3


class Counting:
    """A model whose probabilities tell which embeddings a clip holds, and which of them are padding.

    Args:
        hop: frames to an embedding
        hops: of a window
    """

    width = 1
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, hop=1, hops=1):
        self.hop = hop
        self.streams = [
            Stream(Windows(hops * hop, hop, hop), SQUEEZE, 2, "rgb", 1, hop, self.embed, self.device, 8)
        ]

    def embed(self, windows):
        # A frame's two pixels are its number; an embedding is the number of the hop that it stands for.
        high, low = windows[:, :: self.hop, 0, 0, 0].float(), windows[:, :: self.hop, 0, 0, 1].float()
        return ((256 * high + low) / self.hop).ceil()[..., None]

    def classify(self, embeddings, padding=None):
        weights = torch.rand(embeddings.shape[1], CLASSES, generator=torch.Generator().manual_seed(0))
        return 3 * torch.sin((embeddings[..., 0] / 20 - padding.float()) @ (1 + weights))


def pieces_of(model, cuts, stride=1):
    """Frames of a video as they come in so many at a time, and as `Counting` reads them."""
    reader, first = WindowReader(model.streams[0].windows), 0
    for count in cuts:
        numbers = np.arange(first, first + count)
        images = np.zeros((count, 1, 2, 3), np.uint8)
        images[:, 0] = np.stack([numbers // stride // 256, numbers // stride % 256], 1)[..., None]
        yield Batch([np.array([number]) for number in numbers], [reader.read(images[::stride])])
        first += count
    yield Batch([], [reader.end()], ended=True)


def window_of(frame, count, length, step):
    """The numbers of the frames that label one frame of a video of `count`."""
    if count < length:
        return [max(place - (length - count), 0) for place in range(length)]
    step = min(step, count // length)
    span = step * (length - 1)
    start = min(max(frame - span // 2, 0), count - 1 - span)
    return [start + step * place for place in range(length)]


def labels_of(windows):
    padding = [[one == two for one, two in zip(row, [*row[1:], -1], strict=True)] for row in windows]
    embeddings = torch.tensor(windows, dtype=torch.float32)[..., None]
    return Counting().classify(embeddings, torch.tensor(padding)).softmax(dim=-1)


def check_labels(found, count, length, step, every, unit=1):
    """Each frame has what the clip around the middle embedding of its group says."""
    embeddings = -(-count // unit)
    places = [frame // unit for frame in range(count)]
    middles = [min(place // every * every + every // 2, embeddings - 1) for place in places]
    expected = labels_of([window_of(middle, embeddings, length, step) for middle in middles])
    assert torch.allclose(torch.cat([part.probabilities for part in found]), expected, atol=1e-3)


# How many frames come at once, and how clips lie.
LAYOUTS = {
    "cuts": st.lists(st.integers(1, 40), min_size=1, max_size=6),
    "length": st.integers(1, 9),
    "step": st.integers(1, 5),
    "every": st.integers(1, 9),
    "stride": st.integers(1, 3),
}


def whole_strides(cuts, stride):
    """As they are read: whole strides, but for the last."""
    *before, last = cuts
    return [cut * stride for cut in before] + [last]


@given(hop=st.integers(1, 4), **LAYOUTS)
def test_frames_that_come_in_pieces_get_the_labels_of_the_whole_video(cuts, length, step, every, hop, stride):
    cuts = whole_strides(cuts, stride)
    count, model = sum(cuts), Counting(hop, hops=2)
    layout = ClipLayout(length, step, every, stride)
    found = list(label_frames(model, model.streams, pieces_of(model, cuts, stride), layout))
    assert all(part.frames for part in found)
    assert [frame.item() for part in found for frame in part.frames] == list(range(count))
    check_labels(found, count, length, step, every, hop * stride)


@given(shots=st.integers(1, 3), **LAYOUTS)
def test_only_embeddings_that_clips_hold_are_computed(cuts, length, step, every, stride, shots):
    cuts = whole_strides(cuts, stride)
    count, model, seen = sum(cuts), Counting(), []
    embed = model.streams[0].embed
    model.streams[0] = replace(
        model.streams[0], embed=lambda windows: seen.append(len(windows)) or embed(windows)
    )
    layout = ClipLayout(length, step, every, stride)
    batches = [batch for _ in range(shots) for batch in pieces_of(model, cuts, stride)]
    ahead = encode_ahead(thin_out(batches, model.streams, layout), model.streams)
    found = list(label_frames(model, model.streams, ahead, layout))
    assert [frame.item() for part in found for frame in part.frames] == list(range(count)) * shots
    embeddings = -(-count // stride)
    thin = step if every % step == 0 and embeddings >= step * length else 1
    assert sum(seen) == shots * -(-embeddings // thin)
    probabilities = torch.cat([part.probabilities for part in found]).chunk(shots)
    assert all(torch.equal(own, probabilities[0]) for own in probabilities)
    if thin == 1:
        expected = torch.cat([part.probabilities for part in label_frames(
            model, model.streams, pieces_of(model, cuts, stride), layout)])  # fmt: skip
    else:
        # Of the embeddings that are left, as of a video of these alone.
        left = -(-embeddings // step)
        middles = [
            min(frame // (stride * every) * (every // step) + every // step // 2, left - 1)
            for frame in range(count)
        ]
        clips = [[step * place for place in window_of(middle, left, length, 1)] for middle in middles]
        expected = labels_of(clips)
    assert torch.allclose(probabilities[0], expected, atol=1e-3)


class Rows(TorchFunctionMode):
    """Counts the rows of the largest table of embeddings that is made."""

    most = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.shape[1:] == (1,):
            self.most = max(self.most, len(made))
        return made


@pytest.mark.parametrize("every", [1, 4, 10])
@pytest.mark.parametrize(("length", "step"), [(1, 3), (2, 1), (3, 1), (6, 1), (8, 2), (7, 3), (4, 5)])
@pytest.mark.parametrize("chunk", [1, 16, 19])
def test_a_frame_is_given_out_with_its_window_and_no_more_than_a_window_is_held(length, step, every, chunk):
    span = step * (length - 1)
    given, late, found = 0, [], []
    model = Counting()
    frames = pieces_of(model, itertools.repeat(chunk))

    def pieces():
        for read in range(0, 20 * chunk + 200, chunk):
            # Labelled are all groups of frames that were read whole, with the window of their middle frame.
            whole = range(read // every if read >= step * length else 0)
            ready = sum(every * group + every // 2 - span // 2 + span < read for group in whole)
            if given != every * ready:
                late.append((read, given, every * ready))
            yield next(frames)

    with Rows() as rows:
        for part in label_frames(model, model.streams, pieces(), ClipLayout(length, step, every)):
            given += len(part.frames)
            found.append(part)
    assert not late
    check_labels(found, given, length, step, every)
    # Nothing goes before the first window is whole, nor between two groups of frames.
    window, between = max(span + 1, span // 2 + every - every // 2), chunk * -(-every // chunk)
    assert rows.most <= max(span + step - 1 + chunk, window + between)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0])
def test_what_is_new_gains_weight_by_the_time_constant(seconds):
    frames = list(Drawn([np.empty((0, 0, 3), np.uint8)] * 50).timed_frames())
    switched = Labelled(frames, torch.tensor([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 40))
    (found,) = Smoother(seconds).smooth([switched])
    expected = [0.0] * 10 + [1 - math.exp(-frame / 25 / seconds) for frame in range(1, 41)]
    assert found.probabilities[:, 1].tolist() == pytest.approx(expected, abs=1e-6)


class Drawn:
    """A video of frames that are at hand."""

    def __init__(self, frames):
        self._frames = frames

    def timed_frames(self):
        return (Frame(image, Fraction(number, 25)) for number, image in enumerate(self._frames))


def test_so_many_frames_are_read_at_once_as_fit_into_memory(monkeypatch):
    frames = [np.full((4, 6, 3), number, np.uint8) for number in range(130)]

    def sizes(stride=1):
        views = [View(PHOTOGRAPHS, SQUEEZE, 2), View(CHANGES, SQUEEZE, 2)]
        streams = [Stream(*vars(view).values(), "", 1, 1, None, torch.device("cpu"), 1) for view in views]
        *batches, last = read_windows(Drawn(frames), streams, stride)
        given = [frame.image for batch in batches for frame in batch.frames]
        assert all(one is other for one, other in zip(given, frames, strict=True))
        images, pairs = (
            np.concatenate([cut.windows for batch in batches for cut in batch.cuts[place]])
            for place in (0, 1)
        )
        assert images.shape == (-(-130 // stride), 1, 2, 2, 3)
        assert (images == np.arange(0, 130, stride)[:, None, None, None, None]).all()
        assert (pairs[:, 1:] == images).all()
        assert (pairs[1:, :1] == images[:-1]).all(), "what comes in pieces is seen across them"
        assert (last.frames, last.cuts, last.ended) == ([], [[], []], True)
        return [len(batch.frames) for batch in batches]

    monkeypatch.setattr(labels_module, "READ_FRAMES", 100)
    assert sizes() == [100, 30]
    assert sizes(stride=3) == [99, 31], "whole strides"
    monkeypatch.setattr(labels_module, "READ_BYTES", 50 * 4 * 6 * 3)
    assert sizes() == [50, 50, 30]
    monkeypatch.setattr(labels_module, "READ_BYTES", 10)
    assert sizes() == [1] * 130


def test_tables_are_rounded_where_nobody_looks_any_closer(tmp_path):
    probabilities = np.array([[2 / 3, 1 / 3], [2 / 3, 1 / 3], [1 / 7, 6 / 7], [0, 1]])
    labels = probabilities.argmax(1)
    files = write_tables(
        tmp_path / "x", probabilities, labels, segments(probabilities, labels), ["a", "b"], Fraction(30), {}
    )
    first, second = json.loads(files[0].read_text())["segments"]
    assert first == {
        "action": "a",
        "start_seconds": 0,
        "end_seconds": 0.0667,
        "first_frame": 0,
        "last_frame": 1,
        "mean_probability": 0.666667,
    }
    assert (second["start_seconds"], second["end_seconds"]) == (0.0667, 0.1333)
    assert (second["first_frame"], second["last_frame"]) == (2, 3)
    assert second["mean_probability"] == 0.928571
    with files[1].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["frame", "second", "action", "a", "b"]
    assert rows[2] == ["1", "0.0333", "a", "0.666667", "0.333333"]
