"""Pooling of tokens over labels, against a brute force over voxels and a token grid by hand."""

import numpy as np
import pytest
import torch

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, labels_on, load_atlas
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.errors import InputError
from bundle.heads.pooling import label_members, pool, token_shares


@pytest.mark.parametrize("edge", [6, 12, 24])
def test_a_label_is_the_mean_over_its_voxels_of_the_tokens_that_they_lie_in(edge: int):
    size = grid.SHAPE[0] // edge
    tokens = torch.randn(2, size, size, size, 3, 5)
    found = pool(tokens, token_shares(AAL3, edge, grid.SHAPE))
    voxels = tokens.numpy().repeat(edge, 1).repeat(edge, 2).repeat(edge, 3)  # (2, X, Y, Z, 3, 5)
    atlas = load_atlas()
    index = parcel_index(atlas, parcels_of(atlas, "label"))
    present = np.unique(index[index > 0])
    assert found.shape == (2, 3, len(present), 5)
    for position, number in list(enumerate(present))[::20]:
        expected = voxels[:, index == number].mean(1, dtype=np.float64)  # (2, 3, 5)
        np.testing.assert_allclose(found[:, :, position].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_shares_of_merged_tokens_are_sums_over_their_eight():
    fine, coarse = (token_shares(AAL3, edge, grid.SHAPE) for edge in (6, 12))
    merged = fine.view(-1, 8, 2, 8, 2, 8, 2).sum((2, 4, 6)).flatten(1)
    torch.testing.assert_close(merged, coarse)
    torch.testing.assert_close(fine.sum(1), torch.ones(len(fine)))


def test_members_of_a_group_are_the_rows_of_its_labels():
    atlas = load_atlas()
    shares = token_shares(AAL3, 6, grid.SHAPE)
    present = np.unique(labels_on(atlas, grid.AFFINE, grid.SHAPE))[1:]
    assert len(present) == len(shares)
    for numbers, rows in zip(parcels_of(atlas, "group").values(), label_members(AAL3, "group"), strict=True):
        assert present[rows].tolist() == [number for number in numbers if number in present]
    assert label_members(AAL3, "label") == [[row] for row in range(len(shares))]


def test_unknown_levels_and_other_grids_are_refused():
    with pytest.raises(InputError, match="level must be"):
        label_members(AAL3, "lobe")
    with pytest.raises(InputError, match="fill the grid"):
        token_shares(AAL3, 6, (24, 24, 24))
