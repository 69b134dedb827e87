"""How alike clips are: of one video, of a class, of two classes, and copies made in several ways.

python3 benchmarks/near_copies.py --encoder i3d
python3 benchmarks/near_copies.py --encoder efficientnet_lite0

What `features.near_copies.THRESHOLD` was chosen by.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np

from features.fill import cache_folder, open_cache
from features.near_copies import THRESHOLD, mean_embeddings
from splits.split import Clip
from training.report import markdown
from utils.device import choose_device
from utils.process import available_cores
from video.opencv import cv2
from video.reader import Video
from video.writer import write_video

# Of the frames of a clip.
COPIES: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
    "encoded anew": lambda frames: frames,
    "half the size": lambda frames: [cv2.resize(frame, None, fx=0.5, fy=0.5) for frame in frames],
    "the first 60 %": lambda frames: frames[: int(0.6 * len(frames))],
    "the last 60 %": lambda frames: frames[int(0.4 * len(frames)) :],
    "every second frame": lambda frames: frames[::2],
    "mirrored": lambda frames: [np.ascontiguousarray(frame[:, ::-1]) for frame in frames],
    "darkened to 60 %": lambda frames: [(0.6 * frame).astype(np.uint8) for frame in frames],
    "cropped to 80 %": lambda frames: [np.ascontiguousarray(frame[24:-24, 32:-32]) for frame in frames],
}


def make_copies(folder: Path, clips: list[Clip]) -> dict[str, list[Clip]]:
    """The copies of clips, by what was done to them."""
    made: dict[str, list[Clip]] = {}
    for name, change in COPIES.items():
        for number, clip in enumerate(clips):
            path = folder / f"{name} {number}.mp4"
            write_video(path, iter(change(list(clip.video.frames()))), clip.video.fps())
            made.setdefault(name, []).append(Clip(path.name, clip.label, Video(path)))
    return made


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="i3d")
    flags.add_argument("--cache_path", type=Path, help="of the clips' embeddings, if they are kept elsewhere")
    args = flags.parse_args()
    device = choose_device(args.device)
    encoder = common.make_encoder(args.encoder, device, random_weights=args.random_weights)
    clips = common.clips(args.data)

    def embed(path: Path, some: list[Clip]) -> np.ndarray:
        size = encoder.spec.input_size
        cache = open_cache(path, some, encoder, size, flip=False, threads=available_cores())
        return mean_embeddings(cache.view(some), some)

    means = embed(cache_folder(args.cache_path, args.data / "UCF-101"), clips)
    labels, groups = np.array([clip.label for clip in clips]), np.array([clip.group for clip in clips])
    first, second = np.triu_indices(len(clips), 1)
    cosines = (means @ means.T)[first, second]
    one_video, one_class = groups[first] == groups[second], labels[first] == labels[second]
    rows = [["pairs", "number", "median", "99.9 %", "highest", f"above {THRESHOLD}"]]
    for name, chosen in (
        ("of one video", one_video),
        ("of a class, out of two videos", one_class & ~one_video),
        ("of two classes", ~one_class),
    ):
        values = cosines[chosen]
        rows.append(
            [
                name, f"{len(values):,}", *(f"{np.quantile(values, q):.3f}" for q in (0.5, 0.999, 1)),
                f"{100 * (values > THRESHOLD).mean():.2f} %",
            ]
        )  # fmt: skip
    print(f"{common.machine(device)}\n\n### Pairs of clips, {args.encoder}\n\n{markdown(rows)}")
    # A clip of each class, in the middle of its list.
    of_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    places = [int(own[len(own) // 2]) for own in of_class]
    with tempfile.TemporaryDirectory() as folder:
        rows = [["copy", "lowest", "median", f"above {THRESHOLD}"]]
        for name, copies in make_copies(Path(folder), [clips[place] for place in places]).items():
            values = (embed(Path(folder) / "embeddings", copies) * means[places]).sum(1)
            found = f"{(values > THRESHOLD).sum()} of {len(values)}"
            rows.append([name, f"{values.min():.3f}", f"{np.median(values):.3f}", found])
    print(f"\n### Copies of clips, {args.encoder}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
