"""Files that run without this repository: compared with the network, in a process that cannot import it.

Not covered: what graphs hold of single operations (tests/networks/test_graphs.py), and the full size, which
`python -m scripts.benchmarks formats` compares.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import SIZE, UNITS, checkpoint, released, shaken

from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.deploy import formats
from bundle.deploy.formats import NAMES, export_model
from bundle.deploy.release import release
from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.heads.attention import AttentionClassifier
from bundle.heads.mean import Classifier
from bundle.heads.neighbours import NearestNeighbours
from bundle.preparation.store import read_manifest

for package in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install -e .[formats]")

ELSEWHERE = """
import json, sys
import numpy, onnxruntime, torch
from safetensors.torch import load_file

clips = torch.load("clips.pt")
found = {
    "pt2": torch.export.load("exported/model.pt2").module()(clips),
    "torchscript": torch.jit.load("exported/model.ts")(clips),
    "onnx": onnxruntime.InferenceSession("exported/model.onnx").run(["outputs"], {"image": clips.numpy()})[0],
}
weights = load_file("exported/model.safetensors")
torch.save({name: torch.as_tensor(value).detach() for name, value in found.items()} | {"weights": weights}, "found.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("bundle", "monai", "scripts")]
"""
"""What a pipeline does that has neither this repository nor MONAI."""


def real_clips(store: Path, run_id: str, count: int = 3) -> torch.Tensor:
    """Clips (n, 1, 96, 96, 96, 2) of a stored run."""
    steps = (ReadClipd(store, SIZE["frames"]), ScatterClipd(UNITS, torch.device("cpu")), TimeLastd())
    clips = []
    for start in range(count):
        item: dict = {"run_id": run_id, "start": start}
        for step in steps:
            item = step(item)
        clips.append(item["image"].as_tensor())
    return torch.stack(clips)


@torch.no_grad()
def test_every_format_gives_what_the_network_gives_where_this_repository_is_not(store: Path, tmp_path: Path):
    network = shaken(Classifier(**SIZE))
    model = released(tmp_path, store, network)
    about = export_model(model, tmp_path / "exported", store=store)
    run_id = read_manifest(store)["runs"][-1]["run_id"]
    clips = real_clips(store, run_id)  # of another run, and more of them, than the files were checked on
    torch.save(clips, tmp_path / "clips.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE]  # isolated: neither the directory nor PYTHONPATH is looked at
    subprocess.run(command, cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    expected = network(clips)
    assert float(expected.std()) > 1e-4  # so that the clips are told apart
    for name in ("pt2", "onnx", "torchscript"):
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
    state = network.state_dict()
    assert {name: tensor.tolist() for name, tensor in found["weights"].items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }

    saved = json.loads((tmp_path / "exported" / "formats.json").read_text())
    assert saved == json.loads(json.dumps(about))
    assert set(saved["files"]) == {"model.pt2", "model.onnx", "model.ts", "model.safetensors"}
    for name, file in saved["files"].items():
        path = tmp_path / "exported" / name
        assert file["sha256"] == file_sha256(path)
        assert path.stat().st_size < 8e6  # one clip alone has 14 MB: none of a participant is in a file
    assert saved["input"]["shape"] == ["clips", 1, 96, 96, 96, 2]
    assert saved["output"] == {"name": "outputs", "shape": ["clips", 1], "dtype": "float32"}
    assert saved["checked_on"] == "clips of a run"
    assert saved["model_sha256"] == file_sha256(model)
    assert {"temperature", "threshold", "seed"} <= set(saved["networks"][0])


def test_each_network_of_an_ensemble_has_its_files(store: Path, tmp_path: Path):
    networks = [shaken(AttentionClassifier(**SIZE)) for _ in range(2)]
    for network in networks:
        torch.nn.init.normal_(network.head.weight)
    paths = [checkpoint(tmp_path / str(i), store, network, whole_runs=True) for i, network in enumerate(networks)]
    about = export_model(release(paths, tmp_path / "models"), tmp_path, ["torchscript"])
    assert list(about["files"]) == ["model.ts", "model_2.ts"]
    assert about["checked_on"] == "noise"
    clips = torch.randn(3, 1, 96, 96, 96, 2)
    with torch.no_grad():
        found = [torch.jit.load(tmp_path / name)(clips) for name in about["files"]]
        for network, outputs in zip(networks, found, strict=True):
            torch.testing.assert_close(outputs, network(clips), rtol=0, atol=1e-5)  # clips of one run: (1, 1)
    assert not torch.allclose(*found)


def test_of_a_head_that_was_fitted_the_files_give_its_features_and_safetensors_the_rest(store: Path, tmp_path: Path):
    from safetensors import safe_open

    network = NearestNeighbours(**SIZE, neighbours=2)
    network.fitted = {"labels": torch.tensor([0.0, 1.0]), "mean": torch.randn(32)}
    about = export_model(
        checkpoint(tmp_path, store, network, {"neighbours": 2}), tmp_path, ["torchscript", "safetensors"]
    )
    assert about["output"] == {"name": "features", "shape": ["clips", 32], "dtype": "float32"}
    assert any("fitted" in sentence for sentence in about["left_outside"])
    clips = torch.randn(1, 1, 96, 96, 96, 2)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(clips), network.features(clips))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"]) == {"outputs": 1, "neighbours": 2}
        assert torch.equal(file.get_tensor("fitted.mean"), network.fitted["mean"])


def test_what_cannot_be_written_is_refused_in_one_sentence(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = checkpoint(tmp_path, store, shaken(Classifier(**SIZE)))
    with pytest.raises(InputError, match=r"must be of pt2, onnx, torchscript, safetensors, not 'tensorrt'"):
        export_model(path, tmp_path, ["tensorrt"])
    other = checkpoint(tmp_path / "other", store, shaken(Classifier(**SIZE)), preparation={"new_tr": 3.0})
    with pytest.raises(InputError, match="prepare the runs as those that it was trained on"):
        export_model(other, tmp_path, ["torchscript"], store=store)
    wrong = formats.Format(".ts", formats.save_torchscript, lambda path: lambda clips: torch.full((2, 1), torch.nan))
    monkeypatch.setitem(formats.FORMATS, "torchscript", wrong)
    with pytest.raises(InputError, match="differs from the network by nan"):
        export_model(path, tmp_path / "out", ["torchscript"])
    assert not list((tmp_path / "out").glob("*"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx needs onnx; install it with `pip install -e \"\.\[formats\]\"`"):
        export_model(path, tmp_path, NAMES[1:2])
