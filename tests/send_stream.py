"""Send a stream of numbered frames to whoever connects: python3 send_stream.py tcp://127.0.0.1:9000 100."""

import sys
import time

import av
import numpy as np

FPS, HEIGHT, WIDTH, SQUARE, DIGITS = 25, 120, 160, 16, 8


def numbered(number: int) -> np.ndarray:
    """A gray frame with a number in binary digits across its middle, which survive any codec."""
    frame = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for digit in range(DIGITS):
        frame[56:72, digit * SQUARE : (digit + 1) * SQUARE] = 235 if number >> digit & 1 else 20
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number of a frame that was `numbered`."""
    squares = (frame[60:68, digit * SQUARE + 4 : (digit + 1) * SQUARE - 4] for digit in range(DIGITS))
    return sum(1 << digit for digit, square in enumerate(squares) if square.mean() > 128)


def main(address: str, count: int) -> None:
    with av.open(f"{address}?listen=1", "w", format="mpegts") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "tune": "zerolatency"}
        )
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 5
        print("ready", flush=True)
        container.start_encoding()
        begun = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begun + number / FPS - time.monotonic()))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
