"""A web page that names the action in a video, for a browser on this machine.

python3 demo.py                                                   # 400 actions, nothing to train
python3 demo.py --checkpoint_model model_checkpoints/ConvLSTM_150.pth
python3 demo.py --checkpoint_model y.pth --examples clips/ --port 8000
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from annotation.recognizer import Recognizer
from annotation.settings import BackendSettings, LabelSettings
from features.settings import DeviceSettings
from utils.flags import add_flags, number, read
from utils.process import UserError, run


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of demo.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--examples", type=Path, default=Path("data/toy-actions/UCF-101"),
        help="folder of videos to pick from, the first of each of its folders; default: the toy data",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=number("[1, 65535]", int), help="default: 7860, or the next one that is free"
    )
    for settings in (BackendSettings, LabelSettings, DeviceSettings):
        add_flags(parser, settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until the user ends it; returns the exit status."""
    args = get_args_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="action-recognition-") as folder:
        # They are read when Gradio is loaded: no word about us to anybody, nothing fetched from elsewhere.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": folder}
        try:
            from annotation.page import Page
        except ImportError as error:
            raise UserError(
                f"the page needs the package {error.name}; run pip install -r requirements-demo.txt"
            ) from error
        recognizer = Recognizer.open(
            read(BackendSettings, args), read(LabelSettings, args), read(DeviceSettings, args)
        )
        page = Page(args.examples, recognizer, Path(folder))
        print(f"open {page.launch(args.port)} in a browser; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
        finally:
            page.close()
    return 0


if __name__ == "__main__":
    run(main)
