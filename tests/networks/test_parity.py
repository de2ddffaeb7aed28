"""Same numbers as the published NeuroSTORM code, on every reference file in ../shared/parity.

Compared at 1e-4 relative in float32: outputs, loss, and the norm of each parameter's gradient. Each file says
with which settings it was made, so that further files are tested by dropping them into the folder.
"""

from pathlib import Path

import pytest
import torch

from bundle.deploy.published import convert_published
from bundle.networks.masked_autoencoder import MaskedAutoencoder

FILES = sorted((Path(__file__).resolve().parents[3] / "shared" / "parity").glob("*.pt"))
TOLERANCE = 1e-4
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason="the reference tensors ../shared/parity are absent"))


def token_mask(case: dict, grid: tuple[int, ...]) -> torch.Tensor:
    """The file's mask as (b, x, y, z, t); masks of windows are spread over their tokens."""
    if case["config"]["spatial_mask"] != "window":
        return case["mask"].reshape(-1, *grid)
    window = case["config"]["window_size"]
    mask = case["mask"].reshape(-1, *(size // width for size, width in zip(grid, window, strict=True)))
    for axis, width in enumerate(window, 1):
        mask = mask.repeat_interleave(width, axis)
    return mask


def run(case: dict, network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's output and the loss that the reference was made with."""
    image = case["x"]
    if not isinstance(network, MaskedAutoencoder):
        features = network(image)
        return features, features.square().mean()
    hidden = token_mask(case, (*network.encoder.grid, image.shape[-1]))
    prediction = network.reconstruct(image, hidden)
    voxels = hidden
    for axis in (1, 2, 3):
        voxels = voxels.repeat_interleave(network.encoder.patch_size, axis)
    return prediction, (prediction - image)[voxels.unsqueeze(1)].square().mean()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("path", FILES or [ABSENT], ids=lambda path: getattr(path, "stem", "none"))
def test_published_numbers(path, checkpointing):
    case = torch.load(path, weights_only=True)
    converted = convert_published(case["state_dict"], case["config"], orientation="RAS")
    assert converted.report.missing == converted.report.left_over == []
    network = converted.network(**converted.arguments, checkpointing=checkpointing)
    network.load_state_dict(converted.state_dict)

    output, loss = run(case, network)
    loss.backward()

    expected = case["output"] if "output" in case else case["pred"]
    assert torch.dist(output.detach(), expected) < TOLERANCE * expected.norm()
    torch.testing.assert_close(output.detach(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    assert loss.item() == pytest.approx(float(case["loss"]), rel=TOLERANCE)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for published, ours in converted.report.mapped.items():
        norm = case["grad_norms"][published]
        if norm is None:  # a mask token that is not in use
            assert gradients[ours] is None
        else:
            assert gradients[ours].norm().item() == pytest.approx(float(norm), rel=TOLERANCE), published
