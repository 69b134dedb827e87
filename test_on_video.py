"""Write a video with the predicted action and its probability on every frame.

python3 test_on_video.py --video_path x.avi                       # 400 actions, nothing to train
python3 test_on_video.py --video_path x.avi --only "push up,pull ups,juggling balls"
python3 test_on_video.py --video_path x.avi --checkpoint_model model_checkpoints/ConvLSTM_20.pth
python3 test_on_video.py --video_path x.avi --checkpoint_model y.pth --output x.gif
python3 test_on_video.py --video_path clips/ "more/*.mp4" --checkpoint_model y.pth --output shown/
python3 test_on_video.py --video_path 0 --checkpoint_model y.pth                  # camera 0, in a window
python3 test_on_video.py --video_path rtsp://host/path --checkpoint_model y.pth --output x.mp4
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from annotation.annotate import write_annotated
from annotation.heatmap import Maps, draw_heat, video_heat
from annotation.live import LiveVideo, Log, is_live, watch
from annotation.overlay import NONE
from annotation.recognizer import Recognition, Recognizer
from annotation.settings import DEFAULT_ENCODER, BackendSettings, LabelSettings
from features.encoder import Encoder
from features.networks import encoder_spec
from features.settings import DeviceSettings
from utils.files import make_writable_folder, shortened, unused
from utils.flags import Parser, add_flags, read
from utils.process import Deferred, UserError, available_cores, run, say, warn
from video.files import VideoError, find_videos, printable
from video.opencv import cv2
from video.reader import Video, nothing
from video.writer import OUTPUT_SUFFIXES, write_video

# Pixels that small pictures are shown at, and bytes of a gif for each value of a pixel, about.
WINDOW_WIDTH, GIF_BYTES = 640, 0.45


def get_args_parser() -> Parser:
    """The flags of test_on_video.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--video_path",
        nargs="+",
        help="videos, folders and patterns of videos; or a camera by its number from 0, or the address of a "
        "stream, like rtsp://host/path",
    )
    parser.add_argument(
        "--output", type=Path,
        help="file to write or replace, .mp4 or .gif, or a folder; default: the folder annotated, a window "
        "for what is live; tables go beside it",
    )  # fmt: skip
    parser.add_argument(
        "--store", type=Path,
        help="folder that keeps the embeddings of videos, so that a second look with other flags is fast; "
        "default: none",
    )  # fmt: skip
    for name in ("dataset_path", "channels", "latent_dim"):
        parser.add_argument(
            f"--{name}", help="accepted as the original's; the checkpoint has what it told, so it is not used"
        )
    parser.add_argument("--list_actions", action="store_true", help="print the actions that the model knows")
    parser.add_argument(
        "--all_probabilities", action="store_true",
        help="those of all actions in <output>.csv; default: the five most probable of each frame",
    )  # fmt: skip
    parser.add_argument(
        "--heatmap", action="store_true",
        help="draw where the action is seen, for encoders that average over the picture; takes two to three "
        "times as long",
    )  # fmt: skip
    for group in (BackendSettings, LabelSettings, DeviceSettings):
        add_flags(parser, group)
    return parser


def tell(source: str, output: str | Path, recognition: Recognition, tables: tuple[Path, ...]) -> None:
    """Print what a video shows, and what was written."""
    frames, segments, label = len(recognition.labels), len(recognition.segments), recognition.label
    source, output = printable(source), printable(output)
    for problem in recognition.problems:
        warn(f"{source}: {problem}")
    many = len(recognition.classes)
    percent = f", mean probability {100 * recognition.mean.max():.1f} % among {many}" if label != NONE else ""
    print(f"{source}: {recognition.name(label)}{percent}")
    print(
        f"wrote {output}: {frames} frame{'s'[: frames != 1]} at {float(recognition.fps):.2f} frames/s, "
        f"{segments} segment{'s'[: segments != 1]} in {printable(tables[2].name)} and .json, "
        f"frames in {printable(tables[1].name)}"
    )


def annotate_file(
    recognizer: Recognizer,
    video: Video,
    output: Path,
    store: Path | None,
    maps: Maps | None,
    *,
    all_probabilities: bool,
) -> None:
    """Recognize the actions of a video file and write a copy with them, behind bars."""
    make_writable_folder(output.parent)
    name, frame_bar = printable(video.path.name), partial(tqdm, unit="frame", dynamic_ncols=True)
    with frame_bar(desc=f"{name}, reading", total=video.stated_count() or None) as bar:
        video.watch = lambda _: bar.update()
        embedded, layout = recognizer.embed(video, store)
        recognition = recognizer.recognize(embedded, recognizer.probabilities(embedded, layout))
    paint: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}
    if maps:
        with frame_bar(desc=f"{name}, looking", total=len(recognition.labels)) as bar:
            video.watch = lambda _: bar.update()
            heat = video_heat(recognizer, maps, video, embedded, layout, recognition)
        top = float(heat.max())
        paint["paint"] = lambda image, number: draw_heat(image, heat[number], top, maps)
    video.watch = nothing
    if (
        output.suffix == ".gif"
        and (size := GIF_BYTES * len(recognition.labels) * next(video.frames()).size) > 1e7
    ):
        say(f"{printable(output)}: about {size / 1e6:.0f} MB; .mp4 takes a hundredth")
    with frame_bar(desc=f"{name}, writing", total=len(recognition.labels)) as bar:
        write_annotated(
            recognition, video, output, overlay=recognizer.settings.overlay, progress=bar.update, **paint
        )
    tables = recognition.write_tables(
        output, video.name, recognizer.name, all_probabilities=all_probabilities
    )
    tell(video.name, output, recognition, tables)


