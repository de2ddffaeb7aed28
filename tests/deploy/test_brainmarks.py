"""The encoder in Brainmarks: its voxels and sides, its units, all windows, and the form in which the suite finds it.

Not covered: the suite's own test, which docs/pipeline.md runs (its package and brain mask are not installed here).
"""

import sys
from importlib import util
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration
from tasks import BINARY

from bundle.anatomy import grid
from bundle.data.normalisation import Normalisation
from bundle.deploy import brainmarks
from bundle.deploy.brainmarks import AFFINE, SHAPE, RunEmbedder, SampleTransform, correlation_of_labels, onto_grid
from bundle.errors import InputError
from bundle.heads.adapted import AdaptedClassifier
from bundle.heads.covariance import CovarianceReadout
from bundle.heads.mean import Classifier
from bundle.preparation.chain import load_preparation
from bundle.preparation.scaling import run_moments
from bundle.training.checkpoints import save_checkpoint
from bundle.training.provenance import Provenance

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "bundle/deploy/plugins"
SIZE = {"frames": 4, "embed_dim": 4, "depths": [1, 1, 1, 1]}
UNITS = {mode: Normalisation(mode, sd_floor=0.1, clip=5.0) for mode in ("voxel", "run", "both")}
BOX = [np.arange(size) * 2.0 + first for size, first in zip(SHAPE, (-90, -126, -72), strict=True)]  # mm


