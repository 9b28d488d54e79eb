"""The error of TTT-Linear and TTT-MLP against float64, in float32 and with bfloat16 operands.

python -m benchmarks.ttt_error [--lengths 2048 8192]

Random tokens that bfloat16 holds exactly, 4 heads of 64, chunks of 16, start weights of standard
deviation 0.02. Errors are relative in the 2-norm.
"""

import argparse

import torch
from torch import Tensor

from testtime.ops.ttt_linear import ttt_linear
from testtime.ops.ttt_mlp import ttt_mlp

HEADS, DIM, CHUNK = 4, 64, 16


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    print("model    dtype      tokens         o   o, last chunk   final W")
    for length in parser.parse_args().lengths:
        for kind, operator in (("linear", ttt_linear), ("mlp", ttt_mlp)):
            g = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(1, HEADS, length, DIM, generator=g).bfloat16() for _ in range(3))
            lr = torch.rand(1, HEADS, length, generator=g) / DIM
            slow = [
                1 / torch.arange(1.0, CHUNK + 1),
                torch.ones(HEADS, DIM),
                torch.zeros(HEADS, DIM),
            ]
            wide = DIM if kind == "linear" else 4 * DIM
            shapes = [(DIM, wide), (1, wide)] + ([(wide, DIM), (1, DIM)] if kind == "mlp" else [])
            start = [
                torch.randn(HEADS, *shape, generator=g) * (0.02 if shape[0] > 1 else 0)
                for shape in shapes
            ]
            with torch.no_grad():
                wide_inputs = (t.double() for t in (q, k, v, lr, *slow))
                exact = operator(*wide_inputs, [p.double() for p in start])
                for dtype in (torch.float32, torch.bfloat16):
                    found = operator(*(t.to(dtype) for t in (q, k, v)), lr, *slow, start)
                    last = slice(length - CHUNK, None)
                    errors = (
                        distance(found.o, exact.o),
                        distance(found.o[:, :, last], exact.o[:, :, last]),
                        distance(found.state.read()[0], exact.state.read()[0]),
                    )
                    print(
                        f"{kind:8} {str(dtype)[6:]:9}{length:8}  "
                        + "".join(f"{one:12.1e}" for one in errors),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