def show(name: str, frames: Iterator[np.ndarray]) -> None:
    """Show frames in a window as they come, until they end, it is closed, or Esc or q is pressed."""
    title = f"{name} (q ends)"
    cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
    for number, frame in enumerate(frames):
        if number == 0:
            height, width = frame.shape[:2]
            scale = max(1, WINDOW_WIDTH // width)
            cv2.resizeWindow(title, scale * width, scale * height)
        cv2.imshow(title, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        if key in (27, ord("q")) or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            break
    cv2.destroyAllWindows()


def watch_live(recognizer: Recognizer, name: str, output: Path | None, *, all_probabilities: bool) -> None:
    """Show or write a camera or a stream with its labels, until it ends or the user ends it.

    Raises: VideoError if there is no such source, or nothing comes from it; OSError if the output cannot be
        written.
    """
    log = Log()
    if output:
        make_writable_folder(output.parent)
    video = LiveVideo(name)
    with Deferred() as signals, tqdm(desc=name, unit="frame", dynamic_ncols=True) as bar:

        def shown() -> Iterator[np.ndarray]:
            for frame in watch(video, recognizer, log, lambda: signals.signum is not None):
                yield frame
                bar.set_postfix_str(f"{log}, {log.lost} lost")
                bar.update()
            if not log.times:
                raise VideoError(f"{name}: not one frame came")

        try:
            if output:
                write_video(output, shown(), video.fps, times=log.times)
            else:
                show(name, shown())
        finally:
            video.close()
    latency, delay = (1000 * statistics.median(times or [0.0]) for times in (log.latencies, log.delays))
    print(
        f"{name}: {len(log.times)} frames shown in {float(log.times[-1]):.1f} s, {log.lost} lost, "
        f"median latency {latency:.0f} ms, labels {delay:.0f} ms old"
    )
    if output:
        recognition = log.recognition(recognizer.classes, video.fps)
        tables = recognition.write_tables(output, name, recognizer.name, all_probabilities=all_probabilities)
        tell(name, output, recognition, tables)


def output_problem(output: Path, videos: list[Video], checkpoint: Path | None, live: bool) -> str | None:
    """Why an --output with a suffix cannot be written; None if it can."""
    inputs = [path.resolve() for path in (*(video.path for video in videos), checkpoint) if path]
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        return f": cannot write this format; choose {' or '.join(OUTPUT_SUFFIXES)}"
    if shortened(output.name) != output.name:
        return ": the name is too long; choose a shorter one, since tables go beside it"
    if len(videos) > 1:
        return f": {len(videos)} videos do not go into one file; name a folder"
    if output.resolve() in inputs:
        return " is an input; choose another file"
    if live and output.suffix.lower() != ".mp4":
        return ": what is live goes into .mp4, where frames keep their times"
    return None


def main(argv: list[str] | None = None) -> int:
    """Annotate and write; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    backend, settings = read(BackendSettings, args), read(LabelSettings, args)
    device = read(DeviceSettings, args)
    if args.list_actions:
        released = encoder_spec(backend.encoder or DEFAULT_ENCODER).categories
        if backend.checkpoint_model or backend.encoder_weights or not released:
            print("\n".join(Recognizer.open(backend, replace(settings, only=None), device).classes))
        else:
            print("\n".join(released()))
        return 0
    if not args.video_path:
        parser.error("--video_path is missing; name a video, a folder, a camera by its number, or a stream")
    if args.store and backend.backend == "onnxruntime":
        parser.error("--store keeps what PyTorch encodes; leave it out with --backend onnxruntime")
    if args.heatmap and backend.backend == "onnxruntime":
        parser.error("--heatmap looks into the encoder; leave it out with --backend onnxruntime")
    live = next(filter(is_live, args.video_path), None)
    if live and len(args.video_path) > 1:
        parser.error(f"--video_path {live} is live, and takes a run of its own; name it alone")
    if live and args.heatmap:
        parser.error(f"--video_path {live} is live, and --heatmap is for files; leave it out")
    videos = [] if live else [Video(path) for path in find_videos(args.video_path)]
    output = args.output or Path("annotated")
    to_file = output.suffix and not output.is_dir()
    if to_file and (problem := output_problem(output, videos, backend.checkpoint_model, bool(live))):
        parser.error(f"--output {output}{problem}")

    def output_of(stem: str) -> Path:
        return output if to_file else unused(output / shortened(stem), ".mp4")

    if live:
        screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
        if not args.output and not screen:
            parser.error("there is no screen for a window; write a file with --output x.mp4")
        # Threads of one computation wait for each other, for seconds where another program has taken a core.
        recognizer = Recognizer.open(backend, settings, device, max(1, available_cores() // 2))
        target = output_of("live") if args.output else None
        watch_live(recognizer, live, target, all_probabilities=args.all_probabilities)
        return 0
    # What is wrong with a single video is told before a model is loaded.
    if len(videos) == 1:
        videos[0].fps()
    recognizer, failed = Recognizer.open(backend, settings, device), 0
    maps = None
    if args.heatmap:
        assert isinstance(recognizer.encoder, Encoder)
        maps = Maps(recognizer.encoder)
    for video in videos:
        try:
            target = output_of(video.path.stem)
            annotate_file(
                recognizer, video, target, args.store, maps, all_probabilities=args.all_probabilities
            )
        except (UserError, OSError) as error:
            if len(videos) == 1:
                raise
            failed += 1
            print(f"not annotated: {printable(str(error))}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(videos)} videos could not be annotated", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
