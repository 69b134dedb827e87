"""Test a checkpoint on a split of its data set.

python3 test.py --dataset_path data/UCF-101 --checkpoint_model model_checkpoints/ConvLSTM_20.pth
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

from annotation.recognizer import Recognizer
from annotation.timelines import report_timelines
from dataset import EmbeddingClips, Sampling, fill_store, with_background
from features.settings import DeviceSettings, StoreSettings
from features.store import Store, default_folder
from splits.datasets import AUTO, AnyListed, DataSettings, open_listed
from splits.folder import FOLDS
from splits.segments import SegmentedVideos
from splits.split import Split
from training.checkpoint import Checkpoint, load_checkpoint
from training.report import about, predict, summary, write_report
from utils.device import choose_device, seed_everything
from utils.files import unused
from utils.flags import COUNT, Parser, add_flags, read
from utils.process import UserError, run, say
from utils.ranks import Ranks

SHOWN_MISTAKES = 5


def get_args_parser() -> Parser:
    """The flags of test.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint_model", type=Path, required=True, help="of this project or of the original"
    )
    add_flags(parser, DataSettings, dataset_path=None)
    add_flags(parser, StoreSettings)
    parser.add_argument(
        "--split_number", type=int, choices=FOLDS, help="split to test; default: the one of the training"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="test on another split than the trained one all the same, most of whose clips it has seen",
    )
    parser.add_argument(
        "--shuffle_frames",
        action="store_true",
        help="put the embeddings of each clip out of order, to see whether the model takes notice of it",
    )
    parser.add_argument(
        "--run_path",
        type=Path,
        help="folder for the report, replaced there; default: test-<checkpoint> in the folder of its "
        "training, numbered",
    )
    parser.add_argument(
        "--sequence_length", type=COUNT, help="embeddings of a clip; default (recommended): the checkpoint's"
    )
    parser.add_argument(
        "--img_dim",
        "--image_dim",
        type=COUNT,
        help="frame size in pixels; default (recommended): the checkpoint's",
    )
    for name in ("channels", "latent_dim", "num_epochs", "batch_size"):
        parser.add_argument(f"--{name}", type=int, help="accepted as the original's; changes nothing here")
    add_flags(parser, DeviceSettings)
    return parser


def choose_data(args: argparse.Namespace, checkpoint: Checkpoint) -> DataSettings:
    """The data set and the lists that are named; what is not is that of the training, where it is there."""
    data, before = read(DataSettings, args), checkpoint.settings
    path = data.dataset_path or Path(before.get("dataset_path") or DataSettings().dataset_path)
    lists, kind = data.split_path, data.dataset
    if lists is None and (earlier := before.get("split_path")):
        # Folds that were drawn are those lists or none: others would hold clips that training has seen.
        drawn = before.get("dataset") == "folder"
        lists = Path(earlier) if drawn or Path(earlier).is_dir() else None
        kind = "folder" if drawn and kind == AUTO else kind
    pattern = data.group_pattern or before.get("group_pattern")
    segments = data.segments or (before.get("segments") and Path(before["segments"])) or None
    return replace(
        data, dataset_path=path, split_path=lists, dataset=kind, group_pattern=pattern, segments=segments
    )


def choose_split(
    data: DataSettings, checkpoint: Checkpoint, path: Path, wanted: int | None, *, force: bool
) -> tuple[Split, AnyListed, int, str]:
    """The split to test on, its data set, its number, and what to say behind the figures.

    Raises: UserError for a split that the checkpoint has seen, other classes, or no clips; else as `Listed`.
    """
    number = wanted or checkpoint.split_number or 1
    note = ""
    if checkpoint.split_number not in (None, number):
        note = f", most of whose clips it has seen in training on split {checkpoint.split_number}"
        if not force:
            raise UserError(
                f"{path} was trained on split {checkpoint.split_number} and has seen most of the test clips "
                f"of split {number}; test it on its own split, or add --force to see a figure that says "
                "nothing"
            )
    listed = open_listed(data)
    split = listed.split(number)
    if missing := split.missing():
        say(f"warning: {missing}")
    if split.classes != checkpoint.classes:
        # The first layout of the original has them sorted.
        if sorted(split.classes) != sorted(checkpoint.classes):
            raise UserError(
                f"{path} was trained on other classes than those of {data.dataset_path}; name its data set "
                "with --dataset_path, and its lists with --split_path"
            )
        split = split.relabeled(checkpoint.classes)
    if not split.test:
        raise UserError(f"{data.dataset_path}: not one test clip of split {number} is there")
    return split, listed, number, note


def main(argv: list[str] | None = None) -> int:
    """Test and print; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    device, path = choose_device(args.device), args.checkpoint_model
    seed_everything(0)
    with contextlib.closing(Ranks.from_environment(device)) as ranks:
        checkpoint = load_checkpoint(path)
        data = choose_data(args, checkpoint)
        split, listed, number, note = choose_split(
            data, checkpoint, path, args.split_number, force=args.force
        )
        if args.shuffle_frames:
            note += ", frames shuffled"
        if args.img_dim:
            checkpoint.encoder = checkpoint.encoder.resized(args.img_dim)
        # Of the training, so that its embeddings serve the test too.
        checkpoint.frame_stride = args.frame_stride or checkpoint.frame_stride
        checkpoint.sequence_length = args.sequence_length or checkpoint.sequence_length
        encoder, stride = checkpoint.encoder.to(device).prepare(args.precision), checkpoint.frame_stride
        cache = args.cache_path or checkpoint.settings.get("cache_path")
        folder = default_folder(cache and Path(cache), data.dataset_path, encoder, stride)
        long = isinstance(listed, SegmentedVideos)
        store = Store(folder, encoder, stride=stride, cuts=long)
        fill_store(store, split.test, args.num_workers, ranks)
        if isinstance(listed, SegmentedVideos):
            split = with_background(replace(split, train=[], val=[]), store, listed)
        sampling = Sampling(checkpoint.sequence_length, shuffle=args.shuffle_frames)
        head = checkpoint.head.to(device)
        clips = EmbeddingClips(store, split.test, sampling)
        predictions = predict(head, clips, checkpoint.classes, device, ranks=ranks)
        if ranks.rank == 0:
            run_path = Path(checkpoint.settings.get("run_path") or "runs")
            report_path = args.run_path or unused(run_path / f"test-{path.stem}")
            described = about(checkpoint, path, encoder, number) | {"frames_shuffled": args.shuffle_frames}
            if long:
                recognizer = Recognizer(replace(checkpoint, encoder=encoder, head=head))
                described["timelines"] = report_timelines(report_path, recognizer, store, split.test)
            report = write_report(report_path, predictions, described)
            print(f"split {number}: test {summary(report['figures'])}{note}")
            for mistake in report["mistakes"][:SHOWN_MISTAKES]:
                percent = 100 * mistake["probability"]
                print(f"  {mistake['clip']}: mistaken for {mistake['mistaken_for']}, {percent:.1f} %")
            print(f"report in {report_path}")
    return 0


if __name__ == "__main__":
    run(main)
