import csv
import json
import re
import shutil
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import extract_features
import test as test_script
import test_on_video
import train
from annotation.recognizer import untrained
from annotation.settings import check_own_classes
from conftest import data_flags, make_small
from features import networks
from features.encoder import Encoder
from features.networks import encoder_spec
from features.weights import WeightsError, read_weights
from features.windows import Windows
from utils.process import MissingFileError, UserError
from video.frames import resize_frames
from video.reader import Video
from video.writer import write_video

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
ACTIONS = ["pouring milk", "cutting bread", "no idea"]
NAMED = {
    "id2label": dict(enumerate(ACTIONS)),
    "label2id": {name: label for label, name in enumerate(ACTIONS)},
}


def network_of(name, part="Model", **changes):
    import transformers

    torch.manual_seed(0)
    sizes = SIZES if name != "VJEPA2" else {key: SIZES[key] for key in SIZES if key != "intermediate_size"}
    config = getattr(transformers, f"{name}Config")(**sizes, **KINDS[name][0], **changes)
    network = getattr(transformers, f"{name}{part}")(config).eval().requires_grad_(False)
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


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """The same with classifiers that know three actions."""
    root = tmp_path_factory.mktemp("classifiers")
    for name in NAMES if find_spec("transformers") else []:
        network_of(name, "ForVideoClassification", **NAMED).save_pretrained(root / name)
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


@needed
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_an_encoder(name, folders):
    """Its embedding is the mean of the tokens of transformers' own network, of what its processor gives."""
    spec = encoder_spec(f"hf/{folders / name}")
    count = KINDS[name][0].get("num_frames") or KINDS[name][0]["frames_per_clip"]
    assert spec.windows == Windows(count, count, count)
    assert (spec.input_size, spec.fixed_size, spec.live_frames) == (side_of(name), True, count)
    assert spec.categories is None
    encoder = Encoder(f"hf/{folders / name}")
    assert encoder.pretrained
    frames = resize_frames(clip_of(name, count), spec.input_size, spec.resize)
    expected = network_of(name)(pixels_of(name, frames)).last_hidden_state.mean(1, keepdim=True)
    assert expected.std() > 0.1
    embeddings = encoder.embed(frames[None])
    assert embeddings.shape == (1, 1, 24)
    assert torch.allclose(embeddings, expected, atol=1e-5)
    encoder.prepare("bf16")
    assert F.cosine_similarity(encoder.embed(frames[None]), embeddings, dim=-1).min() > 0.99
    with pytest.raises(UserError, match=f"--img_dim {side_of(name)}"):
        Encoder(f"hf/{folders / name}", img_dim=16)
    with pytest.raises(UserError, match="has no last layer of its own"):
        check_own_classes(f"hf/{folders / name}")


def pixels_of(name, frames):
    kept = processor_of(name)(frames, return_tensors="pt", do_resize=False, do_center_crop=False)
    return next(iter(kept.values()))


