"""A folder of class folders as a data set: classes, groups, folds, and what is wrong with it."""

import json
import os
import re
import shutil

import numpy as np
import pytest

import dataset as dataset_script
import test as test_script
import train
from extract_frames import extract_all
from splits.datasets import DataSettings, Listed, load_split
from splits.folder import draw_folds, natural, source
from splits.split import hold_out
from training import setup
from training.checkpoint import load_checkpoint
from utils.process import UserError
from video.reader import Video
from video.writer import write_video


def clips_at(folder, **names):
    """Empty files as clips, in folders of the classes."""
    for name, clips in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for clip in clips:
            (folder / name / clip).write_bytes(b"x")
    return folder


def numbered(*groups, each=2):
    return [f"{group}_{number}.mp4" for group in groups for number in range(each)]


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
        ("Jump/holiday_12.mp4", "Jump/holiday"),
        ("Jump/a_b_7.mov", "Jump/a_b"),
        ("Jump/holiday.mp4", "Jump/holiday"),
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
    names = ["10", "b", "2", "A", "a10", "a9", "B2", "é"]
    assert sorted(names, key=natural) == ["A", "a9", "a10", "b", "B2", "é", "2", "10"]


def test_folds_share_all_clips_out_and_no_group_is_on_both_sides(tmp_path):
    folder = clips_at(
        tmp_path / "clips",
        c10=numbered(*"abcdefg", each=3),
        c9=numbered(*"abcde"),
        c2=[*numbered("x", "y", each=7), "one.webm"],
    )
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").write_text("about these clips")
    (folder / "c9/readme.txt").write_text("about this class")
    data = DataSettings(dataset_path=folder)
    listed = Listed(data)
    assert (listed.name, listed.path, listed.numbers) == ("folder", None, (1, 2, 3, 4, 5))
    tested = []
    for number in listed.numbers:
        split = listed.split(number)
        assert split.classes == ["c2", "c9", "c10"]
        trained = {clip.group for clip in split.train}
        assert not trained & {clip.group for clip in split.test}
        assert {clip.label for clip in split.train} == {0, 1, 2}, "each class is trained in each"
        assert {clip.label for clip in split.test} >= {1, 2}
        assert sorted(clip.name for clip in split.train + split.test) == sorted(
            f"{name}/{path.name}"
            for name in split.classes
            for path in (folder / name).iterdir()
            if path.suffix != ".txt"
        )
        tested += [clip.name for clip in split.test]
    assert len(tested) == len(set(tested)) == 21 + 10 + 15
    assert [clip.name for clip in load_split(data, 2).test] == [clip.name for clip in listed.split(2).test]
    with pytest.raises(UserError, match="split number 6 does not exist; choose 1, 2, 3, 4 or 5"):
        listed.split(6)


def test_there_are_as_many_folds_as_a_class_has_groups(tmp_path):
    folder = clips_at(tmp_path / "clips", A=["1.mp4", "2.mp4"], B=["3.mp4", "4.mp4", "5.mp4"])
    assert draw_folds(folder).numbers == (1, 2, 3)
    with pytest.raises(UserError, match="choose 1, 2 or 3"):
        load_split(DataSettings(dataset_path=folder), 4)


def test_a_group_of_several_classes_lies_on_one_side(tmp_path):
    """People who do some of the actions each, and one action that few of them do."""
    rng = np.random.default_rng(0)
    names = {
        action: [
            f"person{person:02d}_{number}.mp4"
            for person in range(people)
            if person < 3 or rng.random() < 0.7
            for number in range(rng.integers(1, 4))
        ]
        for action, people in {"Jump": 12, "Run": 12, "Sit": 9, "Wave": 3}.items()
    }
    listed = Listed(
        DataSettings(dataset_path=clips_at(tmp_path / "clips", **names), group_pattern=r"person\d+")
    )
    sizes = []
    for number in listed.numbers:
        split = listed.split(number)
        assert not {clip.group for clip in split.train} & {clip.group for clip in split.test}
        assert {clip.label for clip in split.train} == {0, 1, 2, 3}, "each class is trained in each"
        kept, held = hold_out(split.train, 0.2, 0)
        assert not {clip.group for clip in kept} & {clip.group for clip in held}
        assert {clip.label for clip in kept} == {0, 1, 2, 3}
        sizes.append(len(split.test))
    assert len(sizes) == 5
    assert sum(sizes) == sum(map(len, names.values()))
    assert max(sizes) < 2 * min(sizes)
    (line,) = listed.describe()
    assert f"they test {min(sizes)} to {max(sizes)} clips each" in line
    assert "1 of the classes, the first Wave" in line


