import csv
import json
import re
import shutil
import signal

import pytest
import torch
from test_run import stop_after

import test as test_script
import train
from conftest import embed_frames
from features.encoder import Encoder
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.classifier import Classifier


def losses(outcome):
    """The lines with figures, without the file that the last one names."""
    lines = [line for line in outcome.out.splitlines() if "nats" in line]
    return [re.sub(r"\S*/", "", line) for line in lines]


def test_train_saves_tests_and_keeps_what_the_checkpoint_needs(call, small, train_flags, tmp_path):
    done = call(train, *train_flags(small), "--num_epochs", 3, "--checkpoint_interval", 2, "--latent_dim", 16)
    assert done.status == 0, done.err
    folder = tmp_path / "model_checkpoints"
    saved = [path.name for path in folder.iterdir() if path.name != ".lock"]
    assert sorted(saved) == ["ConvLSTM_2.pth", "ConvLSTM_3.pth", "last.pth"]
    assert len([line for line in losses(done) if ": train" in line]) == 3
    tested = [line for line in losses(done) if ": test" in line and "of 2 clips" in line]
    assert [line.split(":")[0] for line in tested[:2]] == ["epoch 2 of 3", "epoch 3 of 3"]
    assert tested[2].startswith("epoch 3, ConvLSTM_3.pth: test")
    assert tested[2].split("accuracy ")[1][:20] == tested[1].split("accuracy ")[1][:20]
    checkpoint = load_checkpoint(folder / "ConvLSTM_3.pth")
    assert checkpoint.classes == ["WalkLeft", "WalkRight"]
    assert (checkpoint.img_dim, checkpoint.sequence_length, checkpoint.split_number) == (32, 8, 1)
    assert checkpoint.model.config["latent_dim"] == 16


def test_the_same_seed_twice_gives_the_same_losses_and_tensors(call, small, train_flags, tmp_path):
    states, printed = [], []
    for name, seed, workers in (("a", 5, 0), ("b", 5, 2), ("c", 6, 0)):
        done = call(
            train, *train_flags(small), "--num_epochs", 2, "--batch_size", 3, "--seed", seed,
            "--num_workers", workers, "--output_path", tmp_path / name,
        )  # fmt: skip
        assert done.status == 0, done.err
        printed.append(losses(done))
        states.append(torch.load(tmp_path / name / "ConvLSTM_2.pth", weights_only=True)["state"])
    assert printed[0] == printed[1] != printed[2]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_training_goes_on_from_a_checkpoint_and_loses_no_earlier_one(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 1]
    assert call(train, *flags).status == 0
    first = (tmp_path / "model_checkpoints/ConvLSTM_1.pth").read_bytes()
    again = call(
        train, *flags, "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth", "--learning_rate", "1e-9"
    )
    assert again.status == 0, again.err
    assert (tmp_path / "model_checkpoints/earlier-1/ConvLSTM_1.pth").read_bytes() == first
    old = torch.load(tmp_path / "model_checkpoints/earlier-1/ConvLSTM_1.pth", weights_only=True)["state"]
    new = torch.load(tmp_path / "model_checkpoints/ConvLSTM_1.pth", weights_only=True)["state"]
    assert torch.allclose(old["heads.rgb.lstm.weight_ih_l0"], new["heads.rgb.lstm.weight_ih_l0"], atol=1e-6)


def test_it_learns_what_only_the_order_of_frames_tells(call, toy, train_flags, tmp_path):
    lists = tmp_path / "lists"
    shutil.copytree(toy / "ucfTrainTestlist", lists)
    for name in ("trainlist01.txt", "testlist01.txt"):
        kept = [line for line in (lists / name).read_text().splitlines() if line.startswith("Walk")]
        (lists / name).write_text("\n".join(kept) + "\n")
    flags = ("--split_path", lists, "--no_flip", "--num_epochs", 60, "--learning_rate", "2e-3")
    done = call(train, *train_flags(toy), *flags, "--checkpoint_interval", 60)
    assert done.status == 0, done.err
    # Both clips of a pair have the same frames, so nothing but their order can tell them apart; each epoch
    # draws other starts and steps, so the clips of an epoch are new to the model.
    trained = [line for line in losses(done) if ": train" in line]
    accuracies = [float(line.split("accuracy ")[1].split(" %")[0]) for line in trained]
    assert sum(accuracies[:3]) / 3 < 80
    assert sum(accuracies[-10:]) / 10 >= 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sequence_length", 0], "sequence_length"),
        (["--img_dim", -3], "img_dim"),
        (["--batch_size", 1], "BatchNorm"),
        (["--channels", 1], "channels"),
        (["--split_number", 6], "split_number"),
        (["--encoder", "vgg"], "resnet152"),
        (["--num_epochs", "many"], "num_epochs"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--seed", -1], "seed"),
    ],
)
def test_wrong_flags_end_with_status_2(call, small, train_flags, tmp_path, flags, words):
    done = call(train, *train_flags(small), *flags)
    assert done.status == 2
    assert words in done.one_line_error()
    assert not (tmp_path / "model_checkpoints").exists()


