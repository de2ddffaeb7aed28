"""Tests of a packaged bundle, in the style of the zoo's ci/unit_tests: `python tests/test_bundle.py` in its folder.

They need the packages that configs/metadata.json names, and nothing of the repository that the package comes from.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import nibabel
import numpy
import torch
from monai.bundle import load, verify_net_in_out

ROOT = Path(os.environ.get("BUNDLE_ROOT", Path(__file__).resolve().parents[1]))
CONFIGS = ROOT / "configs"


def write_run(folder: Path) -> None:
    """Write a BOLD run of noise in an ellipsoid brain, 8 mm in MNI space."""
    shape, affine = (20, 24, 20, 24), numpy.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -76, -110, -70
    places = numpy.indices(shape[:3]).reshape(3, -1).T * 8 + affine[:3, 3]
    brain = (((places - [0, -18, 8]) / [68, 86, 62]) ** 2).sum(1).reshape(shape[:3]) < 1
    noise = numpy.random.default_rng(0).normal(1000, 20, shape)
    image = nibabel.Nifti1Image((noise * brain[..., None]).astype("float32"), affine)
    image.header.set_zooms((8.0, 8.0, 8.0, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, 4)
    image.set_qform(affine, 4)
    nibabel.save(image, folder / "sub-1_task-rest_bold.nii.gz")


class TestBundle(unittest.TestCase):
    """The weights load, the shapes are those of the metadata, and a scan is scored."""

    def test_weights(self) -> None:
        """Every weight is the file's, whichever config makes the network."""
        state = torch.load(ROOT / "models" / "model.pt", weights_only=True)
        for kind in ("inference", "train"):
            network: Any = load(ROOT.name, bundle_dir=ROOT.parent, workflow_type=kind, device="cpu")
            own = network.state_dict()
            assert set(own) == set(state)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(own[name], value), name

    def test_shape(self) -> None:
        """The network takes and gives what the metadata says."""
        if json.loads((CONFIGS / "inference.json").read_text())["whole_runs"]:
            self.skipTest("the head scores whole runs")
        meta, config = (str(CONFIGS / f"{name}.json") for name in ("metadata", "inference"))
        verify_net_in_out("network_def", meta, config, device="cpu")

    def test_inference(self) -> None:
        """A run gets a row."""
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder))
            command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.json")]
            command += ["--bundle_root", str(ROOT), "--dataset_dir", folder, "--output_dir", f"{folder}/out"]
            subprocess.run([*command, "--num_workers", "0"], check=True, cwd=folder)
            rows = Path(folder, "out", "predictions.tsv").read_text().splitlines()
            assert len(rows) == 2


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    unittest.main()
