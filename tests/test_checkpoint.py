import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import export
from conftest import build_tiny
from features.networks import ENCODERS
from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from training.classifier import Classifier

LATENT, HIDDEN, LAYERS, CLASSES = 6, 5, 2, 101


class Original(nn.Module):
    """The original's three generations, written from their definitions, to save and compare with."""

    def __init__(self, layout, resnet):
        super().__init__()
        self.layout = layout
        children = list(resnet.children())[:-1]
        self.encoder = nn.Module()
        self.encoder.feature_extractor = nn.Sequential(*children)
        self.encoder.final = nn.Sequential(nn.Linear(2048, LATENT), nn.BatchNorm1d(LATENT, momentum=0.01))
        self.lstm = nn.Module()
        self.lstm.lstm = nn.LSTM(LATENT, HIDDEN, LAYERS, batch_first=True, bidirectional=layout != "a")
        width = HIDDEN if layout == "a" else 2 * HIDDEN
        head = nn.Sequential(
            nn.Linear(width, HIDDEN),
            nn.BatchNorm1d(HIDDEN, momentum=0.01),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
            nn.Softmax(dim=-1),
        )
        # Weights larger than random ones, so that clips get clearly different probabilities.
        for layer in (head[0], head[3]):
            layer.weight.data *= 10
        if layout == "a":
            self.lstm.final = head
        elif layout == "b":
            self.lstm.output_layers = head
        else:
            self.output_layers = head
        if layout == "c":
            self.attention_layer = nn.Linear(width, 1)

    @torch.no_grad()
    def forward(self, x):
        batch, time = x.shape[:2]
        features = self.encoder.feature_extractor(x.flatten(0, 1)).view(batch * time, -1)
        hidden = self.lstm.lstm(self.encoder.final(features).view(batch, time, -1))[0]
        if self.layout == "a":
            return self.lstm.final(hidden[:, -1])
        if self.layout == "b":
            return self.lstm.output_layers(hidden.reshape(batch * time, -1)).view(batch, time, -1).mean(dim=1)
        if self.layout == "c, no attention":
            return self.output_layers(hidden[:, -1])
        weights = F.softmax(self.attention_layer(hidden).squeeze(-1), dim=-1)
        return self.output_layers(torch.sum(weights.unsqueeze(-1) * hidden, dim=1))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    network = torchvision.models.resnet152()
    for module in network.modules():
        # Random convolutions blow up over 152 layers; so small a scale keeps the numbers tame.
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.1)
    return network


@pytest.mark.parametrize("layout", ["a", "b", "c", "c, no attention"])
def test_checkpoints_of_the_original_give_the_original_probabilities(layout, resnet, tmp_path, monkeypatch):
    # No weights may be asked for: the file holds the encoder.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    original = Original(layout, resnet).eval()
    clips = torch.randn(3, 4, 3, 32, 32)
    with torch.no_grad():
        # Statistics as training leaves them, so that clips differ behind the projection.
        linear, norm = original.encoder.final
        features = linear(original.encoder.feature_extractor(clips.flatten(0, 1)).flatten(1))
        norm.running_mean, norm.running_var = features.mean(0), features.var(0)
    state = original.state_dict()
    if layout == "a":  # as files from before PyTorch 0.4.1
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    checkpoint = load_checkpoint(tmp_path / "old.pth")
    assert checkpoint.classes[0] == "ApplyEyeMakeup"
    # The first layout had the sorted folders for its labels, the others classInd.txt.
    swapped = layout == "a"
    assert checkpoint.classes[34:36] == ["HammerThrow", "Hammering"][:: 1 if swapped else -1]
    assert checkpoint.classes[46:48] == ["JumpRope", "JumpingJack"][:: 1 if swapped else -1]
    assert checkpoint.img_dim == 112
    expected = original(clips)
    actual = checkpoint.model(clips).softmax(dim=-1)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-4, "the test must be able to tell clips apart"


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    model = Classifier("ConvLSTM", 2, encoder="tiny", latent_dim=4, hidden_dim=3, pooling="average").eval()
    path = tmp_path / "ConvLSTM_3.pth"
    save_checkpoint(path, Checkpoint(model, ["Left", "Right"], 32, 8, 2, 3))
    return path, model


