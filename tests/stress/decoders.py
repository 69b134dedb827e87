"""Videos of many kinds, decoded by the project and by ffmpeg: the same frames, times, colors and sound?

python3 tests/stress/decoders.py           # needs the programs ffmpeg and ffprobe
python3 tests/stress/decoders.py more.mp4 files/*.avi
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from tqdm import tqdm

from video.files import VideoError
from video.opencv import av
from video.reader import Video
from video.writer import write_video

RATE = 44100
BEEP = 0.6, 0.4  # its begin and length, in seconds of the sound
UNEVEN = (0, 40, 80, 200, 233, 300, 340, 460, 500, 533)


@dataclass
class Kind:
    """How to draw a file."""

    name: str
    codec: str = "libx264"
    pixels: str = "yuv420p"
    size: tuple[int, int] = (176, 144)
    rate: Fraction = Fraction(25)
    frames: int = 40
    options: dict[str, str] = field(default_factory=dict)
    uneven: bool = False
    sound: str = ""
    late: float = 0.0
    sound_rate: int = RATE
    set: dict[str, Any] = field(default_factory=dict)
    turn: tuple[int, bool, bool] | None = None
    ratio: Fraction | None = None
    sizes: tuple[int, int] | None = None  # from the middle on
    begin: float = 0.0


B, HD, QUIET, FAST = {"bf": "2"}, (1280, 720), {"x265-params": "log-level=none"}, {"deadline": "realtime"}
# Every container and codec that PyAV writes here, and what files state about their pictures.
KINDS = [
    *(Kind(f"h264.{end}", options=B) for end in ("mp4", "mov", "mkv", "avi", "ts", "flv", "3gp", "m4v")),
    Kind("closed_b.mp4", options={"bf": "3", "g": "12"}),
    *(Kind(f"hevc.{end}", "libx265", options=QUIET) for end in ("mp4", "mkv")),
    *(Kind(f"mpeg4.{end}", "mpeg4") for end in ("avi", "mp4", "mkv")),
    Kind("mpeg4_b.avi", "mpeg4", options=B),
    Kind("mpeg4_b.mp4", "mpeg4", options=B),
    *(Kind(f"mpeg2.{end}", "mpeg2video", options=B) for end in ("mpg", "ts", "vob", "mkv")),
    Kind("interlaced.mpg", "mpeg2video", size=(720, 576), options={"flags": "+ildct+ilme"}),
    Kind("mpeg1.mpg", "mpeg1video"),
    *(Kind(f"mjpeg.{end}", "mjpeg", "yuvj420p") for end in ("avi", "mov", "mkv")),
    Kind("mjpeg422.avi", "mjpeg", "yuvj422p"),
    Kind("vp8.webm", "libvpx", options=FAST),
    Kind("vp8_hidden.webm", "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"}),
    *(Kind(f"vp9.{end}", "libvpx-vp9", options={"cpu-used": "8"}) for end in ("webm", "mp4")),
    Kind("av1.mp4", "libsvtav1", options={"preset": "12"}),
    Kind("wmv2.wmv", "wmv2"),
    Kind("msmpeg4.asf", "msmpeg4"),
    Kind("flv1.flv", "flv"),
    Kind("h263.3gp", "h263"),
    Kind("ffv1.mkv", "ffv1"),
    Kind("huffyuv.avi", "huffyuv", "yuv422p"),
    Kind("prores.mov", "prores_ks", "yuv422p10le"),
    Kind("alpha.mov", "prores_ks", "yuva444p10le"),
    Kind("rgb.avi", "rawvideo", "bgr24"),
    Kind("rgb.mov", "qtrle", "rgb24"),
    Kind("gray.mkv", "ffv1", "gray"),
    Kind("png.mov", "png", "rgba"),
    Kind("ten_bit.mp4", "libx264", "yuv420p10le"),
    Kind("ten_bit.mkv", "libx265", "yuv420p10le", options=QUIET),
    Kind("444.mp4", "libx264", "yuv444p"),
    Kind("422.mp4", "libx264", "yuv422p"),
    Kind("full_range.mp4", "libx264", "yuvj420p"),
    Kind("hd_709.mp4", size=HD, frames=12, set={"colorspace": 1, "color_range": 1}),
    Kind("hd_601.mp4", size=HD, frames=12, set={"colorspace": 6, "color_range": 1}),
    Kind("hd.mp4", size=HD, frames=12),
    Kind("sd_709.mp4", set={"colorspace": 1, "color_range": 1}),
    Kind("odd.mkv", "ffv1", "yuv444p", (175, 143)),
    Kind("odd.avi", "mjpeg", "yuvj420p", (175, 143)),
    *(Kind(f"uneven.{end}", uneven=True, options=B) for end in ("mp4", "mkv", "mov", "ts")),
    Kind("uneven.webm", "libvpx", uneven=True, options=FAST),
    *(Kind(f"turned_{turn}.mp4", turn=(turn, False, False)) for turn in (90, 180, 270)),
    Kind("mirrored.mov", turn=(0, True, False)),
    Kind("upside_down.mp4", turn=(0, False, True)),
    Kind("turned_mirrored.mp4", turn=(90, True, False)),
    Kind("wide_pixels.mp4", ratio=Fraction(16, 11)),
    Kind("tall_pixels.mkv", ratio=Fraction(8, 9)),
    Kind("ntsc.mp4", rate=Fraction(30000, 1001)),
    Kind("film.mkv", rate=Fraction(24000, 1001)),
    Kind("fast.mp4", rate=Fraction(120)),
    Kind("sizes.ts", "mpeg2video", sizes=(88, 72)),
    Kind("late_start.ts", begin=7.5),
    Kind("late_start.mkv", begin=3.2),
    Kind("aac.mp4", sound="aac", frames=60),
    Kind("aac.ts", sound="aac", frames=60),
    Kind("late_aac.mkv", sound="aac", late=0.7, frames=60),
    Kind("mp3.avi", sound="libmp3lame", frames=60),
    Kind("pcm.avi", sound="pcm_s16le", frames=60),
    Kind("late_pcm.mov", sound="pcm_s16le", late=0.9, frames=60),
    Kind("slow_pcm.avi", sound="pcm_u8", sound_rate=6000, frames=60),
    Kind("fast_pcm.mov", sound="pcm_s16le", sound_rate=96000, frames=60),
    Kind("opus.webm", "libvpx", sound="libopus", sound_rate=48000, frames=60),
    Kind("flac.mkv", sound="flac", frames=60, late=0.3),
    Kind("ac3.ts", sound="ac3", frames=60),
    Kind("mp2.mpg", "mpeg2video", sound="mp2", frames=60),
]  # fmt: skip


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A smooth scene in color that moves, (H, W, 3) uint8 RGB."""
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(3 * x + 0.2 * number), np.cos(4 * y - 0.1 * number), np.sin(2 * (x + y) + 0.15 * number)]
    return (127 + 90 * np.stack(waves, -1)).astype(np.uint8)


