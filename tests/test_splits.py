from pathlib import Path

import pytest

from splits.datasets import DataSettings, load_split
from splits.split import (
    RANDOM,
    WHOLE,
    Clip,
    Shard,
    Split,
    hold_out,
    names_sha256,
    random_split,
    siblings,
    some_labels,
)
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
    found = {}
    for one in clips:
        found.setdefault(one.label, set()).add(one.group)
    return {label: len(groups) for label, groups in found.items()}


@pytest.mark.parametrize(
    ("fraction", "held"),
    [
        # Of 2, 3, 8 and 24 groups.
        (0.01, {0: 1, 1: 1, 2: 1, 3: 1}),
        (0.1, {0: 1, 1: 1, 2: 1, 3: 2}),
        (0.2, {0: 1, 1: 1, 2: 2, 3: 5}),
        (0.5, {0: 1, 1: 2, 2: 4, 3: 12}),
        (0.99, {0: 1, 1: 2, 2: 7, 3: 23}),
    ],
)
def test_so_many_groups_are_held_out_and_some_are_left(fraction, held):
    clips = clips_of(A=2, B=3, C=8, D=24)
    trained, validated = hold_out(clips, fraction, seed=1)
    assert groups_by_class(validated) == held
    assert groups_by_class(trained) == {label: (2, 3, 8, 24)[label] - held[label] for label in held}
    assert [one for one in clips if one in trained or one in validated] == clips
    assert len(trained) + len(validated) == len(clips)
    assert not {one.group for one in trained} & {one.group for one in validated}
    assert trained == [one for one in clips if one in trained], "in their order"


def test_the_only_group_of_a_class_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"the group v_B_g01 is the only one of its class"):
        hold_out(clips_of(A=2, B=1), 0.5, seed=1)
    with pytest.raises(ValueError, match="does not tell its group"):
        hold_out([clip("A/one.avi"), clip("A/two.avi")], 0.5, seed=1)


def test_a_group_is_read_off_the_name():
    assert clip("A/v_A_g07_c12.avi").group == clip("B/v_A_g07_c3.mp4").group_or_name == "v_A_g07"
    for name in ("A/v_A_g07.avi", "A/v_A_c01.avi", "A/v_A_gx_c01.avi", "A/x.avi"):
        assert clip(name).group_or_name == name
        with pytest.raises(ValueError, match="does not tell its group"):
            _ = clip(name).group


@pytest.mark.parametrize(
    ("fraction", "drawn"), [(0.001, [1, 1, 1]), (0.34, [2, 3, 8]), (0.6, [4, 5, 14]), (0.99, [6, 9, 24])]
)
def test_so_many_labels_of_each_class_are_kept(fraction, drawn):
    clips = clips_of(A=2, B=3, C=8)
    some = some_labels(clips, fraction, seed=1)
    assert [sum(one.label == label for one in some) for label in range(3)] == drawn
    assert some == [one for one in clips if one in some], "in their order, each once"


def test_a_fifth_of_all_clips_is_the_random_test():
    clips = clips_of(A=4, B=5)[::-1]
    split = Split(["A", "B"], clips[:20], clips[20:], 30)
    found = random_split(split, 3)
    assert (len(found.train), len(found.test)) == (22, 5)
    assert found.train == sorted(found.train, key=lambda one: one.name)
    assert found.test == sorted(found.test, key=lambda one: one.name)
    assert sorted(one.name for one in found.train + found.test) == sorted(one.name for one in clips)
    assert (found.classes, found.listed) == (["A", "B"], 30)
    again = random_split(Split(["A", "B"], clips[:3], clips[3:], 30), 3)
    assert again == found, "whatever side they were on"
    assert random_split(split, 4).test != found.test


def test_siblings_are_test_clips_with_a_group_in_training():
    first, second = clips_of(A=2)[:3], clips_of(A=2)[3:]
    assert siblings(Split(["A"], first, second, 6)) == 0
    assert siblings(Split(["A"], first[:1], first[1:] + second, 6)) == 2


def test_missing_clips_are_told_only_where_some_are():
    clips = clips_of(A=1, B=1)
    assert Split(["A", "B"], clips[:4], clips[4:], 6).missing() is None
    assert Split(["A", "B"], clips[:2], clips[2:3], 1234).missing() == (
        "3 of 1,234 listed clips found, 1 of 2 classes; going on with those"
    )


