"""Label the actions in a video: load a model, encode, classify, and find segments.

from annotation.recognizer import Recognizer
recognizer = Recognizer.load("model_checkpoints/ConvLSTM_20.pth")  # or Recognizer.pretrained("i3d")
for segment in recognizer("x.avi").segments:
    print(segment.action, segment.start, segment.end, segment.probability)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from annotation.labels import ClipLayout, best_sequence, label_frames, runs, scores
from annotation.onnx_model import OnnxModel
from annotation.overlay import NONE
from annotation.settings import DEFAULT_ENCODER, BackendSettings, LabelSettings, check_own_classes
from features.embed import Embedded, embed_video
from features.encoder import Encoder
from features.huggingface import tokenizer_of
from features.networks import encoder_spec
from features.settings import DeviceSettings, read_state
from features.store import Store
from features.weights import State
from features.windows import nearest_stride
from features.workers import map_on_cores
from models import Head
from splits.split import NO_ACTION
from training.checkpoint import Checkpoint, load_checkpoint
from utils.device import choose_device
from utils.files import csv_bytes, json_bytes, shortened, write_whole
from utils.process import UserError, say
from video.files import printable
from video.reader import Video, check_length

# Actions of each frame in a table.
BEST = 5


class LastLayer(Head):
    """An encoder's own last layer, as it was released, on the mean embedding of a clip.

    I3D and S3D average each two neighboring embeddings before it, so the first and the last one count half.

    Args:
        network: with `last_layer`, (..., D) -> (..., C), and `averages_pairs`
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        assert isinstance(network.last_layer, nn.Linear)
        self.output, self.pairs = network.last_layer, bool(network.averages_pairs)

    def forward(self, embeddings: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits of clips: (B, T, D) -> (B, C)."""
        if padding is None:
            padding = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        weights = (~padding).to(embeddings.dtype)
        if self.pairs:
            both = weights[:, :-1] * weights[:, 1:]
            halves = F.pad(both, (1, 0)) + F.pad(both, (0, 1))
            weights = torch.where(halves.sum(1, keepdim=True) > 0, halves, weights)
        return self.output((embeddings * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1))


def untrained(
    name: str, state: State | None = None, img_dim: int | None = None, only: str | None = None
) -> Checkpoint:
    """A model that names the classes an encoder was trained on, without any training here.

    Args:
        only: words between commas, for an encoder that compares a video with words

    Raises: UserError for an encoder that names none; else as `Encoder`.
    """
    check_own_classes(name)
    if encoder_spec(name).words:
        classes = names_between_commas(only or "")
        if len({word.lower() for word in classes}) < max(2, len(classes)):
            raise UserError(
                f"{name} compares a video with words: name two or more, each once, between commas, as --only "
                "'pouring milk,cutting bread,something else'"
            )
    encoder = Encoder(name, state=state, img_dim=img_dim)
    spec = encoder.spec
    if spec.words:
        network: Any = encoder.feature_extractor
        network.compare_with(classes, tokenizer_of(name))
        encoder.width = len(classes)
    else:
        assert spec.categories is not None
        classes = spec.categories()
    return Checkpoint(
        encoder, LastLayer(encoder.feature_extractor).eval(), "LastLayer", {}, classes,
        spec.sequence_length, spec.frame_stride, fps=spec.fps,
    )  # fmt: skip


def names_between_commas(only: str) -> list[str]:
    """What --only names."""
    return list(filter(None, map(str.strip, only.split(","))))


def choose(only: str | None, classes: Sequence[str]) -> list[int]:
    """Labels of the actions that --only names between commas, in its order; all without it.

    Capitals do not matter. Raises: UserError for a name twice, or an unknown one, with those nearest to it.
    """
    known = {name.lower(): label for label, name in enumerate(classes) if name != NO_ACTION}
    if only is None:
        return list(known.values())
    chosen: list[int] = []
    for name in names_between_commas(only):
        label = known.get(name.lower())
        if label is None:
            near = difflib.get_close_matches(name.lower(), known, 3, 0.4)
            near += [each for each in known if name.lower() in each and each not in near][:3]
            names = "; near it are " + ", ".join(classes[known[each]] for each in near) if near else ""
            raise UserError(
                f"--only {name}: the model knows no such action{names}; --list_actions of test_on_video.py "
                "prints all; for words of any kind start with --encoder hf/microsoft/xclip-base-patch32"
            )
        if label in chosen:
            raise UserError(f"--only {name}: this action stands there twice; name each once")
        chosen.append(label)
    if not chosen:
        raise UserError("--only names no action; write names between commas")
    return chosen


@dataclass(frozen=True)
class Segment:
    """Consecutive frames with one label.

    Attributes:
        action: name of the action, or "no action"
        start, end: in seconds from the beginning of the video
        probability: mean over the frames; of no action, that of the most probable one
        label: of the action, or `NONE`
        first, last: frame numbers
    """

    action: str
    start: float
    end: float
    probability: float
    label: int
    first: int
    last: int


@dataclass(frozen=True)
class Recognition:
    """What a video shows.

    Attributes:
        classes: names of the actions that were chosen among, by label
        probabilities: of each frame, (N, C)
        labels: of each frame, (N,); `NONE` for no action
        times: second of each frame, and that at which the last one ends, (N + 1,)
        fps: frames per second
        lost_frames: frames that did not decode
        problems: with the file, in sentences
    """

    classes: list[str]
    probabilities: np.ndarray
    labels: np.ndarray
    times: np.ndarray
    fps: Fraction
    lost_frames: int = 0
    problems: tuple[str, ...] = ()

    def name(self, label: int) -> str:
        """What a label is called."""
        return NO_ACTION if label == NONE else self.classes[label]

    @property
    def segments(self) -> list[Segment]:
        """Runs of frames with the same label."""
        segments = []
        for first, last in runs(self.labels):
            label, rows = int(self.labels[first]), self.probabilities[first : last + 1]
            of_frame = rows.max(1) if label == NONE else rows[:, label]
            start, end = (round(float(second), 4) for second in (self.times[first], self.times[last + 1]))
            segments.append(Segment(self.name(label), start, end, float(of_frame.mean()), label, first, last))
        return segments

    @property
    def mean(self) -> np.ndarray:
        """Mean probabilities (C,) over the frames that show an action; over all where none does."""
        active = self.labels != NONE
        return self.probabilities[active if active.any() else slice(None)].mean(axis=0, dtype=np.float64)

    @property
    def label(self) -> int:
        """The most probable action of `mean`; `NONE` where no frame shows one."""
        return int(self.mean.argmax()) if (self.labels != NONE).any() else NONE

    def summary(self) -> dict[str, float]:
        """Mean probability of each action over the frames that show one; where none does, of that alone."""
        if self.label == NONE:
            return {NO_ACTION: 1 - float(self.mean.max())}
        return dict(zip(self.classes, self.mean.tolist(), strict=True))

    def write_tables(
        self, path: Path, video: str, model: str, *, all_probabilities: bool = False
    ) -> tuple[Path, ...]:
        """Write <path>.json and <path>.segments.csv, with the segments, and <path>.csv, a row for each frame.

        The second is a table as --segments of train.py takes it.

        Args:
            all_probabilities: of all actions, a column each; else of the most probable ones of each frame

        Returns: the three files.
        Raises: UserError if one cannot be written.
        """
        listed = [
            {
                "action": each.action, "start_seconds": each.start, "end_seconds": each.end,
                "first_frame": each.first, "last_frame": each.last,
                "mean_probability": round(each.probability, 6),
            }
            for each in self.segments
        ]  # fmt: skip
        about = {
            "video": video, "checkpoint": model, "action": self.name(self.label),
            "mean_probability": round(float(self.mean.max()), 6), "lost_frames": self.lost_frames,
            "frames": len(self.labels), "fps": str(self.fps), "segments": listed,
        }  # fmt: skip
        seconds, columns = np.round(self.times, 4).tolist(), list(self.classes)
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :BEST].tolist()
        if not all_probabilities:
            columns = [
                f"{kind}{place}" for place in range(1, len(best[0]) + 1) for kind in ("name", "probability")
            ]

        def cells(row: np.ndarray, labels: list[int]) -> list[str]:
            if all_probabilities:
                return [f"{value:.6f}" for value in row]
            return [cell for label in labels for cell in (self.classes[label], f"{row[label]:.6f}")]

        rows = (
            [number, seconds[number], self.name(label), *cells(row, best[number])]
            for number, (label, row) in enumerate(zip(self.labels.tolist(), self.probabilities, strict=True))
        )
        name, head = printable(Path(video).name), ["video", "start", "end", "action"]
        segments = [[name, each.start, each.end, each.action] for each in self.segments if each.label != NONE]
        contents = {
            ".json": json_bytes(about),
            ".csv": csv_bytes(chain([["frame", "second", "action", *columns]], rows)),
            ".segments.csv": csv_bytes([head, *segments]),
        }
        for suffix, content in contents.items():
            write_whole(path.with_name(path.name + suffix), content)
        return tuple(path.with_name(path.name + suffix) for suffix in contents)


class Recognizer:
    """Names the actions in videos.

    Args:
        model: its encoder is prepared, on the device of its head; or an exported model
        settings: how frames are labeled
        name: of the model, for tables

    Attributes:
        classes: names of the actions that are chosen among, by label
        chosen: their labels among all that the model knows
        background: the label of what is no action, where the model has learned that
        change_cost: what a change of labels costs
    """

    def __init__(
        self, model: Checkpoint | OnnxModel, settings: LabelSettings | None = None, name: str = ""
    ) -> None:
        self.model, self.settings, self.name = model, settings or LabelSettings(), name
        self.encoder, self.head = model.encoder, model.head
        self.chosen = choose(self.settings.only, model.classes)
        self.classes = [model.classes[label] for label in self.chosen]
        self.background = model.classes.index(NO_ACTION) if NO_ACTION in model.classes else None
        cost = self.settings.change_cost
        self.change_cost = (model.change_cost or 0.0) if cost is None else cost

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """A trained model, on the best device here.

        Args:
            path: of a checkpoint of this project or of the original
            settings: fields of `LabelSettings`

        Raises: as `load_checkpoint`.
        """
        return cls.open(BackendSettings(checkpoint_model=Path(path)), LabelSettings(**settings))

    @classmethod
    def pretrained(cls, encoder: str = DEFAULT_ENCODER, **settings: Any) -> Self:
        """An encoder with its own last layer: 400 actions, without any training. Raises: as `untrained`."""
        return cls.open(BackendSettings(encoder=encoder), LabelSettings(**settings))

    @classmethod
    def open(
        cls,
        backend: BackendSettings,
        settings: LabelSettings | None = None,
        computed: DeviceSettings | None = None,
        threads: int = 0,
    ) -> Self:
        """The model that flags ask for.

        Args:
            threads: to compute with on a CPU; 0 takes all cores

        Raises: UserError if flags do not go together; else as `load_checkpoint`, `untrained`, `OnnxModel`.
        """
        settings, computed = settings or LabelSettings(), computed or DeviceSettings()
        device, path = choose_device(computed.device), backend.checkpoint_model
        if backend.backend == "onnxruntime":
            if path is None:
                raise UserError(
                    "--backend onnxruntime runs what export.py wrote; name its folder with --checkpoint_model"
                )
            if computed.precision in ("bf16", "int8"):
                raise UserError(
                    f"--precision {computed.precision} is for --backend torch; an exported model is fp32"
                )
            return cls(OnnxModel(path, settings.img_dim, threads), settings, backend.name)
        if threads:
            torch.set_num_threads(threads)
        if path:
            model = load_checkpoint(path)
            if settings.img_dim:
                model.encoder = model.encoder.resized(settings.img_dim)
        else:
            name = backend.encoder or DEFAULT_ENCODER
            model = untrained(
                name, read_state(name, backend.encoder_weights), settings.img_dim, settings.only
            )
            if not model.encoder.spec.words:
                say(
                    f"no --checkpoint_model: {name} names the {len(model.classes)} actions that it was "
                    "trained on (see --list_actions of test_on_video.py)"
                )
        # Before the encoder, whose own last layer may be the head.
        model.head.to(device)
        model.encoder.to(device).prepare(computed.precision)
        return cls(model, settings, backend.name)

    def stride(self, fps: Fraction) -> int:
        """The stride for a video of `fps` frames/s: a released network wants its own rate, a head any."""
        return nearest_stride(fps, self.model.fps) if self.model.fps else self.model.frame_stride

    def layout(self, fps: Fraction) -> ClipLayout:
        """How clips lie in a video of `fps` frames/s."""
        settings, unit = self.settings, self.stride(fps) * self.encoder.windows.hop
        return ClipLayout(
            settings.sequence_length or self.model.sequence_length,
            self.encoder.window_step,
            max(1, round(settings.label_every / unit)),
        )

    def embed(self, video: Video, folder: Path | None = None) -> tuple[Embedded, ClipLayout]:
        """The embeddings of a video, and how clips lie in them.

        Args:
            folder: a store of embeddings, used and filled

        Raises: as `__call__`.
        """
        fps, cuts = video.fps(), not self.settings.no_cuts
        stride, layout = self.stride(fps), self.layout(fps)
        step, every, enough = layout.step, layout.every, layout.step * layout.sequence_length
        # Image encoders: clips that label frames `every` at a time hold every step-th frame only.
        if self.encoder.windows.frames == 1 and every % step == 0 and video.stated_count() >= stride * enough:
            stride, layout = stride * step, replace(layout, step=1, every=every // step)
        if folder is None:
            embedded = embed_video(video, self.encoder, stride=stride, cuts=cuts, map=map_on_cores)
        elif not isinstance(self.encoder, Encoder):
            raise UserError("--store keeps what PyTorch encodes; leave it out with --backend onnxruntime")
        else:
            store = Store(folder, self.encoder, stride=stride, cuts=cuts, advice="name another --store")
            # Videos of the same name lie in several folders.
            name = f"{shortened(video.path.stem, 40)}-{crc32(os.fsencode(video.path.resolve())):08x}"
            embedded = store.load(name, video) or store.embed(name, video, map=map_on_cores)
        check_length(video.path, embedded.frames)
        return embedded, layout

    def __call__(self, video: str | Path | Video, *, store: Path | None = None) -> Recognition:
        """Recognize the actions of a video.

        Args:
            store: folder where embeddings are kept: a second look with other settings encodes nothing

        Raises: MissingFileError or VideoError if it cannot be read.
        """
        video = video if isinstance(video, Video) else Video(Path(video))
        embedded, layout = self.embed(video, store)
        return self.recognize(embedded, self.probabilities(embedded, layout))

    def probabilities(self, embedded: Embedded, layout: ClipLayout | None = None) -> np.ndarray:
        """Probabilities of all classes of the model for the frames of a video, (N, classes)."""
        layout = layout or self.layout(embedded.fps or Fraction(25))
        return label_frames(
            self.head.classify, embedded, layout, device=self.encoder.device, dtype=self.encoder.dtype
        )

    def recognize(self, embedded: Embedded, probabilities: np.ndarray) -> Recognition:
        """What a video shows, by its embeddings and `probabilities` of them."""
        times = embedded.seconds()
        labels = best_sequence(self.scores(probabilities), times, self.change_cost, embedded.begins)
        return Recognition(
            self.classes, probabilities[:, self.chosen], labels, times, embedded.fps or Fraction(25),
            embedded.lost_frames, tuple(embedded.problems),
        )  # fmt: skip

    def scores(self, probabilities: np.ndarray) -> np.ndarray:
        """How well `classes`, and last no action, fit frames: (N, all that the model knows) -> (N, C + 1)."""
        none = 0.0 if self.background is None else probabilities[:, self.background]
        return scores(probabilities[:, self.chosen], self.settings.min_probability, none)
