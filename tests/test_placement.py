"""That nothing stays behind on the CPU, by tensors that have a device and no values."""

import pytest
import torch

from models import MODELS
from training.classifier import Classifier

META = torch.device("meta")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("encoder", "streams", "side"),
    [("tiny", ("rgb", "diff"), 32), ("tiny_video", ("rgb", "tiny"), 24), ("i3d", ("rgb",), 32)],
)
def test_all_that_a_model_makes_is_on_its_device(name, encoder, streams, side):
    model = Classifier(name, 5, encoder=encoder, streams=streams, pretrained=encoder != "i3d").to(META)
    model.encoder.prepare(torch.bfloat16)
    opened = model.open_streams(side)
    assert {stream.device for stream in opened} == {META}
    assert {tensor.device for tensor in model.state_dict().values()} == {META}
    embeddings = []
    for stream in opened:
        length = stream.windows.context + stream.windows.frames
        windows = torch.zeros(3, length, 3, stream.img_dim, stream.img_dim, dtype=torch.uint8, device=META)
        given = stream.embed(windows)
        assert (given.device, given.shape[2]) == (META, stream.width)
        embeddings.append(torch.zeros(3, 8, stream.width, device=META))
    padding = torch.zeros(3, 8, dtype=torch.bool, device=META)
    for train in (False, True):
        logits = model.train(train).classify(torch.cat(embeddings, 2), padding)
        assert (logits.device, logits.shape) == (META, (3, 5))
    logits.sum().backward()
    gradients = [each.grad for each in model.heads.parameters() if each.grad is not None]
    assert gradients
    assert {gradient.device for gradient in gradients} == {META}
