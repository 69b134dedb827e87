import json
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import export
from conftest import build_tiny, embed_frames, untrained_checkpoint
from features import networks
from features.networks import EncoderSpec
from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

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
    # As the original's test_on_video.py reads a video.
    assert (checkpoint.encoder.img_dim, checkpoint.sequence_length, checkpoint.frame_stride) == (112, 40, 1)
    assert (checkpoint.split_number, checkpoint.epoch, checkpoint.training) == (None, 0, None)
    expected = original(clips)
    with torch.no_grad():
        features = checkpoint.encoder.feature_extractor(clips.flatten(0, 1)).unflatten(0, (3, 4))
        actual = checkpoint.head.classify(features).softmax(dim=-1)
    assert torch.allclose(actual, expected, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 1e-4, "the test must be able to tell clips apart"


def test_an_original_checkpoint_of_other_classes_needs_their_names(resnet, tmp_path):
    state = Original("c", resnet).state_dict()
    state["output_layers.3.bias"], state["output_layers.3.weight"] = torch.zeros(7), torch.zeros(7, HIDDEN)
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old.pth: 7 classes, and ucf101_classes.txt names 101"):
        load_checkpoint(tmp_path / "old.pth")


FRAMES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def logits(checkpoint):
    with torch.no_grad():
        return checkpoint.head.classify(embed_frames(checkpoint.encoder, FRAMES).unflatten(0, (2, 3)))


@pytest.fixture
def saved(tmp_path):
    checkpoint = untrained_checkpoint(pooling="average")
    checkpoint.split_number, checkpoint.epoch, checkpoint.settings = 2, 3, {"seed": 1}
    checkpoint.training, checkpoint.head.temperature = {"average": torch.arange(3.0)}, 1.5
    save_checkpoint(tmp_path / "ConvLSTM_3.pth", checkpoint)
    return tmp_path / "ConvLSTM_3.pth", checkpoint


def test_a_checkpoint_comes_back_as_it_was(saved):
    path, checkpoint = saved
    found = load_checkpoint(path)
    assert torch.equal(logits(found), logits(checkpoint))
    for name in ("model", "sizes", "classes", "sequence_length", "split_number", "epoch", "settings", "fps"):
        assert getattr(found, name) == getattr(checkpoint, name), name
    assert (found.encoder.img_dim, found.head.temperature, found.head.training) == (32, 1.5, False)
    assert torch.equal(found.training["average"], torch.arange(3.0))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    contents = torch.load(path, weights_only=True)
    assert contents["encoder_state"] is None, "by name alone"
    assert len(contents["encoder_sha256"]) == 64


def test_an_encoder_with_other_weights_travels_with_the_file(saved):
    path, checkpoint = saved
    state = {name: tensor + 1 for name, tensor in build_tiny(pretrained=True).state_dict().items()}
    checkpoint.encoder = type(checkpoint.encoder)("tiny", state=state, img_dim=32)
    save_checkpoint(path, checkpoint)
    found = load_checkpoint(path)
    assert torch.equal(logits(found), logits(checkpoint))
    assert not found.encoder.pretrained


def other_tiny(monkeypatch, build):
    monkeypatch.setitem(networks.ENCODERS, "tiny", lambda: EncoderSpec(build, 48))


def test_an_exported_checkpoint_needs_no_weights_from_elsewhere(call, saved, tmp_path, monkeypatch):
    path, checkpoint = saved
    flags = ("--checkpoint_model", path, "--pth", "--output", tmp_path / "out/whole.pth")
    done = call(export, *flags)
    assert done.status == 0, done.err
    assert call(export, *flags).status == 2, "nothing is written over"

    def gone(*, pretrained, state=None):
        assert not pretrained
        return build_tiny(pretrained=False)

    other_tiny(monkeypatch, gone)
    found = load_checkpoint(tmp_path / "out/whole.pth")
    assert torch.equal(logits(found), logits(checkpoint))
    assert (found.training, found.settings, found.epoch) == (None, {"seed": 1}, 3)


def test_other_encoder_weights_are_refused(saved, monkeypatch):
    def other(*, pretrained, state=None):
        network = build_tiny(pretrained=pretrained)
        network.mix.weight.data += 0.5
        return network

    other_tiny(monkeypatch, other)
    with pytest.raises(CheckpointError, match="other weights of tiny"):
        load_checkpoint(saved[0])


def test_an_exported_folder_is_told_apart_from_a_checkpoint(tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/model.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="--backend onnxruntime"):
        load_checkpoint(tmp_path / "exported")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def bad_files(folder, good):
    data = good.read_bytes()
    contents = torch.load(good, weights_only=True)

    def variant(name, **changes):
        torch.save({**contents, **changes}, folder / name)
        return folder / name

    shorter = {name: tensor for name, tensor in contents["head"].items() if "lstm." not in name}
    (folder / "bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"head": Bomb()}, folder / "zipped-bomb.pth")
    (folder / "half.pth").write_bytes(data[: len(data) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not a checkpoint\n" * 20)
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"weight": torch.zeros(3)}, folder / "other-network.pth")
    torch.save({"encoder.final.0.weight": torch.zeros(3, 3)}, folder / "part-of-original.pth")
    return [
        *(folder / name for name in ("bomb.pth", "zipped-bomb.pth", "half.pth", "empty.pth", "text.pth")),
        *(folder / name for name in ("tensor.pth", "other-network.pth", "part-of-original.pth")),
        variant("shapes.pth", sizes={**contents["sizes"], "hidden_dim": 4}),
        variant("missing.pth", head=shorter),
        variant("model.pth", model="Sequential"),
        variant("flag.pth", sizes={**contents["sizes"], "surprise": 1}),
        variant("names.pth", classes=["one"]),
        variant("none.pth", head=None),
        variant("old.pth", format="action-recognition 2"),
        variant("temperature.pth", temperature=float("nan")),
    ]


def test_bad_checkpoints_end_in_one_line_and_run_no_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = bad_files(tmp_path, saved[0])
    assert len(files) == 16
    for path in files:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "bomb-went-off").exists()
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_checkpoint(tmp_path / "gone.pth")
