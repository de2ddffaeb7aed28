"""MONAI dictionary transforms that add a mask to an item: regions of an atlas, and the baselines to compare with.

Each works on the image `(T, X, Y, Z)` or `(1, X, Y, Z, T)` and adds `mask`, bool, true = hidden, on the
image's device and with its affine: `(1, X, Y, Z)` where the same voxels are hidden at every frame (a tube),
else `(1, X, Y, Z, T)`.

Put them after the augmentation. A region is looked up at the image's affine, which MONAI's affine transforms
(RandAffined, RandRotated, RandZoomd, RandFlipd, Spacingd, SpatialPadd, ...) keep up to date. Warps that no
affine describes (Rand3DElasticd, RandGridDistortiond), and Transposed, leave the affine as it was: after
these a mask would not lie on its region, so do not use them.
"""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from torch import Tensor

from bundle.anatomy.atlas import AAL3, Regions, labels_on, load_atlas, region_choices, region_labels
from bundle.errors import InputError
from bundle.masking import draws


class _AddMaskd(Randomizable, MapTransform):
    """What all masks here share: where the mask is written, and where its randomness comes from.

    Args:
        keys: the image, one key.
        mask_key: key of the mask to add.
        seed: seed of the transform's own generator.
        fixed: draw from (seed, the item's `run_id` and `start`) alone: the same clip gets the same mask
            in every epoch and in any order, as validation needs. Otherwise draws follow one another.
    """

    def __init__(self, keys: KeysCollection, mask_key: str, seed: int, fixed: bool) -> None:
        super().__init__(keys)
        if len(self.keys) != 1:
            raise InputError(f"{type(self).__name__} takes one key, the image, not {self.keys}")
        self.mask_key = mask_key
        self.seed = seed
        self.fixed = fixed
        self.set_random_state(seed)

    @abstractmethod
    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return the mask `(X, Y, Z)` or `(X, Y, Z, T)`, bool, on any device."""

    def __call__(self, data: dict) -> dict:
        """Return the item with the mask added.

        Raises:
            InputError: the image has no affine, or nothing of it would be hidden.
        """
        item = dict(data)
        image = item[self.keys[0]]
        if not isinstance(image, MetaTensor) or image.ndim not in (4, 5):
            raise InputError(
                f"{self.keys[0]!r} must be a MetaTensor (T, X, Y, Z) or (1, X, Y, Z, T), whose affine places "
                f"the mask; it is {type(image).__name__} {tuple(getattr(image, 'shape', ()))}"
            )
        rng = self._generator_of(item) if self.fixed else self.R
        mask = self.draw(item, image, rng)
        if not mask.any():
            raise InputError(
                f"{type(self).__name__} hides no voxel of {item.get('run_id', 'the image')}: "
                "the regions lie outside its field of view; check its affine, or choose other regions"
            )
        mask = mask.to(image.device, non_blocking=True)  # one drawn on the host goes without waiting for a GPU
        item[self.mask_key] = MetaTensor(mask[None], affine=image.affine)
        return item

    def frozen(self) -> Self:
        """Return a copy whose masks are fixed, for validation beside training with the same settings."""
        twin = copy.deepcopy(self)
        twin.fixed = True
        return twin

    def _generator_of(self, item: dict) -> np.random.RandomState:
        if "run_id" not in item or "start" not in item:
            raise InputError(f"{type(self).__name__} with fixed=True needs the item's run_id and start")
        key = f"{self.seed} {item['run_id']} {int(item['start'])}"
        return np.random.RandomState(list(hashlib.sha256(key.encode()).digest()))


class AAL3ROIMaskd(_AddMaskd):
    """Hide regions of AAL3, or of another atlas, at every frame; `mask` is `(1, X, Y, Z)`.

    Args:
        keys: the image, one key.
        regions: names of the atlas's groups (`"limbic"`), `"all"` of them, names (`"Hippocampus_L"`) or numbers of its
            labels, or a list of these.
        fraction: share of the region's volume, above 0 and at most 1. Whole labels are drawn at random until
            the volume is as near to it as they allow; a region of one label therefore stays whole.
        split_labels: instead, hide that share exactly: the voxels of the region that are nearest to one of
            them, drawn at random.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, `run_id` and `start`; for validation.

    Raises:
        InputError: an unknown region, or a fraction outside (0, 1].
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Regions,
        fraction: float = 1.0,
        split_labels: bool = False,
        atlas: str | Path = AAL3,
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, mask_key, seed, fixed)
        self.fraction = _share("fraction", fraction)
        self.split_labels = split_labels
        self.atlas = load_atlas(atlas)
        self.wanted = region_labels(regions, self.atlas)

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return the region, or the drawn part of it, in the image's world space."""
        labels = labels_on(self.atlas, _affine(image), image.shape[1:4])
        wanted = self.wanted
        if self.fraction < 1 and not self.split_labels:
            wanted = draws.part_of_labels(labels, wanted, self.fraction, rng)
        mask = torch.from_numpy(draws.region_mask(labels, wanted))
        if self.fraction < 1 and self.split_labels:
            mask = draws.blob(mask.to(image.device), round(self.fraction * int(mask.sum())), _affine(image), rng)
        return mask


