"""ComBat: take what sites add to features, and by what they stretch them, off again."""

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

COMBAT = "combat"
"""What `harmonise` is called in plans."""
STEPS = 1000
"""Of the posterior's iteration; it takes a few dozen."""
FAINT = 1e-9
"""A feature whose SD is below this share of its size is flat, and left as it is."""


class Combat:
    """Empirical Bayes harmonisation of features across sites, fitted to training participants, by site alone.

    Johnson et al. 2007 (Biostatistics 8:118), as Fortin et al. 2018 (NeuroImage 167:104) use it: a feature is
    `mean + kept @ slope + sd * (shift[site] + sqrt(scale[site]) * noise)`, and shifts and scales of a site are shrunk
    towards their average over features.

    What is kept, the target, is known while this is fitted, so that a site with more cases does not take their effect
    for its own. When it is applied, to training and test participants alike, it is not known: features are taken around
    the training participants' mean, effects of `kept` included (as `neuroCombatFromTraining` does). So what becomes of
    a participant's features depends on them and on the site alone, and on no label of a test participant.

    Attributes:
        sites: names, in order.
        shift: of each site in SD, (s, f).
        scale: of each site's variance, (s, f).
        centre: the training participants' mean, sites weighed by their participants, (f,).
        sd: around what is kept and the sites' shifts, (f,).
    """

    def fit(self, features: Floats, sites: Sequence[str], kept: Floats) -> Self:
        """Estimate from training participants.

        Args:
            features: (n, f).
            sites: of each, (n,).
            kept: what is not to be taken for an effect of the sites, (n, k).

        Raises:
            InputError: one site or one feature only, a site of one participant, or sites that cannot be told from what
                is kept.
        """
        self.sites, member = np.unique(np.asarray(sites, str), return_inverse=True)
        counts = np.bincount(member)
        if len(counts) < 2 or features.shape[1] < 2:
            raise InputError(
                f"ComBat compares two sites or more in two features or more; the training set has {len(counts)} and "
                f"{features.shape[1]}, so take `harmonise` off"
            )
        if counts.min() < 2:
            raise InputError(
                f"the site {self.sites[counts.argmin()]} has one training participant, of whom ComBat cannot tell a "
                "scale; leave the site out, or take `harmonise` off"
            )
        here = (member[:, None] == np.arange(len(counts))).astype(float)
        design = np.hstack([here, kept])
        if np.linalg.matrix_rank(design) < design.shape[1]:
            raise InputError(
                "sites cannot be told from what is predicted, as where each site has one class only, so there is no "
                "harmonising; take `harmonise` off"
            )
        weights = np.linalg.lstsq(design, features, rcond=None)[0]
        self.sd = np.sqrt(((features - design @ weights) ** 2).mean(0))
        varies = self.sd > FAINT * np.abs(features).max(0)
        mean = counts / counts.sum() @ weights[: len(counts)]
        slope = weights[len(counts) :]
        rest = (features - mean - kept @ slope)[:, varies] / self.sd[varies]
        self.centre = mean + kept.mean(0) @ slope
        self.shift, self.scale = np.zeros((len(counts), len(mean))), np.ones((len(counts), len(mean)))
        for number in range(len(counts)):
            self.shift[number, varies], self.scale[number, varies] = _posterior(rest[member == number])
        return self

    def transform(self, features: Floats, sites: Sequence[str]) -> Floats:
        """Harmonise features (n, f) of participants of these sites.

        Raises:
            InputError: a site has no training participant, so that nothing is known of it.
        """
        member = [list(self.sites).index(site) if site in self.sites else -1 for site in map(str, sites)]
        if unknown := [str(site) for site, number in zip(sites, member, strict=True) if number < 0]:
            raise InputError(
                f"{len(unknown)} participants are of sites without training participants, such as {unknown[0]}, and "
                "cannot be harmonised; make other splits, or take `harmonise` off"
            )
        rest = features - self.centre - self.shift[member] * self.sd
        return rest / np.sqrt(self.scale[member]) + self.centre


def kept_of(labels: NDArray, classes: bool) -> Floats:
    """What `Combat` is to keep of labels (n,), (n, k): a column for each class but the first, or the value itself."""
    values = np.asarray(labels, float)[:, None]
    return (values == np.unique(values)[1:]).astype(float) if classes else values


def parted(rows: Sequence[tuple[str, Any]]) -> tuple[list[str], list[Any]]:
    """Sites, and what belongs to them, of pairs."""
    return [site for site, _ in rows], [own for _, own in rows]


def _posterior(rest: Floats) -> tuple[Floats, Floats]:
    """A site's shifts and variances (f,), shrunk; `rest` is the standardised data of its participants, (n, f).

    The priors, a normal one for shifts and an inverse gamma one for variances, are fitted over features by their
    moments; then the posterior means are found in turns (Johnson et al. 2007, equations in section 3.2).
    """
    n = len(rest)
    mean, variance = rest.mean(0), rest.var(0, ddof=1)
    variance[variance == 0] = 1.0
    centre, spread = mean.mean(), mean.var(ddof=1)
    average, around = variance.mean(), max(variance.var(ddof=1), np.finfo(float).eps)
    a, b = 2 + average**2 / around, average + average**3 / around
    shift, scale = mean, variance
    for _ in range(STEPS):
        before = shift, scale
        shift = (n * spread * mean + scale * centre) / (n * spread + scale)
        scale = (((rest - shift) ** 2).sum(0) / 2 + b) / (n / 2 + a - 1)
        if np.allclose(before, (shift, scale), rtol=1e-6, atol=1e-9):
            break
    return shift, scale
