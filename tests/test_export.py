"""export.py and --backend onnxruntime: the same numbers as PyTorch's."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import export as export_script
import test_on_video
from annotation.onnx_model import OnnxError, OnnxModel, export
from conftest import TINY_ACTIONS, save_untrained, untrained_checkpoint
from models import MODELS


@pytest.mark.parametrize(
    ("name", "encoder"), [*((name, "tiny") for name in MODELS), ("ConvLSTM", "tiny_video")]
)
@torch.no_grad()
def test_numbers_are_pytorchs_for_any_number_of_clips_and_frames(name, encoder, tmp_path):
    checkpoint = untrained_checkpoint(encoder, name)
    export(checkpoint, tmp_path / "exported")
    exported, layout = OnnxModel(tmp_path / "exported"), checkpoint.encoder.windows
    assert exported.classes == checkpoint.classes
    # A window of the export has one length.
    assert exported.encoder.windows.least == layout.frames
    for count in (1, 33):
        shape = (count, layout.frames, 3, exported.encoder.img_dim, exported.encoder.img_dim)
        windows = torch.randint(0, 256, shape, dtype=torch.uint8)
        expected = checkpoint.encoder.embed(windows)
        assert torch.allclose(exported.encoder.embed(windows), expected, atol=1e-3)
    for clips, length in ((1, 8), (5, 8), (2, 13)):
        embeddings = torch.randn(clips, length, checkpoint.encoder.width)
        padding = torch.zeros(clips, length, dtype=torch.bool)
        padding[0, :3] = True
        for mask in (padding, None):
            expected = checkpoint.head.classify(embeddings, mask)
            assert torch.allclose(exported.head.classify(embeddings, mask), expected, atol=1e-3)


@pytest.mark.parametrize("released", [False, True])
def test_videos_are_labeled_alike(call, toy, tmp_path, released):
    clip = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    model = ["--encoder", "tiny_video"]
    if not released:
        model = ["--checkpoint_model", save_untrained(tmp_path / "model.pth")]
    done = call(export_script, *model, "--output", tmp_path / "exported")
    assert done.status == 0, done.err
    exported, tables = ["--checkpoint_model", tmp_path / "exported", "--backend", "onnxruntime"], []
    for flags in ([*model, "--precision", "fp32"], exported):
        done = call(test_on_video, "--video_path", clip, "--output", "x.mp4", "--all_probabilities", *flags)
        assert done.status == 0, done.err
        rows = (tmp_path / "x.mp4.csv").read_text().splitlines()[1:]
        tables.append(np.array([row.split(",")[3:] for row in rows], float))
    # The last window of a video has another length there.
    assert np.allclose(*tables, atol=0.02 if released else 2e-3)
    if released:
        assert call(test_on_video, "--list_actions", *exported).out.splitlines() == TINY_ACTIONS


def test_wrong_folders_and_flags_end_in_one_line(call, gray_video, tmp_path, monkeypatch):
    checkpoint, exported = save_untrained(tmp_path / "model.pth"), tmp_path / "exported/model"
    assert call(export_script, "--checkpoint_model", checkpoint).status == 0
    assert [path.name for path in exported.parent.iterdir()] == ["model"], "nothing is left beside"
    again = call(export_script, "--checkpoint_model", checkpoint)
    assert (again.status, "is there already" in again.err) == (2, True)
    video = ["--video_path", gray_video(), "--output", tmp_path / "out.mp4", "--checkpoint_model"]
    onnx = ["--backend", "onnxruntime"]
    for flags, reason in (
        ([exported], "--backend onnxruntime"),
        ([checkpoint, *onnx], "no exported model"),
        ([exported, *onnx, "--img_dim", 48], "exported for frames of 32 pixels"),
        ([exported, *onnx, "--precision", "bf16"], "fp32"),
        ([exported, *onnx, "--store", "x"], "leave it out with --backend onnxruntime"),
    ):
        done = call(test_on_video, *video, *flags)
        assert done.status in (1, 2)
        assert reason in done.one_line_error()
    other = json.dumps({**json.loads((exported / "model.json").read_text()), "format": "another"})
    for name, contents in (("head.onnx", b"not a model"), ("model.json", other.encode())):
        shutil.copytree(exported, tmp_path / f"spoiled-{name}")
        (tmp_path / f"spoiled-{name}" / name).write_bytes(contents)
        done = call(test_on_video, *video, tmp_path / f"spoiled-{name}", *onnx)
        assert "export it again" in done.one_line_error()
    for package, use in (
        ("onnxruntime", lambda: OnnxModel(exported)),
        ("onnxscript", lambda: export(untrained_checkpoint(), tmp_path / "new")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(OnnxError, match="requirements-onnx"):
            use()