class EqualVolumeMaskd(_AddMaskd):
    """Hide as many voxels as a region has, elsewhere: the control that tells anatomy from volume.

    A compact blob of brain voxels around a random one, at every frame; `mask` is `(1, X, Y, Z)`.

    Args:
        keys: the image, one key.
        regions: the regions whose voxels, in this image, are counted; see `AAL3ROIMaskd`.
        brain_key: the brain, `(1, X, Y, Z)` on the image's grid; augment it along with the image.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, `run_id` and `start`; for validation.

    Raises:
        InputError: an unknown region; when called, a brain that is absent, elsewhere or too small.
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: Regions,
        brain_key: str = "brain",
        atlas: str | Path = AAL3,
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, mask_key, seed, fixed)
        self.brain_key = brain_key
        self.atlas = load_atlas(atlas)
        self.wanted = region_labels(regions, self.atlas)

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return a blob in the brain, of the region's volume."""
        labels = labels_on(self.atlas, _affine(image), image.shape[1:4])
        voxels = int(draws.region_mask(labels, self.wanted).sum())
        return draws.blob(_brain(item, self.brain_key, image), voxels, _affine(image), rng)


class RandomTokenMaskd(_AddMaskd):
    """Hide random tokens: the published baselines random/random (per frame) and random/tube (all frames).

    Args:
        keys: the image, one key; its sides must be multiples of `patch`.
        ratio: share of the tokens, above 0 and at most 1.
        tube: hide the same tokens at every frame of the clip; `mask` is then `(1, X, Y, Z)`, else
            `(1, X, Y, Z, T)`.
        where: `"brain"` draws among tokens with a brain voxel; `"grid"` among all, as published, which
            spends most of the ratio on background.
        patch: voxels along each side of a token.
        brain_key: the brain, `(1, X, Y, Z)` on the image's grid; used if `where` is `"brain"`.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, `run_id` and `start`; for validation.

    Raises:
        InputError: a ratio outside (0, 1], an unknown `where`; when called, an image tokens do not fit.
    """

    block = (1, 1, 1, 1)  # tokens hidden together, along x, y, z, t

    def __init__(
        self,
        keys: KeysCollection,
        ratio: float = 0.1,
        tube: bool = False,
        where: str = "brain",
        patch: int = draws.PATCH,
        brain_key: str = "brain",
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, mask_key, seed, fixed)
        if where not in ("brain", "grid"):
            raise InputError(f"where must be 'brain' or 'grid', not {where!r}")
        self.ratio = _share("ratio", ratio)
        self.tube = tube
        self.where = where
        self.patch = patch
        self.brain_key = brain_key

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return the voxels of the drawn tokens."""
        within = None
        if self.where == "brain":
            brain = _brain(item, self.brain_key, image)
            within = draws.tokens_with(brain, self.patch).cpu().numpy()
        frames = _frames(image)
        tokens = (*draws.token_grid(tuple(image.shape[1:4]), self.patch), frames)
        block = (*self.block[:3], frames) if self.tube else self.block
        hidden = torch.from_numpy(draws.random_blocks(tokens, block, self.ratio, rng, within))
        hidden = hidden[..., 0] if self.tube else hidden
        return draws.to_voxels(hidden.to(image.device), self.patch)


class WindowMaskd(RandomTokenMaskd):
    """Hide random windows of 4 x 4 x 4 x 4 tokens: the published baseline window/random.

    With `tube`, windows of 4 x 4 x 4 tokens at every frame. Arguments as in `RandomTokenMaskd`; the ratio
    is of the windows, and `where="brain"` draws among windows with a brain voxel.
    """

    block = draws.WINDOW


class RegionAndTubesMaskd(_AddMaskd):
    """Hide one region, drawn for each clip, and random tubes on top; `mask` is `(1, X, Y, Z)`.

    Region masks alone hide 4 to 29 % of the brain, while masked autoencoders of images and video hide 75 to 90 % (He et
    al. 2022, arXiv 2111.06377; Feichtenhofer et al. 2022, arXiv 2205.09113). The region can still only be told from
    other regions; the tubes, tokens of the rest of the brain at every frame, leave fewer of these to tell it from.

    Args:
        keys: the image, one key; its sides must be multiples of `patch`.
        regions: a list, of which one entry is drawn for each clip; an entry is as for `AAL3ROIMaskd`. "all": the groups
            of the atlas.
        share: of the brain's tokens, how many are hidden with region and tubes, above 0 and at most 1. Where the region
            alone has more, there are no tubes.
        patch: voxels along each side of a token.
        brain_key: the brain, `(1, X, Y, Z)` on the image's grid; augment it along with the image.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        mask_key: key of the mask to add.
        seed: see `fixed`.
        fixed: the draw depends only on seed, `run_id` and `start`; for validation.

    Raises:
        InputError: an unknown region, or a share outside (0, 1].
    """

    def __init__(
        self,
        keys: KeysCollection,
        regions: str | Sequence[Regions],
        share: float = 0.5,
        patch: int = draws.PATCH,
        brain_key: str = "brain",
        atlas: str | Path = AAL3,
        mask_key: str = "mask",
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        super().__init__(keys, mask_key, seed, fixed)
        self.share = _share("share", share)
        self.patch = patch
        self.brain_key = brain_key
        self.atlas = load_atlas(atlas)
        self.wanted = [region_labels(region, self.atlas) for region in region_choices(regions, self.atlas)]

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return the drawn region's voxels and those of the drawn tokens."""
        labels = labels_on(self.atlas, _affine(image), image.shape[1:4])
        region = torch.from_numpy(draws.region_mask(labels, self.wanted[rng.randint(len(self.wanted))]))
        brain = draws.tokens_with(_brain(item, self.brain_key, image).cpu(), self.patch)
        rest = brain & ~draws.tokens_with(region, self.patch)
        missing = round(self.share * int(brain.sum())) - int((brain & ~rest).sum())
        tubes = torch.zeros_like(brain)
        if missing > 0:
            tubes.view(-1)[rng.choice(rest.flatten().nonzero()[:, 0].numpy(), missing, replace=False)] = True
        return region | draws.to_voxels(tubes, self.patch)


