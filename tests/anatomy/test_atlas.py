"""The atlas: files, names, regions, and labels in the world space of an image.

Independent truth: the published Table 1, brute force voxel by voxel, and nilearn. Not covered: whether an atlas
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
from bundle.anatomy.atlas import (
    LEAST_IN_BRAIN,
    REGIONS,
    Atlas,
    labels_on,
    load_atlas,
    region_choices,
    region_coverage,
    region_labels,
    region_table,
)
from bundle.anatomy.parcels import label_map, parcel_index, parcels_of
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


TABLE = "".join(f"{n} parcel{n}\n" for n in range(1, 18))
VOXELS_OF_GRID = np.argwhere(np.ones(grid.SHAPE, bool))
WORLD_OF_GRID = nib.affines.apply_affine(grid.AFFINE, VOXELS_OF_GRID)


def save(path, data, affine=AFFINE, code=2, table=TABLE):
    """Write a label image, and a table beside it unless that is None."""
    if table is not None:
        path.with_name(f"{path.name.split('.')[0]}.tsv").write_text(table)
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
    one, other = (Atlas(np.asarray(i.dataobj), i.affine, {}, {}, "", "") for i in (image, stored))
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
    ours = labels_on(Atlas(labels, AFFINE, {}, {}, "", ""), affine, shape)
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
    assert region_labels(regions, load_atlas()) == labels


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
        region_labels(regions, load_atlas())


def test_regions_and_labels_have_their_anatomical_names():
    atlas = load_atlas()
    assert len(atlas.names) == 166
    assert set(region_labels(list(REGIONS), atlas)) == set(atlas.names) - {33, 34}  # all but the insula
    assert region_labels("all", atlas) == region_labels(list(REGIONS), atlas)
    assert region_choices("all", atlas) == list(REGIONS)
    assert region_choices([["limbic", 33], 34], atlas) == [["limbic", 33], 34]
    assert parcels_of(atlas, "group") == REGIONS | {"insula": (33, 34)}
    assert sum(len(numbers) for numbers in REGIONS.values()) == 164  # no label in two regions


def test_region_names_mean_nothing_in_another_atlas(tmp_path):
    atlas = load_atlas(save(tmp_path / "other.nii", small_labels()))
    assert atlas.names[17] == "parcel17"
    assert region_labels(["parcel3", 4], atlas) == (3, 4)
    assert atlas.groups == {name: (number,) for number, name in atlas.names.items()}  # each label by itself
    assert parcels_of(atlas, "group") == parcels_of(atlas, "label") == atlas.groups
    assert {row["region"] for row in region_table(atlas)} == set(atlas.names.values())
    with pytest.raises(InputError, match="'limbic' is not in the atlas"):
        region_labels("limbic", atlas)


@st.composite
def grouped_atlases(draw):
    """A small label image about a place in the brain, with any rotation, flips and zooms, and groups of its labels."""
    numbers = draw(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=6, unique=True))
    shape = draw(st.tuples(*[st.integers(2, 5)] * 3))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, *numbers], np.int32), shape)
    labels.flat[: len(numbers)] = numbers  # each has a voxel
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))  # with or without a flip
    linear = turn * draw(st.sampled_from([-1.0, 1.0])) * rng.uniform(1.5, 3.5, 3)
    centre = rng.uniform((-20, -40, 0), (20, 10, 30))
    affine = nib.affines.from_matvec(linear, centre - linear @ (np.array(shape) - 1) / 2)
    groups = draw(
        st.lists(st.sampled_from(["", "n/a", "first", "second"]), min_size=len(numbers), max_size=len(numbers))
    )
    return labels, affine.astype(np.float32).astype(float), dict(zip(numbers, groups, strict=True))


@settings(max_examples=25, deadline=None)
@given(made=grouped_atlases())
def test_groups_are_where_brute_force_in_world_space_finds_them(made, tmp_path_factory):
    labels, affine, group_of = made
    rows = "".join(f"{number}\tname{number}\t{group}\n" for number, group in group_of.items())
    path = tmp_path_factory.mktemp("any") / "any_dseg.nii.gz"
    atlas = load_atlas(save(path, labels, affine, table=f"index\tname\tgroup\n{rows}"))
    wanted = {n: g if g in ("first", "second") else None for n, g in group_of.items()}
    if not any(wanted.values()):
        wanted = {number: f"name{number}" for number in wanted}
    parcels = parcels_of(atlas, "group")
    index, values = parcel_index(atlas, parcels), label_map({f"name{n}": n % 97 + 1 for n in wanted}, atlas).get_fdata()
    names = [None, *parcels]
    # every grid voxel near the image, by itself
    box = nib.affines.apply_affine(affine, np.array(np.meshgrid(*[(-1, n) for n in labels.shape])).reshape(3, -1).T)
    low, high = box.min(0) - 2, box.max(0) + 2
    near = np.all(np.abs(WORLD_OF_GRID - (low + high) / 2) <= (high - low) / 2, axis=1)
    assert not index.reshape(-1)[~near].any()
    to_atlas = np.linalg.inv(affine)
    for voxel, place in zip(
        VOXELS_OF_GRID[near], WORLD_OF_GRID[near] @ to_atlas[:3, :3].T + to_atlas[:3, 3], strict=True
    ):
        if np.any(np.abs(np.abs(place - np.floor(place)) - 0.5) < 1e-3):
            continue  # half-way between two voxels: either is right
        i, j, k = (int(np.floor(p + 0.5)) for p in place)
        inside = all(0 <= p < n for p, n in zip((i, j, k), labels.shape, strict=True))
        number = int(labels[i, j, k]) if inside else 0
        name = (wanted[number] or "other") if number else None
        assert names[index[tuple(voxel)]] == name
        assert values[tuple(voxel)] == (number % 97 + 1 if number else 0)
    for row in region_table(atlas):
        assert row["voxels"] == int((index == names.index(row["region"])).sum())


def test_region_coverage():
    atlas = load_atlas()
    limbic = np.isin(labels_on(atlas, grid.AFFINE, grid.SHAPE), REGIONS["limbic"])
    brain = np.zeros(grid.SHAPE, bool)
    brain[np.unravel_index(np.flatnonzero(limbic)[: limbic.sum() // 2], grid.SHAPE)] = True
    assert region_coverage(atlas, brain) == dict.fromkeys(REGIONS, 0.0) | {"limbic": 0.5}


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
        (lambda labels: labels + 2000, r"labels that are not in its table, such as \[2000, 2001"),
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
    for name in ("both", "qform"):
        (tmp_path / f"{name}.tsv").write_text(TABLE)
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
        ("1 a\n2 b\n", r"not in its table, such as \[3, 4"),
        ("index name group\n1 a all\n", "'all', which has a meaning"),
        ("1 all\n2 b\n", "'all', which has a meaning"),
        ("index name group\n1 a other\n", "'other', which has a meaning"),
        ("index name group\n1 a b\n2 b b\n", "another label of the name 'b'"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        load_atlas(save(tmp_path / "atlas.nii", small_labels(), table=text))
    assert "atlas." in str(error.value)


def test_an_image_without_a_table_is_aal3_or_refused(tmp_path):
    path = save(tmp_path / "bare.nii.gz", small_labels(), table=None)  # of AAL3's numbers, but elsewhere
    with pytest.raises(InputError, match=r"bare\.nii\.gz has no label table bare\.tsv .*is not AAL3"):
        load_atlas(path)
    aal3 = load_atlas()
    older = np.where(np.isin(aal3.labels, (121, 122)), 81, aal3.labels).astype(np.int16)  # a number AAL3 does not use
    with pytest.raises(InputError, match="is not AAL3"):
        load_atlas(
            save(tmp_path / "older.nii", older[::2, ::2, ::2], aal3.affine @ np.diag([2, 2, 2, 1.0]), table=None)
        )
    coarse = save(tmp_path / "own.nii", aal3.labels[::3, ::3, ::3], aal3.affine @ np.diag([3, 3, 3, 1.0]), table=None)
    assert load_atlas(coarse).names.items() <= aal3.names.items()
    assert load_atlas(coarse).groups.keys() == REGIONS.keys()


@pytest.mark.parametrize(
    "table", ["x_space-MNI_res-2_dseg.tsv", "x_space-MNI_dseg.tsv", "x_dseg.tsv", "x_space-MNI_res-2_dseg.txt"]
)
def test_the_table_lies_beside_the_image_as_bids_has_it(tmp_path, table):
    path = save(tmp_path / "x_space-MNI_res-2_dseg.nii.gz", small_labels(), table=None)
    (tmp_path / table).write_text("".join(f"{n} of{n}\n" for n in range(1, 18)))
    assert load_atlas(path).names[3] == "of3"


@pytest.mark.parametrize("name", ["sub-01_space-T1w_dseg.nii.gz", "tpl-fsaverage_dseg.nii.gz"])
def test_a_name_that_says_another_space_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"is in the space (T1w|fsaverage) by its name"):
        load_atlas(save(tmp_path / name, small_labels()))


@pytest.mark.parametrize("name", ["AAL3", "AAL116"])
def test_atlases_in_mni_space_lie_in_the_brain_and_moved_ones_do_not(name, tmp_path):
    """Whole, and each group by itself; moved by 3 cm along an axis, whole and the cortex by itself."""
    atlas = load_atlas(name)
    cortex = np.isin(atlas.labels, region_labels(["frontal", "parietal", "temporal", "occipital", "limbic"], atlas))
    assert grid.share_in_mni_brain(atlas.labels, atlas.affine) > 0.93
    for numbers in atlas.groups.values():
        assert grid.share_in_mni_brain(np.isin(atlas.labels, numbers), atlas.affine) > LEAST_IN_BRAIN + 0.08
    for way in (*np.eye(3), *-np.eye(3)):
        moved = atlas.affine + np.pad(30 * way[:, None], ((0, 1), (3, 0)))
        for part in (atlas.labels, cortex):
            assert grid.share_in_mni_brain(part, moved) < LEAST_IN_BRAIN - 0.05
    with pytest.raises(InputError, match=r"only \d\d% of the labelled volume of the atlas .*moved"):
        load_atlas(
            save(tmp_path / "moved.nii", atlas.labels[::2, ::2, ::2], moved @ np.diag([2, 2, 2, 1.0]), table=None)
        )


def test_compressed_and_plain_files_hold_the_same_labels(tmp_path):
    plain = save(tmp_path / "atlas.nii", small_labels())
    (tmp_path / "atlas.nii.gz").write_bytes(gzip.compress(plain.read_bytes()))
    one, other = load_atlas(plain), load_atlas(tmp_path / "atlas.nii.gz")
    assert np.array_equal(one.labels, other.labels)
    assert one.sha256 == other.sha256  # it is of what the atlas is


def test_the_hash_changes_with_labels_place_names_and_groups(tmp_path):
    labels = small_labels()
    other = labels.copy()
    other[3, 3, 3] = labels[3, 3, 3] % 17 + 1
    rows = [f"{n}\tparcel{n}" for n in range(1, 18)]
    grouped = "index\tname\tgroup\n" + "".join(f"{row}\t{'ab'[n % 2]}\n" for n, row in enumerate(rows))
    made = [
        save(tmp_path / "a.nii", labels),
        save(tmp_path / "b.nii", other),
        save(tmp_path / "c.nii", labels, AFFINE @ np.diag([1, 1, 1.01, 1])),
        save(tmp_path / "d.nii", labels, table="".join(f"{row}x\n" for row in rows)),
        save(tmp_path / "e.nii", labels, table=grouped),
        save(tmp_path / "f.nii", labels, table=grouped.replace("parcel3\ta", "parcel3\tb")),
    ]
    assert len({load_atlas(path).sha256 for path in made}) == len(made)
