"""How much a head learns from few labels, against logistic regression on the mean embedding.

python3 benchmarks/few_labels.py
python3 benchmarks/few_labels.py --encoders i3d --models LinearProbe --clips 2

Of each class some groups of the training list have labels, drawn anew for each draw and split. The head is
trained as train.py does it with its defaults.
"""

import argparse
import statistics

import common
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from dataset import EmbeddingClips, Sampling, batch_items, fill_store, store_name
from features.encoder import Encoder
from features.store import Store, default_folder
from models import MODELS, build_head
from splits.datasets import Listed
from splits.split import Clip, Split
from training.recipe import RECIPES, Optimization
from training.report import markdown, predict_logits
from utils.device import seed_everything
from utils.process import UserError, available_cores, run

PROBE = "logistic regression"


def open_store(args: argparse.Namespace, encoder: str, clips: list[Clip]) -> Store:
    """The embeddings of clips, where train.py keeps them."""
    made = Encoder(encoder).prepare()
    folder = default_folder(args.cache_path, args.data / "UCF-101", made, made.spec.frame_stride)
    store = Store(folder, made, stride=made.spec.frame_stride)
    fill_store(store, clips, available_cores())
    return store


def means(store: Store, clips: list[Clip]) -> np.ndarray:
    """The mean embedding of each clip (N, D)."""
    return np.stack([store.array(store_name(clip))[0].mean(0, np.float32) for clip in clips])


def draw(clips: list[Clip], groups: int, most: int | None, seed: list[int]) -> list[Clip]:
    """Clips of some groups of each class, at most `most` of each class."""
    of_class: dict[int, list[Clip]] = {}
    for clip in clips:
        of_class.setdefault(clip.label, []).append(clip)
    chosen: list[Clip] = []
    for label, own in of_class.items():
        names = np.random.default_rng([*seed, label]).permutation(sorted({clip.group for clip in own}))
        if len(names) < groups:
            raise UserError(f"--groups {groups}: there is a class with {len(names)} groups; take fewer")
        some = [clip for name in names[:groups] for clip in own if clip.group == name]
        chosen += some[:most]
    return chosen


def accuracy(
    args: argparse.Namespace, store: Store, split: Split, clips: list[Clip], model: str, seed: int
) -> float:
    """Percent of the test clips that are named right."""
    if model == PROBE:
        probe = LogisticRegression(max_iter=10_000)
        probe.fit(means(store, clips), [clip.label for clip in clips])
        named = probe.predict(means(store, split.test))
        return 100 * float(np.mean(named == [clip.label for clip in split.test]))
    seed_everything(seed)
    length = store.encoder.spec.sequence_length
    head, _ = build_head(model, store.width, len(split.classes), sequence_length=length)
    data = EmbeddingClips(store, clips, Sampling(length, training=True, flip=False, seed=seed))
    batches = [batch_items(len(clips), 16, epoch=epoch, seed=seed) for epoch in range(1, args.num_epochs + 1)]
    optimization = Optimization(head, RECIPES["default"], sum(map(len, batches)))
    head.train()
    for items in (items for epoch in batches for items in epoch):
        embeddings, padding, labels = data.batch(items)
        optimization.step(optimization.loss(head(embeddings, padding), labels) / len(labels))
    logits, labels = predict_logits(
        head, EmbeddingClips(store, split.test, Sampling(length)), torch.device("cpu")
    )
    return 100 * float((logits.argmax(1) == labels).float().mean())


def main() -> int:
    """Train on each draw, test, and print a table; returns the exit status."""
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoders", nargs="+", default=["efficientnet_lite0", "i3d"])
    flags.add_argument("--models", nargs="+", default=list(MODELS))
    flags.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="of each class")
    flags.add_argument("--clips", type=int, help="of each class at most; default: all of its groups")
    flags.add_argument("--draws", type=int, default=5, help="for each split")
    flags.add_argument("--num_epochs", type=int, default=20, help="as train.py's default")
    args = flags.parse_args()
    listed = Listed(common.data_settings(args.data))
    splits = {number: listed.split(number) for number in listed.numbers}
    rows = [
        ["encoder", "model", *(f"{groups} group{'s'[: groups > 1]} of a class" for groups in args.groups)]
    ]
    for encoder in args.encoders:
        store = open_store(args, encoder, splits[listed.numbers[0]].clips)
        places = [(number, seed) for number in splits for seed in range(args.draws)]
        found: dict[tuple[str, int], list[float]] = {}
        for model in tqdm([PROBE, *args.models], encoder):
            for groups in args.groups:
                found[model, groups] = [
                    accuracy(args, store, splits[number],
                             draw(splits[number].train, groups, args.clips, [number, seed]), model, seed)
                    for number, seed in places
                ]  # fmt: skip
        for model in [PROBE, *args.models]:
            cells = []
            for groups in args.groups:
                right, base = found[model, groups], found[PROBE, groups]
                gains = [one - other for one, other in zip(right, base, strict=True)]
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
                gain = "" if model == PROBE else f" ({statistics.mean(gains):+.1f} ± {error:.1f})"
                cells.append(f"{statistics.mean(right):.1f} %{gain}")
            rows.append([encoder, model, *cells])
    print(common.machine(torch.device("cpu")))
    print(
        f"\n### Few labels, {len(splits)} splits, {args.draws} draws each, {args.num_epochs} epochs; in "
        f"brackets the gain over {PROBE}, ± standard error over draws\n\n{markdown(rows)}\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
