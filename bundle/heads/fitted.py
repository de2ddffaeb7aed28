"""What heads share that are fitted at once, to the features of a frozen encoder, instead of trained in steps."""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from itertools import count
from typing import Any, Self

from torch import Tensor, nn

from bundle.errors import InputError
from bundle.heads.pooling import mean_features
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.tasks.task import Task


def by_participant(values: Iterable[Any], participants: Sequence[Hashable] | None) -> list[list[Any]]:
    """What belongs to each participant, of one value per run; None: each run is of another one."""
    found: dict[Hashable, list[Any]] = {}
    for name, value in zip(participants or count(), values, strict=participants is not None):
        found.setdefault(name, []).append(value)
    return list(found.values())


class FittedHead(nn.Module):
    """A frozen encoder, and a head whose numbers a state dict holds as plain tensors.

    Args:
        freeze: must be True.
        outputs: numbers per run, see `bundle.tasks.task.Task`.
        **encoder: the arguments of `SwinMambaEncoder`.

    Attributes:
        settings: what the fitted numbers mean nothing without, JSON.
        fitted: the numbers, on the CPU; none before `fit`.

    Raises:
        InputError: the encoder is to be trained.
    """

    differentiable = False  # with respect to the images

    def __init__(self, freeze: bool, outputs: int, **encoder: Any) -> None:
        super().__init__()
        if not freeze:
            raise InputError(f"a {type(self).__name__} is fitted, not trained, so its encoder stays frozen")
        self.encoder = SwinMambaEncoder(**encoder).requires_grad_(False).eval()
        self.outputs = outputs
        self.settings: dict[str, Any] = {"outputs": outputs}
        self.fitted: dict[str, Tensor] = {}

    @abstractmethod
    def fit(
        self,
        runs: Sequence[Tensor],
        labels: Sequence[float],
        task: Task,
        seed: int = 0,
        participants: Sequence[Hashable] | None = None,
    ) -> None:
        """Fit all but the encoder to the training runs.

        Args:
            runs: `features` of each run's clips.
            labels: number of the class, or value, of each run.
            task: what is predicted; its outputs are as many as the head's.
            seed: of whatever is drawn.
            participants: who each run is of; None: each of another one.
        """

    def train(self, mode: bool = True) -> Self:
        """Stay as it is: nothing here behaves otherwise in training."""
        return super().train(False)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the settings, and all that was fitted; `torch.load(weights_only=True)` reads it."""
        return {"settings": dict(self.settings), "fitted": dict(self.fitted)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned.

        Raises:
            InputError: it was fitted with other settings.
        """
        for name, here in self.settings.items():
            if state["settings"].get(name) != here:
                was = state["settings"].get(name)
                raise InputError(
                    f"the {type(self).__name__} was fitted with {name} {was!r}, but here it is {here!r}; give the "
                    "options, such as --atlas, that it was trained with"
                )
        self.fitted = {name: tensor.cpu() for name, tensor in state["fitted"].items()}

    def seen(self, features: Tensor, counts: Sequence[int]) -> Tensor:
        """What is weighed of `features` of clips, for the clips of each run, so many: (n, d)."""
        return mean_features(features, counts)

    def require_fitted(self) -> None:
        """Refuse to score before anything was fitted.

        Raises:
            InputError: nothing was.
        """
        if not self.fitted:
            raise InputError(f"the {type(self).__name__} was not fitted; fit it, or load a checkpoint of one")
