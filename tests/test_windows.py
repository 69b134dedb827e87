import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.streams import Joiner, Stream
from features.windows import (
    CHANGES,
    PHOTOGRAPHS,
    Cut,
    WindowReader,
    Windows,
    joint_hop,
    joint_indices,
)
from video.frames import SQUEEZE


@st.composite
def layouts(draw):
    hop = draw(st.integers(1, 4))
    least = hop * draw(st.integers(1, 3))
    return Windows(least + hop * draw(st.integers(0, 4)), hop, least, draw(st.integers(0, 2)))


def numbered(count):
    """Frames (count, 1, 1, 3) whose pixels are their numbers."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)


@given(layout=layouts(), count=st.integers(1, 60))
def test_windows_follow_each_other_and_the_last_ends_with_the_video(layout, count):
    windows = layout.windows(count)
    assert sum(window.count for window in windows) == layout.count(count) == -(-count // layout.hop)
    start = 0
    for number, window in enumerate(windows):
        own, last = window.frames[layout.context :], number == len(windows) - 1
        assert layout.least <= len(own) <= layout.frames
        assert len(own) % layout.hop == 0
        assert (np.diff(own) == 1).all() or (last and own[-1] == count - 1)
        # What is seen before its own frames: the first frame stands in for those before the video.
        assert (
            window.frames.tolist()
            == np.maximum(np.arange(own[0] - layout.context, own[0] + len(own)), 0)
            .clip(max=count - 1)
            .tolist()
        )
        first = int(own[0]) + window.skip * layout.hop
        assert start - layout.hop < first <= start, "the embedding that is kept first is of its frames"
        start += window.count * layout.hop
    assert windows[-1].frames[-1] == count - 1
    if count >= layout.least and len(windows) > 1:
        assert len(set(windows[-1].frames[layout.context :])) == len(windows[-1].frames) - layout.context
    with pytest.raises(ValueError, match="positive"):
        layout.windows(0)


@given(layout=layouts(), cuts=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_frames_that_come_in_pieces_make_the_same_windows(layout, cuts):
    frames, reader = numbered(sum(cuts)), WindowReader(layout)
    pieces = [cut for some in np.split(frames, np.cumsum(cuts)[:-1]) for cut in reader.read(some)]
    pieces += reader.end()
    found = [(window[:, 0, 0, 0].tolist(), cut.skip, cut.count) for cut in pieces for window in cut.windows]
    expected = layout.windows(sum(cuts))
    assert found == [(window.frames.tolist(), window.skip, window.count) for window in expected]
    most = layout.frames + layout.least + layout.context + max(cuts)
    assert len(reader._held) <= most, "no more is held than the next window needs"


@given(layout=layouts(), count=st.integers(1, 60), data=st.data())
def test_the_windows_that_hold_some_embeddings(layout, count, data):
    total = layout.count(count)
    indices = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=9)))
    windows, places = layout.holding(count, indices)
    # Each embedding of a window by that window and its place there.
    given_all = [
        (tuple(window.frames), place)
        for window in windows
        for place in range((len(window.frames) - layout.context) // layout.hop)
    ]
    kept = [
        (tuple(window.frames), place)
        for window in layout.windows(count)
        for place in range(window.skip, window.skip + window.count)
    ]
    assert [given_all[place] for place in places] == [kept[index] for index in indices]


def test_of_another_stream_the_embedding_in_the_middle_of_the_longest_hop_stands_beside():
    videos = Windows(16, 8, 16)
    assert joint_hop([PHOTOGRAPHS, videos, CHANGES]) == 8
    assert joint_hop([PHOTOGRAPHS, CHANGES]) == 1
    chosen = np.array([0, 1, 2])
    of_photographs, of_videos = joint_indices([PHOTOGRAPHS, videos], [18, 3], chosen)
    assert of_videos.tolist() == [0, 1, 2]
    assert of_photographs.tolist() == [4, 12, 17], "the last one, where the video ends before"
    alone = joint_indices([PHOTOGRAPHS, CHANGES], [18, 18], chosen)
    assert [indices.tolist() for indices in alone] == [[0, 1, 2]] * 2


def mean_frame(layout):
    """A stream whose embeddings are the mean number of each hop's frames."""

    def embed(windows):
        own = windows[:, layout.context :, 0, 0, 0].float()
        return own.unflatten(1, (-1, layout.hop)).mean(dim=2)[..., None]

    return Stream(layout, SQUEEZE, 1, "rgb", 1, 1, embed, torch.device("cpu"), 8)


@given(
    several=st.lists(layouts(), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_streams_are_joined_alike_however_frames_come(several, cuts):
    streams, frames = [mean_frame(layout) for layout in several], numbered(sum(cuts))
    expected = Joiner(streams).add(
        [[*reader.read(frames), *reader.end()] for reader in map(WindowReader, several)], ended=True
    )
    assert expected.shape == (-(-sum(cuts) // joint_hop(several)), len(several))
    readers, joiner, found = [WindowReader(layout) for layout in several], Joiner(streams), []
    for some in np.split(frames, np.cumsum(cuts)[:-1]):
        found.append(joiner.add([reader.read(some) for reader in readers]))
    found.append(joiner.add([reader.end() for reader in readers], ended=True))
    assert torch.equal(torch.cat(found), expected)


def test_a_cut_is_given_to_an_encoder_with_its_channels_in_front():
    windows = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    tensor = Cut(windows, 0, 1).tensor()
    assert tensor.shape == (2, 3, 3, 4, 5)
    assert tensor[1, 2, 1, 3, 4] == windows[1, 2, 3, 4, 1]
