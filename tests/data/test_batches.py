"""From store and split file to batches."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import Dataset

from bundle.data.batches import EvenBatches, PrepareBatch, keep_items, loader
from bundle.data.clips import split_clips
from bundle.data.normalisation import Normalisation
from bundle.data.splits import _hash, make_splits, save_splits
from bundle.data.targets import read_target
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.errors import InputError
from bundle.masking.transforms import AAL3ROIMaskd, RandomTokenMaskd
from bundle.preparation.store import read_manifest, read_run, read_values, read_voxels, write_manifest, write_record


def test_sets_hold_their_own_participants_and_every_clip_once(store: Path):
    sets = json.loads((store / "splits.json").read_text())["sets"]
    starts = {}
    for name, members in sets.items():
        items = split_clips(store, store / "splits.json", name, frames=10, stride=10)
        assert {item["participant_id"] for item in items} == set(members)
        starts |= {(item["run_id"], item["start"]): name for item in items}
    assert len(starts) == 12 * 3  # 30 frames hold three clips of ten
    participants = [set(members) for members in sets.values()]
    assert not participants[0] & participants[1] | participants[0] & participants[2] | participants[1] & participants[2]


def test_labels_are_the_diagnoses_of_participants_tsv(store: Path):
    items = split_clips(store, store / "splits.json", "train", target=read_target(store))
    assert {item["participant_id"]: item["label"] for item in items} == {
        item["participant_id"]: float(int(item["participant_id"][4:]) % 2) for item in items
    }


def changed_store(store: Path, folder: Path, **changes: object) -> Path:
    """A store with the same runs' records, of which those of sub-00 are changed."""
    manifest = read_manifest(store)
    for run in manifest["runs"]:
        (folder / "runs" / run["run_id"]).mkdir(parents=True)
        write_record(folder, run | (changes if run["participant_id"] == "sub-00" else {}))
    write_manifest(folder, manifest["parameters"], manifest["parameters_hash"])
    return folder


def test_a_participant_without_a_label_is_seen_by_pretraining_alone(store: Path, tmp_path: Path, caplog):
    changed = changed_store(store, tmp_path, diagnosis=None)
    name = next(
        n for n, members in json.loads((store / "splits.json").read_text())["sets"].items() if "sub-00" in members
    )
    everybody = split_clips(changed, store / "splits.json", name)
    labelled = split_clips(changed, store / "splits.json", name, target=read_target(changed))
    assert {item["participant_id"] for item in everybody} - {item["participant_id"] for item in labelled} == {"sub-00"}
    assert "1 of 12 participants have no diagnosis" in caplog.text


@pytest.mark.parametrize("subset", ["train", "validation", "test"])
def test_a_set_of_one_class_is_refused_unless_it_is_the_test_set(store: Path, tmp_path: Path, subset: str, caplog):
    """A site left out may hold one class only; its participants still count."""
    members = sorted({run["participant_id"] for run in read_manifest(store)["runs"]})
    cases = [p for p in members if int(p[4:]) % 2]
    splits = make_splits(read_manifest(store)["runs"], folds=3)
    rest = [p for p in members if p not in cases[:3]]
    others = [name for name in ("train", "validation", "test") if name != subset]
    sets = {subset: cases[:3], others[0]: rest[:4], others[1]: rest[4:]}
    save_splits(splits | {"sets": sets, "sha256": _hash(sets)}, tmp_path / "s.json")
    if subset != "test":
        with pytest.raises(InputError, match=f"{subset} set holds only diagnosis adhd"):
            split_clips(store, tmp_path / "s.json", subset, target=read_target(store))
        return
    items = split_clips(store, tmp_path / "s.json", subset, target=read_target(store))
    assert {(item["participant_id"], item["label"]) for item in items} == {(p, 1.0) for p in cases[:3]}
    assert "holds only diagnosis adhd" in caplog.text


@pytest.mark.parametrize("subset", ["train", "test"])
def test_shuffled_labels_are_those_of_the_set_given_to_other_participants(store: Path, subset: str, caplog):
    def labels(seed: int | None) -> dict:
        items = split_clips(
            store, store / "splits.json", subset, frames=10, target=read_target(store), label_shuffle_seed=seed
        )
        found = {(item["participant_id"], item["label"]) for item in items}
        assert len(found) == len({participant for participant, _ in found})  # all clips of a participant agree
        return dict(sorted(found))

    true = labels(None)
    sites = {run["participant_id"]: run["site"] for run in read_manifest(store)["runs"]}
    shuffled = [labels(seed) for seed in range(8)]
    assert all(sorted(own.values()) == sorted(true.values()) for own in shuffled)
    assert all(list(own) == list(true) for own in shuffled)
    for site in set(sites.values()):
        cases = [sum(own[name] for name in own if sites[name] == site) for own in (true, *shuffled)]
        assert len(set(cases)) == 1
    assert len({tuple(own.values()) for own in shuffled}) > 1
    assert labels(3) == shuffled[3]
    assert "SHUFFLED" in caplog.text


