"""The library imports in one direction and never its users; no file has outgrown a reader."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "bundle").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_neither_scripts_nor_tests_nor_benchmarks(path: Path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"scripts", "tests", "benchmarks", "conftest", "pytest", "hypothesis"}


def test_the_library_has_no_import_cycle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in LIBRARY}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    needs = {name: imported(path) & set(modules) - {name} for name, path in modules.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"these import each other: {sorted(needs)}"
        for name in free:
            del needs[name]


@pytest.mark.parametrize("word", ["except:", "pickle.load", "weights_only=False", "set_trace"])
def test_no_swallowed_error_and_no_code_from_data(word: str):
    offenders = [str(path) for path in LIBRARY if word in path.read_text()]
    assert not offenders
