"""A folder of class folders as a data set: classes, groups, folds, and what is wrong with it."""

import json
import os
import shutil

import numpy as np
import pytest

import dataset as dataset_script
import test as test_script
import train
from extract_frames import extract_all
from splits.datasets import DataSettings, Listed
from splits.folder import natural, source
from splits.split import hold_out
from training.checkpoint import load_checkpoint
from utils.process import UserError

FLAGS = ("--encoder", "tiny", "--img_dim", 32, "--sequence_length", 8, "--num_workers", 0, "--latent_dim", 8)
TWO = {"A": ["1.avi", "2.avi"], "B": ["3.avi", "4.avi"]}


def clips_at(folder, **names):
    """Empty files as clips, in folders of the classes."""
    for name, clips in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for clip in clips:
            (folder / name / clip).write_bytes(b"x")
    return folder


def numbered(*groups, each=2):
    return [f"{group}_{number}.mp4" for group in groups for number in range(each)]


def listed_at(folder, **settings):
    return Listed(DataSettings(dataset_path=folder, **settings))


def names(clips):
    return [clip.name for clip in clips]


@pytest.fixture
def mine(toy, tmp_path):
    """Own clips, without lists: 2 classes of 3 groups of 2 clips, named in three ways."""
    folder = tmp_path / "my clips"
    for name, source_class in (("wälk left", "WalkLeft"), ("Walk 'right'", "WalkRight")):
        (folder / name).mkdir(parents=True)
        for group in (1, 2, 3):
            for number in (1, 2):
                path = toy / "UCF-101" / source_class / f"v_{source_class}_g{2 * group + number:02d}_c01.avi"
                shutil.copy(path, folder / name / f"-person {group}_{number}.avi")
    return folder


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("Jump/v_Jump_g03_c12.avi", "Jump/v_Jump_g03"),
        ("Jump/a_b_7.mov", "Jump/a_b"),
        ("Run/holiday.mp4", "Run/holiday"),
        ("Run/12.mp4", "Run/12"),
        ("Run/_12.mp4", "Run/_12"),
        ("Run/take 2.mp4", "Run/take 2"),
        ("run/Film_3_run_f_cm_np1_fr_med_4.avi", "run/Film_3"),
    ],
)
def test_the_group_of_a_name(name, group):
    assert source(name) == group


def test_names_are_sorted_as_people_do():
    assert sorted(["10", "b", "2", "A", "a10", "a9", "B2", "é"], key=natural) == [
        "A", "a9", "a10", "b", "B2", "é", "2", "10",
    ]  # fmt: skip


def test_folds_share_all_clips_out_and_no_group_is_on_both_sides(tmp_path):
    classes = {
        "c10": numbered(*"abcdefg", each=3), "c9": numbered(*"abcde"),
        "c2": [*numbered("x", "y", each=7), "one.webm"],
    }  # fmt: skip
    folder = clips_at(tmp_path / "clips", **classes)
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").write_text("about these clips")
    listed = listed_at(folder)
    assert (listed.name, listed.path, listed.numbers) == ("folder", None, (1, 2, 3, 4, 5))
    every = sorted(f"{name}/{clip}" for name, clips in classes.items() for clip in clips)
    tested = []
    for number in listed.numbers:
        split = listed.split(number)
        assert split.classes == ["c2", "c9", "c10"]
        assert not {clip.group for clip in split.train} & {clip.group for clip in split.test}
        assert {clip.label for clip in split.train} == {0, 1, 2}, "each class is trained in each"
        assert {clip.label for clip in split.test} >= {1, 2}
        assert sorted(names(split.train + split.test)) == every
        tested += names(split.test)
    assert sorted(tested) == every
    assert names(Listed(listed.data).split(2).test) == names(listed.split(2).test), "drawn the same again"


def test_there_are_as_many_folds_as_a_class_has_groups(tmp_path):
    folder = clips_at(tmp_path / "clips", A=["1.mp4", "2.mp4"], B=["3.mp4", "4.mp4", "5.mp4"])
    with pytest.raises(UserError, match="split number 4 does not exist; choose 1, 2 or 3"):
        listed_at(folder).split(4)


def test_a_group_of_several_classes_lies_on_one_side(tmp_path):
    """People who do some of the actions each, and one action that few of them do."""
    rng = np.random.default_rng(0)
    clips = {
        action: [
            f"person{person:02d}_{number}.mp4"
            for person in range(people)
            if person < 3 or rng.random() < 0.7
            for number in range(rng.integers(1, 4))
        ]
        for action, people in {"Jump": 12, "Run": 12, "Sit": 9, "Wave": 3}.items()
    }
    listed = listed_at(clips_at(tmp_path / "clips", **clips), group_pattern=r"person\d+")
    sizes = []
    for number in listed.numbers:
        split = listed.split(number)
        trained, held = hold_out(split.train, 0.2, 0)
        for one, other in ((split.train, split.test), (trained, held)):
            assert not {clip.group for clip in one} & {clip.group for clip in other}
            assert {clip.label for clip in one} == {0, 1, 2, 3}, "each class is trained in each"
        sizes.append(len(split.test))
    assert (len(sizes), sum(sizes)) == (5, sum(map(len, clips.values())))
    assert max(sizes) < 3 * min(sizes)
    (line,) = listed.describe()
    assert f"they test {min(sizes)} to {max(sizes)} clips each" in line
    assert "1 of the classes, the first Wave" in line


