"""OpenCV, set up before it is loaded, and PyAV, loaded after it. All else imports both from here.

OpenCV looks at these variables once. Its windows hang where PyAV's own copy of libxcb was loaded first
(PyAV's issue 978).
"""

from __future__ import annotations

import os

# Frames of more pixels are refused: twice those of 8K, and a damaged header can claim any number.
MAX_PIXELS = 2**26
# FFmpeg prints its own complaints about a damaged file; ours are one line and say what to do.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# The Qt in it warns of fonts that it does without.
os.environ.setdefault("QT_LOGGING_RULES", "*.warning=false")
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

import cv2  # noqa: E402

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

# Behind what stands above, which keeps sorted imports from changing places.
import av  # noqa: E402
import av.video.reformatter  # noqa: E402

__all__ = ["MAX_PIXELS", "av", "cv2"]