def test_a_split_file_of_other_participants_is_refused(store: Path, tmp_path: Path):
    runs = [run for run in read_manifest(store)["runs"] if run["participant_id"] != "sub-03"]
    save_splits(make_splits(runs, folds=3), tmp_path / "s.json")
    with pytest.raises(InputError, match="sub-03 of the store is in no set"):
        split_clips(store, tmp_path / "s.json", "train")


RUN = Normalisation("run", sd_floor=0.1, clip=5.0)


def batch_of(store: Path, *masks: object, count: int = 2) -> tuple:
    items = split_clips(store, store / "splits.json", "train", frames=4, target=read_target(store))[:count]
    read = ReadClipd(store, frames=4)
    prepare = PrepareBatch([ScatterClipd(RUN), *masks, TimeLastd()])
    return items, prepare(keep_items([read(item) for item in items]))


def test_a_batch_holds_the_stored_frames_at_their_voxels(store: Path):
    items, (image, target, arguments, _) = batch_of(store)
    assert image.shape == (2, 1, 96, 96, 96, 4)
    assert type(image) is torch.Tensor
    assert arguments == ()
    assert target["participant_id"] == [item["participant_id"] for item in items]
    assert target["label"].tolist() == [[item["label"]] for item in items]
    for i, item in enumerate(items):
        values, record = read_values(store, item["run_id"], item["start"], 4), read_run(store, item["run_id"])
        frames, voxels = (values - record["mean"]) / record["sd"], read_voxels(store, item["run_id"])
        dense = image[i, 0].reshape(-1, 4).numpy()  # (X Y Z, T)
        np.testing.assert_allclose(dense[voxels], frames.T, atol=1e-5)
        assert len(np.unique(np.delete(dense, voxels, axis=0))) == 1


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (AAL3ROIMaskd("image", ["limbic"]), (2, 1, 96, 96, 96)),
        (RandomTokenMaskd("image", where="grid"), (2, 1, 96, 96, 96, 4)),
    ],
)
def test_the_mask_is_target_and_second_network_input(store: Path, mask: object, shape: tuple):
    _, (_, target, (argument,), _) = batch_of(store, mask)
    assert target["mask"] is argument
    assert argument.dtype == torch.bool
    assert argument.shape == shape


@settings(max_examples=60)
@given(items=st.integers(1, 60), size=st.integers(1, 30), world=st.integers(1, 4), epoch=st.integers(0, 5))
def test_processes_share_the_batches_of_one_and_every_item_comes_once(items: int, size: int, world: int, epoch: int):
    alone = EvenBatches(items, size, seed=3)
    alone.begin(epoch, 0)
    batches = list(alone)
    assert sorted(place.number for batch in batches for place in batch) == list(range(items))
    assert len(batches) == len(alone) == math.ceil(items / size)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    if min(sizes) < world:
        with pytest.raises(InputError, match="without a clip"):
            EvenBatches(items, size, seed=3, rank=0, world=world)
        return
    shares = []
    for rank in range(world):
        share = EvenBatches(items, size, seed=3, rank=rank, world=world)
        share.begin(epoch, 0)
        shares.append(list(share))
    for number, batch in enumerate(batches):
        assert sorted(place for share in shares for place in share[number]) == sorted(batch)
        assert all(share[number] for share in shares)


def test_an_epoch_goes_on_from_any_batch_and_differs_from_others():
    def given(seed: int, epoch: int, first: int = 0) -> list:
        batches = EvenBatches(20, 6, seed)
        batches.begin(epoch, first)
        return list(batches)

    assert [given(1, 2, first) for first in range(5)] == [given(1, 2)[first:] for first in range(5)]
    orders = [[place.number for batch in given(*which) for place in batch] for which in ((1, 1), (1, 2), (2, 1))]
    assert len({tuple(order) for order in orders}) == 3
    draws = [place.draw for which in ((1, 1), (1, 2), (2, 1)) for batch in given(*which) for place in batch]
    assert len(set(draws)) == 60  # each item of each epoch of each seed draws anew


def drawn(store: Path, first: int, **options: int) -> dict[tuple, tuple[int, bytes]]:
    """Start and mask of each clip of epoch 2 of a training, from some batch on."""
    items = split_clips(store, store / "splits.json", "train", frames=4)
    feed = loader(Dataset(items, ReadClipd(store, frames=4, random=True)), 3, shuffle=True, seed=5, **options)
    feed.batch_sampler.begin(2, first)
    prepare = PrepareBatch([ScatterClipd(RUN), RandomTokenMaskd("image", tube=True), TimeLastd()])
    found = {}
    for batch in feed:
        _, target, *_ = prepare(batch)
        for item, mask in zip(batch, target["mask"], strict=True):
            found[item["run_id"], item["draw"]] = item["start"], mask.numpy().tobytes()
    return found


