"""Frames out of a video file, each with its own time, the way up and the colors that the file says: PyAV."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from video.files import VideoError, printable
from video.opencv import MAX_PIXELS, av, cv2

# Playlists and numbered images name other files, and are no video files.
FORMATS = (
    "avi,mov,matroska,jpeg_pipe,mpegts,mpeg,flv,live_flv,asf,ogg,mxf,nut,gif,apng,webp,dv,ivf,obu,av1,h264,hevc,vvc,m4v,"
    "mjpeg,mpegvideo,h261,h263,vc1,yuv4mpegpipe,rm,wtv,nsv,gxf,swf,amv,mjpeg_2000,dhav,dirac,dnxhd,cavsvideo"
)
BICUBIC = av.video.reformatter.Interpolation.BICUBIC
# AVColorSpace -> the matrix that swscale calculates with; the two of BT.601 are the same.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
BT601, BT709 = 5, 1
# Rows from which a video that states no matrix is taken to have BT.709, as players do.
HD_ROWS = 720
# Pixels this much wider or taller than they should be are a damaged header's.
WIDEST_PIXEL = 8
# Bytes of a packet that may say no more than "nothing new", as MPEG-4 does for a frame that is left out.
UNCODED = 20
# Seconds without a frame that are told.
LONG_GAP = Fraction(1, 2)
NO_VIDEO = "no video in this file that can be decoded; is it a video?"
# Seconds of an AVI that are rather decoded than searched.
AVI_NEAR = 30.0
# Share of frames that may be lost before a file is called damaged.
TOLERATED = Fraction(1, 50)


@dataclass(frozen=True)
class Frame:
    """A frame of a video."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    second: Fraction  # when it is shown, from the first frame


def open_container(path: Path) -> av.container.InputContainer:
    """A video file. Raises: VideoError if it is none, or cannot be read."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        # As a bare name, one with a colon would be the address of something else.
        return av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise VideoError(f"{printable(path)}: cannot be read ({error.strerror})") from error
        raise VideoError(f"{printable(path)}: {NO_VIDEO}") from error


def open_file(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A video file, and the stream of it that plays: not its cover picture, nor a still beside it.

    Raises: VideoError if there is none that can be decoded, or its frames are too large.
    """
    container = open_container(path)
    cover = av.stream.Disposition.attached_pic
    streams = [one for one in container.streams.video if one.codec_context and not one.disposition & cover]
    moving = [one for one in streams if one.frames != 1] or streams
    best = container.streams.best("video")
    stream = best if best in moving else next(iter(moving), None)
    if stream is None:
        container.close()
        raise VideoError(f"{printable(path)}: {NO_VIDEO}")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        container.close()
        raise VideoError(f"{printable(path)}: {_too_large(width, height)}")
    # Several threads are no faster on small frames, and whoever reads many videos fills the cores.
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container, stream


def _too_large(width: int, height: int) -> str:
    return f"frames of {width} x {height} pixels are too large; {MAX_PIXELS:,} are allowed"


def stated_frames(stream: av.VideoStream, path: Path) -> int:
    """Number of frames as the index states it; 0 if it does not, or states more than there are bytes."""
    if stream.frames > path.stat().st_size:
        return 0
    # The header of an AVI counts frames of no bytes too, which say that the one before stays, and that of an
    # MP4 those that an edit list cuts away. Behind an AVI that was cut there is no index.
    entries, name = len(stream.index_entries), stream.container.format.name
    if (name == "avi" and 2 * entries >= stream.frames) or (name.startswith("mov") and stream.frames):
        return entries
    return stream.frames