def mask_of(brain: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(brain.astype(np.uint8), AFFINE)


def sparse_mask(step: int = 7) -> nib.Nifti1Image:
    brain = np.zeros(SHAPE, bool)
    brain[3::step, 5::step, 2::step] = True
    return mask_of(brain)


def sample_of(raw: np.ndarray, tr: float) -> dict:
    """A run (T, D) as the suite's `nisc.scale` and its data sets make a sample of it."""
    mean, sd = raw.mean(0, keepdims=True), raw.std(0, keepdims=True)
    varies = sd > 1e-6
    bold = (raw - mean) / sd.clip(min=1e-6) * varies
    parts = {"bold": bold.astype(np.float16), "mean": mean * varies, "std": sd * varies}
    return {name: torch.from_numpy(part) for name, part in parts.items()} | {"tr": torch.tensor(tr)}


def transform_of(mask: nib.Nifti1Image, frames: int = 4, tr: float = 0.8) -> SampleTransform:
    return SampleTransform(onto_grid(mask)[0], int(np.asarray(mask.dataobj).sum()), tr, frames)


def worlds(voxels: np.ndarray) -> np.ndarray:
    """World coordinates (V, 3), mm, of flat indices into our grid."""
    return nib.affines.apply_affine(grid.AFFINE, np.stack(np.unravel_index(voxels, grid.SHAPE), axis=1))


def test_every_voxel_of_the_box_keeps_its_place_in_the_world():
    columns, voxels = onto_grid(mask_of(np.ones(SHAPE)))
    z, y, x = np.unravel_index(columns, SHAPE[::-1])  # the suite's samples run along z, then y, then x
    assert np.array_equal(worlds(voxels), np.stack([BOX[0][x], BOX[1][y], BOX[2][z]], axis=1))
    kept = [mm for mm in BOX[1] if -114 <= mm <= 76]  # the box is longer than the grid from back to front alone
    assert len(columns) == len(set(voxels)) == SHAPE[0] * len(kept) * SHAPE[2]
    assert sorted(set(BOX[1][y])) == kept


@settings(max_examples=8)
@given(st.tuples(*(st.integers(0, size - 1) for size in SHAPE)))
def test_left_stays_left_and_a_voxel_stays_where_it_is(place):
    brain = np.zeros(SHAPE, bool)
    brain[place] = True
    columns, voxels = onto_grid(mask_of(brain))
    world = [BOX[axis][place[axis]] for axis in range(3)]
    if -114 <= world[1] <= 76:
        assert columns.tolist() == [0]
        assert worlds(voxels)[0].tolist() == world
    else:
        assert not len(columns)


def test_a_mask_stored_las_is_the_same_mask():
    mask = sparse_mask()
    flipped = nib.Nifti1Image(np.asarray(mask.dataobj)[::-1], AFFINE @ np.diag([-1.0, 1, 1, 1]) @ _shift(SHAPE[0] - 1))
    assert nib.aff2axcodes(flipped.affine) == ("L", "A", "S")
    for ours, theirs in zip(onto_grid(mask), onto_grid(flipped), strict=True):
        assert np.array_equal(ours, theirs)


def _shift(voxels: int) -> np.ndarray:
    return nib.affines.from_matvec(np.eye(3), (-voxels, 0, 0))


@pytest.fixture(scope="module")
def run() -> SimpleNamespace:
    """12 frames of 2 s on the suite's box: as a file would hold it (X, Y, Z, T), and as the suite's sample."""
    mask = sparse_mask(5)
    brain = np.asarray(mask.dataobj) > 0
    rng = np.random.default_rng(0)
    values = np.zeros((*SHAPE, 12), np.float32)
    means, sds = rng.uniform(500, 1500, (brain.sum(), 1)), rng.uniform(2, 40, (brain.sum(), 1))
    values[brain] = rng.normal(means, sds, (brain.sum(), 12))
    return SimpleNamespace(mask=mask, values=values, sample=sample_of(values.T[:, brain.T], 2.0))


def test_a_sample_becomes_what_prepare_makes_of_the_same_file(run, tmp_path):
    image = nib.Nifti1Image(run.values, AFFINE)
    image.header.set_zooms((2, 2, 2, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "bold.nii.gz")
    nib.save(run.mask, tmp_path / "mask.nii.gz")
    item = {"bold": tmp_path / "bold.nii.gz", "mask": tmp_path / "mask.nii.gz", "space": "MNI152"}
    for step in load_preparation(min_overlap=0).steps:
        item = step(item)
    done = transform_of(run.mask)(run.sample)
    _, voxels = onto_grid(run.mask)
    order = np.argsort(voxels)
    assert np.array_equal(voxels[order], item["voxels"])
    assert done["bold"].dtype == torch.float16
    assert np.abs(done["bold"].numpy()[:, order].astype(float) - item["bold"]).max() < 4e-3  # the suite keeps float16
    moments = run_moments(item["moments"], item["record"])
    assert np.allclose(done["moments"].numpy()[:, order], moments, atol=1e-4)
    assert float(done["fill"]) == pytest.approx(item["record"]["fill"], abs=1e-3)
    assert set(done) == {"bold", "moments", "fill", "tr"}


def images_of(mask: nib.Nifti1Image, sample: dict, units: Normalisation, frames: int = 4) -> list[torch.Tensor]:
    """The images that an encoder is given of a sample."""
    seen = []

    def all_tokens(image):
        seen.append(image)
        return [torch.zeros(1, 1, 1, 1, frames, 2)] * 2

    readout = torch.nn.Module()
    readout.encoder = SimpleNamespace(frames=frames, all_tokens=all_tokens)
    readout.stage, readout.shares, readout.fitted = 1, torch.ones(3, 1), {}
    done = transform_of(mask, frames)(sample)
    batch = {name: torch.as_tensor(done[name])[None] for name in ("bold", "moments", "fill")}
    RunEmbedder(readout, units, onto_grid(mask)[1], "float32")(batch)
    return seen


def test_a_marker_on_the_left_is_seen_on_the_left_in_the_units_of_the_checkpoint(run):
    """By nibabel's and numpy's arithmetic alone: where a voxel is, its course at 0.8 s, and its value."""
    values = run.values.copy()
    i, j, k = 23, 60, 47  # x = -44 mm, of the mask
    values[i, j, k] = 900 + 100 * np.sin(np.arange(12))
    brain = np.asarray(run.mask.dataobj) > 0
    assert brain[i, j, k]
    sample = sample_of(values.T[:, brain.T], 2.0)
    times = np.arange(0, 22.01, 0.8)
    seen_by_us = brain & ((BOX[1] >= -114) & (BOX[1] <= 76))[:, None]
    courses = np.stack([np.interp(times, np.arange(12) * 2.0, course) for course in values[seen_by_us]])
    course = np.interp(times, np.arange(12) * 2.0, values[i, j, k])
    x, y, z = np.rint(np.linalg.inv(grid.AFFINE) @ AFFINE @ [i, j, k, 1])[:3].astype(int)
    assert (grid.AFFINE @ [x, y, z, 1])[:3].tolist() == [-44, -6, 22]
    by_run = (course - courses.mean()) / courses.std()
    by_voxel = (course - course.mean()) / course.std()
    for mode, channels in (("run", [by_run]), ("voxel", [by_voxel]), ("both", [by_run, by_voxel])):
        images = images_of(run.mask, sample, UNITS[mode])
        assert len(images) == len(times) // 4 == 7  # all windows, side by side
        seen = torch.cat(images, dim=-1)
        assert seen.shape == (1, len(channels), *grid.SHAPE, 28)
        for channel, expected in enumerate(channels):
            assert np.allclose(seen[0, channel, x, y, z], expected, atol=5e-3), mode
            assert not np.allclose(seen[0, channel, 95 - x, y, z], expected, atol=5e-3), mode
        outside = seen[0, -1, 0, 0, 0]
        least = (courses.min() - courses.mean()) / courses.std()
        assert np.allclose(outside, least if mode == "run" else 0, atol=1e-3)


@pytest.mark.parametrize("mode", ["run", "voxel"])
def test_voxels_outside_the_field_of_view_are_background(run, mode):
    """The suite gives them 0 for all; they must not shift the run's mean, and look like the rest of the background."""
    brain = np.asarray(run.mask.dataobj) > 0
    seen = {}
    for cut in (False, True):
        values = run.values.copy()
        mask = np.where(np.arange(SHAPE[2]) < 30, False, brain) if cut else brain
        values[:, :, :30] = 0
        seen[cut] = images_of(mask_of(mask), sample_of(values.T[:, mask.T], 2.0), UNITS[mode])
    for with_empty, without in zip(seen[False], seen[True], strict=True):
        assert torch.equal(with_empty, without)


def test_a_run_shorter_than_a_window_goes_on_with_its_mean(run):
    done = transform_of(run.mask, frames=40)(run.sample)
    assert done["bold"].shape[0] == 40
    assert done["bold"][:28].abs().amin(1).max() > 0
    assert not done["bold"][28:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bold": torch.zeros(12, 5)}, "a sample has 5 voxels, but the brain mask of the suite"),
        ({"tr": 2000.0}, r"TR must be 0\.1 to 20\.0 seconds, not 2000"),
        ({"tr": float("nan")}, "TR must be"),
        ({"std": torch.zeros(1, 6804)}, "no voxel of a sample varies"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(run, change, message):
    with pytest.raises(InputError, match=message):
        transform_of(run.mask)(run.sample | change)


# --- embeddings -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, network: torch.nn.Module, **facts) -> str:
    made_with = {
        "config": {"precision": "float32"},
        "preparation": load_preparation(new_tr=1.0).parameters(),
        "network": network.encoder.size,
        "normalisation": UNITS["voxel"].facts(),
    }
    path = folder / "best.pt"
    save_checkpoint({"network": network, "provenance": Provenance(**(made_with | facts))}, path)
    return str(path)


def fitted_readout() -> CovarianceReadout:
    readout = CovarianceReadout(components={"group": [1]}, **SIZE)
    labels, channels = len(readout.shares), readout.encoder.tokens_of(1)[1]
    rng = np.random.default_rng(1)
    runs = [torch.tensor(rng.normal(size=(3, 4, labels, channels)), dtype=torch.float32) for _ in range(8)]
    readout.fit(runs, [0, 1] * 4, BINARY)
    return readout


def batch_of(transform: SampleTransform, samples: list[dict]) -> dict:
    return torch.utils.data.default_collate([transform(sample) for sample in samples])


@pytest.fixture(scope="module")
def samples(run) -> list[dict]:
    rng = np.random.default_rng(2)
    return [sample_of(rng.normal(1000, 20, (13, len(run.sample["mean"][0]))).astype(np.float32), 1.0) for _ in range(2)]


def test_patches_are_the_mean_tokens_of_all_windows(run, samples, tmp_path):
    network = Classifier(**SIZE)
    transform, model = brainmarks.suite_model(run.mask, checkpoint(tmp_path, network))
    assert model.__space__ == "mni"
    batch = batch_of(transform, samples)
    cls, reg, patch = model(batch)
    labels = len(model.readout.shares)
    assert (reg, patch.shape, cls.shape) == (None, (2, 3, network.encoder.channels), (2, 1, labels * (labels - 1) // 2))
    for sample, tokens in zip(samples, patch, strict=True):
        images = images_of(run.mask, sample | {"tr": 0.8}, UNITS["voxel"])  # 1 s is this checkpoint's TR: nothing to do
        expected = torch.cat([network.eval().features(image) for image in images])
        assert torch.allclose(tokens, expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_fitted_readout_gives_what_it_weighs(run, samples, tmp_path):
    readout = fitted_readout()
    transform, model = brainmarks.suite_model(run.mask, checkpoint(tmp_path, readout))
    batch = batch_of(transform, samples)
    cls, _, patch = model(batch)
    assert patch.shape[:2] == (2, 3)
    images = [torch.cat(images_of(run.mask, sample | {"tr": 0.8}, UNITS["voxel"])) for sample in samples]
    logits = readout(torch.cat(images), [3, 3])[:, 0].double()
    weighed = cls[:, 0].double() @ readout.fitted["weights"][0] + readout.fitted["bias"]
    assert torch.allclose(weighed, logits, atol=1e-4)


def test_a_run_of_one_window_has_no_cls(run, samples, tmp_path):
    transform, model = brainmarks.suite_model(run.mask, checkpoint(tmp_path, Classifier(**SIZE)))
    short = [sample | {"bold": sample["bold"][:3]} for sample in samples]
    cls, _, patch = model(batch_of(transform, short))
    assert cls is None
    assert patch.shape[:2] == (2, 1)


def test_only_the_patches_carry_gradients_and_only_if_asked_for(run, samples, tmp_path):
    transform, model = brainmarks.suite_model(run.mask, checkpoint(tmp_path, Classifier(**SIZE)))
    model.requires_grad_(True)
    cls, _, patch = model(batch_of(transform, samples[:1]))
    assert not cls.requires_grad
    patch.sum().backward()
    assert model.readout.encoder.patch_embedding.weight.grad.abs().sum() > 0


def test_the_correlation_of_labels_by_brute_force():
    """Pair by pair: tokens less their mean over clips and a line, then numpy's correlation over frames and channels."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(3, 4, 5, 2)) + 7 * rng.normal(size=(1, 4, 1, 2)) + 3 * rng.normal(size=(1, 1, 5, 2))
    features[..., 1, :] += features[..., 0, :] + 0.1 * rng.normal(size=(3, 4, 2))
    features[..., 4, :] = 2.0
    flat = (features - features.mean(0)).reshape(12, 5, 2)
    time = np.stack([np.ones(12), np.arange(12)], axis=1)
    courses = {
        (label, channel): flat[:, label, channel] - time @ np.linalg.lstsq(time, flat[:, label, channel], rcond=None)[0]
        for label, channel in product(range(5), range(2))
    }
    expected = []
    for one in range(5):
        for other in range(one + 1, 5):
            pair = [np.concatenate([courses[label, channel] for channel in range(2)]) for label in (one, other)]
            expected.append(0 if other == 4 else np.corrcoef(*pair)[0, 1])
    found = correlation_of_labels(torch.tensor(features))
    assert np.allclose(found, expected, atol=1e-6)
    assert found[0] > 0.5


def test_the_environment_names_a_checkpoint_where_no_argument_does(run, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"no checkpoint is named; give model_kwargs\.checkpoint, or the variable BRAIN_"
    ):
        brainmarks.suite_model(run.mask)
    monkeypatch.setenv("BRAIN_FMRI_CHECKPOINT", checkpoint(tmp_path, Classifier(**SIZE)))
    transform, model = brainmarks.suite_model(run.mask)
    assert (transform.tr, transform.frames, model.precision) == (1.0, 4, "float32")


def test_what_was_cleaned_in_training_is_said(run, tmp_path, caplog):
    cleaned = load_preparation(high_pass=0.01).parameters()
    brainmarks.suite_model(run.mask, checkpoint(tmp_path, Classifier(**SIZE), preparation=cleaned))
    assert "was trained on runs cleaned by {'high_pass': 0.01}" in caplog.text


@pytest.mark.parametrize("beside", [{"rank": 2}, {"prompts": 2}])
def test_an_encoder_that_works_with_something_beside_it_is_refused(run, tmp_path, beside):
    with pytest.raises(InputError, match="works with LoRA or prompts beside it"):
        brainmarks.suite_model(run.mask, checkpoint(tmp_path, AdaptedClassifier(**beside, **SIZE)))


# --- how the suite finds it -------------------------------------------------------------------------------------------


def test_the_plugin_registers_a_function_that_returns_transform_and_wrapper(run, tmp_path, monkeypatch):
    """With stand-ins for the suite's decorator and for TemplateFlow, which gives the mask's path."""
    registered, asked = {}, []
    nib.save(run.mask, tmp_path / "mask.nii.gz")
    registry, templates = ModuleType("brainmarks.models.registry"), ModuleType("templateflow.api")
    registry.register_model = lambda function: registered.setdefault(function.__name__, function)
    templates.get = lambda *names, **entities: asked.append((names, entities)) or tmp_path / "mask.nii.gz"
    parents = {name: ModuleType(name) for name in ("brainmarks", "brainmarks.models", "templateflow")}
    parents["templateflow"].api = templates
    modules = parents | {"brainmarks.models.registry": registry, "templateflow.api": templates}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = util.spec_from_file_location("plugin", PLUGINS / "brainmarks/models/brain_fmri_roi_mae.py")
    spec.loader.exec_module(util.module_from_spec(spec))
    transform, model = registered["brain_fmri_roi_mae"](checkpoint=checkpoint(tmp_path, Classifier(**SIZE)))
    assert isinstance(transform, SampleTransform)
    assert isinstance(model, RunEmbedder)
    entities = {"desc": "brain", "resolution": 2, "suffix": "mask", "extension": "nii.gz"}
    assert asked == [(("MNI152NLin6Asym",), entities)]


def test_the_plugin_is_installed_into_the_suites_namespace(monkeypatch):
    assert not list(PLUGINS.rglob("__init__.py"))
    monkeypatch.chdir(ROOT)
    installed = apply_configuration(Distribution(), ROOT / "pyproject.toml")
    assert "brainmarks.models" in installed.packages
    assert Path(installed.package_dir["brainmarks"]) == Path("bundle/deploy/plugins/brainmarks")
    assert not [name for name in installed.packages if name.startswith("bundle.deploy.plugins")]
