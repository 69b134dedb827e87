"""Pretrain a head without labels: it learns to predict hidden embeddings of the training clips from the rest.

    python3 pretrain.py --model ActionBERT --encoder efficientnet_lite0
    python3 train.py --checkpoint_model model_checkpoints/pretrained/ActionBERT_10.pth

For ConvLSTM and ActionBERT, where labels are few. Spans of embeddings are hidden, and the head has to tell
from the others what they were: by regression, and by picking the right one among all hidden ones of the
batch. The two losses are those of masked frame modelling in HERO (Li et al., EMNLP 2020, section 3.2); the
contrastive one is InfoNCE (van den Oord et al., 2018). Spans, as in SpanBERT (Joshi et al., TACL 2020): the
neighbors of a single frame give it away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dataset import EmbeddingClips, Sampling, batch_items, fill_store
from features.settings import DeviceSettings, EncoderSettings, StoreSettings, open_encoder
from features.store import Store, default_folder
from models import MODELS, Head, build_head
from splits.datasets import ALL, DataSettings, open_listed
from training.checkpoint import Checkpoint, save_checkpoint
from training.recipe import Optimization, read_recipe
from training.settings import ClipSettings, LoopSettings, ModelSettings
from utils.device import seed_everything
from utils.files import make_writable_folder
from utils.flags import Parser, add_flags, read
from utils.process import UserError, run, say

MASKED_SHARE, MEAN_SPAN, TEMPERATURE = 0.5, 6, 0.1


def get_args_parser() -> Parser:
    """The flags of pretrain.py."""
    parser = Parser(description=__doc__.split("\n")[0])
    add_flags(parser, DataSettings, without=("segments",))
    add_flags(parser, StoreSettings)
    add_flags(parser, EncoderSettings, without=("flip",))
    add_flags(parser, ModelSettings, without=("checkpoint_model", "channels"))
    add_flags(parser, ClipSettings, without=("val_fraction",))
    add_flags(parser, LoopSettings, without=("class_weights",), num_epochs=10)
    parser.add_argument(
        "--output_path", type=Path, default=Path("model_checkpoints/pretrained"),
        help="folder for <model>_<num_epochs>.pth; default: model_checkpoints/pretrained",
    )  # fmt: skip
    add_flags(parser, DeviceSettings)
    return parser


def span_mask(batch: int, length: int) -> Tensor:
    """Which embeddings are hidden: (B, T) bool; about `MASKED_SHARE`, in spans of about `MEAN_SPAN`.

    A Markov chain of two states that begins in its stationary distribution; some embedding of each clip is
    hidden, and some is not.
    """
    leave = 1 / MEAN_SPAN
    enter = leave * MASKED_SHARE / (1 - MASKED_SHARE)
    chance = torch.rand(batch, length)
    masked = chance < MASKED_SHARE
    for place in range(1, length):
        before = masked[:, place - 1]
        masked[:, place] = torch.where(before, chance[:, place] >= leave, chance[:, place] < enter)
    anywhere, clips = torch.randint(length, (batch,)), torch.arange(batch)
    masked[clips, anywhere] = True
    masked[clips, (anywhere + length // 2) % length] = False
    return masked


class MaskedHead(nn.Module):
    """A head, a vector that stands for a hidden embedding, and a predictor of what was there."""

    def __init__(self, head: Head, width: int) -> None:
        super().__init__()
        self.head, self.mask = head, nn.Parameter(torch.zeros(width))
        # Standardized, all dimensions of an embedding count alike.
        self.targets = nn.BatchNorm1d(width, affine=False)
        self.predictor = nn.Sequential(nn.Linear(head.hidden_dim, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, embeddings: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the hidden embeddings (M,), and whether each is picked (M,); padding is never hidden."""
        hidden = span_mask(*padding.shape).to(padding.device) & ~padding
        targets = self.targets(embeddings.flatten(0, 1)).unflatten(0, padding.shape)[hidden]
        shown = torch.where(hidden[..., None], self.mask, embeddings)
        predicted = self.predictor(self.head.read(shown, padding)[1][hidden])
        regression = F.mse_loss(predicted, targets, reduction="none").mean(dim=1)
        similarity = F.normalize(predicted, dim=1) @ F.normalize(targets, dim=1).T / TEMPERATURE
        right = torch.arange(len(targets), device=similarity.device)
        losses = regression + F.cross_entropy(similarity, right, reduction="none")
        return losses, similarity.argmax(1) == right


def main(argv: list[str] | None = None) -> int:
    """Pretrain and save; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.split_number == ALL:
        parser.error("--split_number all: pretrain on one split at a time, since each tests on other clips")
    able = [name for name, head in MODELS.items() if head.read is not Head.read]
    if args.model not in able:
        raise UserError(f"--model {args.model} sees each embedding by itself; choose {' or '.join(able)}")
    seed_everything(args.seed)
    listed, seen = open_listed(read(DataSettings, args)), read(EncoderSettings, args)
    split = listed.split(args.split_number)
    encoder = open_encoder(seen, read(DeviceSettings, args))
    stride, device = args.frame_stride or encoder.spec.frame_stride, encoder.device
    length = args.sequence_length or encoder.spec.sequence_length
    if length < 2 or len(split.train) < 2:
        raise UserError("pretraining takes two clips and --sequence_length 2 at least, to tell one by others")
    make_writable_folder(args.output_path)
    folder = default_folder(args.cache_path, args.dataset_path, encoder, stride)
    store = Store(folder, encoder, stride=stride, flip=(flip := seen.mirrors(encoder.spec)))
    fill_store(store, split.train, args.num_workers)
    clips = EmbeddingClips(store, split.train, Sampling(length, training=True, flip=flip, seed=args.seed))
    head, sizes = build_head(
        args.model, encoder.width, len(split.classes), latent_dim=args.latent_dim, sequence_length=length
    )
    masked = MaskedHead(head, encoder.width).to(device)
    steps = len(batch_items(len(split.train), args.batch_size, seed=args.seed))
    recipe = read_recipe(args.recipe, args.learning_rate)
    optimization = Optimization(masked, recipe, args.num_epochs * steps)
    for epoch in range(1, args.num_epochs + 1):
        masked.train()
        totals = np.zeros(3)  # sum of losses, picked, hidden
        batches = batch_items(len(split.train), args.batch_size, epoch=epoch, seed=args.seed)
        bar = tqdm(batches, f"epoch {epoch} of {args.num_epochs}", unit="batch", dynamic_ncols=True)
        for items in bar:
            embeddings, padding, _ = clips.batch(items)
            losses, picked = masked(embeddings.to(device), padding.to(device))
            optimization.step(losses.mean())
            totals += [losses.sum().item(), picked.sum().item(), len(losses)]
        loss, percent = totals[0] / totals[2], 100 * totals[1] / totals[2]
        say(f"epoch {epoch} of {args.num_epochs}: loss {loss:.3f}, {percent:.1f} % of the hidden are picked")
    path = args.output_path / f"{args.model}_{args.num_epochs}.pth"
    settings = {"no_flip": args.no_flip, "pretrained_on": str(args.dataset_path)}
    save_checkpoint(path, Checkpoint(
        encoder, head.eval(), args.model, sizes, split.classes, length, stride, args.split_number,
        args.num_epochs, settings,
    ))  # fmt: skip
    say(f"next: python3 train.py --checkpoint_model {path}")
    return 0


if __name__ == "__main__":
    run(main)
