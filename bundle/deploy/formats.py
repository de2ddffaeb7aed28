"""Released models as PT2, ONNX, TorchScript and safetensors: files that run, or are read, without this repository."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import Tensor, nn

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.deploy.release import ReleasedModel, open_model
from bundle.errors import InputError
from bundle.files import file_sha256, versions, write_bytes, write_json, written_whole
from bundle.heads.fitted import FittedHead
from bundle.preparation.store import read_manifest
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)

INPUT = "image"
OPSET = 20
CLOSE = 1e-4
"""Largest difference from the network itself, relative to its largest value where that is above 1."""
OUTSIDE = [
    "the preparation of a run, as `preparation` lists it",
    "the units of the clip, as `normalisation` says (bundle/data/normalisation.py)",
    "cutting a run into clips of `frames` frames, every `clip_stride` frames",
    "the mean of a participant's outputs over clips",
    "of logits: division by `temperature`, sigmoid or softmax, and `threshold`, which is one of logits",
    "of an ensemble: the mean over its networks of logits that were divided by their temperatures",
    "how unlike the training subjects a scan is: nothing in the file notices that",
]
"""What inference does and the files do not."""
FITTED = "what was fitted to the features of whole runs, which is no network: weights are in the safetensors file"


Run = Callable[[Tensor], Tensor]


class Served(nn.Module):
    """What a file computes of clips: a classifier's outputs, or the features of a head that was fitted to whole runs.

    Args:
        network: a head of `bundle.heads`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.fitted = isinstance(network, FittedHead)
        self.output = "features" if self.fitted else "outputs"

    def forward(self, image: Tensor) -> Tensor:
        """Map clips (C, channels, X, Y, Z, T) to outputs (C, k), of attention (1, k); or to features (C, ...)."""
        network: Any = self.network
        return network.features(image) if self.fitted else network(image)


def save_pt2(served: Served, clips: Tensor, path: Path) -> None:
    """Write an exported program (`torch.export`), for any number of clips."""
    torch.export.save(_exported(served, clips), path)


def load_pt2(path: Path) -> Run:
    """The file as a function of clips."""
    return torch.export.load(path).module()


def save_onnx(served: Served, clips: Tensor, path: Path) -> None:
    """Write ONNX, in which each selective scan is one Scan node, for any number of clips."""
    program = torch.onnx.export(
        _exported(served, clips),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[served.output],
        verbose=False,
    )
    assert program is not None
    program.save(path)


def load_onnx(path: Path) -> Run:
    """The file as a function of clips, in ONNX Runtime, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(None, {INPUT: clips.numpy()})[0])


def save_torchscript(served: Served, clips: Tensor, path: Path) -> None:
    """Write a trace, which keeps the loops of selective scans, for any number of clips."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every shape that is read as a number, and that TorchScript is of old age
        torch.jit.trace(served, clips, check_trace=False).save(path)


def load_torchscript(path: Path) -> Run:
    """The file as a function of clips."""
    return torch.jit.load(path)


