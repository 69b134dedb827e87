import shutil

import pytest

import dataset


@pytest.fixture
def checked(call, small):
    def run():
        return call(
            dataset, "check", "--dataset_path", small / "UCF-101", "--split_path", small / "ucfTrainTestlist"
        )

    return run


def faults(done):
    return [line for line in done.out.splitlines() if line.startswith("fault:")]


def remarks(done):
    return [line for line in done.out.splitlines() if line.startswith("remark:")]


def test_a_sound_data_set_has_no_faults(checked):
    done = checked()
    assert done.status == 0, done.out
    assert (faults(done), remarks(done)) == ([], [])
    assert "6 clips" in done.out


def test_every_kind_of_fault_is_found(checked, small):
    videos = small / "UCF-101"
    left, right = videos / "WalkLeft", videos / "WalkRight"
    # Training's g02 over the test's g01: the same bytes on both sides.
    shutil.copy(left / "v_WalkLeft_g02_c01.avi", left / "v_WalkLeft_g01_c01.avi")
    done = checked()
    assert done.status == 1
    (line,) = faults(done)
    assert "both sides" in line
    assert "v_WalkLeft_g01_c01.avi (test 1, test 2, test 3)" in line

    shutil.copy(right / "v_WalkRight_g02_c01.avi", left / "v_WalkLeft_g01_c01.avi")
    assert any("both sides" in line or "two classes" in line for line in faults(checked()))

    data = (right / "v_WalkRight_g03_c01.avi").read_bytes()
    (left / "v_WalkLeft_g01_c01.avi").write_bytes(data[:-2000])
    (line,) = faults(checked())
    assert "truncated" in line

    shutil.move(left / "v_WalkLeft_g01_c01.avi", left / "v_WalkRight_g09_c01.avi")
    (left / "v_WalkRight_g09_c01.avi").write_bytes(data + b"\0")
    done = checked()
    assert done.status == 1
    assert "another class" in faults(done)[0]
    assert any("1 of 6 listed clips are not there" in line for line in remarks(done))

    (left / "v_WalkRight_g09_c01.avi").unlink()
    shutil.copy(right / "v_WalkRight_g03_c01.avi", right / "v_WalkRight_g08_c01.avi")
    done = checked()
    assert done.status == 0, done.out
    assert any("in no list" in line for line in remarks(done))
    assert any("the same bytes" in line for line in remarks(done))

    (videos / "Flying").mkdir()
    shutil.copy(right / "v_WalkRight_g03_c01.avi", videos / "Flying/v_Flying_g01_c01.avi")
    done = checked()
    assert done.status == 1
    assert any("not in the lists" in line for line in faults(done))


def test_lists_that_contradict_end_the_check(checked, small):
    lists = small / "ucfTrainTestlist"
    first = (lists / "trainlist01.txt").read_text().splitlines()[0].split()[0]
    with (lists / "testlist01.txt").open("a") as file:
        file.write(f"{first}\r\n")
    done = checked()
    assert done.status == 1
    assert "twice" in faults(done)[0]
    (lists / "testlist02.txt").write_text("../../etc/x.avi\n")
    done = checked()
    assert (done.status, "testlist02.txt" in done.one_line_error()) == (1, True)


def test_real_clips_whose_index_claims_too_much_are_remarked(call, subset):
    done = call(
        dataset, "check", "--dataset_path", subset / "UCF-101", "--split_path", subset / "ucfTrainTestlist"
    )
    assert done.status == 0, done.out
    assert "391 clips" in done.out
    assert len([line for line in remarks(done) if "its index claims" in line]) > 5
