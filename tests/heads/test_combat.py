"""ComBat: the numbers of neuroCombat 0.2.12, its closed form without shrinking, and planted sites that hide a class.

The reference was computed once, with NumPy 1.26, by `neuroCombat(table.T, covars, "site", categorical_cols=["class"])`
and `neuroCombatFromTraining` on new participants; neuroHarmonize 2.5.2 gave the same parameters.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from bundle.errors import InputError
from bundle.heads.combat import Combat, kept_of

TABLE = np.array(
    [
        [0.18, 4.30, 4.51, 0.23],
        [0.82, 5.07, 5.47, 1.84],
        [2.94, 5.39, 4.34, 2.23],
        [4.87, 5.99, 3.69, 1.37],
        [3.08, 2.52, 5.75, 1.22],
        [2.56, 1.15, -0.14, 3.58],
        [4.35, 1.27, 5.24, 4.50],
        [4.50, 2.72, 4.50, 1.65],
        [5.33, 0.72, 3.00, 3.28],
        [3.63, 0.86, 4.77, 2.83],
        [4.80, -0.48, 6.15, 2.73],
        [6.09, -0.19, 5.80, 4.10],
        [3.77, 0.74, 7.03, 5.05],
    ]
)
SITES = list("aaaabbbbccccc")
LABELS = np.array([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0])
NEW = np.array([[1.48, 5.92, 5.30, 2.14], [1.55, 3.47, 2.59, 3.48], [5.42, -1.37, 5.05, 1.55]])
SHIFT = [
    [-1.660919, 4.507698, -0.048044, -1.403589],
    [-0.491541, -0.486423, -0.464217, -0.459076],
    [1.861999, -3.091020, 0.302249, 1.325090],
]
SCALE = [
    [1.105094, 1.003450, 0.607703, 0.807674],
    [1.952195, 1.951980, 2.019725, 1.978620],
    [0.959114, 0.979162, 0.995065, 0.993455],
]
HARMONISED = [
    [2.945583, 3.116433, 5.585918, 3.472442],
    [2.438640, 3.357358, 3.694708, 3.534360],
    [3.819447, 0.532875, 4.585425, 0.362010],
]


def test_the_numbers_are_those_of_neurocombat():
    """It stops once a step changes less than one part in 10 000."""
    combat = Combat().fit(TABLE, SITES, kept_of(LABELS, classes=True))
    np.testing.assert_allclose(combat.shift, SHIFT, atol=2e-6)
    np.testing.assert_allclose(combat.scale, SCALE, atol=2e-6)
    np.testing.assert_allclose(combat.transform(NEW, ["a", "b", "c"]), HARMONISED, atol=2e-6)


def test_many_participants_shrink_nothing_and_leave_each_sites_own_mean_and_sd():
    rng = np.random.default_rng(0)
    sites = np.array(["a", "b"] * 4000)
    scale = np.where(sites == "a", 1.0, 3.0)[:, None] * rng.uniform(1, 2, 6)
    rows = rng.normal(size=(8000, 6)) * scale + np.where(sites == "a", 0.0, 4.0)[:, None] * rng.normal(size=6)
    found = Combat().fit(rows, sites, np.zeros((8000, 0))).transform(rows, sites)
    within = np.sqrt((rows[sites == "a"].var(0) + rows[sites == "b"].var(0)) / 2)
    for site in ("a", "b"):
        own = rows[sites == site]
        expected = (own - own.mean(0)) / own.std(0) * within + rows.mean(0)
        np.testing.assert_allclose(found[sites == site], expected, rtol=0.02, atol=0.05)


def planted(rng: np.random.Generator, each: int, features: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three sites with another share of cases each, which add to features and stretch them; the class shifts half."""
    sites = np.repeat(["x", "y", "z"], each)
    labels = np.concatenate([rng.random(each) < share for share in (0.2, 0.5, 0.8)]).astype(int)
    number = np.searchsorted(["x", "y", "z"], sites)
    truth = np.random.default_rng(99)  # the same sites for training and test
    added, stretched = truth.normal(0, 2, (3, features)), truth.uniform(0.5, 2, (3, features))
    effect = np.where(np.arange(features) < features // 2, 0.6, 0.0)
    noise = rng.normal(size=(3 * each, features))
    return added[number] + stretched[number] * (labels[:, None] * effect + noise), sites, labels


def site_told(rows: np.ndarray, sites: np.ndarray, new: np.ndarray, new_sites: np.ndarray) -> float:
    model = LogisticRegression(max_iter=2000, class_weight="balanced").fit(rows, sites)
    return float(balanced_accuracy_score(new_sites, model.predict(new)))


def test_sites_that_go_with_the_class_are_gone_from_new_participants_and_the_class_is_not():
    """Of new controls, since the share of cases still differs by site, and tells it, however well it is harmonised.

    300 controls of a third each: a balanced accuracy of 1/3 by chance, SD 0.03.
    """
    rng = np.random.default_rng(1)
    rows, sites, labels = planted(rng, 200)
    new, new_sites, new_labels = planted(rng, 400)
    combat = Combat().fit(rows, sites, kept_of(labels, classes=True))
    fitted, found = combat.transform(rows, sites), combat.transform(new, new_sites)
    control, new_control = labels == 0, new_labels == 0
    before = site_told(rows[control], sites[control], new[new_control], new_sites[new_control])
    after = site_told(fitted[control], sites[control], found[new_control], new_sites[new_control])
    assert before > 0.95
    assert after < 1 / 3 + 0.1
    difference = found[new_labels == 1].mean(0) - found[new_control].mean(0)  # in SD within site and class
    spread = found[new_control].std(0)
    assert np.abs(difference / spread)[20:].max() < 0.25
    assert (difference / spread)[:20].mean() == pytest.approx(0.6, abs=0.1)


def test_without_the_class_kept_part_of_its_effect_would_go_with_the_sites():
    rng = np.random.default_rng(1)
    rows, sites, labels = planted(rng, 200)
    new, new_sites, new_labels = planted(rng, 400)
    effects = []
    for kept in (kept_of(labels, classes=True), np.zeros((len(labels), 0))):
        found = Combat().fit(rows, sites, kept).transform(new, new_sites)
        effects.append((found[new_labels == 1].mean(0) - found[new_labels == 0].mean(0))[:20].mean())
    assert effects[1] < 0.85 * effects[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-50, 50))
