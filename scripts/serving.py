"""The commands that serve a trained network, each one call into `bundle.deploy`."""

import re
from collections.abc import Sequence

from fire.parser import DefaultParseValue

from bundle.anatomy.atlas import AAL3
from bundle.deploy.audit import check_log
from bundle.deploy.bids_app import LEVELS, run_participants, write_group
from bundle.deploy.embed import embed as embed_store
from bundle.deploy.formats import NAMES
from bundle.deploy.formats import export_model as export_released
from bundle.deploy.maps import write_maps
from bundle.deploy.package import package as package_bundle
from bundle.deploy.release import release as release_checkpoint
from bundle.deploy.reports import FORMATS, write_results
from bundle.errors import InputError


def release(checkpoint: str | Sequence[str], folder: str = "models") -> None:
    """Write the network of a classifier's checkpoint as FOLDER/model.pt and what it was made with as model.json.

    Beside them lies reference.pt: what its training subjects are like.

    Args:
        checkpoint: e.g. output/train/best.pt; or several of other seeds or folds, "['A/best.pt','B/best.pt']", which
            become an ensemble.
        folder: the bundle's folder of models.
    """
    release_checkpoint(checkpoint, folder)


def export_model(
    model: str,
    folder: str = "exported",
    format: str | tuple = NAMES,
    store: str | None = None,
    atlas: str = AAL3,
) -> None:
    """Write a released model as files that run, or are read, without this repository, and check them against it.

    formats.json beside them says what goes in, what comes out, and what of inference stays outside.

    Args:
        model: models/model.pt of `release`, or a classifier's checkpoint.
        folder: where the files go.
        format: pt2, onnx, torchscript or safetensors, or several with commas between; by default all.
        store: check on a run of this prepared store; by default on noise.
        atlas: as for `regions`, where the model was trained with another than AAL3.
    """
    export_released(model, folder, [format] if isinstance(format, str) else list(format), store, atlas)


def package(
    model: str,
    out: str,
    evaluation: str,
    name: str,
    data: str,
    command: str,
    display_name: str | None = None,
    atlas: str = AAL3,
) -> None:
    """Write a bundle with its weights for the MONAI Model Zoo: OUT/NAME_vX.Y.Z, a zip of it, and checksums.

    Args:
        model: models/model.pt of `release`.
        out: folder where it goes.
        evaluation: folder of the scores of these very weights, e.g. output/train/evaluation.
        name: of the bundle: small letters, digits and _.
        data: what the weights were trained on, in a sentence; it goes into the model card.
        command: that made the weights.
        display_name: as the zoo shows it.
        atlas: as for `regions`, where the model was trained with another than AAL3.
    """
    package_bundle(model, out, evaluation, name, data, command, display_name, atlas)


def embed(
    store: str,
    checkpoint: str,
    out: str,
    per: str = "subject",
    regions: str | None = None,
    stage: int | None = None,
    atlas: str = AAL3,
) -> None:
    """Write the encoder's mean token of each subject or run, or of each region there, as Parquet.

    Args:
        store: the prepared store.
        checkpoint: best.pt of a pretraining or training, or models/model.pt.
        out: .parquet to write; pandas.read_parquet(OUT).attrs says what it was made with.
        per: a row per "subject" or per "run".
        regions: "group" or "label": a row per region or per label of the atlas within each.
        stage: of the encoder, 0 to 4; by default the last, of regions the first.
        atlas: as for `regions`.
    """
    embed_store(store, checkpoint, out, per, regions, stage, atlas)


def maps(
    store: str,
    checkpoint: str,
    folder: str,
    level: str = "group",
    baseline: str = "temporal_mean",
    steps: int = 16,
    atlas: str = AAL3,
) -> None:
    """Write a NIfTI map per subject in MNI space: what a classifier uses, or how well a pretrained network rebuilds.

    Args:
        store: the prepared store; labels are not needed.
        checkpoint: best.pt of a pretraining or training, or models/model.pt.
        folder: where the maps go, with maps.csv and maps.json.
        level: take out, or hide, one "group" of the atlas or one "label" at a time.
        baseline: what takes its place in a classifier's clips: "temporal_mean" or "cohort_mean".
        steps: of integrated gradients, where the classifier has gradients.
        atlas: as for `regions`.
    """
    write_maps(store, checkpoint, folder, level, baseline, steps, atlas)


def app(
    bids_dir: str,
    out_dir: str,
    level: str,
    *labels: str,
    participant_label: str | None = None,
    model: str | None = None,
    work_dir: str | None = None,
    atlas: str = AAL3,
    **entries: str,
) -> None:
    """BIDS App: score the participants of fMRIPrep-like derivatives, into a BIDS derivative with a page for each.

    A participant who cannot be scored never stops the others: the page and phenotype/ say why, and the exit status is
    then not 0. Called again, it goes on where it ended; who is scored with the same files and settings is left as is.

    Args:
        bids_dir: derivatives as fMRIPrep writes them, with runs in MNI space.
        out_dir: folder of the BIDS derivative.
        level: "participant" scores; "group" writes one table and one page of all.
        labels: further labels after --participant_label.
        participant_label: labels with blanks or commas between, with "sub-" or without; by default all.
        model: models/model.pt of `release`, or a classifier's checkpoint.
        work_dir: folder for what is needed only to go on; by default OUT_DIR-work.
        atlas: as for `regions`, where the model was trained with another than AAL3.
        entries: any other option is an entry of configs/inference.json.
    """
    if level not in LEVELS:
        raise InputError(f"the level must be participant or group, not {level!r}")
    if labels and participant_label is None:
        raise InputError(f"{labels[0]!r} is one word too many; labels come after --participant_label")
    wanted = [label for text in (participant_label or "", *labels) for label in re.split(r"[\s,]+", text) if label]
    if level == "group":
        if entries:
            raise InputError(f"--{min(entries)}: the level group scores nobody, so it has no such option")
        write_group(bids_dir, out_dir, wanted)
        return
    if model is None:
        raise InputError("the level participant needs --model, e.g. models/model.pt")
    options = {name: DefaultParseValue(value) for name, value in entries.items()}
    run_participants(bids_dir, out_dir, model, wanted, work_dir, atlas, options)


def audit(log: str) -> None:
    """Check that an audit log is as it was written, and print how many lines it has and the hash of the last.

    Args:
        log: OUT_DIR/audit.jsonl of `app`.
    """
    lines, last = check_log(log)
    print(f"{lines} lines, each follows the one before it; sha256 of the last: {last}")


def results(
    predictions: str,
    out: str,
    series: str | None = None,
    format: str | tuple = tuple(FORMATS),
    salt: str | None = None,
    made: str | None = None,
) -> None:
    """Write predictions as preliminary reports: DICOM SR, a page as PDF in DICOM, and FHIR R4B.

    A score that is flagged or refused as unlike the training subjects is not in them; they say so instead. Who cannot
    be reported never stops the others, and the exit status is then not 0.

    Args:
        predictions: output folder of inference or of `app`.
        out: folder of the reports.
        series: DICOM folder that was given to `dicom`; only participants of its series are reported. Without it: FHIR
            alone, of everybody.
        format: sr, pdf or fhir, or several with commas between; by default all.
        salt: as for `dicom`, where it was given.
        made: when the predictions were made, e.g. 2026-01-31T14:30:00+01:00; by default SR and PDF have the date and
            time of the series, and FHIR none.
    """
    write_results(predictions, out, [format] if isinstance(format, str) else list(format), series, salt, made)
