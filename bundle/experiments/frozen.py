"""Readouts of a frozen encoder, and plain connectivity, on the subjects of a store: each tested once, in folds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose
from nilearn import signal
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, labels_on, load_atlas, region_labels
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.data.clips import clips, shuffled_within
from bundle.data.normalisation import Normalisation
from bundle.data.targets import target_of
from bundle.data.transforms import ScatterClipd, TakeClipd, TimeLastd
from bundle.deploy.embed import frozen_encoder
from bundle.errors import InputError
from bundle.experiments.baselines import participant_series
from bundle.experiments.patterns import label_pattern
from bundle.heads.attention import AttentionClassifier
from bundle.heads.combat import Combat, kept_of, parted
from bundle.heads.connectivity import KINDS, ConnectivityModel, inner_folds, shares_of
from bundle.heads.covariance import CovarianceReadout
from bundle.heads.pooling import pool
from bundle.networks.precision import best_device
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.preparation import store
from bundle.tasks.binary import Binary

CONNECTIVITY = (
    "connectivity of labels",
    "connectivity of groups",
    "connectivity of components",
    "connectivity of patches",
    "connectivity of labels and patches",
)
"""Readouts without an encoder: of all labels, as the baseline of a sweep; of the groups' means; of `COMPONENTS`
principal components of each group's labels, or of the means of its patches of `PATCH` voxels each way, as the
covariance readout has them of an encoder's channels; and the mean of the first and the last, as that readout's default
is the mean of two levels. Only patches see what is inside a label."""
PATCH = 6  # of the encoder, see `SwinMambaEncoder`
CEILING = "connectivity of planted patterns"
"""Of the courses that a synthetic cohort's patterns inside labels really have in the images, one per group: what an
encoder could pass on at best of the cohort `pattern`, where the number of training subjects is what is left to limit
it."""
COMPONENTS = 2
TASK = Binary("diagnosis", ("control", "adhd"))
"""What synthetic and painted cohorts are told apart by."""


@dataclass(frozen=True)
class Design:
    """How subjects are tested.

    Attributes:
        readouts: name to `{"kind": "mean", "attention" or "covariance"}` and its head's arguments; of a mean
            `"harmonise": "combat"` takes effects of sites off the mean token, see `bundle.heads.combat.Combat`; it has
            all training subjects only.
        folds: in which every subject is tested once, by site and diagnosis.
        sizes: numbers of training subjects, beside all of them.
        shift: regions whose voxels are moved in time by half a run in the test subjects, as a control; none if empty.
        seed: of folds, subsets, shuffles and random weights.
        atlas: of connectivity, covariance readouts and shifted regions.
    """

    readouts: Mapping[str, Mapping[str, Any]]
    folds: int
    sizes: Sequence[int]
    shift: Sequence[str]
    seed: int
    atlas: str = AAL3


Readout = Callable[[list, NDArray[np.int64], list], NDArray[np.float64]]
"""Fits to training rows and labels, and returns the logits of test rows."""


def _tested(
    design: Design, runs: Sequence[dict], rows: Mapping[bool, list], readout: Readout
) -> Iterator[dict[str, Any]]:
    """Test every subject once per training size; with all training subjects also with shuffled labels, and shifted.

    Args:
        design: how.
        runs: the records, one per subject.
        rows: False: what the readout is given of each subject; True: the same with regions shifted in time.
        readout: fits and scores.
    """
    target = target_of(runs)
    labels = np.array([int(target.labels[run["participant_id"]]) for run in runs])
    sites = [str(run["site"]) for run in runs]
    rng = np.random.default_rng(design.seed)
    shuffled = shuffled_within(sites, labels, rng)
    for truth, control in ((labels, False), (shuffled, True)):
        # by the labels that are learnt: by others, a site's training and test subjects would differ in balance the
        # opposite way, and what tells sites apart would score below one half
        strata = [f"{site} {label}" for site, label in zip(sites, truth, strict=True)]
        folds = StratifiedKFold(design.folds, shuffle=True, random_state=design.seed)
        for fold, (train, test) in enumerate(folds.split(truth, strata)):
            sizes = [size for size in design.sizes if size < len(train) and not control]
            for size, chosen in [*((size, _some(train, truth, size, rng)) for size in sizes), (0, train)]:
                shifts = list(rows) if size == 0 and not control else [False]
                tested = [(shift, i) for shift in shifts for i in test]
                given = [rows[False][i] for i in chosen]
                logits = readout(given, truth[chosen], [rows[shift][i] for shift, i in tested])
                for (shift, i), logit in zip(tested, logits, strict=True):
                    yield {
                        "size": size, "shuffled": control, "shifted": shift, "fold": fold,
                        "participant_id": runs[i]["participant_id"], "label": truth[i], "logit": float(logit),
                    }  # fmt: skip


def _some(train: NDArray, labels: NDArray, size: int, rng: np.random.Generator) -> NDArray:
    """A random half-and-half subset of training subjects."""
    parts = [rng.permutation(train[labels[train] == label])[: size // 2] for label in (0, 1)]
    return np.sort(np.concatenate(parts))


def records_of(folder: Path) -> list[dict]:
    """The runs of a store, one per participant."""
    runs = store.read_manifest(folder)["runs"]
    if len({run["participant_id"] for run in runs}) < len(runs):
        raise InputError(f"{folder}: a participant has several runs; these cohorts have one each")
    if (kind := target_of(runs, source=folder).kind) != TASK.kind:
        raise InputError(f"{folder}: these cohorts have two groups, but the diagnosis makes a {kind} task")
    return runs


def connectivity_rows(design: Design, folder: Path, rivals: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of each of some rivals: of `CONNECTIVITY`, and of a synthetic cohort also `CEILING`."""
    runs = records_of(folder)
    atlas = load_atlas(design.atlas)
    tables = participant_series(folder, runs, folder.parent / "series", atlas)
    parcels = parcels_of(atlas, "group")
    groups = parcel_index(atlas, parcels)
    patches, group_of_patch = _patches(groups)
    planted = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE).ravel()  # whatever the design's atlas is
    of_labels = [tables[run["participant_id"]].to_numpy() for run in runs]
    of_groups, of_patches, of_patterns = [], [], []
    for run in runs:
        voxels = store.read_voxels(folder, run["run_id"])
        frames = store.read_clip(folder, run["run_id"], 0, run["frames"]).astype(float)
        own = groups.ravel()[voxels]
        of_groups.append(_means(frames, own, len(parcels)))
        of_patches.append(_means(frames, patches.ravel()[voxels], len(group_of_patch)))
        if CEILING in rivals:
            mm = nib.affines.apply_affine(grid.AFFINE, np.stack(np.unravel_index(voxels, grid.SHAPE), axis=-1))
            pattern = label_pattern(mm, planted[voxels], np.ones(len(voxels)))
            of_patterns.append(_means(frames * pattern, own, len(parcels)))
    names = next(iter(tables.values())).columns
    members = [names.get_indexer([atlas.names[n] for n in numbers]) for numbers in parcels.values()]
    members = [columns[columns >= 0] for columns in members if max(columns) >= 0]
    patches_of = [np.flatnonzero(group_of_patch == group) for group in np.unique(group_of_patch)]

    def model(rows: list, truth: NDArray, **options: Any) -> ConnectivityModel:
        return ConnectivityModel(*TASK.linear(design.seed), design.seed, **options).fit(rows, truth)

    def fitted(rows: list, truth: NDArray, test: list, **options: Any) -> NDArray:
        return model(rows, truth, **options).decision_function(test)[:, 0]

    def components(members: list[NDArray], rows: list) -> Callable[[NDArray], NDArray]:
        joined = np.concatenate(rows)
        axes = [
            PCA(min(COMPONENTS, len(columns)), svd_solver="covariance_eigh").fit(joined[:, columns])
            for columns in members
        ]
        return lambda row: np.hstack(
            [axis.transform(row[:, columns]) for axis, columns in zip(axes, members, strict=True)]
        )

    def reduced(members: list[NDArray], rows: list, truth: NDArray, test: list) -> NDArray:
        courses = components(members, rows)
        return tangent([courses(row) for row in rows], truth, [courses(row) for row in test])

    def mean(rows: list, truth: NDArray, test: list) -> NDArray:
        courses = components(patches_of, [patches for _, patches in rows])
        given, asked = (
            ([labels for labels, _ in part], [courses(patches) for _, patches in part]) for part in (rows, test)
        )
        models = [model(own, truth, **options) for own, options in zip(given, (of_kinds, in_tangent), strict=True)]
        return sum(
            scale * (one.decision_function(own)[:, 0] - one.centre_) + share * one.centre_
            for one, own, share, scale in zip(models, asked, *shares_of(models, [True, True]), strict=True)
        )

    of_kinds: dict[str, Any] = {"kinds": KINDS}
    in_tangent: dict[str, Any] = {"kinds": ["tangent"], "discard_diagonal": False}
    tangent: Readout = partial(fitted, **in_tangent)
    ways: list[tuple[list, Readout]] = [
        (of_labels, partial(fitted, **of_kinds)),
        (of_groups, tangent),
        (of_labels, partial(reduced, members)),
        (of_patches, partial(reduced, patches_of)),
        (list(zip(of_labels, of_patches, strict=True)), mean),
        (of_patterns, tangent),
    ]
    named = dict(zip([*CONNECTIVITY, CEILING], ways, strict=True))
    for name in rivals:
        series, readout = named[name]
        yield [row | {"readout": name} for row in _tested(design, runs, {False: series}, readout)]


