"""Lets `python3 extract_frames.py` be typed inside data/ too: runs the command of that name one folder up."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, so that the import below finds the other file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import extract_frames
    from utils.process import run

    run(extract_frames.main)
