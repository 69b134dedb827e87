"""The downloads of UCF-101 and HMDB-51 against a loopback server that breaks connections half-way."""

import http.server
import os
import shutil
import ssl
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import pytest

from conftest import ROOT
from splits.datasets import DataSettings, Listed

ZIP, RAR = "/UCF101TrainTestSplits-RecognitionTask.zip", "/UCF101.rar"
LISTS, CLIPS = "/test_train_splits.rar", "/hmdb51_org.rar"
NAMES = {
    ZIP: "ucfTrainTestlist.zip", RAR: "UCF101.rar", LISTS: "test_train_splits.rar", CLIPS: "hmdb51_org.rar",
}  # fmt: skip
SCRIPTS = {"download_ucf101.sh", "download_hmdb51.sh"}
NO_ARCHIVE = b"<html>not an archive</html>" * 1000

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


def stored_rar(files: dict[str, bytes]) -> bytes:
    """A RAR 4 archive of files that are stored, not compressed (RAR 4.x technical note)."""

    def block(kind: int, flags: int, body: bytes) -> bytes:
        header = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
        return struct.pack("<H", zlib.crc32(header) & 0xFFFF) + header

    archive = b"Rar!\x1a\x07\x00" + block(0x73, 0, b"\0" * 6)
    for name, data in files.items():
        sizes = len(data), len(data), 2, zlib.crc32(data), 0, 20, 0x30, len(name), 0x20
        archive += block(0x74, 0x8000, struct.pack("<IIBIIBBHI", *sizes) + name.encode()) + data
    return archive + block(0x7B, 0x4000, b"")


