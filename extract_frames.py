"""Extract the frames of every video of a data set as JPEG files.

    python3 extract_frames.py                                  # data/UCF-101 -> data/UCF-101-frames
    python3 extract_frames.py --dataset_path videos --quality 75

Training does not need this: train.py reads the videos just as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from utils.files import beside, make_writable_folder, shortened
from utils.flags import COUNT, Parser, number
from utils.process import MissingFileError, UserError, available_cores, run, warn
from video.files import find_videos, printable
from video.opencv import cv2
from video.reader import Video, end_with_parent, worker_context

# Beside this file, not the working directory: the documented command is typed inside data/.
DEFAULT_DATASET = Path(__file__).resolve().parent / "data" / "UCF-101"


def get_args_parser() -> Parser:
    """The flags of extract_frames.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset_path", type=Path, default=DEFAULT_DATASET, help="folder of videos; default: data/UCF-101")
    jpeg = "of the JPEG files; 90 (default) takes 36 GB for UCF-101, 75 (the original's) 24 GB"
    add("--quality", type=number("[1, 100]", int), default=90, help=jpeg)
    add("--num_workers", type=COUNT, default=available_cores(), help="processes; one per core is fastest")
    return parser


def extract_clip(video_path: Path, folder: Path, quality: int) -> tuple[int, list[str]]:
    """Write the frames of a video to `folder`/<n>.jpg, n from 0; the folder is whole or not there.

    Returns: the number of frames, 0 if the folder was there already, and what is wrong with the video.
    """
    if folder.is_dir():
        return 0, []
    cv2.setNumThreads(1)
    partial = folder.with_name(f".{shortened(folder.name)}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    video = Video(video_path)
    try:
        for number, frame in enumerate(video.frames()):
            done, jpeg = cv2.imencode(".jpg", frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
            if not done:
                raise UserError(f"{video_path}: frame {number} cannot be written as JPEG")
            (partial / f"{number}.jpg").write_bytes(jpeg.tobytes())
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return number + 1, video.problems


def extract_all(dataset_path: Path, quality: int, workers: int) -> tuple[int, int, list[str]]:
    """Extract every video below `dataset_path` into the folder <dataset_path>-frames beside it.

    Returns: numbers of clips done and of frames written, and a line for each clip that could not be done.
    """
    if not dataset_path.is_dir():
        raise MissingFileError(f"{dataset_path}: no such folder; name the data set with --dataset_path")
    clips, frames, failures = 0, 0, []
    videos: dict[Path, Path] = {}
    frames_path = beside(dataset_path, "-frames")
    for path in find_videos([dataset_path]):
        folder = frames_path / path.relative_to(dataset_path).with_suffix("")
        if (other := videos.setdefault(folder, path)) != path:
            failures.append(f"{path}: {other.name} has the same frame folder; rename one of the two")
    make_writable_folder(frames_path)
    pool = ProcessPoolExecutor(workers, worker_context(), end_with_parent)
    try:
        jobs = {pool.submit(extract_clip, path, folder, quality): path for folder, path in videos.items()}
        bar = tqdm(as_completed(jobs), total=len(jobs), desc="extracting", unit="clip", dynamic_ncols=True)
        for job in bar:
            try:
                written, problems = job.result()
                frames, clips = frames + written, clips + 1
                for problem in problems:
                    warn(f"{printable(jobs[job])}: {problem}")
            except (UserError, OSError) as error:
                failures.append(str(error) or f"{jobs[job]}: {type(error).__name__}")
    finally:
        pool.shutdown(cancel_futures=True)
    return clips, frames, sorted(failures)


def main(argv: list[str] | None = None) -> int:
    """Extract; returns the exit status: 1 if a clip could not be read."""
    args = get_args_parser().parse_args(argv)
    clips, frames, failures = extract_all(args.dataset_path, args.quality, args.num_workers)
    print(f"{clips:,} clips, {frames:,} new frames in {beside(args.dataset_path, '-frames')}{os.sep}")
    for failure in failures:
        print(f"not extracted: {printable(failure)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
