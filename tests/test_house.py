"""The rooms: what imports what, and that a root folder of modules can be collected."""

import ast

import pytest

from conftest import ROOT

# Each imports what stands before it only; `dataset` and `models` are the two modules of the root.
ORDER = ["utils", "video", "splits", "features", "models", "dataset", "training", "annotation"]


def imported(path):
    """First words of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_one_way(room):
    files = list((ROOT / room).glob("*.py")) or [ROOT / f"{room}.py"]
    allowed = set(ORDER[: ORDER.index(room) + 1]) - (
        {"models", "dataset"} - {room} if room == "features" else set()
    )
    ours = {*ORDER, *(path.stem for path in ROOT.glob("*.py"))}
    wrong = {
        f"{path.name} imports {name}" for path in files for name in imported(path) if name in ours - allowed
    }
    assert not wrong


def test_the_root_shows_what_can_be_run():
    assert len(list(ROOT.glob("*.py"))) <= 13
    assert {"utils", "video", "splits", "features", "training", "annotation"} <= set(ORDER)
    folders = [ROOT, *(ROOT / room for room in (*ORDER, "benchmarks", "data"))]
    files = [path for folder in folders for path in folder.glob("*.py")]
    assert len(files) > 60
