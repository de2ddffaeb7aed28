"""What README and the pages of docs/ tell a reader to type: it parses, it names what exists, and what is short is run.

Every shell line is checked against the commands and configs; every Python block is run, and so are the README's and
docs/data.md's lines for the reader's own data, on the tests' tiny cohort with tiny networks.
Not covered: set-up lines, torchrun, Dask, Docker, whole sweeps, benchmarks and the demo (see CI and the other tests).
"""

import ast
import inspect
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser
from tiny_configs import CONFIGS, TINY
from tiny_configs import run as run_configs

from bundle.command_line import refuse_unknown_options
from bundle.deploy.release import release
from bundle.experiments import gallery
from bundle.experiments.sweep import read_sweep
from scripts.__main__ import COMMANDS, main
from scripts.benchmarks.background import background
from scripts.benchmarks.floor import floor
from scripts.benchmarks.formats import formats
from scripts.benchmarks.gpu import gpu, profile
from scripts.benchmarks.launches import launches
from scripts.benchmarks.many_runs import many_runs
from scripts.benchmarks.redundancy_effect import redundancy_effect
from scripts.benchmarks.report import report
from scripts.benchmarks.scaling import memory, scaling
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import augmentation, redundancy

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
TEXTS["docs/CHANGELOG.md"] = re.sub(r"^\|.*\|$", "", TEXTS["docs/CHANGELOG.md"], flags=re.M)  # old names
BENCHMARKS = {
    f.__name__: f
    for f in (
        table,
        gpu,
        profile,
        scaling,
        memory,
        background,
        floor,
        formats,
        report,
        augmentation,
        redundancy,
        redundancy_effect,
        launches,
        many_runs,
    )
}
TOOLS = (
    "pip",
    "python3.11",
    "source",
    "export",
    "ruff",
    "mypy",
    "lint-imports",
    "pre-commit",
    "dask",
    "mkdocs",
    "cyclonedx-py",
)
"""Programs that are not this project's; their options are theirs to check."""


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks of some languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [content for language, content in fenced if language in languages]


def shell_lines(text: str) -> list[list[str]]:
    """Words of every command of a page: of its shell blocks, and of inline code that begins like one."""
    scripts = [block.replace("\\\n", " ") for block in blocks(text, "bash", "sh")]
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    scripts += re.findall(r"`((?:python -m|dask|mkdocs|pip) [^`]*)`", outside)
    found = []
    for line in "\n".join(scripts).splitlines():
        for command in re.split(r"\s&&\s", line):
            words = shlex.split(command.replace("$(python -m scripts where)", str(ROOT)), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]  # a variable of the environment, for this command alone
            if words:
                found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def documented() -> Iterator[tuple[str, list[str]]]:
    for page, text in TEXTS.items():
        for words in shell_lines(text):
            yield page, words


