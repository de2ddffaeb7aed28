"""The atlas: files, names, regions, and labels in the world space of an image.

Independent truth: the published Table 1, brute force voxel by voxel, and nilearn. Not covered: whether AAL3
itself is right about anatomy.
"""

import gzip
import logging

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nilearn.image import resample_img

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, Atlas, labels_on, load_atlas, region_coverage, region_labels, region_table
from bundle.errors import InputError

TABLE_1 = {  # arXiv 2511.00443: voxels, percent of 185,751
    "frontal": (53985, 29.06),
    "parietal": (30927, 16.65),
    "temporal": (26584, 14.31),
    "occipital": (26358, 14.19),
    "cerebellum": (24414, 13.14),
    "limbic": (12690, 6.83),
    "subcortical": (7165, 3.86),
}
AFFINE = np.array([[3.0, 0, 0, -20], [0, 2, 0, -30], [0, 0, 2.5, 5], [0, 0, 0, 1]])


def save(path, data, affine=AFFINE, code=2):
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, path)
    return path


def small_labels(shape=(7, 8, 6)) -> np.ndarray:
    labels = np.random.default_rng(0).integers(1, 18, shape).astype(np.int16)
    labels[:1] = labels[:, :1] = labels[:, :, :1] = 0
    labels[-1:] = labels[:, -1:] = labels[:, :, -1:] = 0
    return labels


@pytest.mark.parametrize("name", ["AAL3v1_res-02_dseg.nii.gz", "AAL3v1_res-02_LAS_dseg.nii.gz"])
def test_table_1_to_the_voxel(shared, name):
    rows = region_table(load_atlas(shared / "atlas" / name))
    assert {row["region"]: (row["voxels"], round(row["percent"], 2)) for row in rows} == TABLE_1
    assert {row["region"]: row["labels"] for row in rows} == REGIONS


def test_shipped_1_mm_atlas_counts():
    rows = {row["region"]: row["voxels"] for row in region_table(load_atlas())}
    assert rows == {region: voxels for region, (voxels, _) in TABLE_1.items()} | {"subcortical": 7127}


