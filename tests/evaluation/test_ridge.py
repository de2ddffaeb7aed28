"""Ridge regression from labels' means, against scikit-learn's on the same numbers.

Not covered: real anatomy; configs/ridge.json runs in tests/configs/test_ridge.py.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from sklearn.linear_model import Ridge

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.evaluation.ridge import PENALTIES, RidgeFromMeans

FRAMES, CLIPS = 6, 20
CORNERS = {1: (30, 40, 40), 2: (40, 50, 40), 3: (60, 30, 50)}  # of cubes of 8 voxels each


def block(number: int) -> tuple[slice, ...]:
    return tuple(slice(corner, corner + 2) for corner in CORNERS[number])


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = np.zeros(grid.SHAPE, np.int16)
    for number in CORNERS:
        labels[block(number)] = number
    folder = tmp_path_factory.mktemp("atlas")
    nib.save(nib.Nifti1Image(labels, grid.AFFINE), folder / "three.nii.gz")
    (folder / "three.tsv").write_text("value\tname\n1\tone\n2\ttwo\n3\tthree\n")
    return folder / "three.nii.gz"


@pytest.fixture(scope="module")
def clips() -> list[dict]:
    """Label 1 follows from 2 and 3, each of its voxels in its own way, with noise; the clips' means differ widely."""
    rng = np.random.default_rng(0)
    mixing, made = rng.standard_normal((8, 2)), []
    for _ in range(CLIPS):
        courses = {2: rng.standard_normal((8, FRAMES)), 3: rng.standard_normal((8, FRAMES))}
        both = np.stack([courses[2].mean(0), courses[3].mean(0)])
        courses[1] = mixing @ both + 0.2 * rng.standard_normal((8, FRAMES))
        image = torch.zeros(1, *grid.SHAPE, FRAMES)
        for number, course in courses.items():
            offset = 50 * rng.standard_normal((8, 1))
            image[0][block(number)] = torch.from_numpy(course + offset).float().reshape(2, 2, 2, FRAMES)
        made.append({"image": MetaTensor(image, affine=torch.from_numpy(grid.AFFINE))})
    return made


def courses_of(clip: dict, number: int) -> np.ndarray:
    values = clip["image"].as_tensor()[0][block(number)].double().reshape(8, FRAMES).numpy()
    return values - values.mean(1, keepdims=True)


def hide(*numbers: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, *grid.SHAPE, dtype=torch.bool)
    for number in numbers:
        mask[0, 0][block(number)] = True
    return mask


def test_it_predicts_what_scikit_learn_does_with_the_penalty_that_is_best_on_held_out_clips(
    atlas: Path, clips: list[dict]
):
    train, new = clips[:-1], clips[-1]

    def design(chosen: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        means = [np.stack([courses_of(clip, number).mean(0) for number in (2, 3)], 1) for clip in chosen]
        return np.concatenate(means), np.concatenate([courses_of(clip, 1).T for clip in chosen])

    def fitted(chosen: list[dict], penalty: float) -> Ridge:
        x, y = design(chosen)
        return Ridge(penalty * np.trace(x.T @ x) / 2, fit_intercept=False).fit(x, y)

    kept = [clip for i, clip in enumerate(train) if i % 5 != 4]
    x, y = design([clip for i, clip in enumerate(train) if i % 5 == 4])
    best = min(PENALTIES, key=lambda penalty: ((fitted(kept, penalty).predict(x) - y) ** 2).sum())
    expected = fitted(train, best).predict(design([new])[0]).T  # (voxels, frames)

    ridge = RidgeFromMeans(train, [], atlas)
    rebuilt = ridge(new["image"].as_tensor()[None], hide(1))
    assert rebuilt.shape == (1, 1, *grid.SHAPE, FRAMES)
    found = rebuilt[0, 0][block(1)].reshape(8, FRAMES).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not rebuilt[0, 0][block(2)].any()
    truth = courses_of(new, 1)
    assert 1 - ((truth - found) ** 2).sum() / (truth**2).sum() > 0.5


def test_what_is_hidden_does_not_predict(atlas: Path, clips: list[dict]):
    ridge = RidgeFromMeans(clips[:-1], [], atlas)
    image = clips[-1]["image"].as_tensor()[None]
    other = image.clone()
    for number in (1, 2):
        other[0, 0][block(number)] = torch.randn(2, 2, 2, FRAMES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ridge(image, hide(1, 2)), ridge(other, hide(1, 2)))
    assert not torch.equal(ridge(image, hide(1)), ridge(other, hide(1)))


def test_a_part_of_a_label_and_too_few_clips_are_refused(atlas: Path, clips: list[dict]):
    ridge = RidgeFromMeans(clips[:5], [], atlas)
    mask = hide(1)
    mask[0, 0][tuple(CORNERS[1])] = False
    with pytest.raises(InputError, match="whole labels"):
        ridge(clips[0]["image"].as_tensor()[None], mask)
    with pytest.raises(InputError, match="at least 5 training clips, not 4"):
        RidgeFromMeans(clips[:4], [], atlas)
