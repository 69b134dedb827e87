"""A model that learns from the segments of a folder of videos while people mark them.

Embeddings are computed once, in the background. A linear head over them is trained anew after each change,
in a fraction of a second, and labels all videos again.

Shapes: K embeddings of a video, T of a clip, D their width, N segments, C classes.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from annotation.recognizer import Recognizer
from annotation.timelines import USUAL_COST
from dataset import clips_around, rows_of
from features.embed import Embedded
from features.encoder import Encoder
from features.store import Store, default_folder
from features.workers import map_on_cores, stay_on_one_core
from models import LinearProbe, build_head
from splits.split import NO_ACTION, stratified_folds
from splits.table import SegmentTable, Span
from training.checkpoint import Checkpoint, save_checkpoint
from training.report import interval
from utils.files import unused
from utils.process import MissingFileError, UserError
from video.files import VideoError, printable, video_files
from video.reader import Video, check_length, nothing

MODEL = "LinearProbe"
# How little the weights are held back: with one to eight clips of each class, 1 to 1000 are as accurate on
# held-out groups, and the larger the surer. And steps of the solver at most.
STRENGTH, STEPS = 100.0, 100
# Held-out segments below which no accuracy is told, and folds that they are tested in at most.
ENOUGH, FOLDS = 10, 5
# Seconds: between moments, of one moment, and between two that are asked or found in one video.
EVERY, MOMENT, APART = 1.0, 1.0, 2.0
# Shares of a moment and its two neighbors in how certain the model is of it, chosen on training videos.
NEIGHBORS = (0.2, 0.6, 0.2)
# Seconds until an encoding is tried again that the disk refused; the logit of a class that nobody marked.
AGAIN, UNSEEN = 5.0, -30.0
# Moments that are shown as similar.
SIMILAR = 12
NOTHING = "mark segments of two actions, or of one and of no action (0)"


def fit_probe(
    rows: np.ndarray, labels: Sequence[int], classes: int, length: int
) -> tuple[LinearProbe, dict[str, Any]]:
    """A LinearProbe by logistic regression, and its sizes; a class that does not occur is never chosen.

    Args:
        rows: mean embedding of each segment, of length one, (N, D)
        labels: (N,), of two classes at least
        length: embeddings of the clips that it will label
    """
    from sklearn.linear_model import LogisticRegression

    head, sizes = build_head(MODEL, rows.shape[1], classes, sequence_length=length)
    assert isinstance(head, LinearProbe)
    # The weights lie in the space of the rows, which has fewer dimensions where these are few.
    basis = np.linalg.svd(rows, full_matrices=False)[2] if 3 * len(rows) < rows.shape[1] else None
    seen = rows if basis is None else rows @ basis.T
    found = LogisticRegression(C=STRENGTH, max_iter=STEPS).fit(seen, labels)
    weights, bias = found.coef_ if basis is None else found.coef_ @ basis, found.intercept_
    if len(weights) == 1:
        # Of two classes only the difference is told.
        weights, bias = (np.concatenate([-each, each]) / 2 for each in (weights, bias))
    with torch.no_grad():
        head.output.bias.fill_(UNSEEN)
        head.output.weight[found.classes_] = torch.from_numpy(weights / head.scale).float()
        head.output.bias[found.classes_] = torch.from_numpy(bias).float()
    head.eval()
    return head, sizes


@dataclass
class Entry:
    """A video of the folder, and what is known of it.

    Attributes:
        name: from the folder on
        ready: its embeddings are there
        share: of its frames that are encoded, while they are
        problem: why it cannot be used
        edges: second at which each embedding begins, and that at which the last one ends, (K + 1,)
        labels: numbers of the actions that the model names, (K,); empty without a model
        percents: their probabilities, (K,)
        version: of the learner when it changed last
    """

    name: str
    video: Video
    store: Store
    ready: bool = False
    share: float = 0.0
    problem: str = ""
    edges: np.ndarray = field(default_factory=lambda: np.empty(0))
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    percents: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    version: int = 0

    @property
    def embedded(self) -> Embedded | None:
        """Its embeddings; None until they are there. A file is open for some videos at a time only."""
        if self.ready:
            # The video may be gone meanwhile.
            with contextlib.suppress(OSError):
                return self.store.load(_stem(self.name), self.video)
        return None


class _Stopped(Exception):
    """Encoding gives way."""


class Learner:
    """Keeps segments, embeddings and a head over them at one state.

    Args:
        folder: of videos, with segments.csv in it
        encoder: prepared
        models: folder for `save`

    Attributes:
        version: changes with everything that is worth showing
        actions: names by number; 0 is no action. One that has been there keeps its number
        problem: why segments.csv cannot be used; "" if it can
        trouble: why nothing more is encoded, or learned; "" if all is well
        told: how many segments it has learned from, and how well, in a line

    Raises: MissingFileError for a folder without videos; as `Store`.
    """

    def __init__(self, folder: Path, encoder: Encoder, models: Path = Path("model_checkpoints")) -> None:
        if not folder.is_dir():
            raise MissingFileError(f"{folder}: no such folder; name one with videos with --teach")
        self.folder, self.encoder, self.models, self.table = folder, encoder, models, SegmentTable(folder)
        stride = encoder.spec.frame_stride
        self.stride, self.length = stride, encoder.spec.segment_length
        self.store = Store(
            default_folder(None, folder, encoder, stride), encoder, stride=stride, cuts=True,
            advice="delete it, or make it writable",
        )  # fmt: skip
        names = {printable(path.relative_to(folder).as_posix()): path for path in video_files(folder)}
        self.entries = {name: Entry(name, Video(path), self.store) for name, path in names.items()}
        if not self.entries:
            raise MissingFileError(f"{folder}: no video in it; name a folder of videos with --teach")
        stems: dict[str, str] = {}
        for name, entry in self.entries.items():
            if stems.setdefault(_stem(name), name) != name:
                entry.problem = f"{stems[_stem(name)]} has the same name with another ending; rename one"
        self.version, self.actions, self.told, self.problem, self.trouble = 1, [NO_ACTION], NOTHING, "", ""
        self.spans: dict[str, list[Span]] = {}
        self.recognizer: Recognizer | None = None
        self._asked: list[tuple[str, float]] = []
        # Videos in the order in which they were opened; and those whose labels are old.
        self._opened: dict[str, None] = {}
        self._stale: dict[str, None] = {}
        self._dirty, self._closed, self._untested = True, False, False
        self._changed, self._learning = threading.Condition(threading.RLock()), threading.Event()
        self._stamp: tuple[int, int] | None = None
        self._reload()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True)
            for work in (self._encode, self._learn)
        ]

    def start(self) -> None:
        """Begin to encode and to learn in the background."""
        for thread in self._threads:
            thread.start()

    def settle(self, timeout: float = 60.0) -> None:
        """Wait until all that is encoded is labeled by what is marked now."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._dirty or self._stale or self._untested or self._learning.is_set()), timeout
            )

    def close(self) -> None:
        """End what runs in the background; a video that is being encoded is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    # What people do.

    def open(self, name: str) -> Entry:
        """A video that somebody looks at: it is encoded and labeled before others.

        Raises: MissingFileError for one that is not in the folder, VideoError for one that cannot be read.
        """
        entry = self.entry(name)
        if not entry.ready:
            try:
                entry.video.length()
            except (UserError, OSError) as error:
                self._fail(entry, error)
                raise
        with self._changed:
            self._opened.setdefault(name)
            self._changed.notify_all()
        return entry

    def entry(self, name: str) -> Entry:
        """A video by its name. Raises: MissingFileError for one that is not in the folder."""
        if name not in self.entries:
            raise MissingFileError(f"{printable(name)[:200]}: no such video in {self.folder}")
        return self.entries[name]

    def edit(self, remove: Iterable[Span], add: Sequence[Span]) -> tuple[list[Span], list[Span]]:
        """Change the table; as `SegmentTable.edit`. Raises: also MissingFileError for an unknown video."""
        ends = [
            float(entry.edges[-1]) if (entry := self.entry(span.video)).ready else math.inf for span in add
        ]
        inside = [span._replace(end=min(span.end, end)) for span, end in zip(add, ends, strict=True)]
        done = self.table.edit(remove, inside)
        self._reload()
        return done

    def save(self) -> Path:
        """Write the head as a checkpoint. Raises: UserError if it cannot be written, or there is none."""
        if self.recognizer is None:
            raise UserError("nothing is learned yet; mark segments of two actions first")
        assert isinstance(self.recognizer.model, Checkpoint)
        path = unused(self.models / self.folder.resolve().name, ".pth")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, self.recognizer.model)
        return path

    def ask(self) -> dict[str, Any]:
        """The moment that the model is least certain about: the least probability of its guess.

        Its two neighbors count too, since at a border nobody could tell either. Without a model it is the
        moment that is least like those that are labeled.

        Returns: the fields of `Span`, with the guess as action, and `second`.
        Raises: UserError if all moments were labeled or asked, or none is encoded.
        """
        recognizer, found = self.recognizer, list[tuple[float, Entry, float, str]]()
        known = self._unit_rows()[0]
        for entry, seconds, clips in self._moments():
            actions = np.full(len(seconds), "", object)
            if recognizer:
                with torch.no_grad():
                    logits = recognizer.head.classify(torch.from_numpy(clips).to(self.encoder.device))
                likely = logits.softmax(-1).cpu().numpy()
                actions = np.array(recognizer.model.classes, object)[likely.argmax(1)]
                scores = np.convolve(np.pad(likely.max(1), 1, "edge"), NEIGHBORS, "valid")
            else:
                scores = (_unit(clips.mean(1)) @ known.T).max(1, initial=-1)
            scores[~self._free(entry, seconds, self._asked)] = np.inf
            place = int(scores.argmin())
            found.append((float(scores[place]), entry, float(seconds[place]), actions[place]))
        found = [each for each in found if each[0] < np.inf]
        if not found:
            raise UserError("no moment is left to ask about; wait until more videos are encoded")
        _, entry, second, action = min(found, key=lambda each: each[0])
        self._asked.append((entry.name, second))
        return self.moment(entry.name, second)._replace(action=action)._asdict() | {"second": second}

    def similar(self, name: str, start: float, end: float) -> list[dict[str, Any]]:
        """The moments of all videos that are most like some seconds of one, by the cosine of embeddings.

        Returns: of each the fields of `Span`, without an action, `second` and `cosine`.
        Raises: UserError if that video is not encoded.
        """
        own = self.entry(name)
        embedded = own.embedded
        if embedded is None:
            raise UserError(f"{name}: not encoded yet; wait a moment")
        query, found = _mean(embedded, embedded.middles(), start, end), list[tuple[float, Entry, float]]()
        for entry, seconds, clips in self._moments():
            free = self._free(entry, seconds, [])
            if entry is own:
                free &= (seconds < start - MOMENT / 2) | (seconds > end + MOMENT / 2)
            cosines = np.where(free, _unit(clips.mean(1)) @ _unit(query), -2)
            for _ in range(min(SIMILAR, len(seconds))):
                place = int(cosines.argmax())
                found.append((float(cosines[place]), entry, float(seconds[place])))
                cosines[np.abs(seconds - seconds[place]) < APART] = -2
        best = sorted(found, key=lambda each: -each[0])[:SIMILAR]
        return [
            self.moment(entry.name, second)._asdict() | {"second": second, "cosine": round(cosine, 3)}
            for cosine, entry, second in best
            if cosine > -2
        ]

    # What is known of moments.

    def _ready(self) -> Iterator[tuple[Entry, Embedded]]:
        for entry in self.entries.values():
            embedded = entry.embedded
            if embedded is not None:
                yield entry, embedded

    def _moments(self) -> Iterator[tuple[Entry, np.ndarray, np.ndarray]]:
        """Of each video a clip a second: the seconds in their middles (n,), and embeddings (n, T, D)."""
        for entry, embedded in self._ready():
            clips, middles = clips_around(embedded, self.length, self.encoder.window_step), embedded.middles()
            wanted = np.arange(0.0, max(embedded.end - EVERY / 2, EVERY / 2), EVERY)
            nearest = np.unique(np.searchsorted(middles[:-1], wanted))
            yield entry, middles[nearest], np.asarray(embedded.embeddings[0][clips[nearest]], np.float32)

    def _free(self, entry: Entry, seconds: np.ndarray, asked: Sequence[tuple[str, float]]) -> np.ndarray:
        """Which seconds are in no segment, nor near one that was asked before."""
        free = np.ones(len(seconds), bool)
        for span in self.spans.get(entry.name, ()):
            free &= (seconds < span.start - MOMENT / 4) | (seconds > span.end + MOMENT / 4)
        for name, second in asked:
            free &= (name != entry.name) | (np.abs(seconds - second) >= APART)
        return free

    def moment(self, name: str, second: float) -> Span:
        """The second around a moment: within its shot, and beside the segments that are there."""
        embedded = self.entry(name).embedded
        assert embedded
        borders = embedded.seconds()[[*embedded.begins, -1]].tolist()
        borders += [edge for span in self.spans.get(name, ()) for edge in (span.start, span.end)]
        start = max([second - MOMENT / 2, *(edge for edge in borders if edge <= second)])
        end = min([second + MOMENT / 2, *(edge for edge in borders if edge > second)])
        return Span(name, round(start, 3), round(end, 3), "")

    def _unit_rows(self) -> tuple[np.ndarray, list[Span]]:
        """Mean embeddings of the segments of encoded videos, of length one (N, D), and the segments."""
        rows, spans = list[np.ndarray](), list[Span]()
        for entry in self.entries.values():
            own = self.spans.get(entry.name)
            if own and (embedded := entry.embedded):
                middles = embedded.middles()
                rows += [_mean(embedded, middles, span.start, span.end) for span in own]
                spans += own
        return _unit(np.array(rows, np.float32).reshape(-1, self.encoder.width)), spans

    # In the background.

    def _bump(self, entry: Entry | None = None) -> None:
        with self._changed:
            # Who sees the number finds the video.
            if entry:
                entry.version = self.version + 1
            self.version += 1

    def _reload(self) -> None:
        """Read the table, if it is another one."""
        with self._changed:
            stamp = self.table.stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                spans = self.table.read()
            except (UserError, OSError) as error:
                self.problem = str(error)
                self._bump()
                return
            self.problem, before, self.spans = "", self.spans, {}
            for span in spans:
                self.spans.setdefault(span.video, []).append(span)
                if span.action not in self.actions:
                    self.actions.append(span.action)
            for name in {*before, *self.spans}:
                if name in self.entries and before.get(name) != self.spans.get(name):
                    self._bump(self.entries[name])
            self._bump()
            self._dirty = True
            self._changed.notify_all()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            # Nobody would see why nothing happens any more.
            self.trouble = f"a bug, start the page again: {type(error).__name__}: {error}"
            self._bump()
            raise

    def _encode(self) -> None:
        for entry in self.entries.values():
            if self._closed:
                return
            self._load(entry)
        while not self._closed:
            with self._changed:
                missing = next(self._missing(), None)
                if missing is None:
                    self._changed.wait(1.0)
                    continue
            try:
                self._encode_one(missing)
                self.trouble = ""
            except _Stopped:
                continue
            except (UserError, OSError) as error:
                if isinstance(error, VideoError):
                    self._fail(missing, error)
                    continue
                # The disk, and no fault of the video.
                self.trouble = str(error)
                self._bump(missing)
                with self._changed:
                    self._changed.wait(AGAIN)

    def _fail(self, entry: Entry, error: Exception) -> None:
        entry.problem = str(error).removeprefix(f"{entry.video.name}: ")
        self._bump(entry)

    def _missing(self) -> Iterator[Entry]:
        """Videos that are not encoded, those first that were opened, in that order."""
        entries = [*(self.entries[name] for name in list(self._opened)), *self.entries.values()]
        yield from (entry for entry in entries if not entry.ready and not entry.problem)

    def _encode_one(self, entry: Entry) -> None:
        video, begun, frames = entry.video, time.monotonic(), 0
        total = video.stated_count() or 1

        def watch(_: object) -> None:
            nonlocal begun, frames
            frames += 1
            # What was marked comes first, and what somebody waits for.
            while self._learning.is_set() and not self._closed:
                time.sleep(0.005)
            if self._closed:
                raise _Stopped
            if time.monotonic() - begun > 0.5:
                if entry.name not in self._opened and next(self._missing()).name in self._opened:
                    raise _Stopped
                begun, entry.share = time.monotonic(), min(0.99, frames / total)
                self._bump(entry)

        video.watch = watch
        try:
            self.store.embed(_stem(entry.name), video, map=map_on_cores)
        finally:
            video.watch, entry.share = nothing, 0.0
        self._load(entry)

    def _load(self, entry: Entry) -> None:
        """Take the embeddings of a video that are on disk."""
        try:
            if entry.problem or (embedded := self.store.load(_stem(entry.name), entry.video)) is None:
                return
            check_length(entry.video.path, embedded.frames)
        except (UserError, OSError) as error:
            self._fail(entry, error)
            return
        with self._changed:
            entry.edges = embedded.seconds()[embedded.bounds()]
            entry.ready = True
            self._stale[entry.name] = None
            self._dirty |= entry.name in self.spans
            self._bump(entry)
            self._changed.notify_all()

    def _learn(self) -> None:
        # It takes a second to load, before anybody waits for it.
        import sklearn.linear_model  # noqa: F401

        # Its steps are small, and the other cores encode.
        stay_on_one_core()
        while not self._closed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._dirty or self._stale or self._untested or self._closed, 0.5
                )
            self._reload()
            if self._dirty:
                self._learning.set()
                self._dirty = False
                self.train()
            elif self._stale:
                with self._changed:
                    opened = next((name for name in reversed(self._opened) if name in self._stale), None)
                    name = opened or next(iter(self._stale))
                    del self._stale[name]
                self._label(self.entries[name])
            else:
                self._learning.clear()
                if self._untested:
                    self._test()
                    self._untested = False
                with self._changed:
                    self._changed.notify_all()

    def train(self) -> None:
        """Train on what is marked now, as it is done in the background after each change."""
        rows, spans = self._unit_rows()
        # No action is known to train.py too, whether it is marked or not.
        classes = [*sorted({span.action for span in spans} - {NO_ACTION}), NO_ACTION]
        labels, recognizer = [classes.index(span.action) for span in spans], None
        if len(set(labels)) > 1:
            head, sizes = fit_probe(rows, labels, len(classes), self.length)
            model = Checkpoint(
                self.encoder, head.to(self.encoder.device), MODEL, sizes, classes, self.length, self.stride,
                change_cost=USUAL_COST,
            )  # fmt: skip
            recognizer = Recognizer(model)
        self.recognizer = recognizer
        self._tell(spans, "")
        with self._changed:
            self._stale |= dict.fromkeys(entry.name for entry in self.entries.values() if entry.ready)
            self._untested = self.recognizer is not None

    def _label(self, entry: Entry) -> None:
        embedded, recognizer = entry.embedded, self.recognizer
        if recognizer is None or embedded is None:
            entry.labels = entry.percents = np.empty(0, int)
        else:
            found = recognizer.recognize(embedded, recognizer.probabilities(embedded))
            bounds = embedded.bounds()
            frames = (bounds[:-1] + bounds[1:]) // 2
            labels, likely = found.labels[frames], found.probabilities[frames]
            # The label of no action is -1, and its number is 0.
            numbers = np.array([*map(self.actions.index, found.classes), 0])
            shares = np.column_stack([likely, 1 - likely.sum(1)])
            percents = (100 * shares[np.arange(len(labels)), labels]).round().astype(int)
            entry.labels, entry.percents = numbers[labels], percents
        self._bump(entry)

    def _test(self) -> None:
        """Tell the accuracy on segments of videos that were left out, once there are enough."""
        rows, spans = self._unit_rows()
        videos, actions = [span.video for span in spans], np.array([span.action for span in spans])
        right, groups = list[bool](), list[str]()
        count = min(FOLDS, len(set(videos)))
        folds = np.array(stratified_folds(actions.tolist(), videos, count)) if count > 1 else np.empty(0)
        for fold in np.unique(folds):
            classes = sorted(set(actions[folds != fold]))
            tested = np.flatnonzero((folds == fold) & np.isin(actions, classes))
            if len(classes) > 1 and len(tested):
                labels = [classes.index(action) for action in actions[folds != fold]]
                head, _ = fit_probe(rows[folds != fold], labels, len(classes), self.length)
                with torch.no_grad():
                    guessed = head(torch.from_numpy(rows[tested])[:, None]).argmax(1).tolist()
                right += [
                    classes[guess] == actions[place] for guess, place in zip(guessed, tested, strict=True)
                ]
                groups += [videos[place] for place in tested]
        ends = interval(np.array(right), groups) if len(right) >= ENOUGH else None
        told = f"; a test takes {ENOUGH} segments whose action is in another video too"
        if ends:
            told = (
                f"; accuracy {100 * np.mean(right):.0f} % on {len(right)} of them, held out video by video "
                f"({ends[0]:.0f} to {ends[1]:.0f} %)"
            )
        self._tell(spans, told)

    def _tell(self, spans: Sequence[Span], how_well: str) -> None:
        """Say what was learned from."""
        count, videos = len({span.action for span in spans}), len({span.video for span in spans})
        self.told = NOTHING
        if self.recognizer:
            self.told = (
                f"learned from {len(spans):,} segments of {count} actions in {videos:,} videos{how_well}"
            )
        self._bump()


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., D) of length one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def _mean(embedded: Embedded, middles: np.ndarray, start: float, end: float) -> np.ndarray:
    """The mean embedding of some seconds of a video, (D,)."""
    first, count = rows_of(middles, (start, end))
    return np.asarray(embedded.embeddings[0, first : first + count], np.float32).mean(0)
