"""Work on a checkpoint: write one file that holds the frozen encoder too.

python3 checkpoint.py export model_checkpoints/best.pth best_with_encoder.pth
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from utils.flags import flags_first
from utils.process import run


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of checkpoint.py."""
    parser = argparse.ArgumentParser(description="Work on a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write one file that holds the frozen encoder too, and works without any download"
    )
    export.add_argument("source", type=Path, help="checkpoint of this project or of the original")
    export.add_argument("target", type=Path, help="new file to write")
    return parser


flags_first(__name__, get_args_parser)

from training.checkpoint import load_checkpoint, save_checkpoint
from utils.files import make_writable_folder


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.target.exists():
        parser.error(f"{args.target} is there already; choose another name")
    checkpoint = replace(load_checkpoint(args.source), training=None)
    make_writable_folder(args.target.parent)
    save_checkpoint(args.target, checkpoint, with_encoder=True)
    print(
        f"wrote {args.target}: {args.target.stat().st_size / 1e6:,.1f} MB, with "
        f"{checkpoint.model.encoder.name}"
    )
    return 0


if __name__ == "__main__":
    run(main)