def test_the_same_names_in_the_same_order_have_the_same_digest():
    clips = clips_of(A=1)
    # Of sha256sum.
    assert names_sha256([clip("a"), clip("b")]) == (
        "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    )
    assert names_sha256(clips) == names_sha256(clips_of(A=1))
    assert names_sha256(clips) != names_sha256(clips[::-1]) != names_sha256(clips[1:])


def test_parts_of_a_data_set():
    clips = clips_of(A=3)[::-1]
    names = sorted(one.name for one in clips)
    assert (WHOLE, WHOLE.suffix) == (Shard(1, 1), "")
    assert [one.name for one in WHOLE.part(clips)] == names
    assert [one.name for one in Shard(2, 4).part(clips)] == [names[1], names[5]]
    assert [one.name for one in Shard(4, 4).part(clips)] == [names[3], names[7]]
    assert (Shard.parse("1/1"), Shard.parse("2/8"), Shard.parse("8/8")) == (WHOLE, Shard(2, 8), Shard(8, 8))
    assert (Shard(1, 2).suffix, Shard(2, 2).suffix) == ("-1of2", "-2of2")
    for wrong in ("0/1", "0/0", "2/1", "1", "1/", "/2", "-1/2", "1/2/3", "a/b", ""):
        with pytest.raises(ValueError, match="does not exist"):
            Shard.parse(wrong)


@pytest.fixture
def lists(tmp_path):
    """A data set without clips, and lists to write to."""
    folder = tmp_path / "lists"
    folder.mkdir()
    (tmp_path / "clips").mkdir()

    def write(train, test):
        (folder / "classInd.txt").write_text("1 A\n2 B\n")
        for number in (1, 2, 3):
            (folder / f"trainlist0{number}.txt").write_text("".join(f"{line}\n" for line in train))
            (folder / f"testlist0{number}.txt").write_text("".join(f"{line}\n" for line in test))
        return tmp_path / "clips", folder

    return write


@pytest.mark.parametrize(
    ("train", "test", "example"),
    [
        (["A/one.avi 1", "B/two.avi 2"], ["B/three.avi"], "A/one"),
        (["B/two.avi 2"], [], "B/two"),
        ([], ["B/three.avi", "A/four.avi"], "B/three"),
        ([], [], "<Class>/<clip>"),
    ],
)
def test_where_no_clip_is_found_the_error_says_where_the_first_should_be(lists, train, test, example):
    clips, folder = lists(train, test)
    with pytest.raises(FileNotFoundError) as caught:
        load_split(DataSettings(dataset_path=clips, split_path=folder), 1)
    assert str(caught.value) == (
        f"none of the {len(train + test)} listed clips is in {clips}; expected for example "
        f"{clips}/{example}.avi, or frames in the folder {clips}/{example}"
    )


def test_one_side_of_a_split_is_enough(lists):
    clips, folder = lists(["A/one.avi 1"], ["B/two.avi"])
    (clips / "A").mkdir()
    (clips / "A/one.avi").write_bytes(b"x")
    split = load_split(DataSettings(dataset_path=clips, split_path=folder), 3)
    assert ([one.name for one in split.train], split.test, split.listed) == (["A/one.avi"], [], 2)
    (clips / "A/one.avi").unlink()
    (clips / "B/two").mkdir(parents=True)
    split = load_split(DataSettings(dataset_path=clips, split_path=folder), 2)
    assert (split.train, [one.video.path for one in split.test]) == ([], [clips / "B/two"])


def test_what_is_no_class_folder_is_no_fault(lists):
    clips, folder = lists(["A/one.avi 1"], [])
    (clips / "A/one").mkdir(parents=True)
    (clips / ".cache").mkdir()
    (clips / "notes.txt").write_text("about these clips")
    assert len(load_split(DataSettings(dataset_path=clips, split_path=folder), 1).train) == 1
    for name in ("D", "C"):
        (clips / name).mkdir()
    with pytest.raises(ValueError, match="the class C is not in"):
        load_split(DataSettings(dataset_path=clips, split_path=folder), 1)


def test_splits_and_folders_that_are_not_there(lists, tmp_path):
    clips, folder = lists(["A/one.avi 1"], [])
    for number in (0, 4, "1", "all"):
        with pytest.raises(ValueError, match="does not exist; choose 1, 2 or 3"):
            load_split(DataSettings(dataset_path=clips, split_path=folder), number)
    with pytest.raises(FileNotFoundError, match="--split_path"):
        load_split(DataSettings(dataset_path=clips, split_path=tmp_path / "gone"), 1)
    with pytest.raises(FileNotFoundError, match="--dataset_path"):
        load_split(DataSettings(dataset_path=tmp_path / "gone", split_path=folder), 1)
    (folder / "trainlist02.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainlist02.txt: no such list"):
        load_split(DataSettings(dataset_path=clips, split_path=folder), 2)


def test_the_random_split_is_drawn_by_the_seed_from_both_lists(lists):
    names = [f"A/v_A_g{number:02d}_c01" for number in range(20)]
    clips, folder = lists([f"{name}.avi 1" for name in names[5:]], [f"{name}.avi" for name in names[:5]])
    for name in names:
        (clips / name).mkdir(parents=True)

    def drawn(**seed):
        split = load_split(DataSettings(dataset_path=clips, split_path=folder), RANDOM, **seed)
        assert (len(split.train), len(split.test)) == (16, 4)
        return [clip.name for clip in split.train], [clip.name for clip in split.test]

    expected = random_split(load_split(DataSettings(dataset_path=clips, split_path=folder), 1), 0)
    assert drawn() == drawn(seed=0) != drawn(seed=1)
    assert drawn()[1] == [clip.name for clip in expected.test]
    for path in folder.glob("*list0[23].txt"):
        path.unlink()
    assert drawn()[1] == [clip.name for clip in expected.test], "the first split's lists are enough"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 A\n\n3 B\n", "line 3: '3 B' is not '2 <Class>'"),
        ("0 A\n", "line 1"),
        ("1 A\n2 a/b\n", "line 2"),
        ("1 A\n2 a\\\\b\n", "line 2"),
        ("1 A\n2 .\n", "line 2"),
        ("1 A\n2 ..\n", "line 2"),
        ("1 A\n2\n", "line 2"),
        ("one A\n", "line 1"),
        ("1 A\n2 A\n", "line 2: the class A stands there twice"),
        ("\n \n", "names no class"),
        ("", "names no class"),
    ],
)
def test_wrong_lists_of_classes(tmp_path, text, message):
    (tmp_path / "classInd.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classInd.txt")


