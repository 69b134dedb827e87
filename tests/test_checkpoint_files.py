import json

import pytest
import torch
from torch import nn

import export
from conftest import build_tiny
from features.networks import ENCODERS, EncoderSpec
from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from training.classifier import Classifier

FRAMES = torch.randint(
    0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def small_model(**sizes):
    torch.manual_seed(1)
    return Classifier("ConvLSTM", 2, encoder="tiny", latent_dim=4, hidden_dim=3, **sizes).eval()


def test_flags_and_the_state_of_training_come_back(tmp_path):
    path = tmp_path / "x.pth"
    settings = {"frame_stride": 3, "learning_rate": 0.5, "cache": "off"}
    training = {"step": 7, "average": torch.arange(3.0)}
    save_checkpoint(path, Checkpoint(small_model(), ["a", "b"], 32, 8, "random", 3, settings, training))
    found = load_checkpoint(path)
    assert found.settings == settings
    assert found.frame_stride == 3
    assert found.split_number == "random"
    assert found.training["step"] == 7
    assert torch.equal(found.training["average"], torch.arange(3.0))
    assert not found.model.training


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, Checkpoint(small_model(), ["a", "b"], 32, 8, 1, 3))
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "format": "action-recognition 1"}, path)
    with pytest.raises(CheckpointError, match=r"x\.pth: of another version .*'action-recognition 1'.* anew"):
        load_checkpoint(path)
    del contents["settings"]
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=r"x\.pth: .* do not fit together: 'settings'"):
        load_checkpoint(path)


def original(num_classes=101, layers=2, bidirectional=True):
    """What the original repository saved last, with the tiny encoder in ResNet's place."""
    made = Classifier(
        "ConvLSTM", num_classes, encoder="tiny", latent_dim=4, hidden_dim=3, lstm_layers=layers,
        bidirectional=bidirectional,
    )  # fmt: skip
    nn.init.normal_(made.heads["rgb"].output_layers[3].weight)
    names = {"heads.rgb.projection.": "encoder.final.", "heads.rgb.lstm.": "lstm.lstm.", "heads.rgb.": ""}
    state = {}
    for name, tensor in made.state_dict().items():
        old = next((one for one in names if name.startswith(one)), "")
        state[names.get(old, "") + name.removeprefix(old)] = tensor
    return made.eval(), state


@pytest.fixture
def tiny_resnet(monkeypatch):
    monkeypatch.setitem(ENCODERS, "resnet152", EncoderSpec(build_tiny, 48))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_sizes_of_an_original_checkpoint_are_read_from_its_tensors(
    tiny_resnet, tmp_path, layers, bidirectional
):
    made, state = original(layers=layers, bidirectional=bidirectional)
    torch.save(state, tmp_path / "old.pth")
    found = load_checkpoint(tmp_path / "old.pth")
    assert torch.equal(found.model(FRAMES), made(FRAMES))
    # As the original's test_on_video.py reads a video.
    assert (found.img_dim, found.sequence_length, found.frame_stride) == (112, 40, 1)
    assert (found.split_number, found.epoch, found.training) == (None, 0, None)
    assert not found.model.training


def test_an_original_checkpoint_of_other_classes_needs_their_names(tiny_resnet, tmp_path):
    torch.save(original(num_classes=7)[1], tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"old.pth: 7 classes, and ucf101_classes.txt names 101"):
        load_checkpoint(tmp_path / "old.pth")


def test_an_exported_folder_is_told_apart_from_a_checkpoint(tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/model.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="--backend onnxruntime"):
        load_checkpoint(tmp_path / "exported")
    (tmp_path / "exported/model.json").unlink()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "exported")


def test_export_holds_the_encoder_and_leaves_out_what_only_training_needs(call, tmp_path):
    source, target = tmp_path / "x.pth", tmp_path / "out" / "whole.pth"
    model = small_model()
    save_checkpoint(source, Checkpoint(model, ["a", "b"], 32, 8, 2, 3, {"seed": 1}, {"step": 7}))
    done = call(export, "--checkpoint_model", source, "--pth", "--output", target)
    assert done.status == 0, done.err
    assert f"wrote {target}: {target.stat().st_size / 1e6:,.1f} MB, with tiny" in done.out
    found = load_checkpoint(target)
    assert found.training is None
    assert (found.settings, found.epoch, found.split_number) == ({"seed": 1}, 3, 2)
    kept = torch.load(target, weights_only=True)["state"]
    frozen = {f"encoder.feature_extractor.{name}" for name in build_tiny(pretrained=False).state_dict()}
    assert frozen <= set(kept)
    assert not frozen & set(torch.load(source, weights_only=True)["state"])


def test_of_a_mismatch_only_the_beginning_is_told(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, Checkpoint(small_model(), ["a", "b"], 32, 8, 2, 3))
    contents = torch.load(path, weights_only=True)
    contents["state"] = {f"{name}.of.another.network": one for name, one in contents["state"].items()}
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match="do not fit together") as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize("contents", [{"weight": torch.zeros(3)}, torch.zeros(3), [1, 2], "x"])
def test_what_is_no_checkpoint_of_either_kind(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: not a checkpoint of this project nor of the original"):
        load_checkpoint(tmp_path / "x.pth")
