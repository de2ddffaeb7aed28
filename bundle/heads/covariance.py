"""A readout of how parcels fluctuate together: covariance of a frozen encoder's tokens in tangent space."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from nilearn.connectome import ConnectivityMeasure
from numpy.typing import NDArray
from scipy.signal import detrend
from sklearn.covariance import LedoitWolf
from torch import Tensor

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.errors import InputError
from bundle.heads.connectivity import ConnectivityModel, shares_of
from bundle.heads.fitted import FittedHead, by_participant
from bundle.heads.pooling import label_members, pool, token_shares
from bundle.tasks.task import Task

logger = logging.getLogger(__name__)

COMPONENTS = MappingProxyType({"group": (1, 2), "label": (1,)})
SUBTRACT = ("clip_mean", "training_mean", None)
FAINT = 1e-4
"""A component whose SD in a run is below this share of its SD in training is rounding noise, and counts as still."""


class CovarianceReadout(FittedHead):
    """Score whole runs by the covariance of parcels' courses, in the tangent space of the training set's mean.

    The encoder's tokens are averaged over each label, and a linear drift over the run is taken off. All channels of all
    labels of a parcel become a few principal components, so that what differs between its labels, and inside them, is
    kept and not averaged away. The components' courses over a run are scaled to SD 1. Their Ledoit-Wolf covariance is
    mapped to the tangent space of the training participants' geometric mean (Varoquaux et al. 2010, MICCAI; nilearn's
    `ConnectivityMeasure`), standardised, and weighed by the task's linear model (of classes a logistic regression)
    whose penalty is tuned in folds of the training participants.

    Each level of parcels has a model of its own, and the output is a mean of theirs: their deviations from the training
    participants' mean output are brought to one SD over the participants that inner folds hold back, and weighed by how
    much better than chance they score on them; a level that does not is left out. (The same folds have chosen penalties
    and numbers, so that these scores are a little hopeful.) What tells groups apart may be inside labels or between
    them: see docs/dynamics.md.

    Nothing is learnt by gradients: `fit` fits all of it, and the state dict holds it as plain tensors.

    Args:
        freeze: must be True.
        outputs: numbers per run, see `bundle.tasks.task.Task`.
        stage: whose tokens are read, see `SwinMambaEncoder.tokens`.
        components: which parcels, and how many principal components of each, to choose from: numbers by level, which is
            "label", each by itself, or "group" (of AAL3: the seven regions and the insula). Of a level that number is
            taken which scores best in folds of the training participants; of equals the first.
        subtract: what is taken off before, frame by frame of the clip: "clip_mean", the run's own mean over its clips;
            "training_mean", the mean over all clips of all training runs; or None. (The embedding of time repeats in
            every clip, and would pass for a fluctuation that all parcels share.)
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        **encoder: the arguments of `SwinMambaEncoder`.

    Raises:
        InputError: an argument is none of those above.
    """

    shares: Tensor  # (labels, tokens)

    def __init__(
        self,
        freeze: bool = True,
        outputs: int = 1,
        stage: int = 1,
        components: Mapping[str, Sequence[int]] = COMPONENTS,
        subtract: str | None = "clip_mean",
        atlas: str | Path = AAL3,
        **encoder: Any,
    ) -> None:
        super().__init__(freeze, outputs, **encoder)
        if subtract not in SUBTRACT:
            raise InputError(f"subtract must be clip_mean, training_mean or null, not {subtract!r}")
        edge, channels = self.encoder.tokens_of(stage)
        if not (isinstance(components, Mapping) and components) or not all(
            numbers and min(numbers) >= 1 and max(numbers) <= channels for numbers in components.values()
        ):
            raise InputError(
                f"components must be numbers of 1 to {channels}, the channels of stage {stage}, by level, such as "
                f'{{"group": [1]}}, not {components}'
            )
        self.stage, self.subtract = stage, subtract
        self.components = {level: sorted(components[level]) for level in sorted(components)}
        self.parcels = {level: label_members(atlas, level) for level in self.components}
        self.register_buffer("shares", token_shares(atlas, edge, self.encoder.image_size), persistent=False)
        self.settings |= {
            "stage": stage,
            "components": self.components,
            "subtract": subtract,
            "atlas": load_atlas(atlas).sha256,
        }

    def get_extra_state(self) -> dict[str, Any]:
        """Return the settings, and all that was fitted as tensors on the CPU; `torch.load(weights_only=True)` reads it.

        The tensors are `training_mean` (T, L, c) of L labels; by level, with its name and a dot before, `parcel` (L,),
        the number of each label's parcel, or -1, `basis` (L, c, k), each label's part of its parcel's components,
        `spread` (P, k) of P parcels, `mean` and `whitening` (P * k, P * k); and for `vectors` of d numbers, level after
        level, `weights` (m, d) and `bias` (m,) of m outputs. There are none before `fit`, and none of a level that is
        left out.
        """
        return super().get_extra_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned.

        Raises:
            InputError: it was fitted with other settings, or by an earlier version.
        """
        if "basis" in state["fitted"]:
            raise InputError(
                "the CovarianceReadout was fitted by an earlier version; train it again, into another folder"
            )
        super().set_extra_state(state)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Map clips (C, 1, X, Y, Z, T) to their tokens' mean over each label, float32 (C, T, L, c)."""
        return pool(self.encoder.tokens(image, self.stage), self.shares)

    def fit(
        self,
        runs: Sequence[Tensor],
        labels: Sequence[float],
        task: Task,
        seed: int = 0,
        participants: Sequence[Hashable] | None = None,
    ) -> None:
        """Fit all but the encoder to the training runs.

        Args:
            runs: `features` of each run's clips, (C, T, L, c).
            labels: number of the class, or value, of each run.
            task: what is predicted; its outputs are as many as the readout's.
            seed: of the inner folds.
            participants: who each run is of; None: each of another one. Courses of a participant's runs are joined, so
                that no participant is on both sides of an inner fold.

        Raises:
            InputError: a run does not fit, there is one course alone, or there are too few participants, see
                `inner_folds`.
        """
        total = sum(run.double().sum(0) for run in runs)
        self.fitted = {"training_mean": torch.as_tensor(total).cpu() / sum(map(len, runs))}
        truth = task.scaled(np.array([own[-1] for own in by_participant(labels, participants)], float))
        levels = [self._fit_level(level, runs, participants, truth, task, seed) for level in self.components]
        models = [model for model, _ in levels]
        several = np.array([model.weights_.shape[1] > 1 for model in models])  # else one course, whose variance is 1
        if not several.any():
            raise InputError("one component of one parcel varies together with nothing; take more components or labels")
        shares, scales = shares_of(models, several)
        weights, bias = [], np.zeros(self.outputs)
        for level, (model, found), share, scale in zip(self.components, levels, shares, scales, strict=True):
            logger.info("Share of each %s in the covariance readout: %.2f", level, share)
            if share > 0:
                self.fitted |= {f"{level}.{name}": tensor for name, tensor in found.items()}
                weights.append(scale * model.weights_)
                bias += scale * (model.bias_ - model.centre_) + share * model.centre_
        self.fitted |= {"weights": torch.from_numpy(np.hstack(weights)), "bias": torch.from_numpy(bias)}

    def _fit_level(
        self,
        level: str,
        runs: Sequence[Tensor],
        participants: Sequence[Hashable] | None,
        truth: NDArray[np.float64],
        task: Task,
        seed: int,
    ) -> tuple[ConnectivityModel, dict[str, Tensor]]:
        """The model of one level of parcels, and the level's tensors of `get_extra_state`."""
        numbers = self.components[level]
        parcel, basis, spread = self._principal(runs, self.parcels[level], numbers[-1])
        joined = by_participant((_components_of(self._centred(run), parcel, basis) for run in runs), participants)
        models = {}
        for number in numbers:
            rows = [
                np.concatenate([_courses(part[..., -number:], spread[:, -number:]) for part in parts])
                for parts in joined
            ]
            model = ConnectivityModel(*task.linear(seed), seed, kinds=["tangent"], discard_diagonal=False)
            models[number] = model.fit(rows, truth)
        number = max(models, key=lambda number: models[number].best_score_)  # of equals the first
        model = models[number]
        logger.info("Covariance of %d components of each %s, of %s, scores best in training", number, level, numbers)
        return model, {
            "parcel": parcel,
            "basis": basis[..., -number:].contiguous(),
            "spread": spread[:, -number:].contiguous(),
            "mean": torch.as_tensor(model.connectivity_.mean_, dtype=torch.float64),
            "whitening": torch.as_tensor(model.connectivity_.whitening_, dtype=torch.float64),
        }

    def _principal(
        self, runs: Sequence[Tensor], members: Sequence[Sequence[int]], most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `parcel`, `basis` and `spread` of `get_extra_state`, of parcels with these labels."""
        moments: list[Tensor] = [torch.zeros(()) for _ in members]
        frames = 0
        for run in runs:
            centred = self._centred(run)  # (n, L, c)
            for position, own in enumerate(members):
                courses = centred[:, own].flatten(1)
                moments[position] = moments[position] + courses.T @ courses
            frames += len(centred)
        parcel = torch.full(centred.shape[1:2], -1)
        basis = centred.new_zeros(*centred.shape[1:], most)
        spread = centred.new_zeros(len(members), most)
        for position, own in enumerate(members):
            variances, vectors = torch.linalg.eigh(moments[position] / frames)  # ascending
            parcel[own] = position
            basis[own] = vectors[:, -most:].unflatten(0, (len(own), -1))
            spread[position] = variances[-most:].clamp(min=0).sqrt()
        return parcel, basis, spread.clamp(min=FAINT * spread.max().item())  # parcels outside every brain

    def forward(self, image: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Score whole runs.

        Args:
            image: clips (C, 1, X, Y, Z, T), or their `features` (C, T, L, c), one run after another.
            counts: clips of each run; None: all are of one run.

        Returns:
            Outputs (n, k) of each run, float32, without gradients.

        Raises:
            InputError: it was not fitted, or to features of another shape, or a run has too few clips.
        """
        vectors = self.vectors(image, counts)
        outputs = vectors @ self.fitted["weights"].numpy().T + self.fitted["bias"].numpy()
        return torch.as_tensor(outputs, dtype=torch.float32, device=image.device)

    def seen(self, features: Tensor, counts: Sequence[int]) -> Tensor:
        """Of what is weighed of runs' `features`, see `vectors`, the level with the fewest parcels.

        It is what distances between subjects are made of; all pairs of a thousand labels would be half a million.
        """
        fewest = min(self._levels(), key=lambda level: len(self.fitted[f"{level}.mean"]))
        return torch.from_numpy(self._tangent(features, counts, [fewest]))

    def vectors(self, image: Tensor, counts: Sequence[int] | None = None) -> NDArray[np.float64]:
        """What `forward` weighs: the runs in tangent space, level after level, (n, d); it raises the same.

        Of P parcels with k components a level has P * k * (P * k + 1) / 2 numbers.
        """
        self.require_fitted()
        features = image.detach() if image.ndim == 4 else self.features(image)
        return self._tangent(features, [len(features)] if counts is None else list(counts), self._levels())

    def _levels(self) -> list[str]:
        """Those that were not left out."""
        return [level for level in self.components if f"{level}.basis" in self.fitted]

    def _tangent(self, features: Tensor, counts: Sequence[int], levels: Sequence[str]) -> NDArray[np.float64]:
        """Runs of `features` in the tangent spaces of some levels, one after another."""
        runs = [self._centred(run) for run in features.split(list(counts))]
        found = []
        for level in levels:
            parcel, basis, spread, mean, whitening = (
                self.fitted[f"{level}.{name}"] for name in ("parcel", "basis", "spread", "mean", "whitening")
            )
            courses = [_courses(_components_of(run, parcel, basis), spread) for run in runs]
            connectivity = ConnectivityMeasure(kind="tangent", vectorize=True, standardize=False)
            connectivity.cov_estimator_ = LedoitWolf(store_precision=False)
            connectivity.mean_, connectivity.whitening_ = mean.numpy(), whitening.numpy()
            found.append(connectivity.transform([*courses, courses[0]])[:-1])  # it refuses one run alone
        return np.hstack(found)

    def _centred(self, run: Tensor) -> Tensor:
        """A run's features (C, T, L, c) as deviations (C * T, L, c) from a line over the run, float64 on the CPU."""
        expected = self.fitted["training_mean"].shape
        if run.shape[1:] != expected:
            raise InputError(
                f"the covariance readout was fitted to clips of (frames, labels, channels) {tuple(expected)}, not "
                f"{tuple(run.shape[1:])}"
            )
        values = run.cpu().double()
        if self.subtract == "clip_mean":
            if len(values) < 2:
                raise InputError(
                    "a run of one clip does not differ from its mean over clips; give longer runs, or subtract "
                    "training_mean"
                )
            values = values - values.mean(0)
        elif self.subtract == "training_mean":
            values = values - self.fitted["training_mean"]
        return torch.from_numpy(detrend(values.flatten(0, 1).numpy(), axis=0))


def correlation_of_labels(features: Tensor) -> Tensor:
    """How alike labels fluctuate, without anything fitted.

    As in `CovarianceReadout`, the run's own mean over its clips and a line over the run are taken off. The correlation
    of two labels is then that of their tokens, over frames and channels together.

    Args:
        features: labels' tokens of a run's clips, (C, T, L, c).

    Returns:
        The correlations above the diagonal, row by row, (L * (L - 1) / 2,) float32; 0 for a label where nothing
        happens.
    """
    values = (features - features.mean(0)).double().cpu().flatten(0, 1).numpy()
    courses = detrend(values, axis=0).swapaxes(0, 1).reshape(features.shape[2], -1)  # (n, L, c) -> (L, n * c)
    sizes = np.linalg.norm(courses, axis=1)
    still = sizes <= FAINT * sizes.max()
    courses = courses / np.where(still, np.inf, sizes)[:, None]
    return torch.as_tensor((courses @ courses.T)[np.triu_indices(len(courses), 1)], dtype=torch.float32)


def _components_of(centred: Tensor, parcel: Tensor, basis: Tensor) -> Tensor:
    """Each parcel's components (n, P, k) of a run's deviations (n, L, c)."""
    parts = torch.einsum("nlc,lck->nlk", centred, basis)
    found = parts.new_zeros(len(parts), int(parcel.max()) + 1, basis.shape[-1])
    return found.index_add(1, parcel[parcel >= 0], parts[:, parcel >= 0])


def _courses(components: Tensor, expected: Tensor) -> NDArray[np.float64]:
    """A run's components (n, P, k) as courses (n, P * k) of SD 1, or 0 where nothing happens.

    Args:
        components: the components.
        expected: their SD in training (P, k), beside which a run's own may be rounding noise.
    """
    spread = components.std(0, correction=0)
    still = spread <= FAINT * expected
    return (components / spread.where(~still, torch.inf)).flatten(1).numpy()
