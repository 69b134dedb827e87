"""The command demo.py as typed, with the tiny encoder, and requests to it."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from conftest import ROOT, free_port
from utils.flags import read

gradio_client = pytest.importorskip("gradio_client", reason="the page's packages are not installed")

# The command with the tiny encoder at hand.
RUN = "import conftest, demo; demo.run(demo.main)"
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
JSON = {"Content-Type": "application/json"}


class Server:
    """The command as typed, and its temporary folder."""

    def __init__(self, checkpoint, folder, *flags, host="127.0.0.1", run=RUN):
        self.temporary, self.port = folder, free_port()
        flags = ["--checkpoint_model", checkpoint, "--port", self.port, "--precision", "fp32", *flags]
        paths = {"PYTHONPATH": str(ROOT / "tests"), "TMPDIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", run, *map(str, flags)], cwd=ROOT, text=True,
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert f"http://{host}:{self.port}" in line, line + self.process.stdout.read()

    def files(self):
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]

    def peak_megabytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def client(self):
        folder = str(self.temporary / "client")
        return gradio_client.Client(f"http://127.0.0.1:{self.port}", verbose=False, download_files=folder)

    def annotate(self, path, overlay="full", change_cost=0.0, only=""):
        """The answer of the page: action, video, segments and the JSON file's contents."""
        action, video, _, segments, tables = self.client().predict(
            gradio_client.handle_file(str(path)), overlay, change_cost, only, api_name="/annotate"
        )
        about = next(path for path in tables if path.endswith(".json"))
        return action, Path(video), segments, json.loads(Path(about).read_text())

    def ask(self, method, path, body=None, headers=None):
        """Status, text and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers or {}, encode_chunked=True)
        answer = connection.getresponse()
        found = answer.status, answer.read().decode(errors="replace"), dict(answer.getheaders())
        connection.close()
        return found

    def send(self, name, content=b"x", headers=FORM):
        """Status and text of the answer to an upload."""
        return self.ask("POST", "/gradio_api/upload", form(name, content), headers)[:2]

    def upload(self, path):
        """A video that has been sent, as the page names it."""
        return {
            "path": json.loads(self.send(path.name, path.read_bytes())[1])[0],
            "meta": {"_type": "gradio.FileData"},
        }

    def error(self, name, inputs):
        """What the page says is wrong with inputs."""
        _, text, _ = self.ask("POST", f"/gradio_api/call/{name}", json.dumps({"data": inputs}), JSON)
        _, text, _ = self.ask("GET", f"/gradio_api/call/{name}/{json.loads(text)['event_id']}")
        event, data = text.strip().split("\n\n")[-1].split("\n")
        assert event == "event: error"
        return json.loads(data.removeprefix("data: "))["error"]

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=30)
        assert "Traceback" not in out, out
        assert self.process.returncode == 0
        assert list(self.temporary.glob("action-recognition-*")) == []


def form(name, content=b"x"):
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n"


def make_page(checkpoint, folder, *flags):
    args = demo.get_args_parser().parse_args(["--checkpoint_model", str(checkpoint), *map(str, flags)])
    recognizer = demo.Recognizer.open(read(demo.BackendSettings, args))
    from annotation.page import Page

    return Page(read(demo.PageSettings, args), recognizer, folder)
