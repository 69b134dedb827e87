"""Make small wrong changes to the code: which of them do the tests not notice?

    python3 tests/stress/mutants.py --count 100 --seed 1
    python3 tests/stress/mutants.py --count 20 --seed 2 --only labels cache
    python3 tests/stress/mutants.py --count 20 --seed 1 --list              # only show the changes

A change is one comparison or arithmetic operator that becomes another, one whole number moved by one, one
other number doubled, `True` for `False`, `and` for `or`, or a `not` left out. Its place is drawn at random
among all places of all modules; annotations, messages (f-strings) and the definitions of flags have none.
It is made in a copy of the repository, where the tests of its module then run. A change that survives is
harmless, or a test is missing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = [
    "test_features.py",
    "test_faults.py::test_a_full_disk_keeps_what_is_encoded_and_the_cache_goes_on",
    "test_faults.py::test_a_damaged_cache_is_noticed_and_names_the_clip",
    "test_faults.py::test_a_disk_that_gives_back_other_bytes_is_noticed_when_filling_ends",
    "test_faults.py::test_shards_are_read_as_one_and_miss_nothing",
    "test_faults.py::test_an_embedding_index_that_lies_is_refused",
]
SPLITS = [
    "test_dataset.py",
    "test_run.py::test_held_out_groups_are_whole_and_of_every_class",
    "test_run.py::test_the_random_split_leaks_and_says_so",
    "test_pretrain.py::test_few_labels_are_spread_over_the_classes",
    "test_faults.py::test_shards_share_the_clips_whatever_their_order",
    "test_faults.py::test_shards_are_read_as_one_and_miss_nothing",
]
# Module -> tests in tests/ that are about it, the quickest first: files, or single tests out of long ones.
TESTS = {
    "annotation/labels.py": ["test_label_frames.py", "test_labels.py", "test_test_on_video.py"],
    "models.py": ["test_heads.py", "test_models.py", "test_checkpoint.py"],
    "training/checkpoint.py": [
        "test_checkpoint_files.py",
        "test_checkpoint.py",
        "test_train.py::test_train_saves_tests_and_keeps_what_the_checkpoint_needs",
        "test_train.py::test_training_goes_on_from_a_checkpoint_and_loses_no_earlier_one",
        "test_run.py::test_a_stopped_run_goes_on_to_the_same_weights",
    ],
    "training/recipe.py": [
        "test_learner.py",
        "test_recipe.py",
        "test_pretrain.py::test_hidden_frames_are_learned_from_the_others",
        "test_train.py::test_the_same_seed_twice_gives_the_same_losses_and_tensors",
        "test_train.py::test_it_learns_what_only_the_order_of_frames_tells",
    ],
    "dataset.py": [
        "test_sampling.py",
        "test_dataset.py",
        "test_check.py",
        "test_test.py",
        "test_features.py::test_cached_clips_are_what_the_encoder_gives",
        "test_features.py::test_training_has_the_same_losses_with_and_without_cache",
        "test_faults.py::test_a_damaged_cache_is_noticed_and_names_the_clip",
    ],
    "features/cache.py": ["test_cache.py", *CACHE],
    "features/fill.py": ["test_cache.py", *CACHE],
    "features/shard_writer.py": ["test_cache.py", *CACHE],
    "splits/split.py": ["test_splits.py", *SPLITS],
    "splits/ucf101.py": ["test_splits.py", *SPLITS],
}
SECONDS = 150  # that the tests of a module may take; a change that makes them hang is noticed
SWAPS = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    **{"is": "is not", "is not": "is", "in": "not in", "not in": "in", "and": "or", "or": "and"},
    **{"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//"},
    **{"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*="},
}


@dataclass(frozen=True)
class Mutant:
    """A change: in the module `file`, whose text is `before`, the characters [start, end) become `new`."""

    file: str
    before: str
    start: int
    end: int
    new: str

    @property
    def after(self) -> str:
        return self.before[: self.start] + self.new + self.before[self.end :]

    def __str__(self) -> str:
        """Where it is, and its line before and after."""
        number = self.before.count("\n", 0, self.start)
        before, after = (text.splitlines()[number].strip() for text in (self.before, self.after))
        return f"{self.file}:{number + 1}:  {before}  ->  {after}"


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, without annotations, f-strings, flags and the part that runs a script."""
    match node:
        case ast.JoinedStr() | ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return
        case ast.FunctionDef(name=name) if re.fullmatch(r"get_args_parser|add_\w*flags", name):
            return
        case ast.Call(func=ast.Attribute(attr="add_argument" | "add_parser" | "add_subparsers")):
            return
        case ast.Call(func=ast.Name(id="setting")):
            return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from nodes(child)


