"""Windows, patches, hidden tokens and input checks of the encoder and the masked autoencoder.

The numbers are compared with the published ones in test_parity.py. Not covered: the quality of what is learnt.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch.nn import functional

from bundle.errors import InputError
from bundle.networks import scan
from bundle.networks.masked_autoencoder import MASK_TOKENS, MaskedAutoencoder
from bundle.networks.swin_mamba import (
    SwinMambaEncoder,
    WindowBlock,
    halve,
    join_patches,
    split_patches,
)
from bundle.networks.windows import Windows, fit_window, split_windows

SMALL = {"image_size": [24, 24, 24], "frames": 6, "embed_dim": 4, "depths": [2, 2], "window_size": [2, 2, 2, 4]}
SMALL["first_window_size"] = [2, 2, 2, 4]


def autoencoder(**changes):
    """A small network in which no parameter is trivial: 4 x 4 x 4 tokens per frame."""
    torch.manual_seed(0)
    network = MaskedAutoencoder(**{**SMALL, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def image(batch=1, frames=6, size=24, seed=1):
    return torch.randn(batch, 1, size, size, size, frames, generator=torch.Generator().manual_seed(seed))


sizes = st.tuples(*[st.integers(1, 3)] * 4)


@settings(deadline=None, max_examples=30)
@given(window=sizes, counts=sizes)
def test_windows_are_in_raster_order_with_time_fastest(window, counts):
    grid = [width * count for width, count in zip(window, counts, strict=True)]
    tokens = torch.arange(2 * np.prod(grid)).reshape(2, *grid, 1)
    windows = split_windows(tokens, window)
    places = itertools.product(range(2), *[range(count) for count in counts])
    for number, (b, *corner) in enumerate(places):
        x, y, z, t = (start * width for start, width in zip(corner, window, strict=True))
        inside = tokens[b, x : x + window[0], y : y + window[1], z : z + window[2], t : t + window[3]]
        assert torch.equal(windows[number], inside.reshape(-1, 1))


@pytest.mark.parametrize(
    ("grid", "expected_window", "expected_shift"),
    [
        ((16, 16, 16, 20), (4, 4, 4, 4), (2, 2, 2, 2)),
        ((4, 8, 2, 20), (4, 4, 2, 4), (0, 2, 0, 2)),
        ((5, 3, 4, 1), (4, 3, 4, 1), (2, 0, 0, 0)),
    ],
)
def test_a_window_as_large_as_the_grid_is_not_shifted(grid, expected_window, expected_shift):
    assert fit_window(grid, (4, 4, 4, 4), (2, 2, 2, 2)) == (expected_window, expected_shift)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("frames", [4, 6, 3])
def test_tokens_mix_only_inside_their_window(shifted, frames):
    """Brute force: the padded grid is periodic, and window w of axis length n holds (i - shift) // w."""
    torch.manual_seed(0)
    block = WindowBlock(4, (2, 2, 4, 4), shifted).double()
    grid = (4, 2, 6, frames)  # z is padded to 8, 6 frames to 8
    tokens = torch.randn(1, *grid, 4, dtype=torch.float64)
    count = np.prod(grid)
    # one token changed per batch item; one channel only, as a change of all of them is taken out by LayerNorm
    bumps = functional.pad(torch.eye(count, dtype=torch.float64).reshape(count, *grid, 1), (0, 3))
    with torch.no_grad():
        changed = block(tokens + bumps) != block(tokens)
    influence = changed.any(-1).reshape(count, count).T  # [token out, token in]

    periods = [4, 2, 8, {4: 4, 6: 8, 3: 3}[frames]]
    windows = [2, 2, 4, min(4, frames)]
    shifts = [w // 2 if shifted and size > w else 0 for w, size in zip((2, 2, 4, 4), grid, strict=True)]
    rolled = [
        [(index - shift) % period for index, shift, period in zip(place, shifts, periods, strict=True)]
        for place in itertools.product(*map(range, grid))
    ]
    window = np.array([[i // w for i, w in zip(place, windows, strict=True)] for place in rolled])
    order = np.array([np.ravel_multi_index(place, periods) for place in rolled])
    same = (window[:, None] == window[None]).all(-1)
    expected = same & (order[:, None] >= order[None])  # Mamba looks back only
    assert np.array_equal(influence.numpy(), expected)


def test_patches_hold_the_voxels_of_their_cube_in_raster_order():
    voxels = torch.arange(2 * 6**3 * 4 * 3 * 2).reshape(2, 1, 12, 12, 18, 2)
    patches = split_patches(voxels, 6)
    assert patches.shape == (2, 2, 2, 3, 2, 216)
    assert torch.equal(patches[1, 1, 0, 2, 1], voxels[1, 0, 6:12, 0:6, 12:18, 1].flatten())
    assert torch.equal(join_patches(patches, 6), voxels)


def test_of_two_channels_the_first_begins_at_a_tenth_and_the_second_as_it_would_alone():
    torch.manual_seed(0)
    one = SwinMambaEncoder(**SMALL)
    torch.manual_seed(0)
    two = SwinMambaEncoder(**SMALL, in_channels=2)
    first, second = torch.randn(2, 1, 1, 24, 24, 24, 6)
    nothing = torch.zeros_like(first)
    bias = one.embed(nothing)
    assert torch.allclose(two.embed(nothing.repeat(1, 2, 1, 1, 1, 1)), bias)
    alone = one.embed(first) - bias
    assert torch.allclose(two.embed(torch.cat([first, nothing], 1)) - bias, 0.1 * alone, atol=1e-6)
    spread = (two.embed(torch.cat([nothing, second], 1)) - bias).std()
    assert spread.item() == pytest.approx(alone.std().item(), rel=0.2)


def test_full_size_parameter_counts():
    network = MaskedAutoencoder()
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_712_964
    assert sum(parameter.numel() for parameter in network.encoder.parameters()) == 5_173_020


@pytest.mark.parametrize("frames", [1, 4, 5, 6])
@pytest.mark.parametrize("full_last_stage", [True, False])
def test_clips_up_to_the_configured_length(frames, full_last_stage):
    network = autoencoder(full_last_stage=full_last_stage)
    clip = image(batch=2, frames=frames)
    assert network.encoder(clip).shape == (2, 8, 2, 2, 2, frames)
    assert network(clip, torch.zeros(2, 1, 24, 24, 24)).shape == clip.shape


@pytest.mark.parametrize("mask_token", MASK_TOKENS)
@pytest.mark.parametrize("tube", [True, False])
def test_hidden_voxels_do_not_leak(mask_token, tube):
    """Whatever stands in the tokens that a mask touches, the reconstruction is the same, bit for bit."""
    network = autoencoder(mask_token=mask_token)
    mask = torch.zeros(1, 1, 24, 24, 24, dtype=torch.bool)
    mask[..., 4:8, 10, 3] = True  # touches the tokens 0 and 1 of x, 1 of y, 0 of z
    mask[..., 23, 23, 23] = True
    touched = torch.zeros_like(mask)
    touched[..., 0:12, 6:12, 0:6] = True
    touched[..., 18:24, 18:24, 18:24] = True
    mask, touched = (m.unsqueeze(-1).repeat(1, 1, 1, 1, 1, 6) for m in (mask, touched))
    if not tube:
        mask[..., 3:], touched[..., 3:] = False, False
    clip = image()
    changed = torch.where(touched, 1e3 * image(seed=2), clip)
    given_mask = mask[..., 0] if tube else mask
    assert torch.equal(network(clip, given_mask), network(changed, given_mask))
    visible = torch.where(touched, clip, 2 * clip)
    assert not torch.allclose(network(clip, given_mask), network(visible, given_mask))


def test_majority_hides_tokens_with_more_than_half_of_their_voxels():
    mask = torch.zeros(1, 1, 24, 24, 24, dtype=torch.bool)
    mask[0, 0, :3, :6, :6] = True  # exactly half of token (0, 0, 0)
    mask[0, 0, 6:9, :6, :6] = mask[0, 0, 9, 0, 0] = True  # one voxel more than half of token (1, 0, 0)
    assert autoencoder(hide="any").hidden_tokens(image(), mask).nonzero().tolist() == [[0] * 5, [0, 1, 0, 0, 0]]
    assert autoencoder(hide="majority").hidden_tokens(image(), mask).nonzero().tolist() == [[0, 1, 0, 0, 0]]


def test_a_tube_mask_equals_the_same_mask_at_every_frame():
    network = autoencoder()
    mask = torch.rand(2, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.999
    clip = image(batch=2)
    assert torch.equal(network(clip, mask), network(clip, mask.unsqueeze(-1).expand(clip.shape)))


@pytest.mark.parametrize("mask_token", MASK_TOKENS)
def test_only_the_chosen_mask_token_is_trained(mask_token):
    """Every trainable parameter gets a gradient, as training on several GPUs wants."""
    network = autoencoder(mask_token=mask_token)
    network(image(), torch.ones(1, 1, 24, 24, 24)).square().mean().backward()
    assert [name for name, token in network.mask_tokens.items() if token.requires_grad] == [mask_token]
    # with everything hidden nothing reaches the patch embedding, but its gradient exists
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())


def test_window_mask_tokens_repeat_with_the_window():
    network = autoencoder(mask_token="window")
    filling = network._filling(torch.zeros(1, 4, 4, 4, 6, 4))
    token = network.mask_tokens["window"]
    for x, y, z, t in itertools.product(range(4), range(4), range(4), range(6)):
        assert torch.equal(filling[x, y, z, t], token[x % 2, y % 2, z % 2, t % 4])


def test_las_weights_see_a_mirrored_image():
    ras, las = autoencoder(), autoencoder(orientation="LAS")
    las.load_state_dict(ras.state_dict())
    clip = image()
    mask = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.995
    torch.testing.assert_close(las(clip, mask), ras(clip.flip(2), mask.flip(2)).flip(2))
    torch.testing.assert_close(las.encoder(clip), ras.encoder(clip.flip(2)).flip(2))


@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
@pytest.mark.parametrize("skip_background", [False, True])
def test_tokens_of_the_last_stage_are_the_features_and_those_of_stage_0_the_patches(orientation, skip_background):
    encoder = SwinMambaEncoder(**SMALL, orientation=orientation, skip_background=skip_background).eval()
    clip = image()
    with torch.no_grad():
        assert torch.equal(encoder.tokens(clip, 2).permute(0, 5, 1, 2, 3, 4), encoder(clip))
        by_hand = split_patches(clip.flip(2) if orientation == "LAS" else clip, 6) @ encoder.patch_embedding.weight.T
        by_hand = by_hand + encoder.patch_embedding.bias
        by_hand = by_hand.flip(1) if orientation == "LAS" else by_hand
        torch.testing.assert_close(encoder.tokens(clip, 0), by_hand)
        first = encoder.mirror(encoder.tokens(clip, 1), 1)  # in the orientation of the weights
        brain = encoder.brain_tokens(clip)
        merged = encoder.stages[0].merge(first)
        last = encoder.stages[1](merged, None if brain is None else halve(brain))
        assert torch.equal(encoder.mirror(last, 1), encoder.tokens(clip, 2))
    assert [encoder.tokens_of(stage) for stage in range(3)] == [(6, 4), (6, 4), (12, 8)]
    with pytest.raises(InputError, match="stage must be 0 to 2"):
        encoder.tokens(clip, 3)


def test_weights_cannot_be_mirrored_instead_of_the_image():
    """Why `orientation` exists: with mirrored embeddings Mamba still reads x in the old direction."""
    encoder, mirrored = autoencoder().encoder, autoencoder().encoder
    with torch.no_grad():
        weight = encoder.patch_embedding.weight
        mirrored.patch_embedding.weight.copy_(weight.reshape(-1, 6, 6, 6).flip(1).reshape(weight.shape))
        for ours, stage in zip(mirrored.stages, encoder.stages, strict=True):
            ours.place.copy_(stage.place.flip(0))
    torch.testing.assert_close(mirrored.embed(image()), encoder.embed(image().flip(2)).flip(1))
    assert not torch.allclose(mirrored(image()), encoder(image().flip(2)).flip(2), rtol=1e-2)


def test_checkpointing_changes_nothing_but_memory():
    plain, saving = autoencoder(), autoencoder(checkpointing=True)
    mask = torch.zeros(1, 1, 24, 24, 24)
    mask[..., :6] = 1
    for network in (plain, saving):
        network(image(), mask).square().mean().backward()
    for ours, expected in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_autocast_runs_forward_and_backward():
    network = autoencoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = network(image(), torch.zeros(1, 1, 24, 24, 24))
    result.float().square().mean().backward()
    exact = network(image(), torch.zeros(1, 1, 24, 24, 24))
    assert torch.dist(result.float(), exact) < 0.05 * exact.norm()


def test_arguments_survive_json():
    arguments = json.loads(json.dumps({**SMALL, "mask_token": "window", "hide": "majority"}))
    MaskedAutoencoder(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": [24, 24, 30]}, "multiples of 12"),
        ({"image_size": [24, 24]}, "three multiples"),
        ({"window_size": [2, 2, 2]}, "window_size must be four"),
        ({"first_window_size": [2, 2, 2, 0]}, "first_window_size must be four"),
        ({"orientation": "LPS"}, "orientation must be one of"),
        ({"mask_token": "zero"}, "mask_token must be one of"),
        ({"hide": "all"}, "hide must be one of"),
    ],
)
def test_impossible_arguments_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        autoencoder(**changes)


@pytest.mark.parametrize(
    "shape", [(1, 24, 24, 24, 6), (1, 2, 24, 24, 24, 6), (1, 1, 24, 24, 30, 6), (1, 1, 24, 24, 24, 7)]
)
def test_an_image_that_does_not_fit_is_refused_with_both_shapes(shape):
    with pytest.raises(InputError) as caught:
        SwinMambaEncoder(**SMALL)(torch.zeros(shape))
    assert str(shape) in str(caught.value)
    assert "(B, 1, 24, 24, 24, T) with T from 1 to 6" in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 24, 24, 24), (1, 1, 24, 24, 24, 5), (2, 1, 24, 24, 24)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match="The mask of an image"):
        autoencoder()(image(), torch.zeros(shape))


def test_gathering_windows_equals_padding_rolling_and_cutting():
    """Against torch.nn.functional.pad, roll and `split_windows`, values and gradients, with and without padding."""
    for grid, window, shift in (((4, 6, 8, 5), (2, 3, 4, 4), (1, 0, 2, 2)), ((4, 4, 4, 4), (2, 2, 2, 4), (1, 1, 1, 0))):
        tokens = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True)
        layout = Windows(grid, window, shift, torch.device("cpu"))
        windows = layout.cut(tokens)
        if layout.real is not None:
            windows = windows * layout.real.repeat(2, 1, 1)
        late = -grid[3] % window[3]  # the other axes hold whole windows
        padded = functional.pad(tokens, (0, 0, 0, late)).roll([-step for step in shift], (1, 2, 3, 4))
        expected = split_windows(padded, window)
        assert torch.equal(windows, expected)
        weights = torch.randn_like(expected)
        found, wanted = (torch.autograd.grad((w * weights).sum(), tokens)[0] for w in (windows, expected))
        assert torch.equal(found, wanted)
        assert torch.equal(layout.join(layout.cut(tokens)), tokens)
        x, y, z, t = grid
        leaf = torch.randn_like(expected).requires_grad_()
        # `split_windows` says where each token of the padded grid went: put it back there
        whole = (2, x, y, z, t + late, 3)
        places = split_windows(torch.arange(math.prod(whole[:-1])).reshape(*whole[:-1], 1), window).flatten()
        filled = torch.zeros(len(places), 3, dtype=torch.float64).index_copy(0, places, leaf.flatten(0, 1))
        joined = filled.reshape(whole).roll(shift, (1, 2, 3, 4))[:, :, :, :, :t]
        assert torch.equal(layout.join(leaf), joined)
        weights = torch.randn_like(joined)
        found, wanted = (torch.autograd.grad((w * weights).sum(), leaf)[0] for w in (layout.join(leaf), joined))
        assert torch.equal(found, wanted)


