"""Every config runs for one epoch on tiny NIfTIs, as `python -m monai.bundle run` would run it.

Not covered here: full-size networks and GPUs (see docs/performance.md).
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigWorkflow, load, verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_configs import CONFIGS, ROOT, TINY, run, sentence, workflow

from bundle.command_line import refuse_unknown_options
from bundle.data.splits import make_splits, save_splits
from bundle.deploy.release import release
from bundle.errors import InputError
from bundle.preparation.chain import load_preparation
from bundle.preparation.store import read_manifest
from bundle.training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def output(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining, classification and test, each run once."""
    folder = tmp_path_factory.mktemp("output")
    run("pretrain", dataset_dir=str(store), output_dir=str(folder / "pretrain"))
    classify(store, folder)
    classify(store, folder, "evaluate")
    release(folder / "train" / "best.pt", folder / "models")
    return folder


def classify(store: Path, folder: Path, *overlays: str, **overrides: object) -> ConfigWorkflow:
    settings = {
        "dataset_dir": str(store),
        "output_dir": str(folder / "train"),
        "encoder_checkpoint": str(folder / "pretrain" / "best.pt"),
    }
    return run("train", *overlays, **(settings | overrides))


def test_pretraining_leaves_checkpoints_and_scalars_and_pictures(output: Path):
    saved = load_checkpoint(output / "pretrain" / "last.pt")
    assert set(saved) == {"network", "optimizer", "epoch_loss", "trainer", "provenance", "best"}
    assert (output / "pretrain" / "best.pt").is_file()
    events = EventAccumulator(str(output / "pretrain" / "tensorboard")).Reload()
    assert {"iteration_loss", "val_masked_mse", "val_temporal_r2"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["original | masked | reconstructed"]


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_a_scalar_has_one_value_per_step(output: Path, stage: str):
    """Two handlers that wrote under one tag, by iteration and by epoch, would make its curve a zigzag."""
    events = EventAccumulator(str(output / stage / "tensorboard")).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [scalar.step for scalar in events.Scalars(tag)]
        assert len(set(steps)) == len(steps), tag


def test_the_encoder_is_bit_identical_after_classifier_training(output: Path):
    before = load_checkpoint(output / "pretrain" / "best.pt")["network"]
    after = load_checkpoint(output / "train" / "last.pt")["network"]
    encoder = [name for name in after if name.startswith("encoder.")]
    assert len(encoder) > 50
    for name in encoder:
        assert torch.equal(after[name], before[name]), name
    assert {name.split(".")[0] for name in after if not name.startswith("encoder.")} == {"norm", "head"}


def test_a_fine_tuned_encoder_has_learnt_and_is_attributed_like_a_frozen_one(output: Path, store: Path, tmp_path: Path):
    settings = {"output_dir": str(tmp_path), "freeze_encoder": False}
    classify(store, output, **settings)
    before = load_checkpoint(output / "pretrain" / "best.pt")["network"]
    after = load_checkpoint(tmp_path / "last.pt")["network"]
    encoder = [name for name in after if name.startswith("encoder.")]
    assert sum(not torch.equal(after[name], before[name]) for name in encoder) > 0.9 * len(encoder)
    classify(store, output, "attribute", **settings, levels=["group"], gradient_steps=1, bootstrap_resamples=50)
    table = pd.read_csv(tmp_path / "attribution" / "attribution.csv")
    assert np.isfinite(table["value"]).all()
    sizes = table[(table["measure"] == "size") & (table["level"] == "group")]
    assert (sizes["value"] > 0).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_the_loader_reads_clips_only_where_their_features_are_not_remembered(store: Path, freeze: bool):
    flow = workflow("train", "evaluate", dataset_dir=str(store), freeze_encoder=freeze)
    flow.initialize()
    for dataset in ("train#dataset", "validate#dataset", "dataset"):
        assert ("frames" in flow.parser.get_parsed_content(dataset)[0]) is not freeze


def test_the_test_set_is_scored_once_per_subject(output: Path, store: Path):
    subjects = pd.read_csv(output / "train" / "evaluation" / "subjects.tsv", sep="\t")
    expected = json.loads((store / "splits.json").read_text())["sets"]["test"]
    assert subjects["participant_id"].tolist() == expected
    assert (subjects["clips"] == 2).all()  # 30 frames hold two clips of 4 that begin 20 frames apart
    scores = json.loads((output / "train" / "evaluation" / "scores.json").read_text())["scores"]
    assert scores.pop("auroc_within_site")["value"] is not None  # one pair per site has no interval
    for score in scores.values():
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1


def test_an_interrupted_pretraining_resumes_to_the_same_weights(store: Path, tmp_path: Path):
    settings = {"dataset_dir": str(store)}
    run("pretrain", **settings, output_dir=str(tmp_path / "whole"), max_epochs=2)
    run("pretrain", **settings, output_dir=str(tmp_path / "parts"), max_epochs=1)
    run("pretrain", **settings, output_dir=str(tmp_path / "parts"), max_epochs=2)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for name, tensor in whole["network"].items():
        assert torch.equal(tensor, parts["network"][name]), name
    assert whole["best"] == parts["best"]
    events = EventAccumulator(str(tmp_path / "parts" / "tensorboard")).Reload()
    assert [picture.step for picture in events.Images("original | masked | reconstructed")] == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 8}, "embed_dim"),
        ({"regions": ["frontal"]}, "regions"),
        ({"mask_token": "random"}, "mask_token"),
        ({"seed": 1}, "seed"),
    ],
)
def test_resuming_under_other_settings_is_refused(output: Path, store: Path, change: dict, words: str):
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", dataset_dir=str(store), output_dir=str(output / "pretrain"), **change)
    assert f"was made with {words}" in sentence(caught.value)


