"""Write measured sections into docs/performance.md, each between two comments that name its command."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bundle.errors import InputError
from scripts.benchmarks.background import background
from scripts.benchmarks.floor import floor
from scripts.benchmarks.formats import formats
from scripts.benchmarks.gpu import gpu, profile
from scripts.benchmarks.kernels import kernels
from scripts.benchmarks.launches import launches
from scripts.benchmarks.many_runs import many_runs
from scripts.benchmarks.scaling import memory, scaling
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import augmentation, redundancy

SECTIONS: dict[str, Callable[[], str]] = {
    "table": table,
    "memory": memory,
    "background": background,
    "scaling": scaling,
    "floor": floor,
    "formats": formats,
    "gpu": gpu,
    "profile": profile,
    "kernels": kernels,
    "launches": launches,
    "augmentation": augmentation,
    "redundancy": redundancy,
    "many_runs": many_runs,
}


def report(
    sections: str | Sequence[str] = ("table", "memory", "background", "scaling", "floor"),
    page: str = "docs/performance.md",
) -> str:
    """Measure anew and replace sections of the page. At full size this takes about half an hour on two CPU cores.

    Args:
        sections: one or several of table, memory, background, scaling, floor, formats, augmentation, redundancy,
            launches, many_runs; kernels where triton is installed; gpu and profile where there is a GPU.
        page: Markdown with `<!-- benchmarks NAME -->` ... `<!-- end -->` around each section.

    Raises:
        InputError: there is no such section, or the page has no place for it.
    """
    path = Path(page)
    sections = [sections] if isinstance(sections, str) else sections
    for name in sections:
        if name not in SECTIONS:
            raise InputError(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
        replace_section(path, name, SECTIONS[name]())
    return f"{page}: wrote {', '.join(sections)}"


def replace_section(path: Path, name: str, content: str) -> None:
    """Put `content` between the comments of a section.

    Raises:
        InputError: the page has no such comments.
    """
    start, end = f"<!-- benchmarks {name} -->", "<!-- end -->"
    page, count = re.subn(
        f"({re.escape(start)}\n).*?({re.escape(end)})",
        lambda found: f"{found[1]}{content}\n{found[2]}",
        path.read_text(encoding="utf-8"),
        count=1,
        flags=re.DOTALL,
    )
    if not count:
        raise InputError(f"{path} has no section {start} ... {end}; add these two lines where it shall stand")
    path.write_text(page, encoding="utf-8")