def in_a_brain(frames=6):
    """A clip whose brain is one token thick corner of 24 voxels; the background holds -3."""
    clip = torch.full((1, 1, 24, 24, 24, frames), -3.0)
    clip[..., :5, :6, :4, :] = image(frames=frames)[..., :5, :6, :4, :]
    return clip


def test_where_brain_is():
    clip = in_a_brain().expand(2, -1, -1, -1, -1, -1).clone()
    clip[1, 0, 20, 9, 0, 3] = 1.0  # the other item's brain, at one frame only
    brain = autoencoder(skip_background=True).encoder.brain_tokens(clip)
    assert brain.nonzero().tolist() == [[0, 0, 0], [3, 1, 0]]
    assert halve(brain).nonzero().tolist() == [[0, 0, 0], [1, 0, 0]]
    assert autoencoder().encoder.brain_tokens(clip) is None
    las = autoencoder(skip_background=True, orientation="LAS").encoder.brain_tokens(clip)
    assert torch.equal(las, brain.flip(0))


def test_skipping_changes_nothing_where_all_windows_hold_brain():
    mask = torch.zeros(1, 1, 24, 24, 24, dtype=torch.bool)
    mask[..., 4:8, 10, 3] = True
    plain, skipping = autoencoder(), autoencoder(skip_background=True)
    torch.testing.assert_close(skipping(image(), mask), plain(image(), mask))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("frames", [4, 6])
