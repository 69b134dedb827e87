import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from features import networks
from features.encoder import Encoder
from features.networks import encoder_spec
from features.weights import WeightsError, read_weights
from features.windows import Windows
from utils.process import MissingFileError, UserError
from video.frames import resize_frames

needed = pytest.mark.skipif(
    not find_spec("transformers"), reason="no transformers; pip install -r requirements-hf.txt"
)
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
# Configuration, and the class of the processor, of each.
KINDS = {
    "VJEPA2": (
        {"crop_size": 48, "frames_per_clip": 6, "mlp_ratio": 2.0, **PREDICTOR},
        "VJEPA2VideoProcessor",
    ),
    "VideoMAE": ({"image_size": 32, "num_frames": 6, "use_mean_pooling": False}, "VideoMAEVideoProcessor"),
    "Timesformer": ({"image_size": 48, "num_frames": 4}, "TimesformerVideoProcessor"),
    "Vivit": ({"image_size": 32, "num_frames": 6}, "VivitVideoProcessor"),
}
NAMES = list(KINDS)


def network_of(name, **changes):
    import transformers

    torch.manual_seed(0)
    sizes = SIZES if name != "VJEPA2" else {key: SIZES[key] for key in SIZES if key != "intermediate_size"}
    config = getattr(transformers, f"{name}Config")(**sizes, **KINDS[name][0], **changes)
    network = getattr(transformers, f"{name}Model")(config).eval().requires_grad_(False)
    for parameter in network.parameters():  # biases and positions are zeros otherwise
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def side_of(name):
    sizes = KINDS[name][0]
    return sizes.get("image_size") or sizes["crop_size"]


def processor_of(name):
    import transformers

    side = side_of(name)
    crop = {"height": side, "width": side}
    size = {"shortest_edge": side + 4}
    return getattr(transformers, KINDS[name][1])(size=size, crop_size=crop)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each network, as it would be downloaded."""
    root = tmp_path_factory.mktemp("hf")
    for name in NAMES if find_spec("transformers") else []:
        network_of(name).save_pretrained(root / name)
        processor_of(name).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of one to be spoiled; its name is its kind."""

    def copied(name):
        return shutil.copytree(folders / name, tmp_path / name)

    return copied


def clip_of(name, count):
    return np.random.default_rng(0).integers(0, 256, (count, 60, 80, 3), dtype=np.uint8)


