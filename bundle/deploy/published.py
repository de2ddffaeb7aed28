"""Convert published NeuroSTORM checkpoints to the names and layouts of this network, and say what was done."""

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.training.checkpoints import write_checkpoint
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)

LIGHTNING_PREFIX = "model."
SETTINGS = (
    "img_size",
    "embed_dim",
    "depths",
    "window_size",
    "first_window_size",
    "patch_size",
    "last_layer_full_MSA",
)
FIXED_SETTINGS = {"in_chans": 1, "c_multiplier": 2, "patch_norm": False, "prompt_len": 0}  # the only ones we have
MASK_TOKENS = {"random": "random", "window": "window", "atlas": "region"}  # published spatial_mask to ours
BUFFERS = re.compile(r"(^atlas_map|\.strd_(mask|card)_[st])$")  # recomputable, not weights of the network
MAY_BE_MISSING = ("mask_token", "window_mask_token", "atlas_mask_token")  # older checkpoints lack some of them

# Our names to the published ones; every rule is applied in turn.
RENAMES = (
    (r"^encoder\.", ""),
    (r"^patch_embedding\.", "patch_embed.fc."),
    (r"^mask_tokens\.random$", "mask_token"),
    (r"^mask_tokens\.window$", "window_mask_token"),
    (r"^mask_tokens\.region$", "atlas_mask_token"),
    (r"^decoder\.stages\.0\.expand\.", "first_patch_expanding."),
    (r"^decoder\.stages\.(\d+)\.expand\.", lambda match: f"layers_up.{int(match[1]) - 1}.upsample."),
    (r"^decoder\.stages\.(\d+)\.stack\.", r"layers_up.\1."),
    (r"^decoder\.norm\.", "norm_up."),
    (r"^decoder\.predict\.", "decoder_pred."),
    (r"^stages\.(\d+)\.place$", r"pos_embeds.\1.pos_embed"),
    (r"^stages\.(\d+)\.time$", r"pos_embeds.\1.time_embed"),
    (r"^stages\.(\d+)\.stack\.", r"layers.\1."),
    (r"^stages\.(\d+)\.merge\.norm\.", r"layers.\1.downsample.norm."),
    (r"^stages\.(\d+)\.merge\.reduce\.", r"layers.\1.downsample.reduction."),
    (r"\.mlp\.0\.", ".mlp.linear1."),
    (r"\.mlp\.2\.", ".mlp.linear2."),
)


@dataclass(frozen=True)
class Report:
    """What became of every tensor.

    Attributes:
        mapped: published name to our name.
        missing: published names that the checkpoint lacks; these parameters keep their initial value.
        left_over: names in the checkpoint that the network has no use for.
    """

    mapped: dict[str, str]
    missing: list[str]
    left_over: list[str]


@dataclass(frozen=True)
class Converted:
    """A published checkpoint in our terms: `network(**arguments).load_state_dict(state_dict)` works.

    Attributes:
        network: `MaskedAutoencoder` if the checkpoint has a decoder, else `SwinMambaEncoder`.
        arguments: of the network; they can be written to JSON.
        state_dict: every parameter of the network.
        report: what became of every tensor.
    """

    network: type[MaskedAutoencoder] | type[SwinMambaEncoder]
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]
    report: Report


