"""UCF-101's lists, and splits of clips."""

from pathlib import Path

import pytest

from splits.datasets import DataSettings, Listed
from splits.split import Clip, Split, hold_out, names_sha256
from splits.ucf101 import read_classes, read_list, source
from video.reader import Video


def clip(name, label=0):
    return Clip(name, label, Video(Path(name)), source(name))


def clips_of(**groups):
    """So many groups of each class, of three clips each."""
    return [
        clip(f"{name}/v_{name}_g{group:02d}_c{number:02d}.avi", label)
        for label, (name, count) in enumerate(groups.items())
        for group in range(1, count + 1)
        for number in range(1, 4)
    ]


def groups_by_class(clips):
    return [len({one.group for one in clips if one.label == label}) for label in range(4)]


@pytest.mark.parametrize(
    ("fraction", "held"),
    [(0.01, [1, 1, 1, 1]), (0.1, [1, 1, 1, 2]), (0.2, [1, 1, 2, 5]), (0.99, [1, 2, 7, 23])],
)
def test_so_many_groups_are_held_out_and_some_are_left(fraction, held):
    clips = clips_of(A=2, B=3, C=8, D=24)
    trained, validated = hold_out(clips, fraction, seed=1)
    assert groups_by_class(validated) == held
    assert groups_by_class(trained) == [all_ - out for all_, out in zip((2, 3, 8, 24), held, strict=True)]
    assert [one for one in clips if one in trained or one in validated] == clips
    assert not {one.group for one in trained} & {one.group for one in validated}
    assert trained == [one for one in clips if one in trained], "in their order"


def test_what_cannot_be_held_out_is_told():
    with pytest.raises(ValueError, match=r"the group v_B_g01 is the only one of its class"):
        hold_out(clips_of(A=2, B=1), 0.5, seed=1)
    with pytest.raises(ValueError, match="does not tell its group"):
        hold_out([clip("A/one.avi"), clip("A/two.avi")], 0.5, seed=1)


def test_a_group_is_read_off_the_name():
    assert clip("A/v_A_g07_c12.avi").group == clip("B/v_A_g07_c3.mp4").group_or_name == "v_A_g07"
    for name in ("A/v_A_g07.avi", "A/v_A_c01.avi", "A/v_A_gx_c01.avi", "A/x.avi"):
        assert (clip(name).source, clip(name).group_or_name) == (None, name)


def test_missing_clips_are_counted():
    first, second = clips_of(A=2)[:3], clips_of(A=2)[3:]
    assert Split(["A"], first, second, 6).missing() is None
    assert Split(["A", "B"], first, [], 1234).missing().startswith("3 of 1,234 listed clips found, 1 of 2 cl")