def steps_of(name, network, pixels):
    """The means over space, of the network called directly; frames one by one are (time, position) or not."""
    tokens = network(pixels.unsqueeze(0)).last_hidden_state
    places = (side_of(name) // 16) ** 2
    if name == "Timesformer":
        return tokens[:, 1:].reshape(1, places, 4, -1).mean(1)
    tokens = tokens[:, 1:] if name == "Vivit" else tokens
    return tokens.reshape(1, 3, places, -1).mean(2)


@needed
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_an_encoder(name, folders):
    """Its embeddings are the tokens of transformers' own network, of frames that its processor normalized."""
    spec = encoder_spec(f"hf/{folders / name}")
    hop = 1 if name == "Timesformer" else 2
    count = KINDS[name][0].get("num_frames") or KINDS[name][0]["frames_per_clip"]
    assert spec.windows == Windows(count, hop, count)
    assert (spec.input_size, spec.fixed_size, spec.live_frames) == (side_of(name), True, count)
    encoder = Encoder(f"hf/{folders / name}")
    assert encoder.pretrained
    frames = resize_frames(clip_of(name, count), spec.input_size, spec.resize)
    processor = processor_of(name)
    kept = processor(frames, return_tensors="pt", do_resize=False, do_center_crop=False)
    expected = steps_of(name, network_of(name), next(iter(kept.values()))[0])
    assert expected.std() > 0.1
    embeddings = encoder.embed(frames[None])
    assert embeddings.shape == (1, count // hop, 24)
    assert torch.allclose(embeddings, expected, atol=1e-5)
    encoder.prepare("bf16")
    assert F.cosine_similarity(encoder.embed(frames[None]), embeddings, dim=-1).min() > 0.99
    with pytest.raises(UserError, match=f"--img_dim {side_of(name)}"):
        Encoder(f"hf/{folders / name}", img_dim=16)


@needed
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_resized_as_its_processor_does(name, folders):
    spec, video = encoder_spec(f"hf/{folders / name}"), clip_of(name, 4)
    processor = processor_of(name)
    given = processor(torch.from_numpy(video).permute(0, 3, 1, 2), return_tensors="pt", do_normalize=False)
    scale, offset = (127.5, 1) if name == "Vivit" else (255, 0)
    theirs = (next(iter(given.values()))[0] + offset) * scale
    ours = resize_frames(list(video), spec.input_size, spec.resize)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1.001


@needed
@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_a_file_and_can_be_random(name, folders):
    state, _ = read_weights(folders / name / "model.safetensors")
    encoder = Encoder(f"hf/{folders / name}", state=state)
    assert not encoder.pretrained
    assert encoder.sha256() == Encoder(f"hf/{folders / name}").sha256()
    random = Encoder(f"hf/{folders / name}", pretrained=False)
    assert random.sha256() != encoder.sha256()
    random.load_state_dict(encoder.state_dict())
    assert random.sha256() == encoder.sha256()


@needed
def test_weights_of_a_released_head_and_decoder_are_left_out(folders):
    """And the names of transformers 4 are known."""
    state = load_file(folders / "VideoMAE/model.safetensors")
    released = {f"videomae.{key}": tensor for key, tensor in state.items()}
    assert any(key.endswith("q_bias") for key in released)
    more = [
        "decoder.norm.weight",
        "encoder_to_decoder.weight",
        "mask_token",
        "fc_norm.bias",
        "classifier.weight",
    ]
    released |= {key: torch.ones(2) for key in more}
    encoder = Encoder(f"hf/{folders / 'VideoMAE'}", state=released)
    assert encoder.sha256() == Encoder(f"hf/{folders / 'VideoMAE'}").sha256()


@needed
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("VideoMAE", "encoder.layer.0.attention.attention.k_bias"),
        ("VideoMAE", "encoder.layer.9.attention.attention.q_bias"),
        ("VJEPA2", "encoder.layer.0.attention.q_bias"),
        ("Timesformer", "pooler.dense.weight"),
    ],
)
def test_a_tensor_that_nothing_uses_is_an_error(kind, key, folder):
    path = folder(kind) / "model.safetensors"
    save_file(load_file(path) | {key: torch.ones(24)}, path)
    with pytest.raises(WeightsError) as caught:
        Encoder(f"hf/{path.parent}")
    layer = key.rsplit(".", 1)[0]
    assert layer.removesuffix(".query") in str(caught.value)
    assert "\n" not in str(caught.value)


@needed
def test_biases_that_a_configuration_leaves_out_are_an_error(folder):
    path = folder("VideoMAE") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"qv_bias": False}))
    with pytest.raises(WeightsError, match=r"no use for encoder.layer.0.attention.attention"):
        Encoder(f"hf/{path.parent}")


@needed
def test_weights_that_do_not_fit_are_refused(folders):
    state = load_file(folders / "VideoMAE/model.safetensors")
    with pytest.raises(WeightsError, match="not those of hf/"):
        Encoder(f"hf/{folders / 'Vivit'}", state=state)
    with pytest.raises(WeightsError, match=r"1 of its .* layernorm.weight"):
        Encoder(f"hf/{folders / 'VideoMAE'}", state=state | {"layernorm.weight": torch.ones(5)})
    del state["layernorm.weight"]
    with pytest.raises(WeightsError, match=r"layernorm\.weight"):
        Encoder(f"hf/{folders / 'VideoMAE'}", state=state)


