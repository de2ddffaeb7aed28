"""Tasks x heads: each task has the heads and baselines that it can have, and the tables hold what the trials scored.

The stages of networks are replaced by one that writes what they write; configs and networks are tested elsewhere.
Not covered: how good the heads are (docs/downstream.md), painted images (test_painted.py).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_stores import planted_store

from bundle.data.splits import load_splits
from bundle.data.targets import read_target
from bundle.errors import InputError
from bundle.evaluation.subjects import write_test_scores
from bundle.experiments import downstream, trial, truth
from bundle.experiments.downstream import TABLE, read_plan, run_plan, write_tables
from bundle.files import ROOT
from bundle.tasks.kinds import task_of

PLAN = {
    "cohorts": {
        "made up": {"subjects": 36, "planted": "coupling", "effect": 2.0, "seed": 0, "duration_s": 60.0},
        "painted": {"painted": {"series": "x.npz"}},
    },
    "tasks": {
        "group": {"cohort": "made up", "target": "diagnosis"},
        "scanner": {"cohort": "made up", "target": "site", "classes": ["north", "south", "west"]},
        "age": {"cohort": "painted", "target": "age"},
    },
    "sweep": {
        "splits": {"folds": 3, "test": [0]},
        "strategies": [
            {"name": "linear", "mask": "random_tube"},
            {"name": "covariance", "mask": "random_tube", "readout": "covariance"},
        ],
        "baselines": [
            "majority", "training_mean", "site",
            {"baseline": "connectivity_logistic", "harmonise": "combat"},
            {"baseline": "connectivity_ridge", "harmonise": "combat"},
        ],
        "configs": ["demo"],
        "steps": [],
        "bootstrap_resamples": 20,
    },
}  # fmt: skip


def stage(run_id, configs, overrides, log=None, lock=None, directory=None) -> None:
    """What each config writes; a mean, and no covariance, has trained parameters."""
    output = Path(overrides["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    STARTED.append(tuple(configs))
    with Path(log).open("a") as file:
        if "readouts/covariance" not in configs and "train" in configs:
            file.write("09:38:18 INFO bundle.training.parameters: Classifier: 97 of 315049 parameters are trained\n")
    if "pretrain" in configs:
        PRETRAINED.setdefault(output.resolve(), overrides)
        assert PRETRAINED[output.resolve()] == overrides  # a checkpoint is refused under other options
    if "reidentify" in configs:
        rows = [(name, rank, 0.5) for name in ("mean token", "brain mask") for rank in (1, 5)]
        table = pd.DataFrame(rows, columns=["features", "rank", "share"]).assign(low=0.25, high=0.75, chance=0.1)
        (output / "reidentification").mkdir()
        table.to_csv(output / "reidentification" / "reidentification.csv", index=False)
    if "evaluate" in configs:
        target = read_target(overrides["dataset_dir"], **{key: overrides[key] for key in ("target", "task", "classes")})
        task = task_of(target, overrides["splits_file"])
        sets, rng = load_splits(overrides["splits_file"])["sets"], np.random.default_rng(len(configs))
        tables = {}
        for name in ("validation", "test"):
            labels = [target.labels[who] for who in sets[name]]
            tables[name] = pd.DataFrame({"participant_id": sets[name], "site": "A", "label": labels, "clips": 1})
            tables[name][list(task.columns)] = rng.normal(size=(len(labels), task.outputs))
        write_test_scores(task, tables["validation"], tables["test"], output / "evaluation", 20)


STARTED: list[tuple[str, ...]] = []
PRETRAINED: dict[Path, dict] = {}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """A plan that was run, and its table's rows."""
    folder = tmp_path_factory.mktemp("downstream")
    with pytest.MonkeyPatch.context() as patch:
        for module in (downstream, trial):
            patch.setattr(module, "run_config", stage)

        def cohort(place: Path, subjects: int, effect: float, seed: int, **_: object) -> Path:
            return planted_store(place, subjects, effect, seed, frames=60, per_label=16, every=20)

        def painted(source: Path, store: Path) -> Path:
            """Of one site."""
            made = planted_store(source.parent, 36, 0.0, frames=60, per_label=16, every=20)
            manifest = json.loads((made / "manifest.json").read_text())
            for run in manifest["runs"]:
                run["site"] = "painted"
            (made / "manifest.json").write_text(json.dumps(manifest))
            return made

        patch.setattr(downstream, "prepared_cohort", cohort)
        patch.setattr(truth, "prepared", painted)
        patch.setattr(truth, "paint", lambda folder, series: folder)
        (folder / "plan.json").write_text(json.dumps(PLAN | {"results": str(folder / "out")}))
        plan = read_plan(folder / "plan.json")
        STARTED.clear()
        assert run_plan(plan) == []
        before = len(STARTED)
        assert run_plan(plan) == []
        assert len(STARTED) == before  # what is done is not done again
        return plan, write_tables(plan, resamples=20)


