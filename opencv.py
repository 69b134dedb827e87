"""OpenCV, set up before it is loaded: it looks at these variables once. All else imports it from here."""

from __future__ import annotations

import os

# Frames of more pixels are refused: twice those of 8K, and a damaged header can claim any number.
MAX_PIXELS = 2**26
# FFmpeg prints its own complaints about a damaged file; ours are one line and say what to do.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

import cv2  # noqa: E402

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
