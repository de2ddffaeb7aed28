"""The least time a clip can take, counted from the shapes: operations, and bytes that must move."""

from bundle.networks.mamba import KERNEL, STATES
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from scripts.benchmarks.cases import Stage, stages
from scripts.benchmarks.measure import GIB, markdown

# NVIDIA H100 SXM5 data sheet, without sparsity. The scan runs outside the tensor cores, in float32; its
# exponentials in the special function units, 16 per SM and cycle (CUDA programming guide), 132 SMs, 1.98 GHz.
BF16_FLOPS, FP32_FLOPS, BYTES, EXPONENTIALS = 989e12, 67e12, 3.35e12, 132 * 16 * 1.98e9
TRAINING = 3  # a backward pass does the work of two forward passes
HALF, SINGLE = 2, 4  # bytes of a number


def block_counts(stage: Stage) -> dict[str, float]:
    """Count one block's forward pass over one clip.

    Matrix products: per token and per channel squared 2 (4 + 2 + 8) FLOPs of `expand`, `contract` and the MLP,
    besides `select` and `step`. Scan: per token, channel and state an exponential and 7 FLOPs (a gain's
    exponent, two products of the input, a multiply-add of the state, a multiply-add of the result); 2 KERNEL
    FLOPs of the convolution. Bytes: what no fusion can avoid if a Mamba layer and an MLP are one kernel each
    between matrix products: every activation that a matrix product writes or reads crosses memory once, in
    half precision, the residual stream in float32.
    """
    tokens, c = stage.windows * stage.volume, stage.channels
    inner, rank = 2 * c, -(-c // 16)
    products = 2 * tokens * (c * 2 * inner + inner * (rank + 2 * STATES) + rank * inner + inner * c + 8 * c * c)
    written = 2 * inner + inner + (rank + 2 * STATES) + inner + inner + c + 2 * 4 * c  # half precision, per token
    return {
        "products": float(products),
        "scan": float(tokens * inner * (7 * STATES + 2 * KERNEL)),
        "exponentials": float(tokens * inner * STATES),
        "bytes": float(tokens * (2 * HALF * written + 4 * SINGLE * c)),
    }


def clip_counts(network: MaskedAutoencoder) -> dict[str, float]:
    """Count one clip's forward pass through the masked autoencoder."""
    encoder = network.encoder
    total = dict.fromkeys(("products", "scan", "exponentials", "bytes"), 0.0)
    for stage in stages(encoder):
        for name, value in block_counts(stage).items():
            total[name] += stage.blocks[1] * value
        tokens, c = stage.windows * stage.volume, stage.channels
        if stage.blocks[0] != stage.blocks[1]:  # not the last: merged in the encoder, expanded in the decoder
            total["products"] += 2 * (tokens / 8) * (8 * c * 2 * c + 2 * c * 8 * c)
            total["bytes"] += 2 * HALF * tokens * c * 2
    first = stages(encoder)[0]
    voxels = encoder.patch_size**3 * first.windows * first.volume
    total["products"] += 2 * 2 * voxels * first.channels  # embedding and prediction
    total["bytes"] += 3 * SINGLE * voxels  # the image is read, the prediction written and read by the loss
    return total


def floor() -> str:
    """Tabulate counts per clip, and the bound on one H100: computed, not measured."""
    counts = clip_counts(MaskedAutoencoder())
    training = {name: TRAINING * value for name, value in counts.items()}
    training["exponentials"] = 2 * counts["exponentials"]  # computed again in the backward pass, not differentiated
    times = {
        "products": training["products"] / BF16_FLOPS,
        "scan": training["scan"] / FP32_FLOPS,
        "exponentials": training["exponentials"] / EXPONENTIALS,
        "bytes": training["bytes"] / BYTES,
    }
    units = {"products": (1e9, "GFLOP"), "scan": (1e9, "GFLOP"), "exponentials": (1e9, "G"), "bytes": (GIB, "GiB")}
    names = {
        "products": "matrix products (bf16 tensor cores)",
        "scan": "scan and convolution (float32)",
        "exponentials": "exponentials of the scan",
        "bytes": "bytes through memory",
    }
    rows = [
        [
            text,
            f"{counts[name] / units[name][0]:.3g} {units[name][1]}",
            f"{training[name] / units[name][0]:.3g} {units[name][1]}",
            f"{times[name] * 1e3:.3g} ms",
        ]
        for name, text in names.items()
    ]
    apart = 1 / sum(times.values())
    together = 1 / max(times.values())
    return (
        "Computed from the shapes and data-sheet peaks, **not measured**.\n\n"
        + markdown(["per clip", "forward", "training step", "least time on one H100"], rows)
        + f"\n\nBound on training: {together:.0f} clips/s if all four overlap fully, {apart:.0f} clips/s if none do."
    )
