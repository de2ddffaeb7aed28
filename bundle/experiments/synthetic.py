"""Write a synthetic multi-site resting-state cohort in which a group difference of known size is planted.

The folder looks like fMRIPrep derivatives in MNI space, so that the whole walk of the data can be tried,
tested and shown without any real subject. What is planted is written beside it, in `truth.json`.

The signal model of one subject, from the outside in:

- voxel: `mean * (1 + 1 % * signal of its AAL3 label + 1 % * white noise + drift)`, 0 outside the brain;
- label: `sqrt(0.7) * latent of its group + sqrt(0.3) * its own process`;
- group (the seven regions, and "other" for the insula): `sqrt(0.2) * a process shared by all +
  sqrt(0.8) * its own`; then the cerebellum's latent is turned towards or away from the limbic one, until
  their correlation over the run is exactly `tanh(coupling_z)`.

Every process is Gaussian and limited to 0.01–0.1 Hz. On average over runs, two labels hence correlate by
about 0.7 within a group, 0.14 between groups and `0.7 * tanh(coupling_z)` between limbic and cerebellum.

The planted effect: `coupling_z` (Fisher z) is normal with SD 0.3 in both groups and mean 0.2 in controls;
the mean of the cases is larger by `effect * 0.3`. So `effect` is Cohen's d of the subjects' coupling, and
even a perfect reading of the coupling separates the groups with an AUROC of only `Phi(effect / sqrt(2))`.
With an effect of 0 the groups are exchangeable: no number of an image depends on the diagnosis.

With `effect_on="intensity"` the groups do not differ in coupling. Instead the voxels of the two regions are
brighter by `intensity`, a fraction of their mean that is normal with SD 0.02 in both groups, has mean 0 in
controls and `effect * 0.02` in cases. This is a static effect: a single frame shows it, while the coupling shows
in how two regions vary together only.

A run of S seconds has only about `0.09 * S` frequencies in the band (6 at 60 s), so that a *sample*
correlation is noisy: this is why the coupling is planted in the sample and not only in the distribution. The
mean signals of the two regions still show it with some error, from the labels' own processes: at 60 s they
correlate with the planted `coupling_z` by about 0.93 over subjects.
"""

import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, ornt_transform
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from nilearn.image import resample_img
from scipy.stats import norm
from tqdm.auto import tqdm

from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.errors import InputError
from bundle.experiments.signals import BAND_HZ, COUPLED, band_frequencies, group_latents, label_signals
from bundle.files import write_json

logger = logging.getLogger(__name__)

MEAN_Z, SD_Z = 0.2, 0.3  # coupling_z of the controls
SD_INTENSITY = 0.02  # of the two regions' mean, where the effect is on the intensity
EFFECTS = ("coupling", "intensity")
SIGNAL, NOISE, DRIFT = 0.01, 0.01, 0.003  # SD as a fraction of the voxel's mean
BOX_ORIGIN_MM, BOX_MM = np.array([-90, -126, -72]), np.array([180, 216, 180])  # the MNI152 91x109x91 2 mm box
SPACE = "MNI152NLin2009cAsym"


