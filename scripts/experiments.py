"""Commands for whole experiments: the sweep over masking strategies, its report, and the truth test."""

from pathlib import Path

from bundle.errors import InputError
from bundle.experiments import downstream as tasks_by_heads
from bundle.experiments.auroc import without_controls
from bundle.experiments.dynamics import read_plan, rebuilt, rebuilt_differences, run_plan, write_tables
from bundle.experiments.one_run import one_run as rebuild_one_run
from bundle.experiments.one_run import pretraining_overrides
from bundle.experiments.report import write_report
from bundle.experiments.statistics import finished_trials
from bundle.experiments.sweep import read_sweep, run_sweep
from bundle.experiments.truth import summarise, truth_test


def sweep(
    config: str,
    store: str | None = None,
    results: str | None = None,
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Run masking strategies x seeds x folds and baselines, then write the report; run again, it goes on.

    Every trial pretrains, trains a classifier on the frozen encoder and tests it once over subjects. What is finished
    is never run again. A trial that fails stops no other; it is named at the end, and the exit status is then 1.

    Args:
        config: JSON file of the sweep, e.g. configs/sweeps/paper.json.
        store: prepared store, instead of the file's.
        results: folder of the results, instead of the file's.
        workers: trials at a time on this machine.
        scheduler: address of a Dask scheduler, e.g. tcp://host:8786, whose workers run the trials instead.
    """
    plan = read_sweep(config, store=store, results=results)
    failures = run_sweep(plan, workers=workers, scheduler=scheduler)
    if finished_trials(plan.results):
        write_report(plan.results)
    if failures:
        raise InputError(f"{len(failures)} trials failed; run again to go on. " + "; ".join(failures))


def report(results: str, resamples: int = 2000) -> None:
    """Write report.html and report.md of a results folder, from that folder alone.

    Args:
        results: folder of a sweep's results.
        resamples: bootstrap resamples and permutations.
    """
    write_report(results, resamples=resamples)


def dynamics(
    config: str = "configs/dynamics.json",
    results: str | None = None,
    cohorts: list | None = None,
    workers: int = 1,
) -> None:
    """Test what readouts of frozen encoders, and plain connectivity, see on cohorts whose truth is known.

    Pretrains the encoders, tests them on every cohort, and writes dynamics.csv, dynamics_differences.csv,
    dynamics_r2.csv, dynamics_r2_differences.csv and dynamics.png; run again, it goes on.

    Args:
        config: JSON file of the plan.
        results: folder of the results, instead of the plan's.
        cohorts: names of cohorts, instead of the plan's.
        workers: pretrainings, and then cohorts, at a time on this machine.
    """
    plan = read_plan(config, results=results, cohorts=cohorts)
    table, compared = write_tables(plan, run_plan(plan, workers))
    print("Temporal R² of hidden regions of test subjects of a SYNTHETIC cohort")
    print(rebuilt(plan).to_string(index=False, float_format="%.3f"))
    if len(better := rebuilt_differences(plan)):
        print("\nDifferences of temporal R² on the same subjects")
        print(better.to_string(index=False, float_format="%.3f"))
    if table.empty:
        return
    plain = without_controls(table)
    print("\nAUROC over subjects of SYNTHETIC cohorts, or of real time courses painted into MNI volumes")
    print(plain.drop(columns=["size", "shuffled", "shifted"]).to_string(index=False, float_format="%.3f"))
    print("\nDifferences on the same subjects")
    print(compared.to_string(index=False, float_format="%.3f"))


def downstream(
    config: str = "configs/downstream.json", results: str | None = None, workers: int = 1, page: str | None = None
) -> None:
    """Compare heads on several tasks of synthetic and painted cohorts, with baselines, in one table; resumable.

    Writes RESULTS/downstream.csv with all measures, and RESULTS/downstream.md with the tables. A trial that fails stops
    no other; the exit status is then 1, and no table is written.

    Args:
        config: JSON file of the plan.
        results: folder of the results, instead of the plan's.
        workers: trials at a time on this machine.
        page: a page that gets the tables, between its two lines for them, e.g. docs/downstream.md.
    """
    plan = tasks_by_heads.read_plan(config, results)
    if page is not None:
        tasks_by_heads.around_tables(page)  # before hours of work
    failures = tasks_by_heads.run_plan(plan, workers)
    if failures:
        raise InputError(f"{len(failures)} trials failed; run again to go on. " + "; ".join(failures))
    tasks_by_heads.write_tables(plan, page)
    print("SYNTHETIC data, or real time courses painted into MNI volumes")
    print((Path(plan.results) / "downstream.md").read_text())


def one_run(
    bold: str,
    folder: str,
    config: str = "configs/dynamics.json",
    mask: str = "region_tubes",
    modes: tuple = ("run", "voxel"),
    epochs: int = 60,
) -> None:
    """Train on the beginning of one real run, and rebuild hidden regions of its last fifth, beside ridge regression.

    Args:
        bold: a run in MNI space, NIfTI.
        folder: where everything goes; one_run.csv is written there. Run again, it goes on.
        config: plan whose pretraining says how large the network is, and how it is trained.
        mask: what is hidden in training, an overlay of configs/masks.
        modes: normalisations to compare.
        epochs: of training.
    """
    table = rebuild_one_run(bold, folder, pretraining_overrides(config) | {"max_epochs": epochs}, mask, modes)
    print("Temporal R² of hidden regions in the last fifth of ONE run")
    print(table.pivot(index="region", columns=["normalisation", "model"], values="temporal_r2").round(3).to_string())


def truth(
    folder: str = "truth",
    config: str = "configs/sweeps/truth.json",
    planted: tuple = ("nothing", "coupling", "intensity", "pattern"),
    effect: float = 2.0,
    seeds: tuple = (0, 1, 2, 3, 4),
    subjects: int = 48,
    workers: int = 1,
) -> None:
    """Check on SYNTHETIC cohorts that a planted effect is found, and that nothing is found without one.

    Args:
        folder: where the cohorts and the results go; truth.csv and truth_summary.json are written there.
        config: JSON file of the sweep to run on each cohort.
        planted: "nothing", or what the diagnosis changes in limbic regions and cerebellum: "coupling",
            "intensity", "pattern".
        effect: size of the planted effects, Cohen's d.
        seeds: seeds of the cohorts.
        subjects: size of each cohort.
        workers: trials at a time on this machine.
    """
    table = truth_test(folder, read_sweep(config), planted, effect, seeds, subjects, workers=workers)
    print("SYNTHETIC data: AUROC over subjects, and how many cohorts' 95 % intervals are above, or cover, chance")
    print(summarise(table).to_string(index=False, float_format="%.3f"))
