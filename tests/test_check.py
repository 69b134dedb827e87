"""`dataset.py check`: what would corrupt a result is a fault, what is harmless a remark."""

import shutil

import pytest

import dataset

LEFT, RIGHT = "UCF-101/WalkLeft/v_WalkLeft_g0{}_c01.avi", "UCF-101/WalkRight/v_WalkRight_g0{}_c01.avi"


@pytest.fixture
def checked(call, small):
    def run():
        flags = ("--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist")
        done = call(dataset, "check", *flags)
        faults, remarks = (
            [line for line in done.out.splitlines() if line.startswith(kind)]
            for kind in ("fault:", "remark:")
        )
        assert done.status == bool(faults), done.err
        return faults, remarks

    return run


def test_a_sound_data_set_has_no_faults(checked):
    assert checked() == ([], [])


@pytest.mark.parametrize(
    ("source", "target", "fault", "remark"),
    [
        (LEFT.format(2), LEFT.format(1), "g01_c01.avi (test 1, test 2, test 3)", None),
        (LEFT.format(2), LEFT.format(1), "on both sides of a split", None),
        (RIGHT.format(1), LEFT.format(1), "under two classes", None),
        (RIGHT.format(3), "UCF-101/WalkLeft/v_WalkRight_g09_c01.avi", "another class", None),
        (
            RIGHT.format(3),
            "UCF-101/Flying/v_Flying_g01_c01.avi",
            "the class Flying is not in the lists",
            None,
        ),
        (RIGHT.format(3), RIGHT.format(8), None, "in no list"),
        (RIGHT.format(3), RIGHT.format(8), None, "the same bytes"),
    ],
)
def test_copies_and_strangers_are_found(checked, small, source, target, fault, remark):
    (small / target).parent.mkdir(exist_ok=True)
    shutil.copy(small / source, small / target)
    faults, remarks = checked()
    assert any(fault in line for line in faults) if fault is not None else not faults
    assert any(remark in line for line in remarks) if remark else True


def test_cut_and_missing_clips_are_found(checked, small):
    clip = small / LEFT.format(1)
    clip.write_bytes(clip.read_bytes()[:-2000])
    assert "truncated" in checked()[0][0]
    clip.unlink()
    faults, remarks = checked()
    assert not faults
    assert "1 of 6 listed clips are not there" in remarks[0]


def test_lists_that_contradict_end_the_check(checked, call, small):
    lists = small / "ucfTrainTestlist"
    first = (lists / "trainlist01.txt").read_text().splitlines()[0].split()[0]
    with (lists / "testlist01.txt").open("a") as file:
        file.write(f"{first}\r\n")
    assert "twice" in checked()[0][0]
    (lists / "testlist02.txt").write_text("../../etc/x.avi\n")
    done = call(dataset, "check", "--dataset_path", small / "UCF-101", "--split_path", lists)
    assert (done.status, "testlist02.txt" in done.one_line_error()) == (1, True)


def test_real_clips_whose_index_claims_too_much_are_remarked(call, subset):
    lists = subset / "ucfTrainTestlist"
    done = call(dataset, "check", "--dataset_path", subset / "UCF-101", "--split_path", lists)
    assert done.status == 0, done.out
    assert "391 clips" in done.out
    assert done.out.count("its index claims") > 5