def test_windows_without_brain_are_left_and_others_are_as_ever(shifted, frames):
    torch.manual_seed(0)
    block = WindowBlock(4, (2, 2, 2, 4), shifted)
    tokens = torch.randn(2, 4, 4, 4, frames, 4)
    brain = torch.zeros(4, 4, 4, dtype=torch.bool)
    brain[1, 1, 1] = True
    start = 1 if shifted else 0  # of the window that holds this token
    inside = torch.zeros(4, 4, 4, dtype=torch.bool)
    inside[start : start + 2, start : start + 2, start : start + 2] = True
    whole, part = block(tokens), block(tokens, brain)
    torch.testing.assert_close(part[:, inside], whole[:, inside])
    assert torch.equal(part[:, ~inside], tokens[:, ~inside])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_skipped_background_reaches_every_parameter(checkpointing):
    network = autoencoder(skip_background=True, checkpointing=checkpointing)
    network(in_a_brain(), torch.ones(1, 1, 24, 24, 24)).square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())


def test_the_scan_runs_once_per_training_step_and_twice_with_checkpointing(monkeypatch):
    runs = []
    walk = scan._walk
    monkeypatch.setattr(scan, "_walk", lambda *tensors: runs.append(1) or walk(*tensors))
    counts = []
    for checkpointing in (False, True):
        runs.clear()
        network = autoencoder(checkpointing=checkpointing)
        network(image(), torch.ones(1, 1, 24, 24, 24)).square().mean().backward()
        counts.append(len(runs))
    assert counts == [6, 12]  # blocks


