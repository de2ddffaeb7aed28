"""What a file's BIDS name says."""

import re
from pathlib import Path


def stem(path: Path) -> str:
    """A file's name without .nii.gz, .nii, .hdr or .img."""
    return re.sub(r"\.(nii(\.gz)?|hdr|img)$", "", path.name)


def entities(path: Path) -> dict[str, str]:
    """The BIDS entities in a file's name, by key: `sub-01_task-rest_bold.nii` gives sub and task."""
    return dict(re.findall(r"(?:^|_)([A-Za-z]+)-([A-Za-z0-9+]+)(?=_|$)", stem(path)))
