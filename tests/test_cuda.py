"""What only a GPU can show, which `make test-cuda` runs; TEST_DEVICE=cpu tests these tests on a CPU."""

import csv
import itertools
import os

import numpy as np
import pytest
import torch
import torchvision
from test_ranks import torchrun

import export as export_script
import test as test_script
import test_on_video
import train
from conftest import Script, run_script, save_untrained
from features.encoder import Encoder

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here"
    ),
]


@pytest.fixture
def flags(small, tmp_path):
    data = ["--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"]
    model = ["--encoder", "resnet18", "--encoder_weights", weights(tmp_path), "--img_dim", 32]
    return [*data, *model, "--sequence_length", 8, "--latent_dim", 16, "--device", DEVICE]


def weights(folder):
    path = folder / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def state(path):
    return torch.load(path, weights_only=True, map_location="cpu")["head"]


@pytest.mark.parametrize(
    ("name", "side", "length"),
    [("tiny", 32, 1), ("resnet18", 64, 1), ("tiny_video", 24, 16), ("i3d", 64, 16), ("r3d_18", 48, 16)],
)
@pytest.mark.parametrize(("precision", "within"), [("fp32", 2e-3), ("bf16", 5e-2)])
def test_its_embeddings_are_the_cpus_within_the_dtype(name, side, length, precision, within):
    torch.manual_seed(0)
    encoder = Encoder(name, pretrained=name.startswith("tiny"), img_dim=side)
    windows = torch.randint(0, 256, (5, length, 3, side, side), dtype=torch.uint8)
    expected = encoder.embed(windows)
    encoder.to(DEVICE).prepare(precision)
    assert (encoder.embed(windows).cpu() - expected).norm() <= within * expected.norm()


def test_trained_twice_and_killed_and_resumed_the_weights_are_the_same(call, flags, tmp_path):
    flags += ["--num_epochs", 6]
    for name in ("one", "two"):
        done = call(
            train, *flags, "--cache_path", tmp_path / name / "cache", "--output_path", tmp_path / name
        )
        assert done.status == 0, done.err
    folder = tmp_path / "killed"
    process = Script("train.py", *flags, "--cache_path", folder / "cache", "--output_path", folder)
    while process.running() and not (folder / "last.pth").exists():
        pass
    process.kill()
    process.outcome()
    done = call(train, "--resume", "--output_path", folder)
    assert done.status == 0, done.err
    one, *others = (state(tmp_path / name / "ConvLSTM_6.pth") for name in ("one", "two", "killed"))
    for other, name in itertools.product(others, one):
        assert torch.equal(one[name], other[name]), name


def test_an_encoder_is_trained_further_and_tested(call, flags, tmp_path):
    flags += ["--num_epochs", 2, "--finetune", 2, "--num_workers", 1, "--output_path", tmp_path / "tuned"]
    done = call(train, *flags, "--cache_path", tmp_path / "cache", "--run_path", tmp_path / "run")
    assert done.status == 0, done.err
    path = tmp_path / "tuned/ConvLSTM_4.pth"
    started, tuned = (
        torch.load(file, weights_only=True, map_location="cpu")["encoder_state"]
        for file in (tmp_path / "tuned/first.pth", path)
    )
    moved = {name.split(".")[1] for name, tensor in started.items() if not torch.equal(tensor, tuned[name])}
    assert moved == {"6", "7"}, "the last two stages"
    tested = call(test_script, "--checkpoint_model", path, "--device", DEVICE, "--run_path", tmp_path / "t")
    assert tested.status == 0, tested.err
    assert "encoding" not in tested.out
    assert tested.out.split("test ")[1].splitlines()[0] in done.out


@pytest.mark.full_size
def test_one_process_of_torchrun_trains_as_none(call, flags, tmp_path):
    flags += ["--num_epochs", 2, "--cache_path", tmp_path / "cache"]
    assert call(train, *flags, "--output_path", tmp_path / "alone").status == 0
    places = ["--output_path", tmp_path / "torchrun", "--run_path", tmp_path / "run"]
    torchrun("train.py", *flags, *places, processes=1)
    alone, together = (state(tmp_path / name / "ConvLSTM_2.pth") for name in ("alone", "torchrun"))
    for name, tensor in alone.items():
        assert torch.allclose(tensor.float(), together[name].float(), atol=1e-4), name


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU's memory has no such limit")
def test_out_of_memory_on_cuda_says_which_flag_to_lower(call, flags):
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1, 1e8 / total))
    try:
        done = call(train, *flags, "--img_dim", 512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.status == 1
    error = done.one_line_error()
    assert ("--batch_size" in error, "--img_dim" in error) == (True, True)


def test_a_video_is_labeled_as_on_a_cpu(call, small, tmp_path):
    model = save_untrained(tmp_path / "model.pth")
    rows = []
    for device in ("cpu", DEVICE):
        output = tmp_path / f"{device}-{len(rows)}.mp4"
        done = call(
            test_on_video, "--video_path", small / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi", "--output",
            output, "--checkpoint_model", model, "--device", device, "--precision", "fp32",
        )  # fmt: skip
        assert done.status == 0, done.err
        with output.with_name(output.name + ".csv").open(newline="") as file:
            rows.append([[float(row[name]) for name in list(row)[3:]] for row in csv.DictReader(file)])
    assert np.allclose(*rows, atol=1e-3)


def test_onnxruntimes_cuda_gives_what_its_cpu_gives(call, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; pip install onnxruntime-gpu")
    folder = tmp_path / "exported"
    model = save_untrained(tmp_path / "model.pth")
    assert call(export_script, "--checkpoint_model", model, "--output", folder).status == 0
    for path in folder.glob("*.onnx"):
        answers = []
        for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
            session = onnxruntime.InferenceSession(path, providers=[provider])
            rng = np.random.default_rng(0)
            inputs = {
                entry.name: (
                    rng.random([size if isinstance(size, int) else 4 for size in entry.shape]) * 9
                ).astype({"tensor(uint8)": "uint8", "tensor(bool)": "bool"}.get(entry.type, "float32"))
                for entry in session.get_inputs()
            }
            answers.append(session.run(None, inputs)[0])
        assert np.allclose(*answers, atol=1e-3)


def test_the_benchmark_of_gpus_runs(tmp_path):
    done = run_script("benchmarks/gpu.py", "--device", DEVICE, "--quick", "--encoders", "resnet18")
    assert done.status == 0, done.err
    assert "| resnet18 |" in done.out
