"""Losses and metrics against closed forms and scikit-learn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from tasks import BINARY, subjects_of

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.tasks.scores import SubjectScores, average_per_subject, measure, once_tested
from bundle.training.losses import MaskedMSELoss, masked_mse
from bundle.training.metrics import MaskedMSE, RegionTemporalR2, TemporalR2

SHAPE = (2, 1, 3, 4, 5, 6)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(SHAPE, generator=generator)
    prediction = torch.randn(SHAPE, generator=generator)
    mask = torch.rand(SHAPE[:-1], generator=generator) < 0.4
    mask[0, 0, 0, 0, 0] = True
    return prediction, image, mask


def test_masked_mse_is_numpy_mean_over_hidden_voxels_at_all_frames():
    prediction, image, mask = draw(0)
    errors = [
        (prediction[index].numpy() - image[index].numpy()) ** 2 for index in zip(*np.nonzero(mask.numpy()), strict=True)
    ]
    assert float(masked_mse(prediction, image, mask)) == pytest.approx(np.mean(errors), rel=1e-6)
    assert float(MaskedMSELoss()(prediction, {"image": image, "mask": mask})) == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_definition_and_visible_voxels_get_none(dtype: torch.dtype):
    prediction, image, mask = draw(1)
    prediction = prediction.to(dtype).requires_grad_()
    masked_mse(prediction, image, mask).backward()
    places = np.broadcast_to(mask.numpy()[..., None], SHAPE)
    expected = 2 * (prediction.detach().float().numpy() - image.numpy()) * places / places.sum()
    np.testing.assert_allclose(prediction.grad.float(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    assert prediction.grad.dtype == dtype


def test_what_is_not_finite_where_nothing_is_hidden_does_not_count():
    prediction, image, mask = draw(1)
    expected = float(masked_mse(prediction, image, mask))
    prediction[~mask] = torch.nan
    prediction.requires_grad_()
    loss = masked_mse(prediction, image, mask)
    loss.backward()
    assert float(loss.detach()) == expected
    assert prediction.grad.isfinite().all()


def test_frame_wise_masks_count_their_own_frames():
    prediction, image, _ = draw(2)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1, 0, 2, 3, 4, 5] = True
    expected = float((prediction - image)[1, 0, 2, 3, 4, 5] ** 2)
    assert float(masked_mse(prediction, image, mask)) == pytest.approx(expected)


def test_an_empty_mask_gives_nan_which_training_refuses():
    prediction, image, mask = draw(3)
    assert masked_mse(prediction, image, torch.zeros_like(mask)).isnan()


def test_epoch_mse_weighs_voxels_not_batches():
    metric = MaskedMSE()
    batches = [draw(seed) for seed in range(3)]
    batches[1][2][:] = False
    batches[1][2][0, 0, 0, 0, 0] = True  # a batch with one hidden voxel
    for prediction, image, mask in batches:
        metric.update((prediction, {"image": image, "mask": mask}))
    errors = np.concatenate([((p - i)[m] ** 2).numpy().ravel() for p, i, m in batches])
    assert metric.compute() == pytest.approx(errors.mean(), rel=1e-6)


def temporal_r2(prediction, image, mask) -> float:
    metric = TemporalR2()
    metric.update((prediction, {"image": image, "mask": mask}))
    return metric.compute()


def test_temporal_r2_of_known_predictions():
    _, image, mask = draw(4)
    mean = image.mean(dim=-1, keepdim=True)
    assert temporal_r2(image, image, mask) == pytest.approx(1)
    assert temporal_r2(mean.expand(SHAPE), image, mask) == pytest.approx(0, abs=1e-6)
    assert temporal_r2(image + 100, image, mask) == pytest.approx(1)  # a wrong static offset does not count
    assert temporal_r2(mean + 0.5 * (image - mean), image, mask) == pytest.approx(0.75)
    assert math.isnan(temporal_r2(image, torch.zeros(SHAPE), mask))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 5))
def test_temporal_r2_at_some_frames_is_of_the_clip_with_these_rebuilt(seed, frames):
    """1: perfect; 0: the mean of the seen frames, held flat. What the network gives at seen frames never counts."""
    _, image, tube = draw(seed)
    hidden = torch.zeros(SHAPE[-1], dtype=torch.bool)
    hidden[torch.randperm(SHAPE[-1], generator=torch.Generator().manual_seed(seed))[:frames]] = True
    mask = tube.unsqueeze(-1) & hidden
    garbage = 1e3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    assert temporal_r2(torch.where(hidden, image, garbage), image, mask) == pytest.approx(1)
    flat = image[..., ~hidden].mean(-1, keepdim=True).expand(SHAPE)
    assert temporal_r2(torch.where(hidden, flat, garbage), image, mask) == pytest.approx(0, abs=1e-5)
    prediction = flat + 0.3 * garbage / 1e3
    completed = np.where(hidden.numpy(), prediction.numpy(), image.numpy()).astype(float)
    y, p = (course - course.mean(-1, keepdims=True) for course in (image.numpy().astype(float), completed))
    inside = mask.numpy()
    expected = 1 - ((y - p)[inside] ** 2).sum() / (y[inside] ** 2).sum()
    assert temporal_r2(prediction, image, mask) == pytest.approx(expected, rel=1e-5)


def test_temporal_r2_of_regions_at_some_frames_is_that_of_masks_of_one_region_each():
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)
    image, prediction = torch.randn(2, 1, 1, *grid.SHAPE, 3, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([False, True, True])
    metric = RegionTemporalR2()
    tubes = {name: torch.from_numpy(np.isin(labels, REGIONS[name]))[None, None] for name in ("limbic", "cerebellum")}
    both = (tubes["limbic"] | tubes["cerebellum"]).unsqueeze(-1) & frames
    metric.update((torch.where(frames, prediction, 1e3), {"image": image, "mask": both}))
    for name, tube in tubes.items():
        expected = temporal_r2(prediction, image, tube.unsqueeze(-1) & frames)
        assert metric.compute()[f"val_temporal_r2_{name}"] == pytest.approx(expected, rel=1e-6)


def test_temporal_r2_of_regions_is_that_of_masks_of_one_region_each():
    """Against the overall metric, given only the hidden voxels of one region at a time."""
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)
    inside = {name: torch.from_numpy(np.isin(labels, REGIONS[name]))[None, None] for name in ("limbic", "cerebellum")}
    generator = torch.Generator().manual_seed(0)
    image, prediction = torch.randn(2, 1, 1, *grid.SHAPE, 3, generator=generator)
    mask = torch.rand(1, 1, *grid.SHAPE, generator=generator) < 0.3
    hidden = mask & (inside["limbic"] | inside["cerebellum"])
    metric = RegionTemporalR2()
    for kind in (hidden, hidden.unsqueeze(-1).expand(image.shape)):  # for all frames, and frame by frame
        metric.reset()
        metric.update((prediction, {"image": image, "mask": kind}))
        found = metric.compute()
        assert sorted(found) == ["val_temporal_r2_cerebellum", "val_temporal_r2_limbic"]
        for name, region in inside.items():
            expected = temporal_r2(prediction, image, hidden & region)
            assert found[f"val_temporal_r2_{name}"] == pytest.approx(expected, rel=1e-6)


def test_temporal_r2_equals_scikit_learn_on_demeaned_series():
    prediction, image, mask = draw(5)
    y, p = image[mask].numpy(), prediction[mask].numpy()
    y, p = y - y.mean(-1, keepdims=True), p - p.mean(-1, keepdims=True)
    assert temporal_r2(prediction, image, mask) == pytest.approx(r2_score(y.ravel(), p.ravel()), rel=1e-5)
    whole = mask.unsqueeze(-1).expand(SHAPE)
    assert temporal_r2(prediction, image, whole) == pytest.approx(temporal_r2(prediction, image, mask))


def test_loss_of_two_classes_closed_form():
    loss = BINARY.loss(torch.tensor([[0.0], [math.log(3)]]), {"label": torch.tensor([[1.0], [1.0]])})
    assert float(loss) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


@settings(max_examples=50, deadline=None)
@given(clips=st.lists(st.integers(1, 5), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_the_unit_of_evaluation_is_the_subject_not_the_clip(clips, seed):
    """A subject with many clips weighs as much as one with a single clip, in any order and batch size."""
    rng = np.random.default_rng(seed)
    rows = [(f"s{i}", float(i % 2), float(rng.normal())) for i, n in enumerate(clips) for _ in range(n)]
    metric = SubjectScores(BINARY)
    order = rng.permutation(len(rows))
    for part in np.array_split(order, 3):
        if len(part):
            logits = torch.tensor([[rows[i][2]] for i in part], dtype=torch.float64)
            target = {
                "label": torch.tensor([[rows[i][1]] for i in part]),
                "participant_id": [rows[i][0] for i in part],
            }
            metric.update((logits, target))
    scores = metric.compute()
    assert metric.subjects["clips"].tolist() == clips
    means = [np.mean([r[2] for r in rows if r[0] == f"s{i}"]) for i in range(len(clips))]
    hits = [(mean > 0) == bool(i % 2) for i, mean in enumerate(means)]
    assert scores["accuracy"] == pytest.approx(np.mean(hits))
    pairs = [np.sign(a - b) for a in means[1::2] for b in means[::2]]  # AUROC by counting pairs
    assert scores["auroc"] == pytest.approx((np.mean(pairs) + 1) / 2)


CLIPS = [(f"s{i % 7}", float(i % 7 > 3), float(np.sin(i))) for i in range(25)]  # of some subjects on both ranks


def add_share(metrics: dict, rank: int) -> None:
    """Give a rank its share: every third clip to rank 1, and one of two batches."""
    share = [clip for i, clip in enumerate(CLIPS) if (i % 3 == 0) == bool(rank)]
    target = {
        "label": torch.tensor([[label] for _, label, _ in share]),
        "participant_id": [name for name, _, _ in share],
    }
    metrics["subjects"].update((torch.tensor([[logit] for *_, logit in share], dtype=torch.float64), target))
    prediction, image, mask = draw(rank)
    for name in ("mse", "r2"):
        metrics[name].update((prediction, {"image": image, "mask": mask}))


def work_as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        metrics = {"subjects": SubjectScores(BINARY), "mse": MaskedMSE(), "r2": TemporalR2()}
        add_share(metrics, rank)
        result = {name: metric.compute() for name, metric in metrics.items()} | {
            "clips": metrics["subjects"].subjects["clips"].tolist()
        }
        Path(folder, f"{rank}.json").write_text(json.dumps(result))
    finally:  # waits for gloo's threads: one that frees a tensor while the interpreter ends would abort the process
        torch.distributed.destroy_process_group()


def test_metrics_are_computed_once_over_all_ranks(tmp_path):
    """Not per rank and then averaged: subjects have clips on both ranks, and the ranks' shares differ in size."""
    torch.multiprocessing.spawn(work_as_rank, (str(tmp_path),), nprocs=2)
    metrics = {"subjects": SubjectScores(BINARY), "mse": MaskedMSE(), "r2": TemporalR2()}
    for rank in (0, 1):
        add_share(metrics, rank)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["subjects"] == pytest.approx(metrics["subjects"].compute())
        assert found["clips"] == [4, 4, 4, 4, 3, 3, 3]
        for name in ("mse", "r2"):
            assert found[name] == pytest.approx(metrics[name].compute(), rel=1e-6)


def test_one_class_gives_nan_not_a_crash():
    scores = measure(BINARY, once_tested(subjects_of([1, 1], [0.1, -0.2]), BINARY))
    assert math.isnan(scores["auroc"])
    assert math.isnan(scores["balanced_accuracy"])
    assert scores["accuracy"] == 0.5


def test_average_per_subject():
    rows = average_per_subject([("b", 1.0, [2.0]), ("a", 0.0, [-1.0]), ("b", 1.0, [4.0])], BINARY)
    assert rows.to_dict("records") == [
        {"participant_id": "a", "label": 0, "logit": -1.0, "clips": 1},
        {"participant_id": "b", "label": 1, "logit": 3.0, "clips": 2},
    ]