class Server:
    """Serves files with ranges; `cuts` connections per path end half-way through what is left."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cuts, self.ranges = files, dict.fromkeys(files, 0), True
        self.log: list[tuple[str, int]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                data, start = outer.files.get(self.path), 0
                if data is None:
                    self.send_error(404)
                    return
                asked = self.headers.get("Range")
                if asked and outer.ranges:
                    start = int(asked.removeprefix("bytes=").split("-")[0])
                    if start >= len(data):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if body:
                    outer.log.append((self.path, start))
                    rest = data[start:]
                    if outer.cuts[self.path]:
                        outer.cuts[self.path] -= 1
                        rest = rest[: len(rest) // 2]
                    self.wfile.write(rest)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


CLIP, FILM = "April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "#1_Film_clap_u_nm_np1_fr_goo_0.avi"


@pytest.fixture
def server(tmp_path):
    with zipfile.ZipFile(tmp_path / "lists.zip", "w", zipfile.ZIP_DEFLATED) as lists:
        lists.writestr("ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n")
        lists.writestr("ucfTrainTestlist/noise.bin", os.urandom(100_000))
    classes = {
        "brush_hair.rar": stored_rar({f"brush_hair/{CLIP}": os.urandom(50_000)}),
        "clap.rar": stored_rar({FILM: os.urandom(50_000)}),  # without a folder in it
    }
    hmdb_lists = {
        f"testTrainMulti_7030_splits/{name}_test_split{number}.txt": f"{clip} {side} \n".encode()
        for name, clip, side in (("brush_hair", CLIP, 1), ("clap", FILM, 2))
        for number in (1, 2, 3)
    }
    files = {
        ZIP: (tmp_path / "lists.zip").read_bytes(), RAR: stored_rar({"UCF-101/x.avi": os.urandom(300_000)}),
        LISTS: stored_rar(hmdb_lists), CLIPS: stored_rar(classes),
    }  # fmt: skip
    serving = Server(files)
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


@pytest.fixture
def download(server, tmp_path):
    """The folder of the scripts, and a way to run one of them."""
    folder, tools = tmp_path / "data", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / "data" / name, folder)
    (tools / "unrar").write_text(UNRAR.format(python=sys.executable))
    (tools / "unrar").chmod(0o755)

    def run(name="ucf101", *, unrar=False, **env):
        settings = {
            f"{data_set}_{variable}": value
            for data_set in ("UCF101", "HMDB51")
            for variable, value in (
                ("BASE_URL", server.url), ("SPLITS_BASE_URL", server.url), ("WAIT", "0"), *env.items(),
            )
        }  # fmt: skip
        if unrar and shutil.which("unrar") is None:
            settings["PATH"] = f"{tools}:{os.environ['PATH']}"
        command = ["bash", str(folder / f"download_{name}.sh")]
        return subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=False
        )

    return folder, run


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - SCRIPTS


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_resumed_where_they_broke(server, download, ranges):
    folder, run = download
    server.cuts.update({ZIP: 1, RAR: 3})
    server.ranges = ranges
    if not ranges:
        server.cuts.update({ZIP: 0, RAR: 1})
    done = run()
    assert done.returncode == 0, done.stderr
    assert contents(folder) == {"UCF101.rar", "ucfTrainTestlist.zip"}
    for path in (ZIP, RAR):
        assert (folder / NAMES[path]).read_bytes() == server.files[path]
    if ranges:
        starts = [start for path, start in server.log if path == RAR]
        assert starts == sorted(set(starts))
        assert (starts[0], len(starts)) == (0, 4)
    assert "unrar x UCF101.rar" in done.stdout
    # As documented: the name under which the lists are kept is the one that is typed.
    subprocess.run(["unzip", "-q", "ucfTrainTestlist.zip"], cwd=folder, check=True)
    assert (folder / "ucfTrainTestlist/classInd.txt").is_file()
    server.log.clear()
    again = run()
    assert again.stdout.count("is here already and whole") == 2, again.stderr
    assert server.log == []


def test_an_earlier_run_is_taken_up(server, download):
    folder, run = download
    (folder / "unfinished-UCF101.rar").write_bytes(server.files[RAR][:1234])
    (folder / "unfinished-ucfTrainTestlist.zip").write_bytes(server.files[ZIP])
    done = run()
    assert done.returncode == 0, done.stderr
    assert [start for _, start in server.log] == [1234]
    assert (folder / "UCF101.rar").read_bytes() == server.files[RAR]


def test_it_gives_up_loudly_and_keeps_the_part(server, download):
    folder, run = download
    server.cuts[RAR] = 100
    done = run(TRIES="3")
    assert done.returncode != 0
    assert "gave up after 3" in done.stderr
    assert (folder / "unfinished-UCF101.rar").stat().st_size > 0
    assert not (folder / "UCF101.rar").exists()
    assert "Next" not in done.stdout


@pytest.mark.parametrize("path", [ZIP, RAR, LISTS])
def test_a_damaged_archive_is_not_taken(server, download, path):
    folder, run = download
    server.files[path] = NO_ARCHIVE
    done = run("hmdb51" if path == LISTS else "ucf101")
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert NAMES[path] not in contents(folder)
    assert "Next" not in done.stdout


def test_a_zip_with_a_flipped_bit_is_not_taken(server, download):
    folder, run = download
    data = bytearray(server.files[ZIP])
    data[len(data) // 2] ^= 1
    server.files[ZIP] = bytes(data)
    done = run()
    assert "damaged" in done.stderr
    assert NAMES[ZIP] not in contents(folder)


def test_a_truncated_archive_that_is_there_is_not_overwritten(server, download):
    folder, run = download
    (folder / "ucfTrainTestlist.zip").write_bytes(server.files[ZIP][:5000])
    done = run()
    assert done.returncode != 0
    assert "move it away" in done.stderr
    assert (folder / "ucfTrainTestlist.zip").stat().st_size == 5000


@pytest.mark.parametrize(
    ("name", "url", "message"),
    [
        ("ucf101", "{}/gone", "see UCF101_BASE_URL"),
        ("hmdb51", "{}/gone", "see HMDB51_BASE_URL"),
        ("ucf101", "http://no-such-host.invalid", "no such host"),
    ],
)
def test_a_missing_file_and_a_missing_host(server, download, name, url, message):
    done = download[1](name, BASE_URL=url.format(server.url))
    assert done.returncode == 1
    assert message in done.stderr


def test_tls_is_checked_unless_the_user_opts_out(server, download, tmp_path):
    folder, run = download
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    urls = dict.fromkeys(("BASE_URL", "SPLITS_BASE_URL"), server.url.replace("http:", "https:"))
    checked = run(**urls)
    assert checked.returncode != 0
    assert "UCF101_INSECURE=1" in checked.stderr
    assert contents(folder) == set()
    opted_out = run(**urls, INSECURE="1")
    assert opted_out.returncode == 0, opted_out.stderr
    assert "warning" in opted_out.stderr


def test_all_classes_of_hmdb51_are_unpacked(server, download):
    folder, run = download
    server.cuts.update({LISTS: 1, CLIPS: 3})
    done = run("hmdb51", unrar=True)
    assert done.returncode == 0, done.stderr
    assert f"2 classes in {folder}/hmdb51_org" in done.stdout
    listed = Listed(DataSettings(dataset_path=folder / "hmdb51_org"))
    split = listed.split(1)
    assert (listed.name, split.classes, split.missing()) == ("hmdb51", ["brush_hair", "clap"], None)
    assert [clip.video.path.stat().st_size for clip in split.train + split.test] == [50_000, 50_000]
    unpacked = {"hmdb51_org", "testTrainMulti_7030_splits"}
    assert contents(folder) == {NAMES[CLIPS], NAMES[LISTS]} | unpacked
    server.log.clear()
    again = run("hmdb51", unrar=True)
    assert (again.returncode, server.log) == (0, [])


def test_a_damaged_class_of_hmdb51_stops_it_and_leaves_no_half_of_a_data_set(server, download):
    folder, run = download
    good, inner = server.files[CLIPS], stored_rar({"clap/x.avi": b"content"})
    server.files[CLIPS] = stored_rar({"clap.rar": inner.replace(b"content", b"kontent")})
    done = run("hmdb51", unrar=True)
    assert done.returncode == 1
    assert "cannot be unpacked" in done.stderr
    assert not (folder / "hmdb51_org").exists()
    (folder / "hmdb51_org.rar").unlink()
    server.files[CLIPS] = good
    assert run("hmdb51", unrar=True).returncode == 0
    assert sorted(path.name for path in (folder / "hmdb51_org").iterdir()) == ["brush_hair", "clap"]


@pytest.mark.skipif(bool(shutil.which("unrar") or shutil.which("7z")), reason="a tool to unpack is here")
def test_without_a_tool_it_says_what_to_install(download):
    folder, run = download
    done = run("hmdb51")
    assert done.returncode == 1
    assert "install it, for example with: apt install unrar" in done.stderr
    assert (folder / "hmdb51_org.rar").is_file()
