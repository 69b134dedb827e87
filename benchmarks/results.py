"""Run a command that measures, and put its tables into docs/results.md with the command above them.

python3 benchmarks/results.py few-labels benchmarks/few_labels.py --draws 5
python3 benchmarks/results.py compare compare.py --num_epochs 10

A section stands in docs/results.md between <!-- begin NAME --> and <!-- end NAME -->, and is written anew;
what is around it is written by hand. A new one is put at the end of the file.
"""

import argparse
import itertools
import re
import shlex
import subprocess
import sys
import time

import common
import torch

from utils.files import write_whole
from utils.process import UserError, run

RESULTS = common.ROOT / "docs" / "results.md"
# Where things lie is another matter on each machine.
PLACES = ("--data", "--dataset_path", "--split_path", "--cache_path", "--run_path")


def section(name: str, command: str, about: str, printed: str) -> str:
    """A section with the tables, and their headings, of what a command printed.

    Raises: UserError if there is no table.
    """
    blocks = []
    for is_table, lines in itertools.groupby(printed.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            blocks.append("\n".join(lines))
        else:
            blocks += [f"{line.lstrip('# ')}:" for line in lines if line.startswith("#")]
    if not any(block.startswith("|") for block in blocks):
        raise UserError(f"{command}: it printed no table; nothing is written")
    body = "\n\n".join(blocks)
    return f"<!-- begin {name} -->\n`{command}` ({about}):\n\n{body}\n<!-- end {name} -->"


def replaced(text: str, name: str, written: str) -> str:
    """A text with a section in the place of the one of its name, or at the end."""
    pattern = re.compile(rf"<!-- begin {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: written, text)
    return f"{text.rstrip()}\n\n{written}\n"


def without_places(words: list[str]) -> list[str]:
    """Words of a command without the flags that say where things lie, and their values.

    Raises: UserError for another word with a place of this machine in it.
    """
    kept: list[str] = []
    for before, word in itertools.pairwise(["", *words]):
        if before not in PLACES and word not in PLACES and word.partition("=")[0] not in PLACES:
            kept.append(word)
    if places := [word for word in kept if re.search(r"(^|[\s=])[/~]", word)]:
        raise UserError(f"{places[0]} lies on this machine alone; a table is published with what all have")
    return kept


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("name", help="of the section in docs/results.md")
    flags.add_argument("script", help="of this repository")
    flags.add_argument("flags", nargs=argparse.REMAINDER, help="of that script")
    args = flags.parse_args()
    command = shlex.join(["python3", args.script, *without_places(args.flags)])
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, args.script, *args.flags], cwd=common.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        printed = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            printed += line
    if process.returncode:
        raise UserError(f"{command}: status {process.returncode}; nothing is written")
    took = f"{(time.monotonic() - started) / 60:.0f} minutes"
    about = f"{common.machine(torch.device('cpu'))}; {took}"
    written = section(args.name, command, about, printed)
    write_whole(RESULTS, replaced(RESULTS.read_text(), args.name, written).encode())
    return 0


if __name__ == "__main__":
    run(main)
