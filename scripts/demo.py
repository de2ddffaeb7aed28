"""The whole walk on made-up data: cohort, preparation, split, pretraining, classification, test."""

import json
import logging
from pathlib import Path

import pandas as pd

from bundle.errors import InputError
from bundle.experiments.demo_report import write_demo_report
from bundle.process import run_config
from scripts.commands import prepare, splits, synthesize
from scripts.serving import package, release

logger = logging.getLogger(__name__)

EFFECT = "coupling"
MASK, READOUT = "masks/region_tubes", "readouts/covariance"
EXAMPLE = "brain_fmri_synthetic_example"


def demo(folder: str = "demo", subjects: int = 48, effect: float = 4.0, seed: int = 0) -> None:
    """Make a synthetic cohort and run the main job on it; run again, it goes on where it was interrupted.

    The cohort is made up, with a large group difference planted in how limbic and cerebellar regions vary together over
    time, which no single frame shows; the scores say that the software works, and nothing about ADHD.
    FOLDER/report.html shows it all.

    Args:
        folder: where everything goes.
        subjects: size of the cohort, 24 or more: cases and controls over three sites, four of each.
        effect: planted group difference, Cohen's d (0: none, and scores must be at chance).
        seed: seed of the cohort, the split and the training.
    """
    if subjects < 24:
        raise InputError(f"the demo needs 24 subjects or more, so that every fold holds all groups, not {subjects}")
    base = Path(folder).resolve()
    derivatives, store = base / "derivatives", base / "store"
    logger.info("Step 1 of 6: make a synthetic cohort of %d subjects in %s", subjects, derivatives)
    synthesize(str(derivatives), subjects=subjects, effect=effect, seed=seed, effect_on=EFFECT)
    logger.info("Step 2 of 6: bring every run onto the 2 mm grid and to 0.8 s, z-score it, and store it")
    prepare(str(derivatives), str(store))
    logger.info("Step 3 of 6: split the subjects by site and diagnosis")
    splits(str(store), folds=4, seed=seed)
    logger.info("Step 4 of 6: pretrain by reconstructing half of the brain: a region, and random tubes of the rest")
    common = {"dataset_dir": str(store), "seed": seed}
    run_config("pretrain", ["pretrain", MASK, "demo"], common | {"output_dir": str(base / "pretrain")})
    logger.info("Step 5 of 6: fit the covariance readout to the frozen encoder's features of whole runs")
    common |= {"output_dir": str(base / "train"), "encoder_checkpoint": str(base / "pretrain" / "best.pt")}
    run_config("run", ["train", READOUT, "demo"], common)
    logger.info("Step 6 of 6: test the best classifier once, over subjects")
    run_config("run", ["train", READOUT, "evaluate", "demo"], common)
    release(str(base / "train" / "best.pt"), str(base / "models"))
    page = write_demo_report(base)
    report(base / "train" / "evaluation")
    print(f"\nEverything is in {base}; to look at it, open {page.as_uri()}")


def example(folder: str = "example", subjects: int = 48, effect: float = 4.0, seed: int = 0) -> None:
    """Train the small model that is packaged for the zoo, on a SYNTHETIC cohort; run again, it goes on.

    The planted difference is one of brightness, which every frame shows: a mean token finds it, and the scores say
    nothing about ADHD. FOLDER/package holds the bundle.

    Args:
        folder: where everything goes.
        subjects: size of the cohort, 24 or more.
        effect: planted group difference, Cohen's d.
        seed: seed of the cohort, the split and the training.
    """
    if subjects < 24:
        raise InputError(f"the example needs 24 subjects or more, not {subjects}")
    base = Path(folder).resolve()
    derivatives, store = base / "derivatives", base / "store"
    synthesize(str(derivatives), subjects=subjects, effect=effect, seed=seed, effect_on="intensity")
    prepare(str(derivatives), str(store))
    splits(str(store), folds=4, seed=seed)
    common = {"dataset_dir": str(store), "seed": seed}
    own = ["published", "demo"]  # z over the run, in which brightness is seen
    run_config("pretrain", ["pretrain", *own], common | {"output_dir": str(base / "pretrain"), "max_epochs": 1})
    common |= {"output_dir": str(base / "train"), "encoder_checkpoint": str(base / "pretrain" / "best.pt")}
    for last in ([], ["evaluate"]):
        run_config("run", ["train", *own, *last], common | {"max_epochs": 20})
    release(str(base / "train" / "best.pt"), str(base / "models"))
    data = (
        f"SYNTHETIC: a made-up cohort of {subjects} subjects at three sites, with a planted difference in brightness "
        f"(d = {effect:g}); no person was scanned, and nothing follows for patients."
    )
    command = f"python -m scripts example --subjects {subjects} --effect {effect:g} --seed {seed}"
    package(
        str(base / "models" / "model.pt"),
        str(base / "package"),
        str(base / "train" / "evaluation"),
        EXAMPLE,
        data,
        command,
        "Synthetic example of region-masked 4D-fMRI pretraining",
    )
    report(base / "train" / "evaluation")


def report(folder: Path) -> None:
    """Print the subjects' scores and the test's table."""
    summary = json.loads((folder / "scores.json").read_text())
    print("\nTest subjects (SYNTHETIC data: these scores say nothing about ADHD)")
    print(pd.read_csv(folder / "subjects.tsv", sep="\t").to_string(index=False, float_format="%.3f"))
    print("\nScores with 95 % bootstrap intervals over subjects (SYNTHETIC data)")
    scores = pd.DataFrame(summary["scores"]).T.astype(float)  # null, for undefined, to NaN
    print(scores.to_string(float_format="%.3f", na_rep="–"))
