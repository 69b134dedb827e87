"""Accuracy against the hours that all of UCF-101 takes: sizes of frames, strides, engines, with a frozen I3D.

Each setting encodes the clips here, trains heads on the three splits, and is scaled up to UCF-101 by its
frames and clips.

python3 benchmarks/hours.py --model MeanPool --settings 224,1,int8 224,2,int8 112,2,int8
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

from features.encoder import Encoder
from features.execution import Calibration, prepare_encoders
from features.fill import open_cache
from features.settings import DeviceSettings
from features.streams import encoder_stream
from splits.datasets import Listed
from utils.device import choose_device
from utils.process import available_cores
from utils.ranks import ALONE

# Frames, about, and clips of the three training lists together.
UCF101_FRAMES, UCF101_CLIPS = 2_500_000, 28_747


def filling(args: argparse.Namespace, device: torch.device, img_dim: int, stride: int, how: str) -> float:
    """Frames/s that are encoded and kept, of all clips, at the `stride`."""
    listed = Listed(common.data_settings(args.data))
    clips = listed.all_clips().train
    encoder = Encoder(args.encoder).to(device)
    stream = encoder_stream(encoder, "rgb", img_dim)
    precision, engine = (how, "auto") if how == "int8" else (how, "torch")
    calibration = Calibration.on(
        clips, listed.never_tested(), args.cache_path, stride, ALONE, one_split=False
    )
    prepare_encoders([(encoder, stream)], DeviceSettings(precision=precision, engine=engine), calibration)
    flip = encoder.spec.flip

    def fill(path: Path, some: list) -> float:
        start = time.perf_counter()
        open_cache(path, some, encoder, img_dim, flip=flip, frame_stride=stride, threads=available_cores())
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), clips[:2])
    frames = sum(-(-clip.video.count() // stride) for clip in clips)
    return frames / fill(args.cache_path, clips)


def training(args: argparse.Namespace, img_dim: int, stride: int, how: str) -> tuple[list[float], float]:
    """Top-1 of the three splits in percent, and clips/s of an epoch, median."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--dataset_path", args.data / "UCF-101", "--split_path", args.data / "ucfTrainTestlist"]
        frames = ["--img_dim", img_dim, "--frame_stride", stride, "--cache_path", args.cache_path]
        engine = ["--precision", how, *(() if how == "int8" else ("--engine", "torch"))]
        command = [
            sys.executable, common.ROOT / "train.py", *data, *frames, *engine, "--split_number", "all",
            "--encoder", args.encoder, "--model", args.model, "--num_epochs", args.num_epochs,
            "--checkpoint_interval", args.num_epochs, "--output_path", f"{folder}/out",
            "--run_path", f"{folder}/run",
        ]  # fmt: skip
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        reports = sorted(Path(folder).rglob("test/report.json"))
        rates = []
        for path in Path(folder).rglob("history.csv"):
            with path.open(newline="") as file:
                rates += [float(row["clips_per_second"]) for row in csv.DictReader(file)]
        tops = [json.loads(path.read_text())["figures"]["top1_percent"] for path in reports]
        return tops, statistics.median(rates)


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="i3d")
    flags.add_argument("--model", default="ConvLSTM")
    flags.add_argument("--num_epochs", type=int, default=20)
    flags.add_argument("--cache_path", type=Path, help="an empty folder for the embeddings")
    usual = ["224,1,bf16", "224,1,int8", "224,2,int8", "160,2,int8", "112,2,int8"]
    flags.add_argument("--settings", nargs="+", default=usual, help="pixels, stride, precision of each")
    args = flags.parse_args()
    device = choose_device(args.device)
    held = tempfile.TemporaryDirectory()
    args.cache_path = args.cache_path or Path(held.name)
    if args.cache_path.is_dir() and any(args.cache_path.iterdir()):
        flags.error(
            f"--cache_path {args.cache_path} is not empty, and what is kept takes no time; name another"
        )
    print(common.machine(device))
    rows = []
    for setting in args.settings:
        size, stride, how = setting.split(",")
        peak = common.matrix_peak(device)
        rate = filling(args, device, int(size), int(stride), how)
        peak = (peak + common.matrix_peak(device)) / 2
        tops, clips_rate = training(args, int(size), int(stride), how)
        encoding = UCF101_FRAMES / int(stride) / rate / 3600
        heads = args.num_epochs * UCF101_CLIPS / clips_rate / 3600
        words = [
            f"{size} px", stride, how, f"{rate:.0f}", f"{1000 * rate / peak:.0f}", f"{encoding:.2f} h",
            f"{heads:.2f} h", f"{encoding + heads:.2f} h", " / ".join(f"{top:.1f}" for top in tops),
            f"{sum(tops) / len(tops):.2f} %",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(words)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    print(
        f"\n### {args.encoder}, {args.model}, {args.num_epochs} epochs, three splits\n\n"
        "| frames | every N-th | precision | encoded frames/s | for each TFLOP/s of the matrix peak "
        "| UCF-101: encoding | heads | together | top-1 of the splits | mean |"
    )
    print("| --- " * 10 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
