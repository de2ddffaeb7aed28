"""Augmentation of training clips: a small movement, the scale of the signal, and noise.

There is no left-right flip: the hemispheres differ in anatomy and function, and atlas regions are of one side.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any, Self

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandAffine, Randomizable

from bundle.anatomy.grid import VOXEL_MM
from bundle.errors import InputError
from bundle.preparation.transforms import Item


class AugmentClipd(Randomizable, MapTransform):
    """Move, scale and disturb a clip, differently at each call.

    The image (T, X, Y, Z), "brain" (1, X, Y, Z) and, where there is one, "anatomy" (T, X, Y, Z), on the fixed grid, are
    moved together by one affine, as channels of one linear interpolation. Their affines follow, so that a mask that is
    drawn afterwards lies where its region has gone. Voxels count by their share of brain: no background is mixed into
    the brain's edge. Outside the moved brain the background's value stands, as before.

    Args:
        rotate: largest angle about each axis, degrees.
        translate: largest shift along each axis, mm.
        scale: largest change of size along each axis: 0.05 is up to 5 %.
        intensity: largest change of all values of a clip, by one factor: 0.1 is up to 10 %.
        noise: SD of Gaussian noise that is drawn for each voxel and frame, in units of the voxel's own SD over the
            clip, whatever the normalisation. Both channels of a clip get the same noise.
        keys: the image, one key.
        device: the image's.
        seed: of this transform's own generator; None seeds it from the system.

    Raises:
        InputError: a number below 0, or a change of size or values by 100 % or more.
    """

    def __init__(
        self,
        rotate: float = 0.0,
        translate: float = 0.0,
        scale: float = 0.0,
        intensity: float = 0.0,
        noise: float = 0.0,
        keys: KeysCollection = "image",
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        MapTransform.__init__(self, keys)
        if min(rotate, translate, scale, intensity, noise) < 0 or max(scale, intensity) >= 1:
            raise InputError(
                "augment: rotate, translate, scale, intensity and noise must be 0 or more, scale and intensity "
                f"below 1, not {rotate}, {translate}, {scale}, {intensity} and {noise}"
            )
        self.intensity = intensity
        self.noise = noise
        self.move = RandAffine(
            prob=float(max(rotate, translate, scale) > 0),
            rotate_range=[math.radians(rotate)] * 3,
            translate_range=[translate / VOXEL_MM] * 3,
            scale_range=[scale] * 3,
            mode="bilinear",
            padding_mode="zeros",
            device=torch.device(device),
        )
        self.set_random_state(seed)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """Seed all draws; the movement gets a seed of its own, so that it tells nothing of the rest."""
        super().set_random_state(seed, state)
        self.move.set_random_state(self._seed())
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> Item:
        """Return the item with its images and brain replaced."""
        item = dict(data)
        for key in self.key_iterator(item):
            channels = {name: item[name].as_tensor() for name in (key, "anatomy") if name in item}  # each (T, X, Y, Z)
            brain = item["brain"].as_tensor().bool()
            outside = int(brain.flatten().int().argmin())  # flat index of a voxel that is not brain
            fills = {name: float(image[0].flatten()[outside]) for name, image in channels.items()}
            stack = torch.cat([*(image - fills[name] for name, image in channels.items()), brain.float()])
            moved: Any = self.move(MetaTensor(stack, affine=item[key].affine))
            *parts, share = moved.as_tensor().split([len(image) for image in channels.values()] + [1])
            inside = share[0] >= 0.5
            factor = 1 + self.R.uniform(-self.intensity, self.intensity)
            generator = torch.Generator(share.device).manual_seed(self._seed())
            shape = len(channels[key]), int(inside.sum())
            noise = self.noise * torch.randn(shape, generator=generator, device=share.device)  # (T, V)
            for (name, fill), part in zip(fills.items(), parts, strict=True):
                values = factor * (part[:, inside] / share[0, inside] + fill)
                image = torch.full_like(part, fill)
                image[:, inside] = values + noise * values.std(0, correction=0)
                item[name] = MetaTensor(image, affine=moved.affine)
            item["brain"] = MetaTensor(inside[None], affine=moved.affine)
        return item

    def _seed(self) -> int:
        return int(self.R.randint(2**31))
