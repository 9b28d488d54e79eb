"""What TTT-Linear and TTT-MLP cost: training, one decoded token, memory.

python -m benchmarks.ttt_layers [--threads 2] [--runs 7] [--skip train decode memory]

One sequence of 2,048 tokens, 4 heads of 64, chunks of 16, float32. Times are the smallest of
interleaved runs.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.ops.ttt_linear import ttt_linear
from testtime.ops.ttt_mlp import ttt_mlp

HEADS, DIM, CHUNK = 4, 64, 16
OPERATORS = {"linear": ttt_linear, "mlp": ttt_mlp}


def inputs(kind: str, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return tokens with slow weights, and start parameters, all of which need gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=g) for _ in range(3))
    lr = torch.rand(1, HEADS, length, generator=g) / DIM
    slow = [1 / torch.arange(1.0, CHUNK + 1), torch.ones(HEADS, DIM), torch.zeros(HEADS, DIM)]
    wide = DIM if kind == "linear" else 4 * DIM
    shapes = [(DIM, wide), (1, wide)] + ([(wide, DIM), (1, DIM)] if kind == "mlp" else [])
    start = [0.02 * torch.randn(HEADS, *shape, generator=g) for shape in shapes]
    return [t.requires_grad_() for t in (q, k, v, lr, *slow)], [t.requires_grad_() for t in start]


def gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    s = torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    hat = centred / s
    along = weight * (weight * hat + bias - target)
    along = along - along.mean(-1, keepdim=True) - hat * (along * hat).mean(-1, keepdim=True)
    return along / s


def plain_linear(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, c: Tensor, weight: Tensor, bias: Tensor,
    w: Tensor, b: Tensor,
) -> list[Tensor]:  # fmt: skip
    steps = (c[:, None] * lr.mT).tril()
    g = gradient(k @ w + b, v - k, weight, bias)
    z = q @ w + b - (steps * (q @ k.mT + 1)) @ g
    o = q + F.layer_norm(z, z.shape[-1:], eps=1e-6) * weight + bias
    g = c[-1] * lr * g
    return [o, w - k.mT @ g, b - g.sum(-2, keepdim=True)]


def plain_mlp(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, c: Tensor, weight: Tensor, bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
) -> list[Tensor]:  # fmt: skip
    steps = (c[:, None] * lr.mT).tril()
    z1 = k @ w1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    g2 = gradient(x2 @ w2 + b2, v - k, weight, bias)
    th = torch.tanh(0.7978845608 * z1 * (1 + 0.044715 * z1 * z1))
    slope = (z1 * (1 - th * th) * (0.7978845608 + 0.1070322243 * z1 * z1) + 1 + th) / 2
    g1 = (g2 @ w2.mT) * slope
    x2_read = F.gelu(q @ w1 + b1 - (steps * (q @ k.mT + 1)) @ g1, approximate="tanh")
    z2 = x2_read @ w2 + b2 - (steps * (x2_read @ x2.mT + 1)) @ g2
    o = q + F.layer_norm(z2, z2.shape[-1:], eps=1e-6) * weight + bias
    g1, g2 = c[-1] * lr * g1, c[-1] * lr * g2
    first = [w1 - k.mT @ g1, b1 - g1.sum(-2, keepdim=True)]
    return [o, *first, w2 - x2.mT @ g2, b2 - g2.sum(-2, keepdim=True)]


def plain(chunk: Callable[..., list[Tensor]], tokens: list[Tensor], start: list[Tensor]) -> Tensor:
    """Run a function of one chunk over all chunks."""
    q, k, v, lr, c, weight, bias = tokens
    state, outputs = [p[None] for p in start], []
    pieces = (x.unflatten(2, (-1, CHUNK)).unbind(2) for x in (q, k, v, lr[..., None]))
    for piece in zip(*pieces, strict=True):
        o, *state = chunk(*piece, c, weight[:, None], bias[:, None], *state)
        outputs.append(o)
    return torch.cat(outputs, 2)


def train(runs: int) -> None:
    print("\nforward and backward, 2,048 tokens         forward ms  both ms")
    for kind, operator in OPERATORS.items():
        tokens, start = inputs(kind, 2048)
        chunk = {"linear": plain_linear, "mlp": plain_mlp}[kind]
        compiled = torch.compile(chunk, dynamic=False)
        peers: dict[str, Callable[[], Tensor]] = {
            "testtime": lambda o=operator, t=tokens, s=start: o(*t, s).o,
            "testtime, all states kept": lambda o=operator, t=tokens, s=start: (
                o(*t, s, recompute=1).o
            ),
            "plain dual form": lambda c=chunk, t=tokens, s=start: plain(c, t, s),
            "plain dual form, inductor": lambda c=compiled, t=tokens, s=start: plain(c, t, s),
            "causal SDPA": lambda t=tokens: F.scaled_dot_product_attention(*t[:3], is_causal=True),
        }
        weights = torch.randn(1, HEADS, 2048, DIM)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
        for _ in range(runs + 1):
            for name, run in peers.items():
                began = time.perf_counter()
                o = run()
                middle = time.perf_counter()
                torch.autograd.grad(o, [*tokens, *start], weights, allow_unused=True)
                times[name].append((middle - began, time.perf_counter() - began))
        for name, found in times.items():
            forward, both = (1e3 * min(column) for column in zip(*found[1:], strict=True))
            print(f"  {kind:8}{name:32}{forward:10.1f}{both:9.1f}", flush=True)


def summed(
    state: list[Tensor],
    total: list[Tensor],
    token: Sequence[Tensor],
    slow: Sequence[Tensor],
    c: Tensor,
) -> Tensor:
    """Decode one token of TTT-Linear with the running sum of gradients, written in place."""
    (w, b), (a_w, a_b), (q, k, v, lr), (weight, bias) = state, total, token, slow
    g = lr * gradient(k @ w + b, v - k, weight, bias)
    a_w += k.mT @ g
    a_b += g
    z = q @ (w - c * a_w) + b - c * a_b
    return q + F.layer_norm(z, z.shape[-1:], eps=1e-6) * weight + bias


def summed_mlp(
    state: list[Tensor],
    total: list[Tensor],
    token: Sequence[Tensor],
    slow: Sequence[Tensor],
    c: Tensor,
) -> Tensor:
    """Decode one token of TTT-MLP with the running sum of gradients, written in place."""
    (w1, b1, w2, b2), (q, k, v, lr), (weight, bias) = state, token, slow
    z1 = k @ w1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    g2 = gradient(x2 @ w2 + b2, v - k, weight, bias)
    g1 = torch.ops.aten.gelu_backward(g2 @ w2.mT, z1, approximate="tanh")
    for a, step in zip(total, (k.mT @ (lr * g1), lr * g1, x2.mT @ (lr * g2), lr * g2), strict=True):
        a += step
    w1, b1, w2, b2 = (p - c * a for p, a in zip(state, total, strict=True))
    z2 = F.gelu(q @ w1 + b1, approximate="tanh") @ w2 + b2
    return q + F.layer_norm(z2, z2.shape[-1:], eps=1e-6) * weight + bias


def decode(runs: int) -> None:
    bandwidth = _bandwidth()
    print(f"\none decoded token (copying runs at {bandwidth / 1e9:.1f} GB/s)")
    print("                                          ms   MB touched   ms by bytes alone")
    for kind, operator in OPERATORS.items():
        with torch.no_grad():
            tokens, start = inputs(kind, CHUNK * 8 + 5)
            found = operator(*tokens, start)
            token = [t[:, :, :1].contiguous() for t in tokens[:4]]
            size = 4 * sum(p.numel() for p in start)
            state = found.state
            held = 4 * sum(
                t.numel() for t in (*state.now.inputs, *state.now.gradients, state.now.v)
            )
            total = [a.clone() for a in state.sums()]
            slow = [t[:, None] for t in tokens[5:7]]
            one = [*token[:3], token[3][..., None]]
            sum_form = {"linear": summed, "mlp": summed_mlp}[kind]
            peers = {
                # The parameters once; the pairs are copied, for a state is a value.
                "pairs": (
                    lambda o=operator, t=tokens, x=token, s=state: o(*x, *t[4:], s),
                    size + 2 * held,
                ),
                # Parameters and sums once, and the sums written.
                "running sum": (
                    lambda f=sum_form, s=state, a=total, x=one, w=slow: f(
                        list(s.now.start), a, x, w, 0.2
                    ),
                    3 * size,
                ),
            }
            for name, (run, touched) in peers.items():
                times = []
                for _ in range(50 * runs):
                    began = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - began)
                print(
                    f"  {kind:8}{name:28}{1e3 * min(times):8.3f}{touched / 1e6:10.3f}"
                    f"{1e3 * touched / bandwidth:15.3f}",
                    flush=True,
                )


def _bandwidth() -> float:
    a, b, times = torch.randn(2**24), torch.empty(2**24), []
    for _ in range(5):
        began = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - began)
    return 2 * a.nbytes / min(times)


def _peak(kind: str, length: int, recompute: int, answer: Any) -> None:
    tokens, start = inputs(kind, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    OPERATORS[kind](*tokens, start, recompute=recompute).o.sum().backward()
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory() -> None:
    print("\npeak memory of forward and backward, MiB     2,048 tokens    8,192   32,768")
    context = multiprocessing.get_context("spawn")
    for kind in OPERATORS:
        for recompute in (16, 1):
            found = []
            for length in (2048, 8192, 32768):
                answer = context.Queue()
                process = context.Process(target=_peak, args=(kind, length, recompute, answer))
                process.start()
                found.append(answer.get())
                process.join()
            name = "all states kept" if recompute == 1 else "states of every 16th chunk"
            print(f"  {kind:8}{name:32}" + "".join(f"{mib:11.0f}" for mib in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=[], choices=["train", "decode", "memory"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}", end="; ")
    print(f"load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    if "train" not in options.skip:
        train(options.runs)
    if "decode" not in options.skip:
        decode(options.runs)
    if "memory" not in options.skip:
        memory()


if __name__ == "__main__":
    main()
