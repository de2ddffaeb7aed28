"""Known atlases: group tables against published lists of labels, and fetching by nilearn, from a folder that has all.

Independent truth: AAL3's Table 1 for AAL's lobes, since both draw the same outlines, and the lists of labels of the
atlases' authors. Not covered: the downloads themselves, and the real images of Harvard-Oxford, Destrieux and Schaefer.
"""

from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest
import requests

from bundle.anatomy import atlas as atlas_module
from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, load_atlas, region_table
from bundle.anatomy.known_atlases import KNOWN
from bundle.anatomy.label_tables import known_groups
from bundle.anatomy.parcels import parcels_of
from bundle.errors import InputError

DESTRIEUX = """
    G_and_S_frontomargin G_and_S_occipital_inf G_and_S_paracentral G_and_S_subcentral G_and_S_transv_frontopol
    G_and_S_cingul-Ant G_and_S_cingul-Mid-Ant G_and_S_cingul-Mid-Post G_cingul-Post-dorsal G_cingul-Post-ventral
    G_cuneus G_front_inf-Opercular G_front_inf-Orbital G_front_inf-Triangul G_front_middle G_front_sup
    G_Ins_lg_and_S_cent_ins G_insular_short G_occipital_middle G_occipital_sup G_oc-temp_lat-fusifor
    G_oc-temp_med-Lingual G_oc-temp_med-Parahip
    G_orbital G_pariet_inf-Angular G_pariet_inf-Supramar G_parietal_sup G_postcentral G_precentral G_precuneus G_rectus
    G_subcallosal G_temp_sup-G_T_transv G_temp_sup-Lateral G_temp_sup-Plan_polar G_temp_sup-Plan_tempo G_temporal_inf
    G_temporal_middle Lat_Fis-ant-Horizont Lat_Fis-ant-Vertical Lat_Fis-post Medial_wall Pole_occipital Pole_temporal
    S_calcarine S_central S_cingul-Marginalis S_circular_insula_ant S_circular_insula_inf S_circular_insula_sup
    S_collat_transv_ant S_collat_transv_post S_front_inf S_front_middle S_front_sup S_interm_prim-Jensen
    S_intrapariet_and_P_trans S_oc_middle_and_Lunatus S_oc_sup_and_transversal S_occipital_ant S_oc-temp_lat
    S_oc-temp_med_and_Lingual S_orbital_lateral S_orbital_med-olfact S_orbital-H_Shaped S_parieto_occipital
    S_pericallosal S_postcentral S_precentral-inf-part S_precentral-sup-part S_suborbital S_subparietal S_temporal_inf
    S_temporal_sup S_temporal_transverse"""
HARVARD_OXFORD = """
    Frontal Pole; Insular Cortex; Superior Frontal Gyrus; Middle Frontal Gyrus;
    Inferior Frontal Gyrus, pars triangularis; Inferior Frontal Gyrus, pars opercularis; Precentral Gyrus;
    Temporal Pole;
    Superior Temporal Gyrus, anterior division; Superior Temporal Gyrus, posterior division;
    Middle Temporal Gyrus, anterior division; Middle Temporal Gyrus, posterior division;
    Middle Temporal Gyrus, temporooccipital part; Inferior Temporal Gyrus, anterior division;
    Inferior Temporal Gyrus, posterior division; Inferior Temporal Gyrus, temporooccipital part; Postcentral Gyrus;
    Superior Parietal Lobule; Supramarginal Gyrus, anterior division; Supramarginal Gyrus, posterior division;
    Angular Gyrus; Lateral Occipital Cortex, superior division; Lateral Occipital Cortex, inferior division;
    Intracalcarine Cortex; Frontal Medial Cortex; Juxtapositional Lobule Cortex (formerly Supplementary Motor Cortex);
    Subcallosal Cortex; Paracingulate Gyrus; Cingulate Gyrus, anterior division; Cingulate Gyrus, posterior division;
    Precuneous Cortex; Cuneal Cortex; Frontal Orbital Cortex; Parahippocampal Gyrus, anterior division;
    Parahippocampal Gyrus, posterior division; Lingual Gyrus; Temporal Fusiform Cortex, anterior division;
    Temporal Fusiform Cortex, posterior division; Temporal Occipital Fusiform Cortex; Occipital Fusiform Gyrus;
    Frontal Operculum Cortex; Central Opercular Cortex; Parietal Operculum Cortex; Planum Polare;
    Heschl's Gyrus (includes H1 and H2); Planum Temporale; Supracalcarine Cortex; Occipital Pole"""
