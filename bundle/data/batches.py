"""From a prepared store and a split file to batches on the device."""

import gc
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import Dataset, DistributedSampler, MetaTensor
from monai.data.utils import set_rnd
from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from bundle.data.clips import clips_of
from bundle.errors import InputError

logger = logging.getLogger(__name__)

Batch: TypeAlias = tuple[Tensor, dict, tuple, dict]  # network input, target, further arguments and keywords

WORKER_GRACE_S = 30
"""How long a worker reads on after SIGTERM, which Slurm sends to every process of a job at once."""


def keep_items(items: list[dict]) -> list[dict]:
    """Collate nothing: runs differ in their number of brain voxels, so items are stacked on the device.

    Arrays become tensors, which the loader passes through shared memory and can pin for the way to the GPU.
    """
    return [
        {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in item.items()}
        for item in items
    ]


def loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    parts: int = 1,
) -> DataLoader:
    """Loader of a dataset's items, uncollated; of several processes each gets its share.

    Args:
        dataset: of clips.
        batch_size: at most so many items in a batch of all processes together.
        shuffle: for training: batches as `EvenBatches` makes them, items as `DrawnItems` draws them. Else every item
            comes once, in order.
        num_workers: processes that read; no result depends on their number.
        pin_memory: for the way to a GPU.
        seed: of the order and of the items' draws.
        parts: a process computes its share of a training batch in so many parts; without `shuffle` the batches of a
            process are as large as one of these.
    """
    common: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": keep_items,
        "worker_init_fn": _begin_reading,
    }
    world = idist.get_world_size()
    if shuffle:
        batches = EvenBatches(len(dataset), batch_size, seed, idist.get_rank(), world)
        return DataLoader(DrawnItems(dataset), batch_sampler=batches, **common)
    sampler = DistributedSampler(dataset, even_divisible=False, shuffle=False) if world > 1 else None
    return DataLoader(dataset, batch_size=math.ceil(batch_size / (world * parts)), sampler=sampler, **common)


class Place(NamedTuple):
    """Which item of a dataset (`number`), and the seed of all that is drawn for it in one epoch (`draw`)."""

    number: int
    draw: int


class EvenBatches(Sampler[list[Place]]):
    """Batches of an epoch, of which one process gets its share, from any batch on.

    Order and seeds are functions of (seed, epoch, item) alone, never of what was drawn before. So a training that is
    resumed in the middle of an epoch goes on with the batches that are left, without reading the others, and several
    processes share the very batches that one would have. The batches of an epoch differ by one item at most: there is
    no small last one, which would leave processes without an item.

    Args:
        items: how many there are.
        batch_size: at most so many are in a batch.
        seed: of the training.
        rank: which process this is.
        world: how many processes share each batch.

    Raises:
        InputError: some batch has fewer items than there are processes.
    """

    def __init__(self, items: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.items = items
        self.count = math.ceil(items / batch_size)
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = self.first = 0
        if items and items // self.count < world:
            raise InputError(
                f"{items} clips in batches of at most {batch_size} leave some of {world} processes without a clip; "
                "raise batch_size, or start fewer processes"
            )

    def begin(self, epoch: int, first: int) -> None:
        """Give, from now on, the batches of an epoch from number `first` (0, ...) on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.count

    def __iter__(self) -> Iterator[list[Place]]:
        """This process's share of each batch that is left."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.items)
        for batch in np.array_split(order, self.count)[self.first :]:
            share = batch[self.rank :: self.world].tolist()
            yield [Place(number, seed_of(self.seed, self.epoch, number)) for number in share]


class DrawnItems(torch.utils.data.Dataset):
    """Items of a dataset whose random transforms are seeded for each `Place`; the seed stays in the item as `draw`.

    This is how everything random in training becomes a function of (seed, epoch, item): the transforms of the dataset
    here, in whatever process reads, and those of `PrepareBatch` there. Any `monai.transforms.Randomizable` takes part,
    alone or in a `Compose`; it draws from its own generator `R`, or from torch's global one.

    Args:
        dataset: with its `transform`.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.dataset)

    def __getitem__(self, place: Place) -> dict[str, Any]:
        """Draw an item."""
        reseed(self.dataset.transform, place.draw)
        return {**self.dataset[place.number], "draw": place.draw}


def seed_of(*place: int) -> int:
    """A seed (32 bits) for a place in training, such as (seed, epoch, item); numbers of 0 or more."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def reseed(transform: object, seed: int) -> None:
    """Seed torch's global generator, and those of a transform or of all transforms of a `Compose`."""
    torch.manual_seed(seed)
    set_rnd(transform, seed)


def _begin_reading(_worker: int) -> None:
    """Leave the trainer's objects alone, and read on for a while after SIGTERM, which the trainer gets too.

    So it can end its iteration. The garbage collector would write to each of its objects, and so copy its memory.
    """
    gc.freeze()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))


