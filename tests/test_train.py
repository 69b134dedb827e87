import csv
import json
import random
import re
import shutil
import time

import filelock
import pytest
import torch

import test as test_script
import train
from conftest import KILLS, Script, untrained_checkpoint
from training.checkpoint import load_checkpoint, save_checkpoint


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
    tested = [line for line in losses(done) if ": test" in line]
    assert [line.split(":")[0] for line in tested[:2]] == ["epoch 2 of 3", "epoch 3 of 3"]
    assert tested[2].startswith("epoch 3, ConvLSTM_3.pth: test")
    assert tested[2].split("accuracy ")[1][:7] == tested[1].split("accuracy ")[1][:7]
    checkpoint = load_checkpoint(folder / "ConvLSTM_3.pth")
    assert checkpoint.classes == ["WalkLeft", "WalkRight"]
    assert (checkpoint.encoder.img_dim, checkpoint.sequence_length, checkpoint.split_number) == (32, 8, 1)
    assert checkpoint.sizes["latent_dim"] == 16
    assert (tmp_path / "runs/ConvLSTM-tiny-32px-split1-default-seed0/curves.png").is_file()


def test_the_same_seed_twice_gives_the_same_losses_and_tensors(call, small, train_flags, tmp_path):
    states, printed = [], []
    for name, seed, workers in (("a", 5, 1), ("b", 5, 2), ("c", 6, 1)):
        done = call(
            train, *train_flags(small), "--num_epochs", 2, "--batch_size", 3, "--seed", seed,
            "--num_workers", workers, "--output_path", tmp_path / name,
        )  # fmt: skip
        assert done.status == 0, done.err
        printed.append(losses(done))
        states.append(torch.load(tmp_path / name / "ConvLSTM_2.pth", weights_only=True)["head"])
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
    old = torch.load(tmp_path / "model_checkpoints/earlier-1/ConvLSTM_1.pth", weights_only=True)["head"]
    new = torch.load(tmp_path / "model_checkpoints/ConvLSTM_1.pth", weights_only=True)["head"]
    assert torch.allclose(old["lstm.weight_ih_l0"], new["lstm.weight_ih_l0"], atol=1e-6)


def test_it_learns_what_only_the_order_of_frames_tells(call, toy, train_flags, tmp_path, monkeypatch):
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
        (["--learning_rate", "1,2,3"], "the encoder's, no more"),
        (["--learning_rate", "1e-3,1e-4"], "which stays frozen; add --finetune"),
        (["--finetune", 0], "finetune"),
        (["--finetune", "--precision", "int8"], "8-bit integers cannot"),
        (["--seed", -1], "seed"),
    ],
)
def test_wrong_flags_end_with_status_2(call, small, train_flags, tmp_path, flags, words):
    done = call(train, *train_flags(small), *flags)
    assert done.status == 2
    assert words in done.one_line_error()
    assert not (tmp_path / "model_checkpoints").exists()


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


def test_a_model_of_other_classes_is_refused(call, small, train_flags, toy):
    assert call(train, *train_flags(small), "--num_epochs", 1).status == 0
    done = call(train, *train_flags(toy), "--checkpoint_model", "model_checkpoints/ConvLSTM_1.pth")
    assert done.status == 1
    assert "2 classes" in done.one_line_error()


def test_all_splits_are_trained_from_one_cache_go_on_where_they_stopped_and_their_mean_is_a_row(
    call, toy, train_flags, tmp_path
):
    flags = [*train_flags(toy), "--latent_dim", 8, "--num_epochs", 1, "--split_number", "all"]
    flags += ["--cache_path", tmp_path / "cache"]
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert done.out.count("encoding 64 videos") == 1
    head, line, row = done.out.splitlines()[-3:]
    assert head == "| model | embeddings | split 1 | split 2 | split 3 | mean | 95 % interval |"
    assert set(line) == {"|", "-", " "}
    accuracies = []
    for number in (1, 2, 3):
        run = tmp_path / f"runs/ConvLSTM-tiny-32px-split{number}-default-seed0"
        report = json.loads((run / "test/report.json").read_text())
        assert report["split_number"] == number
        accuracies.append(report["figures"]["top1_percent"])
        model = load_checkpoint(tmp_path / f"model_checkpoints/split{number}/ConvLSTM_1.pth")
        assert model.split_number == number
    cells = row.strip("| ").split(" | ")
    assert cells[:2] == ["ConvLSTM, tiny", "8 at 32 px"]
    assert cells[2:5] == [f"{accuracy:.2f} %" for accuracy in accuracies]
    assert cells[5] == f"**{sum(accuracies) / 3:.2f} %**"
    low, high = re.fullmatch(r"(\S+) to (\S+) %", cells[6]).groups()
    assert 0 <= float(low) < sum(accuracies) / 3 < float(high) <= 100
    # As if it had been killed between the second and the third split.
    shutil.rmtree(tmp_path / "model_checkpoints/split3")
    shutil.rmtree(run)
    again = call(train, "--resume")
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1] == row
    assert (run / "test/report.json").is_file()
    done = call(train, "--resume", "--split_number", "all", "--output_path", "gone")
    assert (done.status, "no run to go on with" in done.one_line_error()) == (1, True)