def test_the_digest_of_names_is_that_of_sha256sum():
    assert names_sha256([clip("a"), clip("b")]) == (
        "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    )


@pytest.fixture
def lists(tmp_path):
    """Settings of a data set without clips, whose lists are written."""
    folder = tmp_path / "lists"
    folder.mkdir()
    (tmp_path / "clips").mkdir()

    def write(train, test):
        (folder / "classInd.txt").write_text("1 A\n2 B\n")
        for number in (1, 2, 3):
            (folder / f"trainlist0{number}.txt").write_text("".join(f"{line}\n" for line in train))
            (folder / f"testlist0{number}.txt").write_text("".join(f"{line}\n" for line in test))
        return DataSettings(dataset_path=tmp_path / "clips", split_path=folder)

    return write


@pytest.mark.parametrize(
    ("train", "test", "example"),
    [
        (["A/one.avi 1", "B/two.avi 2"], ["B/three.avi"], "A/one"),
        ([], ["B/three.avi", "A/four.avi"], "B/three"),
        ([], [], "<Class>/<clip>"),
    ],
)
def test_where_no_clip_is_found_the_error_says_where_the_first_should_be(lists, train, test, example):
    data = lists(train, test)
    with pytest.raises(FileNotFoundError) as caught:
        Listed(data).split(1)
    place = data.dataset_path / example
    assert f"none of the {len(train + test)} listed clips" in str(caught.value)
    assert f"expected for example {place}.avi, or frames in the folder {place}" in str(caught.value)


def test_one_side_of_a_split_is_enough_as_a_video_or_as_frames(lists):
    data = lists(["A/one.avi 1"], ["B/two.avi"])
    clips = data.dataset_path
    (clips / "A").mkdir()
    (clips / "A/one.avi").write_bytes(b"x")
    (clips / ".cache").mkdir()
    (clips / "notes.txt").write_text("about these clips")
    split = Listed(data).split(3)
    assert ([one.name for one in split.train], split.test, split.listed) == (["A/one.avi"], [], 2)
    (clips / "A/one.avi").unlink()
    (clips / "B/two").mkdir(parents=True)
    split = Listed(data).split(2)
    assert (split.train, [one.video.path for one in split.test]) == ([], [clips / "B/two"])
    (clips / "C").mkdir()
    with pytest.raises(ValueError, match="the class C is not in"):
        Listed(data).split(1)


def test_splits_and_folders_that_are_not_there(lists, tmp_path):
    data = lists(["A/one.avi 1"], [])
    for number in (0, 4, "1", "all"):
        with pytest.raises(ValueError, match="does not exist; choose 1, 2 or 3"):
            Listed(data).split(number)
    with pytest.raises(FileNotFoundError, match="--split_path"):
        Listed(DataSettings(dataset_path=data.dataset_path, split_path=tmp_path / "gone")).split(1)
    with pytest.raises(FileNotFoundError, match="--dataset_path"):
        Listed(DataSettings(dataset_path=tmp_path / "gone", split_path=data.split_path)).split(1)
    (data.split_path / "trainlist02.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainlist02.txt: no such list"):
        Listed(data).split(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1 A\n\n3 B\n", "line 3: '3 B' is not '2 <Class>'"),
        (b"0 A\n", "line 1"),
        (b"1 A\n2 a/b\n", "line 2"),
        (b"1 A\n2 a\\b\n", "line 2"),
        (b"1 A\n2 ..\n", "line 2"),
        (b"1 A\n2\n", "line 2"),
        (b"1 A\n2 A\n", "line 2: the class A stands there twice"),
        (b"\n \n", "names no class"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_wrong_lists_of_classes(tmp_path, text, message):
    (tmp_path / "classInd.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classInd.txt")


def test_lists_may_have_blank_lines_windows_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf1  A \r\n\r\n2 B b\r\n")
    assert read_classes(path) == ["A", "B b"]
    path.write_bytes(b"\r\nB/one.avi 2\r\nA/two.avi 1")
    assert read_list(path, ["A", "B"], labeled=True) == [("B/one.avi", 1), ("A/two.avi", 0)]
    path.write_bytes(b"B/one.avi\n \nA/two.avi \n")
    assert read_list(path, ["A", "B"], labeled=False) == [("B/one.avi", 1), ("A/two.avi", 0)]


@pytest.mark.parametrize(
    ("line", "labeled", "message"),
    [
        ("A/x.avi 1 1", True, "is not '<Class>/<clip>.avi <label>'"),
        ("A/x.avi", True, "is not '<Class>/<clip>.avi <label>'"),
        ("A/x.avi 1", False, "is not '<Class>/<clip>.avi'"),
        ("x.avi", False, "is not"),
        ("A/b/x.avi", False, "is not"),
        ("../x.avi", False, "is not"),
        ("A/b\\x.avi", False, "is not"),
        ("A/x", False, "is not"),
        ("C/x.avi", False, "the class C is not in classInd.txt"),
        ("B/x.avi 1", True, "label 1 is not that of B in classInd.txt, 2"),
    ],
)
def test_wrong_lines_of_a_list(tmp_path, line, labeled, message):
    path = tmp_path / "list.txt"
    path.write_text(f"A/good.avi{' 1' if labeled else ''}\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        read_list(path, ["A", "B"], labeled=labeled)
    assert message in str(caught.value)