def test_classes_that_share_all_their_people_with_one_another_are_told(tmp_path):
    """Two people: one of them held out leaves the other to train on, in every class."""
    names = [f"person{person}_{number}.mp4" for person in range(2) for number in range(3)]
    folder = clips_at(tmp_path / "clips", A=names, B=names[:4])
    listed = Listed(DataSettings(dataset_path=folder, group_pattern=r"person\d+"))
    assert listed.numbers == (1, 2)
    with pytest.raises(UserError, match="is the only one of its class"):
        hold_out(listed.split(1).train, 0.2, 0)


def test_a_pattern_says_what_a_group_is(tmp_path):
    names = [f"s1_p{person}_{number}.mp4" for person in (1, 2, 3) for number in (1, 2)]
    folder = clips_at(tmp_path / "clips", A=names, B=names)
    whole = Listed(DataSettings(dataset_path=folder, group_pattern=r"p\d")).split(1)
    assert len(whole.test) == 4
    tested = {clip.group for clip in whole.test}
    assert len(tested) == 1
    assert {clip.label for clip in whole.test} == {0, 1}
    assert not tested & {clip.group for clip in whole.train}, "a person is on one side, whatever they do"
    bracket = Listed(DataSettings(dataset_path=folder, group_pattern=r"_p(\d)_")).split(1)
    assert {clip.group for clip in bracket.train + bracket.test} == set("123")
    every = Listed(DataSettings(dataset_path=folder, group_pattern=".+")).split(1)
    assert len({clip.group for clip in every.train + every.test}) == 6
    for pattern in ("p4", "_p(4)|.+"):
        with pytest.raises(UserError, match=rf"{re.escape(repr(pattern))}: not found in 's1_p1_1'"):
            Listed(DataSettings(dataset_path=folder, group_pattern=pattern))


def test_the_kind_of_a_data_set_is_told_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = clips_at(tmp_path / "mine" / "clips", A=["1.avi", "2.avi"], B=["3.avi", "4.avi"])
    data = DataSettings(dataset_path=folder)
    lists = folder.parent / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 A\n2 B\n")
    (lists / "trainlist01.txt").write_text("A/other.avi 1\n")
    (lists / "testlist01.txt").write_text("B/9.avi\n")
    # Lists of other clips are no lists for these.
    assert Listed(data).path is None
    assert f"the lists in {lists} do not name most of its clips" in Listed(data).describe()[0]
    # Nor are those that name one of four by chance.
    (lists / "testlist01.txt").write_text("B/3.avi\n")
    assert Listed(data).path is None
    for split in (1, 2, 3):
        (lists / f"trainlist{split:02d}.txt").write_text("A/1.avi 1\nA/2.avi 1\n")
        (lists / f"testlist{split:02d}.txt").write_text("B/3.avi\n")
    assert (Listed(data).name, Listed(data).path) == ("ucf101", lists)
    (line,) = Listed(data).describe()
    assert line.startswith(f"warning: 1 clips in {folder} are in none of the lists in {lists}")
    assert "the first B/4; --dataset folder takes all" in line
    (folder / "B/4.avi").unlink()
    assert Listed(data).describe() == []
    (folder / "B/4.avi").write_bytes(b"x")
    assert Listed(DataSettings(dataset_path=folder, dataset="folder")).path is None
    shutil.move(lists, tmp_path / "data/ucfTrainTestlist")
    assert str(Listed(data).path) == "data/ucfTrainTestlist"
    shutil.rmtree(tmp_path / "data")
    places = f"data/ucfTrainTestlist or {lists} or {folder}"
    with pytest.raises(FileNotFoundError, match=rf"{places}: .* unzip ucfTrainTestlist\.zip"):
        Listed(DataSettings(dataset_path=folder, dataset="ucf101"))
    # Loose beside the class folders.
    for name, text in (
        ("classInd", "1 A\n2 B\n"),
        ("trainlist01", "A/1.avi 1\nA/2.avi 1\n"),
        ("testlist01", "B/4.avi\n"),
    ):
        (folder / f"{name}.txt").write_text(text)
    assert Listed(data).path == folder


