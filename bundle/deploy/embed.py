"""Embeddings: what an encoder makes of a stored run, as a Parquet table that says what it was made with."""

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.transforms import Compose
from torch import Tensor
from tqdm.auto import tqdm

from bundle.anatomy import grid
from bundle.anatomy.atlas import AAL3, labels_on, load_atlas
from bundle.anatomy.parcels import parcels_of
from bundle.data.clips import clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.deploy.release import ReleasedModel
from bundle.errors import InputError
from bundle.files import file_sha256, versions, written_whole
from bundle.heads.pooling import label_members, pool, token_shares
from bundle.networks.precision import PrecisionInferer, best_device
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.preparation.store import read_manifest
from bundle.training.checkpoints import encoder_weights, load_checkpoint, saved_facts
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)

PER = ("subject", "run")
PACKAGES = ("torch", "monai", "numpy", "pandas", "pyarrow")


def frozen_encoder(path: str | Path) -> tuple[SwinMambaEncoder, dict[str, Any]]:
    """The encoder of a checkpoint or a released model, frozen, and the facts that it was made with.

    Raises:
        InputError: the file is neither, or of several networks, or what it predicts is not read of the encoder alone
            (LoRA, prompts).
    """
    if Path(path).with_suffix(".json").is_file():
        model = ReleasedModel(path)
        if len(model.members) > 1:
            raise InputError(
                f"{path}: an ensemble of {len(model.members)} networks; give the checkpoint of one of them"
            )
        saved, facts = {"network": model.members[0].state}, model.record
    else:
        saved = load_checkpoint(path)
        facts = saved_facts(saved, path)
    return plain_encoder(saved, facts, path).requires_grad_(False).eval(), facts


def plain_encoder(saved: Mapping[str, Any], facts: Mapping[str, Any], path: str | Path) -> SwinMambaEncoder:
    """The encoder of a checkpoint that was read, see `bundle.training.checkpoints`.

    Raises:
        InputError: what the checkpoint predicts is not read of the encoder alone (LoRA, prompts).
    """
    if any(name.startswith(("updates.", "prompts.")) for name in saved["network"]):
        raise InputError(f"{path}: its encoder works with LoRA or prompts beside it; give the one that it began from")
    encoder = SwinMambaEncoder(**facts["network"])
    encoder.load_state_dict(encoder_weights(saved), strict=True)
    return encoder


def embed(
    store: str | Path,
    checkpoint: str | Path,
    path: str | Path,
    per: str = "subject",
    regions: str | None = None,
    stage: int | None = None,
    atlas: str | Path = AAL3,
) -> pd.DataFrame:
    """Write the mean of the encoder's tokens of each subject or run, or of each region there, as Parquet.

    Clips lie side by side, and the tail of a run is left out. The mean is over all clips, frames and places; of a
    region over its voxels, each of which has the token that it lies in.

    The file has the columns `participant_id`, for runs `run_id`, for regions `region`, then `clips`, how many, and
    `feature_0` ... of float32. Its metadata, `pandas.read_parquet(path).attrs`, has the checkpoint's hash and facts,
    the preparation and content of the store, what was asked for, and versions.

    Args:
        store: prepared as the checkpoint's training data were.
        checkpoint: of a pretraining or training, or a released model.
        path: .parquet to write.
        per: a row per "subject" or per "run".
        regions: None; or a row per "group" or "label" of the atlas within each.
        stage: whose tokens, see `SwinMambaEncoder.tokens`; None: the last, of regions the first, of small tokens.
        atlas: see `bundle.anatomy.atlas.load_atlas`.

    Returns:
        The table.

    Raises:
        InputError: an argument cannot be used, pyarrow is not installed, the store was prepared otherwise, or a run is
            shorter than a clip.
    """
    if per not in PER:
        raise InputError(f"--per must be {' or '.join(PER)}, not {per!r}")
    path = Path(path)
    if path.suffix != ".parquet":
        raise InputError(f"{path} must end in .parquet")
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("Parquet needs pyarrow; install it with `pip install pyarrow`")
    encoder, facts = frozen_encoder(checkpoint)
    manifest = read_manifest(store)
    if "preparation" in facts:  # published weights do not say theirs
        advice = "prepare the runs as those that it was trained on"
        Provenance(preparation=manifest["parameters"]).require(facts, checkpoint, ["preparation"], advice=advice)
    last = len(encoder.depths)
    stage = (last if regions is None else 1) if stage is None else stage
    if not 0 <= stage <= last:
        raise InputError(f"--stage must be 0 to {last}, not {stage}")
    names, reduce = _reduction(encoder, regions, stage, atlas)
    rows = _rows(store, manifest["runs"], encoder, facts, stage, reduce)
    table = _table(rows, per, names, regions)
    table.attrs = {
        "checkpoint_sha256": file_sha256(checkpoint),
        "facts": facts,
        "preparation_hash": manifest["parameters_hash"],
        "sources": {run["run_id"]: run["source_sha256"] for run in manifest["runs"]},
        "asked": {"per": per, "regions": regions, "stage": stage, "atlas": load_atlas(atlas).sha256},
        "versions": versions(PACKAGES),
    }
    json.dumps(table.attrs)  # pandas would leave out what is not JSON
    with written_whole(path) as unfinished:
        table.to_parquet(unfinished, engine="pyarrow", index=False)
    logger.info("Wrote %d rows of %d features to %s", *table.filter(like="feature_").shape, path)
    return table