class SomeFramesMaskd(_AddMaskd):
    """Hide what another mask hides, but at some frames of the clip only; `mask` is `(1, X, Y, Z, T)`.

    A region that is hidden at all frames can only be told from other regions; at some frames, also from its own past
    and future. BOLD is smooth over a few seconds, so that single frames can be interpolated, and blocks less so.

    Args:
        mask: what is hidden, at all frames: any mask of this module that draws `(X, Y, Z)`. Its keys, seed and
            `fixed` hold for this one.
        share: of the frames, above 0 and at most 1; as near to it as whole blocks come.
        block: consecutive frames that are hidden together; 1 draws each frame by itself.

    Raises:
        InputError: a share outside (0, 1], a block below 1; when called, a block longer than the clip, or a `mask` that
            differs between frames already.
    """

    def __init__(self, mask: _AddMaskd, share: float, block: int = 1) -> None:
        super().__init__(mask.keys, mask.mask_key, mask.seed, mask.fixed)
        if block < 1:
            raise InputError(f"block must be 1 frame or more, not {block}")
        self.mask = mask
        self.share = _share("share", share)
        self.block = block

    def draw(self, item: dict, image: MetaTensor, rng: np.random.RandomState) -> Tensor:
        """Return the other mask's voxels at the drawn frames."""
        voxels = self.mask.draw(item, image, rng)
        if voxels.ndim != 3:
            raise InputError(f"{type(self.mask).__name__} hides other voxels at each frame; give a mask of all frames")
        frames = draws.some_frames(_frames(image), self.share, self.block, rng)
        return voxels[..., None] & torch.from_numpy(frames).to(voxels.device)


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise InputError(f"{name} must be above 0 and at most 1, not {value}")
    return value


def _frames(image: MetaTensor) -> int:
    """Frames of a clip `(T, X, Y, Z)` or `(1, X, Y, Z, T)`."""
    return image.shape[0] if image.ndim == 4 else image.shape[4]


def _affine(image: MetaTensor) -> np.ndarray:
    return image.affine.cpu().double().numpy()


def _brain(item: dict, key: str, image: MetaTensor) -> Tensor:
    """The item's brain as a plain bool tensor `(X, Y, Z)`, which must lie where the image lies."""
    if key not in item:
        raise InputError(f"the item has no {key!r}, the brain to draw in; add it, or draw with where='grid'")
    brain = item[key]
    if tuple(brain.shape) != (1, *image.shape[1:4]):
        raise InputError(f"{key!r} must be 1 x {tuple(image.shape[1:4])}, not {tuple(brain.shape)}")
    if isinstance(brain, MetaTensor) and not np.allclose(_affine(brain), _affine(image), rtol=0, atol=1e-4):
        raise InputError(f"{key!r} was not moved with the image; give the augmentation both keys")
    return torch.as_tensor(brain).as_subclass(Tensor)[0] > 0.5