def split_flags(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Positional words, and values by flag, as Fire takes them."""
    places, flags, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        else:
            places.append(word)
    return places, flags


def check_call(function: Callable, words: list[str], whole: bool) -> None:
    """That a function takes these words; `whole`: also that nothing it needs is left out."""
    places, flags = split_flags(words)
    if "help" in flags:
        return
    signature = inspect.signature(function)
    (signature.bind if whole else signature.bind_partial)(*places, **flags)


def check_bundle(words: list[str]) -> None:
    """`python -m monai.bundle run ...`: the configs exist and know every option."""
    assert words[0] == "run", words
    places, flags = split_flags(words[1:])
    refuse_unknown_options(words)
    files = flags.get("config_file", f"configs/{places[0]}.json" if places else "")  # a name in running text has none
    names = ast.literal_eval(files) if files.startswith("[") else [files]
    config = ConfigParser.load_config_files([str(ROOT / name) for name in names])
    own = set(inspect.signature(monai.bundle.run).parameters)
    assert set(flags) <= own | set(config), set(flags) - own - set(config)
    assert set(places or ["run"]) <= set(config)


@pytest.mark.parametrize(("page", "words"), documented(), ids=lambda part: part if isinstance(part, str) else part[-1])
def test_a_documented_command_exists_and_takes_its_options(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2] == "monai.bundle":
        if words[3:]:
            check_bundle(words[3:])
    elif words[:3] == ["python", "-m", "scripts"]:
        if words[3:] and words[3] != "COMMAND":
            inline = len(words) == 4  # a name in running text, such as `python -m scripts synthesize`
            check_call(COMMANDS[words[3]], words[4:], whole=not inline)
    elif words[:2] == ["python", "-m"] and words[2].startswith("scripts.benchmarks"):
        if module := words[2].removeprefix("scripts.benchmarks").lstrip("."):
            assert (ROOT / "scripts" / "benchmarks" / f"{module}.py").is_file()
            assert words[3:] == []  # it may need the extra `bench`, so it is not imported
        else:
            named = words[3:] and not words[3].startswith("-")
            check_call(BENCHMARKS[words[3]] if named else table, words[4:] if named else words[3:], whole=True)
    elif words[:3] == ["python", "-m", "pytest"]:
        pass
    elif words[:2] == ["python", "-m"] and words[2].startswith("brainmarks."):
        assert words[3] == "brain_fmri_roi_mae"  # the rest is the suite's to check
    elif words[:2] == ["docker", "run"]:
        check_call(COMMANDS["app"], words[words.index("brain_fmri_roi_mae") + 1 :], whole=True)
    elif words[:3] == ["docker", "build", "-f"]:
        assert (ROOT / words[3]).is_file()
    else:
        assert words[0] in TOOLS, f"{page}: nobody checks {' '.join(words)}"


def test_no_block_is_of_a_language_that_is_not_checked():
    for page, text in TEXTS.items():
        languages = set(re.findall(r"^```(\w*)\n(?:.*?)^```$", text, flags=re.M | re.S))
        assert languages <= {"bash", "sh", "python", "json", "text"}, page


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_of_the_repository_that_a_page_names_exists(page: str):
    named = re.findall(r"(?<![\w./-])((?:bundle|configs|scripts|docs|tests)/[\w./*-]*[\w*/])", TEXTS[page])
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), f"{page} names {name}, which is not there"


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_to_a_file_resolves(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = ROOT / Path(page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links {target}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{page} links {target}"


def test_the_first_screen_of_the_readme_has_its_picture_its_command_and_its_ten_lines():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 120
    picture = re.search(r"!\[[^\]]*SYNTHETIC[^\]]*\]\(([^)]+)\)", text)
    assert picture is not None
    assert (ROOT / picture[1]).read_bytes()[:4] == b"\x89PNG"
    assert text.index(picture[0]) < text.index("-m scripts demo") < text.index("```python") < text.index("## Your data")
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "docs" / "pictures").glob("*.png"))


def test_the_sweep_of_the_page_is_one(tmp_path: Path):
    (block,) = blocks(TEXTS["docs/sweeps.md"], "json")
    (tmp_path / "sweep.json").write_text(block)
    assert len(read_sweep(tmp_path / "sweep.json").strategies) == 3


@pytest.fixture(scope="module")
def demo(store: Path, derivatives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the demo's folders, of the tests' cohort and a tiny network, and a bundle's folder."""
    folder = tmp_path_factory.mktemp("work")
    bundle = folder / "brain_fmri_roi_mae"
    (folder / "demo").mkdir()
    bundle.mkdir()
    (folder / "demo" / "derivatives").symlink_to(derivatives)
    (folder / "demo" / "store").symlink_to(store)
    (bundle / "configs").symlink_to(CONFIGS)
    run_configs("pretrain", dataset_dir=str(store), output_dir=str(folder / "demo" / "pretrain"))
    return folder


PYTHON = [
    (page, number)
    for page, text in TEXTS.items()
    if page != "docs/pipeline.md"  # runs with its shell lines, below
    for number, _ in enumerate(blocks(text, "python"))
]


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_a_documented_python_block_runs(
    page: str, number: int, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(demo)
    block = blocks(TEXTS[page], "python")[number]
    exec(compile(block, f"{page}, block {number}", "exec"), {"__name__": page})
    printed = capsys.readouterr().out
    assert re.search(r"\d", printed)
    assert "nan" not in printed


def run_line(words: list[str], monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    """Run one documented command in this process, its capitals replaced by what the tests have."""
    words = [re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: names[found[0]], word) for word in words]
    if words[2] == "scripts":
        small = ["--folds", "3"] if words[3] == "splits" and "--folds" not in words else []  # 12 participants
        monkeypatch.setattr(sys, "argv", [*words[2:], *small])
        main()
        return
    _, flags = split_flags(words[4:])
    files = flags.pop("config_file")
    files = ast.literal_eval(files) if files.startswith("[") else [files]
    configs = [Path(file).relative_to("configs").with_suffix("").as_posix() for file in files]
    known = ConfigParser.load_config_files([str(ROOT / file) for file in files])
    tiny = {name: value for name, value in TINY.items() if name in known}
    given = {name: ast.literal_eval(value) if value[:1] in "[0123456789" else value for name, value in flags.items()}
    unused = {name: None for name in TINY if name not in tiny}
    settings = unused | tiny | given
    run_configs(*configs, **{name: value for name, value in settings.items() if name in known})


def test_the_lines_for_the_readers_own_data_run_one_after_another(
    derivatives: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The README's, from preflight to predictions, then what docs/pipeline.md says of Python."""
    monkeypatch.chdir(tmp_path)
    names = {"DERIVATIVES": str(derivatives), "NEW_SCANS": str(derivatives), "STORE": "store", "RESULTS": "results"}
    names |= {"RUN": "sub-01_task-rest"}
    text = TEXTS["README.md"]
    own = text[text.index("## Your data") : text.index("## Read on")]
    lines = shell_lines(own)
    assert len(lines) == 8
    for words in lines:
        if any("configs/inference.json" in word for word in words):
            words = [*words, "--checkpoint", str(tmp_path / "models" / "model.pt")]  # else the bundle's own folder
        run_line(words, monkeypatch, names)
    for made in ("preflight/preflight.html", "store/report.html", "store/splits.json", "output/pretrain/best.pt"):
        assert (tmp_path / made).is_file(), made
    assert (tmp_path / "output" / "train" / "evaluation" / "scores.json").is_file()
    assert len((tmp_path / "results" / "predictions.tsv").read_text().splitlines()) == 13

    mean = "python -m monai.bundle run --config_file configs/train.json --dataset_dir STORE --output_dir output/mean"
    run_line(shlex.split(mean), monkeypatch, names)
    release("output/mean/best.pt", "mean_models")
    (demo / "brain_fmri_roi_mae" / "models").symlink_to(tmp_path / "mean_models")
    (block,) = blocks(TEXTS["docs/pipeline.md"], "python")
    size = 'net_override={"embed_dim": 4, "depths": [1, 1, 1, 1], "frames": 4}, device="cpu"'
    small = block.replace('source="monaihosting"', f'source="monaihosting", {size}')
    space: dict = {}
    exec(small.replace("PARENT_OF_THIS_FOLDER", str(demo)), space)
    assert sum(parameter.numel() for parameter in space["network"].parameters()) > 0


def test_the_page_on_data_runs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every line of docs/data.md that reads a store: splits, overlay, export."""
    monkeypatch.chdir(tmp_path)
    np.save("rebuilt.npy", np.zeros((96, 96, 96), np.float32))
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for number, words in enumerate(shell_lines(TEXTS["docs/data.md"])):
        if words[3:] and words[3] in ("splits", "overlay", "export"):
            own = tmp_path / f"store-{number}"
            own.mkdir()
            for name in ("runs", "manifest.json"):
                (own / name).symlink_to(store / name)
            if "--fold" in words:
                words = [word if word != "10" else "3" for word in words]
            run_line(words, monkeypatch, {"STORE": str(own), "RUN": "sub-01_task-rest", "NYU": "north"})
    assert {path.name for path in tmp_path.glob("*.*")} >= {"mask.png", "run.nii.gz", "rebuilt.nii.gz"}


def test_the_pictures_are_drawn_of_synthetic_data_only(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(demo)
    (words,) = (words for words in shell_lines(TEXTS["docs/quickstart.md"]) if words[3:4] == ["pictures"])
    words = [str(tmp_path) if word == "docs/pictures" else word for word in words]
    words = [word.replace("pretrain_long", "pretrain") for word in words]
    with pytest.raises(SystemExit):  # nobody says that the tests' cohort is synthetic
        run_line(words, monkeypatch, {"STORE": "demo/store"})
    assert "synthetic runs only" in capsys.readouterr().err
    monkeypatch.setattr(gallery, "is_synthetic", lambda sources: True)
    run_line(words, monkeypatch, {"STORE": "demo/store"})
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")}


def test_the_citation_is_of_the_version_that_is_installed():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"] == metadata["version"]
    assert citation["license"] == project["license"]


def test_every_page_is_in_the_navigation_of_the_site():
    settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or re.search(rf"[:-] {re.escape(name)}$", settings, flags=re.M), name