def test_the_number_of_windows_at_once_changes_nothing(monkeypatch):
    network, mask = autoencoder(), torch.ones(1, 1, 24, 24, 24)
    results = []
    for budget in (1, 1 << 20):
        monkeypatch.setattr(scan, "CPU_TILE", budget)
        network.zero_grad()
        output = network(image(frames=5), mask)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in network.parameters() if p.requires_grad)])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpointing": True}, {"skip_background": True}, {"orientation": "LAS"}, {"mask_token": "window"}],
    ids=str,
)
def test_bf16_autocast_agrees_with_float32(options):
    """Values and gradients of all paths, to a few of the 8 bits that bf16 has."""
    network, clip = autoencoder(**options), image()
    mask = torch.zeros(1, 1, 24, 24, 24)
    mask[..., :8, :, :] = 1
    results = []
    for half in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = network(clip, mask)
        output.float().square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
        results.append((output.detach().float(), gradient))
    for exact, rounded, tolerance in zip(*results, (0.02, 0.1), strict=True):  # seen: 0.01 and 0.06
        assert torch.isfinite(rounded).all()
        assert torch.dist(exact, rounded) < tolerance * exact.norm()


def test_an_image_with_metadata_gives_what_a_plain_tensor_gives():
    network = MaskedAutoencoder(image_size=(48, 48, 48), frames=2, embed_dim=4, depths=(1, 1, 1, 1)).eval()
    image, mask = torch.randn(1, 1, 48, 48, 48, 2), torch.rand(1, 1, 48, 48, 48) > 0.9
    with torch.no_grad():
        expected, found = network(image, mask), network(MetaTensor(image), MetaTensor(mask))
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
