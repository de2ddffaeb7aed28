"""Pure mask functions, against brute force and by their properties."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.errors import InputError
from bundle.masking.draws import (
    blob,
    part_of_labels,
    random_blocks,
    region_mask,
    some_frames,
    to_voxels,
    token_grid,
    tokens_with,
)

OBLIQUE = np.array([[2.0, 0.4, 0, 5], [-0.4, 3, 0.1, 6], [0, 0.2, 2.5, 7], [0, 0, 0, 1]])
seeds = st.integers(0, 2**32 - 1)


def rng(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def sphere(shape=(9, 8, 7), radius=3.4) -> torch.Tensor:
    centre = (np.array(shape) - 1) / 2
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    return torch.from_numpy(distance <= radius)


def test_region_mask():
    labels = np.array([[[0, 1], [2, 41]], [[41, 3], [17, 0]]])
    assert np.argwhere(region_mask(labels, (17, 41))).tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0]]


@settings(deadline=None)
@given(seeds, st.lists(st.integers(1, 60), min_size=1, max_size=9), st.floats(0.01, 1))
def test_part_of_labels_is_within_half_a_label_of_the_volume(seed, sizes, fraction):
    labels = np.repeat(np.arange(len(sizes) + 1), [5, *sizes]).reshape(-1, 1, 1)
    wanted = tuple(range(1, len(sizes) + 1))
    chosen = part_of_labels(labels, wanted, fraction, rng(seed))
    assert set(chosen) <= set(wanted)
    target, volume = fraction * sum(sizes), sum(sizes[label - 1] for label in chosen)
    # Adding labels one by one steps over the target, so the nearest stop is within half a step of it.
    assert abs(volume - target) <= max(sizes) / 2 + 1e-9 or len(chosen) == 1


def test_part_of_labels_depends_on_the_draw_and_never_splits():
    labels = np.repeat(np.arange(1, 11), 10).reshape(-1, 1, 1)  # ten labels of ten voxels
    draws = {part_of_labels(labels, range(1, 11), 0.5, rng(seed)) for seed in range(20)}
    assert {len(draw) for draw in draws} == {5}
    assert len(draws) > 10
    assert part_of_labels(labels, range(1, 11), 1.0, rng()) == tuple(range(1, 11))
    assert part_of_labels(labels, [3], 0.5, rng()) == (3,)
    assert part_of_labels(labels, [99], 0.5, rng()) == ()


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 100))
def test_blob_is_exactly_n_candidates_none_nearer_to_its_centre_left_out(seed, voxels):
    candidates = sphere()
    chosen = blob(candidates, voxels, OBLIQUE, rng(seed))
    assert int(chosen.sum()) == voxels
    assert not (chosen & ~candidates).any()
    centre = np.argwhere(candidates.numpy())[rng(seed).randint(int(candidates.sum()))]
    distance = np.linalg.norm((np.argwhere(candidates.numpy()) - centre) @ OBLIQUE[:3, :3].T, axis=1)
    inside = chosen.numpy()[candidates.numpy()]
    assert inside[distance == 0].all()
    assert distance[inside].max() <= distance[~inside].min(initial=np.inf) + 1e-6


def test_blob_of_everything_and_of_nothing():
    candidates = sphere()
    assert torch.equal(blob(candidates, int(candidates.sum()), OBLIQUE, rng()), candidates)
    assert not blob(candidates, 0, OBLIQUE, rng()).any()


def test_blob_distance_is_in_mm_not_in_voxels():
    plate = blob(torch.ones(9, 9, 9, dtype=torch.bool), 9, np.diag([10.0, 10.0, 1.0, 1.0]), rng())
    assert len({tuple(voxel[:2]) for voxel in plate.nonzero().tolist()}) == 1  # a column along the short axis


def test_blob_larger_than_its_candidates_is_refused():
    candidates = sphere()
    with pytest.raises(InputError, match="does not fit"):
        blob(candidates, int(candidates.sum()) + 1, OBLIQUE, rng())


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from([(1, 1, 1, 1), (1, 1, 1, 8), (2, 2, 2, 4), (4, 4, 4, 4)]), st.floats(0.05, 1))
def test_random_blocks_hide_whole_blocks_and_the_exact_number(seed, block, ratio):
    tokens = (8, 4, 4, 8)
    number = int(np.prod(tokens) / np.prod(block))
    if round(ratio * number) == 0:
        return
    hidden = random_blocks(tokens, block, ratio, rng(seed))
    per_block = [
        hidden[tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, block, strict=True))]
        for place in itertools.product(*(range(n // b) for n, b in zip(tokens, block, strict=True)))
    ]
    assert len(per_block) == number
    assert all(part.all() or not part.any() for part in per_block)
    assert sum(part.all() for part in per_block) == round(ratio * number)


def test_full_size_ratios():
    tokens = (16, 16, 16, 20)
    assert random_blocks(tokens, (1, 1, 1, 1), 0.1, rng()).sum() == 8192
    assert random_blocks(tokens, (4, 4, 4, 4), 0.1, rng()).sum() == 32 * 256
    tube = random_blocks(tokens, (1, 1, 1, 20), 0.1, rng())
    assert tube.sum() == 410 * 20
    assert set(tube.sum(-1).ravel()) == {0, 20}


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([(1, 1, 1, 1), (1, 1, 1, 4), (2, 2, 2, 2)]))
def test_blocks_are_drawn_within(seed, block):
    within = sphere((8, 6, 6), 2.5).numpy()
    hidden = random_blocks((8, 6, 6, 4), block, 0.3, rng(seed), within)
    blocks_hit = 0
    for place in itertools.product(*(range(0, n, b) for n, b in zip((8, 6, 6), block[:3], strict=True))):
        here = tuple(slice(p, p + b) for p, b in zip(place, block[:3], strict=True))
        blocks_hit += bool(within[here].any())
        assert within[here].any() or not hidden[here].any()
    assert hidden.sum() == round(0.3 * blocks_hit * (4 // block[3])) * np.prod(block)


def test_every_block_is_drawn_equally_often():
    total = sum(random_blocks((2, 2, 2, 4), (1, 1, 1, 1), 0.25, rng(seed)) for seed in range(2000)) / 2000
    assert np.abs(total - 0.25).max() < 0.05  # five standard deviations


@pytest.mark.parametrize(
    ("tokens", "block", "ratio", "message"),
    [
        ((16, 16, 16, 10), (4, 4, 4, 4), 0.1, "do not divide"),
        ((3, 4, 4, 4), (4, 4, 4, 4), 0.1, "do not divide"),
        ((4, 4, 4, 4), (4, 4, 4, 4), 0.1, "hides none"),
    ],
)
def test_blocks_that_cannot_be_are_refused(tokens, block, ratio, message):
    with pytest.raises(InputError, match=message):
        random_blocks(tokens, block, ratio, rng())


@pytest.mark.parametrize(("frames", "share", "block", "count"), [(8, 0.5, 1, 4), (8, 0.75, 2, 3), (7, 0.5, 3, 1)])
def test_every_placement_of_blocks_of_frames_is_drawn_equally_often(frames, share, block, count):
    """Against a list of all ways to place the blocks without overlap; those with the same frames count together."""
    placements = [
        starts
        for starts in itertools.combinations(range(frames - block + 1), count)
        if all(later - earlier >= block for earlier, later in itertools.pairwise(starts))
    ]
    drawn = [some_frames(frames, share, block, rng(seed)) for seed in range(200 * len(placements))]
    found = Counter(tuple(np.flatnonzero(hidden)) for hidden in drawn)
    expected = Counter(tuple(start + step for start in starts for step in range(block)) for starts in placements)
    assert found.keys() == expected.keys()
    spread = [found[frames] / (200 * times) - 1 for frames, times in expected.items()]
    assert np.abs(spread).max() < 0.35  # five standard deviations of a Poisson count of 200


@pytest.mark.parametrize(("frames", "share", "block"), [(4, 1.0, 5), (20, 0.02, 1), (20, 0.1, 5)])
def test_no_frames_at_all_are_refused(frames, share, block):
    with pytest.raises(InputError, match=f"holds no block of {block} frames"):
        some_frames(frames, share, block, rng())


def test_a_share_of_one_is_all_frames():
    assert some_frames(20, 1.0, 1, rng()).all()
    assert some_frames(20, 1.0, 5, rng()).all()
    assert some_frames(20, 1.0, 6, rng()).sum() == 18


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_tokens_and_voxels_by_brute_force(seed):
    voxels = torch.from_numpy(rng(seed).rand(6, 8, 4) > 0.93)
    tokens = tokens_with(voxels, patch=2)
    spread = to_voxels(tokens, patch=2)
    for x, y, z in itertools.product(range(6), range(8), range(4)):
        i, j, k = x // 2, y // 2, z // 2
        assert spread[x, y, z] == tokens[i, j, k]
        assert tokens[i, j, k] == voxels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].any()
    assert torch.equal(tokens_with(spread, patch=2), tokens)


def test_to_voxels_keeps_time():
    tokens = torch.from_numpy(rng(0).rand(2, 3, 1, 5) > 0.5)
    voxels = to_voxels(tokens)
    assert voxels.shape == (12, 18, 6, 5)
    assert all(torch.equal(voxels[..., t], to_voxels(tokens[..., t])) for t in range(5))


def test_image_that_tokens_do_not_fit_is_refused():
    assert token_grid((96, 96, 96)) == (16, 16, 16)
    with pytest.raises(InputError, match="cannot be cut"):
        token_grid((96, 96, 91))
