"""compare.py: trainings one after the other, a row of a CSV each."""

import csv

import cv2
import pytest

import compare
import train


def rows(folder):
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_encoders_and_heads_are_compared_and_what_is_there_is_kept(
    call, small, train_flags, tmp_path, monkeypatch
):
    flags = [*train_flags(small)[:4], "--precision", "fp32", "--num_epochs", 1, "--run_path", tmp_path / "c"]
    flags += ["--encoders", "tiny --img_dim 24", "tiny_video", "--seeds", 2, "--split_number", 1]
    done = call(compare, *flags, "--models", "LinearProbe")
    assert done.status == 0, done.err
    first = rows(tmp_path / "c")
    assert [(row["encoder"], row["model"], row["seed"]) for row in first] == [
        ("tiny --img_dim 24", "LinearProbe", "0"), ("tiny --img_dim 24", "LinearProbe", "1"),
        ("tiny_video", "LinearProbe", "0"), ("tiny_video", "LinearProbe", "1"),
    ]  # fmt: skip
    table = (tmp_path / "c/compare.md").read_text()
    assert table.count("| LinearProbe |") == 2
    assert table.splitlines()[2] in done.out
    trained, main = [], train.main
    monkeypatch.setattr(train, "main", lambda words: trained.append(words) or main(words))
    done = call(compare, *flags, "--models", "LinearProbe", "AttentiveProbe")
    assert done.status == 0, done.err
    assert len(trained) == 4
    assert {row["model"] for row in rows(tmp_path / "c")[4:]} == {"AttentiveProbe"}
    assert rows(tmp_path / "c")[:4] == first
    assert cv2.imread(str(tmp_path / "c/compare.png")).shape[0] > 200
    done = call(compare, *flags, "--models", "LinearProbe", "--batch_size", 4)
    assert (done.status, "trainings with other flags" in done.one_line_error()) == (1, True)


def test_all_splits_and_intervals_by_groups(call, small, train_flags, tmp_path):
    done = call(compare, *train_flags(small)[:4], "--precision", "fp32", "--num_epochs", 1, "--seeds", 1,
                "--encoders", "tiny", "--models", "LinearProbe", "--run_path", tmp_path / "c")  # fmt: skip
    assert done.status == 0, done.err
    assert [row["split"] for row in rows(tmp_path / "c")] == ["1", "2", "3"]
    mean, seeds, ends = compare.summarize(rows(tmp_path / "c"))
    assert seeds == [mean]
    assert ends[0] <= mean <= ends[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--encoders", "vgg"], "unknown encoder 'vgg'"), (["--models", "LSTM"], "did you mean ConvLSTM?"),
     (["--models", "LinearProbe --seed 3"], "--seed is set here"), (["--seed", 3], "--seed is set here"),
     (["--encoders", "tiny 'x"], "No closing quotation"), (["--nonsense", 3], "nonsense")],
)  # fmt: skip
def test_wrong_flags_end_in_one_line(call, small, train_flags, flags, words):
    done = call(compare, *train_flags(small)[:4], *flags)
    assert done.status in (1, 2)
    assert words in done.one_line_error()