def interrupted_at(call_number, function):
    """A function that is interrupted at one of its calls."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        if len(calls) == call_number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return called


def test_an_interrupted_run_of_all_splits_does_not_go_on_with_an_earlier_one(
    call, small, train_flags, tmp_path, monkeypatch
):
    flags = [*train_flags(small), "--model", "LinearProbe", "--num_epochs", 1, "--split_number", "all"]
    for earlier in (flags, flags[:-2]):
        assert call(train, *earlier).status == 0
    with monkeypatch.context() as patched:
        patched.setattr(train, "fit", interrupted_at(2, train.fit))
        done = call(train, *flags, "--seed", 7)
    assert done.status == 128 + 2
    assert "go on: python3 train.py --resume --output_path model_checkpoints --split_number all" in done.out
    done = call(train, "--resume", "--split_number", "all")
    assert done.status == 0, done.err
    for number in (1, 2, 3):
        assert load_checkpoint(tmp_path / f"model_checkpoints/split{number}/last.pth").settings["seed"] == 7
    table = (tmp_path / "model_checkpoints/splits.md").read_text()
    assert table.strip() in done.out


def test_what_is_interrupted_before_its_first_epoch_begins_again(call, small, train_flags, monkeypatch):
    assert call(train, *train_flags(small), "--num_epochs", 1).status == 0
    monkeypatch.setattr(train, "fill_store", interrupted_at(1, train.fill_store))
    done = call(train, *train_flags(small), "--num_epochs", 1, "--seed", 7)
    assert done.status == 128 + 2
    assert "--resume" not in done.out
    assert "begins again with the same command" in done.out


def test_wrong_sizes_are_told_before_anything_is_encoded(call, small, train_flags, tmp_path):
    flags = [*train_flags(small), "--cache_path", tmp_path / "cache"]
    error = call(train, *flags, "--model", "ActionBERT", "--latent_dim", 100).one_line_error()
    assert "does not divide" in error
    assert not list(tmp_path.glob("cache/**/*.npy"))


def test_the_model_of_a_checkpoint_holds_and_the_report_says_so(call, small, train_flags, tmp_path):
    model = ["--model", "ActionBERT", "--latent_dim", 16, "--frame_stride", 2]
    flags = [*train_flags(small), "--num_epochs", 1]
    assert call(train, *flags, *model, "--output_path", "first").status == 0
    start = ["--checkpoint_model", "first/ActionBERT_1.pth", "--num_epochs", 1, "--precision", "fp32"]
    data = train_flags(small)[:4]
    done = call(train, *data, *start, "--output_path", "second", "--run_path", "run")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    for name, value in {
        "encoder": "tiny", "model": "ActionBERT", "latent_dim": 16, "img_dim": 32,
        "sequence_length": 8, "frame_stride": 2,
    }.items():  # fmt: skip
        assert report["training"][name] == value, name
    assert (report["sequence_length"], report["frame_stride"]) == (8, 2)
    done = call(train, *data, *start, "--sequence_length", 5, "--output_path", "third", "--run_path", "run3")
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "third/ActionBERT_1.pth").sequence_length == 5
    for flag, value in (("--model", "LinearProbe"), ("--encoder", "resnet18")):
        done = call(train, *data, *start, flag, value)
        assert done.status == 1
        assert f"{flag} {value} is not what this checkpoint was trained with" in done.one_line_error()
    done = call(train, "--resume", "--output_path", "second")
    assert (done.status, "going on after epoch 1 of 1" in done.out) == (0, True), done.err
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
    save_checkpoint(tmp_path / "old.pth", untrained_checkpoint(model="LinearProbe"))
    done = call(train, *train_flags(small)[:4], "--checkpoint_model", "old.pth", "--num_epochs", 1,
                "--learning_rate", 1e-2, "--run_path", "run", "--precision", "fp32")  # fmt: skip
    assert done.status == 0, done.err
    assert load_checkpoint(tmp_path / "model_checkpoints/LinearProbe_1.pth").classes == [
        "WalkLeft",
        "WalkRight",
    ]
    done = call(test_script, *train_flags(small)[:4], "--checkpoint_model", "old.pth", "--run_path", "tested")
    assert done.status == 0, done.err
    with (tmp_path / "tested/predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["clip"].startswith(row["label"] + "/")


def state_of(path):
    contents = torch.load(path, weights_only=True)
    return contents["head"], contents["training"]["history"]


def assert_same(one, other):
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    keys = ("train_loss", "train_accuracy", "val_loss", "learning_rate")
    assert [[epoch[key] for key in keys] for epoch in one[1]] == [
        [epoch[key] for key in keys] for epoch in other[1]
    ]


def test_killed_at_any_instant_and_resumed_it_ends_with_the_same_weights(small, train_flags, tmp_path):
    flags = [*train_flags(small), "--num_epochs", 8, "--batch_size", 2, "--val_fraction", 0.3,
             "--cache_path", tmp_path / "cache"]  # fmt: skip
    whole = Script("train.py", *flags, "--output_path", tmp_path / "whole", "--run_path", tmp_path / "run")
    assert whole.outcome().status == 0
    expected, rng = state_of(tmp_path / "whole/last.pth"), random.Random(1)
    begin = ["train.py", *flags, "--output_path", tmp_path / "cut", "--run_path", tmp_path / "cut-run"]
    resume = ["train.py", "--resume", "--output_path", tmp_path / "cut"]
    for _ in range(KILLS):
        running = Script(*(resume if (tmp_path / "cut/last.pth").is_file() else begin))
        time.sleep(rng.uniform(0.2, 1.5))
        running.kill()
        running.outcome()
    done = Script(*(resume if (tmp_path / "cut/last.pth").is_file() else begin)).outcome()
    assert done.status == 0, done.err
    assert_same(expected, state_of(tmp_path / "cut/last.pth"))


def test_signals_end_at_once_and_the_run_goes_on(small, train_flags, tmp_path):
    running = Script("train.py", *train_flags(small), "--num_epochs", 3000, "--output_path", tmp_path / "out",
                     "--run_path", tmp_path / "run")  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/last.pth").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    running.terminate()
    done = running.outcome()
    assert time.monotonic() - started < 5
    assert done.status == 128 + 15
    assert "interrupted by SIGTERM" in done.err
    assert load_checkpoint(tmp_path / "out/last.pth").training is not None


def test_other_flags_and_other_clips_are_refused_when_a_run_goes_on(call, small, train_flags, tmp_path):
    assert call(train, *train_flags(small), "--num_epochs", 2).status == 0
    error = call(train, "--resume", "--num_epochs", 5, "--batch_size", 8).one_line_error()
    assert "last.pth was trained with --num_epochs 2, not 5; --batch_size 16, not 8" in error
    assert call(train, "--resume", "--checkpoint_interval", 3, "--num_epochs", 2).status == 0
    (small / "UCF-101/WalkLeft/v_WalkLeft_g02_c01.avi").unlink()
    assert "not the clips that" in call(train, "--resume").one_line_error()


def test_validation_chooses_the_best_epoch_stops_and_calibrates(call, toy, train_flags, tmp_path):
    done = call(train, *train_flags(toy), "--model", "LinearProbe", "--val_fraction", 0.4, "--patience", 2,
                "--num_epochs", 40, "--learning_rate", 3e-2, "--run_path", "run")  # fmt: skip
    assert done.status == 0, done.err
    assert "no better one in 2 epochs" in done.out
    best, last = (load_checkpoint(tmp_path / f"model_checkpoints/{name}.pth") for name in ("best", "last"))
    assert last.epoch == best.epoch + 2
    with (tmp_path / "run/history.csv").open(newline="") as file:
        rows = [(float(row["val_accuracy"]), -float(row["val_loss"])) for row in csv.DictReader(file)]
    assert max(range(len(rows)), key=lambda place: (rows[place], -place)) == best.epoch - 1
    assert best.head.temperature != 1
    report = json.loads((tmp_path / "run/test/report.json").read_text())
    assert report["temperature"] == best.head.temperature
    assert "calibration_error_without_temperature_percent" in report["figures"]


def test_a_loss_that_is_no_number_names_the_clips(call, small, train_flags):
    done = call(train, *train_flags(small), "--learning_rate", 1e30, "--num_epochs", 3)
    assert (done.status, "the loss became" in done.err, "v_Walk" in done.err) == (1, True, True), done.err


def test_two_trainings_do_not_share_a_folder(call, small, train_flags, tmp_path):
    (tmp_path / "model_checkpoints").mkdir()
    with filelock.FileLock(tmp_path / "model_checkpoints/.lock"):
        done = call(train, *train_flags(small))
    assert (done.status, "another training writes there" in done.one_line_error()) == (1, True)


def test_at_most_33_flags():
    flags = [action for action in train.get_args_parser()._actions if action.dest != "help"]
    assert len(flags) <= 33
