"""What may compute a frozen encoder on a CPU: frames/s, share of the machine's peak, likeness to float32.

python3 benchmarks/engines.py --encoder i3d
python3 benchmarks/engines.py --encoder efficientnet_lite0 --pairs 7
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from features.encoder import INT8, OPENVINO, TORCH, Encoder
from features.execution import calibration_windows
from features.streams import encoder_stream
from splits.datasets import load_split
from utils.device import choose_device

Embed = Callable[[torch.Tensor], torch.Tensor]


def onnxruntime_int8(encoder: Encoder, windows: list[np.ndarray], folder: Path) -> Embed:
    """Quantised by onnxruntime: a scale for each channel, as its documentation advises."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    example = (torch.zeros(windows[0].shape, dtype=torch.uint8),)
    torch.onnx.export(
        encoder.normalized(by_pixel=True),
        example,
        folder / "network.onnx",
        dynamo=True,
        external_data=False,
        input_names=["windows"],
    )
    quant_pre_process(folder / "network.onnx", folder / "ready.onnx", skip_symbolic_shape=True)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(windows)

        def get_next(self) -> dict | None:
            window = next(self.left, None)
            return None if window is None else {"windows": window}

    quantize_static(
        folder / "ready.onnx", folder / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(folder / "int8.onnx", providers=["CPUExecutionProvider"])

    def embed(windows: torch.Tensor) -> torch.Tensor:
        frames = windows.permute(0, 1, 3, 4, 2).contiguous().numpy()
        rows = [session.run(None, {"windows": frame[None]})[0] for frame in frames]
        return torch.from_numpy(np.concatenate(rows))

    return embed


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="i3d")
    flags.add_argument("--img_dim", type=int)
    flags.add_argument("--windows", type=int, default=8, help="of test clips, or times 16 for photographs")
    flags.add_argument(
        "--onnxruntime", action="store_true", help="int8 of onnxruntime, too, which takes minutes"
    )
    flags.add_argument("--compile", action="store_true", help="torch.compile, too, which takes minutes")
    args = flags.parse_args()
    device = choose_device("cpu")
    # Weights that are random are those of `common.make_encoder`.
    torch.manual_seed(0)
    exact = Encoder(args.encoder, pretrained=not args.random_weights)
    if args.random_weights:
        common.calm(exact)
    side = args.img_dim or exact.spec.input_size
    stream = encoder_stream(exact, "rgb", side)

    def make(engine: str) -> Encoder:
        return common.make_encoder(
            args.encoder, device, random_weights=args.random_weights, img_dim=side, engine=engine,
            calibration=common.never_tested(args.data),
        )  # fmt: skip

    tested = load_split(common.data_settings(args.data), 1).test
    count = args.windows * (1 if exact.spec.video else 16)
    frames = [
        torch.from_numpy(window)
        for window in calibration_windows(tested[:: max(1, len(tested) // count)], stream, 1)
        if window.shape[1] == exact.spec.windows.frames
    ]
    windows = torch.cat(frames[:: max(1, len(frames) // count)][:count]).permute(0, 1, 4, 2, 3)
    expected = exact.embed(windows).flatten(0, 1)
    with FlopCounterMode(display=False) as counter:
        exact.embed(windows[:1])
    flops = counter.get_total_flops() / windows.shape[1]

    engines: dict[str, tuple[Embed, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in (("PyTorch", TORCH), ("OpenVINO", OPENVINO), ("OpenVINO, int8", INT8)):
            start = time.perf_counter()
            encoder = make(engine)
            encoder.embed(windows[:1])
            engines[f"{name}, bf16" if engine != INT8 else name] = encoder.embed, time.perf_counter() - start
        if args.compile:
            start = time.perf_counter()
            encoder = make(TORCH)
            encoder.prepare(encoder.dtype, compile=True)
            encoder.embed(windows)
            engines["PyTorch, compiled with freezing"] = encoder.embed, time.perf_counter() - start
        if args.onnxruntime:
            start = time.perf_counter()
            some = list(calibration_windows(common.never_tested(args.data)[:8], stream, 1))
            some = [window for window in some if window.shape[1] == exact.spec.windows.frames]
            made = onnxruntime_int8(exact, some, Path(folder))
            engines["onnxruntime, int8"] = made, time.perf_counter() - start
        rates: dict[str, list[float]] = {name: [] for name in engines}
        peaks = []
        for _ in range(args.pairs):
            peaks.append(common.matrix_peak(device))
            for name, (embed, _) in engines.items():
                frames_of_all = windows.shape[0] * windows.shape[1]
                rates[name].append(frames_of_all / common.seconds(lambda: embed(windows), device))  # noqa: B023
    print(common.machine(device))
    print(
        f"\n### Engines, {args.encoder} at {side} px, {flops / 1e9:.2f} GFLOP a frame, "
        f"{len(windows)} windows of test clips; bf16 matrix peak {statistics.median(peaks):.0f} GFLOP/s\n"
    )
    print("| engine | frames/s | against PyTorch | of the peak | cosine to float32: mean, least | made in |")
    print("| --- " * 6 + "|")
    base = next(iter(rates.values()))
    for name, (embed, made_in) in engines.items():
        likeness = torch.cosine_similarity(embed(windows).flatten(0, 1), expected)
        ratio = statistics.median(one / other for one, other in zip(rates[name], base, strict=True))
        share = statistics.median(
            rate * flops / peak / 1e9 for rate, peak in zip(rates[name], peaks, strict=True)
        )
        print(
            f"| {name} | {statistics.median(rates[name]):.0f} | {ratio:.2f} x | {100 * share:.0f} % "
            f"| {likeness.mean():.4f}, {likeness.min():.4f} | {made_in:.0f} s |"
        )


if __name__ == "__main__":
    main()
