"""Frames, (H, W, 3) uint8 RGB, into an mp4, with the sound of their source, or into a gif."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import replacing
from utils.process import UserError
from video.opencv import av, cv2
from video.sound import Sound

OUTPUT_SUFFIXES = (".mp4", ".gif")
# Measured on UCF-101's clips against "veryfast" at quality 20: 60 % of the time, files 5 % larger, 42 dB in
# place of 43.
H264 = {"preset": "superfast", "bf": "0", "crf": "23"}
# Ticks per second, about: a multiple of the frame rate's numerator.
CLOCK = 90_000
# Hundredths of a second that a frame of a gif is shown at least.
SHORTEST = 2
# AVCOL_SPC_SMPTE170M, and the number of its primaries and its transfer function.
BT601 = 6


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: Fraction,
    *,
    times: Sequence[Fraction] | None = None,
    sound: Path | None = None,
    begin: Fraction | None = None,
) -> int:
    """Write frames as `path`'s suffix says: .mp4 (H.264, yuv420p, plays in browsers) or .gif.

    The file is written beside and renamed at the end, so `path` is a whole video or as it was before.
    H.264 in yuv420p takes even sizes only: an odd last row or column is repeated. The frame times of a gif
    are multiples of 1/100 s, rounded without drift; frames of less than 1/50 s, which browsers slow down, are
    left out.

    Args:
        frames: (H, W, 3) uint8 RGB, all of one size
        times: seconds at which each frame is shown, in place of a steady `fps`, and at which the last one
            ends, where that is known; may grow as frames come
        sound: a video whose sound an mp4 gets, as long as the picture is
        begin: second of the clock of `sound` at which the picture begins; 0 by default

    Returns: the number of frames written.
    Raises: UserError for another suffix or for no frames at all; OSError if the folder cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; choose .mp4 or .gif")
    with replacing(path) as partial:
        if suffix == ".gif":
            count = _write_gif(partial, _timed(frames, fps, times), fps, times)
        else:
            count = _write_mp4(partial, _timed(frames, fps, times), fps, times, sound, begin or Fraction(0))
        if count == 0:
            raise UserError(f"{path}: there are no frames to write")
    return count


def _timed(
    frames: Iterable[np.ndarray], fps: Fraction, times: Sequence[Fraction] | None
) -> Iterator[tuple[np.ndarray, Fraction]]:
    """Frames, and the second at which each is shown."""
    shown = Fraction(0)
    for number, frame in enumerate(frames):
        # Beyond what is known, frames follow at the usual rate.
        if times is not None and number < len(times):
            shown = times[number]
        elif number:
            shown += 1 / fps
        yield frame, shown


def _end(count: int, last: Fraction, fps: Fraction, times: Sequence[Fraction] | None) -> Fraction:
    """The second at which the last of `count` frames ends."""
    return times[count] if times is not None and len(times) > count else last + 1 / fps


def _write_mp4(
    path: Path,
    frames: Iterator[tuple[np.ndarray, Fraction]],
    fps: Fraction,
    times: Sequence[Fraction] | None,
    sound: Path | None,
    begin: Fraction,
) -> int:
    count, last, shown = 0, -1, Fraction(0)
    # The last packet waits until it is known how long it is shown.
    waiting: list[av.Packet] = []
    options = {"movflags": "+faststart"}
    with (
        av.open(f"file:{path.absolute()}", "w", format="mp4", options=options) as container,
        contextlib.ExitStack() as opened,
    ):
        stream = container.add_stream("libx264", rate=fps, options=H264)
        stream.pix_fmt = "yuv420p"
        # Steady rates are exact, and other times are within a few microseconds.
        ticks = fps.numerator * max(1, round(CLOCK / fps.numerator))
        stream.codec_context.time_base = Fraction(1, ticks)
        # As they are converted below, whatever size they have: AVCOL_SPC_SMPTE170M, AVCOL_RANGE_MPEG.
        stream.codec_context.colorspace = BT601
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT601
        stream.codec_context.color_range = 1
        audio = opened.enter_context(contextlib.closing(Sound(sound, container, begin))) if sound else None
        for count, (frame, shown) in enumerate(frames, 1):
            height, width = frame.shape[:2]
            even = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
            if count == 1:
                stream.height, stream.width = even.shape[:2]
                # On frames up to 640 x 480 x264's threads cost more than they bring.
                stream.codec_context.thread_count = 1 if even.nbytes < 2**20 else 0
            # To the BT.601 colors that FFmpeg would make of rgb24 itself, in less time.
            planes = np.asarray(cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420), np.uint8)
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            last = max(last + 1, round(shown * ticks))
            picture.pts, picture.time_base = last, Fraction(1, ticks)
            picture.duration = round(ticks / fps)
            waiting += stream.encode(picture)
            container.mux(waiting[:-1])
            del waiting[:-1]
            if audio is not None:
                audio.write(shown)
        if count:
            waiting += stream.encode(None)
            end = _end(count, shown, fps, times)
            waiting[-1].duration = max(1, round((end - shown) * ticks))
            container.mux(waiting)
            if audio is not None:
                audio.finish(end)
    return count


def _write_gif(
    path: Path, frames: Iterator[tuple[np.ndarray, Fraction]], fps: Fraction, times: Sequence[Fraction] | None
) -> int:
    count = 0

    def images() -> Iterator[Image.Image]:
        nonlocal count
        waiting: np.ndarray | None = None
        begun, seconds = 0, Fraction(0)  # of the frame that waits to be written, in 1/100 s
        for frame, shown in frames:
            count += 1
            # Until it is known how long it is shown, and that this is long enough.
            if waiting is not None and round(100 * shown) - begun >= SHORTEST:
                yield _gif_image(waiting, round(100 * shown) - begun)
                waiting, begun = None, round(100 * shown)
            if waiting is None:
                waiting = frame.copy()
            seconds = shown
        if waiting is not None:
            ends = round(100 * _end(count, seconds, fps, times))
            yield _gif_image(waiting, max(SHORTEST, ends - begun))

    stream = images()
    first = next(stream, None)
    if first is None:
        return 0
    first.save(path, save_all=True, append_images=stream, loop=0, optimize=False)
    return count


def _gif_image(frame: np.ndarray, hundredths: int) -> Image.Image:
    image = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    image.info["duration"] = 10 * hundredths
    return image
