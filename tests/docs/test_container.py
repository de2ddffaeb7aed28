"""The Dockerfile: its files are there, its steps are the README's, and nobody in it is root.

What its entry point does without network, home and writable files is tested in tests/deploy/test_bids_app.py. Not
covered: Docker itself.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = [
    line.split(maxsplit=1)
    for line in (ROOT / "docs" / "container" / "Dockerfile").read_text().splitlines()
    if line and not line.startswith("#")
]


def steps(word: str) -> list[str]:
    return [rest for first, rest in STEPS if first == word]


def test_what_is_copied_is_the_code_and_nothing_else():
    copied = [name for step in steps("COPY") for name in step.split()[1:-1]]
    assert sorted(copied) == ["LICENSE", "README.md", "bundle", "configs", "docs", "pyproject.toml", "scripts"]
    assert all((ROOT / name).exists() for name in copied)


def test_it_installs_as_the_readme_does():
    readme = (ROOT / "README.md").read_text()
    ((venv, install),) = re.findall(
        r"^(python3\.11 -m venv \S+) && (\S+pip install -e \.) && .*demo", readme, re.MULTILINE
    )
    (own,) = [step for step in steps("RUN") if "pip" in step]
    assert own.startswith(f"{venv} && ")
    assert re.sub(r'"?\.\[.*?\]"?', ".", own.split(" && ")[1]).startswith(install)
    extras = re.search(r"\.\[(.*?)\]", own).group(1).split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)


def test_neither_the_installation_nor_the_entry_point_is_root_s():
    order = [first if first != "RUN" or "pip" not in rest else "pip" for first, rest in STEPS]
    assert steps("USER") == ["app"]
    assert order.index("USER") < order.index("pip") < order.index("ENTRYPOINT")


def test_the_entry_point_is_the_app():
    assert json.loads(steps("ENTRYPOINT")[0]) == [".venv/bin/python", "-m", "scripts", "app"]
