"""Attribution and reconstruction per region, against closed forms: a network that uses two regions and nothing else."""

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import load_atlas
from bundle.anatomy.parcels import label_map, parcel_index, parcels_of
from bundle.errors import InputError
from bundle.evaluation.attribution import ablation, cohort_mean, gradients, summarise, temporal_mean, within_folds
from bundle.evaluation.maps import draw
from bundle.evaluation.reconstruction import differences as reconstruction_differences
from bundle.evaluation.reconstruction import label_sums
from bundle.evaluation.reconstruction import summarise as summarise_reconstruction
from bundle.files import WriteError

ATLAS = load_atlas()
GROUPS = parcels_of(ATLAS, "group")
VOXELS = parcel_index(ATLAS, GROUPS)
FRAMES = 3


class Coupling(nn.Module):
    """Covariance over time of the mean signals of limbic and cerebellum: what the synthetic cohort plants."""

    def __init__(self) -> None:
        super().__init__()
        names = list(GROUPS)
        self.masks = [torch.from_numpy(names.index(name) + 1 == VOXELS) for name in ("limbic", "cerebellum")]

    def forward(self, image):
        first, second = (image[:, 0][:, mask].mean(1) for mask in self.masks)  # (B, T)
        first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
        return (first * second).sum(1)


def clip(seed: int) -> torch.Tensor:
    """A clip whose regions each follow a signal of their own, around a static anatomy."""
    rng = np.random.default_rng(seed)
    signals = np.vstack([np.zeros(FRAMES), rng.normal(size=(len(GROUPS), FRAMES))])
    anatomy = rng.normal(size=(*grid.SHAPE, 1))
    return torch.from_numpy(anatomy + signals[VOXELS]).float()[None, None]


def test_only_the_regions_that_the_network_uses_are_found():
    image = clip(0)
    network = Coupling()
    value = float(network(image))
    names = list(GROUPS)
    used = [names.index(name) for name in ("limbic", "cerebellum")]
    # without either region's signal the coupling is 0: each is worth all of it
    expected = np.zeros(len(names))
    expected[used] = value
    without = temporal_mean(image)
    assert ablation(network, image, without, VOXELS, len(GROUPS)) == pytest.approx(expected, abs=1e-5)
    # both signals grow in proportion along the path, so the completeness of a product gives each one half
    (found,) = gradients(network, image, without, [VOXELS], [len(GROUPS)], steps=16)
    assert found == pytest.approx(expected / 2, abs=1e-2 * abs(value) + 1e-5)


def test_clips_of_a_run_are_ablated_together():
    clips = [clip(seed) for seed in range(2)]
    network = Coupling()
    run = torch.cat(clips, dim=1)  # (1, 2, X, Y, Z, T)

    def total(image):
        return sum(network(image[:, position, None]) for position in range(image.shape[1]))

    without = temporal_mean(run)
    alone = [ablation(network, image, temporal_mean(image), VOXELS, len(GROUPS)) for image in clips]
    assert ablation(total, run, without, VOXELS, len(GROUPS)) == pytest.approx(sum(alone), abs=1e-5)
    alone = [gradients(network, image, temporal_mean(image), [VOXELS], [len(GROUPS)], steps=2)[0] for image in clips]
    (found,) = gradients(total, run, without, [VOXELS], [len(GROUPS)], steps=2)
    assert found == pytest.approx(sum(alone), abs=1e-5)


