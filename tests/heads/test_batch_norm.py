"""Batch norm over several processes is PyTorch's over the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bundle.heads.batch_norm import WholeBatchNorm

ROWS = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SHARES = (ROWS[:1], ROWS[1:])


def norm(kind: type[nn.BatchNorm1d], momentum: float | None) -> nn.BatchNorm1d:
    return kind(3, eps=1e-8, affine=False, momentum=momentum).double()


def through(module: nn.Module, batches: list[Tensor], first: int) -> list[Tensor]:
    """Results, gradients of a sum that weighs rows and channels, and what was learnt."""
    found = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        y = module(x)
        weights = torch.arange(first * 3, first * 3 + y.numel(), dtype=y.dtype).view_as(y).sin()
        (y * weights).sum().backward()
        found += [y.detach(), x.grad]
    return [*found, module.running_mean, module.running_var]


def work_as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        share = SHARES[rank]
        found = {
            str(momentum): through(norm(WholeBatchNorm, momentum), [share, 2 * share + 1], rank)
            for momentum in (None, 0.1)
        }
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_standardise_by_the_whole_batch(tmp_path: Path):
    torch.multiprocessing.spawn(work_as_rank, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for momentum in (None, 0.1):
        expected = through(norm(nn.BatchNorm1d, momentum), [ROWS, 2 * ROWS + 1], 0)
        first, second = (part[str(momentum)] for part in parts)
        for whole, one, two in zip(expected[:4], first[:4], second[:4], strict=True):
            torch.testing.assert_close(torch.cat([one, two]), whole, rtol=0, atol=1e-12)
        for learnt in (first[4:], second[4:]):
            torch.testing.assert_close(learnt, expected[4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_one_process_is_pytorch(momentum: float | None):
    ours, theirs = (through(norm(kind, momentum), [ROWS, 3 * ROWS], 0) for kind in (WholeBatchNorm, nn.BatchNorm1d))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_one_row_alone_is_standardised_by_what_was_learnt():
    module = norm(WholeBatchNorm, None)
    module(ROWS)
    expected = (ROWS[:1] - module.running_mean) / (module.running_var + 1e-8).sqrt()
    torch.testing.assert_close(module(ROWS[:1]), expected)
    assert int(module.num_batches_tracked) == 1
