"""Which parameters are trained, and how fast."""

import pytest
from torch import nn

from bundle.errors import InputError
from bundle.heads.mean import Classifier
from bundle.training.parameters import by_depth, trained

SIZE = {"image_size": (48, 48, 48), "frames": 2, "embed_dim": 4, "depths": (1, 2, 1, 1)}


def test_a_frozen_encoder_leaves_the_head(caplog):
    network = Classifier(**SIZE)
    with caplog.at_level("INFO"):
        assert {id(p) for p in trained(network)} == {id(p) for p in network.head.parameters()}
    total = sum(p.numel() for p in network.parameters())
    assert f"Classifier: 33 of {total} parameters are trained" in caplog.text


def test_each_layer_learns_slower_than_the_one_above_it():
    network = Classifier(freeze=False, **SIZE)
    groups = by_depth(network, learning_rate=0.1, decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sorted(rates) == sorted(id(p) for p in network.parameters())  # each once

    def rate(part: nn.Module | nn.Parameter) -> float:
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        (found,) = {rates[id(p)] for p in parameters}
        return found

    stages = network.encoder.stages
    walk = [network.encoder.patch_embedding]
    for number, stage in enumerate(stages):
        walk += [stage.place, *stage.stack.blocks, *([stage.merge] if number < 3 else [])]
    walk.append(network.head)
    assert [rate(part) for part in walk] == pytest.approx([0.1 * 0.5**k for k in range(len(walk) - 1, -1, -1)])
    assert all(rate(stage.time) == rate(stage.place) for stage in stages)


@pytest.mark.parametrize(
    ("freeze", "decay", "message"),
    [(False, 0.0, "above 0 and at most 1, not 0"), (False, 1.5, "not 1.5"), (True, 0.5, "set freeze_encoder false")],
)
def test_what_cannot_be_fine_tuned_is_refused(freeze, decay, message):
    with pytest.raises(InputError, match=message):
        by_depth(Classifier(freeze=freeze, **SIZE), 0.1, decay)
