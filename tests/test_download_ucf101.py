"""`data/download_ucf101.sh` against a loopback server that breaks connections half-way."""

import http.server
import os
import shutil
import struct
import subprocess
import threading
import zipfile
import zlib
from pathlib import Path

import pytest

from conftest import ROOT

ZIP = "/UCF101TrainTestSplits-RecognitionTask.zip"
RAR = "/UCF101.rar"


def stored_rar(name: bytes, data: bytes) -> bytes:
    """A RAR 4 archive of one file that is stored, not compressed (RAR 4.x technical note)."""

    def block(kind: int, flags: int, body: bytes) -> bytes:
        header = struct.pack("<BHH", kind, flags, 7 + len(body)) + body
        return struct.pack("<H", zlib.crc32(header) & 0xFFFF) + header

    body = (
        struct.pack("<IIBIIBBHI", len(data), len(data), 2, zlib.crc32(data), 0, 20, 0x30, len(name), 0x20)
        + name
    )
    return (
        b"Rar!\x1a\x07\x00"
        + block(0x73, 0, b"\0" * 6)
        + block(0x74, 0x8000, body)
        + data
        + block(0x7B, 0x4000, b"")
    )


class Server:
    """Serves files with ranges; `cuts` connections per path end half-way through what is left."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cuts, self.ranges = files, dict.fromkeys(files, 0), True
        self.log: list[tuple[str, str, int]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                data = outer.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                start = 0
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
                    outer.log.append((self.path, self.command, start))
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


@pytest.fixture
def server(tmp_path):
    archive = tmp_path / "lists.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as lists:
        lists.writestr("ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n")
        lists.writestr("ucfTrainTestlist/noise.bin", os.urandom(100_000))
    serving = Server({ZIP: archive.read_bytes(), RAR: stored_rar(b"UCF-101/x.avi", os.urandom(300_000))})
    yield serving
    serving.server.shutdown()
    serving.server.server_close()


@pytest.fixture
def download(server, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(ROOT / "data/download_ucf101.sh", folder)

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "UCF101_BASE_URL": server.url,
            "UCF101_SPLITS_BASE_URL": server.url,
            "UCF101_WAIT": "0",
            **env,
        }
        command = ["bash", str(folder / "download_ucf101.sh")]
        return subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
        )

    return folder, run


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"download_ucf101.sh"}


def test_broken_connections_are_resumed_where_they_broke(server, download):
    folder, run = download
    server.cuts = {ZIP: 1, RAR: 3}
    done = run()
    assert done.returncode == 0, done.stderr
    assert (folder / "UCF101.rar").read_bytes() == server.files[RAR]
    assert (folder / "ucfTrainTestlist.zip").read_bytes() == server.files[ZIP]
    starts = [start for path, _, start in server.log if path == RAR]
    assert starts[0] == 0
    assert sorted(set(starts)) == starts
    assert len(starts) == 4
    assert contents(folder) == {"UCF101.rar", "ucfTrainTestlist.zip"}
    assert "unrar x UCF101.rar" in done.stdout
    assert "unzip ucfTrainTestlist.zip" in done.stdout
    # As documented: the name under which the lists are kept is the one that is typed.
    subprocess.run(["unzip", "-q", "ucfTrainTestlist.zip"], cwd=folder, check=True)
    assert (folder / "ucfTrainTestlist/classInd.txt").is_file()


def test_what_is_whole_is_not_fetched_again(server, download):
    _, run = download
    assert run().returncode == 0
    server.log.clear()
    again = run()
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is here already and whole") == 2
    assert server.log == []


def test_an_earlier_run_is_taken_up(server, download):
    folder, run = download
    (folder / "unfinished-UCF101.rar").write_bytes(server.files[RAR][:1234])
    (folder / "unfinished-ucfTrainTestlist.zip").write_bytes(server.files[ZIP])
    done = run()
    assert done.returncode == 0, done.stderr
    assert [start for _, _, start in server.log] == [1234]
    assert (folder / "UCF101.rar").read_bytes() == server.files[RAR]


def test_a_server_without_ranges_is_started_again(server, download):
    folder, run = download
    server.ranges = False
    server.cuts = {ZIP: 0, RAR: 1}
    done = run()
    assert done.returncode == 0, done.stderr
    assert (folder / "UCF101.rar").read_bytes() == server.files[RAR]


def test_it_gives_up_loudly_and_keeps_the_part(server, download):
    folder, run = download
    server.cuts = {ZIP: 0, RAR: 100}
    done = run(UCF101_TRIES="3")
    assert done.returncode != 0
    assert "gave up after 3" in done.stderr
    assert (folder / "unfinished-UCF101.rar").stat().st_size > 0
    assert not (folder / "UCF101.rar").exists()
    assert "Next" not in done.stdout


@pytest.mark.parametrize("path", [ZIP, RAR])
def test_a_damaged_archive_is_not_taken(server, download, path):
    folder, run = download
    server.files[path] = b"<html>not an archive</html>" * 1000
    done = run()
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert not any(
        name in contents(folder) for name in (["UCF101.rar"] if path == RAR else ["ucfTrainTestlist.zip"])
    )
    assert "Next" not in done.stdout


def test_a_truncated_archive_that_is_there_is_not_overwritten(server, download):
    folder, run = download
    (folder / "ucfTrainTestlist.zip").write_bytes(server.files[ZIP][:5000])
    done = run()
    assert done.returncode != 0
    assert "move it away" in done.stderr
    assert (folder / "ucfTrainTestlist.zip").stat().st_size == 5000


def test_a_missing_file_and_a_missing_host(server, download):
    _, run = download
    gone = run(UCF101_BASE_URL=server.url + "/gone")
    assert gone.returncode != 0
    assert "refused" in gone.stderr
    host = run(UCF101_BASE_URL="http://no-such-host.invalid")
    assert host.returncode != 0
    assert "no such host" in host.stderr


def test_tls_is_checked_unless_the_user_opts_out(server, download, tmp_path):
    folder, run = download
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    )
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=True)
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    urls = {"UCF101_BASE_URL": url, "UCF101_SPLITS_BASE_URL": url}
    checked = run(**urls)
    assert checked.returncode != 0
    assert "UCF101_INSECURE=1" in checked.stderr
    assert contents(folder) == set()
    opted_out = run(**urls, UCF101_INSECURE="1")
    assert opted_out.returncode == 0, opted_out.stderr
    assert "warning" in opted_out.stderr
