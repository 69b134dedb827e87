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
RUN = """
import conftest, demo
from utils import process
conftest.add_tiny_encoder()
process.run(demo.main)
"""


class Server:
    """The command as typed, and its temporary folder."""

    def __init__(self, checkpoint, folder, *flags, host="127.0.0.1", run=RUN):
        self.temporary = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ["--checkpoint_model", checkpoint, "--port", self.port, "--precision", "fp32", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", run, *map(str, flags)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "tests"),
                "TMPDIR": str(folder),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert f"http://{host}:{self.port}" in line, line + self.process.stdout.read()

    def files(self):
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]

    def peak_megabytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def client(self):
        return gradio_client.Client(self.url, verbose=False, download_files=str(self.temporary / "client"))

    def annotate(self, path, overlay="full", smooth=0.0, only=""):
        """The answer of the page: action, video, segments and the JSON file's contents."""
        action, video, _, segments, tables = self.client().predict(
            gradio_client.handle_file(str(path)), overlay, smooth, only, api_name="/annotate"
        )
        about = next(path for path in tables if path.endswith(".json"))
        return action, Path(video), segments, json.loads(Path(about).read_text())

    def upload(self, body, headers):
        """Answer to an upload as status and text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest("POST", "/gradio_api/upload")
        for name, value in {"Content-Type": "multipart/form-data; boundary=x", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=30)
        return out


def form(name, content=b"x"):
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n"


def send(server, name, content=b"x"):
    body = form(name, content)
    return server.upload(body, {"Content-Length": str(len(body))})


def make_page(checkpoint, room, *flags):
    args = demo.get_args_parser().parse_args(["--checkpoint_model", str(checkpoint), *flags])
    backend, device = read(demo.BackendSettings, args), read(demo.DeviceSettings, args)
    annotator = demo.Annotator(
        read(demo.LabelSettings, args), *demo.open_model(backend, device), str(checkpoint)
    )
    return demo.Page(read(demo.PageSettings, args), annotator, room)