@pytest.mark.parametrize(
    "files",
    [
        {"classInd.txt": "1 A\n2 B\n"},
        {"classInd.txt": "hello\n"},
        {"A_test_split1.txt": "notes about the first split\n"},
    ],
)
def test_lists_that_are_wrong_can_be_done_without(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    folder = clips_at(tmp_path / "clips", A=["1.avi", "2.avi"], B=["3.avi", "4.avi"])
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"{folder}/.*; or do without .* --dataset folder"):
        Listed(DataSettings(dataset_path=folder))
    assert Listed(DataSettings(dataset_path=folder, dataset="folder")).numbers == (1, 2)


def test_a_folder_above_the_lists_is_told(tmp_path):
    folder = clips_at(tmp_path / "clips", A=["1.avi", "2.avi"], B=["3.avi", "4.avi"])
    Listed(DataSettings(dataset_path=folder)).keep(tmp_path / "run/lists")
    data = DataSettings(dataset_path=folder, split_path=tmp_path / "run")
    with pytest.raises(UserError, match=rf"no lists there, but in {tmp_path / 'run/lists'}"):
        Listed(data)


def test_files_that_do_not_end_as_videos_are_told(tmp_path):
    folder = clips_at(tmp_path / "clips", A=["1.ts", "2.flv", "3.mxf"], B=["3.wmv", "4.3gp", "notes.txt"])
    listed = Listed(DataSettings(dataset_path=folder))
    assert len(listed.split(1).train + listed.split(1).test) == 4
    assert "2 files in the class folders do not end as videos do" in listed.describe()[1]
    assert listed.describe()[1].endswith("the first A/3.mxf")


def test_classes_that_are_numbers_are_no_spellings(tmp_path):
    names = {name: ["1.mp4", "2.mp4"] for name in ("1_1", "11", "1-1")}
    with pytest.raises(UserError, match="two spellings"):
        Listed(DataSettings(dataset_path=clips_at(tmp_path / "clips", **names)))
    names.pop("1-1")
    assert len(Listed(DataSettings(dataset_path=clips_at(tmp_path / "two", **names))).split(1).classes) == 2


def no_folders(folder):
    clips_at(folder, A=[])
    (folder / "A").rmdir()
    (folder / "1.mp4").write_bytes(b"x")
    return "no class folders there; clips lie in a folder for each class"


