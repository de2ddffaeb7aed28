"""What heads share that are trained on an encoder in steps."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from bundle.heads.batch_norm import WholeBatchNorm
from bundle.heads.pooling import mean_features
from bundle.networks.swin_mamba import SwinMambaEncoder


class OnEncoder(nn.Module):
    """An encoder, frozen or trained along, and the standardisation of its last stage's channels.

    The standardisation is a batch norm without weights, see `bundle.heads.mean.Classifier`.

    Args:
        freeze: keep the encoder as it is: no gradients, always in evaluation mode. Else it is trained as well.
        outputs: numbers per clip or run, see `bundle.tasks.task.Task`.
        **encoder: the arguments of `SwinMambaEncoder`.
    """

    def __init__(self, freeze: bool, outputs: int, **encoder: Any) -> None:
        super().__init__()
        self.outputs = outputs
        self.freeze = freeze
        self.encoder = SwinMambaEncoder(**encoder)
        # features of a frozen encoder do not drift, so all batches count alike in the mean and variance (momentum None)
        momentum = None if freeze else 0.1
        self.norm = WholeBatchNorm(self.encoder.channels, eps=1e-8, affine=False, momentum=momentum)
        if freeze:
            self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for a frozen encoder."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def seen(self, features: Tensor, counts: Sequence[int]) -> Tensor:
        """What is weighed of `features` of clips, for the clips of each run or each clip, so many: (n, d)."""
        return mean_features(features, counts)
