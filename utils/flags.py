"""Flags of the commands, written once: each is a field of a settings dataclass, made with `setting`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, NoReturn, TypeVar

from utils.process import UserError

S = TypeVar("S")
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the flag that may be meant; flags are typed in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the error and end with status 2."""
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, 1)
            message = f"unknown flag {unknown[1]}" + (
                f", did you mean {near[0]}?" if near else "; see --help"
            )
        self.exit(2, f"error: {message}\n")


def number(interval: str, kind: type[int] | type[float] = float) -> Callable[[str], Any]:
    """A flag's type: a number within an interval, such as "[0, 1)", which leaves 1 out; inf is any size."""
    match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval)
    assert match is not None
    low, high = float(match[2]), float(match[3])

    def parse(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (
                low < value < high
                or (value == low and match[1] == "[")
                or (value == high and match[4] == "]")
            ):
                return value
        what = "a whole number" if kind is int else "a number"
        within = (
            f"in {interval}"
            if high < math.inf
            else f"{'of at least' if match[1] == '[' else 'above'} {low:g}"
        )
        raise argparse.ArgumentTypeError(f"{text} does not fit: it takes {what} {within}")

    return parse


COUNT = number("[1, inf)", int)
NATURAL = number("[0, inf)", int)
POSITIVE = number("(0, inf)")
NON_NEGATIVE = number("[0, inf)")
SHARE_BELOW_1 = number("[0, 1)")


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A flag's type out of a function that raises UserError: its message is what the user sees."""

    def value(text: str) -> T:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return value


def accepted_by(check: Callable[[str], object]) -> Callable[[str], str]:
    """A flag's type out of a function that raises UserError for a bad value; the text stays as it is."""

    def value(text: str) -> str:
        check(text)
        return text

    return checked(value)


def setting(
    default: Any,
    help: str,
    type: Callable[[str], Any] | None = None,
    *,
    choices: Collection[Any] | None = None,
    flags: Sequence[str] = (),
    alone: Any = None,
) -> Any:
    """A field of a settings dataclass that is a flag of its name, or of the names in `flags`.

    Its default is MISSING where it is required; False makes a switch. `type` makes the value out of the text;
    without a text behind the flag it is `alone`, unless that is None.
    """
    about = {"help": help, "type": type, "choices": choices, "flags": flags}
    return field(default=default, metadata=about if alone is None else about | {"nargs": "?", "const": alone})


def add_flags(
    parser: argparse.ArgumentParser, settings: type, *, without: Sequence[str] = (), **defaults: Any
) -> None:
    """Add a flag for each field of a settings dataclass, but those `without` one, in a group of its name.

    Args:
        defaults: of flags, by name, where this command has others
    """
    title = re.sub(r"(?<!^)([A-Z])", r" \1", settings.__name__.removesuffix("Settings")).lower()
    group = parser.add_argument_group(title)
    for entry in fields(settings):
        if entry.name in without:
            continue
        default = defaults.get(entry.name, entry.default)
        names = entry.metadata["flags"] or (f"--{entry.name}",)
        options = {key: value for key, value in entry.metadata.items() if key != "flags"}
        options["help"] = options["help"].replace("{default}", str(default))
        if default is False:
            group.add_argument(*names, action="store_true", help=options["help"])
        elif default is MISSING:
            group.add_argument(*names, dest=entry.name, required=True, **options)
        else:
            group.add_argument(*names, dest=entry.name, default=default, **options)


def read(settings: type[S], args: argparse.Namespace) -> S:
    """A settings dataclass out of the flags that `add_flags` added."""
    names = {entry.name for entry in fields(settings)}  # type: ignore[arg-type]
    return settings(**{name: value for name, value in vars(args).items() if name in names})


def typed(
    parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The values of the flags that stand on the command line, by name; `args` is what it was parsed to."""
    absent = object()
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent))))
    return {name: value for name, value in values.items() if value is not absent}