@dataclass(frozen=True)
class Site:
    """One scanner site.

    Attributes:
        name: written to the column `site`.
        tr: repetition time in seconds, 0.1 to 20.
        voxel_mm: edge of the cubic voxels in mm, 1 to 8.
        axcodes: orientation in which the voxels are stored, e.g. "LAS".
        intensity: about the mean of the brain's voxels, in arbitrary scanner units, positive.
        dtype: how the voxels are stored, "int16" (with a slope) or "float32".
    """

    name: str
    tr: float
    voxel_mm: float
    axcodes: str
    intensity: float
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what cannot be written.

        Raises:
            InputError: a value is outside the range given above.
        """
        where = f"site {self.name!r} of the synthetic cohort"
        if not 0.1 <= self.tr <= 20:
            raise InputError(f"tr of {where} must be 0.1 to 20 seconds, not {self.tr}.")
        if not 1 <= self.voxel_mm <= 8:
            raise InputError(f"voxel_mm of {where} must be 1 to 8 mm, not {self.voxel_mm}.")
        if len(self.axcodes) != 3 or any(len({*pair} & {*self.axcodes}) != 1 for pair in ("LR", "PA", "IS")):
            raise InputError(f"axcodes of {where} must be like 'RAS' or 'LAS', not {self.axcodes!r}.")
        if not 0 < self.intensity < math.inf:
            raise InputError(f"intensity of {where} must be a positive number, not {self.intensity}.")
        if self.dtype not in ("int16", "float32"):
            raise InputError(f"dtype of {where} must be 'int16' or 'float32', not {self.dtype!r}.")


SITES = (
    Site("north", tr=2.0, voxel_mm=3.0, axcodes="LAS", intensity=800.0, dtype="int16"),
    Site("south", tr=1.5, voxel_mm=4.0, axcodes="RAS", intensity=12000.0, dtype="float32"),
    Site("west", tr=2.5, voxel_mm=3.5, axcodes="PIR", intensity=300.0, dtype="int16"),
)


@dataclass(frozen=True)
class Anatomy:
    """What all subjects of a site share; v counts the voxels of the brain, in C order of `mask`."""

    affine: np.ndarray  # (4, 4), RAS, voxel to MNI mm
    mask: np.ndarray  # (X, Y, Z) bool, the brain
    mean: np.ndarray  # (v,) float32, about 1: dark white matter, bright fluid
    labels: np.ndarray  # (v,) int, AAL3 number, 0 where there is none
    mm: np.ndarray  # (v, 3) float32, MNI coordinates


def make_cohort(
    folder: str | Path,
    subjects: int = 24,
    effect: float = 0.8,
    seed: int = 0,
    sites: Sequence[Site] = SITES,
    duration_s: float = 60.0,
    effect_on: str = "coupling",
) -> Path:
    """Write the cohort; the folder appears complete or not at all.

    Beside the images it holds `participants.tsv` (participant_id, site, diagnosis control/adhd, age in
    years, sex), `truth.json` and, per subject, the planted latents, `*_desc-latent_timeseries.tsv`.

    Args:
        folder: where to write; absent, empty, or the same cohort written before, which is then left as it is.
        subjects: how many, at least 4; shared out evenly over sites, and over diagnoses within each site.
        effect: Cohen's d of the planted difference, 0 to 10.
        seed: at least 0; the same arguments and software versions give the same bytes.
        sites: the scanner sites, with different names.
        duration_s: length of each run in seconds; at least three frequencies must fall into 0.01–0.1 Hz.
        effect_on: what the diagnosis changes: the "coupling" between limbic regions and cerebellum, or their
            "intensity".

    Returns:
        The folder.

    Raises:
        InputError: an argument is outside its range, or the folder holds something else.
    """
    folder = Path(folder).absolute()
    plan = plan_cohort(subjects, effect, seed, sites, effect_on)
    for site in sites:
        band_frequencies(frame_count(duration_s, site), site.tr)
    truth = describe(plan, effect, seed, sites, duration_s, effect_on)
    if is_written(folder, truth):
        logger.info("%s already holds this cohort; nothing to do", folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary) / "cohort"
        draft.mkdir()
        write_tables(draft, plan, truth)
        places = {site.name: (site, site_anatomy(site.voxel_mm)) for site in sites}
        for number, subject in enumerate(tqdm(plan.to_dict("records"), desc="synthetic cohort", unit="subject")):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
            write_subject(draft, subject, *places[subject["site"]], duration_s, rng)
        draft.rename(folder)  # atomic; replaces an empty folder
    return folder


def plan_cohort(
    subjects: int, effect: float, seed: int, sites: Sequence[Site], effect_on: str = "coupling"
) -> pd.DataFrame:
    """Draw who is in the cohort, and each subject's coupling and intensity.

    Args:
        subjects: at least 4.
        effect: Cohen's d, 0 to 10.
        seed: at least 0.
        sites: at least one, with different names.
        effect_on: "coupling" or "intensity".

    Returns:
        One row per subject: participant_id, site, diagnosis ("control" or "adhd"), age (years, 7–21), sex
        ("F" or "M"), coupling_z, intensity (0 if the effect is on the coupling). Diagnoses are balanced within
        each site, to within one subject.

    Raises:
        InputError: an argument is outside its range.
    """
    if not isinstance(subjects, int) or subjects < 4:
        raise InputError(f"subjects must be a whole number of at least 4, not {subjects!r}.")
    if not isinstance(effect, (int, float)) or not 0 <= effect <= 10:
        raise InputError(f"effect must be a Cohen's d of 0 to 10, not {effect!r}.")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number of at least 0, not {seed!r}.")
    if effect_on not in EFFECTS:
        raise InputError(f"effect_on must be one of {', '.join(EFFECTS)}, not {effect_on!r}.")
    names = [site.name for site in sites]
    if not names or len(set(names)) < len(names):
        raise InputError(f"sites must be one or more sites with different names, not {names}.")
    rng = np.random.default_rng(seed)
    site_of = np.arange(subjects) % len(sites)
    case = np.empty(subjects, dtype=bool)
    extra = 0  # an odd site's surplus subject is a control, then a case, then a control, ...
    for index in range(len(sites)):
        size = int((site_of == index).sum())
        case[site_of == index] = rng.permutation((np.arange(size) + extra) % 2 == 1)
        extra = (extra + size) % 2
    width = max(2, len(str(subjects)))
    shift = np.where(case, effect, 0.0)
    on_coupling = effect_on == "coupling"
    plan = pd.DataFrame(
        {
            "participant_id": [f"sub-{number:0{width}d}" for number in range(1, subjects + 1)],
            "site": [names[index] for index in site_of],
            "diagnosis": np.where(case, "adhd", "control"),
            "age": rng.uniform(7, 21, subjects).round(1),
            "sex": rng.choice(["F", "M"], subjects),
            "coupling_z": rng.normal(MEAN_Z, SD_Z, subjects) + SD_Z * shift * on_coupling,
        }
    )
    return plan.assign(intensity=0.0 if on_coupling else SD_INTENSITY * (rng.standard_normal(subjects) + shift))


def describe(
    plan: pd.DataFrame, effect: float, seed: int, sites: Sequence[Site], duration_s: float, effect_on: str
) -> dict[str, Any]:
    """Return what `truth.json` holds; `parameters` alone decide whether two cohorts are the same."""
    case = plan["diagnosis"] == "adhd"
    planted = plan["coupling_z" if effect_on == "coupling" else "intensity"]
    cases, controls = planted[case], planted[~case]
    pooled_sd = math.sqrt((cases.var() + controls.var()) / 2)
    return {
        "parameters": {
            "format": 2,
            "subjects": len(plan),
            "effect_on": effect_on,
            "effect": float(effect),
            "seed": seed,
            "duration_s": float(duration_s),
            "sites": [asdict(site) for site in sites],
        },
        "effect_definition": "Cohen's d, cases (adhd) minus controls, of "
        + {
            "coupling": "coupling_z: the Fisher z of the correlation, over the run, between the latent signals of "
            f"{COUPLED[0]} and {COUPLED[1]}",
            "intensity": f"intensity: by which fraction the mean of voxels of {COUPLED[0]} and {COUPLED[1]} is raised",
        }[effect_on],
        "regions": list(COUPLED),
        "coupling_z_mean": {"control": MEAN_Z, "adhd": MEAN_Z + SD_Z * effect * (effect_on == "coupling")},
        "coupling_z_sd": SD_Z,
        "intensity_sd": 0.0 if effect_on == "coupling" else SD_INTENSITY,
        "best_auroc": float(norm.cdf(effect / math.sqrt(2))),
        "effect_in_this_sample": float((cases.mean() - controls.mean()) / pooled_sd),
        "band_hz": list(BAND_HZ),
        "fraction_of_mean": {"signal": SIGNAL, "noise": NOISE, "drift": DRIFT},
        "coupling_z": dict(zip(plan["participant_id"], plan["coupling_z"].tolist(), strict=True)),
        "intensity": dict(zip(plan["participant_id"], plan["intensity"].tolist(), strict=True)),
        "versions": {name: version(name) for name in ("numpy", "nibabel", "nilearn")},
    }


def is_written(folder: Path, truth: dict[str, Any]) -> bool:
    """Whether the folder holds this very cohort already.

    Raises:
        InputError: the path is a file, or the folder holds another cohort, a part of one, or anything else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a new or empty folder for the synthetic cohort.")
    if not any(folder.iterdir()):
        return False
    path = folder / "truth.json"
    if not path.is_file():
        raise InputError(f"{folder} holds other files; name a new or empty folder for the synthetic cohort.")
    if json.loads(path.read_text()).get("parameters") != truth["parameters"]:
        raise InputError(f"{folder} holds a cohort made with other parameters; name another folder.")
    missing = [name for name in truth["coupling_z"] if not any(folder.glob(f"{name}/func/*_bold.nii.gz"))]
    if missing:
        raise InputError(f"{folder} is not complete, {missing[0]} is missing; delete it and run again.")
    return True


