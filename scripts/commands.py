"""The commands, each one call into `bundle`; `scripts.demo` strings them together."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser

from bundle.anatomy.atlas import AAL3, load_atlas, region_table
from bundle.data.splits import count_table, make_splits, save_all_splits, save_splits
from bundle.deploy.export import export_run
from bundle.deploy.published import convert_file
from bundle.dicom.convert import convert_folder
from bundle.errors import unwrapped
from bundle.evaluation.figures import mask_overlay
from bundle.experiments import painted
from bundle.experiments.gallery import draw_all
from bundle.experiments.synthetic import make_cohort
from bundle.files import ROOT
from bundle.preparation.chain import prepare_config
from bundle.preparation.preflight import preflight as look_at_runs
from bundle.preparation.prepare import refuse_failed_rows
from bundle.preparation.store import read_manifest


def regions(atlas: str = AAL3) -> None:
    """Print an atlas's regions, its groups, as TSV: name, voxels on the 2 mm grid, percent of labelled voxels, labels.

    Args:
        atlas: AAL3, AAL116, HarvardOxford, Destrieux, Schaefer100 to Schaefer1000; or a label image in MNI space, NIfTI
            in any orientation, with its table beside it: X.tsv of X.nii.gz, with columns index, name and group.
    """
    rows = region_table(load_atlas(atlas))
    _print_tsv([{"name": row.pop("region")} | row | {"labels": _ranges(row["labels"])} for row in rows])


def synthesize(
    folder: str,
    subjects: int = 24,
    effect: float = 0.8,
    seed: int = 0,
    duration_s: float = 60.0,
    effect_on: str = "coupling",
) -> None:
    """Write a synthetic multi-site cohort, laid out like fMRIPrep derivatives.

    Args:
        folder: where to write it.
        subjects: number of subjects.
        effect: planted group difference, Cohen's d; 0 plants none.
        seed: seed of everything random.
        duration_s: length of each run in seconds.
        effect_on: what differs: the "coupling" of limbic regions and cerebellum, their "intensity", or the coupling of
            the "pattern" inside their labels, which label means do not show.
    """
    make_cohort(folder, subjects=subjects, effect=effect, seed=seed, duration_s=duration_s, effect_on=effect_on)


def paint(
    series: str,
    folder: str,
    participants: str,
    atlas: str,
    column: str,
    case: str | None = None,
    threshold: float | None = None,
    where: str | None = None,
    tr: float = 2.0,
    voxel_mm: float = 3.0,
    frames: int | None = None,
    seed: int = 0,
) -> None:
    """Paint real region time courses into MNI volumes, laid out like fMRIPrep derivatives.

    Args:
        series: .npz with the arrays subjects (n) and series (n, frames, labels).
        folder: where to write.
        participants: table with the column participant_id and those named below.
        atlas: as for `regions`; its labels in ascending order are the columns of the series.
        column: column of the participants' table that makes someone a case or a control.
        case: values of the column that make a case, with commas between; all others make a control.
        threshold: instead of case: who has at least this number is a case.
        where: COLUMN=VALUE of the participants to paint; all others are left out.
        tr: time between frames in seconds.
        voxel_mm: edge of the voxels in mm.
        frames: how many frames to take, from the first; by default all.
        seed: seed of the noise.
    """
    painted.paint(
        series, folder, participants, atlas, column, case, threshold, where, tr, voxel_mm, frames, seed
    )  # fmt: skip


def dicom(source: str, out: str, salt: str | None = None, stopped: bool = False) -> None:
    """Convert the BOLD series of a DICOM folder to BIDS-named NIfTI in their own space, with nothing personal in them.

    Field maps, diffusion, localisers and the like are sorted out. A BOLD series that is damaged or not complete never
    stops the others: it is named at the end and in OUT/summary.tsv, and the exit status is then not 0.

    Args:
        source: folder with DICOM files of any number of series, also in folders within it.
        out: new folder.
        salt: file of your own whose content goes into the hashes that become names: only who has it can find out which
            UID a name is of.
        stopped: accept a series that holds fewer volumes than the scanner was to take, from the first without a gap.
    """
    convert_folder(source, out, salt, stopped)


def prepare(
    source: str,
    store: str,
    dry_run: bool = False,
    layout: str | None = None,
    participants: str | None = None,
    labels: str | None = None,
    tr: float | None = None,
    space: str | None = None,
    register: str | None = None,
    min_overlap: float | None = None,
    atlas: str | None = None,
    min_coverage: float | None = None,
    on_low_coverage: str | None = None,
    confounds: str | tuple | None = None,
    max_fd: float | None = None,
    high_pass: float | None = None,
    low_pass: float | None = None,
    pictures: bool | None = None,
    rehash: bool | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
) -> None:
    """Bring runs in MNI space onto the 2 mm grid and to 0.8 s, z-score them, and store them.

    Runs configs/prepare.json, where the defaults stand. Run again, it does only what is not done or has changed. A run
    that cannot be used never stops the others: it is named at the end, in STORE/summary.tsv and in STORE/report.html,
    and the exit status is then not 0.

    Args:
        source: folder (BIDS derivatives, ADHD-200, nilearn's ADHD sample, or plain NIfTI files), glob in quotes, or a
            .csv or .tsv table with columns participant_id and bold and, if you like, mask, confounds, tr, space,
            site, diagnosis.
        store: folder of the prepared store.
        dry_run: store nothing; write what `preflight` writes, to STORE-preflight.
        layout: auto, bids, adhd200, nilearn-adhd, files or table.
        participants: table of participants (ADHD-200: of phenotypes), if it is not beside the runs.
        labels: "required": every participant must have a row and a site in the table; or "optional".
        tr: repetition time of every run, seconds, over what the files say.
        space: your word that every run is in this space, e.g. MNI.
        register: "affine": take runs in their own space, correct motion and register each by one affine transform. This
            is no substitute for fMRIPrep, and another preparation: models of fMRIPrep's data refuse it.
        min_overlap: least share of the MNI152 brain mask that a run must cover.
        atlas: as for `regions`: of whose groups the coverage is reported.
        min_coverage: share of each of the atlas's groups below which a run's coverage is low.
        on_low_coverage: "warn" or "exclude".
        confounds: to regress out: strategies of nilearn's load_confounds, e.g. motion,wm_csf, or "table" for the run's
            own table; none by default.
        max_fd: censor frames with more framewise displacement, mm; none by default.
        high_pass: lowest frequency kept, Hz; all by default.
        low_pass: highest frequency kept, Hz; all by default.
        pictures: draw each run's mean BOLD with contours of its brain mask and of the regions into the report.
        rehash: read every source file again; else those whose size and times are those of the last time are taken for
            unchanged.
        workers: runs prepared at a time, each by a process of its own.
        scheduler: address of a Dask scheduler, e.g. tcp://host:8786, to use its workers instead.
    """
    config = prepare_config(
        dataset_dir=source, output_dir=store, layout=layout, participants=participants, labels=labels, tr=tr,
        space=space, register=register, min_overlap=min_overlap, atlas=atlas, min_coverage=min_coverage,
        on_low_coverage=on_low_coverage, confounds=list(confounds) if isinstance(confounds, tuple) else confounds,
        max_fd=max_fd, high_pass=high_pass, low_pass=low_pass, pictures=pictures, rehash=rehash, workers=workers,
        scheduler=scheduler,
    )  # fmt: skip
    if dry_run:
        _look(config, f"{store.rstrip('/')}-preflight", config["pictures"])
    else:
        with unwrapped():
            config.get_parsed_content("run#0")


def preflight(
    source: str,
    report: str = "preflight",
    layout: str | None = None,
    participants: str | None = None,
    labels: str | None = None,
    tr: float | None = None,
    space: str | None = None,
    register: str | None = None,
    min_overlap: float | None = None,
    atlas: str | None = None,
    min_coverage: float | None = None,
    pictures: bool = True,
    workers: int | None = None,
    scheduler: str | None = None,
) -> None:
    """Look at every run as preparation would, store nothing, and report: a page with pictures, and TSV.

    Args:
        source: as for `prepare`.
        report: folder for preflight.html and preflight.tsv.
        layout: as for `prepare`.
        participants: as for `prepare`.
        labels: as for `prepare`.
        tr: as for `prepare`.
        space: as for `prepare`.
        register: as for `prepare`.
        min_overlap: as for `prepare`.
        atlas: as for `prepare`.
        min_coverage: as for `prepare`.
        pictures: draw each run's mean BOLD with contours of its brain mask and of the regions.
        workers: as for `prepare`.
        scheduler: as for `prepare`.
    """
    config = prepare_config(
        dataset_dir=source, layout=layout, participants=participants, labels=labels, tr=tr, space=space,
        register=register, min_overlap=min_overlap, atlas=atlas, min_coverage=min_coverage, workers=workers,
        scheduler=scheduler,
    )  # fmt: skip
    _look(config, report, pictures)


def _look(config: ConfigParser, report: str, pictures: bool = True) -> None:
    with unwrapped():
        runs, preparation = config.get_parsed_content("runs"), config.get_parsed_content("preparation")
    rows = look_at_runs(runs, report, preparation, config["workers"], config["scheduler"], pictures)
    refuse_failed_rows(rows)


def export(
    store: str,
    run: str,
    out: str,
    units: str = "original",
    start: int = 0,
    frames: int | None = None,
    array: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Write a stored run, or an array on its grid, as NIfTI in MNI space.

    Args:
        store: the prepared store.
        run: run id, e.g. sub-01_task-rest.
        out: .nii or .nii.gz to write.
        units: "original" undoes the z-scores; "z" leaves values as they are.
        start: first frame.
        frames: how many; by default all from the first.
        array: .npy or .pt file to write instead of the run, e.g. a reconstruction or an attribution map.
        checkpoint: the network that made the array, whose units it has.
    """
    export_run(store, run, out, units, start, frames, array, checkpoint)


def splits(
    store: str,
    file: str | None = None,
    folds: int = 10,
    fold: int = 0,
    seed: int = 0,
    test_site: str | None = None,
    all_folds: bool = False,
    all_sites: bool = False,
    target: str = "diagnosis",
    task: str | None = None,
    classes: list | None = None,
) -> None:
    """Split the subjects of a store by site and class, write the split file and print its counts as TSV.

    Args:
        store: the prepared store.
        file: split file to write; by default STORE/splits.json. With all_folds or all_sites a folder, by default
            STORE/splits.
        folds: equal folds, of which one tests and one validates; 10 give 8:1:1.
        fold: which fold tests.
        seed: seed of the shuffle.
        test_site: leave this site out for testing instead.
        all_folds: write fold-0.json, fold-1.json ..., each fold testing once.
        all_sites: write site-<name>.json for each site left out once.
        target: column of the participants' table whose classes, or parts of whose range, every set is to hold.
        task: binary, multiclass or regression, where the column does not say it.
        classes: values of the column that are classes, in their order; all by default.
    """
    runs = read_manifest(store)["runs"]
    by: dict[str, Any] = {"target": target, "task": task, "classes": classes}
    if all_folds or all_sites:
        _print_tsv(save_all_splits(runs, file or Path(store) / "splits", folds, seed, by_site=all_sites, **by))
        return
    made = make_splits(runs, folds=folds, fold=fold, seed=seed, test_site=test_site, **by)
    save_splits(made, file or Path(store) / "splits.json")
    _print_tsv(count_table(made, runs, **by))


def overlay(store: str, run: str, png: str, regions: str | list = "limbic", atlas: str = AAL3) -> None:
    """Draw the mask of some regions over the mean BOLD of a stored run, to look at.

    Args:
        store: the prepared store.
        run: run id, e.g. sub-01_task-rest.
        png: picture to write.
        regions: a region or a list of them, as in configs/pretrain.json.
        atlas: as for `regions`.
    """
    mask_overlay(store, run, png, regions, load_atlas(atlas))


def pictures(store: str, checkpoint: str, folder: str = "docs/pictures", run: str | None = None) -> None:
    """Draw the documentation's pictures: method.png, regions.png and masks.png.

    Args:
        store: prepared store of a synthetic cohort, with its split file, e.g. the demo's.
        checkpoint: of a pretrained network whose frames and regions are drawn.
        folder: where the pictures go.
        run: run id; by default the first of a test subject.
    """
    draw_all(store, checkpoint, folder, run)


def convert(published: str, checkpoint: str) -> None:
    """Convert a published NeuroSTORM checkpoint to this bundle's names, and print what became of every key.

    Args:
        published: the published .ckpt or .pt.
        checkpoint: file to write.
    """
    print(json.dumps(convert_file(published, checkpoint), indent=1))


def where() -> None:
    """Print the folder of this bundle, which holds configs/: the --bundle_root of runs from another folder."""
    print(ROOT)


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as in the paper's Table 1: 1-16,19-32."""
    text, last = "", None
    for number in numbers:
        if last is None or number > last + 1:
            text += f",{number}"
        elif number + 1 not in numbers:
            text += f"-{number}"
        last = number
    return text[1:]


def _print_tsv(rows: list[dict]) -> None:
    pd.DataFrame(rows).to_csv(sys.stdout, sep="\t", index=False, float_format="%.2f")