def mutants(file: str, rng: random.Random) -> list[Mutant]:
    """One change at each place of a module where one can be made."""
    text = (ROOT / file).read_text()
    begins = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]

    def span(node: ast.expr) -> tuple[int, int]:
        """Its characters in the text; the parser counts bytes of a line."""
        ends = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
        start, end = (begins[line - 1] + len(lines[line - 1][:column].decode()) for line, column in ends)
        return start, end

    lines = [line.encode() for line in text.splitlines(keepends=True)]
    words = [
        (begins[token.start[0] - 1] + token.start[1], begins[token.end[0] - 1] + token.end[1], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in (tokenize.OP, tokenize.NAME) and token.string not in ("(", ")")
    ]
    found = []
    for node in nodes(ast.parse(text)):
        operands: list[ast.expr] = []
        match node:
            case ast.Compare(left=first, comparators=others):
                operands = [first, *others]
            case ast.BoolOp(values=operands):
                pass
            case ast.BinOp(left=first, right=second) | ast.AugAssign(target=first, value=second):
                operands = [first, second]
            case ast.UnaryOp(op=ast.Not()):
                start, _ = span(node)
                found.append(Mutant(file, text, start, start + len("not "), ""))
            case ast.Constant(value=bool() as value):
                found.append(Mutant(file, text, *span(node), str(not value)))
            case ast.Constant(value=int() as value):
                found.append(Mutant(file, text, *span(node), str(value + rng.choice((1, -1)))))
            case ast.Constant(value=float() as value):
                found.append(Mutant(file, text, *span(node), str(2 * value or 1.0)))
        for (_, left), (right, _) in itertools.pairwise(map(span, operands)):
            operator = [word for word in words if left <= word[0] and word[1] <= right]
            if new := SWAPS.get(" ".join(string for *_, string in operator)):
                found.append(Mutant(file, text, operator[0][0], operator[-1][1], new))
    return found


def copy_repository(target: Path) -> None:
    """The files that Git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(".venv"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def passes(copy: Path, file: str) -> bool:
    """Whether the tests of a module pass in a copy of the repository."""
    # What Hypothesis found against one change is no help against the next.
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--hypothesis-seed", "0"]
    options += ["--basetemp", str(copy.with_name("files"))]
    subset = os.environ.get("UCF101_SUBSET", str(ROOT.parent / "shared" / "ucf101-subset"))
    environment = {"UCF101_SUBSET": subset, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS[file])],
        cwd=copy, env={**os.environ, **environment}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return process.wait(SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        # What the tests have started as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="changes to make")
    parser.add_argument("--seed", type=int, default=1, help="of the drawing")
    parser.add_argument("--only", nargs="+", choices=[Path(file).stem for file in TESTS], help="modules")
    parser.add_argument("--list", action="store_true", help="show the changes and run nothing")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    files = [file for file in TESTS if args.only is None or Path(file).stem in args.only]
    places = [mutant for file in files for mutant in mutants(file, rng)]
    chosen = rng.sample(places, min(args.count, len(places)))
    print(f"{len(chosen)} of {len(places)} places in {', '.join(files)}, seed {args.seed}", flush=True)
    if args.list:
        print(*chosen, sep="\n")
        return 0
    survived: dict[Mutant, bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "repository"
        copy_repository(copy)
        for file in sorted({mutant.file for mutant in chosen}):
            started = time.monotonic()
            if not passes(copy, file):
                print(f"the tests of {file} fail without any change: {', '.join(TESTS[file])}")
                return 1
            print(f"{file}: its tests pass in {time.monotonic() - started:.0f} s", flush=True)
        for mutant in chosen:
            (copy / mutant.file).write_text(mutant.after)
            survived[mutant] = passes(copy, mutant.file)
            (copy / mutant.file).write_text(mutant.before)
            print(f"{len(survived):4} {'SURVIVED' if survived[mutant] else 'noticed '} {mutant}", flush=True)
    print("\nsurvivors", *(mutant for mutant in chosen if survived[mutant]), "\nnoticed of all", sep="\n")
    for file in (*files, ""):
        left = [alive for mutant, alive in survived.items() if mutant.file == file or not file]
        print(f"{len(left) - sum(left):5} / {len(left):<5} {file or 'together'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