DESTRIEUX = DESTRIEUX.split()  # in the order of the atlas, as is the next
HARVARD_OXFORD = [" ".join(name.split()) for name in HARVARD_OXFORD.split(";")]
SCHAEFER = [f"7Networks_{side}_{name}" for side in ("LH", "RH") for name in ("Vis_1", "SomMot_1", "DorsAttn_Post_1",
            "SalVentAttn_FrOperIns_1", "Limbic_OFC_1", "Cont_Par_1", "Default_Temp_1", "Default_PFC_2")]  # fmt: skip


def image_of(labels: int, path) -> None:
    """Labels 1 to n in a block in the middle of the brain."""
    values = np.arange(20**3).reshape(20, 20, 20) % (labels + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        nib.Nifti1Image(values.astype(np.int16), nib.affines.from_matvec(np.diag([-2.0, 2, 2]), (20, -40, 0))), path
    )


@pytest.fixture
def empty_nilearn_data(tmp_path, monkeypatch):
    """A nilearn folder with nothing in it, and no network."""

    def no_network(*_, **__):
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setenv("NILEARN_DATA", str(tmp_path))
    monkeypatch.setattr(requests.Session, "send", no_network)
    monkeypatch.setattr(atlas_module, "_load", lru_cache(atlas_module._load.__wrapped__))  # what others have read
    return tmp_path


@pytest.fixture
def nilearn_data(empty_nilearn_data):
    """With made-up images and the real names, as the downloads lay them."""
    tmp_path = empty_nilearn_data
    both = [f"{side} {name}" for name in HARVARD_OXFORD for side in ("Left", "Right")]
    xml = "".join(f'<label index="{n}">{name}</label>' for n, name in enumerate(both))
    folder = tmp_path / "fsl" / "data" / "atlases"
    image_of(96, folder / "HarvardOxford" / "HarvardOxford-cortl-maxprob-thr25-2mm.nii.gz")
    (folder / "HarvardOxford-Cortical-Lateralized.xml").write_text(f"<atlas><data>{xml}</data></atlas>")
    names = [f"{side} {name}" for side in "LR" for name in DESTRIEUX]
    image_of(150, tmp_path / "destrieux_2009" / "destrieux2009_rois_lateralized.nii.gz")
    rows = "".join(f"{n},{name}\n" for n, name in enumerate(["Background", *names]))
    (tmp_path / "destrieux_2009" / "destrieux2009_rois_labels_lateralized.csv").write_text(f"index,name\n{rows}")
    (tmp_path / "destrieux_2009" / "destrieux2009.rst").write_text("")
    image_of(len(SCHAEFER), tmp_path / "schaefer_2018" / "Schaefer2018_100Parcels_7Networks_order_FSLMNI152_2mm.nii.gz")
    rows = "".join(f"{n}\t{name}\t1\t2\t3\t0\n" for n, name in enumerate(SCHAEFER, start=1))
    (tmp_path / "schaefer_2018" / "Schaefer2018_100Parcels_7Networks_order.txt").write_text(rows)
    return tmp_path


def test_aal_has_the_lobes_of_aal3():
    """AAL3 took AAL's outlines over but for parts of cingulum and orbital cortex, and split up the thalamus."""
    rows = {row["region"]: row["voxels"] for row in region_table(load_atlas("AAL116"))}
    theirs = {row["region"]: row["voxels"] for row in region_table(load_atlas())}
    assert list(rows) == list(REGIONS)
    assert all(abs(rows[name] / theirs[name] - 1) < 0.01 for name in rows if name != "subcortical")
    assert parcels_of(load_atlas("AAL116"), "group")["insula"] == (29, 30)


