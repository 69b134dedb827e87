"""The commands that the documents name can be typed, and the sections of docs/results.md are written anew."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import train
from conftest import ROOT
from utils.process import UserError

sys.path.append(str(ROOT / "benchmarks"))

import results

FOLDERS = ("", "benchmarks/")
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
# Tables of measurements name a script without its folder and without python3.
COMMAND = re.compile(r"(?:\S+=\S+ )*(?:(?:python3|\.venv/bin/python|torchrun .*?) +)?((\S+\.py)( .*)?)")


def named_commands():
    """Every command of this repository in a document, in code or in a block of code."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        fenced = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        fenced += re.findall(r"^    (\S.*)", text, re.MULTILINE)
        blocks = "\n".join(fenced).replace("\\\n", " ")
        lines = [line.removeprefix("$ ").split(" #")[0] for line in blocks.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines + inline:
            for command in line.split(" && "):
                match = COMMAND.fullmatch(command.strip())
                begun = re.search("python|torchrun", command)
                if match and (begun or (match[3] and name != "README.md")):
                    folders = [folder for folder in FOLDERS if (ROOT / folder / match[2]).is_file()]
                    if folders:
                        yield f"{folders[0]}{match[1]}"


class Parsed(Exception):
    """The command line has been read."""


@pytest.mark.parametrize("command", sorted(set(named_commands())))
def test_a_command_of_the_documents_can_be_typed(command, monkeypatch, capsys):
    # What a reader adds.
    script, *words = [word for word in shlex.split(command) if word != "..."]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, args=None, namespace=None):
        if " --help" in command:
            raise Parsed
        _, rest = parse(parser, args, namespace)
        # The others go to train.py.
        if script == "compare.py":
            _, rest = parse(train.get_args_parser(), rest)
        if rest:
            parser.error(f"unknown {rest}")
        for entry in words:
            if " --" in entry:
                parse(train.get_args_parser(), shlex.split(entry)[1:])[1] and parser.error(f"unknown {entry}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_there_are_commands_to_try():
    commands = set(named_commands())
    assert "train.py --resume" in commands
    scripts = {path.relative_to(ROOT) for path in (ROOT / "benchmarks").glob("*.py")}
    named = {Path(command.split()[0]) for command in commands}
    assert scripts - named == {Path("benchmarks/common.py"), Path("benchmarks/original_way.py")}


def test_a_section_takes_the_place_of_the_one_of_its_name():
    printed = (
        "warning\n2026, a machine\n\n### Title, 3 seeds\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nwritten\n"
    )
    written = results.section("few", "python3 x.py --seeds 3", "today", printed)
    assert written == (
        "<!-- begin few -->\n`python3 x.py --seeds 3` (today):\n\nTitle, 3 seeds:\n\n"
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end few -->"
    )
    text = "# Results\n\nBefore.\n\n<!-- begin few -->\nold\n<!-- end few -->\n\nBehind.\n"
    again = results.replaced(text, "few", written)
    assert again == f"# Results\n\nBefore.\n\n{written}\n\nBehind.\n"
    assert results.replaced(again, "few", written) == again
    assert results.replaced("# Results\n", "few", written) == f"# Results\n\n{written}\n"
    with pytest.raises(UserError, match="no table"):
        results.section("few", "python3 x.py", "today", "nothing\n")


def test_where_things_lie_is_not_told():
    words = ["benchmarks/x.py", "--data", "/home/me/data", "--seeds", "3", "--cache_path", "/tmp/c"]
    assert results.without_places(words) == ["benchmarks/x.py", "--seeds", "3"]
    words = ["--data", "/home/me/data", "order", "--cache_path=/tmp/c", "--encoders", "i3d --frame_stride 2"]
    assert results.without_places(words) == ["order", "--encoders", "i3d --frame_stride 2"]
    with pytest.raises(UserError, match="lies on this machine"):
        results.without_places(["--encoders", "i3d --encoder_weights /home/me/w.pt"])


def test_the_documents_are_short_and_so_are_their_sentences():
    assert len((ROOT / "README.md").read_text().split()) <= 1000
    for name in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
        for paragraph in re.split(r"\n\n|\n- ", text):
            if not paragraph.startswith(("|", " ", "<", "#")):
                sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z`\[])", paragraph.strip())
                assert max(len(sentence.split()) for sentence in sentences) <= 30, (name, paragraph)
                assert name != "README.md" or len(sentences) <= 3, paragraph


@pytest.mark.parametrize(
    "name",
    ["train", "test", "test_on_video", "extract_features", "pretrain", "demo", "export", "compare"],
)
def test_each_flag_has_help_of_at_most_25_words(name):
    for action in importlib.import_module(name).get_args_parser()._actions:
        assert action.help, action.option_strings
        assert len(action.help.split()) <= 25, action.option_strings
