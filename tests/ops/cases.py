"""Random inputs of both operators."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime.ops.ttt.run import Output
from testtime.ops.ttt_linear import ttt_linear
from testtime.ops.ttt_linear.reference import ttt_linear_reference
from testtime.ops.ttt_mlp import ttt_mlp
from testtime.ops.ttt_mlp.reference import ttt_mlp_reference

OPERATORS: dict[str, tuple[Callable[..., Output], Callable[..., Any]]] = {
    "linear": (ttt_linear, ttt_linear_reference),
    "mlp": (ttt_mlp, ttt_mlp_reference),
}


class Case(NamedTuple):
    """One operator and its inputs."""

    operator: Callable[..., Output]
    reference: Callable[..., Any]
    tokens: tuple[Tensor, ...]  # q, k, v, lr
    slow: tuple[Tensor, ...]  # coefficient, norm weight and bias
    start: tuple[Tensor, ...]

    def __call__(self, tokens: Any = None, state: Any = None, **options: Any) -> Output:
        tokens = self.tokens if tokens is None else tokens
        return self.operator(*tokens, *self.slow, self.start if state is None else state, **options)

    def piece(self, first: int, last: int, rows: Any = slice(None)) -> tuple[Tensor, ...]:
        return tuple(t[rows, :, first:last] for t in self.tokens)

    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.tokens, *self.slow, *self.start)

    def grad(self) -> "Case":
        def leaf(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.detach().clone().requires_grad_() for t in tensors)

        return self._replace(tokens=leaf(self.tokens), slow=leaf(self.slow), start=leaf(self.start))


def case(
    kind: str,
    *,
    batch: int = 2,
    heads: int = 2,
    length: int = 11,
    dim: int = 6,
    chunk: int = 4,
    dtype: torch.dtype = torch.float64,
    std: float = 0.3,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    q, k, v = (normal(batch, heads, length, dim) for _ in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lr = torch.rand(batch, heads, length, generator=g, dtype=torch.float64).to(wide) / dim
    c = (1 / torch.arange(1, chunk + 1, dtype=torch.float64)).to(wide)
    c = (c + 0.05 * normal(chunk)).clamp(min=0).to(wide)
    weight, bias = (1 + normal(heads, dim, scale=0.2)).to(wide), normal(heads, dim, scale=0.2)
    hidden = 2 * dim
    shapes = {
        "linear": [(dim, dim), (1, dim)],
        "mlp": [(dim, hidden), (1, hidden), (hidden, dim), (1, dim)],
    }[kind]
    start = tuple(normal(heads, *shape, scale=std).to(wide) for shape in shapes)
    return Case(*OPERATORS[kind], (q, k, v, lr), (c, weight, bias.to(wide)), start)


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, over the largest magnitude."""
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).detach().abs().max() / b.detach().double().abs().max())