def test_a_pattern_says_what_a_group_is(tmp_path):
    clips = [f"s1_p{person}_{number}.mp4" for person in (1, 2, 3) for number in (1, 2)]
    folder = clips_at(tmp_path / "clips", A=clips, B=clips)
    for pattern, groups in ((r"p\d", {"p1", "p2", "p3"}), (r"_p(\d)_", set("123"))):
        split = listed_at(folder, group_pattern=pattern).split(1)
        assert {clip.group for clip in split.train + split.test} == groups
    with pytest.raises(UserError, match=r"'_p\(4\)\|\.\+': not found in 's1_p1_1'"):
        listed_at(folder, group_pattern="_p(4)|.+")


def test_the_kind_of_a_data_set_is_told_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = clips_at(tmp_path / "mine" / "clips", **TWO)
    lists = folder.parent / "ucfTrainTestlist"

    def write(path, train, test):
        path.mkdir(exist_ok=True)
        (path / "classInd.txt").write_text("1 A\n2 B\n")
        for split in (1, 2, 3):
            (path / f"trainlist{split:02d}.txt").write_text(train)
            (path / f"testlist{split:02d}.txt").write_text(test)

    write(lists, "A/other.avi 1\n", "B/3.avi\n")
    assert listed_at(folder).path is None, "lists of other clips, but for one of four by chance"
    assert f"the lists in {lists} are not used" in listed_at(folder).describe()
    write(lists, "A/1.avi 1\nA/2.avi 1\n", "B/3.avi\n")
    assert (listed_at(folder).name, listed_at(folder).path) == ("ucf101", lists)
    (line,) = listed_at(folder).describe()
    assert line.startswith(f"warning: 1 clips in {folder} are in none of the lists in {lists}")
    assert "the first B/4; --dataset folder takes all" in line
    assert listed_at(folder, dataset="folder").path is None
    (folder / "B/4.avi").unlink()
    assert listed_at(folder).describe() == []
    shutil.move(lists, tmp_path / "data/ucfTrainTestlist")
    assert str(listed_at(folder).path) == "data/ucfTrainTestlist"
    shutil.rmtree(tmp_path / "data")
    places = f"data/ucfTrainTestlist or {lists} or {folder}"
    with pytest.raises(FileNotFoundError, match=rf"{places}: .* unzip ucfTrainTestlist\.zip"):
        listed_at(folder, dataset="ucf101")
    write(folder, "A/1.avi 1\nA/2.avi 1\n", "B/3.avi\n")
    assert listed_at(folder).path == folder, "loose beside the class folders"


