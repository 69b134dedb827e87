"""How frozen encoders are computed: by which engine, in what precision, and with which quantised networks."""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from features.encoder import INT8, OPENVINO, TORCH, Encoder
from features.openvino_network import GET_OPENVINO, Quantized, can_quantize, openvino_is_installed
from features.settings import DeviceSettings
from features.streams import Cutter, Stream
from splits.split import Clip
from utils.device import choose_dtype
from utils.files import make_writable_folder, write_whole
from utils.process import UserError, say
from utils.ranks import ALONE, Ranks

# Of a data set: what measures the ranges of a network's activations. 32 windows of i3d are 2,048 frames.
CLIPS, WINDOWS_OF_A_CLIP, FRAMES_OF_A_CLIP = 32, 8, 64


@dataclass(frozen=True)
class Calibration:
    """What networks may be quantised on, and where they are kept.

    Attributes:
        clips: training clips that are there, held out or not: their labels are not looked at
        names: of all clips that are trained on, there or not
        folder: of all caches of the data set
        frame_stride: every N-th frame is read
        by_itself: without being asked for; a data set without clips that all splits train on would be
            encoded anew for each
        ranks: processes that compute together
    """

    clips: Sequence[Clip]
    names: Collection[str]
    folder: Path
    frame_stride: int
    by_itself: bool
    ranks: Ranks = ALONE

    @classmethod
    def on(
        cls,
        clips: Sequence[Clip],
        names: Collection[str],
        folder: Path,
        frame_stride: int,
        ranks: Ranks,
        *,
        one_split: bool,
    ) -> Self:
        """On those of `clips` that no split tests, whose `names` they are among.

        Args:
            one_split: where there are none, on all of them, which one split trains on
        """
        chosen = [clip for clip in clips if clip.name in names]
        if chosen or not one_split:
            # With fewer, nobody has measured that nothing is lost.
            return cls(chosen, names, folder, frame_stride, len(chosen) >= CLIPS, ranks)
        return cls(clips, [clip.name for clip in clips], folder, frame_stride, False, ranks)


def prepare_encoders(
    opened: Sequence[tuple[Encoder, Stream]],
    settings: DeviceSettings,
    calibration: Calibration | None = None,
) -> None:
    """Make the encoders of some streams, which are on their device, as fast as that allows.

    Without flags that say otherwise that is OpenVINO in 8-bit integers, on a CPU, where an encoder is
    quantised, or is known to lose nothing by it and there are clips to do it with; PyTorch otherwise.

    Raises: UserError for flags that exclude each other or what is here, or without a package.
    """
    own = list(dict.fromkeys(encoder for encoder, _ in opened))
    auto = _takes_int8_by_itself(opened, settings, calibration)
    int8 = [
        auto or settings.precision == "int8" or (settings.precision == "auto" and bool(encoder.quantized))
        for encoder in own
    ]
    for encoder, quantized in zip(own, int8, strict=True):
        # OpenVINO for all or none: one word tells a training that goes on what computes its encoders.
        engine = _engine(encoder, settings, quantized, any(int8))
        for _, stream in (pair for pair in opened if pair[0] is encoder):
            if engine == INT8 and stream.view_name not in encoder.quantized:
                if calibration is None:
                    raise UserError(
                        f"--precision int8: {encoder.name} has no quantised network here; features.py and "
                        "train.py make one on training clips, and checkpoints keep it; leave the flag out"
                    )
                encoder.quantized[stream.view_name] = _quantized(encoder, stream, calibration)
        dtype = choose_dtype(settings.precision, encoder.device)
        encoder.prepare(dtype, compile=settings.compile, engine=engine)


