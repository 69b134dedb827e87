"""The course of a training, epoch by epoch, in a folder of its own: to look at while it runs, and later.

history.csv         a row for each epoch
curves.png          loss, accuracy and learning rate
events.out.*        the same for TensorBoard: tensorboard --logdir runs
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from training.pictures import png
from utils.files import write_whole

# By name, with the tag under which TensorBoard shows it. Loss in nats, accuracy in percent.
SERIES = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "val_loss": "loss/val",
    "val_accuracy": "accuracy/val",
    "test_loss": "loss/test",
    "test_accuracy": "accuracy/test",
    "learning_rate": "learning_rate",
    "clips_per_second": "clips_per_second",
    "seconds": "seconds",
}
COLORS = {"train": "#4878a8", "val": "#6aa56e", "test": "#c8553d"}

Epoch = dict[str, float]


class History:
    """The files of a run.

    Args:
        folder: for the files; made if it is not there
        epochs: what has been before, where the run goes on; a row each, with `epoch` from 1
        title: of the picture
    """

    def __init__(self, folder: Path, epochs: Sequence[Epoch], title: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.title = folder, title
        # What an interrupted run showed of later epochs is not shown any more.
        self._writer = SummaryWriter(str(folder), purge_step=len(epochs) + 1)

    def write(self, epochs: Sequence[Epoch]) -> None:
        """Show the last of `epochs`, which are all there have been.

        Raises: OSError if a file cannot be written.
        """
        last = epochs[-1]
        for name, tag in SERIES.items():
            if name in last:
                self._writer.add_scalar(tag, last[name], int(last["epoch"]))
        self._writer.flush()
        text = io.StringIO()
        rows = csv.DictWriter(text, ["epoch", *SERIES], lineterminator="\n", extrasaction="ignore")
        rows.writeheader()
        rows.writerows(epochs)
        write_whole(self.folder / "history.csv", text.getvalue().encode())
        write_whole(self.folder / "curves.png", self._curves(epochs))

    def _curves(self, epochs: Sequence[Epoch]) -> bytes:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure((11, 3.4), layout="constrained")
        figure.suptitle(self.title, fontsize=10)
        loss, accuracy, rate = figure.subplots(1, 3)
        for axes, quantity, unit in ((loss, "loss", "nats"), (accuracy, "accuracy", "%")):
            for part, color in COLORS.items():
                points = [
                    (epoch["epoch"], epoch[key]) for epoch in epochs if (key := f"{part}_{quantity}") in epoch
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, marker=".", label=part)
            axes.set_title(f"{quantity}, {unit}", fontsize=10)
            axes.legend(frameon=False, fontsize=8)
        rate.plot(
            [epoch["epoch"] for epoch in epochs],
            [epoch["learning_rate"] for epoch in epochs],
            color="#555555",
        )
        rate.set_title("learning rate at the end of the epoch", fontsize=10)
        loss.set_ylim(bottom=0)
        accuracy.set_ylim(0, 101)
        rate.set_ylim(bottom=0)
        for axes in (loss, accuracy, rate):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        return png(figure)

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        self._writer.close()
