"""The commands of the README, as printed, on a folder laid out as the data set."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torchvision

import train
from conftest import ROOT
from features.networks import ENCODERS, encoder_spec
from models import MODELS
from video.opencv import cv2
from video.reader import Video

README = (ROOT / "README.md").read_text()


def commands(heading: str) -> list[str]:
    """The lines typed under a heading, continuation lines joined and comments cut off."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = "\n".join(re.findall(r"```\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    return [line[2:].split(" #")[0].strip() for line in blocks.splitlines() if line.startswith("$ ")]


@pytest.fixture
def checkout(toy, tmp_path) -> Path:
    """A copy of the repository with three videos in data/ and the lists still zipped."""
    folder = tmp_path / "Action-Recognition"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split():
        if not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    lists = tmp_path / "zip" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 Bow\n2 SoccerPenalty\n")
    clips = ["Bow/v_Bow_g02_c01.avi 1", "SoccerPenalty/v_SoccerPenalty_g02_c01.avi 2"]
    (lists / "trainlist01.txt").write_text("\n".join(clips) + "\n")
    (lists / "testlist01.txt").write_text("SoccerPenalty/v_SoccerPenalty_g01_c01.avi\n")
    shutil.make_archive(str(folder / "data" / "ucfTrainTestlist"), "zip", tmp_path / "zip")
    for clip in (*clips, "SoccerPenalty/v_SoccerPenalty_g01_c01.avi"):
        path = folder / "data" / "UCF-101" / clip.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Short, since ResNet-152 sees each frame.
        frames = Video(toy / "UCF-101" / clip.split()[0].replace("SoccerPenalty", "Squat")).frames()
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (160, 120))
        for frame in islice(frames, 6):
            writer.write(cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), (160, 120)))
        writer.release()
    return folder


def test_the_documented_commands_work_as_printed(checkout, tmp_path):
    if shutil.which("unzip") is None:
        pytest.skip("no unzip on this machine")
    torch.manual_seed(0)
    weights = tmp_path / "torch" / "hub" / "checkpoints" / "resnet152-394f9c45.pth"
    weights.parent.mkdir(parents=True)
    network = torchvision.models.resnet152()
    for module in network.modules():
        # Random convolutions blow up over 152 layers; so small a scale keeps the numbers tame.
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, 0.1)
    torch.save(network.state_dict(), weights)
    # Left out: what the network would have to bring. Shortened: 200 epochs.
    typed = [line for line in commands("UCF-101") if not line.startswith(("bash download", "unrar"))]
    assert [line.split()[:2] for line in typed] == [
        ["cd", "data/"],
        ["unzip", "ucfTrainTestlist.zip"],
        ["python3", "extract_frames.py"],
        ["cd", ".."],
        ["python3", "train.py"],
        ["python3", "test.py"],
        ["python3", "test_on_video.py"],
    ]
    script = (
        "\n".join(typed).replace("--num_epochs 200", "--num_epochs 1").replace("ConvLSTM_150", "ConvLSTM_1")
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e"],
        input=script,
        cwd=checkout,
        env={**os.environ, "PATH": path, "TORCH_HOME": str(tmp_path / "torch")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (checkout / "data/UCF-101-frames/SoccerPenalty/v_SoccerPenalty_g01_c01/0.jpg").is_file()
    assert (checkout / "model_checkpoints/ConvLSTM_1.pth").is_file()
    assert (checkout / "annotated/v_SoccerPenalty_g01_c01.mp4").is_file()
    assert "of 1 clips" in done.stdout


def test_the_quick_start_names_the_targets_of_the_makefile():
    own = "python3 test_on_video.py --video_path x.avi"
    assert commands("Try it") == [own, "make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in ("demo", "test"))
    # What `make demo` ends with.
    assert own.replace("python3", "$(PY)") in makefile.split("\ndemo:")[1].split("\n\n")[0]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test-browser\nexec make test")


def test_every_picture_is_there_and_made_by_one_command():
    documents = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    pictures = sorted(
        {name for text in documents for name in re.findall(r"(assets/[\w.]+\.(?:png|gif))", text)}
    )
    assert sorted(pictures) == sorted(f"assets/{path.name}" for path in (ROOT / "assets").iterdir())
    pictures = [name for name in pictures if name in README]
    recipe = (ROOT / "Makefile").read_text().split("\nassets:")[1].split("\n\n")[0]
    assert [picture for picture in pictures if Path(picture).name not in recipe] == []


def test_every_dependency_says_what_it_is_for():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith(("-r ", "#")) or re.fullmatch(r"[\w-]+[^#]*  # .{7,}", line), line


@pytest.mark.parametrize(
    "script",
    [
        *(
            "train",
            "test",
            "test_on_video",
            "extract_frames",
            "extract_features",
            "pretrain",
            "compare",
            "export",
            "demo",
        ),
        "make_toy_actions",
    ],
)
def test_every_flag_has_help(script):
    parser = importlib.import_module(script).get_args_parser()
    assert [action.option_strings for action in parser._actions if len(action.help or "") < 10] == []
    assert all(len(line) < 200 for line in parser.format_help().splitlines())


def test_help_names_every_encoder_and_model():
    text = train.get_args_parser().format_help()
    assert [name for name in MODELS if name not in text] == []
    with pytest.raises(ValueError, match="unknown encoder") as caught:
        encoder_spec("no such encoder")
    assert [name for name in ENCODERS if name not in str(caught.value)] == []


def test_every_file_has_its_line():
    table = README.split("## The code")[1].split("\n## ")[0]
    rows = {row.split("|")[1].strip(" `/"): row for row in table.splitlines() if row.startswith("|")}
    rows["."] = rows.pop("the root")
    for room, row in rows.items():
        files = [path.name for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
        assert [name for name in files if f"`{name}` " not in row] == [], room
    assert len(rows) == 9  # with the head and the line below it
