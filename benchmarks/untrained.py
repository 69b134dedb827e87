"""How often an encoder's own last layer is right about clips of UCF-101, without any training.

python3 benchmarks/untrained.py
python3 benchmarks/untrained.py --encoder i3d --img_dim 112

Each clip is labeled as test_on_video.py labels it; its name is that with the highest mean probability.
Counted are clips of classes that Kinetics-400 has too, under any of the names that stand for them there.
"""

import itertools

import common
import numpy as np
from tqdm import tqdm

from annotation.recognizer import Recognizer, choose
from annotation.settings import DEFAULT_ENCODER, BackendSettings, LabelSettings
from features.settings import DeviceSettings
from splits.split import Clip
from utils.device import choose_device

# What Kinetics-400 calls classes of UCF-101.
NAMES = {
    "Archery": ["archery"],
    "Basketball": [
        "playing basketball", "shooting basketball", "dunking basketball", "dribbling basketball"
    ],
    "BenchPress": ["bench pressing"],
    "Biking": ["riding a bike", "riding mountain bike", "riding unicycle"],
    "Bowling": ["bowling"],
    "Diving": ["springboard diving", "diving cliff", "jumping into pool"],
    "JugglingBalls": ["juggling balls"],
    "PullUps": ["pull ups"],
    "PushUps": ["push up"],
    "SkyDiving": ["skydiving"],
    "SoccerJuggling": ["juggling soccer ball"],
    "Surfing": ["surfing water"],
    "Swing": ["swinging on something"],
    "TaiChi": ["tai chi"],
    "TrampolineJumping": ["bouncing on trampoline"],
    "WalkingWithDog": ["walking the dog"],
}  # fmt: skip
LIMITS = (0.1, 0.2, 0.3, 0.5)


def with_names(clips: list[Clip]) -> tuple[list[Clip], dict[str, list[str]]]:
    """The clips whose class is in `NAMES`, and what is there of `NAMES`."""
    some = [clip for clip in clips if clip.name.split("/")[0] in NAMES]
    there = {clip.name.split("/")[0] for clip in some}
    return some, {name: names for name, names in NAMES.items() if name in there}


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default=DEFAULT_ENCODER)
    flags.add_argument("--img_dim", type=int)
    flags.add_argument("--every", type=int, default=1, help="take every N-th clip only")
    args = flags.parse_args()
    device = choose_device(args.device)
    computed = DeviceSettings(device=args.device, precision=args.precision)
    settings = LabelSettings(img_dim=args.img_dim)
    recognizer = Recognizer.open(BackendSettings(encoder=args.encoder), settings, computed)
    clips, there = with_names(common.clips(args.data)[:: args.every])
    classes = recognizer.classes
    chosen = choose(",".join(itertools.chain(*there.values())), classes)
    right: list[tuple[bool, bool]] = []
    highest = []
    for clip in tqdm(clips, unit="clip", dynamic_ncols=True):
        probabilities = recognizer(clip.video).probabilities
        names = {classes.index(name) for name in there[clip.name.split("/")[0]]}
        mean = probabilities.mean(0)
        right.append((int(mean.argmax()) in names, chosen[int(mean[chosen].argmax())] in names))
        highest.append(probabilities[:, chosen].max(1))
    print(common.machine(device))
    of_all, shares = np.concatenate(highest), np.mean(right, axis=0)
    common.table(
        f"Untrained, {args.encoder} at {recognizer.encoder.img_dim} px, {len(clips)} clips of {len(there)} "
        "classes",
        [
            (f"right name first of {len(classes)}", f"{100 * shares[0]:.1f} %"),
            (f"right name first of {len(chosen)}, `--only`", f"{100 * shares[1]:.1f} %"),
            *(
                (f"frames that keep their action with `--only` and `--min_probability {limit}`",
                 f"{100 * (of_all >= limit).mean():.1f} %")
                for limit in LIMITS
            ),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
