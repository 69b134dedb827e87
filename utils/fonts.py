"""Fonts that have the letters of a text: names of actions are written in any script."""

from __future__ import annotations

import contextlib
import logging
import re
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from utils.process import warn

# Fonts without a regular weight are used all the same.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
# It comes with Matplotlib, and has Latin, Greek, Cyrillic and Arabic.
USUAL = "DejaVu Sans"


@cache
def _fonts() -> tuple[tuple[Path, frozenset[int]], ...]:
    """Font files and the letters of each: the usual one, then the system's, regular ones first."""
    usual = Path(font_manager.findfont(USUAL))
    system = sorted(map(Path, font_manager.findSystemFonts()))
    system.sort(key=lambda path: ("Regular" not in path.stem, "Italic" in path.stem or "Bold" in path.stem))
    found = []
    for path in [usual, *system]:
        with contextlib.suppress(RuntimeError, OSError):  # not one that FreeType reads
            found.append((path, frozenset(FT2Font(path).get_charmap())))
    return tuple(found)


@cache
def _font_of(word: str) -> Path:
    letters = set(map(ord, word))
    # The first that has all of them, or else most.
    best, coverage = max(_fonts(), key=lambda font: len(letters & font[1]))
    for letter in sorted(letters - coverage):
        _warn_of(chr(letter))
    return best


@cache
def _warn_of(letter: str) -> None:
    warn(f"no font here has the letter {letter!r}; install Debian's fonts-noto-core and fonts-noto-cjk")


def font_runs(text: str) -> list[tuple[Path, str]]:
    """A text in parts, each with a font file that has its letters; a warning for a letter that none has."""
    runs: list[tuple[Path, str]] = []
    for word in re.findall(r"\S+\s*|\s+", text):
        path = _font_of(word.strip())
        if runs and runs[-1][0] == path:
            runs[-1] = path, runs[-1][1] + word
        else:
            runs.append((path, word))
    return runs