@needed
def test_weights_may_be_in_parts_or_of_pytorch(folder):
    first = folder("VideoMAE")
    expected = Encoder(f"hf/{first}").sha256()
    state = load_file(first / "model.safetensors")
    (first / "model.safetensors").unlink()
    torch.save(state, first / "pytorch_model.bin")
    assert Encoder(f"hf/{first}").sha256() == expected
    keys = list(state)
    parts = {"model-1.safetensors": keys[:9], "model-2.safetensors": keys[9:]}
    for part, names in parts.items():
        save_file({key: state[key] for key in names}, first / part)
    index = {"metadata": {}, "weight_map": {key: part for part, names in parts.items() for key in names}}
    (first / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Encoder(f"hf/{first}").sha256() == expected
    (first / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2.safetensors"):
        Encoder(f"hf/{first}")


@needed
def test_folders_that_hold_no_encoder_say_so(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"config.json"):
        encoder_spec(f"hf/{tmp_path / 'empty'}")
    with pytest.raises(MissingFileError, match="no such folder"):
        encoder_spec(f"hf/{tmp_path / 'gone'}")
    path = folder("VideoMAE")
    config = json.loads((path / "config.json").read_text())
    for changes, words in (
        ({"model_type": "vit"}, "choose one of vjepa2, videomae, timesformer, vivit"),
        ({"num_channels": 1}, "square RGB"),
        ({"num_frames": 5}, "whole steps"),
        ({"tubelet_size": 0}, "whole steps"),
        ({"hidden_size": "x"}, "cannot be had"),
    ):
        (path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            encoder_spec(f"hf/{path}")
    for text in ("{", "[1]"):
        (path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match="cannot be had"):
            encoder_spec(f"hf/{path}")
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model.safetensors"):
        Encoder(f"hf/{path}")
    told = path / "video_preprocessor_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"resample": 1}))
    networks._huggingface.cache_clear()
    with pytest.raises(WeightsError, match="not known here"):
        encoder_spec(f"hf/{path}")
    told.unlink()
    with pytest.raises(WeightsError, match="preprocessor_config"):
        encoder_spec(f"hf/{path}")


@needed
def test_other_settings_are_another_encoder(folder):
    """Caches and checkpoints know it by its SHA-256, which its tensors alone do not change."""
    path, digests = folder("VideoMAE"), []
    told = path / "video_preprocessor_config.json"
    for mean in (0.5, 0.9, 0.5):
        told.write_text(json.dumps(json.loads(told.read_text()) | {"image_mean": [mean] * 3}))
        networks._huggingface.cache_clear()
        digests.append(Encoder(f"hf/{path}").sha256())
    assert digests[0] == digests[2] != digests[1]


@needed
def test_a_processor_of_before_is_read_too(folder):
    path = folder("VideoMAE")
    (path / "video_preprocessor_config.json").unlink()
    old = {"size": 36, "crop_size": 32, "image_mean": [0.45] * 3, "image_std": [0.225] * 3, "fps": 12}
    (path / "preprocessor_config.json").write_text(json.dumps(old))
    spec = encoder_spec(f"hf/{path}")
    assert (spec.resize.size, spec.resize.crop, spec.fps) == (36, 32, 12)
    assert spec.mean == pytest.approx((0.45,) * 3)
    assert spec.std == pytest.approx((0.225,) * 3)


@needed
def test_without_a_network_one_line_says_what_else(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        encoder_spec("hf/MCG-NJU/videomae-base")
    for part in ("hf/MCG-NJU/videomae-base", "hf/<folder>", "--encoder i3d"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_transformers_the_error_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WeightsError, match=r"pip install -r requirements-hf\.txt"):
        encoder_spec("hf/MCG-NJU/videomae-large")


def test_an_unknown_encoder_is_told_of_both_kinds():
    with pytest.raises(UserError, match="timm/<name> or hf/<name>"):
        encoder_spec("videomae")
