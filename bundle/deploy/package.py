"""A bundle with its weights, in the form of the MONAI Model Zoo: a folder, a zip of it, and checksums.

Only what is written here is ever to be pushed: `monai.bundle.push_to_hf_hub` uploads the whole folder that it is given.
"""

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bundle.anatomy.atlas import AAL3
from bundle.deploy.release import ReleasedModel
from bundle.errors import InputError
from bundle.files import ROOT, file_sha256, metadata, unfinished_beside, write_bytes, write_json, write_text
from bundle.training.checkpoints import weights_sha256
from bundle.training.provenance import entries as leaves

logger = logging.getLogger(__name__)

FOLDERS = ("bundle", "scripts", "configs", "docs")
SUFFIXES = {".py", ".json", ".j2", ".conf", ".md", ".png", ".txt", ".css", ".yml", ".c", ".toml"}
"""Of files that a package may hold; no data, predictions or other weights have one of these in these folders."""
LARGEST = 25 * 2**20
"""Bytes of a file, as the zoo's CONTRIBUTING has it."""
SERVED = ("inference", "train")
"""Configs whose network is the released one, so that `monai.bundle.load` makes it from either."""
CARD = re.compile(r"<!-- weights -->\n.*?<!-- end -->", flags=re.DOTALL)
WHEN = (2022, 5, 30, 0, 0, 0)
"""The time of every file in the zip, as the zoo's own zips have it: the same files give the same checksum."""
BLACK = ["black", "--quiet", "--skip-magic-trailing-comma", "--line-length", "120"]
ISORT = ["isort", "--quiet", "--profile", "black", "--line-length", "120", "--project", "models"]


def package(
    model: str | Path,
    out: str | Path,
    evaluation: str | Path,
    name: str,
    data: str,
    command: str,
    display_name: str | None = None,
    atlas: str = AAL3,
) -> Path:
    """Write `NAME_vX.Y.Z/`, `NAME_vX.Y.Z.zip`, whose top folder is `NAME/`, its `.sha256`, and `model_info.json`.

    Python files are formatted by the zoo's settings; configs make the released network; `configs/metadata.json` and
    `docs/README.md` say what the weights are, how they scored, and on which data.

    Args:
        model: `model.pt` of `release`.
        out: where it goes.
        evaluation: folder of `scores.json` and `subjects.tsv` of these very weights.
        name: of the bundle: small letters, digits and `_`.
        data: what the weights were trained on, in a sentence.
        command: that made them.
        display_name: as the model browser shows it; None: `name` in words.
        atlas: see `ReleasedModel.entries`.

    Returns:
        The zip.

    Raises:
        InputError: an argument cannot be used, black or isort is not installed, the scores are of other weights, or
            what is known of the weights holds a path.
    """
    out = Path(out)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"--name must be small letters, digits and _, not {name!r}")
    for word in ("synthetic", "painted"):
        if word in data.lower() and word not in name:
            raise InputError(f"--data says {word}, so --name must say it too; {name!r} does not")
    if not (ROOT / "docs" / "README.md").is_file():
        raise InputError(f"{ROOT} has no docs/README.md; run this in a clone of the repository")
    released = ReleasedModel(model)
    _refuse_paths(released.record, released.path.with_suffix(".json"))
    scores = _scores_of(released, Path(evaluation) / "scores.json")
    title = display_name or name.replace("_", " ").capitalize()
    about = _metadata(released, scores, name, title, data)
    full_name = f"{name}_v{about['version']}"
    with unfinished_beside(out / full_name) as folder:
        _copy_code(folder)
        for config in SERVED:
            _serve(released, folder / "configs" / f"{config}.json", atlas)
        write_json(folder / "configs" / "metadata.json", about)
        card = folder / "docs" / "README.md"
        write_text(card, CARD.sub(lambda _: _weights_card(about, scores, data, command), card.read_text("utf-8")))
        (folder / "models").mkdir()
        for file in _model_files(released):
            shutil.copyfile(file, folder / "models" / file.name)
        write_bytes(folder / "tests" / "test_bundle.py", (ROOT / "bundle" / "templates" / "zoo_test.py").read_bytes())
        _format(folder)
        _refuse_large(folder)
        shutil.rmtree(out / full_name, ignore_errors=True)
        folder.rename(out / full_name)
    path = out / f"{full_name}.zip"
    _zip(out / full_name, name, path)
    checksum = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()  # as the zoo's CI reads it
    write_json(out / "model_info.json", {full_name: {"checksum": checksum, "source": path.name}})
    write_text(path.with_suffix(".zip.sha256"), f"{file_sha256(path)}  {path.name}\n")
    logger.info("Wrote %s and %s", out / full_name, path)
    return path


def _refuse_paths(record: Mapping[str, Any], source: Path) -> None:
    """Refuse a record that names a place on somebody's disk."""
    for name, value in leaves(dict(record)):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (text.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text)):
                raise InputError(
                    f"{source}: {name} is a path of a machine ({text}); train again with the file in place"
                )


