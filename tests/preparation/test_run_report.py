"""The page of runs: a card for every run with what its row says, nothing that the data could smuggle in.

Not covered here: how it looks, and what its script does on a click.
"""

import pandas as pd
import pytest
from small_pages import addresses, of_class, read_page, text_of

from bundle.anatomy.atlas import REGIONS
from bundle.preparation import run_report
from bundle.preparation.run_report import rugs, write

HOSTILE = '"><script>alert(1)</script>'
LOW = {"coverage": 0.5, "mni_overlap": 0.8}


def row_of(name, warnings="", **changes):
    """A row as `bundle.preparation.prepare.row_of` gives it for a run that could be read."""
    row = {"run_id": name, "participant_id": f"p-{name}", "site": "north", "diagnosis": 1, "status": "ready"}
    row |= {"reason": "", "warnings": warnings, "axcodes_in": "LAS", "space": "MNI152", "tr_in": 2.0}
    row |= {
        "tr_source": "header",
        "frames_in": 30,
        "frames": 73,
        "voxel_mm": "3 x 3 x 3",
        "voxels": 1000,
        "mean": 900.5,
    }
    row |= {"sd": 50.25, "mni_overlap": 0.97} | {f"coverage_{region}": 0.9 for region in REGIONS}
    return row | {"censored": 0, "source": f"/data/{name}.nii.gz", "source_sha256": "ab" * 32} | changes


def failed(name, status="failed", reason="its file is damaged; copy it again", **changes):
    row = {"run_id": name, "participant_id": name, "site": None, "diagnosis": None}
    return row | {"status": status, "reason": reason, "warnings": ""} | changes


def page_of(folder, rows, **options):
    write(rows, folder, "runs.tsv", "runs.html", "Runs", low=LOW, **options)
    return read_page(folder / "runs.html")


def cards(page):
    return {card.get("id"): card for card in of_class(page, "card")}


def test_every_run_has_a_card_with_its_status_and_reason_and_the_worst_come_first(tmp_path):
    rows = [
        row_of("good"),
        row_of("odd", "no site"),
        failed("bad"),
        failed("out", "excluded", "covers too little"),
    ]
    page = page_of(tmp_path, rows)
    assert list(cards(page)) == ["bad", "out", "odd", "good"]
    assert [card.get("data-kind") for card in cards(page).values()] == ["failed", "excluded", "warned", "good"]
    shown = {name: text_of(card) for name, card in cards(page).items()}
    for row in rows:
        for column in ("run_id", "participant_id", "status", "reason", "warnings"):
            assert row[column] in shown[row["run_id"]]
    words = {"bad": "✕ failed", "out": "– excluded", "odd": "! warning", "good": "✓ good"}
    assert all(word in shown[name] for name, word in words.items())
    counts = [text_of(button) for button in page.iter("button")]
    assert counts == ["1failed", "1excluded", "1with a warning", "1good"]
    assert pd.read_csv(tmp_path / "runs.tsv", sep="\t").columns.tolist() == list(row_of(""))


def test_bars_show_the_rows_numbers_and_mark_what_is_low(tmp_path):
    shares = dict(zip(REGIONS, (0.049, 0.5, 0.625, 0.75, 0.9, 0.995, 1.0), strict=True))
    row = row_of("a", mni_overlap=0.79) | {f"coverage_{region}": share for region, share in shares.items()}
    bars = of_class(cards(page_of(tmp_path, [row]))["a"], "bar")
    found = {text_of(bar[0]): bar for bar in bars}
    for name, share in (shares | {"whole brain": 0.79}).items():
        (fill,) = of_class(found[name], "track")[0]
        assert float(fill.get("style").split(":")[1].strip(" %")) == pytest.approx(100 * share, abs=0.051)
        low = " low" if name in ("frontal", "whole brain") else ""
        assert text_of(of_class(found[name], "share")[0]) == f"{share:.0%}{low}"
        assert ("low" in found[name].get("class", "")) == bool(low)


def test_what_is_not_known_is_a_dash_and_no_number(tmp_path):
    gap = row_of("gap", site=None, diagnosis=None) | {"coverage_limbic": float("nan")}
    page = page_of(tmp_path, [gap, failed("bad"), row_of("moved", mean_fd=0.123)])
    for name in ("gap", "bad"):
        shown = text_of(cards(page)[name])
        assert "site – · no diagnosis" in shown
        assert not {"None", "nan", "nan%"} & set(shown.split())
    assert "limbic–" in text_of(cards(page)["gap"])
    assert not {"dl", "details", "svg"} & {element.tag for element in cards(page)["bad"].iter()}
    assert "TR2 s, from the header Voxels" in text_of(cards(page)["gap"])
    assert "Mean FD" not in text_of(cards(page)["gap"])
    assert "Mean FD0.12 mm" in text_of(cards(page)["moved"])