def _reduction(
    encoder: SwinMambaEncoder, regions: str | None, stage: int, atlas: str | Path
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Names of the regions, one for the whole, and from tokens (1, x, y, z, t, c) to their means (n, c)."""
    if regions is None:
        return ["all"], lambda tokens: tokens.float().mean((0, 1, 2, 3, 4))[None]
    members = label_members(atlas, regions)
    edge, _ = encoder.tokens_of(stage)
    shares = token_shares(atlas, edge, encoder.image_size)  # (L, tokens)
    loaded = load_atlas(atlas)
    numbers, counts = np.unique(labels_on(loaded, grid.AFFINE, grid.SHAPE), return_counts=True)
    volumes = torch.from_numpy(counts[numbers > 0]).float()[:, None]
    wholes = torch.stack([(shares[rows] * volumes[rows]).sum(0) / volumes[rows].sum() for rows in members])
    present = set(numbers.tolist())
    names = [name for name, own in parcels_of(loaded, regions).items() if present & set(own)]
    return names, lambda tokens: pool(tokens, wholes.to(tokens.device)).mean((0, 1))


def _rows(
    store: str | Path,
    runs: Sequence[dict[str, Any]],
    encoder: SwinMambaEncoder,
    facts: dict[str, Any],
    stage: int,
    reduce: Callable[[Tensor], Tensor],
) -> list[tuple[str, str, np.ndarray]]:
    """Participant, run and means (clips, n, c) of each run."""
    device = best_device()
    encoder.to(device)
    inferer = PrecisionInferer(facts.get("config", {}).get("precision", "float32"))
    scatter = ScatterClipd(Normalisation(**facts["normalisation"]), device)
    read = Compose([ReadClipd(store, encoder.frames), scatter, TimeLastd()])
    rows = []
    for item in tqdm(clips(runs, encoder.frames, encoder.frames, whole_runs=True), desc="embedding", unit="run"):
        means = []
        for start in item["starts"]:
            image = read({"run_id": item["run_id"], "start": start})["image"].as_tensor()[None]
            with torch.no_grad():
                means.append(reduce(inferer(image, encoder.tokens, stage)).cpu().double().numpy())
        rows.append((item["participant_id"], item["run_id"], np.stack(means)))
    return rows


def _table(
    rows: Sequence[tuple[str, str, np.ndarray]], per: str, names: Sequence[str], regions: str | None
) -> pd.DataFrame:
    """Means over the clips of each subject or run."""
    of: dict[tuple[str, ...], list[np.ndarray]] = {}
    for participant, run_id, means in rows:
        of.setdefault((participant,) if per == "subject" else (participant, run_id), []).append(means)
    keys = ["participant_id", "run_id"][: len(next(iter(of)))]
    table = []
    for key, parts in of.items():
        joined = np.concatenate(parts)  # (clips, n, c)
        features = pd.DataFrame(joined.mean(0).astype(np.float32)).add_prefix("feature_")
        head = dict(zip(keys, key, strict=True)) | ({"region": list(names)} if regions else {}) | {"clips": len(joined)}
        table.append(pd.concat([pd.DataFrame(head, index=features.index), features], axis=1))
    return pd.concat(table, ignore_index=True)
