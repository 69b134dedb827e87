"""`data/download_hmdb51.sh` against a loopback server: archives of archives, made by the tests."""

import os
import shutil
import subprocess
import sys

import pytest
from test_download_ucf101 import Server, stored_rar

from conftest import ROOT
from splits.datasets import DataSettings, Listed

LISTS, CLIPS = "/test_train_splits.rar", "/hmdb51_org.rar"
CLIP = "April_09_brush_hair_u_nm_np1_ba_goo_0.avi"

# What stands in for unrar, where it is not installed: it knows archives of files that are stored as they are.
UNRAR = """#!{python}
import struct, sys, zlib
from pathlib import Path
command, archive = sys.argv[1], next(Path(word) for word in sys.argv[2:] if word.endswith(".rar"))
data, place = archive.read_bytes(), 7
if not data.startswith(b"Rar!"):
    sys.exit(3)
while place < len(data):
    kind, flags, size = struct.unpack("<BHH", data[place + 2 : place + 7])
    if kind == 0x74:
        packed, _, _, crc = struct.unpack("<IIBI", data[place + 7 : place + 20])
        length = struct.unpack("<H", data[place + 26 : place + 28])[0]
        name = data[place + 32 : place + 32 + length].decode()
        content = data[place + size : place + size + packed]
        if zlib.crc32(content) != crc:
            sys.exit(3)
        if command == "x":
            path = Path(sys.argv[-1]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        size += packed
    place += size
"""


def joined(archives):
    """One archive out of several, each of one file."""
    return archives[0][:-7] + b"".join(archive[20:-7] for archive in archives[1:]) + archives[0][-7:]


@pytest.fixture
def server():
    clips = {
        "brush_hair": stored_rar(f"brush_hair/{CLIP}".encode(), os.urandom(50_000)),
        # Without a folder in it.
        "clap": stored_rar(b"#1_Film_clap_u_nm_np1_fr_goo_0.avi", os.urandom(50_000)),
    }
    folder = "testTrainMulti_7030_splits"
    lists = [
        stored_rar(f"{folder}/{name}_test_split{number}.txt".encode(), f"{clip} {side} \n".encode())
        for name, clip, side in (
            ("brush_hair", CLIP, 1),
            ("clap", "#1_Film_clap_u_nm_np1_fr_goo_0.avi", 2),
        )
        for number in (1, 2, 3)
    ]
    outer = joined([stored_rar(f"{name}.rar".encode(), archive) for name, archive in clips.items()])
    serving = Server({LISTS: joined(lists), CLIPS: outer})
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


@pytest.fixture
def download(server, tmp_path):
    folder, tools = tmp_path / "data", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    for name in ("download_hmdb51.sh", "download_ucf101.sh"):
        shutil.copy(ROOT / "data" / name, folder)
    if shutil.which("unrar") is None:
        (tools / "unrar").write_text(UNRAR.format(python=sys.executable))
        (tools / "unrar").chmod(0o755)

    def run(*, unrar=True, **env):
        variables = {
            "HMDB51_BASE_URL": server.url, "HMDB51_WAIT": "0",
            "PATH": f"{tools}:{os.environ['PATH']}" if unrar else os.environ["PATH"], **env,
        }  # fmt: skip
        command = ["bash", str(folder / "download_hmdb51.sh")]
        return subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
        )

    return folder, run


def test_broken_connections_are_resumed_and_all_classes_unpacked(server, download):
    folder, run = download
    server.cuts = {LISTS: 1, CLIPS: 3}
    done = run()
    assert done.returncode == 0, done.stderr
    assert (folder / "hmdb51_org.rar").read_bytes() == server.files[CLIPS]
    assert f"2 classes in {folder}/hmdb51_org" in done.stdout
    listed = Listed(DataSettings(dataset_path=folder / "hmdb51_org"))
    split = listed.split(1)
    assert (listed.name, split.classes, split.missing()) == ("hmdb51", ["brush_hair", "clap"], None)
    assert [clip.video.path.stat().st_size for clip in split.train + split.test] == [50_000, 50_000]
    left = {path.name for path in folder.iterdir()}
    assert left == {
        "download_hmdb51.sh", "download_ucf101.sh", "hmdb51_org.rar", "test_train_splits.rar", "hmdb51_org",
        "testTrainMulti_7030_splits",
    }  # fmt: skip
    server.log.clear()
    again = run()
    assert (again.returncode, server.log) == (0, [])


def test_a_damaged_class_stops_it_and_leaves_no_half_of_a_data_set(server, download):
    folder, run = download
    good = server.files[CLIPS]
    inner = stored_rar(b"clap/x.avi", b"content")
    broken = inner.replace(b"content", b"kontent")
    server.files[CLIPS] = stored_rar(b"clap.rar", broken)
    done = run()
    assert done.returncode == 1
    assert "cannot be unpacked" in done.stderr
    assert not (folder / "hmdb51_org").exists()
    (folder / "hmdb51_org.rar").unlink()
    server.files[CLIPS] = good
    assert run().returncode == 0
    assert sorted(path.name for path in (folder / "hmdb51_org").iterdir()) == ["brush_hair", "clap"]


def test_an_archive_that_is_none_is_not_taken(server, download):
    _, run = download
    server.files[LISTS] = b"<html>not an archive</html>" * 1000
    done = run()
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert "HMDB51" not in done.stdout
    gone = run(HMDB51_BASE_URL=server.url + "/gone")
    assert "see HMDB51_BASE_URL" in gone.stderr


@pytest.mark.skipif(
    shutil.which("unrar") is not None or shutil.which("7z") is not None, reason="a tool to unpack is here"
)
def test_without_a_tool_it_says_what_to_install(download):
    folder, run = download
    done = run(unrar=False)
    assert done.returncode == 1
    assert "install it, for example with: apt install unrar" in done.stderr
    assert (folder / "hmdb51_org.rar").is_file()
