"""Write a synthetic multi-site resting-state cohort in which a group difference of known size is planted.

The folder looks like fMRIPrep derivatives in MNI space, so that the whole walk of the data can be tried,
tested and shown without any real subject. What is planted is written beside it, in `truth.json`.

The signal model of one subject, from the outside in:

- voxel: `mean * (1 + 1 % * (signal of its AAL3 label + pattern * pattern latent of the label's group) +
  1 % * white noise + drift)`, 0 outside the brain;
- label: `sqrt(0.7) * latent of its group + sqrt(0.3) * its own process`;
- group (the seven regions, and "other" for the insula): `sqrt(0.2) * a process shared by all +
  sqrt(0.8) * its own`; then the cerebellum's latent is turned towards or away from the limbic one, until
  their correlation over the run is exactly `tanh(coupling_z)`.
- pattern: one smooth random field in MNI space (white noise, smoothed to a FWHM of 16 mm), the same for every
  subject, site and cohort. Within each label, on the site's own grid, the sum of `mean * pattern` is 0 and the
  pattern's RMS is 1, so that a label's average BOLD signal does not contain it; without a label it is 0;
- pattern latents: drawn as the groups' latents are, independently of them; those of limbic and cerebellum correlate
  over the run by exactly `tanh(pattern_z)`.

Every process is Gaussian and limited to 0.01–0.1 Hz. On average over runs, two labels hence correlate by
about 0.7 within a group, 0.14 between groups and `0.7 * tanh(coupling_z)` between limbic and cerebellum.

The planted effect: `coupling_z` (Fisher z) is normal with SD 0.3 in both groups and mean 0.2 in controls;
the mean of the cases is larger by `effect * 0.3`. So `effect` is Cohen's d of the subjects' coupling, and
even a perfect reading of the coupling separates the groups with an AUROC of only `Phi(effect / sqrt(2))`.
With an effect of 0 the groups are exchangeable: no number of an image depends on the diagnosis.

With `effect_on="pattern"` the groups do not differ in `coupling_z` but, in the same way, in `pattern_z`, which has the
same means and SD. Connectivity of label means is blind to this by construction on the site's own grid. Another grid
mixes across labels' borders: at the default sites, 2 to 3 % of the pattern's variance gets into prepared label means,
on average over labels. With an effect of 3 a linear classifier of their connectivity still had an AUROC of 0.50 over
144 subjects (cross-validated), while the coupling of the patterns themselves separated the groups.

With `effect_on="intensity"` the groups do not differ in either. Instead the voxels of the two regions are
brighter by `intensity`, a fraction of their mean that is normal with SD 0.02 in both groups, has mean 0 in
controls and `effect * 0.02` in cases. This is a static effect: a single frame shows it, while the coupling shows
in how two regions vary together only.

A run of S seconds has only about `0.09 * S` frequencies in the band (6 at 60 s), so that a *sample*
correlation is noisy: this is why the coupling is planted in the sample and not only in the distribution. The
mean signals of the two regions still show it with some error, from the labels' own processes: at 60 s they
correlate with the planted `coupling_z` by about 0.93 over subjects.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from tqdm.auto import tqdm

from bundle.anatomy.atlas import REGIONS
from bundle.errors import InputError
from bundle.experiments.signals import BAND_HZ, COUPLED, band_frequencies, group_latents, label_signals, latents_of
from bundle.experiments.volumes import (
    DRIFT,
    NOISE,
    SIGNAL,
    Anatomy,
    Site,
    add_noise,
    is_written,
    of_voxels,
    site_anatomy,
    write_description,
    write_run,
    written_cohort,
)
from bundle.files import write_json

logger = logging.getLogger(__name__)

MEAN_Z, SD_Z = 0.2, 0.3  # coupling_z and pattern_z of the controls
SD_INTENSITY = 0.02  # of the two regions' mean, where the effect is on the intensity
PLANTED = {"coupling": "coupling_z", "intensity": "intensity", "pattern": "pattern_z"}  # what differs by diagnosis
EFFECTS = tuple(PLANTED)


SITES = (
    Site("north", tr=2.0, voxel_mm=3.0, axcodes="LAS", intensity=800.0, dtype="int16"),
    Site("south", tr=1.5, voxel_mm=4.0, axcodes="RAS", intensity=12000.0, dtype="float32"),
    Site("west", tr=2.5, voxel_mm=3.5, axcodes="PIR", intensity=300.0, dtype="int16"),
)


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
        effect_on: what the diagnosis changes: the "coupling" between limbic regions and cerebellum, their
            "intensity", or the coupling of the "pattern" inside their labels, which label means do not show.

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
    if is_written(folder, "truth.json", truth["parameters"], plan["participant_id"]):
        logger.info("%s already holds this cohort; nothing to do", folder)
        return folder
    with written_cohort(folder) as draft:
        write_tables(draft, plan, truth)
        places = {site.name: (site, site_anatomy(site.voxel_mm)) for site in sites}
        for number, subject in enumerate(tqdm(plan.to_dict("records"), desc="synthetic cohort", unit="subject")):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
            write_subject(draft, subject, *places[subject["site"]], duration_s, rng)
    return folder


def plan_cohort(
    subjects: int, effect: float, seed: int, sites: Sequence[Site], effect_on: str = "coupling"
) -> pd.DataFrame:
    """Draw who is in the cohort, and each subject's coupling, intensity and coupling of patterns.

    Args:
        subjects: at least 4.
        effect: Cohen's d, 0 to 10.
        seed: at least 0.
        sites: at least one, with different names.
        effect_on: one of `EFFECTS`.

    Returns:
        One row per subject: participant_id, site, diagnosis ("control" or "adhd"), age (years, 7–21), sex
        ("F" or "M"), coupling_z, intensity (0 unless the effect is on it), pattern_z. Diagnoses are balanced
        within each site, to within one subject.

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
    patterns = rng.spawn(1)[0].normal(MEAN_Z, SD_Z, subjects)  # the same draw whatever the effect is on
    plan = pd.DataFrame(
        {
            "participant_id": [f"sub-{number:0{width}d}" for number in range(1, subjects + 1)],
            "site": [names[index] for index in site_of],
            "diagnosis": np.where(case, "adhd", "control"),
            "age": rng.uniform(7, 21, subjects).round(1),
            "sex": rng.choice(["F", "M"], subjects),
            "coupling_z": rng.normal(MEAN_Z, SD_Z, subjects) + SD_Z * shift * (effect_on == "coupling"),
        }
    )
    on_intensity = effect_on == "intensity"
    return plan.assign(
        intensity=SD_INTENSITY * (rng.standard_normal(subjects) + shift) if on_intensity else 0.0,
        pattern_z=patterns + SD_Z * shift * (effect_on == "pattern"),
    )


