"""The bundle's configs with a tiny network, run as `python -m monai.bundle run` would run them, in this process."""

from pathlib import Path

from monai.bundle import ConfigWorkflow

from bundle.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = {"embed_dim": 4, "depths": [1, 1, 1, 1], "frames": 4, "batch_size": 2, "max_epochs": 1, "num_workers": 0}


def workflow(*configs: str, kind: str = "train", **overrides: object) -> ConfigWorkflow:
    """A workflow of some configs, not yet begun."""
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    meta, logs = str(CONFIGS / "metadata.json"), str(CONFIGS / "logging.conf")
    settings = {"bundle_root": str(ROOT)} | TINY | overrides
    return ConfigWorkflow(files, meta_file=meta, logging_file=logs, workflow_type=kind, **settings)


def run(*configs: str, kind: str = "train", **overrides: object) -> ConfigWorkflow:
    """Begin, run and end a workflow."""
    flow = workflow(*configs, kind=kind, **overrides)
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def sentence(error: BaseException | None) -> str:
    """The message of the InputError that MONAI wrapped."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None
    return str(error)