def _engine(encoder: Encoder, settings: DeviceSettings, int8: bool, openvino: bool) -> str:
    """One of `encoder.ENGINES`.

    Args:
        int8: its quantised network is wanted
        openvino: without a flag that says otherwise, OpenVINO computes all

    Raises: UserError for flags that exclude each other or what is here.
    """
    on_cpu, asked_int8 = encoder.device.type == "cpu", settings.precision == "int8"
    if not on_cpu and (settings.engine == "openvino" or asked_int8):
        raise UserError(
            f"OpenVINO, which computes int8, is for the CPU and not for {encoder.device}; add --device cpu, "
            "or leave --engine and --precision out"
        )
    if settings.engine == "torch" and asked_int8:
        raise UserError(
            "--precision int8 is for OpenVINO; leave out --engine torch, or take --precision bf16"
        )
    if settings.engine == "torch" or not on_cpu or not (settings.engine == "openvino" or openvino):
        if encoder.quantized:
            say_it_differs(encoder, "here PyTorch computes it")
        return TORCH
    if settings.compile:
        raise UserError(
            f"--compile is for PyTorch, and OpenVINO computes {encoder.name}; leave it out, or add "
            "--engine torch"
        )
    if not openvino_is_installed():
        as_trained = int8 and encoder.quantized
        raise UserError(
            f"OpenVINO is not installed, and computes {encoder.name}"
            + (", which was quantised for training" if as_trained else "")
            + f"; run {GET_OPENVINO}, or use --engine torch"
            + (", whose embeddings differ a little, unless you resume a run" if as_trained else "")
        )
    if encoder.quantized and not int8:
        say_it_differs(encoder, f"here OpenVINO computes it in {settings.precision}")
    return INT8 if int8 else OPENVINO


def say_it_differs(encoder: Encoder, how: str) -> None:
    """Warn that an encoder is not computed with the quantised network of its training, but in another way."""
    say(f"warning: {encoder.name} was quantised for training; {how}, whose embeddings differ a little")


def _takes_int8_by_itself(
    opened: Sequence[tuple[Encoder, Stream]], settings: DeviceSettings, calibration: Calibration | None
) -> bool:
    """Whether encoders are quantised without being asked for; where only something lacks, that is said."""
    encoders = list(dict.fromkeys(encoder for encoder, _ in opened))
    if (
        calibration is None
        or settings.precision != "auto"
        or settings.engine == "torch"
        or settings.compile
        or not any(encoder.spec.int8 for encoder in encoders)
        or any(encoder.device.type != "cpu" for encoder in encoders)
    ):
        return False
    names = " and ".join(encoder.name for encoder in encoders if encoder.spec.int8)
    if others := [encoder.name for encoder in encoders if not encoder.spec.int8]:
        say(f"{names}: not in int8, which may cost {others[0]} accuracy; --precision int8 takes it for all")
        return False
    if not can_quantize() and not (
        openvino_is_installed()
        and all(_Place.of(encoder, stream, calibration).read() for encoder, stream in opened)
    ):
        say(f"{names}: nearly twice as fast in int8, which OpenVINO computes; {GET_OPENVINO}")
        return False
    if not calibration.by_itself:
        say(
            f"{names}: not in int8, for which a cache is wanted, and {CLIPS} clips that no split tests to "
            "measure ranges with; --precision int8 takes what there is"
        )
    return calibration.by_itself