def describe(
    plan: pd.DataFrame, effect: float, seed: int, sites: Sequence[Site], duration_s: float, effect_on: str
) -> dict[str, Any]:
    """Return what `truth.json` holds; `parameters` alone decide whether two cohorts are the same."""
    case = plan["diagnosis"] == "adhd"
    planted = plan[PLANTED[effect_on]]

    def mean_z(of: str) -> dict[str, float]:
        return {"control": MEAN_Z, "adhd": MEAN_Z + SD_Z * effect * (effect_on == of)}

    cases, controls = planted[case], planted[~case]
    pooled_sd = math.sqrt((cases.var() + controls.var()) / 2)
    return {
        "parameters": {
            "format": 3,
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
            "pattern": "pattern_z: the Fisher z of the correlation, over the run, between the latents of the patterns "
            f"inside the labels of {COUPLED[0]} and {COUPLED[1]}, which no label's mean signal shows",
        }[effect_on],
        "regions": list(COUPLED),
        "coupling_z_mean": mean_z("coupling"),
        "coupling_z_sd": SD_Z,
        "pattern_z_mean": mean_z("pattern"),
        "pattern_z_sd": SD_Z,
        "intensity_sd": SD_INTENSITY if effect_on == "intensity" else 0.0,
        "best_auroc": float(norm.cdf(effect / math.sqrt(2))),
        "effect_in_this_sample": float((cases.mean() - controls.mean()) / pooled_sd),
        "band_hz": list(BAND_HZ),
        "fraction_of_mean": {"signal": SIGNAL, "noise": NOISE, "drift": DRIFT},
        **{name: dict(zip(plan["participant_id"], plan[name].tolist(), strict=True)) for name in PLANTED.values()},
        "versions": {name: version(name) for name in ("numpy", "nibabel", "nilearn")},
    }


