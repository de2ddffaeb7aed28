"""Batch norm over whole batches, however many processes share them."""

import ignite.distributed as idist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional


class WholeBatchNorm(nn.BatchNorm1d):
    """Batch norm whose mean and variance are those of the batch of all processes; `nn.SyncBatchNorm` is for CUDA only.

    A batch of one row has no spread to learn: it is standardised by what was learnt before.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Standardise rows (B, c), of which a batch may have another number in each process."""
        world = idist.get_world_size()
        if not self.training or (world == 1 and len(input) > 1):
            return super().forward(input)
        rows = all_reduce(input.new_full((), len(input))) if world > 1 else input.new_full((), 1)
        if rows == 1:
            return functional.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)
        mean = all_reduce(input.sum(0)) / rows
        centred = input - mean
        variance = all_reduce(centred.square().sum(0)) / rows
        self._follow(mean.detach(), variance.detach() * rows / (rows - 1))
        return centred / (variance + self.eps).sqrt()

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running moments as PyTorch does."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