def test_a_classifier_of_another_encoder_is_refused(output: Path, store: Path):
    """Else it would be taken for finished, and its scores for those of the encoder that was asked for."""
    with pytest.raises(RuntimeError) as caught:
        classify(store, output, encoder_checkpoint="random")
    assert "was made with encoder_checkpoint 'sha256 " in sentence(caught.value)
    assert "but here it is 'random'" in sentence(caught.value)


def test_an_encoder_of_another_split_is_refused(output: Path, store: Path, tmp_path: Path):
    """Else test subjects could have been seen in pretraining."""
    save_splits(make_splits(read_manifest(store)["runs"], folds=3, fold=1), tmp_path / "other.json")
    with pytest.raises(RuntimeError) as caught:
        classify(store, output, output_dir=str(tmp_path), splits_file=str(tmp_path / "other.json"))
    assert "was made with splits" in sentence(caught.value)


def test_an_absent_encoder_is_refused_and_random_weights_must_be_asked_for(output: Path, store: Path, tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        classify(store, output, output_dir=str(tmp_path / "a"), encoder_checkpoint=str(tmp_path / "none.pt"))
    assert "no checkpoint here" in sentence(caught.value)
    classify(store, output, output_dir=str(tmp_path / "b"), encoder_checkpoint="random")
    assert (tmp_path / "b" / "best.pt").is_file()


@pytest.mark.parametrize(("configs", "kind"), [(["pretrain"], "train"), (["train"], "train"), (["inference"], "infer")])
def test_check_properties_is_empty(configs: list[str], kind: str, store: Path, output: Path, derivatives: Path):
    flow = workflow(
        *configs,
        kind=kind,
        dataset_dir=str(derivatives if kind == "infer" else store),
        output_dir=str(output / f"properties-{configs[0]}"),
        encoder_checkpoint=str(output / "pretrain" / "best.pt"),
        checkpoint=str(output / "models" / "model.pt"),
    )
    flow.initialize()
    assert not flow.check_properties()
    assert flow.network_def is not None


def infer(output: Path, data: Path, target: Path, **changes: object) -> ConfigWorkflow:
    settings = {"dataset_dir": str(data), "output_dir": str(target), "checkpoint": str(output / "models" / "model.pt")}
    return run("inference", kind="infer", **(settings | changes))


def test_inference_gives_the_scores_of_the_test(output: Path, derivatives: Path, tmp_path: Path):
    """From NIfTI through its own preparation, with the same result as evaluation from the store."""
    infer(output, derivatives, tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.tsv", sep="\t").set_index("participant_id")
    assert len(predictions) == 12
    tested = pd.read_csv(output / "train" / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")
    assert predictions.loc[tested.index, "logit"].to_numpy() == pytest.approx(tested["logit"].to_numpy(), abs=1e-5)


def test_inference_goes_on_past_a_bad_run_and_says_so(output: Path, derivatives: Path, tmp_path: Path):
    good, bad = sorted(derivatives.glob("sub-*/func/*_bold.nii.gz"))[:2]
    shape = nib.load(bad).shape
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), nib.load(bad).affine), tmp_path / "flat.nii.gz")
    table = tmp_path / "runs.tsv"
    rows = ["participant_id\tbold\ttr\tspace", f"sub-00\t{good}\t0.8\tMNI", "sub-01\tflat.nii.gz\t0.8\tMNI"]
    table.write_text("\n".join(rows) + "\n")
    with pytest.raises(RuntimeError) as caught:
        infer(output, table, tmp_path / "out")
    assert "1 of 2 runs failed" in sentence(caught.value)
    assert "flat.nii.gz" in sentence(caught.value)
    assert pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")["participant_id"].tolist() == ["sub-00"]
    about = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(about["refused_runs"]) == ["sub-01_flat"]
    assert "flat.nii.gz" in about["refused_runs"]["sub-01_flat"]
    model = hashlib.sha256((output / "models" / "model.pt").read_bytes()).hexdigest()
    assert about["model"]["sha256"] == model
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert table.columns.tolist() == list(about["columns"])

    with pytest.raises(RuntimeError) as caught:
        infer(output, tmp_path / "flat.nii.gz", tmp_path / "out")
    assert "none of the 1 runs can be used" in sentence(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["store"]  # no one else's predictions


def test_a_model_of_another_size_or_without_its_record_is_refused(output: Path, derivatives: Path, tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        run(
            "inference",
            kind="infer",
            dataset_dir=str(derivatives),
            output_dir=str(tmp_path),
            checkpoint=str(output / "models" / "model.pt"),
            embed_dim=8,
        )
    assert "was made with network#embed_dim 4, but here it is 8" in sentence(caught.value)


def test_new_scans_are_prepared_as_the_model_s_training_data_were(output: Path, derivatives: Path, tmp_path: Path):
    facts = json.loads((output / "models" / "model.json").read_text())
    facts["preparation"] = load_preparation(new_tr=1.0).parameters()
    for name in ("model.pt", "reference.pt"):
        (tmp_path / name).write_bytes((output / "models" / name).read_bytes())
    (tmp_path / "model.json").write_text(json.dumps(facts))
    one = next(derivatives.glob("sub-*/func/*_bold.nii.gz"))
    infer(output, one, tmp_path / "out", checkpoint=str(tmp_path / "model.pt"))
    steps = read_manifest(tmp_path / "out" / "store")["parameters"]["steps"]
    assert steps[3]["tr"] == 1.0


def test_a_model_is_served_in_the_precision_that_it_was_trained_in(output: Path, store: Path, derivatives: Path):
    """On a CPU too, where MONAI's own mixed precision does nothing; bf16 changes logits by far more than 1e-4."""
    folder = output / "bf16"
    settings = {"precision": "bf16", "output_dir": str(folder), "learning_rate": 0.1}
    classify(store, output, **settings)
    with pytest.raises(RuntimeError) as caught:
        classify(store, output, "evaluate", **(settings | {"precision": "float32"}))
    assert "was made with precision 'bf16', but here it is 'float32'" in sentence(caught.value)
    classify(store, output, "evaluate", **settings)
    release(folder / "best.pt", folder / "models")
    infer(output, derivatives, folder / "inference", checkpoint=str(folder / "models" / "model.pt"))
    tested = pd.read_csv(folder / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")["logit"]
    served = pd.read_csv(folder / "inference" / "predictions.tsv", sep="\t").set_index("participant_id")["logit"]
    assert served[tested.index].to_numpy() == pytest.approx(tested.to_numpy(), abs=1e-4)
    record = json.loads((folder / "models" / "model.json").read_text())
    record["config"]["precision"] = "float32"
    (folder / "models" / "model.json").write_text(json.dumps(record))
    infer(output, derivatives, folder / "inference", checkpoint=str(folder / "models" / "model.pt"))
    other = pd.read_csv(folder / "inference" / "predictions.tsv", sep="\t").set_index("participant_id")["logit"]
    assert np.abs(other[tested.index] - tested).max() > 1e-3


def test_the_preparation_is_one_config_with_two_ways_to_call_it(derivatives: Path, store: Path, tmp_path: Path):
    run("prepare", dataset_dir=str(derivatives), output_dir=str(tmp_path / "store"), pictures=False)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError) as caught:
        run("prepare", dataset_dir=str(derivatives), output_dir=str(tmp_path / "store"), new_tr=0)
    assert sentence(caught.value) == "the prepared TR must be 0.1 to 20.0 seconds, not 0"


def test_verify_net_in_out():
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        device="cpu",
        embed_dim=4,
        depths=[1, 1, 1, 1],
    )


def test_monai_bundle_load_gives_the_released_weights(output: Path, tmp_path: Path):
    """`load` reads NAME/configs/train.json and NAME/models/model.pt below bundle_dir."""
    name = tmp_path / "brain_fmri_roi_mae"
    name.mkdir()
    (name / "configs").symlink_to(CONFIGS)
    (name / "models").symlink_to(output / "models")
    size = {"embed_dim": 4, "depths": [1, 1, 1, 1], "frames": 4}
    network = load(
        "brain_fmri_roi_mae", bundle_dir=str(tmp_path), source="monaihosting", device="cpu", net_override=size
    )
    state = load_checkpoint(output / "models" / "model.pt")
    assert set(network.state_dict()) == set(state)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_the_command_line_works_from_a_foreign_directory(store: Path, tmp_path: Path):
    """Without the installed package on the path: only --bundle_root leads to the library."""
    command = [sys.executable, "-m", "monai.bundle", "run", "pretrain"]
    command += ["--config_file", str(CONFIGS / "pretrain.json"), "--bundle_root", str(ROOT)]
    command += ["--dataset_dir", str(store), "--output_dir", str(tmp_path / "out")]
    for name, value in TINY.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best.pt", "last.pt", "tensorboard"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_line_ends_in_one_sentence(tmp_path: Path):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.json")]
    command += ["--bundle_root", str(ROOT), "--checkpoint", "none.pt", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.decode().strip().splitlines()[-1].startswith("error: none.pt: no checkpoint here")
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("form", ["{0},{1}", "['{0}','{1}']"])
def test_an_option_that_no_config_knows_is_refused(form: str, tmp_path: Path):
    """MONAI would add `mask_fracton` to the config, where nothing reads it."""
    for name, entry in (("a", "mine"), ("b", "+ours#two")):
        (tmp_path / f"{name}.json").write_text(json.dumps({entry: 1}))
    given = ["run", "pretrain", "--config_file", form.format(tmp_path / "a.json", tmp_path / "b.json")]
    refuse_unknown_options([*given, "--mine", "2", "--ours::two=3", "--mask_fraction", "0.5", "--train#trainer#amp=1"])
    with pytest.raises(InputError, match=r"--mask_fracton: .*did you mean --mask_fraction"):
        refuse_unknown_options([*given, "--mask_fracton", "0.5"])


SPEED = {"clips_per_second", "waiting_for_data", "memory_gib", "hours_left"}


def two_processes(store: Path, folder: Path, overlay: dict, **changes: object) -> subprocess.CompletedProcess:
    """Pretrain below a folder: `torchrun` with gloo on the CPU stands in for several GPUs."""
    (folder / "overlay.json").write_text(json.dumps(overlay))
    configs = [str(CONFIGS / "pretrain.json"), str(CONFIGS / "multi_gpu.json"), str(folder / "overlay.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "monai.bundle", "run", "pretrain", "--config_file", str(configs)]
    command += ["--bundle_root", str(ROOT), "--output_dir", str(folder / "two")]
    for name, value in (TINY | {"store": store} | changes).items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_processes_train_as_one_at_the_same_batch_size(store: Path, tmp_path: Path):
    """And so does one in two parts: losses, metrics over all clips, and weights; the first process alone writes.

    They have left their group when they end: its threads, which Linux lists, could else abort one.
    """
    settings = {"regions": ["limbic", "frontal"], "mask_fraction": 0.5}  # hides other numbers of voxels in each clip
    begin = [{"_target_": "trainings.use_plain_scan"}, {"_target_": "threads_at_end.list_threads"}]
    overlay = {"store": None, "dataset_dir": "@store", "+initialize": begin}
    done = two_processes(store, tmp_path, overlay, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("at the end") == 2
    assert "gloo" not in done.stdout
    found = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert found == ["best.pt", "last.pt", "tensorboard"]
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path / "one"), **settings)
    run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path / "parts"), accumulate=2, **settings)
    names = ("one", "two", "parts")
    one, *others = (load_checkpoint(tmp_path / name / "last.pt") for name in names)
    curves, *more = (EventAccumulator(str(tmp_path / name / "tensorboard")).Reload() for name in names)
    for other, scalars in zip(others, more, strict=True):
        assert other["trainer"] == one["trainer"]
        for name, tensor in one["network"].items():
            torch.testing.assert_close(other["network"][name], tensor, rtol=0, atol=1e-6)
        assert scalars.Tags()["scalars"] == curves.Tags()["scalars"]
        for tag in set(curves.Tags()["scalars"]) - SPEED:
            ours, theirs = ([(s.step, s.value) for s in which.Scalars(tag)] for which in (curves, scalars))
            assert [step for step, _ in theirs] == [step for step, _ in ours]
            assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-5), tag


def test_an_error_in_one_of_two_processes_is_said_in_one_sentence_and_ends_both(store: Path, tmp_path: Path):
    overlay = {"store": None, "dataset_dir": "$'absent' if idist.get_rank() else @store"}
    done = two_processes(store, tmp_path, overlay)
    assert done.returncode != 0
    assert "error: absent is not a finished store" in done.stderr
    assert "exitcode  : 1 " in done.stderr  # of the first to fail, as torchrun reports it: it did not abort
