"""The demo's page, from small made-up results: nothing is missing, nothing is fetched, and all is called SYNTHETIC.

Not covered here: how it looks, and the demo itself.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from small_pages import addresses, of_class, read_page, text_of
from tasks import BINARY
from torch.utils.tensorboard import SummaryWriter

from bundle.data.splits import load_splits
from bundle.data.targets import read_target
from bundle.evaluation.subjects import write_test_scores
from bundle.experiments.demo_report import (
    PANEL,
    curve_figures,
    rebuilt_figure,
    score_figure,
    subject_figure,
    write_demo_report,
)
from bundle.experiments.trial import learning_curves
from bundle.training.pictures import reconstruction_panel

HOSTILE = "<script>alert(1)</script>"
SCALARS = ("train_masked_mse", "val_masked_mse", "val_temporal_r2")


def panel() -> np.ndarray:
    image = torch.rand(96, 96, 96, 2)
    hidden = torch.zeros(96, 96, 96, dtype=torch.bool)
    hidden[30:50, 40:60, 20:40] = True
    return reconstruction_panel(image, torch.rand_like(image), hidden)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    """What a demo of 12 subjects and 3 epochs would leave, but for the checkpoints."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "store").symlink_to(store)
    parameters = {"effect": 2.0, "effect_on": "coupling"}
    (folder / "derivatives").mkdir()
    truth = {"parameters": parameters, "regions": ["limbic"], "best_auroc": 0.92}
    (folder / "derivatives" / "truth.json").write_text(json.dumps(truth))
    with SummaryWriter(folder / "pretrain" / "tensorboard") as writer:
        for step in range(1, 7):
            writer.add_scalar("iteration_loss", 1 / step, step)
            writer.add_scalar("gradient_norm", 2 / step, step)
        for epoch in range(1, 4):
            for tag in SCALARS:
                writer.add_scalar(tag, epoch / 4, epoch)
            writer.add_image(PANEL, panel(), epoch, dataformats="HW")
    sets = load_splits(store / "splits.json")["sets"]
    labels = read_target(store).labels
    tables = [
        pd.DataFrame({"participant_id": sets[name], "site": "A", "label": [labels[p] for p in sets[name]], "clips": 3})
        for name in ("validation", "test")
    ]
    tables = [table.assign(logit=np.linspace(-1, 1, len(table)) + table["label"]) for table in tables]
    write_test_scores(BINARY, *tables, folder / "train" / "evaluation", 50)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return read_page(write_demo_report(folder))


def test_it_says_that_all_is_synthetic_at_the_top_at_the_scores_and_at_the_end(page):
    assert "SYNTHETIC" in text_of(next(page.iter("h1")))
    text = text_of(page)
    assert text.count("SYNTHETIC") >= 4
    assert text.count("these scores say nothing about ADHD") == 2
    assert text_of(of_class(page, "banner")[0]).startswith("SYNTHETIC data")
    assert "Once more: SYNTHETIC data" in text_of(of_class(page, "banner")[-1])


def test_it_says_after_how_many_epochs(page):
    assert "After 3 epochs the squared error" in " ".join(text_of(page).split())


def test_one_file_holds_it_all(page):
    pictures = list(page.iter("img"))
    assert len(pictures) == 6  # mask, rebuilt, two curves, subjects, scores
    assert all(picture.get("src").startswith("data:image/png;base64,") for picture in pictures)
    assert all(len(picture.get("alt")) > 20 for picture in pictures)
    assert all(text_of(next(figure.iter("figcaption"))) for figure in page.iter("figure"))
    ids = {element.get("id") for element in page.iter()}
    links = [address for address in addresses(page) if not address.startswith("data:")]
    assert {link for link in links if link[0] != "#"} == {
        "store/report.html", "https://docs.monai.io/en/stable/bundle_intro.html"
    }  # fmt: skip
    assert {link[1:] for link in links if link[0] == "#"} <= ids