def test_a_checkpoint_comes_back_as_it_was(saved):
    path, model = saved
    checkpoint = load_checkpoint(path)
    clips = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(checkpoint.model(clips), model(clips))
    assert checkpoint.classes == ["Left", "Right"]
    assert (checkpoint.img_dim, checkpoint.sequence_length, checkpoint.split_number, checkpoint.epoch) == (
        32,
        8,
        2,
        3,
    )
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_frozen_weights_are_saved_by_name_alone(saved):
    contents = torch.load(saved[0], weights_only=True)
    assert not any("feature_extractor" in name for name in contents["state"])
    assert len(contents["encoder_sha256"]) == 64


def test_an_encoder_that_is_not_in_the_table_travels_with_the_file(saved):
    path, model = saved
    model.encoder.pretrained = False
    state = model.state_dict()
    state["encoder.feature_extractor.mix.weight"] += 1
    model.load_state_dict(state)
    save_checkpoint(path, Checkpoint(model, ["Left", "Right"], 32, 8, None, 3))
    loaded = load_checkpoint(path).model
    clips = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(clips), model(clips))
    assert not loaded.encoder.pretrained


def test_an_exported_checkpoint_needs_no_weights_from_elsewhere(call, saved, tmp_path, monkeypatch):
    path, model = saved
    target = tmp_path / "out/exported.pth"
    done = call(export, "--checkpoint_model", path, "--pth", "--output", target)
    assert done.status == 0, done.err
    assert call(export, "--checkpoint_model", path, "--pth", "--output", target).status == 2, (
        "nothing is overwritten"
    )

    def gone(*, pretrained, state):
        assert not pretrained
        return build_tiny(pretrained=False)

    monkeypatch.setitem(ENCODERS, "tiny", type(ENCODERS["tiny"])(gone, 48))
    clips = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(load_checkpoint(target).model(clips), model(clips))


def test_other_encoder_weights_are_refused(saved, monkeypatch):
    build = ENCODERS["tiny"].build

    def other(*, pretrained, state):
        network = build(pretrained=pretrained)
        network.mix.weight.data += 0.5
        return network

    monkeypatch.setitem(ENCODERS, "tiny", type(ENCODERS["tiny"])(other, 48))
    with pytest.raises(CheckpointError, match="other weights of tiny"):
        load_checkpoint(saved[0])


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def bad_files(folder, good):
    data = good.read_bytes()
    contents = torch.load(good, weights_only=True)

    def variant(name, **changes):
        torch.save({**contents, **changes}, folder / name)
        return folder / name

    shorter = {name: tensor for name, tensor in contents["state"].items() if ".lstm." not in name}
    (folder / "bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state": Bomb()}, folder / "zipped-bomb.pth")
    (folder / "half.pth").write_bytes(data[: len(data) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not a checkpoint\n" * 20)
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"weight": torch.zeros(3)}, folder / "other-network.pth")
    torch.save({"encoder.final.0.weight": torch.zeros(3, 3)}, folder / "part-of-original.pth")
    return [
        *(folder / name for name in ("bomb.pth", "zipped-bomb.pth", "half.pth", "empty.pth", "text.pth")),
        *(folder / name for name in ("tensor.pth", "other-network.pth", "part-of-original.pth")),
        variant("shapes.pth", config={**contents["config"], "hidden_dim": 4}),
        variant("missing.pth", state=shorter),
        variant("model.pth", model="Sequential"),
        variant("flag.pth", config={**contents["config"], "surprise": 1}),
        variant("names.pth", classes=["one"]),
        variant("none.pth", state=None),
    ]


def test_bad_checkpoints_end_in_one_line_and_run_no_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = bad_files(tmp_path, saved[0])
    assert len(files) == 14
    for path in files:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "bomb-went-off").exists()
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_checkpoint(tmp_path / "gone.pth")