@dataclass(frozen=True)
class _Place:
    """Where a quantised network is kept: beside the caches.

    Attributes:
        folder: of all of them
        start: of its file's name
        about: what it is of, in its file and in its name
        names: of the clips that it may have been quantised on
    """

    folder: Path
    start: str
    about: dict[str, Any]
    names: Collection[str]

    @classmethod
    def of(cls, encoder: Encoder, stream: Stream, calibration: Calibration) -> Self:
        """That of an encoder in a stream."""
        about = {
            "encoder": encoder.name,
            "encoder_sha256": encoder.sha256(),
            "img_dim": stream.img_dim,
            "stream": stream.view_name,
            "resize": stream.resize.words,
            "windows": stream.windows.words,
            "frame_stride": calibration.frame_stride,
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        start = f"{encoder.name.replace('/', '-')[-80:]}-{stream.img_dim}px-{key}-"
        return cls(calibration.folder / "quantized", start, about, calibration.names)

    def read(self) -> tuple[Quantized, Path] | None:
        """The network and its file, if there is one. Raises: UserError if the file is damaged."""
        for path in sorted(self.folder.glob(f"{glob.escape(self.start)}*.pt")):
            try:
                contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                network, clips = Quantized(contents["graph"], contents["weights"]), contents["clips"]
                if not path.stem.endswith(network.sha256[:12]):
                    raise ValueError("its contents do not fit its name")
            # Whatever a damaged file makes the reader stumble over.
            except Exception as error:
                raise UserError(f"{path}: damaged; delete it, it is made again") from error
            if set(clips) <= set(self.names):
                return network, path
        return None


def _quantized(encoder: Encoder, stream: Stream, calibration: Calibration) -> Quantized:
    """A network that is kept beside the caches, or a new one, which is kept then.

    One that was quantised on training clips serves whatever clips have come since.
    """
    place, ranks = _Place.of(encoder, stream, calibration), calibration.ranks
    kept = place.read()
    # All have looked before the first one writes.
    ranks.wait()
    if kept is None and ranks.rank == 0:
        _quantize(encoder, stream, calibration, place)
    ranks.wait()
    # From the file in any case, so that every process has the same.
    kept = kept or place.read()
    if kept is None:
        raise UserError(
            f"{place.folder}: the quantised network is not there; all machines must see this folder"
        )
    network, path = kept
    say(f"{encoder.name}: OpenVINO computes it in int8, as {path} has it; --engine torch does without")
    return network


def _quantize(encoder: Encoder, stream: Stream, calibration: Calibration, place: _Place) -> None:
    chosen = choose_clips(calibration.clips)
    if not chosen:
        raise UserError(
            "int8 needs clips that every split trains on to measure ranges with, and none is there; "
            "train.py --precision int8 takes those of its own split"
        )
    if not can_quantize():
        raise UserError(
            f"quantising {encoder.name} takes the packages openvino and nncf; run {GET_OPENVINO}, or use "
            "--engine torch"
        )
    make_writable_folder(place.folder, advice="name one with --cache_path")
    count = f"{len(chosen)} training clip{'s' * (len(chosen) != 1)}"
    say(f"quantising {encoder.name} for {stream.img_dim} px on {count}")
    windows = calibration_windows(chosen, stream, calibration.frame_stride)
    made = encoder.quantize(stream.view_name, windows)
    buffer = io.BytesIO()
    names = [clip.name for clip in chosen]
    torch.save({"graph": made.graph, "weights": made.weights, "clips": names, **place.about}, buffer)
    write_whole(place.folder / f"{place.start}{made.sha256[:12]}.pt", buffer.getbuffer())


def choose_clips(clips: Sequence[Clip]) -> list[Clip]:
    """Some of the clips, the same ones however many have come between them."""
    by_hash = sorted(clips, key=lambda clip: hashlib.sha256(clip.name.encode()).digest())
    return sorted(by_hash[:CLIPS], key=lambda clip: clip.name)


def calibration_windows(clips: Sequence[Clip], stream: Stream, frame_stride: int) -> Iterator[np.ndarray]:
    """Windows of the clips' beginnings, (1, L, H, W, 3) uint8 each."""
    for clip in clips:
        cutter = Cutter([stream])
        frames = list(islice(clip.video.frames(), 0, FRAMES_OF_A_CLIP * frame_stride, frame_stride))
        cuts = [*cutter.read(frames)[0], *cutter.end()[0]]
        windows = [window for cut in cuts for window in cut.windows]
        for window in windows[:: max(1, -(-len(windows) // WINDOWS_OF_A_CLIP))]:
            yield np.ascontiguousarray(window[None])
