"""What a comparison is to do, checked before it is begun: trainings of encoders and heads, and caches."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from features.networks import encoder_spec
from features.settings import CacheSettings, DeviceSettings, EncoderSettings
from models import MODELS, check_model
from splits.datasets import ALL, DataSettings, Listed
from splits.split import RANDOM, names_sha256
from training.jobs import Commands, asked, read_job
from training.masked import check_pretraining
from training.settings import TrainSettings, add_train_flags
from utils.files import json_bytes, write_whole
from utils.flags import read, typed
from utils.process import UserError, available_cores

# Flags of train.py that are set here for each training.
OWN = ("encoder", "model", "seed", "output_path", "run_path", "resume")


# Encoder and model as typed, split, seed.
Place = tuple[str, str, int | str, int]


def job_name(*parts: object) -> str:
    """The folder of a training: encoder, model and their flags in a word, split and seed."""
    return "-".join(str(part).replace(" --", "-").replace(" ", "").replace("/", "-") for part in parts)


def entries(texts: Iterable[str]) -> list[str]:
    """What --encoders or --models name; commas part those without flags of their own."""
    parted = [[text] if " " in text else text.split(",") for text in texts]
    return [" ".join(entry.split()) for group in parted for entry in group]


class _Flags(argparse.ArgumentParser):
    """The flags of train.py, whose errors are told in a line."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        add_train_flags(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def check(self, words: list[str], not_allowed: Sequence[str]) -> dict[str, Any]:
        """The values of the flags that are typed. Raises: UserError for one that is not allowed there."""
        given = typed(self, words, self.parse_args(words))
        if own := [name for name in not_allowed if name in given]:
            raise UserError(f"--{own[0]} is set here for each training; leave it out")
        return given


def words_of(entry: str) -> list[str]:
    """Name, or "" without one, and flags of an entry. Raises: UserError for a quote that does not end."""
    try:
        return shlex.split(entry) or [""]
    except ValueError as error:
        raise UserError(f"{entry!r}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        pairs: an encoder and a model each, as typed
        numbers: of the splits
        jobs: name of its folder and flags of train.py by pair, split and seed
        kept: how many of them are finished
        test_clips: SHA-256 of the names of each split's
        fills: flags of features.py for each encoder; none where nothing is kept
    """

    pairs: list[tuple[str, str]]
    numbers: list[int | str]
    jobs: dict[Place, tuple[str, list[str]]]
    kept: int
    test_clips: dict[int | str, str]
    fills: dict[str, list[str]]


def make_plan(
    encoders: Sequence[str], models: Sequence[str] | None, seeds: int, folder: Path, flags: list[str]
) -> Plan:
    """All that is to be done, checked before anything is.

    Args:
        encoders, models: as typed; None for all models
        seeds: of each pair and split
        folder: of all jobs
        flags: of train.py, for all

    Raises: UserError for flags that train.py does not take, or that are set here, or do not go together.
    """
    parser = _Flags()
    split = parser.check(flags, OWN).get("split_number", ALL)
    if split == RANDOM:
        raise UserError("--split_number random tests each seed on other clips; compare on one that is listed")
    pairs = list(itertools.product(entries(encoders), entries(models or MODELS)))
    jobs, fills = {}, {}
    listed = Listed(read(DataSettings, parser.parse_args(flags)))
    numbers = list(listed.numbers) if split == ALL else [split]
    for encoder, model in pairs:
        encoder_words, model_words = words_of(encoder), words_of(model)
        for name, check, words in (
            ("encoders", encoder_spec, encoder_words), ("models", check_model, model_words),
        ):  # fmt: skip
            try:
                check(words[0])
            except UserError as error:
                raise UserError(f"--{name}: {error}") from error
            parser.check(words[1:], (*OWN, "split_number"))
        own = ["--encoder", *encoder_words, "--model", *model_words]
        settings = TrainSettings.read(parser.parse_args([*flags, *own]))
        if problem := settings.problem(1):
            raise UserError(problem)
        if settings.loop.pretrain:
            check_pretraining(settings.model.model, settings.model.sequence_length)
        if settings.cache.cache == "disk":
            fills[encoder] = filling_flags([*flags, "--encoder", *encoder_words])
        for number, seed in itertools.product(numbers, range(seeds)):
            place = (encoder, model, number, seed)
            words = [*flags, *own, "--split_number", str(number), "--seed", str(seed)]
            jobs[place] = job_name(encoder, model, f"split{number}", f"seed{seed}"), words
    if len({name for name, _ in jobs.values()}) < len(pairs) * len(numbers) * seeds:
        raise UserError(
            "--encoders and --models name a pair twice, or two that are written alike; leave one out"
        )
    kept = sum(read_job(folder / name, asked(words)) is not None for name, words in jobs.values())
    test_clips = {number: names_sha256(listed.split(number).test) for number in numbers}
    return Plan(pairs, numbers, jobs, kept, test_clips, fills)


def filling_flags(words: list[str]) -> list[str]:
    """Of flags of train.py, those that features.py takes too. Raises: UserError for a wrong one."""
    groups = (DataSettings, CacheSettings, EncoderSettings, DeviceSettings)
    names = {entry.name for group in groups for entry in fields(group)}
    given = {name: value for name, value in _Flags().check(words, ()).items() if name in names}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


@dataclass(frozen=True)
class Filling:
    """How long a cache took to fill.

    Attributes:
        seconds: that it took
        whole: whether nothing of it had been kept before
    """

    seconds: float
    whole: bool


def fill(encoder: str, flags: list[str], folder: Path) -> Filling | None:
    """Fill the cache of an encoder, unless that was done; None if the time is not known.

    It is not where all was kept before, or an earlier comparison was interrupted in it.

    Raises: UserError if features.py fails, or what is kept of an earlier time is damaged.
    """
    path = folder / f"{job_name('filling', encoder)}.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
            if before["flags"] == flags and before["done"]:
                # An earlier version kept no such entry.
                took = before.get("took")
                return took and Filling(**took)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged; delete it, the cache it is about stays") from error
    known = not path.is_file()
    write_whole(path, json_bytes({"flags": flags, "done": False}))
    started, log, commands = time.monotonic(), path.with_suffix(".log"), Commands()
    print(f"filling the cache of {encoder}", flush=True)
    try:
        printed = commands.run("features.py", *flags, threads=available_cores(), log=log, show=True)
    except BaseException:
        commands.end()
        raise
    # A bar for each stream, of the clips that were missing, and a line.
    encoded, clips = (
        sum(int(count.replace(",", "")) for count in re.findall(pattern, printed))
        for pattern in (r"\| 0/(\d+) \[", r"of ([\d,]+) clips in ")
    )
    filling = Filling(time.monotonic() - started, encoded == clips) if known and encoded else None
    write_whole(path, json_bytes({"flags": flags, "done": True, "took": filling and asdict(filling)}))
    return filling
