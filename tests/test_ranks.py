"""Processes that train together: torchrun with two of them on a CPU."""

import subprocess
import sys
from itertools import chain
from textwrap import dedent

import pytest
import torch

import test as test_script
import train
from conftest import ROOT, ucf101_at
from features.cache import CacheError
from features.encoder import Encoder
from features.fill import open_cache
from splits.datasets import load_split
from training.batches import ClipBatches
from training.checkpoint import load_checkpoint
from training.classifier import Classifier
from training.learner import Learner
from training.recipe import RECIPES
from utils import ranks as ranks_module
from utils.ranks import Ranks


def torchrun(*command, processes=2, cwd=ROOT):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--standalone",
    ]
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_parts_of_all_processes_are_the_batches_of_one(shuffle):
    for clips, size, ranks in ((23, 4, 2), (7, 3, 3), (8, 16, 5), (5, 2, 2)):
        alone = ClipBatches(clips, size, shuffle=shuffle, seed=1)
        parts = [
            ClipBatches(clips, size, shuffle=shuffle, seed=1, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        for batches in (alone, *parts):
            batches.epoch = 3
        if shuffle:
            together = [sorted(chain(*batch)) for batch in zip(*parts, strict=True)]
            assert together == [sorted(batch) for batch in alone if len(batch) >= ranks]
        else:
            seen = sorted(chain(*chain(*parts)))
            assert seen == [(3, index) for index in range(clips)], "every clip once"


NETWORK = dedent(
    """
    import sys
    import torch
    from torch import nn
    from torch.nn import functional as F
    from utils.ranks import Ranks

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=0.01), nn.ReLU(), nn.Linear(8, 3))
    inputs, labels = torch.randn(7, 5), torch.randint(0, 3, (7,))
    ranks = Ranks.from_environment(torch.device("cpu"))
    forward = ranks.parallel(network, network.forward)
    forward.train()
    for _ in range(2):
        mine = slice(ranks.rank, None, ranks.size)
        loss = F.cross_entropy(forward(inputs[mine]), labels[mine], reduction="sum")
        network.zero_grad()
        (loss * ranks.size / 7).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    torch.save((gradients, network.state_dict()), f"{sys.argv[1]}/{ranks.rank}of{ranks.size}.pt")
    ranks.close()
    """
)


def test_gradients_and_batchnorm_are_those_of_one_process(tmp_path):
    """Seven rows: one process has four of them, the other three."""
    (tmp_path / "network.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{NETWORK}")
    subprocess.run([sys.executable, tmp_path / "network.py", tmp_path], check=True, timeout=120)
    torchrun(tmp_path / "network.py", tmp_path)
    gradients, state = torch.load(tmp_path / "0of1.pt", weights_only=True)
    for rank in range(2):
        their_gradients, their_state = torch.load(tmp_path / f"{rank}of2.pt", weights_only=True)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(their_gradients[name], gradient, atol=1e-6), name
        for name, tensor in state.items():
            assert torch.allclose(their_state[name].float(), tensor.float(), atol=1e-6), name


@pytest.mark.full_size
def test_training_on_two_processes_is_training_on_one(call, toy, tmp_path):
    """The cache filled by both, the same losses, and every test clip counted once."""
    data = ["--dataset_path", toy / "UCF-101", "--split_path", toy / "ucfTrainTestlist"]
    encoder = ["--encoder", "efficientnet_lite0", "--img_dim", 32, "--precision", "fp32"]
    flags = [*data, *encoder, "--sequence_length", 8, "--latent_dim", 8, "--num_epochs", 2, "--batch_size", 7]
    # Dropout and mixup draw other numbers in each process.
    flags += ["--recipe", "original", "--learning_rate", "5e-4", "--clip_norm", 1]

    def figures(output):
        return [line for line in output.splitlines() if "nats" in line]

    two = torchrun("train.py", *flags, "--output_path", tmp_path / "two", "--cache_path", tmp_path / "cache")
    names = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert {"embeddings-1of2.npy", "embeddings-2of2.npy"} <= names
    one = call(train, *flags, "--output_path", tmp_path / "one", "--cache_path", tmp_path / "cache").out
    assert "encoding" not in one, "the shards of both are read as one cache"
    assert len(figures(two)) == len(figures(one)) == 4
    count = figures(one)[2].split("(")[1]
    assert "of 16 clips" in count
    for line, other in zip(figures(two), figures(one), strict=True):
        loss, expected = (float(text.split("loss ")[1].split(" ")[0]) for text in (line, other))
        assert loss == pytest.approx(expected, abs=0.002)
    ours, theirs = (
        load_checkpoint(tmp_path / name / "ConvLSTM_2.pth").model.state_dict() for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys()
    # A bias before a BatchNorm has no effect: its gradient is nothing but rounding, which Adam makes large.
    for name in set(theirs) - {"heads.rgb.projection.0.bias", "heads.rgb.output_layers.0.bias"}:
        tensor = theirs[name]
        assert torch.allclose(ours[name].float(), tensor.float(), atol=2e-3), name
    # The same weights, tested by one process and by two.
    checkpoint = ["--checkpoint_model", tmp_path / "one/ConvLSTM_2.pth", "--cache_path", tmp_path / "cache"]
    testing = [*data, *checkpoint, "--precision", "fp32", "--batch_size", 3]
    alone = call(test_script, *testing).out
    together = torchrun("test.py", *testing)
    assert figures(alone) == figures(together) != []


MASKED = dedent(
    """
    import sys
    import torch
    import conftest
    from training.classifier import Classifier
    from training import masked
    from training.recipe import RECIPES
    from utils.ranks import Ranks

    conftest.add_tiny_encoder()
    torch.manual_seed(0)
    model = Classifier("ActionBERT", 3, encoder="tiny", latent_dim=16, sequence_length=6)
    ranks = Ranks.from_environment(torch.device("cpu"))
    embeddings, hidden = torch.randn(5, 6, 48), torch.rand(5, 6) < 0.4
    hidden[:, 0], hidden[:, 3] = True, False
    mine = slice(ranks.rank, None, ranks.size)
    # Which frames are hidden is drawn by each process; here it is the same as on one.
    masked.span_mask = lambda *_: hidden[mine]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or hasattr(module, "dropout_p"):
            module.p = 0.0
    frames = masked.MaskedFrames(model, ranks)
    learner = masked.MaskedLearner(model, frames, RECIPES["original"], 10, 0)
    for _ in range(2):
        # The second time as after pretraining: what was built for the first is gone.
        forward = ranks.parallel(learner.trained, learner.forward, uses_all=False)
        forward.eval()
        for norm in frames.targets.values():
            norm.train()
        losses, found = forward(embeddings[mine], torch.zeros(len(embeddings[mine]), 6, dtype=torch.bool))
        items = ranks.sum(torch.tensor([float(len(losses))])).item()
        learner.optimizer.zero_grad()
        (losses.sum() * ranks.size / items).backward()
    total = ranks.sum(torch.stack([losses.sum().detach(), found.sum()]))
    gradients = {name: tensor.grad for name, tensor in frames.named_parameters() if tensor.grad is not None}
    torch.save((total, gradients), f"{sys.argv[1]}/{ranks.rank}of{ranks.size}.pt")
    del forward
    ranks.close()
    """
)


def test_pretraining_on_two_processes_is_pretraining_on_one(tmp_path):
    """A hidden frame is told from those of all processes, as many as one process would have."""
    script = tmp_path / "masked.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{MASKED}")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=120)
    torchrun(script, tmp_path)
    total, gradients = torch.load(tmp_path / "0of1.pt", weights_only=True)
    assert len(gradients) > 10
    for rank in range(2):
        their_total, their_gradients = torch.load(tmp_path / f"{rank}of2.pt", weights_only=True)
        assert torch.allclose(their_total, total, atol=1e-4)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(their_gradients[name], gradient, atol=1e-5), name


def test_processes_wait_for_each_other_longer_than_a_cache_takes(monkeypatch):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks_module.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        ranks_module.dist, "init_process_group", lambda backend, timeout: given.update(t=timeout)
    )
    monkeypatch.setattr(ranks_module.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks_module.dist, "get_world_size", lambda: 2)
    assert ranks_module.Ranks.from_environment(torch.device("cpu")) == ranks_module.Ranks(1, 2)
    assert given["t"].days >= 1


def test_the_frozen_encoder_is_no_part_of_what_processes_share():
    model = Classifier("MeanPool", 2, encoder="tiny")
    learner = Learner(model, RECIPES["default"], 10)
    shared = Ranks().parallel(learner.trained, learner.forward)
    assert {id(one) for one in shared.parameters()} == {id(one) for one in model.heads.parameters()}


def test_clips_that_another_machine_encoded_elsewhere_are_missed(small, tmp_path):
    """Two processes that do not see one folder: each lacks what the other has."""
    split = load_split(ucf101_at(small), 1)

    class Second(Ranks):
        def wait(self):
            pass

    with pytest.raises(CacheError, match="2 clips that other processes encoded are not there"):
        open_cache(tmp_path, split.train, Encoder("tiny"), 32, flip=False, ranks=Second(1, 2))