def _exported(served: Served, clips: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(served, (clips,), dynamic_shapes=({0: torch.export.Dim("clips", min=1)},))
    program.example_inputs = None  # they would be kept in the file
    return program


@dataclass(frozen=True)
class Format:
    """How a file is written and read.

    Attributes:
        suffix: of its name.
        save: write what a network computes of clips.
        load: a function of clips, from the file.
        packages: what these need beside PyTorch.
    """

    suffix: str
    save: Callable[[Served, Tensor, Path], None]
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()


FORMATS = {
    "pt2": Format(".pt2", save_pt2, load_pt2),
    "onnx": Format(".onnx", save_onnx, load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".ts", save_torchscript, load_torchscript),
}
WEIGHTS = "safetensors"
NAMES = (*FORMATS, WEIGHTS)


@torch.no_grad()
def export_model(
    model: str | Path,
    folder: str | Path,
    formats: Sequence[str] = NAMES,
    store: str | Path | None = None,
    atlas: str | Path = AAL3,
) -> dict[str, Any]:
    """Write each network of a released model as `model.pt2`, `.onnx`, `.ts` or `.safetensors` (`model_2.pt2`, ...).

    Each file but the last is run on two clips, and refused if it differs from the network. It computes in float32 on
    the CPU. `formats.json` beside them says what goes in, what comes out, how far they differ, and what of inference
    stays outside.

    Args:
        model: `model.pt` of `release`, or a classifier's checkpoint.
        folder: where the files go.
        formats: of `NAMES`.
        store: prepared as the training data were: the clips are then its first run's; None: they are noise.
        atlas: see `ReleasedModel.entries`.

    Returns:
        What `formats.json` holds.

    Raises:
        InputError: an argument cannot be used, a package is not installed, or a file differs from the network.
    """
    folder = Path(folder)
    for name in formats:
        if name not in NAMES:
            raise InputError(f"--format must be of {', '.join(NAMES)}, not {name!r}")
        for package in FORMATS[name].packages if name in FORMATS else (WEIGHTS,):
            if importlib.util.find_spec(package) is None:
                raise InputError(f'{name} needs {package}; install it with `pip install -e ".[formats]"`')
    released = open_model(model)
    entries = released.entries(str(atlas))
    files: dict[str, dict[str, Any]] = {}
    for number in range(len(released.members)):
        network = ConfigParser({"network_def": entries["network_def"]}).get_parsed_content("network_def")
        released.load_into(network, number)
        served = Served(network).eval()
        examples = _noise(network.encoder) if store is None else _clips_of(store, released, entries["frames"])
        expected = served(examples)
        for name in formats:
            path = folder / f"model{f'_{number + 1}' if number else ''}.{name}"
            about: dict[str, Any] = {"format": name}
            if name == WEIGHTS:
                _save_weights(network, path)
            else:
                path = path.with_suffix(FORMATS[name].suffix)
                with written_whole(path) as unfinished:
                    FORMATS[name].save(served, examples, unfinished)
                    about["largest_difference"] = _difference(FORMATS[name], unfinished, examples, expected)
            files[path.name] = about | {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            logger.info("Wrote %s: %s", path, about)
    record = released.record
    known = [{"seed": one["seed"]} | one["calibration"] for one in record["members"]]
    about = {
        "files": files,
        "input": {
            "name": INPUT,
            "shape": ["clips", *examples.shape[1:]],
            "axes": "clips, channels, x, y, z (RAS), frames",
            "dtype": "float32",
            "affine": grid.AFFINE.tolist(),
        },
        "output": {"name": served.output, "shape": ["clips", *expected.shape[1:]], "dtype": "float32"},
        "task": record["task"],
        "networks": known,
        "left_outside": OUTSIDE + ([FITTED] if served.fitted else []),
        "preparation": record["preparation"],
        "normalisation": record["normalisation"],
        "frames": entries["frames"],
        "clip_stride": entries["clip_stride"],
        "checked_on": "noise" if store is None else "clips of a run",
        "model_sha256": record["sha256"],
        "versions": versions(["torch", "monai"]),
    }
    write_json(folder / "formats.json", about)
    return about


def _difference(form: Format, path: Path, examples: Tensor, expected: Tensor) -> float:
    """How far a file is from the network, relative to values above 1."""
    with torch.no_grad():
        found = form.load(path)(examples)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= CLOSE or found.shape != expected.shape:
        raise InputError(f"{path.suffix}: differs from the network by {difference:.2g}, so it is not kept; report this")
    return difference


def _noise(encoder: Any) -> Tensor:
    """Two clips of noise (2, channels, X, Y, Z, T) in a box of background."""
    shape = (2, encoder.in_channels, *encoder.image_size, encoder.frames)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for axis, size in enumerate(encoder.image_size, start=2):
        noise.narrow(axis, 0, size // 8).zero_()
    return noise


def _clips_of(store: str | Path, model: ReleasedModel, frames: int) -> Tensor:
    """Two clips (2, channels, X, Y, Z, T) of the store's first run, in the units that the network sees."""
    manifest = read_manifest(store)
    advice = "prepare the runs as those that it was trained on"
    Provenance(preparation=manifest["parameters"]).require(model.record, model.path, ["preparation"], advice=advice)
    run = manifest["runs"][0]
    units = Normalisation(**model.record["normalisation"])
    read = Compose([ReadClipd(store, frames), ScatterClipd(units, torch.device("cpu")), TimeLastd()])
    starts = (0, min(frames, run["frames"] - frames))
    return torch.stack([read({"run_id": run["run_id"], "start": start})["image"].as_tensor() for start in starts])


def _save_weights(network: nn.Module, path: Path) -> None:
    """Write a state dict; what a head was fitted to is `fitted.NAME`, and its settings are metadata."""
    from safetensors.torch import save

    state = network.state_dict()
    extra = state.pop("_extra_state", {"fitted": {}})
    state |= {f"fitted.{name}": tensor for name, tensor in extra["fitted"].items()}
    settings = json.dumps(extra.get("settings", {}))
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_bytes(path, save(tensors, {"settings": settings}))  # `save_file` would let nobody else read it