def test_a_size_that_the_encoder_cannot_take_is_told_before_its_weights_are_sought(call, small, train_flags):
    done = call(train, *train_flags(small), "--encoder", "mvit_v2_s", "--img_dim", 112)
    assert done.status == 1
    assert "mvit_v2_s takes frames of 224 pixels only" in done.one_line_error()


def test_wrong_data_ends_with_status_1(call, small, train_flags, tmp_path):
    def error(*flags):
        done = call(train, *train_flags(small), "--num_epochs", 1, *flags)
        assert done.status == 1, done
        return done.one_line_error()

    assert "gone" in error("--dataset_path", tmp_path / "gone")
    assert "gone" in error("--split_path", tmp_path / "gone")
    assert "gone.pth" in error("--checkpoint_model", tmp_path / "gone.pth")
    assert "quantum" in error("--device", "quantum")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in error("--output_path", tmp_path / "file" / "folder")
    clip = small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi"
    data = clip.read_bytes()
    clip.write_bytes(data[:-3000])
    assert "truncated" in error()
    clip.write_bytes(b"")
    assert "empty" in error()
    clip.write_text("no video")
    assert clip.name in error()
    assert clip.name in error("--num_workers", 2)
    assert not list((tmp_path / "model_checkpoints").glob("*.pth"))


def test_weights_that_cannot_be_had(call, small, train_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = call(train, *train_flags(small), "--encoder", "resnet18")
    assert done.status == 1
    assert "efficientnet_lite0" in done.one_line_error()


def test_a_model_of_other_classes_is_refused(call, small, train_flags, toy):
    assert call(train, *train_flags(small), "--num_epochs", 1).status == 0
    done = call(train, *train_flags(toy), "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth")
    assert done.status == 1
    assert "2 classes" in done.one_line_error()


def test_bf16_on_request_changes_the_embeddings_only_a_little(small, train_flags):
    encoder = Encoder("tiny")
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    exact = embed_frames(encoder, frames)
    encoder.prepare(torch.bfloat16)
    assert not torch.equal(embed_frames(encoder, frames), exact)
    assert torch.allclose(embed_frames(encoder, frames), exact, rtol=0.03, atol=0.03)


def test_all_splits_are_trained_from_one_cache_and_their_mean_is_a_row(call, toy, train_flags, tmp_path):
    flags = [*train_flags(toy), "--latent_dim", 8, "--num_epochs", 1, "--split_number", "all"]
    flags += ["--cache_path", tmp_path / "cache"]
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert done.out.count("encoding 64 clips") == 1
    head, line, row = done.out.splitlines()[-3:]
    assert head == "| model | frames | split 1 | split 2 | split 3 | mean | 95 % interval |"
    assert set(line) == {"|", "-", " "}
    accuracies = []
    for number in (1, 2, 3):
        run = tmp_path / f"runs/ConvLSTM-tiny-32px-split{number}-default-seed0"
        report = json.loads((run / "test/report.json").read_text())
        assert report["split_number"] == number
        accuracies.append(report["figures"]["top1_percent"])
        assert (
            load_checkpoint(tmp_path / f"model_checkpoints/split{number}/ConvLSTM_1.pth").split_number
            == number
        )
    cells = row.strip("| ").split(" | ")
    assert cells[:2] == ["ConvLSTM, tiny", "8 of 32 px"]
    assert cells[2:5] == [f"{accuracy:.2f} %" for accuracy in accuracies]
    assert cells[5] == f"**{sum(accuracies) / 3:.2f} %**"
    low, high = re.fullmatch(r"(\S+) to (\S+) %", cells[6]).groups()
    assert 0 <= float(low) < sum(accuracies) / 3 < float(high) <= 100


def test_all_splits_go_on_where_they_stopped(call, toy, train_flags, tmp_path, monkeypatch):
    flags = [*train_flags(toy), "--latent_dim", 8, "--num_epochs", 2, "--split_number", "all"]
    whole = call(train, *flags, "--output_path", "whole")
    assert whole.status == 0, whole.err
    with monkeypatch.context() as patch:
        # 3 batches of training an epoch, one of testing, one of the report: in the second split.
        stop_after(patch, 10, signal.SIGTERM)
        done = call(train, *flags, "--output_path", "cut", "--run_path", "cut-run")
    assert done.status == 128 + signal.SIGTERM
    assert not (tmp_path / "cut/split3").exists()
    done = call(train, "--resume", "--split_number", "all", "--output_path", "cut")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == whole.out.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "cut-run").iterdir()) == ["split1", "split2", "split3"]
    assert (tmp_path / "cut-run/split3/test/report.json").is_file()
    done = call(train, "--resume", "--split_number", "all", "--output_path", "gone")
    assert (done.status, "no run to go on with" in done.one_line_error()) == (1, True)