def one_class(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"])
    return "A is the only class folder"


def one_clip(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=["3.mp4"])
    return r"B: all its clips \(1\) are of one group, '3', .* add clips out of another video$"


def one_name(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=["3.mp4", "3.avi"])
    return r"B: all its clips \(2\) are of one group, '3', .* add clips out of another video$"


def one_group(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=numbered("IMG", each=9))
    return r"B: all its clips \(9\) are of one group, 'IMG', .* --group_pattern '\.\+'"


def empty_folder(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=["notes.txt"])
    return r"B: no clips in this class folder, of \.avi, \.mp4"


def deeper(folder):
    clips_at(folder, train=[], test=[])
    clips_at(folder / "train", A=["1.mp4"])
    clips_at(folder / "test", A=["1.mp4"])
    return "test: no clips in this class folder, but videos in the folders in it.*with --dataset_path$"


def two_spellings(folder):
    clips_at(folder, **{"Push Up": ["1.mp4", "2.mp4"], "push_up": ["1.mp4", "2.mp4"]})
    return "Push Up and push_up look like one class in two spellings|push_up and Push Up look"


def video_and_frames(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=["1.mp4", "2.mp4"])
    clips_at(folder / "A", **{"1": ["0.jpg", "1.jpg"]})
    return "A/1: the frames of 1.mp4, which is there too"


def line_break(folder):
    clips_at(folder, A=["1.mp4", "a\nb.mp4"], B=["1.mp4", "2.mp4"])
    return r"A/a\\nb.mp4': a name with a line break"


def no_utf8(folder):
    clips_at(folder, A=["1.mp4", os.fsdecode(b"\xff.mp4")], B=["1.mp4", "2.mp4"])
    return "rename it"


def spaces_around(folder):
    clips_at(folder, **{" A": ["1.mp4", "2.mp4"], "B": ["1.mp4", "2.mp4"]})
    return "a space around the class; rename it"


def broken_link(folder):
    clips_at(folder, A=["1.mp4", "2.mp4"], B=["1.mp4", "2.mp4"])
    (folder / "A/3.mp4").symlink_to("gone.mp4")
    return "A/3.mp4: a link to gone.mp4, which is not there"


@pytest.mark.parametrize(
    "spoil",
    [
        no_folders, one_class, one_clip, one_name, one_group, empty_folder, deeper, two_spellings,
        video_and_frames, line_break, no_utf8, spaces_around, broken_link,
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_told_in_a_line(call, spoil, tmp_path):
    folder = tmp_path / "clips"
    message = spoil(folder)
    with pytest.raises(UserError, match=message):
        Listed(DataSettings(dataset_path=folder))
    done = call(train, "--dataset_path", folder, "--encoder", "tiny")
    assert done.status == 1
    assert str(folder) in done.one_line_error()


def test_wrong_flags_are_told_in_a_line(call, mine):
    done = call(train, "--dataset_path", mine, "--encoder", "tiny", "--group_pattern", "(")
    assert "'(' is no regular expression" in done.one_line_error()
    done = call(train, "--dataset_path", mine, "--encoder", "tiny", "--split_number", "5")
    assert "split number 5 does not exist; choose 1, 2 or 3" in done.one_line_error()
    done = call(train, "--dataset_path", mine, "--encoder", "tiny", "--split_path", mine)
    assert "classInd.txt: no such list file" in done.one_line_error()


FLAGS = ("--encoder", "tiny", "--img_dim", 32, "--sequence_length", 8, "--num_workers", 0, "--latent_dim", 8)


def test_all_folds_are_trained_and_a_test_finds_the_very_same(call, mine, tmp_path):
    flags = ("--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--split_number", "all", "--run_path", "run")
    done = call(train, *flags)
    assert done.status == 0, done.err
    assert f"{mine}: its folders are the classes: 12 clips of 2 classes, 3 folds over groups" in done.out
    *_, head, _, row = [line for line in done.out.splitlines() if line.startswith("|")]
    assert head.split("|")[3:-1] == [" split 1 ", " split 2 ", " split 3 ", " mean ", " 95 % interval "]
    predicted = [
        line.split(",")
        for number in (1, 2, 3)
        for line in (tmp_path / f"run/split{number}/test/predictions.csv").read_text().splitlines()[1:]
    ]
    assert len({line[0] for line in predicted}) == 12, "each clip is tested once"
    right = np.mean([line[4] == "1" for line in predicted])
    assert f"**{100 * right:.2f} %**" in row
    checkpoint = load_checkpoint(tmp_path / "model_checkpoints/split2/ConvLSTM_1.pth")
    assert checkpoint.classes == ["Walk 'right'", "wälk left"]
    about = json.loads((tmp_path / "run/split1/lists/dataset.json").read_text())
    assert about == {"dataset": "folder", "group_pattern": None}
    # A clip more would make other folds.
    shutil.copy(mine / "wälk left/-person 1_1.avi", mine / "wälk left/new.avi")
    tested = call(test_script, "--checkpoint_model", "model_checkpoints/split2/ConvLSTM_1.pth", *FLAGS[2:8])
    assert tested.status == 0, tested.err
    report = json.loads((tmp_path / "run/split2/test/report.json").read_text())
    again = json.loads((tmp_path / "run/split2/test-ConvLSTM_1/report.json").read_text())
    assert again["test_clips_sha256"] == report["test_clips_sha256"]
    assert again["figures"] == report["figures"]
    refused = call(
        test_script, "--checkpoint_model", "model_checkpoints/split2/ConvLSTM_1.pth", "--split_number", 1
    )
    assert "was trained on split 2" in refused.one_line_error()
    assert (tmp_path / "run/split1/lists/testlist02.txt").read_bytes() == (
        tmp_path / "run/split2/lists/testlist02.txt"
    ).read_bytes()
    shutil.rmtree(tmp_path / "run/split2/lists")
    gone = call(test_script, "--checkpoint_model", "model_checkpoints/split2/ConvLSTM_1.pth")
    assert "lists: no such folder; name the lists that training wrote" in gone.one_line_error()


def test_the_lists_are_those_that_were_trained_whatever_comes_while_encoding(
    call, mine, tmp_path, monkeypatch
):
    encode = setup.open_cache

    def slowly(*args, **options):
        for number in range(4):
            shutil.copy(mine / "wälk left/-person 1_1.avi", mine / f"wälk left/more{number}_1.avi")
        return encode(*args, **options)

    monkeypatch.setattr(setup, "open_cache", slowly)
    flags = ("--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--run_path", "run")
    assert call(train, *flags).status == 0
    rows = (tmp_path / "run/test/predictions.csv").read_text().splitlines()[1:]
    kept = (tmp_path / "run/lists/testlist01.txt").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == kept
    assert "more" not in (tmp_path / "run/lists/trainlist01.txt").read_text()


def test_a_run_goes_on_with_its_own_folds(call, mine, tmp_path):
    flags = ("--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--group_pattern", r"person \d")
    assert call(train, *flags).status == 0
    shutil.copy(mine / "wälk left/-person 1_1.avi", mine / "wälk left/-person 9_1.avi")
    done = call(train, "--resume")
    assert done.status == 0, done.err
    assert "no longer" not in done.err


def test_frames_of_own_clips_are_the_same_clips(call, mine, tmp_path):
    extract_all(mine, quality=95, workers=1)
    frames = mine.with_name(f"{mine.name}-frames")
    videos, images = (load_split(DataSettings(dataset_path=path), 1) for path in (mine, frames))
    assert [clip.name for clip in videos.test] == [clip.name for clip in images.test]
    assert all(clip.video.path.is_dir() for clip in images.test)


def test_a_copy_under_another_class_is_named(call, mine, tmp_path):
    shutil.copy(mine / "wälk left/-person 1_1.avi", mine / "Walk 'right'/-person 9_1.avi")
    named = ""
    for number in (1, 2, 3):
        run = tmp_path / f"run{number}"
        done = call(train, "--dataset_path", mine, *FLAGS, "--num_epochs", 1, "--split_number", number,
                    "--run_path", run)  # fmt: skip
        assert done.status == 0, done.err
        named += (run / "near_copies.csv").read_text() if (run / "near_copies.csv").is_file() else ""
        assert ("under another class" in done.out) == ("wälk" in named.split("test_clip")[-1])
    assert "Walk 'right'/-person 9_1.avi" in named


def test_near_copies_on_both_sides_of_a_split_are_named(call, toy, tmp_path):
    folder = tmp_path / "clips"
    for name in ("WalkLeft", "SitDown"):
        (folder / name).mkdir(parents=True)
        for group in range(1, 7):
            shutil.copy(toy / f"UCF-101/{name}/v_{name}_g{group:02d}_c01.avi", folder / name)
    flags = ("--dataset_path", folder, *FLAGS, "--num_epochs", 1)
    for number in (1, 2):
        run = tmp_path / f"run{number}"
        assert call(train, *flags, "--split_number", number, "--run_path", run).status == 0
        # The drawn figures stand in one scene, whatever they do.
        rows = (run / "near_copies.csv").read_text().splitlines()[1:] if list(run.glob("near*")) else []
        assert all(row.split("/")[0] != row.split(",")[1].split("/")[0] for row in rows)
    # Smaller, and compressed anew.
    video = Video(folder / "SitDown/v_SitDown_g03_c01.avi")
    frames = [np.ascontiguousarray(frame[::2, ::2]) for frame in video.frames()]
    write_video(folder / "SitDown/new.mp4", iter(frames), video.fps())
    named = []
    for number in range(1, 6):
        run = tmp_path / f"copies{number}"
        done = call(train, *flags, "--split_number", number, "--run_path", run)
        assert done.status == 0, done.err
        if "nearly the same as a training clip" in done.out:
            rows = (run / "near_copies.csv").read_text().splitlines()[1:]
            assert f"warning: {len(rows)} of" in done.out
            named += [row.split(",")[:2] for row in rows]
    pair = ["SitDown/new.mp4", "SitDown/v_SitDown_g03_c01.avi"]
    assert pair in named
    assert pair[::-1] in named


def test_clips_that_cannot_be_read_are_named(call, mine, tmp_path):
    for name in ("a_1.mp4", "b_1.mp4"):
        (mine / "wälk left" / name).write_bytes(b"no video")
    done = call(train, "--dataset_path", mine, *FLAGS, "--num_epochs", 1)
    assert done.status == 1
    error = done.one_line_error()
    assert "2 of 14 clips cannot be read" in error
    assert "dataset.py check" in error
    told = [line for line in done.out.splitlines() if line.startswith("cannot be read: ")]
    assert len(told) == 2
    checked = call(dataset_script, "check", "--dataset_path", mine)
    assert checked.status == 1
    assert [name for name in ("a_1.mp4", "b_1.mp4") if f"{name}: " in checked.out] == ["a_1.mp4", "b_1.mp4"]


def test_links_are_followed_and_told(call, mine, toy):
    outside = toy / "UCF-101/WalkLeft/v_WalkLeft_g01_c01.avi"
    (mine / "wälk left/linked.avi").symlink_to(outside)
    (mine / "Walk 'right'/within.avi").symlink_to(mine / "Walk 'right'/-person 1_1.avi")
    lines = Listed(DataSettings(dataset_path=mine)).describe()
    assert len(lines) == 2
    assert "1 clips are links that leave" in lines[1]
    assert "linked.avi" in lines[1]
