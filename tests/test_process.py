"""How commands end: users' errors in one line, bugs with their traceback; flags' types; seeds."""

import argparse
import errno
import warnings
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from utils import device
from utils.device import choose_dtype, has_bf16, seed_everything
from utils.flags import COUNT, add_flags, number, read, setting, typed
from utils.process import MissingFileError, UserError


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise IndexError("a bug in the data set")


def in_worker():
    list(torch.utils.data.DataLoader(Broken(), num_workers=1))


def no_memory():
    torch.empty(10**15)


def ending(call, error):
    module = ModuleType("command")

    def main():
        raise error

    module.main = main if isinstance(error, Exception) else error
    return call(module)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("x.avi: too short"), "x.avi: too short"),
        (MissingFileError("x.avi: no such file"), "x.avi: no such file"),
        (OSError(errno.ENOSPC, "No space left"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "--batch_size"),
        (no_memory, "the memory is full (4000000000000000 bytes more are needed); lower --batch_size"),
    ],
)
def test_errors_of_the_user_and_of_the_system_are_one_line(call, error, message):
    done = ending(call, error)
    assert done.status == 1
    assert message in done.one_line_error()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("shapes"), ValueError),
        (KeyError("x"), KeyError),
        (OSError("our own"), OSError),
        (in_worker, IndexError),
    ],
)
def test_bugs_keep_their_traceback(call, error, kind):
    with pytest.raises(kind):
        ending(call, error)


@pytest.mark.parametrize(
    ("interval", "kind", "good", "bad"),
    [
        ("[1, inf)", int, ["1", "99"], ["0", "-1", "1.5", "x", ""]),
        ("[0, 1)", float, ["0", "0.999"], ["1", "-0.1", "nan", "inf"]),
        ("(0, 1]", float, ["1", "0.001"], ["0", "1.1"]),
        ("(0, inf)", float, ["1e-9", "1e9"], ["0", "inf", "nan"]),
    ],
)
def test_numbers_of_flags(interval, kind, good, bad):
    parse = number(interval, kind)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="does not fit"):
            parse(text)


@dataclass(frozen=True, kw_only=True)
class SomeSettings:
    """A test's."""

    size: int = setting(3, "how large", COUNT)
    fast: bool = setting(False, "whether")


def test_settings_make_flags_and_flags_make_settings():
    parser = argparse.ArgumentParser()
    add_flags(parser, SomeSettings, size=5)
    args = parser.parse_args(["--fast"])
    assert read(SomeSettings, args) == SomeSettings(size=5, fast=True)
    assert typed(parser, ["--fast"], args) == {"fast": True}
    assert typed(parser, ["--size", "5"], args) == {"size": 5}
    parser = argparse.ArgumentParser()
    add_flags(parser, SomeSettings, without=("size",))
    assert read(SomeSettings, parser.parse_args([])) == SomeSettings()


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512bw avx512_vnni\n", False),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : amx_bf16 amx_tile", True),
        ("Features : fp asimd bf16\n", True),
        ("", False),
    ],
)
def test_bf16_is_taken_where_the_processor_has_instructions_for_it(monkeypatch, cpuinfo, has):
    """oneDNN says yes on any AVX-512, where it is emulated."""
    assert has_bf16(cpuinfo) is has
    monkeypatch.setattr(device, "has_bf16", lambda _: has)
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if has else torch.float32)


def test_what_is_not_deterministic_is_said_once(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(str(message)))
    seed_everything(0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn("upsample_backward does not have a deterministic implementation, but", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert shown == ["something else"]
    assert capsys.readouterr().out.count("upsample_backward gives other roundings") == 1