def _scores_of(released: ReleasedModel, path: Path) -> dict[str, Any]:
    """The test's scores, which must be of the released weights."""
    if len(released.members) > 1:
        raise InputError(f"{released.path}: an ensemble has no test of its own; release one network to package it")
    if not path.is_file():
        raise InputError(f"{path}: absent; test the model with configs/evaluate.json")
    scores = json.loads(path.read_text())
    if scores.get("weights_sha256") != weights_sha256(released.members[0].state):
        raise InputError(f"{path}: is of other weights than {released.path}; test the checkpoint that was released")
    return scores


def _metadata(released: ReleasedModel, scores: Mapping[str, Any], name: str, title: str, data: str) -> dict[str, Any]:
    """`configs/metadata.json` of the package."""
    about = metadata()
    network, task = released.record["network"], released.task
    metrics: dict[str, Any] = {"data": data, "test_subjects": scores["subjects"]}
    for measure, found in scores["scores"].items():
        metrics |= {measure: found["value"], f"{measure}_low": found["low"], f"{measure}_high": found["high"]}
    about |= {"name": title, "data_source": data, "eval_metrics": metrics}
    about["description"] = about["description"].replace("No trained weights are shipped.", f"Weights: {data}")
    said = about["changelog"].get(about["version"], "")
    about["changelog"] |= {about["version"]: f"{said}; weights of {name}: {data}".removeprefix("; ")}
    about["label_classes"] = ", ".join(f"{i}: {one}" for i, one in enumerate(task.classes)) or task.column
    about["pred_classes"] = f"{task.outputs} output(s) per clip of {network['frames']} frames; averaged per subject"
    shape = about["network_data_format"]
    image, outputs = shape["inputs"]["image"], shape["outputs"]["pred"]
    channels = network["in_channels"]
    image |= {"num_channels": channels, "spatial_shape": [*network["image_size"], network["frames"]]}
    units = {"run": "BOLD, z over the run", "voxel": "BOLD, each voxel by its own mean and SD over the run"}
    mode = released.normalisation.mode
    image["channel_def"] = dict(enumerate(units.values() if mode == "both" else [units[mode]]))
    outputs |= {
        "num_channels": task.outputs,
        "channel_def": dict(enumerate(task.classes[-task.outputs :] or ["value"])),
    }
    return json.loads(json.dumps(about))


def _copy_code(folder: Path) -> None:
    for part in FOLDERS:
        for file in sorted((ROOT / part).rglob("*")):
            inside = file.relative_to(ROOT)
            hidden = any(word.startswith(".") or word.endswith(("__pycache__", ".egg-info")) for word in inside.parts)
            if file.is_file() and not file.is_symlink() and file.suffix in SUFFIXES and not hidden:
                write_bytes(folder / inside, file.read_bytes())
    write_bytes(folder / "LICENSE", (ROOT / "LICENSE").read_bytes())


def _serve(released: ReleasedModel, path: Path, atlas: str) -> None:
    """Have a config make the released network, of its size and in its units; what was an option stays one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    made, trained = released.entries(atlas), released.record["config"]
    values = {name: trained[name] for name in ("freeze_encoder",) if name in trained}
    values |= {name: value for name, value in made["network_def"].items() if name != "_target_"}
    values |= {name: value for name, value in made.items() if name != "network_def"}
    values |= released.record["network"] | {"outputs": released.task.outputs}
    config |= {name: value for name, value in values.items() if name in config}
    own = config["network_def"]
    config["network_def"] = {
        name: own[name] if name in own and name != "_target_" else f"@{name}" if name in config else value
        for name, value in made["network_def"].items()
    }
    if "normalisation" in config:
        config["normalisation"] |= released.record["normalisation"]
    write_text(path, json.dumps(config, indent=4) + "\n")


def _weights_card(about: Mapping[str, Any], scores: Mapping[str, Any], data: str, command: str) -> str:
    rows = [
        f"| {name} | {_number(found['value'])} | {_number(found['low'])} | {_number(found['high'])} |"
        for name, found in scores["scores"].items()
    ]
    return "\n".join(
        [
            f"**{about['name']}.** {data}",
            "",
            f"Scores of `models/model.pt` on {scores['subjects']} test subjects, tested once, with 95 % bootstrap",
            "intervals over subjects:",
            "",
            "| measure | value | low | high |",
            "|---|--:|--:|--:|",
            *rows,
            "",
            "Made by:",
            "",
            "```bash",
            command,
            "```",
        ]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _model_files(released: ReleasedModel) -> Iterator[Path]:
    yield from (released.path, released.path.with_suffix(".json"), released.path.with_name("reference.pt"))


def _format(folder: Path) -> None:
    """Format Python by the zoo's settings."""
    for command in (ISORT, BLACK):
        done = subprocess.run(
            [sys.executable, "-m", *command, str(folder)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise InputError(
                f"{command[0]} did not format the package ({done.stderr.strip()[-200:]}); install it with "
                '`pip install -e ".[zoo]"`'
            )


def _refuse_large(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > LARGEST:
            raise InputError(f"{file.relative_to(folder)} has more than 25 MB, which the zoo does not take in a file")


def _zip(folder: Path, name: str, path: Path) -> None:
    """Write a zip whose bytes depend on the files' names and content alone."""
    with unfinished_beside(path) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                entry = zipfile.ZipInfo((Path(name) / file.relative_to(folder)).as_posix(), WHEN)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(entry, file.read_bytes())
        unfinished.replace(path)
