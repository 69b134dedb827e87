"""HMDB-51's lists, in a tree of their exact form."""

import shutil

import pytest

import dataset as dataset_script
from splits import hmdb51
from splits.datasets import DataSettings, Listed


@pytest.fixture
def tree(toy, tmp_path):
    """Two classes of 4 films of 2 clips: lists with trained, tested and unused ones, and clips."""
    lists = tmp_path / "data/testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for name, source in (("walk_left", "WalkLeft"), ("clap", "WalkRight")):
        folder = tmp_path / "data/hmdb51_org" / name
        folder.mkdir(parents=True)
        lines = {1: "", 2: "", 3: ""}
        for number in range(8):
            film = number // 2
            clip = f"#{film}_(HQ)_Film_&_more_{name}_f_cm_np1_fr_med_{number % 2}.avi"
            shutil.copy(toy / f"UCF-101/{source}/v_{source}_g{number + 1:02d}_c01.avi", folder / clip)
            for split in lines:
                lines[split] += f"{clip} {2 if film == split else 0 if film == 0 and split > 1 else 1} \n"
        for split, text in lines.items():
            (lists / f"{name}_test_split{split}.txt").write_text(text)
    return tmp_path / "data/hmdb51_org"


def test_lists_are_read_as_they_are_released(call, tree, monkeypatch):
    monkeypatch.chdir(tree.parent.parent)
    listed = Listed(DataSettings(dataset_path=tree))
    assert (listed.name, listed.numbers) == ("hmdb51", (1, 2, 3))
    first, second = listed.split(1), listed.split(2)
    assert first.classes == ["clap", "walk_left"]
    assert (len(first.train), len(first.test), first.missing()) == (12, 4, None)
    assert (len(second.train), len(second.test), second.missing()) == (8, 4, None)
    films = {clip.group for clip in first.test}
    assert films == {"clap/#1_(HQ)_Film_&_more", "walk_left/#1_(HQ)_Film_&_more"}
    assert not films & {clip.group for clip in first.train}
    checked = call(dataset_script, "check", "--dataset_path", tree)
    assert "16 clips" in checked.out
    shutil.rmtree(tree.parent / "testTrainMulti_7030_splits")
    with pytest.raises(FileNotFoundError, match=r"run data/download_hmdb51\.sh"):
        Listed(DataSettings(dataset_path=tree, dataset="hmdb51"))


@pytest.mark.parametrize(
    ("name", "film"),
    [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair/April_09"),
        ("climb/(HQ)_Rock_Climbing_climb_f_cm_np1_le_med_12.avi", "climb/(HQ)_Rock_Climbing"),
        ("dive/a_dive_b_dive_f_nm_np2_ri_bad_3.avi", "dive/a_dive_b"),
        ("dive/a_run_f_nm_np2_ri_bad_3.avi", None),
        ("dive/holiday_3.avi", None),
    ],
)
def test_the_film_is_told_by_the_name(name, film):
    assert hmdb51.source(name) == film


@pytest.mark.parametrize("line", ["one.avi 3", "one.avi", "one 1", "a/one.avi 1"])
def test_a_wrong_line_is_named(tree, line):
    path = tree.parent / "testTrainMulti_7030_splits/clap_test_split2.txt"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"clap_test_split2\.txt, line 2: "):
        Listed(DataSettings(dataset_path=tree, split_path=path.parent)).lists(2)
