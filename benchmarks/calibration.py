"""Whether probabilities are right: the calibration error without and with a temperature.

python3 benchmarks/calibration.py --encoders i3d "efficientnet_lite0 --streams rgb,diff"

The temperature is fitted on groups held out of the training list of the split, as train.py does it with
--val_fraction; the error is that of the test clips.
"""

import statistics
from pathlib import Path

import common

from features.networks import encoder_spec
from models import MODELS, check_model
from training.comparison import words_of
from training.jobs import train_all
from training.report import markdown
from utils.device import choose_device
from utils.flags import COUNT
from utils.process import available_cores, run


def main() -> int:
    """Train, test, and print a table; returns the exit status."""
    parser = common.data_parser(__doc__.split("\n")[0])
    quoted = "with flags of train.py in quotes"
    parser.add_argument("--encoders", nargs="+", default=["efficientnet_lite0", "i3d"], help=quoted)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"{quoted}; default: all")
    parser.add_argument("--splits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=COUNT, default=3, help="trainings of each; their means are quoted")
    parser.add_argument("--val_fraction", type=float, default=0.3, help="of train.py; the more the surer")
    parser.add_argument("--num_epochs", type=COUNT, default=10, help="of train.py")
    parser.add_argument("--cache_path", type=Path, help="of train.py; default: beside the data set")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        parser.error(f"--val_fraction {args.val_fraction}: a temperature is fitted on it; take one in (0, 1)")
    encoders, models = ({entry: words_of(entry) for entry in given} for given in (args.encoders, args.models))
    for words, check in ((encoders, encoder_spec), (models, check_model)):
        for name, *_ in words.values():
            check(name)
    data = common.data_settings(args.data)
    flags: list[object] = ["--dataset_path", data.dataset_path, "--split_path", data.split_path]
    flags += ["--val_fraction", args.val_fraction, "--num_epochs", args.num_epochs, "--num_workers", 1]
    flags += ["--cache_path", args.cache_path] if args.cache_path else []
    places = [
        (encoder, model, split, seed)
        for encoder in args.encoders
        for model in args.models
        for split in args.splits
        for seed in range(args.seeds)
    ]
    jobs: dict[str, list[object]] = {
        f"training{number}": [
            *(*flags, "--encoder", *encoders[encoder], "--model", *models[model]),
            *("--split_number", split, "--seed", seed),
        ]
        for number, (encoder, model, split, seed) in enumerate(places)
    }
    with common.folder_for_logs() as folder:
        trained = dict(zip(places, train_all(jobs, folder, available_cores()).values(), strict=True))
    rows = [["encoder", "model", "split", "top-1", "temperature", "error without it", "error with it"]]
    for encoder in args.encoders:
        for model in args.models:
            for split in args.splits:
                reports = [trained[encoder, model, split, seed].test.report for seed in range(args.seeds)]
                figures = [report["figures"] for report in reports]
                after, before = (
                    statistics.mean(each[f"calibration_error{which}_percent"] for each in figures)
                    for which in ("", "_without_temperature")
                )
                rows.append(
                    [
                        *(encoder, model, str(split)),
                        f"{statistics.mean(each['top1_percent'] for each in figures):.1f} %",
                        f"{statistics.median(report['temperature'] for report in reports):.2f}",
                        *(f"{before:.1f} %", f"{after:.1f} %"),
                    ]
                )
    print(common.machine(choose_device("auto")))
    held = f"{100 * args.val_fraction:.0f} % of the training groups held out, {args.seeds} seeds"
    print(f"\n### Expected calibration error on the test clips, {held}\n\n{markdown(rows)}\n")
    return 0


if __name__ == "__main__":
    run(main)