class Brightness(nn.Module):
    """Mean over the limbic voxels and frames, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.from_numpy(list(GROUPS).index("limbic") + 1 == VOXELS)

    def forward(self, image):
        return 2 * image[:, 0][:, self.mask].mean((1, 2))


def test_a_static_effect_is_seen_against_the_average_clip_only():
    images, network = [clip(seed) for seed in range(3)], Brightness()
    mean = cohort_mean(images)
    np.testing.assert_allclose(mean.numpy(), np.mean([i.numpy() for i in images], axis=(0, -1))[..., None], atol=1e-6)
    image, common = images[0], mean.expand_as(images[0])
    difference = float(network(image) - network(common))
    expected = np.where(np.array(list(GROUPS)) == "limbic", difference, 0)
    assert abs(difference) > 1e-3
    assert ablation(network, image, common, VOXELS, len(GROUPS)) == pytest.approx(expected, abs=1e-5)
    (found,) = gradients(network, image, common, [VOXELS], [len(GROUPS)], steps=4)
    assert found == pytest.approx(expected, abs=1e-5)
    assert ablation(network, image, temporal_mean(image), VOXELS, len(GROUPS)) == pytest.approx(0, abs=1e-5)


SIZES = {"limbic": 2000, "frontal": 500}


def subjects(effect: float, count: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        for name in ("limbic", "frontal"):
            value = rng.normal() + effect * (number % 2) * (name == "limbic")
            rows.append([f"s{number}", number % 2, "ablation", "group", name, SIZES[name], value])
    return pd.DataFrame(rows, columns=["participant_id", "label", "method", "level", "name", "voxels", "value"])


def test_separation_is_the_difference_of_group_means_and_nothing_for_a_network_that_knows_nothing():
    table = subjects(3.0)
    found = summarise(table, 300, 0).set_index(["measure", "name"])
    limbic = table[table["name"] == "limbic"].groupby("label")["value"].mean()
    assert found.loc[("separation", "limbic"), "value"] == pytest.approx(limbic[1] - limbic[0])
    assert found.loc[("separation", "limbic"), "low"] > 1
    density = found.loc["separation_per_1000_voxels"]
    for column in ("value", "low", "high"):
        assert density.loc["limbic", column] == pytest.approx(found.loc[("separation", "limbic"), column] / 2)
    assert density["voxels"].to_dict() == {"limbic": 2000, "frontal": 500}
    nothing = summarise(subjects(0.0), 300, 0).set_index(["measure", "name"])
    for name in ("limbic", "frontal"):
        assert nothing.loc[("separation", name), "low"] < 0 < nothing.loc[("separation", name), "high"]


def test_reconstruction_sums_are_those_of_numpy_inside_the_brain_only():
    """A network that gets every region's signal right except the limbic one, which it predicts to stand still."""
    image = clip(2)
    limbic = list(GROUPS).index("limbic") + 1
    brain = grid.mni_brain()

    def predict(image, mask):
        flat = image.mean(-1, keepdim=True).expand_as(image)
        return torch.where(torch.from_numpy(limbic == VOXELS)[None, None, ..., None], flat, image)

    sums = label_sums(predict, image, brain, VOXELS, VOXELS, len(GROUPS))
    values = image[0, 0].double().numpy()[(limbic == VOXELS) & brain]
    total = ((values - values.mean(-1, keepdims=True)) ** 2).sum()
    assert sums[limbic - 1] == pytest.approx([total, values.size, total, total], rel=1e-4)
    others = [row for row in range(len(GROUPS)) if row != limbic - 1]
    assert np.abs(sums[others][:, [0, 2]]).max() == 0
    assert (sums[others][:, 3] > 0).all()


def test_summary_of_reconstruction_divides_sums_over_subjects_and_labels():
    names = list(ATLAS.names.values())
    rows = [
        {"participant_id": p, "name": name, "squared": s, "count": 2.0, "residual": r, "total": 4.0}
        for p, s, r in (("a", 1.0, 1.0), ("b", 3.0, 3.0))
        for name in names
    ]
    found = summarise_reconstruction(pd.DataFrame(rows), ATLAS, 100, 0).set_index(["level", "measure", "name"])
    for level, name in (("label", names[0]), ("group", "limbic"), ("all", "all")):
        assert found.loc[(level, "mse", name), "value"] == pytest.approx(1.0)
        assert found.loc[(level, "temporal_r2", name), "value"] == pytest.approx(0.5)
        assert found.loc[(level, "temporal_r2", name), ["low", "high"]].tolist() == pytest.approx([0.25, 0.75])


def rebuilt(shares: dict[str, float]) -> pd.DataFrame:
    """Sums of subjects whose temporal R² is given, the same in every label."""
    return pd.DataFrame(
        {"participant_id": p, "name": name, "squared": 1.0, "count": 2.0, "residual": 4.0 * (1 - r2), "total": 4.0}
        for p, r2 in shares.items()
        for name in ATLAS.names.values()
    )


def test_a_gain_that_every_subject_has_is_told_from_subjects_that_differ_much():
    """Of the same subjects: paired, the interval of a gain of 0.1 for each has no width, whatever their spread."""
    first = {"a": 0.9, "b": 0.1, "c": 0.5, "d": -0.3}
    found = reconstruction_differences(
        rebuilt({p: r2 + 0.1 for p, r2 in first.items()}), rebuilt(dict(reversed(first.items()))), ATLAS, 100, 0
    ).set_index("region")
    assert set(found.index) == {"all", *GROUPS}
    np.testing.assert_allclose(found[["difference", "low", "high"]], 0.1)