@needed
@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_names_its_own_classes(name, classifiers, tmp_path, call):
    """Its logits are those of transformers' own network, and its embedding stands before them."""
    folder, count = classifiers / name, len(ACTIONS)
    encoder = Encoder(f"hf/{folder}")
    assert encoder.spec.categories() == ACTIONS
    frames = encoder.spec.windows.frames
    window = resize_frames(clip_of(name, frames), encoder.spec.input_size, encoder.spec.resize)
    network = network_of(name, "ForVideoClassification", **NAMED)
    expected = network(pixels_of(name, window)).logits
    assert expected.shape == (1, count)
    assert expected.std() > 0.05
    model = untrained(f"hf/{folder}")
    embeddings = encoder.embed(window[None])
    torch.testing.assert_close(model.head(embeddings), expected, rtol=0, atol=1e-4)
    # Windows along a video, and their labels: each window by itself is what transformers says of it.
    shown = np.random.default_rng(1).integers(0, 256, (3 * frames, 60, 80, 3), np.uint8)
    write_video(tmp_path / "x.mp4", shown, Fraction(encoder.spec.fps).limit_denominator(1000))
    flags = ["--video_path", tmp_path / "x.mp4", "--encoder", f"hf/{folder}", "--precision", "fp32"]
    done = call(
        test_on_video,
        *flags,
        "--sequence_length",
        1,
        "--no_cuts",
        "--label_every",
        1,
        "--all_probabilities",
        "--output",
        "y.mp4",
    )
    assert done.status == 0, done.err
    with Path("y.mp4.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = list(Video(tmp_path / "x.mp4").frames())
    for start in range(0, len(read), frames):
        window = resize_frames(read[start : start + frames], encoder.spec.input_size, encoder.spec.resize)
        theirs = network(pixels_of(name, window)).logits.softmax(-1)[0].tolist()
        ours = [float(rows[start + frames // 2][action]) for action in ACTIONS]
        assert ours == pytest.approx(theirs, abs=1e-4)
    listed = call(test_on_video, "--list_actions", "--encoder", f"hf/{folder}")
    assert listed.out.splitlines()[-count:] == ACTIONS


@needed
@pytest.mark.parametrize("name", NAMES)
def test_commands_take_it_as_an_encoder(name, classifiers, toy, tmp_path, call):
    small = make_small(toy, tmp_path / "small")
    flags = ["--encoder", f"hf/{classifiers / name}", "--precision", "fp32"]
    places = ["--output_path", tmp_path / "out", "--run_path", tmp_path / "run"]
    model = tmp_path / "out/LinearProbe_2.pth"
    trained = [*data_flags(small), *flags, "--model", "LinearProbe", "--num_epochs", 2, *places]
    finetuned = ["--precision", "fp32", "--num_epochs", 1, "--finetune", 1, "--num_workers", 1]
    finetuned += ["--output_path", tmp_path / "tuned", "--run_path", tmp_path / "tuned-run"]
    for command, words in (
        (train, trained),
        (test_script, [*data_flags(small), "--checkpoint_model", model]),
        (extract_features, ["--video_path", small / "UCF-101", *flags, "--output", tmp_path / "f"]),
        (train, [*data_flags(small), "--checkpoint_model", model, *finetuned]),
        (test_script, ["--checkpoint_model", tmp_path / "tuned/LinearProbe_1.pth"]),
    ):
        done = call(command, *words)
        assert done.status == 0, done.err
    assert len(list((tmp_path / "f").rglob("*.npy"))) == 6


@needed
@pytest.mark.parametrize("name", [*NAMES, "XCLIP"])
@pytest.mark.parametrize("blocks", [1, None])
def test_gradients_are_those_of_transformers(name, blocks, folders, reader):
    """Through what computes activations again, and for all parameters of the last blocks."""
    folder = reader[0] if name == "XCLIP" else folders / name
    encoder = Encoder(f"hf/{folder}")
    layout, side = encoder.windows, encoder.img_dim
    windows = torch.randint(0, 256, (2, layout.frames, 3, side, side), dtype=torch.uint8)
    trained = encoder.unfreeze(blocks)
    gradients = []
    for again in (True, False):
        encoder.train(again)
        encoder.zero_grad()
        encoder(windows).square().sum().backward()
        gradients.append([parameter.grad for parameter, _ in trained])
        reached = {id(each) for each in encoder.parameters() if each.grad is not None}
        assert reached == {id(parameter) for parameter, _ in trained}
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    names = " ".join(
        key for key, each in encoder.named_parameters() if each.requires_grad and "mit" not in key
    )
    layers = set(re.findall(r"(?<!mit\.)(?:encoder|network)\.layers?\.(\d)", names))
    assert layers == ({"1"} if blocks else {"0", "1"})
    assert "text_model" not in names


WORDS = ["pouring milk", "cutting bread", "something else", "brød skæres"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A small X-CLIP of random weights, with its processor and a tokenizer, and the network itself."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("xclip")
    vocabulary = ["<pad>", "<unk>", *sorted({word for words in WORDS for word in words.split()}), "<end>"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", ids["<end>"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.XCLIPConfig(
        text_config=small | {"vocab_size": len(ids), "eos_token_id": ids["<end>"], "projection_dim": 16},
        vision_config=small | {
            "image_size": 32, "patch_size": 16, "num_frames": 4, "mit_hidden_size": 16,
            "mit_num_hidden_layers": 1, "mit_intermediate_size": 32, "mit_num_attention_heads": 2,
            "projection_dim": 16,
        },
        projection_dim=16, prompt_num_attention_heads=2, prompt_layers=1, prompt_alpha=0.5,
    )  # fmt: skip
    network = transformers.XCLIPModel(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    transformers.VideoMAEImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder, network


@needed
def test_a_video_is_compared_with_words(reader, tmp_path, call):
    """Probabilities are transformers' own for the same frames."""
    import transformers

    folder, network = reader
    spec = encoder_spec(f"hf/{folder}")
    assert (spec.windows, spec.width, spec.words) == (Windows(4, 4, 4), 16, True)
    shown = np.random.default_rng(1).integers(0, 256, (12, 60, 80, 3), np.uint8)
    write_video(tmp_path / "x.mp4", shown, Fraction(4))
    flags = ["--video_path", tmp_path / "x.mp4", "--encoder", f"hf/{folder}", "--precision", "fp32"]
    flags += ["--sequence_length", 1, "--no_cuts", "--label_every", 1, "--all_probabilities"]
    done = call(test_on_video, *flags, "--only", ", ".join(WORDS), "--output", "y.mp4")
    assert done.status == 0, done.err
    with Path("y.mp4.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = transformers.AutoTokenizer.from_pretrained(folder)(WORDS, padding=True, return_tensors="pt")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    frames, seen = list(Video(tmp_path / "x.mp4").frames()), []
    for start in (0, 4, 8):
        window = resize_frames(frames[start : start + 4], 32, spec.resize)
        pixels = processor(list(window), return_tensors="pt", do_resize=False, do_center_crop=False)[
            "pixel_values"
        ]
        answer = network(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            pixel_values=pixels.reshape(1, 4, 3, 32, 32),
        )
        theirs = answer.logits_per_video.softmax(-1)[0].tolist()
        assert [float(rows[start + 1][word]) for word in WORDS] == pytest.approx(theirs, abs=1e-4)
        seen.append(theirs)
    assert np.std(seen, axis=0).max() > 1e-3
    # As an encoder for heads it gives the features of the clip.
    window = resize_frames(frames[:4], 32, spec.resize)
    pixels = processor(list(window), return_tensors="pt", do_resize=False, do_center_crop=False)[
        "pixel_values"
    ]
    expected = network.get_video_features(pixels.reshape(1, 4, 3, 32, 32)).pooler_output
    torch.testing.assert_close(Encoder(f"hf/{folder}").embed(window[None])[0], expected, rtol=0, atol=1e-4)
    for only in ([], ["--only", "one"], ["--only", "one, One"]):
        done = call(test_on_video, *flags, *only)
        assert "name two or more" in done.one_line_error()


@needed
def test_a_classifier_without_names_says_so(classifiers, tmp_path):
    folder = shutil.copytree(classifiers / "VideoMAE", tmp_path / "nameless")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="have no names, LABEL_0"):
        encoder_spec(f"hf/{folder}").categories()


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
def test_weights_may_be_in_parts_and_are_safetensors(folder):
    first = folder("VideoMAE")
    expected = Encoder(f"hf/{first}").sha256()
    state = load_file(first / "model.safetensors")
    (first / "model.safetensors").unlink()
    torch.save(state, first / "pytorch_model.bin")
    # A file that could run code.
    with pytest.raises(WeightsError, match="safetensors"):
        Encoder(f"hf/{first}")
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
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "is ViTForImageClassification",
        ),
        ({"num_channels": 1}, "square RGB"),
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