def test_each_task_has_the_heads_and_the_baselines_that_it_can_have(ran):
    _, rows = ran
    heads = {"linear", "covariance"}
    assert {task: set(part["method"]) for task, part in rows.groupby("task")} == {
        "group": heads | {"majority", "site", "connectivity_logistic_combat"},
        "scanner": heads | {"majority"},  # the site is what it looks for
        "age": heads | {"training_mean"},  # and here there is one
    }
    assert set(rows.loc[~rows["baseline"], "method"]) == heads


def test_one_pretraining_serves_the_heads_of_a_task_and_re_identification_of_its_cohort(ran):
    plan, _ = ran
    assert STARTED.count(("pretrain", "masks/random_tube", "demo")) == 3
    assert STARTED.count(("pretrain", "masks/random_tube", "reidentify", "demo")) == 2
    for task in plan.tasks:
        assert len(list((Path(plan.results) / "tasks" / task / "pretrainings").glob("*.lock"))) == 1


def test_rows_are_the_trials_scores_with_parameters_and_seconds(ran):
    plan, rows = ran
    for (task, method), part in rows.groupby(["task", "method"]):
        (folder,) = (Path(plan.results) / "tasks" / task / "trials").glob(f"{method}__*/")
        scores = json.loads((folder / "scores.json").read_text())["scores"]
        record = json.loads((folder / "trial.json").read_text())
        assert part["seconds"].iloc[0] == record["seconds"]["test" if part["baseline"].all() else "train"]
        for measure, value in zip(part["measure"], part["value"], strict=True):
            expected = scores[measure]["value"]
            assert np.isnan(value) if expected is None else value == pytest.approx(expected)
    trained = rows.drop_duplicates("method").set_index("method")["trained"]
    assert trained["linear"] == 97
    assert trained["covariance"] == 0
    assert trained.drop(["linear", "covariance"]).isna().all()
    written = pd.read_csv(Path(plan.results) / "downstream.csv")
    assert written["value"].to_numpy() == pytest.approx(rows["value"].to_numpy(), abs=1e-4, nan_ok=True)


def grids(text: str) -> list[dict[str, dict[str, str]]]:
    """Markdown tables: of each row its cells by column."""
    found = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[:1] == "|"]
        if lines:
            found.append({line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]})
    return found


def test_the_page_has_a_row_per_method_and_a_column_per_task(ran):
    plan, rows = ran
    methods, pairs = grids((Path(plan.results) / "downstream.md").read_text().replace("\nTest", "\n\nTest"))
    assert list(methods)[:2] == ["linear", "covariance"]
    assert all(name[0] == name[-1] == "*" for name in list(methods)[2:])
    columns = ["group: AUROC", "scanner: macro AUROC", "age: R²", "trained parameters", "seconds"]
    assert list(methods["linear"]) == columns
    row = rows[(rows["task"] == "group") & (rows["method"] == "linear") & (rows["measure"] == "auroc")].iloc[0]
    assert methods["linear"]["group: AUROC"] == f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    assert methods["*training_mean*"]["group: AUROC"] == ""
    assert methods["linear"]["trained parameters"] == "97"
    assert methods["*majority*"]["trained parameters"] == ""
    assert pairs["mean token"]["made up, rank 1"] == "0.50 [0.25, 0.75]"
    assert set(pairs["*chance*"].values()) == {"0.10"}
    assert list(pairs["brain mask"]) == [f"{name}, rank {rank}" for name in ("made up", "painted") for rank in (1, 5)]


def test_tables_take_their_place_in_a_page_and_leave_the_rest(ran, tmp_path):
    plan, _ = ran
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{TABLE}\n\nold\n\n{TABLE}\n\nafter\n")
    for _ in range(2):
        write_tables(plan, page, resamples=20)
    made = (Path(plan.results) / "downstream.md").read_text()
    assert page.read_text() == f"# Before\n\n{TABLE}\n\n{made}\n{TABLE}\n\nafter\n"
    page.write_text("# Nothing\n")
    with pytest.raises(InputError, match="no page with two lines <!-- tables"):
        write_tables(plan, page, resamples=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "not a plan"),
        ({"tasks": {"a": {"target": "age"}}}, "not a plan"),
        ({"tasks": {"a b": {"cohort": "painted"}, "a_b": {"cohort": "painted"}}}, "would both be filed under 'a_b'"),
        ({"tasks": {"a": {"cohort": "other"}}}, "the task 'a' is of the cohort 'other'; there are made up, painted"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, changes, message):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"results": "r"} | changes))
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "plan.json")


def test_an_unknown_baseline_is_refused_by_the_sweep(ran, tmp_path):
    plan, _ = ran
    store = Path(plan.results) / "cohorts" / "made_up" / "store"
    sweep = PLAN["sweep"] | {"baselines": ["luck"]}
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"results": str(tmp_path), "sweep": sweep}))
    with pytest.raises(InputError, match="baseline 'luck' is unknown"):
        downstream._sweep(read_plan(tmp_path / "plan.json"), "group", store)


def test_the_ready_made_plan_is_valid():
    plan = read_plan(ROOT / "configs" / "downstream.json")
    assert {task["cohort"] for task in plan.tasks.values()} == set(plan.cohorts)
