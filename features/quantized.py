"""A frozen network in 8-bit integers on a CPU, computed by OpenVINO.

Weights are integers with a scale for each channel, activations with one for each tensor (Jacob et al., CVPR
2018). NNCF measures the ranges of the activations on windows that move across the two images that come with
scikit-learn, and corrects the bias that rounding leaves. So the network depends on the encoder, the size of
the frames and the packages alone. It is made once and kept in a cache folder of the user.

Shapes: N windows, L frames of each, H x W pixels, K embeddings of each, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import torch
from torch import Tensor

from features.folding import Normalized
from features.weights import first_line
from features.windows import Windows
from features.workers import pool_size
from utils.files import write_whole
from utils.process import UserError, say
from video.opencv import cv2

if TYPE_CHECKING:
    from features.encoder import Encoder

INSTALL = "run pip install -r requirements-openvino.txt, or use --precision bf16"
# Windows that measure the ranges; those of i3d are 2,048 frames.
WINDOWS = 32


def can_quantize() -> bool:
    """Whether OpenVINO, which runs networks, and NNCF, which quantizes them, are installed."""
    return find_spec("openvino") is not None and find_spec("nncf") is not None


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "action-recognition"


def quantized_network(encoder: Encoder, network: Normalized) -> QuantizedNetwork:
    """The quantized network of an encoder, from the user's cache or made now.

    Args:
        network: of frames by pixel, float32, on the CPU

    Raises: UserError without the packages, or if OpenVINO cannot take the network.
    """
    openvino, nncf = _load("openvino"), _load("nncf")
    versions = [version(name) for name in ("openvino", "nncf", "torch")]
    with contextlib.suppress(PackageNotFoundError):
        versions.append(version("scikit-learn"))
    about = repr((encoder.sha256(), encoder.img_dim, encoder.windows, WINDOWS, versions))
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    path = cache_folder() / f"{encoder.name.replace('/', '-')[-80:]}-{encoder.img_dim}px-int8-{key}.xml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One process makes it while others wait.
        with filelock.FileLock(path.with_suffix(".lock")):
            # The weights are written first.
            if not path.is_file():
                say(f"quantizing {encoder.name} for {encoder.img_dim} px, once; it is kept in {path.parent}")
                _quantize(encoder, network, path, openvino, nncf)
            model = openvino.Core().read_model(path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror or error}); name another folder in the "
            "variable XDG_CACHE_HOME, or use --precision bf16"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"{path}: damaged ({first_line(error)[:200]}); delete it, it is made again"
        ) from error
    return QuantizedNetwork(model, encoder.dtype)


def _load(name: str) -> Any:
    """A package that takes seconds to load, when it is needed. Raises: UserError if it is not installed."""
    # Both report their use over the network where this package is there; they do without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    # NNCF has kernels for GPUs, which PyTorch says it cannot build without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise UserError(f"int8 needs the package {name}; {INSTALL}") from error


def moving_windows(layout: Windows, side: int) -> list[np.ndarray]:
    """Windows (1, L, side, side, 3) uint8 that move like videos do; always the same.

    Each shows one of the two images of scikit-learn, panned, zoomed, turned and made brighter or darker,
    with a patch of the other image that moves across.
    """
    # It takes a second, and is needed once.
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    numbers, made = np.random.default_rng(0), []
    for number in range(WINDOWS):
        image, other = images[number % 2], images[1 - number % 2]
        height, width = image.shape[:2]
        # From the first frame to the last: center, zoom, angle, brightness, corner of the patch.
        begin, end = (numbers.uniform([0.3, 0.3, 0.7, -15, 0.6, 0, 0], [0.7, 0.7, 1.6, 15, 1.3, 0.8, 0.8])
                      for _ in range(2))  # fmt: skip
        size = round(side * numbers.uniform(0.15, 0.4))
        patch = cv2.resize(other, (size, size), interpolation=cv2.INTER_AREA)
        frames = []
        for share in np.linspace(0, 1, layout.frames):
            x, y, zoom, angle, bright, top, left = begin + share * (end - begin)
            scale = zoom * side / min(height, width)
            middle = np.array([x * width, y * height])
            matrix = np.asarray(cv2.getRotationMatrix2D((x * width, y * height), angle, scale), np.float64)
            matrix[:, 2] += side / 2 - middle
            frame = cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REFLECT)
            rows, columns = (round(place * (side - size)) for place in (top, left))
            frame[rows : rows + size, columns : columns + size] = patch
            frames.append(np.clip(frame * bright, 0, 255).astype(np.uint8))
        made.append(np.stack(frames)[None])
    return made


def _quantize(encoder: Encoder, network: Normalized, path: Path, openvino: Any, nncf: Any) -> None:
    """Write <path> and the weights beside it, each whole or not at all."""
    nncf.set_log_level(logging.ERROR)
    model = _convert(encoder, network, openvino)
    windows = moving_windows(encoder.windows, encoder.img_dim)
    # NNCF shows its progress on the standard output, where results go.
    with contextlib.redirect_stdout(sys.stderr):
        quantized = nncf.quantize(model, nncf.Dataset(windows), subset_size=len(windows))
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(quantized, Path(folder) / "network.xml")
        write_whole(path.with_suffix(".bin"), (Path(folder) / "network.bin").read_bytes())
        write_whole(path, (Path(folder) / "network.xml").read_bytes())


def _convert(encoder: Encoder, network: Normalized, openvino: Any) -> Any:
    """The network as OpenVINO's model, of windows of any number and any length.

    Raises: UserError if OpenVINO cannot take it, or computes other numbers.
    """
    layout, side = encoder.windows, encoder.img_dim
    example = torch.zeros(2, layout.frames, side, side, 3, dtype=torch.uint8)
    many = {0: torch.export.Dim("windows", min=1, max=2**16)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(network, (example,), dynamic_shapes=(many,), strict=False)
            model = openvino.convert_model(exported)
            model.reshape([-1, -1, side, side, 3])
            # A network whose graph depends on the length of the example is wrong at the shortest.
            short = torch.arange(3 * layout.least * side**2).remainder(251).to(torch.uint8)
            short = short.view(1, layout.least, side, side, 3)
            expected, computed = network(short), QuantizedNetwork(model, torch.float32)(short)
            tolerance = 1e-2 * float(expected.abs().max())
            if computed.shape != expected.shape or not torch.allclose(computed, expected, atol=tolerance):
                raise ValueError("its answers differ from PyTorch's")
    # The two packages raise whatever the layer that they do not know makes them stumble over.
    except Exception as error:
        raise UserError(
            f"OpenVINO cannot take {encoder.name} ({first_line(error)[:200]}); use --precision bf16"
        ) from error
    return model


class QuantizedNetwork:
    """A network that OpenVINO computes: on one core in each worker thread, on all cores elsewhere.

    Args:
        model: of OpenVINO
        dtype: what is not quantized is computed in
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._core = _load("openvino").Core()
        self._model, self._hint = model, "bf16" if dtype == torch.bfloat16 else "f32"
        # By the number of windows that are computed side by side.
        self._compiled: dict[int, Any] = {}
        self._compiling = threading.Lock()
        self._own = threading.local()

    def _compile(self, streams: int, threads: int) -> Any:
        with self._compiling:
            if streams not in self._compiled:
                settings = {
                    "INFERENCE_PRECISION_HINT": self._hint,
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": threads,
                }
                self._compiled[streams] = self._core.compile_model(self._model, "CPU", settings)
            return self._compiled[streams]

    def __call__(self, windows: Tensor) -> Tensor:
        """Embeddings of windows: (N, L, H, W, 3) uint8 -> (N, K, D) float32."""
        if not hasattr(self._own, "request"):
            network = self._compile(pool_size() or 1, pool_size() or torch.get_num_threads())
            self._own.request = network.create_infer_request()
        result = self._own.request.infer([windows.contiguous().numpy()], share_inputs=True)[0]
        return torch.from_numpy(np.array(result, np.float32))
