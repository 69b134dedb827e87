"""OpenVINO computes a frozen network on a CPU: in floating point, or quantised to 8-bit integers.

Quantised, weights are integers with a scale for each channel, and activations with one for each tensor
(Jacob et al., CVPR 2018). NNCF measures the ranges of the activations on some windows of training clips, and
corrects the bias that rounding leaves. Two 8-bit products take the place of one in bfloat16.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.folding import Normalized
from features.weights import first_line
from features.workers import count_workers, is_worker
from utils.process import UserError

GET_OPENVINO = "pip install -r requirements-openvino.txt"


def openvino_is_installed() -> bool:
    """Whether OpenVINO, which runs networks, is there."""
    return find_spec("openvino") is not None


def can_quantize() -> bool:
    """Whether NNCF, which quantises networks, is there too."""
    return openvino_is_installed() and find_spec("nncf") is not None


def _load(name: str) -> Any:
    """A package that takes seconds to load, when it is needed.

    Raises: UserError if it is not installed.
    """
    # Both report their use over the network where this package is there; they do without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    # NNCF has kernels for GPUs, which PyTorch says it cannot build without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise UserError(
            f"this needs the package {name}; run {GET_OPENVINO}, or use --engine torch"
        ) from error


@dataclass(frozen=True)
class Quantized:
    """A quantised network, in OpenVINO's own format.

    Attributes:
        graph: its XML, uint8 (bytes,)
        weights: uint8 (bytes,)
    """

    graph: Tensor
    weights: Tensor

    @property
    def sha256(self) -> str:
        """SHA-256 of both, as 64 hexadecimal digits."""
        digest = hashlib.sha256(self.graph.numpy().tobytes())
        digest.update(self.weights.numpy().tobytes())
        return digest.hexdigest()


def convert(name: str, network: Normalized, example: Tensor, least: int) -> Any:
    """A network as OpenVINO's model, of windows of any number and any length.

    Args:
        name: of the encoder, for the error
        network: of frames by pixel, on the CPU
        example: two windows as long as most, (2, L, H, W, 3) uint8
        least: frames of the shortest window

    Raises: UserError without the package, or if it cannot take this network, or computes another one.
    """
    openvino = _load("openvino")
    height, width = example.shape[2:4]
    many = {0: torch.export.Dim("windows", min=1, max=2**16)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(network, (example,), dynamic_shapes=(many,), strict=False)
            model = openvino.convert_model(exported)
            model.reshape([-1, -1, height, width, 3])
            # A network that reckons with the length of the example is another one at the shortest.
            short = torch.arange(3 * least * height * width).remainder(251).to(torch.uint8)
            short = short.view(1, least, height, width, 3)
            expected, given = network(short), OpenVinoNetwork(model, torch.float32)(short)
            if given.shape != expected.shape or not torch.allclose(
                given, expected, atol=1e-2 * float(expected.abs().max())
            ):
                raise ValueError("its answers differ from PyTorch's")
    # The two packages raise whatever the layer that they do not know makes them stumble over.
    except Exception as error:
        raise UserError(
            f"OpenVINO cannot take {name} ({first_line(error)[:200]}); use --engine torch"
        ) from error
    return model


def quantize(model: Any, windows: Iterable[np.ndarray]) -> Quantized:
    """Quantise a model of `convert`.

    Args:
        windows: (1, L, H, W, 3) uint8 each; some dozens of them measure the ranges

    Raises: UserError without the packages.
    """
    openvino, nncf = _load("openvino"), _load("nncf")
    nncf.set_log_level(logging.ERROR)
    windows = list(windows)
    # It shows its progress there, where a command's results go.
    with contextlib.redirect_stdout(sys.stderr):
        quantized = nncf.quantize(model, nncf.Dataset(windows), subset_size=len(windows))
    # Names are numbered through a process; without them the same network has the same SHA-256.
    quantized.set_friendly_name("network")
    for number, operation in enumerate(quantized.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(quantized, Path(folder) / "network.xml")
        graph, weights = (
            torch.frombuffer(bytearray((Path(folder) / f"network.{end}").read_bytes()), dtype=torch.uint8)
            for end in ("xml", "bin")
        )
    return Quantized(graph, weights)


class OpenVinoNetwork:
    """A network that OpenVINO computes on the cores that PyTorch may use.

    Args:
        model: of `convert`, or quantised
        dtype: what is not quantised is computed in

    Attributes:
        side: height and width of the frames that it takes, in pixels

    Raises: UserError without the package, or for a quantised network that is damaged.
    """

    def __init__(self, model: Any | Quantized, dtype: torch.dtype) -> None:
        openvino = _load("openvino")
        self._core = openvino.Core()
        if isinstance(model, Quantized):
            try:
                model = self._core.read_model(model.graph.numpy().tobytes(), model.weights.numpy().tobytes())
            except RuntimeError as error:
                raise UserError(
                    "the quantised network is damaged, or of a later OpenVINO "
                    f"({str(error).strip().splitlines()[-1][:200]}); {GET_OPENVINO}, or train anew"
                ) from error
        self._model, self._precision = model, "bf16" if dtype == torch.bfloat16 else "f32"
        self.side = int(model.inputs[0].partial_shape[2].get_length())
        # By how many windows are computed side by side.
        self._compiled: dict[int, Any] = {}
        self._compiling = threading.Lock()
        self._own = threading.local()

    def _compile(self, streams: int) -> Any:
        with self._compiling:
            if streams not in self._compiled:
                settings = {
                    "INFERENCE_PRECISION_HINT": self._precision,
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": streams * torch.get_num_threads(),
                }
                self._compiled[streams] = self._core.compile_model(self._model, "CPU", settings)
            return self._compiled[streams]

    def __call__(self, windows: Tensor) -> Tensor:
        """Embeddings of windows: (N, L, H, W, 3) uint8 -> (N, K, D) float32."""
        if not hasattr(self._own, "request"):
            network = self._compile(count_workers() if is_worker() else 1)
            self._own.request = network.create_infer_request()
        answer = self._own.request.infer([windows.contiguous().numpy()], share_inputs=True)[0]
        return torch.from_numpy(np.array(answer, np.float32))