def _patches(groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number what each group has of each patch.

    Args:
        groups: number of each voxel's group on the grid, 0 for none.

    Returns:
        Number of each voxel's patch, `grid.SHAPE`, 0 without a group; and the group of each patch, from number 1 on.
    """
    edges = np.indices(grid.SHAPE) // PATCH
    pairs = np.stack([*edges, groups])[:, groups > 0]
    found, numbers = np.unique(pairs, axis=1, return_inverse=True)
    patches = np.zeros(grid.SHAPE, np.int64)
    patches[groups > 0] = numbers + 1
    return patches, found[-1]


def _means(frames: NDArray, numbers: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Mean course (T, count) of the voxels of each number from 1 on, detrended and of SD 1 (see `region_series`).

    Args:
        frames: (T, V) values.
        numbers: (V,) of each voxel; those of 0 are left out.
        count: the highest number. The course of a number without voxels is 0.
    """
    sizes = np.bincount(numbers, minlength=count + 1)
    weights = csr_array((1 / sizes[numbers], (numbers, np.arange(len(numbers)))), (count + 1, len(numbers)))
    return signal.clean((weights @ frames.T).T[:, 1:], detrend=True, standardize="zscore_sample")


def encoder_rows(design: Design, folder: Path, settings: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Rows of each of the design's readouts of one encoder; `settings` as for `load_frozen`."""
    runs = records_of(folder)
    encoder, normalisation = load_frozen(settings, design.seed)
    heads = {
        name: CovarianceReadout(
            **{"atlas": design.atlas} | {k: v for k, v in arguments.items() if k != "kind"}, **encoder.size
        )
        for name, arguments in design.readouts.items()
        if arguments["kind"] == "covariance"
    }
    for head in heads.values():
        head.encoder = encoder
        head.to(encoder.patch_embedding.weight.device)
    none = np.zeros(np.prod(grid.SHAPE), bool)
    kinds = {False: none}
    if design.shift:
        atlas = load_atlas(design.atlas)
        kinds[True] = np.isin(labels_on(atlas, grid.AFFINE, grid.SHAPE), region_labels(design.shift, atlas)).ravel()
    features = {
        shifted: [_features(folder, run, encoder, normalisation, heads, moved) for run in runs]
        for shifted, moved in kinds.items()
    }
    for name, arguments in design.readouts.items():
        key = name if name in heads else "tokens"
        readout: Readout = partial(_mean, design.seed)
        if arguments["kind"] == "attention":
            readout = partial(_attention, encoder, design.seed)
        elif name in heads:
            readout = partial(_covariance, heads[name], design.seed)
        rows: dict[bool, list] = {shifted: [run[key] for run in found] for shifted, found in features.items()}
        how = design
        if arguments.get("harmonise"):
            how = replace(design, sizes=())  # of few subjects a site has one or none
            readout = partial(_harmonised_mean, design.seed)
            rows = {
                shifted: [(run["site"], own) for run, own in zip(runs, found, strict=True)]
                for shifted, found in rows.items()
            }
        yield [row | {"readout": name} for row in _tested(how, runs, rows, readout)]


def load_frozen(settings: Mapping[str, Any], seed: int) -> tuple[SwinMambaEncoder, Normalisation]:
    """A frozen encoder, on a CUDA device where there is one, and the units that it sees.

    Args:
        settings: `{"checkpoint": path}`, or `{"size": arguments of the encoder, "normalisation": arguments}`.
        seed: of random weights.
    """
    if "checkpoint" in settings:
        encoder, facts = frozen_encoder(settings["checkpoint"])
        normalisation = facts["normalisation"]
    else:
        torch.manual_seed(seed)
        encoder, normalisation = SwinMambaEncoder(**settings["size"]), settings["normalisation"]
    return encoder.requires_grad_(False).eval().to(best_device()), Normalisation(**normalisation)


@torch.no_grad()
def _features(
    folder: Path,
    run: dict,
    encoder: SwinMambaEncoder,
    normalisation: Normalisation,
    heads: Mapping[str, CovarianceReadout],
    moved: NDArray[np.bool_],
) -> dict[str, Tensor]:
    """Of a run, on the CPU: the last stage's tokens (C, tokens, c), each covariance readout's features (C, T, L, c).

    Args:
        folder: the store.
        run: the run's record.
        encoder: the frozen encoder.
        normalisation: the units that it sees.
        heads: covariance readouts by name.
        moved: which voxels, of the flat grid, are moved in time by half a run.
    """
    name, voxels = run["run_id"], store.read_voxels(folder, run["run_id"])
    frames = store.read_clip(folder, name, 0, run["frames"])
    columns = moved[voxels]
    frames[:, columns] = np.roll(frames[:, columns], len(frames) // 2, axis=0)
    whole = {"bold": frames, "voxels": voxels, "moments": store.read_moments(folder, name), "record": run}
    device = encoder.patch_embedding.weight.device
    to_image = Compose([TakeClipd(frames=encoder.frames), ScatterClipd(normalisation, device), TimeLastd()])
    found: dict[str, list[Tensor]] = {key: [] for key in ("tokens", *heads)}
    for clip in clips([run], encoder.frames, encoder.frames):
        image = to_image(clip | whole)["image"].as_tensor()[None]
        stages = list(encoder.all_tokens(image))  # (1, x, y, z, T, c)
        found["tokens"].append(stages[-1].flatten(1, 4))
        for key, head in heads.items():
            found[key].append(pool(stages[head.stage], head.shares))
    return {key: torch.cat(parts).cpu() for key, parts in found.items()}


def _covariance(head: CovarianceReadout, seed: int, rows: list, labels: NDArray, test: list) -> NDArray:
    head.fit(rows, labels.tolist(), TASK, seed)
    return head(torch.cat(test), [len(run) for run in test])[:, 0].numpy()


def _mean(seed: int, rows: list, labels: NDArray, test: list) -> NDArray:
    """The best that a linear unit on the mean token can do."""
    return _linear(seed, _mean_tokens(rows), labels, _mean_tokens(test))


def _harmonised_mean(seed: int, rows: list, labels: NDArray, test: list) -> NDArray:
    """The same after `Combat`, which is fitted to the training rows; a row is a pair of site and tokens."""
    (sites, tokens), (test_sites, test_tokens) = parted(rows), parted(test)
    features = _mean_tokens(tokens)
    combat = Combat().fit(features, sites, kept_of(labels, classes=True))
    found = combat.transform(features, sites), combat.transform(_mean_tokens(test_tokens), test_sites)
    return _linear(seed, found[0], labels, found[1])


def _mean_tokens(rows: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.stack([run.mean((0, 1)).numpy() for run in rows])


def _linear(seed: int, rows: NDArray, labels: NDArray, test: NDArray) -> NDArray:
    """Logits by a logistic regression whose penalty is tuned."""
    linear, penalties, scoring = TASK.linear(seed)
    model = Pipeline([("scale", StandardScaler()), ("linear", linear)])
    grid = {f"linear__{name}": strengths for name, strengths in penalties.items()}
    search = GridSearchCV(model, grid, scoring=scoring, cv=inner_folds(labels, linear, seed))
    search.fit(rows, labels)
    return search.decision_function(test)


def _attention(
    encoder: SwinMambaEncoder, seed: int, rows: list, labels: NDArray, test: list, epochs: int = 40
) -> NDArray:
    """`AttentionClassifier`, trained as by train.json with its overlay: AdamW, learning rate 0.001, batches of 8."""
    torch.manual_seed(seed)
    head = AttentionClassifier(**encoder.size)
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-3)
    targets = torch.as_tensor(labels, dtype=torch.float32)[:, None]
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(8):
            chosen = [rows[int(i)] for i in batch]
            logits = head(torch.cat(chosen), [len(run) for run in chosen])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return head.eval()(torch.cat(test), [len(run) for run in test])[:, 0].numpy()