def test_the_model_of_a_checkpoint_holds_and_the_report_says_so(call, small, train_flags, tmp_path):
    model = ["--model", "ActionBERT", "--latent_dim", 16, "--streams", "rgb,diff", "--frame_stride", 2]
    flags = [*train_flags(small), "--num_epochs", 1]
    assert call(train, *flags, *model, "--output_path", "first").status == 0
    start = ["--checkpoint_model", "first/ActionBERT_1.pth", "--num_epochs", 1, "--precision", "fp32"]
    data = train_flags(small)[:4]
    done = call(train, *data, *start, "--output_path", "second", "--run_path", "run")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    for name, value in {
        "encoder": "tiny", "model": "ActionBERT", "streams": "rgb,diff", "latent_dim": 16, "img_dim": 32,
        "sequence_length": 8, "frame_stride": 2,
    }.items():  # fmt: skip
        assert report["training"][name] == value, name
    assert (report["sequence_length"], report["frame_stride"]) == (8, 2)
    done = call(train, *data, *start, "--sequence_length", 5, "--output_path", "third", "--run_path", "run3")
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "third/ActionBERT_1.pth").sequence_length == 5
    for flag, value in (("--model", "MeanPool"), ("--encoder", "resnet18"), ("--streams", "rgb")):
        done = call(train, *data, *start, flag, value)
        assert done.status == 1
        assert f"{flag} {value} is not what this checkpoint was trained with" in done.one_line_error()
    done = call(train, "--resume", "--output_path", "second")
    assert (done.status, "all 1 epochs are trained already" in done.out) == (0, True), done.err
    # All splits, with a size of their own; the second has not had its turn.
    every = ["--split_number", "all", "--output_path", "every"]
    done = call(train, *data, *start, *every, "--sequence_length", 4)
    assert done.status == 0, done.err
    assert "warning: first/ActionBERT_1.pth was trained on split 1, and has seen most" in done.out
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"every/split{number}")
    done = call(train, "--resume", *every)
    assert done.status == 0, done.err
    for number in (1, 2, 3):
        assert load_checkpoint(tmp_path / f"every/split{number}/ActionBERT_1.pth").sequence_length == 4


def test_mirroring_is_that_of_the_checkpoint(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 1]
    assert call(train, *flags, "--no_flip", "--output_path", "first").status == 0
    data = [*train_flags(small)[:4], "--precision", "fp32", "--num_epochs", 1]
    done = call(train, *data, "--checkpoint_model", "first/ConvLSTM_1.pth", "--output_path", "second")
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "second/ConvLSTM_1.pth").settings["no_flip"] is True
    assert "encoding" not in done.out


def test_other_lists_are_told_when_a_run_goes_on(call, small, train_flags, toy):
    assert call(train, *train_flags(small), "--num_epochs", 1).status == 0
    other = ["--dataset_path", toy / "UCF-101", "--split_path", toy / "ucfTrainTestlist"]
    done = call(train, "--resume", *other)
    assert done.status == 1
    assert "model_checkpoints/last.pth: 2 classes" in done.one_line_error()


def test_a_checkpoint_with_sorted_classes_is_trained_and_tested_on_its_own_labels(
    call, small, train_flags, tmp_path
):
    """As the original's first layout has them, whose labels are another order than classInd.txt's."""
    lists = small / "ucfTrainTestlist"
    (lists / "classInd.txt").write_text("1 WalkRight\n2 WalkLeft\n")
    for path in lists.glob("trainlist*"):
        lines = path.read_text().split("\n")
        labels = {"WalkRight": 1, "WalkLeft": 2}
        path.write_text(
            "\n".join(f"{line.split()[0]} {labels[line.split('/')[0]]}" for line in lines if line)
        )
    model = Classifier("MeanPool", 2, encoder="tiny")
    save_checkpoint(tmp_path / "old.pth", Checkpoint(model, ["WalkLeft", "WalkRight"], 32, 8, None, 0))
    done = call(train, *train_flags(small)[:4], "--checkpoint_model", "old.pth", "--num_epochs", 1,
                "--learning_rate", 1e-2, "--run_path", "run", "--precision", "fp32")  # fmt: skip
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "model_checkpoints/MeanPool_1.pth").classes == [
        "WalkLeft",
        "WalkRight",
    ]
    done = call(test_script, *train_flags(small)[:4], "--checkpoint_model", "old.pth", "--run_path", "tested")
    assert done.status == 0, done.err
    with (tmp_path / "tested/predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["clip"].startswith(row["label"] + "/")