def test_every_test_subject_and_every_score_is_there_with_its_interval(folder, page):
    rows = [[text_of(cell) for cell in row.iter("td")] for row in page.iter("tr")]
    subjects = pd.read_csv(folder / "train/evaluation/subjects.tsv", sep="\t")
    for row in subjects.to_dict("records"):
        (found,) = [cells for cells in rows if cells[:1] == [row["participant_id"]]]
        assert found[2:5] == [{0: "control", 1: "case"}[row["label"]], "3", f"{row['probability']:.3f}"]
        assert ("wrong" in found[5]) == (row["label"] != row["predicted"])
    scores = json.loads((folder / "train/evaluation/scores.json").read_text())["scores"]
    (found,) = [cells for cells in rows if cells[:1] == ["AUROC"]]
    low, high = (f"{scores['auroc'][end]:.3f}" for end in ("low", "high"))
    assert found[1:] == [f"{scores['auroc']['value']:.3f}", f"{low} – {high}"]


def test_the_counts_of_the_sets_add_up_to_the_participants(page):
    rows = [[text_of(cell) for cell in row.iter("td")] for row in page.iter("tr")]
    counts = [row[1:] for row in rows if row[:1] in (["north"], ["south"])]
    assert sum(int(count) for row in counts for count in row) == 12
    assert len(of_class(page, "rug")) == 8  # seven regions and the whole brain


def test_without_an_effect_it_says_that_scores_must_be_at_chance(folder, tmp_path):
    copy = tmp_path / "demo"
    copy.mkdir()
    for name in ("store", "pretrain", "train"):
        (copy / name).symlink_to(folder / name)
    (copy / "derivatives").mkdir()
    truth = {"parameters": {"effect": 0.0, "effect_on": "intensity"}, "regions": [], "best_auroc": 0.5}
    (copy / "derivatives/truth.json").write_text(json.dumps(truth))
    assert "Nothing is planted" in text_of(read_page(write_demo_report(copy)))


def test_names_are_not_markup_and_undefined_scores_are_dashes(folder, tmp_path):
    copy = tmp_path / "demo"
    (copy / "train/evaluation").mkdir(parents=True)
    for name in ("store", "pretrain", "derivatives", "train/tensorboard"):
        (copy / name).symlink_to(folder / name)
    table = pd.DataFrame({"participant_id": [HOSTILE, "b"], "site": "A", "label": 0, "logit": [0.5, -0.5], "clips": 3})
    validation = pd.DataFrame({"label": [0, 1], "logit": [-1.0, 1.0]})
    write_test_scores(BINARY, validation, table, copy / "train/evaluation", 20)  # controls only: no AUROC
    text = write_demo_report(copy).read_text()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(1)" in text
    assert re.search(r"AUROC</td><td>–</td><td>– – –</td>", text)


def test_planes_keep_their_places_and_only_what_was_hidden_is_outlined():
    image = panel()
    figure = rebuilt_figure(image)
    assert len(figure.axes) == 9
    for number, axes in enumerate(figure.axes):
        row, column = divmod(number, 3)
        tile = image[96 * row : 96 * (row + 1), 96 * column : 96 * (column + 1)]
        np.testing.assert_array_equal(axes.images[0].get_array(), tile)
    outline = np.concatenate([path.vertices for path in figure.axes[0].collections[0].get_paths()])
    assert outline[:, 0].min() == pytest.approx(39.5, abs=0.5)  # y of the hidden block, to the right
    assert outline[:, 0].max() == pytest.approx(59.5, abs=0.5)
    assert outline[:, 1].min() == pytest.approx(95 - 39.5, abs=0.5)  # z, upwards
    assert outline[:, 1].max() == pytest.approx(95 - 19.5, abs=0.5)


def test_curves_and_dots_are_those_of_the_tables(folder):
    loss, score = curve_figures(learning_curves(folder))
    each, train, validation = loss.axes[0].lines
    assert each.get_xdata()[-1] == 3  # six steps in three epochs
    assert train.get_ydata() == pytest.approx([0.25, 0.5, 0.75]) == validation.get_ydata()
    assert score.axes[0].lines[1].get_xdata().tolist() == [1, 2, 3]
    subjects = pd.DataFrame({"participant_id": ["a", "b", "c"], "label": [1, 0, 1], "probability": [0.9, 0.2, 0.4]})
    axes = subject_figure(subjects, 0.3).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    assert axes.collections[1].get_offsets().tolist() == [[0.4, 1], [0.9, 2]]  # the cases
    nothing = {"value": None, "low": None, "high": None}
    dots = score_figure({"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}, "auroc": nothing}).axes[0].lines
    assert dots[0].get_xdata() == pytest.approx([0.1, 0.9])
    assert np.isnan(dots[3].get_xdata()).all()
