"""The sound of a video on its way into an mp4 file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from utils.process import warn
from video.decoder import open_container
from video.files import printable
from video.opencv import av

# Samples a second that AAC has (ISO/IEC 14496-3, 1.6.3.4).
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
# Seconds that sound may be off before a gap is filled with silence.
GAP = 0.03
# Seconds of sound behind the picture that are told.
LONG = Fraction(1, 2)


class Sound:
    """The sound of a video, packet by packet, as AAC.

    It keeps its times against the picture, which begins at the second `begin` of the clock of `source`. What
    is damaged is left out. Where nothing of it decodes there is none, and a warning.
    """

    def __init__(self, source: Path, target: av.container.OutputContainer, begin: Fraction) -> None:
        self._path, self._target, self._begin = source, target, begin
        self._source = open_container(source)
        self._done = Fraction(0)
        self._packets: Iterator[av.Packet] = iter(())
        self._encoder: av.AudioStream | None = None
        self._ends: Fraction | None = None
        streams = self._source.streams.audio
        if not streams:
            return
        best = self._source.streams.best("audio")
        usable = [stream for stream in streams if stream.codec_context is not None]
        stream = best if best in usable else next(iter(usable), None)
        if stream is None or not _can_decode(source, stream.index):
            return warn(f"{printable(source)}: the output is without its sound, which does not decode")
        if stream.duration and stream.time_base:
            self._ends = ((stream.start_time or 0) + stream.duration) * stream.time_base - begin
        elif self._source.duration:
            self._ends = (self._source.start_time + self._source.duration) * Fraction(1, 10**6) - begin
        rate = next((rate for rate in AAC_RATES if rate >= stream.rate), AAC_RATES[-1])
        # Uncompressed sound does not say which channel is which.
        layout = "mono" if stream.layout.nb_channels == 1 else "stereo"
        self._encoder = target.add_stream("aac", rate=rate, layout=layout)
        self._packets = self._encode(stream, self._encoder)

    def _encode(self, stream: av.AudioStream, encoder: av.AudioStream) -> Iterator[av.Packet]:
        written: int | None = None
        for place, samples in self._samples(stream, encoder):
            if written is None:
                written = max(0, place)
            if place + GAP * encoder.rate < written:  # before the picture, or what was there already
                samples = samples[:, written - place :]
            while place - written > GAP * encoder.rate:
                silence = np.zeros((len(samples), min(place - written, encoder.rate)), np.float32)
                yield from self._encoded(encoder, silence, written)
                written += silence.shape[1]
            if samples.shape[1]:
                yield from self._encoded(encoder, samples, written)
                written += samples.shape[1]
            self._done = Fraction(written, encoder.rate)

    def _samples(self, stream: av.AudioStream, encoder: av.AudioStream) -> Iterator[tuple[int, np.ndarray]]:
        """The place of the first sample, from the picture's start, and samples (channels, n), as encoded."""
        resampler, before, follows = None, None, 0
        for packet in _packets(self._source, stream):
            frames = []
            with contextlib.suppress(av.FFmpegError):
                frames = packet.decode()
            for frame in frames:
                assert isinstance(frame, av.AudioFrame)
                kind = frame.format.name, frame.layout.name, frame.rate
                if kind != before:
                    resampler, before = av.AudioResampler("fltp", encoder.layout, encoder.rate), kind
                assert resampler is not None
                place = follows
                if frame.pts is not None and frame.time_base:
                    place = round((frame.pts * frame.time_base - self._begin) * encoder.rate)
                # The resampler would make up for gaps by itself.
                frame.pts = None
                for resampled in resampler.resample(frame):
                    yield place, resampled.to_ndarray()
                    place += resampled.samples
                follows = place

    @staticmethod
    def _encoded(encoder: av.AudioStream, samples: np.ndarray, place: int) -> Iterator[av.Packet]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", encoder.layout.name)
        frame.rate, frame.pts, frame.time_base = encoder.rate, place, Fraction(1, encoder.rate)
        yield from encoder.encode(frame)

    def write(self, seconds: float | Fraction) -> None:
        """Write on to a second of the picture, beside which it lies in the file. Raises: OSError."""
        while self._done <= seconds and (packet := next(self._packets, None)):
            self._target.mux(packet)

    def finish(self, seconds: Fraction) -> None:
        """Write the last, where the picture ends at a second; a warning tells of sound that goes on."""
        self.write(seconds)
        if self._ends is not None and self._ends - seconds >= LONG:
            left_out = float(self._ends - seconds)
            warn(f"{printable(self._path)}: the last {left_out:.1f} s of its sound go, as the picture ends")
        if self._encoder is not None and self._done:
            self._target.mux(self._encoder.encode(None))

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def _packets(source: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    with contextlib.suppress(av.FFmpegError):  # what follows cannot be read
        yield from source.demux(stream)


def _can_decode(path: Path, index: int) -> bool:
    """Whether anything of a stream decodes."""
    with open_container(path) as source:
        for packet in _packets(source, source.streams[index]):
            with contextlib.suppress(av.FFmpegError):
                if packet.decode():
                    return True
    return False