def packet_times(container: av.container.InputContainer, stream: av.VideoStream) -> list[Fraction]:
    """When frames are shown, in seconds, sorted, by the packets that are whole: quick, without decoding."""
    shown: list[Fraction] = []
    decoded: list[Fraction] = []
    with contextlib.suppress(av.FFmpegError):  # what follows cannot be read
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and not packet.is_corrupt:
                for stamps, stamp in ((shown, packet.pts), (decoded, packet.dts)):
                    if stamp is not None:
                        stamps.append(stamp * packet.time_base)
    return sorted(shown if len(shown) >= len(decoded) // 2 else decoded)


def frame_rate(times: Sequence[Fraction], stream: av.VideoStream) -> Fraction | None:
    """Frames per second: the stated rate where the sorted times agree with it, else what they say, if any."""
    stated = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
    gaps = sorted(after - before for before, after in pairwise(times) if after > before)
    if not gaps:
        return next(iter(stated), None)
    median = gaps[len(gaps) // 2]
    # Some containers count in milliseconds.
    off = max(stream.time_base or Fraction(0), median / 50)
    for rate in stated:
        if abs(1 / rate - median) <= off:
            return rate
    near = [gap for gap in gaps if abs(gap - median) <= max(off, median / 4)]
    return (len(near) / Fraction(sum(near))).limit_denominator(1001)


@dataclass
class Damage:
    """What is missing of a video or wrong with it, found while it is decoded; times are in ticks."""

    tick: Fraction  # seconds of a unit
    index: int | None  # frames that the index states, without those that an edit list cuts away
    end: Fraction | None  # stated end of the video, by the clock of its frames
    frames: int = 0  # that came
    errors: int = 0  # packets that did not decode
    uncoded: int = 0  # packets that say that the frame before stays
    corrupt: int = 0  # frames that the decoder patched up
    first: int = 0  # times of the first and of the last frame
    last: int = 0
    lasts: int = 0  # how long the last frame is shown, as it states; 0 if it does not
    gaps: Counter[int] = field(default_factory=Counter)  # times between frames, and how often each
    longest: tuple[int, int] = (0, 0)  # of the gaps, and when it begins

    def usual(self) -> int:
        """The gap in the middle of all."""
        seen = 0
        for gap in sorted(self.gaps):
            seen += self.gaps[gap]
            if 2 * seen >= self.gaps.total():
                return gap
        return 0

    def shown_until(self) -> int:
        """When the last frame ends."""
        return self.last + max(self.lasts, self.usual())

    def lost(self) -> int:
        """Frames that are missing: those with an error, and those that the index or the stated end shows.

        An index that is off by a few is an ordinary thing, and not counted.
        """
        missing = 0
        if self.index is not None:
            missing = self.index - self.frames - self.uncoded
        elif self.end is not None and self.frames > 1:
            length = self.shown_until() - self.first
            missing = int((self.end - self.shown_until()) * self.frames / length) if length else 0
        return max(self.errors, missing if missing > TOLERATED * (self.frames + missing) else 0)

    def problems(self) -> list[str]:
        """All of it in sentences; none for a video that is whole."""
        found = []
        if lost := self.lost():
            found.append(f"{self.frames:,} of {self.frames + lost:,} frames decoded")
        if self.corrupt:
            found.append(f"{self.corrupt:,} of {self.frames:,} frames are damaged")
        gap, at = self.longest
        # Of a recording that was paused, or of one that lacks a part: without an index nobody can tell.
        long = max(LONG_GAP / self.tick, TOLERATED * (self.last - self.first), Fraction(10 * self.usual()))
        if self.index is None and gap >= long:
            seconds, begin = float(gap * self.tick), float((at - self.first) * self.tick)
            found.append(f"no frame for {seconds:.1f} s from second {begin:.1f} on")
        return found


def stated_end(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> Fraction | None:
    """Second of the clock of the frames at which a file states the end of its pictures, if it does.

    Estimates by the rate of bytes, and the length of sound that is longer, do not count.
    """
    if stream.frames and not stated_frames(stream, path):
        return None
    base, name = stream.time_base or Fraction(0), container.format.name
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3])
    if name == "asf":
        return None
    if stream.duration and base:
        return ((stream.start_time or 0) + stream.duration) * base
    if len(container.streams) == 1 and container.duration:
        # FLV counts its length from 0, others from their first frame.
        start = 0 if name == "flv" else container.start_time or 0
        return Fraction(start + container.duration, av.time_base)
    return None


class Decoder:
    """Decodes a file once, from its start. Raises: as `open_file`.

    Attributes:
        damage: so far
        begin: when the first frame is shown, in seconds of the clock of the file, on which its sound lies too
    """

    def __init__(self, path: Path) -> None:
        self._container, self._stream = open_file(path)
        tick = self._stream.time_base or Fraction(1, 90_000)
        end = stated_end(self._container, self._stream, path)
        index = stated_frames(self._stream, path) or None
        self.damage = Damage(tick, index, None if end is None else end / tick)
        self._is_avi = self._container.format.name == "avi"
        self._matrices: dict[tuple[str, int, bool], int | None] = {}
        self.begin: Fraction | None = None
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._turn: tuple[bool, int | None] = False, None

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def seek(self, second: float) -> bool:
        """Go on from the last key frame before a second after the first frame; False if the file has no way.

        Times stay those from the first frame, but in files whose clock begins anew.
        """
        # Behind a search the frames of an AVI may be one place off.
        if self._is_avi and second < AVI_NEAR:
            return False
        damage, first = self.damage, next(self._frames(), None)
        stamp = None if first is None else self._stamp(first)
        if stamp is None:
            return False
        damage.first = damage.last = stamp
        damage.frames, self.begin = 1, stamp * damage.tick
        try:
            self._container.seek(stamp + int(second / damage.tick), stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def _stamp(self, frame: av.VideoFrame) -> int | None:
        # AVI says when frames are decoded; when they are shown is guessed, wrongly for B-frames in pairs.
        return frame.dts if self._is_avi or frame.pts is None else frame.pts

    def __iter__(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Frames as they are coded, and the tick of `damage` at which each is shown, from the first one."""
        damage, tick = self.damage, self.damage.tick
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        usual = max(1, round(1 / (rate * tick))) if rate > 0 else 1
        second, shift, back = round(1 / tick), 0, None
        # Whole numbers: fractions would take as long as a small frame takes to decode.
        for frame in self._frames():
            stamp = self._stamp(frame)
            time = damage.last + usual if stamp is None else stamp + shift
            if damage.frames == 0:
                damage.first = time = stamp or 0
                self.begin = time * tick
            else:
                behind = time < damage.last - second
                if behind:
                    # A second frame that goes on from there tells that the clock began anew, as where two
                    # recordings were joined; one alone has a wrong time.
                    if back is not None and time >= back:
                        shift += damage.last + usual - time
                    back, time = time, damage.last + usual
                elif time <= damage.last:
                    # Two at one time cannot be shown.
                    time = damage.last + 1
                back = back if behind else None
                gap = time - damage.last
                damage.gaps[gap] += 1
                damage.longest = max(damage.longest, (gap, damage.last))
            damage.last, damage.lasts = time, frame.duration or 0
            damage.frames += 1
            damage.corrupt += frame.is_corrupt
            yield frame, time - damage.first

    def _frames(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_discard and self.damage.index:
                    self.damage.index -= 1
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    self.damage.errors += 1
                    continue
                self.damage.uncoded += not frames and 0 < packet.size < UNCODED
                yield from frames
        except av.FFmpegError:
            # What follows cannot be read; the decoder may still hold frames.
            self.damage.errors += 1
            try:
                yield from self._stream.decode(None)
            except av.FFmpegError:
                self.damage.errors += 1

    def image(self, frame: av.VideoFrame) -> np.ndarray | None:
        """A frame as it is to be seen, (H, W, 3) uint8 RGB, all of one size; None if it cannot be converted.

        Turned and mirrored as the file says, with square pixels, by the color matrix that it states.

        Raises: VideoError if square pixels make the frames too large.
        """
        if self._size is None:
            self._turn = _turn_of(frame)
            self._size = _square_size(frame, self._stream)
        width, height = self._size
        key = frame.format.name, frame.colorspace, frame.height >= HD_ROWS
        if key not in self._matrices:
            # Of RGB and of gray there is no matrix.
            has_one = not frame.format.is_rgb and len(frame.format.components) > 2
            usual = BT709 if frame.height >= HD_ROWS else BT601
            self._matrices[key] = MATRICES.get(frame.colorspace, usual) if has_one else None
        try:
            options = {"src_colorspace": self._matrices[key], "interpolation": BICUBIC, "threads": 1}
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", **options)
        except (av.FFmpegError, ValueError):
            self.damage.errors += 1
            return None
        transpose, flip = self._turn
        image: np.ndarray = cv2.transpose(rgb.to_ndarray()) if transpose else rgb.to_ndarray()
        return image if flip is None else cv2.flip(image, flip)


def _square_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Width and height of a frame once its pixels are square."""
    ratio = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, WIDEST_PIXEL) <= ratio <= WIDEST_PIXEL:
        ratio = Fraction(1)
    width = max(1, round(frame.width * ratio))
    if width * frame.height > MAX_PIXELS:
        raise VideoError(_too_large(width, frame.height))
    return width, frame.height


def _turn_of(frame: av.VideoFrame) -> tuple[bool, int | None]:
    """Whether a frame is to be transposed, and then how OpenCV flips it: by its display matrix.

    See libavutil/display.h; other angles go to the nearest quarter.
    """
    try:
        matrix = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]
    except (KeyError, ValueError):  # ValueError: of a kind that PyAV does not know
        return False, None
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    # A pixel (x, y) is shown at (a x + c y, b x + d y).
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    flip_rows, flip_columns = (b < 0, c < 0) if transpose else (d < 0, a < 0)
    return transpose, {(0, 0): None, (1, 0): 0, (0, 1): 1, (1, 1): -1}[flip_rows, flip_columns]