def load_published(path: str | Path, config: Mapping[str, Any] | None = None, orientation: str = "LAS") -> Converted:
    """Read a published checkpoint file and convert it; see `convert_published`.

    Only tensors and plain values are read from the file, never code.

    Raises:
        InputError: the file cannot be read, or not converted.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is no checkpoint, or holds Python objects, which are not loaded for safety; save only its "
            "state_dict with torch.save and give the settings as config."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path.") from error
    except (RuntimeError, EOFError) as error:
        raise InputError(f"{path} is damaged or not a PyTorch checkpoint; download it again.") from error
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; choose another file.")
    try:
        return convert_published(checkpoint, config, orientation)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def convert_file(published: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    """Convert a published file to a checkpoint that `bundle.training.checkpoints.load_encoder` takes.

    Its provenance names the published file instead of a preparation and a split: nobody knows here which
    participants those weights have seen.

    Returns:
        `{"network", "arguments", "mapped", "missing", "left_over"}`, fit for JSON.

    Raises:
        InputError: the file cannot be read, converted or written.
    """
    converted = load_published(published)
    network = converted.network(**converted.arguments)
    network.load_state_dict(converted.state_dict, strict=True)
    encoder = network.encoder if isinstance(network, MaskedAutoencoder) else network
    state = converted.state_dict
    if encoder is network:
        state = {f"encoder.{name}": tensor for name, tensor in state.items()}
    seen = {"mode": "run", "per_frame": False}
    facts = Provenance(published=file_sha256(published), network=encoder.size, normalisation=seen)
    write_checkpoint({"network": state, "provenance": facts.state_dict()}, Path(checkpoint))
    return {"network": converted.network.__name__, "arguments": converted.arguments} | asdict(converted.report)


def convert_published(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None, orientation: str = "LAS"
) -> Converted:
    """Convert a published checkpoint strictly: every tensor is mapped or named.

    Args:
        checkpoint: published parameter names to tensors; or a whole checkpoint that has them under
            `state_dict`, in the Lightning format with the prefix `model.` and `hyper_parameters`.
        config: the published constructor's arguments; by default the checkpoint's `hyper_parameters`
            or `config`.
        orientation: direction of x in the images that the weights were trained on. The published weights were
            trained on LAS, so that RAS input must be mirrored, see `SwinMambaEncoder`.

    Returns:
        The network, its arguments, its weights and the report. Mask tokens that an older checkpoint lacks are
        named in the report and the log, and have their initial value.

    Raises:
        InputError: a setting is missing or not supported; a tensor is missing, has a wrong shape, or belongs to
            a part of the network that does not exist here.
    """
    if config is None:
        config = checkpoint.get("hyper_parameters") or checkpoint.get("config") or {}
    published, outside = _network_tensors(checkpoint.get("state_dict", checkpoint))
    network: type[MaskedAutoencoder] | type[SwinMambaEncoder]
    network = MaskedAutoencoder if "decoder_pred.weight" in published else SwinMambaEncoder
    arguments = _arguments(config, orientation)
    if network is MaskedAutoencoder:
        arguments["mask_token"] = _mask_token(config)
    initial = network(**arguments).state_dict()
    names = {published_name(name): name for name in initial}
    missing = [name for name in names if name not in published]
    left_over = [name for name in published if name not in names]
    _refuse(missing, [name for name in left_over if not BUFFERS.search(name)])
    converted = dict(initial)
    for theirs, ours in names.items():
        if theirs in published:
            converted[ours] = _layout(theirs, published[theirs], initial[ours].shape)
    report = Report({name: names[name] for name in names if name in published}, missing, left_over + outside)
    _log(report)
    return Converted(network, arguments, converted, report)


def published_name(name: str) -> str:
    """Translate one of our parameter names to the published one."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _network_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Split into the network's tensors, without the Lightning prefix, and the names of everything else."""
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    outside = [name for name in state_dict if name not in tensors]
    if any(name.startswith(LIGHTNING_PREFIX) for name in tensors):
        outside += [name for name in tensors if not name.startswith(LIGHTNING_PREFIX)]
        tensors = {
            name.removeprefix(LIGHTNING_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(LIGHTNING_PREFIX)
        }
    return tensors, outside


def _arguments(config: Mapping[str, Any], orientation: str) -> dict[str, Any]:
    """Translate the published settings to the arguments of `SwinMambaEncoder`."""
    absent = [name for name in SETTINGS if name not in config]
    if absent:
        raise InputError(f"The settings {absent} of the published network are unknown; give them as config.")
    for name, value in FIXED_SETTINGS.items():
        if config.get(name, value) != value:
            raise InputError(f"{name} = {config[name]} is not supported, only {value}; choose another checkpoint.")
    *patch, patch_frames = config["patch_size"]
    if len(set(patch)) != 1 or patch_frames != 1:
        raise InputError(
            f"patch_size {config['patch_size']} is not supported, only cubes of one frame; choose another checkpoint."
        )
    *image_size, frames = config["img_size"]
    return {
        "image_size": list(image_size),
        "frames": frames,
        "patch_size": patch[0],
        "embed_dim": config["embed_dim"],
        "depths": list(config["depths"]),
        "window_size": list(config["window_size"]),
        "first_window_size": list(config["first_window_size"]),
        "full_last_stage": bool(config["last_layer_full_MSA"]),
        "orientation": orientation,
    }


def _mask_token(config: Mapping[str, Any]) -> str:
    """Say which mask token the checkpoint was trained with."""
    kind = config.get("spatial_mask")
    if kind not in MASK_TOKENS:
        raise InputError(f"spatial_mask must be one of {list(MASK_TOKENS)}, not {kind!r}; give it in config.")
    return MASK_TOKENS[kind]


def _refuse(missing: list[str], unknown: list[str]) -> None:
    """Raise InputError for tensors without which, or with which, the network would be another one."""
    lost = [name for name in missing if name not in MAY_BE_MISSING]
    if lost:
        raise InputError(
            f"{len(lost)} tensors are missing, such as {lost[:3]}; choose a complete checkpoint, or a config that fits."
        )
    if unknown:
        raise InputError(
            f"{len(unknown)} tensors belong to no part of this network, such as {unknown[:3]}; choose a checkpoint "
            "without these parts, or a config that fits."
        )


def _layout(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Bring one published tensor into our channels-last layout of the given shape."""
    ours = tensor
    if name.startswith("pos_embeds.") and tensor.ndim == 6:
        ours = tensor[0].movedim(0, -1)  # place (1, c, x, y, z, 1) -> (x, y, z, 1, c)
        if name.endswith(".time_embed"):
            ours = ours.squeeze((0, 1, 2))  # (1, c, 1, 1, 1, t) -> (1, 1, 1, t, c) -> (t, c)
    elif name == "window_mask_token" and tensor.numel() == shape.numel():
        ours = tensor.reshape(shape)  # (volume, c) -> (x, y, z, t, c)
    if ours.shape != shape:
        raise InputError(
            f"{name} has the shape {tuple(tensor.shape)}, which does not fit the network's {tuple(shape)}; give the "
            "config that the checkpoint was trained with."
        )
    return ours.contiguous()


def _log(report: Report) -> None:
    """Log the report: counts as information, every difference as a warning."""
    logger.info("published checkpoint: %d tensors mapped", len(report.mapped))
    if report.missing:
        logger.warning("published checkpoint: not in it, left at the initial value: %s", ", ".join(report.missing))
    if report.left_over:
        logger.warning("published checkpoint: not used: %s", ", ".join(report.left_over))
