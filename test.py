"""Test a checkpoint on a split of its data set.

python3 test.py --dataset_path data/UCF-101 --checkpoint_model model_checkpoints/ConvLSTM_20.pth
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

from dataset import Sampling
from features.settings import CacheSettings, DeviceSettings
from splits.datasets import AUTO, DataSettings, load_split, split_number
from splits.folder import FOLDS
from splits.split import RANDOM, Split
from training.batches import ClipBatches
from training.checkpoint import Checkpoint, load_checkpoint
from training.loop import Part
from training.report import about, predict_clips, summary, write_report
from training.setup import ClipSource, prepare
from utils.device import choose_device, seed_everything
from utils.files import unused
from utils.flags import COUNT, add_flags, read
from utils.process import UserError, run, say
from utils.ranks import Ranks

SHOWN_MISTAKES = 5


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    add_flags(parser, DataSettings, dataset_path=None)
    add_flags(parser, CacheSettings)
    parser.add_argument(
        "--split_number",
        type=split_number,
        choices=(*FOLDS, RANDOM),
        help="split whose test list is used; default: the one that the checkpoint was trained on; random, a "
        "fifth of all clips as in the original, leaks and is for comparison only",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="test on another split than the trained one all the same, most of whose clips it has seen",
    )
    parser.add_argument(
        "--clips",
        type=COUNT,
        default=1,
        help="clips of each video, whose probabilities are averaged; 1 (default) is spread over the whole "
        "video and as accurate as more",
    )
    parser.add_argument(
        "--shuffle_frames",
        action="store_true",
        help="put the frames of each clip out of order, to see whether the model takes notice of it",
    )
    parser.add_argument(
        "--run_path",
        type=Path,
        help="folder for the report, whose files there are replaced; default: test-<checkpoint> in the "
        "folder of its training, numbered if it is there",
    )
    parser.add_argument(
        "--sequence_length", type=COUNT, help="embeddings of a clip; default (recommended): the checkpoint's"
    )
    parser.add_argument(
        "--img_dim", type=COUNT, help="frame size in pixels; default (recommended): the checkpoint's"
    )
    parser.add_argument("--batch_size", type=COUNT, default=16, help="clips at once; changes speed only")
    add_flags(parser, DeviceSettings)
    return parser


def default_folder(checkpoint: Checkpoint, path: Path) -> Path:
    """Beside the other figures of the training that a checkpoint is from, where it tells."""
    return unused(Path(checkpoint.settings.get("run_path") or "runs") / f"test-{path.stem}")


def choose_data(args: argparse.Namespace, checkpoint: Checkpoint) -> DataSettings:
    """The data set and the lists that are named; what is not is that of the training, where it is there."""
    data, before = read(DataSettings, args), checkpoint.settings
    path = data.dataset_path or Path(before.get("dataset_path") or DataSettings().dataset_path)
    lists = data.split_path
    kind = data.dataset
    if lists is None and (earlier := before.get("split_path")):
        # Folds that were drawn are those lists or none: others would hold clips that training has seen.
        drawn = before.get("dataset") == "folder"
        lists = Path(earlier) if drawn or Path(earlier).is_dir() else None
        kind = "folder" if drawn and kind == AUTO else kind
    pattern = data.group_pattern or before.get("group_pattern")
    return replace(data, dataset_path=path, split_path=lists, dataset=kind, group_pattern=pattern)


def choose_split(
    data: DataSettings, checkpoint: Checkpoint, path: Path, wanted: int | str | None, *, force: bool
) -> tuple[Split, int | str, str]:
    """The split to test on, its number, and what to say behind the figures.

    Raises: as `load_split`; UserError for a split that the checkpoint has seen, other classes, or no clips.
    """
    number = wanted or checkpoint.split_number or 1
    note = ""
    if checkpoint.split_number not in (None, number):
        note = f", most of whose clips it has seen in training on split {checkpoint.split_number}"
        if not force:
            raise UserError(
                f"{path} was trained on split {checkpoint.split_number} and has seen most of the test "
                f"clips of split {number}; test it on its own split, or add --force to see a figure that "
                "says nothing"
            )
    split = load_split(data, number, seed=checkpoint.settings.get("seed", 0))
    if number == RANDOM:
        note = ", a split that leaks"
    if missing := split.missing():
        say(f"warning: {missing}")
    if split.classes != checkpoint.classes:
        # The first layout of the original has them sorted.
        if sorted(split.classes) != sorted(checkpoint.classes):
            raise UserError(
                f"{path} was trained on other classes than those of {data.dataset_path}; name its data set "
                "with --dataset_path, and its lists with --split_path"
            )
        split = split.relabelled(checkpoint.classes)
    if not split.test:
        raise UserError(f"{data.dataset_path}: not one test clip of split {number} is there")
    return split, number, note


def main(argv: list[str] | None = None) -> int:
    """Test and print; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    device, path = choose_device(args.device), args.checkpoint_model
    device_settings = read(DeviceSettings, args)
    # With the kernels of training, whose roundings the cache's key names.
    seed_everything(0)
    with contextlib.closing(Ranks.from_environment(device)) as ranks:
        checkpoint = load_checkpoint(path)
        data = choose_data(args, checkpoint)
        split, number, note = choose_split(data, checkpoint, path, args.split_number, force=args.force)
        if args.shuffle_frames:
            note += ", frames shuffled"
        model = prepare(checkpoint.model, device_settings, device)
        cache = read(CacheSettings, args)
        # Of the training, so that its cache serves the test too.
        stride = cache.frame_stride or checkpoint.frame_stride
        cache = replace(cache, frame_stride=stride)
        source = ClipSource.open(
            model, split.test, args.img_dim or checkpoint.img_dim, cache, data.dataset_path,
            device_settings.num_workers, flip=False, ranks=ranks,
        )  # fmt: skip
        sampling = Sampling(
            args.sequence_length or checkpoint.sequence_length,
            frame_stride=stride,
            views=args.clips,
            shuffle=args.shuffle_frames,
        )
        order = ClipBatches(
            len(split.test), args.batch_size, shuffle=False, rank=ranks.rank, ranks=ranks.size
        )
        part = Part(split.test, order, source.batches(split.test, sampling, order))
        predictions = predict_clips(model, part, checkpoint.classes, views=args.clips, ranks=ranks)
        if ranks.rank == 0:
            folder = args.run_path or default_folder(checkpoint, path)
            report = write_report(folder, predictions, about(checkpoint, path, source, sampling, number))
            print(f"split {number}: test {summary(report['figures'])}{note}")
            for mistake in report["mistakes"][:SHOWN_MISTAKES]:
                percent = 100 * mistake["probability"]
                print(f"  {mistake['clip']}: taken for {mistake['taken_for']}, {percent:.1f} %")
            print(f"report in {folder}")
    return 0


if __name__ == "__main__":
    run(main)