def test_both_storage_orders_give_the_same_labels_in_space(shared):
    ras, las = (load_atlas(shared / "atlas" / f"AAL3v1_res-02_{s}dseg.nii.gz") for s in ("", "LAS_"))
    assert np.array_equal(labels_on(ras, grid.AFFINE, grid.SHAPE), labels_on(las, grid.AFFINE, grid.SHAPE))
    odd = nib.affines.from_matvec(np.diag([-3.0, 3, 3]), (78, -112, -70))  # half-way between atlas voxels
    assert np.array_equal(labels_on(ras, odd, (53, 63, 46)), labels_on(las, odd, (53, 63, 46)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=st.permutations(range(3)),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    size=st.sampled_from([1.0, 1.5, 2.0, 2.7, 4.0]),
)
def test_any_storage_of_an_atlas_gives_the_same_labels(axes, flips, size):
    image = nib.Nifti1Image(small_labels(), AFFINE)
    stored = image.as_reoriented(np.array([*zip(axes, flips, strict=True)]))
    wanted = nib.affines.from_matvec(np.diag([size] * 3), (-22, -31, 4))
    one, other = (Atlas(np.asarray(i.dataobj), i.affine, {}, "", "") for i in (image, stored))
    assert np.array_equal(labels_on(one, wanted, (9, 8, 7)), labels_on(other, wanted, (9, 8, 7)))


@pytest.mark.parametrize(
    ("affine", "shape"),
    [
        (nib.affines.from_matvec(np.diag([3.0, 3, 3]), (-20.7, -30.4, 3.2)), (9, 9, 9)),
        (nib.affines.from_matvec(np.diag([-1.3, 1.7, 2.2]), (1.1, -29.3, 5.3)), (12, 10, 8)),
    ],
)
def test_labels_on_agrees_with_nilearn(affine, shape):
    labels = small_labels()
    truth = resample_img(
        nib.Nifti1Image(labels, AFFINE),
        affine,
        shape,
        interpolation="nearest",
        force_resample=True,
        copy_header=True,
    )
    ours = labels_on(Atlas(labels, AFFINE, {}, "", ""), affine, shape)
    assert len(np.unique(ours)) > 10
    assert np.array_equal(ours, np.asarray(truth.dataobj))


def test_labels_on_the_default_atlas_agrees_with_brute_force():
    atlas = load_atlas()
    matrix = [[1.9, 0.3, 0], [-0.3, 2.1, 0.2], [0, -0.2, 2.4]]
    affine = nib.affines.from_matvec(matrix, (-70.03, -90.03, -60.03))  # never half-way between two voxels
    ours = labels_on(atlas, affine, (60, 50, 40))
    to_atlas = np.linalg.inv(atlas.affine) @ affine
    for voxel in np.random.default_rng(1).integers(0, (60, 50, 40), (500, 3)):
        i, j, k = (round(p) for p in (to_atlas @ [*voxel, 1])[:3])
        assert ours[tuple(voxel)] == atlas.labels[i, j, k]


def test_fixed_grid_is_looked_up_once():
    atlas = load_atlas()
    assert load_atlas() is atlas
    assert labels_on(atlas, grid.AFFINE.copy(), grid.SHAPE) is labels_on(atlas, grid.AFFINE, (96, 96, 96))


def test_file_is_logged_once_with_its_hash(tmp_path, caplog):
    path = save(tmp_path / "atlas.nii", small_labels())
    with caplog.at_level(logging.INFO, logger="bundle.anatomy.atlas"):
        atlas = load_atlas(path)
        load_atlas(path)
    assert [atlas.sha256 in record.message and str(path) in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("regions", "labels"),
    [
        ("limbic", REGIONS["limbic"]),
        (["limbic"], REGIONS["limbic"]),
        (["cerebellum", "limbic"], (17, 18, *range(37, 47), *range(95, 121), *range(151, 157))),
        ("Hippocampus_L", (41,)),
        (33, (33,)),
        (["Hippocampus_R", 41, "Vermis_1_2", 41], (41, 42, 113)),
        (("limbic", "Amygdala_L"), REGIONS["limbic"]),
    ],
)
def test_region_labels(regions, labels):
    assert region_labels(regions, load_atlas().names) == labels


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("limbc", "did you mean limbic"),
        (["frontal", "Hipocampus_L"], "did you mean Hippocampus_L"),
        ("ROI_0", "regions are frontal, parietal"),
        (171, "region 171"),
        (35, "region 35"),  # in AAL3's table, but without a voxel
        ([], "no region is given"),
    ],
)
def test_unknown_region_names_the_nearest(regions, message):
    with pytest.raises(InputError, match=message):
        region_labels(regions, load_atlas().names)


def test_regions_and_labels_have_their_anatomical_names():
    atlas = load_atlas()
    assert len(atlas.names) == 166
    assert set(region_labels(list(REGIONS), atlas.names)) == set(atlas.names) - {33, 34}  # all but the insula
    assert sum(len(numbers) for numbers in REGIONS.values()) == 164  # no label in two regions


def test_region_names_mean_nothing_in_another_atlas(tmp_path):
    path = save(tmp_path / "other.nii", small_labels())
    table = tmp_path / "other.tsv"
    table.write_text(
        "index\tname\tcolor\n0\tbackground\t#000\n" + "".join(f"{n}\tparcel {n}\t#fff\n" for n in range(1, 30))
    )
    atlas = load_atlas(path, table)
    assert atlas.names[17] == "parcel 17"
    assert region_labels(["parcel 3", 4], atlas.names) == (3, 4)
    assert {row["region"] for row in region_table(atlas)} == set(atlas.names.values())
    with pytest.raises(InputError, match="'limbic' is not in the atlas"):
        region_labels("limbic", atlas.names)


