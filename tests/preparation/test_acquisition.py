"""What a stored run is like, against numbers computed from the image itself."""

import numpy as np
import pytest
from small_runs import coarse_brain, coarse_signal, run_of, save_bold, save_mask, touch

from bundle.preparation.acquisition import acquisition
from bundle.preparation.prepare import prepare
from bundle.preparation.store import content_sha256, read_manifest
from bundle.preparation.transforms import CONSTANT


def prepared(folder, name, data, **changes):
    """What a run of this image is like, and the record."""
    run = run_of(save_bold(folder / f"{name}.nii.gz", data), name, space="MNI", **changes)
    assert prepare([run], folder / name)["prepared"] == 1
    (record,) = read_manifest(folder / name)["runs"]
    return acquisition(folder / name, [record]), record


@pytest.fixture(scope="module")
def anatomy():
    """Bright above, dark below, with 2 % of fluctuation."""
    height = np.linspace(0.5, 1.5, 25)[None, None, :, None]
    noise = np.random.default_rng(0).normal(1, 0.02, (25, 30, 25, 30))
    return (1000 * height * noise * coarse_brain()[..., None]).astype(np.float32)


def test_units_do_not_matter_but_for_the_mean_and_an_inverted_contrast_does(anatomy, tmp_path):
    mask = save_mask(tmp_path / "mask.nii.gz", coarse_brain())
    usual, record = prepared(tmp_path, "usual", anatomy, mask=mask)
    loud, _ = prepared(tmp_path, "loud", 10 * anatomy, mask=mask)
    turned, _ = prepared(tmp_path, "turned", (2000 - anatomy) * coarse_brain()[..., None], mask=mask)
    values = anatomy[coarse_brain()]  # the rim of a brain of 8 mm voxels is darker on the grid
    assert np.sinh(usual["intensity"]["mean"]) == pytest.approx(values.mean(), rel=0.1)
    ratio = values.std() / (values.mean() + values.std())
    assert usual["intensity"]["SD beside the mean"] == pytest.approx(ratio, rel=0.3)
    for name, value in usual["intensity"].items():
        more = np.log(10) if name == "mean" else 0
        assert loud["intensity"][name] == pytest.approx(value + more, abs=0.01), name
    for name in ("mean of parietal", "mean of cerebellum"):
        assert turned["intensity"][name] == pytest.approx(-usual["intensity"][name], rel=0.25)
        assert abs(usual["intensity"][name]) > 0.5
    assert turned["coverage"] == usual["coverage"]
    for name, share in record["coverage"].items():
        assert usual["coverage"][name] == share
    assert usual["coverage"]["the MNI brain"] == record["mni_overlap"]
    assert usual["masks"] == ["given"]
    assert usual["tr"] == [0.8]


def test_a_skull_that_was_left_on_makes_the_brain_large(anatomy, tmp_path):
    mask = save_mask(tmp_path / "mask.nii.gz", coarse_brain())
    usual, _ = prepared(tmp_path, "usual", anatomy, mask=mask)
    noise = np.random.default_rng(1).normal(100, 5, anatomy.shape).astype(np.float32)
    skull, _ = prepared(tmp_path, "skull", anatomy + noise)
    assert skull["masks"] == [CONSTANT]
    assert usual["coverage"]["its volume"] == pytest.approx(0, abs=0.1)
    assert skull["coverage"]["its volume"] > 0.5


def test_motion_is_that_of_confounds_and_runs_are_averaged(tmp_path):
    for name, displacement in (("sub-01", 0.2), ("sub-02", 0.4)):
        touch(tmp_path / f"{name}.tsv", f"framewise_displacement\nn/a\n{displacement}\n")
    runs = [
        run_of(save_bold(tmp_path / f"{name}.nii.gz", coarse_signal(seed=seed)), name, space="MNI", **changes)
        for seed, (name, changes) in enumerate(
            [("sub-01", {"confounds": tmp_path / "sub-01.tsv"}), ("sub-02", {"confounds": tmp_path / "sub-02.tsv"})]
        )
    ]
    prepare(runs, tmp_path / "store")
    records = read_manifest(tmp_path / "store")["runs"]
    assert [record["mean_fd"] for record in records] == pytest.approx([0.2, 0.4])
    both = acquisition(tmp_path / "store", records)
    assert np.exp(both["motion"]) - 0.01 == pytest.approx(0.3)
    one, two = (acquisition(tmp_path / "store", [record]) for record in records)
    assert both["intensity"]["mean"] == pytest.approx((one["intensity"]["mean"] + two["intensity"]["mean"]) / 2)
    assert both["tr"] == [0.8, 0.8]
    assert acquisition(tmp_path / "store", [records[0] | {"mean_fd": None}])["motion"] is None


def test_the_content_has_the_same_hash_under_another_name_and_compression(tmp_path):
    data = coarse_signal()
    hashes = []
    for name in ("one.nii.gz", "two.nii"):
        run = run_of(save_bold(tmp_path / name, data), "sub-01", space="MNI")
        prepare([run], tmp_path / f"store-{name}")
        hashes.append(content_sha256(tmp_path / f"store-{name}", "sub-01"))
        (record,) = read_manifest(tmp_path / f"store-{name}")["runs"]
        hashes.append(record["source_sha256"])
    assert hashes[0] == hashes[2]
    assert hashes[1] != hashes[3]
    prepare(
        [run_of(save_bold(tmp_path / "three.nii", coarse_signal(seed=1)), "sub-01", space="MNI")], tmp_path / "other"
    )
    assert content_sha256(tmp_path / "other", "sub-01") != hashes[0]
