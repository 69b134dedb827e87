"""export.py and --backend onnxruntime: the same numbers as PyTorch's."""

import json
import shutil
import sys

import pytest
import torch

import export as export_script
import test_on_video
from annotation.onnx_model import OnnxError, OnnxModel, export
from models import MODELS
from training.checkpoint import Checkpoint, save_checkpoint
from training.classifier import Classifier
from video.reader import Video


def trained(name, streams=("rgb",)):
    torch.manual_seed(0)
    sizes = {"latent_dim": 16, "sequence_length": 8}
    if name == "ConvLSTM":
        sizes["hidden_dim"] = 16
    model = Classifier(name, 3, encoder="tiny", streams=streams, **sizes).train()
    for _ in range(3):
        model.classify(3 * torch.randn(8, 8, model.width))
    return Checkpoint(model.eval(), ["Left", "Right", "Up"], 32, 8, 1, 1)


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "model.pth", trained("ConvLSTM", ("rgb", "diff")))
    return tmp_path / "model.pth"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_numbers_are_pytorchs_for_any_number_of_clips_and_frames(name, tmp_path):
    checkpoint = trained(name)
    export(checkpoint, tmp_path / "exported")
    model, exported = checkpoint.model, OnnxModel(tmp_path / "exported")
    assert exported.classes == checkpoint.classes
    for count in (1, 33):
        windows = torch.randint(0, 256, (count, 1, 3, 32, 32), dtype=torch.uint8)
        for ours, theirs in zip(exported.open_streams(32), model.open_streams(32), strict=True):
            assert torch.allclose(ours.embed(windows), theirs.embed(windows), atol=1e-3)
    for clips, length in ((1, 8), (5, 8), (2, 13)):
        embeddings, padding = torch.randn(clips, length, 48), torch.zeros(clips, length, dtype=torch.bool)
        padding[0, :3] = True
        for mask in (padding, None):
            expected = model.classify(embeddings, mask)
            assert torch.allclose(exported.classify(embeddings, mask), expected, atol=1e-3)


def test_videos_are_labelled_alike(call, small, checkpoint, tmp_path):
    done = call(export_script, "--checkpoint_model", checkpoint, "--output", tmp_path / "exported")
    assert done.status == 0, done.err
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    said = []
    for flags in (
        ["--checkpoint_model", checkpoint, "--precision", "fp32"],
        ["--checkpoint_model", tmp_path / "exported", "--backend", "onnxruntime"],
    ):
        output = tmp_path / f"{len(said)}.mp4"
        done = call(test_on_video, "--video_path", clip, "--output", output, *flags)
        assert done.status == 0, done.err
        assert Video(output).count() == Video(clip).count()
        said.append(done.out.splitlines()[0])
    assert said[0] == said[1], "action and mean probability"


def test_wrong_folders_and_flags_end_in_one_line(call, gray_video, checkpoint, tmp_path, monkeypatch):
    assert call(export_script, "--checkpoint_model", checkpoint).status == 0
    exported = tmp_path / "exported/model"
    again = call(export_script, "--checkpoint_model", checkpoint)
    assert (again.status, "is there already" in again.err) == (2, True)
    video = ["--video_path", gray_video(), "--output", tmp_path / "out.mp4", "--checkpoint_model"]
    onnx = ["--backend", "onnxruntime"]
    for flags, reason in (
        ([exported], "--backend onnxruntime"),
        ([checkpoint, *onnx], "no exported model"),
        ([exported, *onnx, "--img_dim", 48], "exported for frames of 32 pixels"),
        ([exported, *onnx, "--precision", "bf16"], "fp32"),
    ):
        done = call(test_on_video, *video, *flags)
        assert done.status in (1, 2)
        assert reason in done.one_line_error()
    about = json.loads((exported / "model.json").read_text())
    for name, contents in (
        ("head.onnx", b"not a model"),
        ("model.json", json.dumps({**about, "format": "another"}).encode()),
    ):
        spoiled = tmp_path / f"spoiled-{name}"
        shutil.copytree(exported, spoiled)
        (spoiled / name).write_bytes(contents)
        assert "export it again" in call(test_on_video, *video, spoiled, *onnx).one_line_error()
    for package, use in (("onnxruntime", lambda: OnnxModel(exported)),
                         ("onnxscript", lambda: export(trained("MeanPool"), tmp_path / "new"))):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(OnnxError, match="requirements-onnx"):
                use()