def test_region_coverage():
    labels = np.zeros((4, 4, 4), int)
    labels[0], labels[1], labels[2] = 1, 41, 42
    brain = np.zeros((4, 4, 4), bool)
    brain[1], brain[2, :2] = True, True
    assert region_coverage(labels, brain) == {"frontal": 0.0, "limbic": 0.75}


def fraction_label(labels):
    return labels.astype(np.float32) + 0.5 * (labels == 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda labels: np.stack([labels] * 2, -1), "3 axes"),
        (fraction_label, "whole numbers"),
        (lambda labels: -labels, "whole numbers"),
        (lambda labels: np.where(labels == 3, np.nan, labels).astype(np.float32), "whole numbers"),
        (lambda labels: labels * 0, "no labelled voxel"),
        (lambda labels: labels + 2000, "`table`"),
        (lambda labels: np.where(labels == 3, 81, labels).astype(np.int16), "`table`"),  # the older AAL
    ],
)
def test_unusable_label_images_are_refused(tmp_path, make, message):
    path = save(tmp_path / "bad.nii.gz", make(small_labels()))
    with pytest.raises(InputError, match=message) as error:
        load_atlas(path)
    assert "bad.nii.gz" in str(error.value)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_atlas(tmp_path / "absent.nii.gz")
    (tmp_path / "text.nii").write_text("not an image")
    with pytest.raises(InputError, match="not a readable NIfTI"):
        load_atlas(tmp_path / "text.nii")
    noise = np.random.default_rng(0).integers(1, 17, (30, 30, 30)).astype(np.int16)
    whole = save(tmp_path / "whole.nii.gz", noise).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_atlas(tmp_path / "cut.nii.gz")
    nib.save(nib.MGHImage(small_labels().astype(np.int32), AFFINE), tmp_path / "other.mgz")
    with pytest.raises(InputError, match="convert it to NIfTI"):
        load_atlas(tmp_path / "other.mgz")


def test_atlas_without_a_place_in_space_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither sform nor qform"):
        load_atlas(save(tmp_path / "nowhere.nii", small_labels(), code=0))


def test_sform_is_used_when_set_else_the_qform(tmp_path):
    image = nib.Nifti1Image(small_labels(), AFFINE)
    image.set_qform(AFFINE, 2)
    shifted = AFFINE.copy()
    shifted[:3, 3] += 7
    image.set_sform(shifted, 2)
    nib.save(image, tmp_path / "both.nii")
    image.set_sform(shifted, 0)
    nib.save(image, tmp_path / "qform.nii")
    assert np.allclose(load_atlas(tmp_path / "both.nii").affine, shifted)
    assert np.allclose(load_atlas(tmp_path / "qform.nii").affine, AFFINE, atol=1e-5)


def test_whole_numbers_stored_as_floats_are_labels(tmp_path):
    atlas = load_atlas(save(tmp_path / "float.nii", small_labels().astype(np.float32)))
    assert np.array_equal(atlas.labels, small_labels())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a\n2 b\n1 c\n", "line 3 of .* repeats"),
        ("1 a\n2 a\n", "line 2 of .* repeats"),
        ("1 a\nb 2\n", "line 2 of .* is not"),
        ("1 a\n2\n", "line 2 of .* is not"),
        ("index name\n", "holds no line"),
        ("1 a\n2 b\n", "not in .*table.txt, such as"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, text, message):
    (tmp_path / "table.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        load_atlas(save(tmp_path / "atlas.nii", small_labels()), tmp_path / "table.txt")


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt does not exist"):
        load_atlas(None, tmp_path / "absent.txt")


def test_compressed_and_plain_files_hold_the_same_labels(tmp_path):
    plain = save(tmp_path / "atlas.nii", small_labels())
    (tmp_path / "atlas.nii.gz").write_bytes(gzip.compress(plain.read_bytes()))
    one, other = load_atlas(plain), load_atlas(tmp_path / "atlas.nii.gz")
    assert np.array_equal(one.labels, other.labels)
    assert one.sha256 != other.sha256  # the hash is of the file