def test_lobes_of_the_reference_aal_are_those_of_table_1(shared):
    """Found by name beside the image, whose numbers are others."""
    atlas = load_atlas(shared / "atlas" / "AAL116_res-02_dseg.nii.gz")
    rows = {row["region"]: row["voxels"] for row in region_table(atlas)}
    assert (rows["parietal"], rows["temporal"]) == (30927, 26584)  # Table 1
    near = {"frontal": 53985, "occipital": 26358, "cerebellum": 24414, "limbic": 12690}
    assert all(abs(rows[name] / voxels - 1) < 0.002 for name, voxels in near.items())
    assert {len(numbers) % 2 for numbers in (atlas.groups["frontal"], atlas.groups["limbic"])} == {0}
    assert atlas.rest == "insula"


def test_harvard_oxford_has_six_lobes(nilearn_data):
    atlas = load_atlas("HarvardOxford")
    assert len(atlas.names) == 96
    assert {name: len(own) for name, own in atlas.groups.items()} == {
        "frontal": 22, "parietal": 14, "temporal": 28, "occipital": 18, "limbic": 12, "insula": 2
    }  # fmt: skip
    assert parcels_of(atlas, "group") == atlas.groups  # no label is left over
    assert [atlas.names[n] for n in atlas.groups["insula"]] == ["Left Insular Cortex", "Right Insular Cortex"]


def test_destrieux_has_six_lobes_and_sulci_between_them(nilearn_data):
    atlas = load_atlas("Destrieux")
    assert len(atlas.names) == 150
    left_out = {atlas.names[number][2:] for number in parcels_of(atlas, "group")["other"]}
    assert left_out == {"S_central", "Lat_Fis-post", "S_parieto_occipital", "Medial_wall"}
    assert list(atlas.groups) == ["frontal", "parietal", "temporal", "occipital", "limbic", "insula"]
    assert sum(map(len, atlas.groups.values())) == 2 * (75 - 4)
    for name, lobe in (("G_precentral", "frontal"), ("G_postcentral", "parietal"), ("Pole_temporal", "temporal")):
        assert {n for n, label in atlas.names.items() if label[2:] == name} <= set(atlas.groups[lobe])


def test_schaefer_has_its_seven_networks(nilearn_data):
    atlas = load_atlas("Schaefer100")
    assert list(atlas.groups) == ["Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default"]
    assert [atlas.names[n] for n in atlas.groups["Limbic"]] == [
        "7Networks_LH_Limbic_OFC_1",
        "7Networks_RH_Limbic_OFC_1",
    ]
    assert len(atlas.groups["Default"]) == 4


def test_a_fetched_atlas_lies_where_its_affine_says(nilearn_data):
    atlas = load_atlas("Schaefer100")
    assert grid.share_in_mni_brain(atlas.labels, atlas.affine) == 1
    assert atlas.affine[0, 0] < 0  # as the file has it


def test_a_label_that_no_table_knows_is_refused_and_not_guessed(nilearn_data):
    path = nilearn_data / "destrieux_2009" / "destrieux2009_rois_labels_lateralized.csv"
    path.write_text(path.read_text().replace("L S_central", "L S_new"))
    with pytest.raises(InputError, match="are named otherwise than those of Destrieux; give it as files, with groups"):
        load_atlas("Destrieux")


def test_groups_of_files_are_found_by_names_only_if_all_are_known():
    names = dict(enumerate(("Left Angular Gyrus", "Right Planum Polare"), start=1))
    assert known_groups(names).members["parietal"] == (1,)
    assert known_groups(names | {3: "Left Something"}) is None
    assert known_groups({1: "7Networks_LH_Vis_1", 2: "Left Angular Gyrus"}) is None


@pytest.mark.parametrize("name", ["HarvardOxford", "Destrieux", "Schaefer200", "Schaefer1000"])
def test_without_a_network_one_sentence_names_the_folder_and_the_files_to_give(name, empty_nilearn_data):
    with pytest.raises(InputError) as error:
        load_atlas(name)
    for part in (name, str(empty_nilearn_data), "ConnectionError", f"{name}_dseg.nii.gz", f"{name}_dseg.tsv"):
        assert part in str(error.value)


def test_a_word_that_names_no_atlas_lists_those_that_are():
    with pytest.raises(
        InputError, match=r"the atlas Schafer does not exist; give a label image .* or one of AAL3, AAL116"
    ):
        load_atlas("Schafer")
    assert len(KNOWN) == 14