def draw(kind: Kind, path: Path) -> None:
    """Write a file of a kind. Raises: av.FFmpegError if PyAV cannot."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind.codec, rate=kind.rate, options=dict(kind.options))
        stream.width, stream.height = kind.size
        stream.pix_fmt = kind.pixels
        for name, value in kind.set.items():
            setattr(stream.codec_context, name, value)
        if kind.ratio:
            stream.codec_context.sample_aspect_ratio = kind.ratio
        if kind.turn:
            stream.set_display_rotation(kind.turn[0], hflip=kind.turn[1], vflip=kind.turn[2])
        base = Fraction(1, 1000) if kind.uneven else 1 / kind.rate
        stream.codec_context.time_base = base
        sound = container.add_stream(kind.sound, rate=kind.sound_rate, layout="mono") if kind.sound else None
        for number in range(kind.frames // 2 if kind.sizes else kind.frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *kind.size), format="rgb24")
            time = UNEVEN[number % len(UNEVEN)] + 600 * (number // len(UNEVEN)) if kind.uneven else number
            frame.pts, frame.time_base = time + round(kind.begin / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_sound(kind, container, sound)
    if kind.sizes:
        # Behind it a second stream of another size, as broadcasts have it: bytes behind bytes.
        half = kind.frames // 2
        rest = path.with_name(f"rest_{path.name}")
        draw(Kind(rest.name, kind.codec, size=kind.sizes, frames=half, begin=half / float(kind.rate)), rest)
        path.write_bytes(path.read_bytes() + rest.read_bytes())
        rest.unlink()


def _add_sound(kind: Kind, container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    seconds = kind.frames / float(kind.rate) - kind.late
    time = np.arange(round(seconds * kind.sound_rate)) / kind.sound_rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time) * ((time >= BEEP[0]) & (time < sum(BEEP)))
    for start in range(0, len(tone), 1024):
        samples = (32767 * tone[None, start : start + 1024]).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.rate, frame.time_base = kind.sound_rate, Fraction(1, kind.sound_rate)
        frame.pts = start + round(kind.late * kind.sound_rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def run(*command: object) -> bytes:
    """What a program prints. Raises: RuntimeError with what it says if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace").strip().splitlines()[-1])
    return done.stdout


def probe(path: Path, entries: str, stream: str) -> list[dict[str, Any]]:
    """Frames or packets of a stream as ffprobe lists them."""
    out = run(
        "ffprobe", "-v", "quiet", "-select_streams", stream, "-show_entries", entries, "-of", "json", path
    )
    return json.loads(out)[entries.partition("=")[0] + "s"]


def best_stream(path: Path) -> int:
    """The stream that plays, among those with pictures."""
    streams = probe(path, "stream=index,nb_frames:stream_disposition=attached_pic", "v")
    streams = [one for one in streams if not one.get("disposition", {}).get("attached_pic")]
    return next((one["index"] for one in streams if one.get("nb_frames") != "1"), streams[0]["index"])