def test_starts_and_masks_depend_on_seed_epoch_and_clip_alone(store: Path):
    """Not on who reads, and not on what was drawn before."""
    whole = drawn(store, 0)
    assert len({start for start, _ in whole.values()}) > 2
    assert len({mask for _, mask in whole.values()}) == len(whole) == 8
    assert drawn(store, 0, num_workers=2) == whole
    rest = drawn(store, 2)
    assert rest.items() <= whole.items()
    assert len(rest) == 2


def test_features_that_are_remembered_leave_torch_s_generator_alone(store: Path):
    """Else a head's dropout would depend on whether they were, as they are not after a training was resumed."""
    item = split_clips(store, store / "splits.json", "train", frames=4)[0] | {"draw": 7}
    prepare = PrepareBatch(
        [ReadClipd(store, frames=4), ScatterClipd(RUN), TimeLastd()], lambda image: image.mean((2, 3, 4))
    )
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        prepare([item])
        seen.append(float(torch.rand(())))
    assert seen[0] == seen[1]


def test_a_whole_run_is_the_features_of_its_clips_in_order(store: Path):
    settings = {"frames": 10, "stride": 10, "target": read_target(store)}
    clips = split_clips(store, store / "splits.json", "train", **settings)
    runs = split_clips(store, store / "splits.json", "train", **settings, whole_runs=True)
    assert [(run["run_id"], start) for run in runs for start in run["starts"]] == [
        (clip["run_id"], clip["start"]) for clip in clips
    ]
    transforms = [ReadClipd(store, frames=10), ScatterClipd(RUN), TimeLastd()]
    seen = []

    def encode(image):
        seen.append(image)
        return image.mean((1, 2, 3, 4))  # (1, T)

    prepare = PrepareBatch(transforms, encode)
    features, target, (counts,), _ = prepare(runs[:2])
    expected, *_ = PrepareBatch(transforms, encode)(clips[:6])
    assert counts == [3, 3]
    assert torch.equal(features, expected)
    assert target["label"].shape == (2, 1)
    assert target["participant_id"] == [run["participant_id"] for run in runs[:2]]
    prepare(runs[1:2])
    assert len(seen) == 12  # nothing twice by one
    unlabelled, target, *_ = prepare([{key: value for key, value in runs[0].items() if key != "label"}])
    assert torch.equal(unlabelled, features[:3])
    assert "label" not in target
    forgetful = PrepareBatch(transforms, encode, remember=False)
    assert torch.equal(forgetful(runs[:1])[0], forgetful(runs[:1])[0])
    assert len(seen) == 18
    with pytest.raises(InputError, match="whole runs need a frozen encoder"):
        PrepareBatch(transforms)(runs[:1])


def test_a_frozen_encoder_sees_every_clip_once_and_it_is_read_once(store: Path):
    items = split_clips(store, store / "splits.json", "train", frames=4, target=read_target(store))[:3]
    read = ReadClipd(store, frames=4)
    reads = []

    def reading(item: dict) -> dict:
        reads.append(item["run_id"])
        return read(item)

    batch = keep_items(items)
    seen = []

    def encode(image: torch.Tensor) -> torch.Tensor:
        seen.append(image.shape)
        return image.mean(dim=(2, 3, 4, 5)).expand(-1, 5)

    prepare = PrepareBatch([reading, ScatterClipd(RUN), TimeLastd()], encode)
    features, target, arguments, _ = prepare(batch)
    again, swapped, *_ = prepare([batch[2], batch[0]])
    assert seen == [(1, 1, 96, 96, 96, 4)] * 3
    assert reads == [item["run_id"] for item in items]
    images, expected, *_ = PrepareBatch([ScatterClipd(RUN), TimeLastd()])(keep_items([read(item) for item in items]))
    torch.testing.assert_close(features, images.mean(dim=(2, 3, 4, 5)).expand(-1, 5))
    assert torch.equal(again, features[[2, 0]])
    assert torch.equal(target["label"], expected["label"])
    assert target["participant_id"] == expected["participant_id"]
    assert swapped["participant_id"] == [items[2]["participant_id"], items[0]["participant_id"]]
    assert arguments == ()


def test_two_channels_are_stacked_and_the_last_one_is_the_target_and_takes_the_mask(store: Path):
    items = split_clips(store, store / "splits.json", "train", frames=4, target=read_target(store))[:2]
    read = ReadClipd(store, frames=4)
    made = {}
    for mode in ("run", "voxel", "both"):
        scatter = ScatterClipd(Normalisation(mode, sd_floor=0.1, clip=5.0))
        prepare = PrepareBatch([scatter, AAL3ROIMaskd("image", ["limbic"]), TimeLastd()])
        made[mode] = prepare(keep_items([read(item) for item in items]))
    image, target, (mask,), _ = made["both"]
    assert image.shape == (2, 2, 96, 96, 96, 4)
    assert torch.equal(image[:, :1], made["run"][0])
    assert torch.equal(image[:, 1:], made["voxel"][0])
    assert torch.equal(target["image"], made["voxel"][0])
    assert torch.equal(mask, made["run"][2][0])
