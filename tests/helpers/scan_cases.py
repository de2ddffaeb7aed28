"""Arguments for the selective scan, and its value and gradients, for several test files."""

import torch

NAMES = ("u", "delta", "A", "B", "C", "D")


def arguments(rows=2, length=5, channels=3, states=4, seed=0, dtype=torch.float64):
    """Random arguments that require gradients; steps and decays as large as Mamba starts with."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    u, b, c = normal(rows, length, channels), normal(rows, length, states), normal(rows, length, states)
    delta = torch.nn.functional.softplus(normal(rows, length, channels) - 2)
    a = -torch.arange(1, states + 1, dtype=dtype).repeat(channels, 1) * normal(channels, states).exp()
    return [tensor.detach().requires_grad_() for tensor in (u, delta, a, b, c, normal(channels))]


def value_and_gradients(function, tensors):
    y = function(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]