def write_tables(folder: Path, plan: pd.DataFrame, truth: dict[str, Any]) -> None:
    """Write the files at the top of the folder."""
    name = "Synthetic resting-state cohort with a planted limbic–cerebellar difference"
    write_description(folder, name, "bundle.experiments.synthetic.make_cohort")
    write_json(folder / "truth.json", truth)
    plan.drop(columns=list(PLANTED.values())).to_csv(folder / "participants.tsv", sep="\t", index=False)


def frame_count(duration_s: float, site: Site) -> int:
    """Return the number of frames of a run.

    Raises:
        InputError: the duration is not 1 second to 1 day.
    """
    if not 1 <= duration_s <= 86400:
        raise InputError(f"duration_s must be 1 to 86400 seconds, not {duration_s}.")
    return round(duration_s / site.tr)


def pattern_change(anatomy: Anatomy, patterns: pd.DataFrame) -> np.ndarray:
    """Return what the pattern latents, (frames, groups), add to the fractional change: (v, frames) float32."""
    numbers = np.unique(anatomy.labels[anatomy.labels > 0])
    return SIGNAL * anatomy.pattern[:, None] * of_voxels(latents_of(patterns, numbers), numbers, anatomy.labels)


def voxel_signals(
    anatomy: Anatomy, latents: pd.DataFrame, patterns: pd.DataFrame, intensity: float, tr: float,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return the BOLD signal of the brain's voxels, (v, frames) float32, around the anatomy's mean.

    The mean of the coupled regions' voxels is raised by the fraction `intensity`.
    """
    numbers = np.unique(anatomy.labels[anatomy.labels > 0])
    change = of_voxels(SIGNAL * label_signals(latents, numbers, tr, rng), numbers, anatomy.labels)
    change += pattern_change(anatomy, patterns)
    add_noise(change, anatomy, rng)
    coupled = np.isin(anatomy.labels, [number for name in COUPLED for number in REGIONS[name]])
    mean = anatomy.mean * np.where(coupled, 1 + intensity, 1).astype(np.float32)
    return mean[:, None] * (1 + change)


def write_subject(
    folder: Path, subject: dict[str, Any], site: Site, anatomy: Anatomy, duration_s: float, rng: np.random.Generator
) -> None:
    """Write a subject's run, brain mask, sidecar and planted latents; the diagnosis is not used."""
    name, frames = str(subject["participant_id"]), frame_count(duration_s, site)
    latents = group_latents(subject["coupling_z"], frames, site.tr, rng)
    patterns = group_latents(subject["pattern_z"], frames, site.tr, rng.spawn(1)[0])  # leaves the other draws alone
    values = voxel_signals(anatomy, latents, patterns, subject["intensity"], site.tr, rng)
    func = write_run(folder, name, "rest", values, site, anatomy)
    table = pd.concat([latents, patterns.add_prefix("pattern_")], axis=1)
    path = func / f"{name}_task-rest_desc-latent_timeseries.tsv"
    table.to_csv(path, sep="\t", index=False, float_format="%.6f")