def write_tables(folder: Path, plan: pd.DataFrame, truth: dict[str, Any]) -> None:
    """Write the files at the top of the folder."""
    description: dict[str, Any] = {
        "Name": "Synthetic resting-state cohort with a planted limbic–cerebellar difference",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brain-fmri-roi-mae", "Description": "bundle.experiments.synthetic.make_cohort"}],
    }
    write_json(folder / "dataset_description.json", description)
    write_json(folder / "truth.json", truth)
    plan.drop(columns=["coupling_z", "intensity"]).to_csv(folder / "participants.tsv", sep="\t", index=False)


def site_anatomy(voxel_mm: float) -> Anatomy:
    """Sample the MNI152 template, its brain mask and AAL3 on a RAS grid over the MNI152 box.

    The T1-weighted template becomes a T2*-like contrast, `1.5 - T1`: bright fluid, dark white matter.

    Args:
        voxel_mm: edge of the cubic voxels in mm.
    """
    affine = np.diag([voxel_mm] * 3 + [1.0])
    affine[:3, 3] = BOX_ORIGIN_MM
    shape = tuple(int(n) for n in BOX_MM // voxel_mm + 1)
    options = {"target_affine": affine, "target_shape": shape, "force_resample": True, "copy_header": True}
    template = resample_img(load_mni152_template(2), interpolation="linear", **options).get_fdata()
    mask = resample_img(load_mni152_brain_mask(2), interpolation="nearest", **options).get_fdata() > 0
    return Anatomy(
        affine=affine,
        mask=mask,
        mean=(1.5 - template[mask]).astype(np.float32),
        labels=labels_on(load_atlas(), affine, shape)[mask],
        mm=nib.affines.apply_affine(affine, np.argwhere(mask)).astype(np.float32),
    )


def frame_count(duration_s: float, site: Site) -> int:
    """Return the number of frames of a run.

    Raises:
        InputError: the duration is not 1 second to 1 day.
    """
    if not 1 <= duration_s <= 86400:
        raise InputError(f"duration_s must be 1 to 86400 seconds, not {duration_s}.")
    return round(duration_s / site.tr)


def voxel_signals(
    anatomy: Anatomy, latents: pd.DataFrame, intensity: float, tr: float, rng: np.random.Generator
) -> np.ndarray:
    """Return the BOLD signal of the brain's voxels, (v, frames) float32, around the anatomy's mean.

    The mean of the coupled regions' voxels is raised by the fraction `intensity`.
    """
    numbers = np.unique(anatomy.labels[anatomy.labels > 0])
    signals = label_signals(latents, numbers, tr, rng).astype(np.float32)  # (frames, n)
    table = np.zeros((numbers.max() + 1, len(latents)), dtype=np.float32)  # row 0: voxels without a label
    table[numbers] = SIGNAL * signals.T
    change = table[anatomy.labels]  # (v, frames)
    change += NOISE * rng.standard_normal(change.shape, dtype=np.float32)
    # the drift is linear in time, and its slope is a smooth (linear) function of the place in the brain
    slope = rng.standard_normal() + anatomy.mm @ (rng.standard_normal(3) / 50)
    ramp = np.linspace(-1, 1, len(latents)) * math.sqrt(3)
    change += (DRIFT * slope[:, None] * ramp).astype(np.float32)
    coupled = np.isin(anatomy.labels, [number for name in COUPLED for number in REGIONS[name]])
    mean = anatomy.mean * np.where(coupled, 1 + intensity, 1).astype(np.float32)
    return mean[:, None] * (1 + change)


def write_subject(
    folder: Path, subject: dict[str, Any], site: Site, anatomy: Anatomy, duration_s: float, rng: np.random.Generator
) -> None:
    """Write a subject's run, brain mask, sidecar and planted latents; the diagnosis is not used."""
    name = str(subject["participant_id"])
    func = folder / name / "func"
    func.mkdir(parents=True)
    stem = f"{name}_task-rest"
    latents = group_latents(subject["coupling_z"], frame_count(duration_s, site), site.tr, rng)
    latents.to_csv(func / f"{stem}_desc-latent_timeseries.tsv", sep="\t", index=False, float_format="%.6f")
    values = site.intensity * voxel_signals(anatomy, latents, subject["intensity"], site.tr, rng)
    slope = site.intensity / 8000  # int16 reaches 4 times the mean; a step is about 1/80 of the signal's SD
    if site.dtype == "int16":
        values = np.round(values / slope)
    data = np.zeros((*anatomy.mask.shape, len(latents)), dtype=site.dtype)  # (X, Y, Z, T)
    data[anatomy.mask] = values
    image = stored_image(data, anatomy.affine, site)
    if site.dtype == "int16":
        image.header.set_slope_inter(slope, 0)  # nibabel then stores the integers as they are
    nib.save(image, func / f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz")
    mask = stored_image(anatomy.mask.astype(np.uint8), anatomy.affine, site)
    nib.save(mask, func / f"{stem}_space-{SPACE}_desc-brain_mask.nii.gz")
    sidecar = {"TaskName": "rest", "RepetitionTime": site.tr, "SkullStripped": True}
    write_json(func / f"{stem}_space-{SPACE}_desc-preproc_bold.json", sidecar)


def stored_image(data: np.ndarray, affine: np.ndarray, site: Site) -> nib.Nifti1Image:
    """Wrap RAS voxels, (X, Y, Z) or (X, Y, Z, T), as an MNI image in the site's storage order."""
    image = nib.Nifti1Image(data, affine)
    to_site = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(site.axcodes))
    image = image.as_reoriented(to_site)
    image.set_sform(image.affine, code="mni")
    image.set_qform(image.affine, code="mni")
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        image.header.set_zooms((*[site.voxel_mm] * 3, site.tr))
    return image
