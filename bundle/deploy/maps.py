"""Maps of each subject of a store, NIfTI in MNI space: what a classifier uses, or how well a region is rebuilt."""

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from tqdm.auto import tqdm

from bundle.anatomy.atlas import AAL3, Atlas, load_atlas
from bundle.anatomy.parcels import parcel_index, parcel_map, parcels_of
from bundle.data.clips import clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.deploy.release import open_model
from bundle.errors import InputError
from bundle.evaluation.attribution import attributed
from bundle.evaluation.reconstruction import clip_sums, subject_sums
from bundle.files import file_sha256, slug, versions, write_json, write_text, written_whole
from bundle.heads.pooling import LEVELS
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.precision import PrecisionInferer, best_device
from bundle.preparation.store import read_manifest
from bundle.training.checkpoints import load_checkpoint, saved_facts
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "monai", "numpy", "nibabel", "captum")


@torch.no_grad()
def _temporal_r2(
    checkpoint: str | Path, facts: dict[str, Any], store: str | Path, runs: list, level: str, atlas: Atlas
) -> pd.DataFrame:
    """How well each label is rebuilt where its whole group (or itself) is hidden at all frames."""
    made = facts["config"]["network_def"]
    kept = {name: made[name] for name in ("mask_token", "hide", "skip_background") if name in made}
    network = MaskedAutoencoder(**facts["network"], **kept)
    network.load_state_dict(load_checkpoint(checkpoint)["network"], strict=True)
    device = best_device()
    network.to(device).eval()
    read = Compose(_transforms(facts, store, network.encoder.frames, device))
    names = list(parcels_of(atlas, "label"))
    labels = parcel_index(atlas, parcels_of(atlas, "label"))
    hidden = parcel_index(atlas, parcels_of(atlas, level))
    inferer, frames = PrecisionInferer(facts["config"]["precision"]), network.encoder.frames
    tables = [
        clip_sums(network, inferer, read(clip), labels, hidden, names)
        for clip in tqdm(clips(runs, frames, frames), desc="rebuild regions", unit="clip")
    ]
    sums = subject_sums(tables)
    seen = sums[sums["total"] > 0]
    return seen[["participant_id", "name"]].assign(
        method="temporal_r2", level="label", value=1 - seen["residual"] / seen["total"]
    )


def _attribution(
    checkpoint: str | Path, store: str | Path, runs: list, level: str, baseline: str, steps: int, atlas: str | Path
) -> pd.DataFrame:
    """Attributions of each parcel of a level, see `bundle.evaluation.attribution`."""
    model = open_model(checkpoint)
    entries = model.entries(str(atlas))
    network = ConfigParser({"network_def": entries["network_def"]}).get_parsed_content("network_def")
    model.load_into(network)
    device, frames = best_device(), entries["frames"]
    items = clips(runs, frames, entries["clip_stride"], whole_runs=entries["whole_runs"])
    transforms = _transforms(model.record, store, frames, device)
    found = attributed(
        network.to(device), PrecisionInferer(model.precision), items, transforms, model.task, levels=(level,),
        steps=steps, baseline=baseline, atlas=atlas,
    )  # fmt: skip
    return found.loc[found["level"] == level, ["participant_id", "name", "method", "level", "value"]]


def _transforms(facts: dict[str, Any], store: str | Path, frames: int, device: torch.device) -> list[Any]:
    return [ReadClipd(store, frames), ScatterClipd(Normalisation(**facts["normalisation"]), device), TimeLastd()]


def write_maps(
    store: str | Path,
    checkpoint: str | Path,
    folder: str | Path,
    level: str = "group",
    baseline: str = "temporal_mean",
    steps: int = 16,
    atlas: str | Path = AAL3,
) -> pd.DataFrame:
    """Write maps of each subject of a store as NIfTI in MNI space, `<participant>_<method>.nii.gz`.

    Of a pretrained network they show the temporal R² of each label of the atlas, rebuilt where its group (or, with the
    level "label", it alone) is hidden at all frames. Of a classifier they show the attribution of its output to each
    group or label: by ablation, and by integrated gradients where its readout has gradients. Values are means (R²: of
    sums) over all clips of a subject. Voxels outside all labels are 0, and so are labels outside the subject's brain.

    Beside them: `maps.csv`, the values as a table; and `maps.json`, what they were made with.

    Args:
        store: prepared as the network's training data were; labels are not needed.
        checkpoint: of a pretraining or training, or a released model.
        folder: of the maps.
        level: hide, or ablate, a "group" at a time (8 or 9 passes per clip) or a "label" (166 or 167).
        baseline: of attributions, see `bundle.evaluation.attribution`.
        steps: of integrated gradients.
        atlas: of the regions, and of the readout where it has one.

    Returns:
        Rows of `participant_id`, `name`, `method`, `level`, `value`.

    Raises:
        InputError: an argument cannot be used, or the store was prepared otherwise.
    """
    if level not in LEVELS:
        raise InputError(f"--level must be {' or '.join(LEVELS)}, not {level!r}")
    folder, loaded = Path(folder), load_atlas(atlas)
    manifest = read_manifest(store)
    released = Path(checkpoint).with_suffix(".json").is_file()
    facts = open_model(checkpoint).record if released else saved_facts(load_checkpoint(checkpoint), checkpoint)
    advice = "prepare the runs as those that it was trained on"
    Provenance(preparation=manifest["parameters"]).require(facts, checkpoint, ["preparation"], advice=advice)
    if facts.get("task") is None:
        table = _temporal_r2(checkpoint, facts, store, manifest["runs"], level, loaded)
    else:
        table = _attribution(checkpoint, store, manifest["runs"], level, baseline, steps, atlas)
    for (participant, method, painted), part in table.groupby(["participant_id", "method", "level"]):
        image = parcel_map(part.set_index("name")["value"].to_dict(), loaded, painted)
        with written_whole(folder / f"{slug(participant)}_{method}.nii.gz") as unfinished:
            nib.save(image, unfinished)
    write_text(folder / "maps.csv", table.to_csv(index=False))
    asked = {"level": level, "baseline": baseline, "steps": steps, "atlas": loaded.sha256}
    sources = {run["run_id"]: run["source_sha256"] for run in manifest["runs"]}
    made = {"checkpoint_sha256": file_sha256(checkpoint), "facts": facts, "asked": asked, "sources": sources}
    write_json(folder / "maps.json", made | {"versions": versions(PACKAGES)})
    logger.info("Wrote maps of %d subjects to %s", table["participant_id"].nunique(), folder)
    return table
