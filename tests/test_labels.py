"""Labels as operations on arrays, each compared with its definition."""

import csv
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annotation.labels import ClipLayout, label_frames
from annotation.overlay import NONE
from annotation.recognizer import Recognition
from dataset import padding_of, window_indices
from features.embed import Embedded


def defined_labels(classify, embedded, layout):
    """Of each frame the probabilities of the clip around the middle embedding of its group, in its shot."""
    unit, rows = embedded.hop * embedded.stride, []
    for _, frames, embeddings in embedded.shots():
        shot = torch.from_numpy(embeddings[0].astype(np.float32))
        clips = window_indices(len(shot), layout.sequence_length, step=layout.step)
        for frame in range(frames):
            group = frame // unit // layout.every
            middle = min(group * layout.every + layout.every // 2, len(shot) - 1)
            clip = clips[middle : middle + 1]
            rows.append(classify(shot[clip], torch.from_numpy(padding_of(clip))).softmax(-1))
    return torch.cat(rows).detach().numpy()


def telling(embeddings, padding):
    """Logits that tell the embeddings of a clip, their order, and which of them are padding."""
    weights = torch.rand(embeddings.shape[1], 3, generator=torch.Generator().manual_seed(0))
    return 3 * torch.sin((embeddings[..., 0] / 20 - padding.float()) @ (1 + weights))


@given(
    shots=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    layout=st.builds(ClipLayout, st.integers(1, 9), st.integers(1, 4), st.integers(1, 9)),
    hop=st.integers(1, 4),
    stride=st.integers(1, 3),
)
def test_a_frame_has_the_label_of_the_clip_around_its_group_in_its_shot(shots, layout, hop, stride):
    count = sum(math.ceil(math.ceil(frames / stride) / hop) for frames in shots)
    begins = [0, *np.cumsum(shots)[:-1].tolist()]
    embedded = Embedded(np.arange(count, dtype=np.float16)[None, :, None], sum(shots), hop, stride, begins)
    labels = label_frames(telling, embedded, layout)
    assert np.allclose(labels, defined_labels(telling, embedded, layout), atol=1e-4)


def recognition(labels, times):
    """Of two actions: the one that is labeled has 0.9, of no action the first one has 0.3."""
    table = {0: (0.9, 0.1), 1: (0.1, 0.9), NONE: (0.3, 0.2)}
    rows = np.array([table[label] for label in labels])
    return Recognition(["Bow", "Run, fast"], rows, np.array(labels), np.array(times), Fraction(25))


def test_segments_and_tables_keep_uneven_times(tmp_path):
    shown = recognition([0, 0, NONE, 1], [0, 0.5, 0.75, 1 / 3 + 1, 2.08])
    files = shown.write_tables(tmp_path / "x.mp4", "clip.avi", "model.pth", all_probabilities=True)
    assert [path.name for path in files] == ["x.mp4.json", "x.mp4.csv", "x.mp4.segments.csv"]
    about = json.loads(files[0].read_text())
    segments = [list(segment.values()) for segment in about.pop("segments")]
    assert segments == [
        ["Bow", 0, 0.75, 0, 1, 0.9],
        ["no action", 0.75, 1.3333, 2, 2, 0.3],
        ["Run, fast", 1.3333, 2.08, 3, 3, 0.9],
    ]
    assert list(about.values()) == ["clip.avi", "model.pth", "Bow", 0.633333, 0, 4, "25"]
    with files[1].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["frame", "second", "action", "Bow", "Run, fast"]
    assert rows[3:] == [
        ["2", "0.75", "no action", "0.300000", "0.200000"],
        ["3", "1.3333", "Run, fast", "0.100000", "0.900000"],
    ]
    with files[2].open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["video", "start", "end", "action"],
            ["clip.avi", "0.0", "0.75", "Bow"],
            ["clip.avi", "1.3333", "2.08", "Run, fast"],
        ]
    shown.write_tables(tmp_path / "x.mp4", "clip.avi", "model.pth")
    with files[1].open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][3:] == ["name1", "probability1", "name2", "probability2"]
    assert rows[4][3:] == ["Run, fast", "0.900000", "Bow", "0.100000"]


def test_the_action_of_a_video_is_the_mean_over_frames_that_show_one():
    shown = recognition([1, 1, 0, NONE, NONE], range(6))
    assert shown.label == 1
    assert shown.summary() == pytest.approx({"Bow": 1.1 / 3, "Run, fast": 1.9 / 3})
    nothing = recognition([NONE, NONE], range(3))
    assert nothing.label == NONE
    assert nothing.summary() == pytest.approx({"no action": 0.7})