def sound_times(path: Path) -> tuple[float, float] | None:
    """Begin and end of what can be heard, in seconds from the first frame; None without sound."""
    first = [frame for frame in probe(path, "frame=best_effort_timestamp_time", "a") if frame]
    if not first:
        return None
    pictures = probe(path, "frame=best_effort_timestamp_time", str(best_stream(path)))
    begin = float(first[0]["best_effort_timestamp_time"]) - float(pictures[0]["best_effort_timestamp_time"])
    raw = run(
        "ffmpeg", "-v", "quiet", "-i", path, "-map", "0:a:0", "-ac", 1, "-ar", 48000, "-f", "f32le", "-"
    )
    samples = np.abs(np.frombuffer(raw, np.float32))
    heard = np.flatnonzero(samples > 0.1)
    return begin + heard[0] / 48000, begin + heard[-1] / 48000


def compare(path: Path, folder: Path) -> list[str]:
    """What differs between the project's decoding of a file and ffmpeg's."""
    video = Video(path)
    frames = list(video.timed_frames())
    height, width = frames[0].image.shape[:2]
    stream = best_stream(path)
    listed = probe(path, "frame=best_effort_timestamp_time,pts_time,height,color_space", str(stream))
    stamps: list[float] = []
    for one in listed:
        # At the end of some files ffprobe knows no time: what came before goes on.
        guessed = 2 * stamps[-1] - stamps[-2] if len(stamps) > 1 else "nan"
        stamps.append(float(one.get("best_effort_timestamp_time", guessed)))
    times = np.array(stamps) - stamps[0]
    found = []
    if len(times) != len(frames):
        found.append(f"{len(frames)} frames, ffmpeg {len(times)}")
    else:
        off = np.abs(times - [float(frame.second) for frame in frames]).max()
        if not off <= 0.001:
            found.append(f"times {1000 * off:.1f} ms off")
    # ffmpeg takes BT.601 where no matrix is stated, of whatever size.
    unstated = listed[0].get("color_space", "unknown") == "unknown" and listed[0]["height"] >= 720
    matrix = ":in_color_matrix=bt709" if unstated else ""
    raw = run(
        "ffmpeg", "-v", "quiet", "-i", path, "-map", f"0:{stream}", "-fps_mode", "passthrough", "-vf",
        f"scale={width}:{height}:flags=bicubic{matrix}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-",
    )  # fmt: skip
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    if len(theirs) != len(frames):
        found.append(f"{len(frames)} pictures, ffmpeg {len(theirs)}")
    else:
        pairs = zip((frame.image for frame in frames), theirs, strict=True)
        off = max(float(np.abs(ours.astype(int) - other).mean()) for ours, other in pairs)
        if off >= 2:
            found.append(f"pixels {off:.1f} levels off")
    output = folder / "out.mp4"
    seconds = [frame.second for frame in frames]
    images = (frame.image for frame in frames)
    write_video(output, images, video.fps(), times=seconds, sound=path, begin=video.begin)
    written = [float(frame.second) for frame in Video(output).timed_frames()]
    if not np.allclose(written, [float(second) for second in seconds], atol=0.001):
        found.append("times of the output")
    heard, kept = sound_times(path), sound_times(output)
    if (heard is None) != (kept is None):
        found.append("sound is lost" if kept is None else "sound from nowhere")
    elif heard and kept:
        off = max(abs(one - other) for one, other in zip(heard, kept, strict=True))
        if off > 0.03:
            found.append(f"sound {1000 * off:.0f} ms off")
    return found


def same_twice(path: Path) -> bool:
    """Whether a file decodes to the same pictures again, or the same error, whatever memory holds."""
    seen = []
    for fill in (0, 255):
        dirty = [np.full((400, 400, 3), fill, np.uint8) for _ in range(50)]
        del dirty
        digest = hashlib.sha256()
        try:
            for frame in Video(path).frames():
                digest.update(frame.tobytes())
        except VideoError as error:
            digest.update(str(error).encode())
        seen.append(digest.hexdigest())
    return seen[0] == seen[1]


def main(argv: list[str] | None = None) -> int:
    """Draw and compare; returns 1 if anything differs."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("files", nargs="*", type=Path, help="in place of those that are drawn")
    flags.add_argument("--twice", type=Path, help=argparse.SUPPRESS)
    args = flags.parse_args(argv)
    if args.twice:
        return 0 if same_twice(args.twice) else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, unwritten = [], []
        for kind in [] if args.files else KINDS:
            try:
                draw(kind, folder / kind.name)
                files.append(folder / kind.name)
            except (av.FFmpegError, ValueError, OSError) as error:
                unwritten.append(f"{kind.name}: {error}")
        files += args.files
        bad = 0
        for path in tqdm(files, dynamic_ncols=True):
            try:
                differences = compare(path, folder)
            except Exception as error:
                differences = [f"{type(error).__name__}: {error}"]
            if differences:
                bad += 1
                tqdm.write(f"{path.name}: {'; '.join(differences)}")
        print(f"{len(files)} files, {bad} differ")
        for line in unwritten:
            print(f"not drawn: {line}")
    return 1 if bad or unwritten else 0


if __name__ == "__main__":
    sys.exit(main())
