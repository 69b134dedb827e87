"""Export a model: to ONNX, or with --pth into one checkpoint file that holds its encoder too.

python3 export.py --checkpoint_model model_checkpoints/ConvLSTM_20.pth
python3 export.py --checkpoint_model model_checkpoints/ConvLSTM_20.pth --pth # needs no download any more
python3 export.py                            # i3d, and the 400 actions that it was released with
python3 test_on_video.py --backend onnxruntime --checkpoint_model exported/ConvLSTM_20 --video_path x.avi
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from annotation.onnx_model import export
from annotation.recognizer import untrained
from annotation.settings import DEFAULT_ENCODER, ModelSettings
from features.settings import read_state
from training.checkpoint import load_checkpoint, save_checkpoint
from utils.files import make_writable_folder
from utils.flags import Parser, add_flags, read
from utils.process import run


def get_args_parser() -> Parser:
    """The flags of export.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, help="folder to write, with --pth a file; default: exported/<model>"
    )
    parser.add_argument(
        "--pth", action="store_true", help="write a checkpoint that holds the encoder too; default: ONNX"
    )
    add_flags(parser, ModelSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    settings = read(ModelSettings, args)
    name = settings.encoder or DEFAULT_ENCODER
    stem = settings.checkpoint_model.stem if settings.checkpoint_model else name
    output = args.output or Path("exported") / (f"{stem}.pth" if args.pth else stem)
    if output.exists():
        parser.error(f"--output {output} is there already; choose another name")
    if settings.checkpoint_model:
        checkpoint = load_checkpoint(settings.checkpoint_model)
    elif args.pth:
        parser.error("--pth is for a trained model; name it with --checkpoint_model")
    else:
        checkpoint = untrained(name, read_state(name, settings.encoder_weights))
    make_writable_folder(output.parent)
    if args.pth:
        save_checkpoint(output, replace(checkpoint, training=None), with_encoder=True)
        size = output.stat().st_size / 1e6
        print(f"wrote {output}: {size:,.1f} MB, with {checkpoint.encoder.name}")
        return 0
    # Whole or not there.
    beside = output.with_name(f".{output.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        difference = export(checkpoint, beside)
        beside.rename(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"wrote {output}: {size / 1e6:,.1f} MB; numbers within {difference:.1g} of PyTorch's")
    return 0


if __name__ == "__main__":
    run(main)