def test_differences_of_what_is_rebuilt_are_those_of_the_summaries():
    rng = np.random.default_rng(0)
    both = [rebuilt(dict(zip("abcdef", rng.uniform(-1, 1, 6), strict=True))) for _ in range(2)]
    for table in both:
        table["residual"] *= rng.uniform(0.5, 1.5, len(table))
    found = reconstruction_differences(*both, ATLAS, 200, 0).set_index("region")
    parts = [summarise_reconstruction(table, ATLAS, 20, 0) for table in both]
    first, second = (t[(t["measure"] == "temporal_r2") & (t["level"] != "label")].set_index("name") for t in parts)
    np.testing.assert_allclose(found["difference"], (first["value"] - second["value"])[found.index])
    assert (found["low"] < found["difference"]).all()
    assert (found["high"] > found["difference"]).all()


def test_networks_that_rebuilt_other_subjects_are_not_compared():
    with pytest.raises(InputError, match="c was rebuilt by one network only; rebuild the same subjects with both"):
        reconstruction_differences(rebuilt({"a": 0.1, "b": 0.2}), rebuilt({"a": 0.1, "b": 0.2, "c": 0.3}), ATLAS, 20, 0)


def test_a_difference_between_folds_is_none_between_groups():
    """Two networks, 10 apart, the first tested mostly on cases; within each fold cases are 2 above controls."""
    counts = {("a", 1): 6, ("a", 0): 2, ("b", 1): 3, ("b", 0): 9, ("one class", 1): 4}
    offsets = {"a": 10.0, "b": 0.0, "one class": 50.0}
    rows = [
        (f"{fold}{label}{i}", label, fold, offsets[fold] + 2 * label + spread)
        for (fold, label), count in counts.items()
        for i, spread in enumerate(np.linspace(-1, 1, count))
    ]
    table = pd.DataFrame(rows, columns=["participant_id", "label", "fold", "value"])
    table = table.assign(seed=0, method="ablation", level="group", name="limbic", voxels=500)

    def separation(table):
        found = summarise(table, 50, 0).set_index("measure")
        return found.loc["separation", "value"], found.loc["separation_per_1000_voxels", "value"]

    assert separation(table)[0] > 20
    assert separation(within_folds(table)) == pytest.approx((2, 4))
    one = table[table["fold"] == "a"]
    assert separation(within_folds(one)) == pytest.approx(separation(one))
    assert within_folds(table[table["fold"] == "one class"]).empty


def test_groups_hold_every_label_once():
    numbers = [number for members in GROUPS.values() for number in members]
    assert sorted(numbers) == sorted(ATLAS.names)
    assert [ATLAS.names[n] for n in GROUPS["insula"]] == ["Insula_L", "Insula_R"]


def test_map_and_pictures_lie_in_mni_space(tmp_path):
    image = label_map({"Hippocampus_L": 2.0}, ATLAS)
    where = nib.affines.apply_affine(image.affine, np.argwhere(image.get_fdata() == 2))
    assert where[:, 0].max() < 0  # left is negative x
    names = list(ATLAS.names.values())
    table = pd.DataFrame({"level": "label", "name": names, "value": 1.0, "low": 0.5, "high": 1.5})
    group = pd.DataFrame({"level": "group", "name": list(GROUPS), "value": 1.0, "low": 0.5, "high": 1.5})
    draw(pd.concat([table, group]), ATLAS, tmp_path / "a" / "map", "logits")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"map.nii.gz", "map_brain.png", "map_bars.png"}


@pytest.mark.parametrize(("level", "name", "file"), [
    ("label", "Hippocampus_L", "map.nii.gz"), ("label", "Hippocampus_L", "map_brain.png"),
    ("group", "limbic", "map_bars.png"),
])  # fmt: skip
def test_a_full_disk_leaves_the_map_and_pictures_of_before(level, name, file, tmp_path, monkeypatch):
    table = pd.DataFrame([{"level": level, "name": name, "value": 1.0, "low": 0.5, "high": 1.5}])
    draw(table, ATLAS, tmp_path / "map", "logits")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.replace

    def full(self, target):
        if Path(target).name == file:
            assert self.stat().st_size > 1000  # all has been written, and not over the file of before
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match=rf"{file} cannot be written \(No space left on device\)"):
        draw(table.assign(value=2.0), ATLAS, tmp_path / "map", "logits")
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[file] == before[file]