def test_a_page_of_failures_alone_has_no_measures(tmp_path):
    page = page_of(tmp_path, [failed("bad")], pictures={})
    assert len(cards(page)) == 1
    assert not of_class(page, "rug")


def test_names_and_reasons_are_not_markup(tmp_path):
    rows = [row_of(HOSTILE, HOSTILE, site=HOSTILE, source=HOSTILE, space=HOSTILE, tr_source=HOSTILE)]
    rows.append(failed("bad", reason=HOSTILE, participant_id=HOSTILE))
    write(rows, tmp_path, "runs.tsv", "runs.html", HOSTILE, {HOSTILE: b"picture"}, LOW)
    text = (tmp_path / "runs.html").read_text()
    assert "<script>alert" not in text
    page = read_page(tmp_path / "runs.html")
    assert len(list(page.iter("script"))) == 1  # the page's own
    assert HOSTILE in cards(page)  # as text it is all there
    assert HOSTILE in text_of(cards(page)["bad"])
    assert text_of(next(page.iter("h1"))) == HOSTILE


def test_pictures_are_on_their_cards_and_their_absence_is_said(tmp_path):
    rows = [row_of("a"), row_of("b"), failed("bad")]
    page = page_of(tmp_path, rows, pictures={"b": b"RIFF"})
    assert {name: len(list(card.iter("img"))) for name, card in cards(page).items()} == {"bad": 0, "a": 0, "b": 1}
    picture = next(cards(page)["b"].iter("img"))
    assert picture.get("src") == "data:image/webp;base64,UklGRg=="
    assert "mean BOLD" in picture.get("alt")
    assert "scripts preflight" not in text_of(page)
    assert "This page has no pictures. python -m scripts preflight SOURCE draws" in text_of(page_of(tmp_path, rows))


def test_nothing_is_fetched(tmp_path):
    page = page_of(tmp_path, [row_of("a"), failed("bad")], pictures={"a": b"RIFF"})
    assert all(address.startswith("data:") for address in addresses(page))
    (policy,) = [meta.get("content") for meta in page.iter("meta") if "http-equiv" in meta.attrib]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_a_line_per_measure_holds_a_stroke_per_run():
    rows = [row_of("a", frames=70), row_of("b", "odd", frames=80, coverage_limbic=0.25), failed("bad")]
    lines = {line["name"]: line for line in rugs(rows, LOW)}
    assert "mean framewise displacement" not in lines
    assert lines["frames prepared"]["strokes"] == {"good": [0], "warned": [1000]}
    assert lines["TR"]["strokes"] == {"good": [500], "warned": [500]}  # all alike
    limbic = lines["limbic covered"]
    assert limbic["strokes"] == {"good": [900], "warned": [250]}
    assert (limbic["least"], limbic["median"], limbic["most"], limbic["limit"]) == (0.25, 0.575, 0.9, 500)
    assert lines["frames prepared"]["limit"] is None


def test_of_many_regions_the_page_shows_those_that_are_covered_least_and_the_table_all(tmp_path):
    shares = {f"network {n}": 0.3 + 0.6 * (n * 7 % 20) / 20 for n in range(20)}
    bare = {key: value for key, value in row_of("a").items() if not key.startswith("coverage_")}
    page = page_of(tmp_path, [bare | {f"coverage_{name}": share for name, share in shares.items()}])
    least = sorted(shares, key=shares.get)[:12]
    shown = [text_of(bar[0]) for bar in of_class(cards(page)["a"], "bar")]
    assert shown == [*(name for name in shares if name in least), "whole brain"]
    assert len(of_class(page, "rug")) == 1 + 12 + 3  # the brain, the regions; frames acquired and prepared, TR
    assert sum(column.startswith("coverage_") for column in pd.read_csv(tmp_path / "runs.tsv", sep="\t")) == 20


def test_of_very_many_runs_the_worst_have_cards_and_the_table_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "MOST_CARDS", 3)
    rows = [row_of("old", status="current"), row_of("new"), failed("bad"), row_of("older", status="current")]
    page = page_of(tmp_path, rows)
    assert list(cards(page)) == ["bad", "new", "old"]
    assert "4 runs, the worst first; the first 3 are shown" in text_of(page)
    assert len(pd.read_csv(tmp_path / "runs.tsv", sep="\t")) == 4