@pytest.mark.parametrize("name", ["classInd.txt", "A_test_split1.txt"])
def test_lists_that_are_wrong_can_be_done_without(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = clips_at(tmp_path / "clips", **TWO)
    (folder / name).write_text("hello\n")
    with pytest.raises(UserError, match=rf"{folder}/.*; or do without .* --dataset folder"):
        listed_at(folder)
    assert listed_at(folder, dataset="folder").numbers == (1, 2)


def test_files_that_do_not_end_as_videos_are_told(tmp_path):
    folder = clips_at(tmp_path / "clips", A=["1.ts", "2.flv", "3.mxf"], B=["3.wmv", "4.3gp", "notes.txt"])
    listed = listed_at(folder)
    assert len(listed.split(1).train + listed.split(1).test) == 4
    line = listed.describe()[1]
    assert line.startswith("2 files are left out")
    assert line.endswith("A/3.mxf")


CLIPS = ["1.mp4", "2.mp4"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "no class folders there; clips lie in a folder for each class"),
        ({"A": CLIPS}, "A is the only class folder"),
        ({"A": CLIPS, "B": ["3.mp4"]}, "B: it has 1 clip, and a class takes 2 or more; add some"),
        ({"A": CLIPS, "B": ["3.mp4", "3.avi"]}, r"B: all its clips \(2\) are of one group, '3'; add clips"),
        ({"A": CLIPS, "B": numbered("IMG", each=9)}, r"of one group, 'IMG'; .* --group_pattern '\.\+'"),
        ({"A": CLIPS, "B": ["notes.txt"]}, r"B: no clips in this class folder, of \.avi, \.mp4"),
        ({"A": [], "B": [], "A/Jump": CLIPS}, "A: no clips in this class folder.*--dataset_path"),
        ({"A": CLIPS, "B": CLIPS, "A/1": ["0.jpg"]}, "A/1: frames of a video that is there too"),
        ({"A": ["1.mp4", "a\nb.mp4"], "B": CLIPS}, r"A/a\\nb.mp4'.* rename it"),
        ({"A": ["1.mp4", os.fsdecode(b"\xff.mp4")], "B": CLIPS}, "rename it"),
        ({" A": CLIPS, "B": CLIPS}, "rename it"),
        # But 1_1 is not 11.
        ({"1_1": CLIPS, "11": CLIPS, "Push Up": CLIPS, "push_up": CLIPS}, "ush_?.?[Uu]p look like one class"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_told_in_a_line(call, classes, message, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    clips_at(folder, **classes)
    with pytest.raises(UserError, match=message):
        listed_at(folder)
    done = call(train, "--dataset_path", folder, "--encoder", "tiny")
    assert done.status == 1
    assert str(folder) in done.one_line_error()


def test_links_are_followed_and_a_broken_one_is_told(mine, toy):
    (mine / "wälk left/linked.avi").symlink_to(toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi")
    listed = listed_at(mine)
    assert "wälk left/linked.avi" in names(listed.split(1).clips)
    assert "1 clips are links that leave" in listed.describe()[1]
    (mine / "wälk left/broken.avi").symlink_to("gone.avi")
    with pytest.raises(FileNotFoundError, match=r"broken\.avi: a link to what is not there, gone\.avi"):
        listed_at(mine)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group_pattern", "("], "'(' is no regular expression"),
        (["--split_number", "5"], "split number 5 does not exist; choose 1, 2 or 3"),
        (["--split_path", "."], "classInd.txt: no such list file"),
    ],
)
def test_wrong_flags_are_told_in_a_line(call, mine, flags, message):
    done = call(train, "--dataset_path", mine, "--encoder", "tiny", *flags)
    assert message in done.one_line_error()


def test_all_folds_are_trained_and_a_test_finds_the_very_same(call, mine, tmp_path):
    flags = ("--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--split_number", "all", "--run_path", "run")
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert f"{mine}: its folders are the classes: 12 clips of 2 classes, 3 folds over groups" in done.out
    *_, head, _, row = [line for line in done.out.splitlines() if line.startswith("|")]
    assert head.split("|")[3:-1] == [" split 1 ", " split 2 ", " split 3 ", " mean ", " 95 % interval "]
    run = tmp_path / "run"
    predicted = [
        line.split(",")
        for number in (1, 2, 3)
        for line in (run / f"split{number}/test/predictions.csv").read_text().splitlines()[1:]
    ]
    assert len({line[0] for line in predicted}) == 12, "each clip is tested once"
    right = np.mean([line[4] == "1" for line in predicted])
    assert f"**{100 * right:.2f} %**" in row
    model = "model_checkpoints/split2/ConvLSTM_1.pth"
    assert load_checkpoint(tmp_path / model).classes == ["Walk 'right'", "wälk left"]
    # A clip more would make other folds.
    shutil.copy(mine / "wälk left/-person 1_1.avi", mine / "wälk left/new.avi")
    tested = call(test_script, "--checkpoint_model", model, *FLAGS[2:8])
    assert tested.status == 0, tested.err
    report, again = (
        json.loads((run / "split2" / name / "report.json").read_text())
        for name in ("test", "test-ConvLSTM_1")
    )
    assert again["test_clips_sha256"] == report["test_clips_sha256"]
    assert again["figures"] == report["figures"]
    refused = call(test_script, "--checkpoint_model", model, "--split_number", 1)
    assert "was trained on split 2" in refused.one_line_error()
    shutil.rmtree(run / "split2/lists")
    gone = call(test_script, "--checkpoint_model", model)
    assert "lists: no such folder; name the lists that training wrote" in gone.one_line_error()


def test_a_run_goes_on_with_its_own_folds(call, mine, tmp_path):
    flags = ("--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--group_pattern", r"person \d")
    assert call(train, *flags).status == 0
    shutil.copy(mine / "wälk left/-person 1_1.avi", mine / "wälk left/-person 9_1.avi")
    done = call(train, "--resume")
    assert done.status == 0, done.err
    assert "no longer" not in done.err


def test_frames_of_own_clips_are_the_same_clips(mine):
    extract_all(mine, quality=95, workers=1)
    videos, images = (listed_at(path).split(1) for path in (mine, mine.with_name(f"{mine.name}-frames")))
    assert names(videos.test) == names(images.test)
    assert all(clip.video.path.is_dir() for clip in images.test)


def test_clips_that_cannot_be_read_are_named(call, mine):
    for name in ("a_1.mp4", "b_1.mp4"):
        (mine / "wälk left" / name).write_bytes(b"no video")
    done = call(train, "--dataset_path", mine, *FLAGS, "--num_epochs", 1)
    assert done.status == 1
    assert "2 of 14 clips cannot be read" in done.one_line_error()
    assert done.out.count("cannot be read: ") == 2
    checked = call(dataset_script, "check", "--dataset_path", mine)
    assert checked.status == 1
    assert all(f"{name}: " in checked.out for name in ("a_1.mp4", "b_1.mp4"))
