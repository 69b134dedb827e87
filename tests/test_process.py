"""How commands end: users' errors in one line, bugs with their traceback; flags' types; seeds."""

import argparse
import errno
import warnings
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

import train
from conftest import run_script
from models import MODELS, MeanPool
from utils import device
from utils.device import choose_dtype, has_bf16, seed_everything
from utils.flags import COUNT, add_flags, number, read, setting, typed
from utils.process import MissingFileError, UserError


def ending(call, error):
    module = ModuleType("command")

    def main():
        raise error

    module.main = main
    return call(module)


@pytest.mark.parametrize(
    "error",
    [
        UserError("x.avi: too short"),
        MissingFileError("x.avi: no such file"),
        OSError(errno.ENOSPC, "No space left"),
    ],
)
def test_errors_of_the_user_and_of_the_system_are_one_line(call, error):
    done = ending(call, error)
    assert done.status == 1
    assert str(error) in done.one_line_error()


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyError("x"), AssertionError(), OSError("our own")])
def test_bugs_keep_their_traceback(call, error):
    with pytest.raises(type(error)):
        ending(call, error)


def test_a_bug_in_a_new_head_keeps_its_traceback(call, small, train_flags, monkeypatch):
    class Buggy(MeanPool):
        def forward(self, embeddings, padding=None):
            raise ValueError("a bug in the head")

    monkeypatch.setitem(MODELS, "Buggy", Buggy)
    with pytest.raises(ValueError, match="a bug in the head"):
        call(train, *train_flags(small), "--model", "Buggy", "--num_epochs", 1)


def test_memory_that_is_full_names_the_flag(call):
    done = ending(call, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert "--batch_size" in done.one_line_error()


@pytest.mark.parametrize(
    ("interval", "kind", "good", "bad"),
    [
        ("[1, inf)", int, ["1", "99"], ["0", "-1", "1.5", "x", ""]),
        ("[0, 1)", float, ["0", "0.999"], ["1", "-0.1", "nan", "inf"]),
        ("(0, 1]", float, ["1", "0.001"], ["0", "1.1"]),
        ("(0, inf)", float, ["1e-9", "1e9"], ["0", "inf", "nan"]),
        ("[0, inf)", float, ["0"], ["-1e-9", "inf"]),
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
    assert "some:\n" in parser.format_help()
    args = parser.parse_args(["--fast"])
    assert read(SomeSettings, args) == SomeSettings(size=5, fast=True)
    assert typed(parser, ["--fast"], args) == {"fast": True}
    assert typed(parser, ["--size", "5"], args) == {"size": 5}
    parser = argparse.ArgumentParser()
    add_flags(parser, SomeSettings, without=("size",))
    assert read(SomeSettings, parser.parse_args([])) == SomeSettings()


def test_bf16_is_taken_where_the_processor_has_instructions_for_it(monkeypatch):
    """oneDNN says yes on any AVX-512, where it is emulated."""
    assert not has_bf16("processor : 0\nflags\t\t: fpu avx512f avx512bw avx512_vnni\n")
    assert has_bf16("flags\t\t: fpu avx512f avx512_bf16\n")
    assert has_bf16("flags : amx_bf16 amx_tile")
    assert has_bf16("Features : fp asimd bf16\n")
    assert not has_bf16("")
    monkeypatch.setattr(device, "has_bf16", lambda text: False)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(device, "has_bf16", lambda text: True)
    assert choose_dtype("auto", torch.device("cpu")) == torch.bfloat16


def test_what_is_not_deterministic_is_said_once(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(str(message)))
    seed_everything(0)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(3):
            warnings.warn("upsample_backward does not have a deterministic implementation, but", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert shown == ["something else"]
    assert capsys.readouterr().out.count("upsample_backward gives other roundings") == 1


def test_seeding_does_not_wait_for_the_compiler():
    program = (
        "import sys, torch; from utils.device import seed_everything; seed_everything(0); "
        "print(torch.are_deterministic_algorithms_enabled(), 'torch._inductor' in sys.modules)"
    )
    assert run_script("-c", program).out.split() == ["True", "False"]


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise IndexError("a bug in the data set")


def test_a_bug_in_a_data_worker_keeps_its_traceback(call):
    module = ModuleType("command")
    module.main = lambda: list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    with pytest.raises(IndexError, match="a bug in the data set"):
        call(module)