class PrepareBatch:
    """Trainer's `prepare_batch`: run transforms on every item on the device, then stack.

    Before an item of a training (`DrawnItems`) the random ones among them are seeded from its `draw`.

    The loader's workers read half-precision brain voxels only; dense frames, augmentation and masks are made
    here, on the device. The network receives the mask as its second input where there is one.

    Args:
        transforms: applied to each item in order; they must leave `image` `(channels, X, Y, Z, T)`, of
            which the last channel is the target.
        encode: a frozen map from images `(1, channels, X, Y, Z, T)` to features `(1, c)`, in the precision in which the
            model is served. The network then receives features instead of images. Every clip is encoded once, and
            remembered by its run and start; where the first transform is the one that reads it, not the loader's, it
            is read once too. Of items that are whole runs the features of all clips are stacked, one run after another,
            and the network receives the number of clips of each run as its second input.
        remember: False forgets features after their batch, where every clip comes once.

    Raises:
        InputError: (when called) whole runs, but no `encode`.
    """

    def __init__(
        self,
        transforms: Sequence[Callable],
        encode: Callable[[Tensor], Tensor] | None = None,
        remember: bool = True,
    ) -> None:
        self.transform = Compose(transforms)
        self.encode = encode
        self.remember = remember
        self._features: dict[tuple[str, int], Tensor] = {}

    def __call__(
        self,
        items: list[dict],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **_: object,
    ) -> Batch:
        """Return `(image, target, network arguments, {})` of a batch, as MONAI's engines expect."""
        if self.encode is not None:
            return self._encoded(items, device, non_blocking)
        if "starts" in items[0]:
            raise InputError("whole runs need a frozen encoder; set freeze_encoder true or whole_runs false")
        return self._images(items, device, non_blocking)

    def _encoded(self, items: list[dict], device: torch.device | str | None, non_blocking: bool) -> Batch:
        """Features and labels; one clip at a time, so that a clip's features do not depend on its batch."""
        assert self.encode is not None
        clips = [clip for item in items for clip in clips_of(item)]
        for clip in clips:
            clip.pop("draw", None)  # nothing here is random, also not whether features are remembered
            key = clip["run_id"], clip["start"]
            if key not in self._features:
                image, *_ = self._images([clip], device, non_blocking)
                with torch.no_grad():
                    self._features[key] = self.encode(image)[0]
        features = torch.stack([self._features[clip["run_id"], clip["start"]] for clip in clips])
        if not self.remember:
            self._features.clear()
        target: dict = {"participant_id": [item["participant_id"] for item in items]}
        if "label" in items[0]:
            target["label"] = torch.tensor([[item["label"]] for item in items], device=features.device)
        counts = ([len(item["starts"]) for item in items],) if "starts" in items[0] else ()
        return features, target, counts, {}

    def _images(self, items: list[dict], device: torch.device | str | None, non_blocking: bool) -> Batch:
        items = [self._image(item, device, non_blocking) for item in items]
        image = torch.stack([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items])
        target: dict = {"image": image[:, -1:], "participant_id": [item["participant_id"] for item in items]}
        if "label" in items[0]:
            target["label"] = torch.tensor([[item["label"]] for item in items], device=image.device)
        if "mask" not in items[0]:
            return image, target, (), {}
        target["mask"] = torch.stack([torch.as_tensor(item["mask"]).as_subclass(Tensor) for item in items])
        if isinstance(items[0]["mask"], MetaTensor):  # where the clips lie, if augmentation has moved them
            target["affine"] = torch.stack([torch.as_tensor(item["mask"].affine).as_subclass(Tensor) for item in items])
        return image, target, (target["mask"],), {}

    def _image(self, item: dict, device: torch.device | str | None, non_blocking: bool) -> dict:
        if "draw" in item:
            reseed(self.transform, seed_of(item["draw"], 1))  # other numbers than the loader's transforms drew
        return self.transform(
            {
                key: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
                for key, value in item.items()
            }
        )
