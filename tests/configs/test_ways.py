"""Ways of pretraining on tiny NIfTIs: regions at some frames, augmentation, redundancy dropout.

Not covered: whether any of them helps; see docs/training.md.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_configs import run, sentence, workflow

from bundle.training.checkpoints import load_checkpoint, saved_facts


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name)["network"]


ONE_CLIP = {"clip_stride": 30}  # of each run


def test_an_interrupted_training_of_all_ways_resumes_to_the_same_bits(store: Path, tmp_path: Path):
    settings = {"dataset_dir": str(store), "redundancy_dropout": 0.3} | ONE_CLIP
    run("pretrain", "augment", **settings, output_dir=str(tmp_path / "whole"), max_epochs=2)
    for epochs in (1, 2):
        run("pretrain", "augment", **settings, output_dir=str(tmp_path / "parts"), max_epochs=epochs)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts["network"][name]) for name, tensor in whole["network"].items())
    assert whole["best"] == parts["best"]
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", **settings, output_dir=str(tmp_path / "parts"), max_epochs=3)
    assert "was made with augment" in sentence(caught.value)


def test_clips_are_augmented_in_training_only_and_before_they_are_masked(store: Path):
    flow = workflow("pretrain", "augment", dataset_dir=str(store))
    flow.initialize()
    parsed = flow.parser
    assert parsed["train"]["prepare_batch"]["transforms"] == ["@scatter", "@augment", "@mask", "@time_last"]
    assert "@augment" not in json.dumps(parsed["validate"])
    items = [dict(item) for item in [parsed.get_parsed_content("train#dataset")[0]] * 2]
    prepare = parsed.get_parsed_content("train#prepare_batch")
    first, target, *_ = prepare([items[0] | {"draw": 1}])
    second, other, *_ = prepare([items[1] | {"draw": 2}])
    assert torch.equal(prepare([items[0] | {"draw": 1}])[0], first)  # the same draw again
    assert not torch.equal(first, second)
    assert not torch.equal(target["mask"], other["mask"])  # the region has moved with the brain
    validation = parsed.get_parsed_content("validate#prepare_batch")
    assert torch.equal(validation(items[:1])[0], validation(items[1:])[0])


def test_weights_of_regions_are_refused_where_augmentation_moves_the_brain(store: Path, tmp_path: Path):
    settings = {"dataset_dir": str(store), "output_dir": str(tmp_path)} | ONE_CLIP
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", "masks/weighted", "augment", **settings)
    assert sentence(caught.value).startswith("loss: the regions' weights lie on the fixed grid")
    still = {"augment#rotate": 0, "augment#translate": 0, "augment#scale": 0}
    run("pretrain", "masks/weighted", "augment", **settings, **still)


def test_a_region_hidden_at_some_frames_is_trained_validated_and_rebuilt(store: Path, tmp_path: Path):
    settings = {"dataset_dir": str(store), "output_dir": str(tmp_path), "frame_block": 2} | ONE_CLIP
    flow = run("pretrain", "masks/region_blocks", **settings)
    metrics = flow.parser.get_parsed_content("validate#evaluator").state.metrics
    assert {"val_masked_mse", "val_temporal_r2", "val_temporal_r2_limbic"} <= metrics.keys()
    mask = flow.parser.get_parsed_content("validate#evaluator").state.output["label"]["mask"]
    assert mask.shape[1:] == (1, 96, 96, 96, 4)
    assert mask.flatten(1, -2).any(1).sum(1).tolist() == [2] * len(mask)  # frames of each clip
    run("pretrain", "masks/region_blocks", "reconstruct", **settings, bootstrap_resamples=10)
    scores = json.loads((tmp_path / "reconstruction" / "reconstruction.json").read_text())
    assert {"masked_mse", "temporal_r2"} <= scores.keys()


def test_an_encoder_pretrained_with_redundancy_dropout_is_classified_like_any_other(store: Path, tmp_path: Path):
    run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path / "a"), **ONE_CLIP, redundancy_dropout=0.25)
    facts = saved_facts(load_checkpoint(tmp_path / "a" / "last.pt"), "last.pt")
    assert facts["config"]["redundancy_dropout"] == 0.25
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path / "a"), **ONE_CLIP)
    assert "was made with redundancy_dropout 0.25, but here it is 0.0" in sentence(caught.value)
    run(
        "train", dataset_dir=str(store), output_dir=str(tmp_path / "b"),
        encoder_checkpoint=str(tmp_path / "a" / "best.pt"), **ONE_CLIP,
    )  # fmt: skip
    pretrained, classifier = weights(tmp_path / "a", "best.pt"), weights(tmp_path / "b")
    encoder = [name for name in classifier if name.startswith("encoder.")]
    assert len(encoder) > 50
    assert all(torch.equal(classifier[name], pretrained[name]) for name in encoder)