def test_lists_may_have_blank_lines_and_windows_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"1  A \r\n\r\n2 B b\r\n")
    assert read_classes(path) == ["A", "B b"]
    path.write_bytes(b"\r\nB/one.avi 2\r\nA/two.avi 1")
    assert read_list(path, ["A", "B"], labelled=True) == [("B/one.avi", 1), ("A/two.avi", 0)]
    path.write_bytes(b"B/one.avi\n \nA/two.avi \n")
    assert read_list(path, ["A", "B"], labelled=False) == [("B/one.avi", 1), ("A/two.avi", 0)]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_classes(path)


@pytest.mark.parametrize(
    ("line", "labelled", "message"),
    [
        ("A/x.avi 1 1", True, "is not '<Class>/<clip>.avi <label>'"),
        ("A/x.avi", True, "is not '<Class>/<clip>.avi <label>'"),
        ("A/x.avi 1", False, "is not '<Class>/<clip>.avi'"),
        ("x.avi", False, "is not"),
        ("A/b/x.avi", False, "is not"),
        ("../x.avi", False, "is not"),
        ("A/..", False, "is not"),
        ("A\\x.avi", False, "is not"),
        ("A/b\\x.avi", False, "is not"),
        ("A/x", False, "is not"),
        ("A/x 1", True, "is not"),
        ("C/x.avi", False, "the class C is not in classInd.txt"),
        ("B/x.avi 1", True, "label 1 is not that of B in classInd.txt, 2"),
        ("A/x.avi 0", True, "label 0 is not that of A in classInd.txt, 1"),
    ],
)
def test_wrong_lines_of_a_list(tmp_path, line, labelled, message):
    path = tmp_path / "list.txt"
    path.write_text(f"A/good.avi{' 1' if labelled else ''}\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3") as caught:
        read_list(path, ["A", "B"], labelled=labelled)
    assert message in str(caught.value)