def test_units_do_not_matter(seed: int, factor: float, offset: float):
    rng = np.random.default_rng(seed)
    rows, sites, kept = rng.normal(size=(20, 5)), np.array(list("abcd") * 5), rng.normal(size=(20, 1))
    plain = Combat().fit(rows, sites, kept).transform(rows, sites)
    other = Combat().fit(factor * rows + offset, sites, kept).transform(factor * rows + offset, sites)
    np.testing.assert_allclose(other, factor * plain + offset, atol=1e-6 * max(1, factor))


def test_new_participants_are_harmonised_each_by_themselves():
    combat = Combat().fit(TABLE, SITES, kept_of(LABELS, classes=True))
    together = combat.transform(NEW, ["a", "b", "c"])
    changed = combat.transform(np.vstack([NEW[:1], 100 * NEW[1:]]), ["a", "c", "c"])
    np.testing.assert_array_equal(together[0], changed[0])


def test_a_flat_feature_stays_and_harms_no_other():
    combat = Combat().fit(np.insert(TABLE, 2, 7.0, axis=1), SITES, kept_of(LABELS, classes=True))
    found = combat.transform(np.insert(NEW, 2, [7.0, 8.0, 9.0], axis=1), ["a", "b", "c"])
    np.testing.assert_allclose(found[:, 2], [7.0, 8.0, 9.0])
    np.testing.assert_allclose(np.delete(found, 2, axis=1), HARMONISED, atol=2e-6)


def test_what_is_kept_is_all_classes_but_the_first_or_the_number():
    assert kept_of(np.array([2, 0, 1]), classes=True).tolist() == [[0, 1], [0, 0], [1, 0]]
    assert kept_of(np.array([2.5, 0.5]), classes=False).tolist() == [[2.5], [0.5]]


@pytest.mark.parametrize(
    ("sites", "labels", "columns", "message"),
    [
        (["a"] * 13, LABELS, 4, "two sites or more"),
        (SITES, LABELS, 1, "two features or more"),
        ([*SITES[:-1], "d"], LABELS, 4, "the site d has one training participant"),
        (SITES, np.repeat([0, 1], [4, 9]), 4, "sites cannot be told from what is predicted"),
    ],
)
def test_what_cannot_be_harmonised_is_refused(sites, labels, columns, message):
    with pytest.raises(InputError, match=message):
        Combat().fit(TABLE[:, :columns], sites, kept_of(labels, classes=True))


def test_a_site_without_training_participants_is_refused_with_a_count():
    combat = Combat().fit(TABLE, SITES, kept_of(LABELS, classes=True))
    with pytest.raises(InputError, match="2 participants are of sites without training participants, such as d"):
        combat.transform(NEW, ["d", "a", "d"])
