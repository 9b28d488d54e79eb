"""What MTTT costs: time beside linear attention and SDPA, memory of each form by tokens.

python -m benchmarks.mttt [--calls 10] [--skip-memory]
"""

import argparse
import platform
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from testtime.layers import mixer

DIM, HEADS = 192, 3
TIMES: dict[str, tuple[str, dict[str, object], str]] = {
    "linear attention": ("linear", {}, ""),
    "SDPA": ("softmax", {}, ""),
    "MTTT-Linear, moments": ("mttt-linear", {"form": "moments"}, "1.3"),
    "MTTT-Linear, written": ("mttt-linear", {"form": "written"}, ""),
    "MTTT-MLP, narrow": ("mttt-mlp", {"form": "narrow"}, "7"),
    "MTTT-MLP, written": ("mttt-mlp", {"form": "written"}, "7"),
    "MTTT-MLP, reference": ("mttt-mlp", {"form": "reference"}, ""),
    "MTTT-MLP, SGD 4, narrow": ("mttt-mlp-sgd4", {"form": "narrow"}, ""),
    "ViT^3": ("vittt", {}, ""),
}
MEMORY: dict[str, tuple[str, dict[str, object]]] = {
    name: (kind, kwargs)
    for name, (kind, kwargs, _) in TIMES.items()
    if name not in ("MTTT-MLP, SGD 4, narrow",)
} | {
    "MTTT-MLP, chunked": ("mttt-mlp", {"form": "chunked"}),
    "MTTT-MLP, SGD 4, chunked": ("mttt-mlp-sgd4", {"form": "chunked"}),
}
TOKENS = (196, 1024, 4096, 16384)
PIXELS = 224 * 224
# Above this the probabilities of every pair of tokens, or 50 numbers for each entry, are too much.
FITS = {"SDPA": 4096}


def both_ways(layer: nn.Module, x: Tensor) -> None:
    layer(x).square().sum().backward()
    layer.zero_grad()


def times(calls: int) -> None:
    """Print CPU seconds of forward and backward, the layers in turns."""
    torch.manual_seed(0)
    x = torch.randn(8, 196, DIM, requires_grad=True)
    layers = {name: mixer(kind, DIM, HEADS, **kw) for name, (kind, kw, _) in TIMES.items()}
    best = dict.fromkeys(layers, float("inf"))
    for call in range(calls + 2):
        for name, layer in layers.items():
            started = time.process_time()
            both_ways(layer, x)
            if call > 1:
                best[name] = min(best[name], time.process_time() - started)
    print(f"\nforward and backward of [8, 196, {DIM}], {HEADS} heads, float32, with projections;")
    print(f"minimum of {calls} interleaved calls, CPU time of all threads")
    print(f"{'layer':26} {'ms':>8} {'of linear attention':>20} {'at most':>8}")
    for name, seconds in best.items():
        ratio = seconds / best["linear attention"]
        print(f"{name:26} {1e3 * seconds:8.1f} {ratio:20.2f} {TIMES[name][2]:>8}", flush=True)


def kept(layer: nn.Module, x: Tensor) -> float:
    """Return the numbers kept for backward beside parameters and x, for each entry of x."""
    sizes: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters()]}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(sizes.values()) / x.numel()


def resident(field: str) -> float:
    """Return a size of this process from the kernel's report, in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def one_memory(name: str, tokens: int) -> None:
    """Print the numbers kept and the peak of a forward and backward, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, kwargs = MEMORY[name]
    layer = mixer(kind, DIM, HEADS, **kwargs)
    both_ways(layer, torch.randn(1, 196, DIM))  # libraries load at their first use
    x = torch.randn(1, tokens, DIM, requires_grad=True)
    numbers = kept(layer, x)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    started = time.perf_counter()
    both_ways(layer, x)
    seconds = time.perf_counter() - started
    print(f"{numbers:.1f} {resident('VmHWM') - before:.0f} {resident('VmHWM'):.0f} {seconds:.2f}")


def measured(name: str, tokens: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.mttt", "--one", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def memory() -> None:
    """Print what each form keeps and its peak, by tokens."""
    print(f"\nmemory of one image, width {DIM}, {HEADS} heads, float32, forward and backward:")
    print("numbers kept for backward for each entry of the tokens / MiB at the peak, beside them")
    print(f"{'layer':26} " + " ".join(f"{f'{n} tokens':>16}" for n in TOKENS))
    for name in MEMORY:
        cells = []
        for tokens in TOKENS:
            if tokens > FITS.get(name, tokens):
                cells.append("-")
                continue
            numbers, peak, _, _ = measured(name, tokens)
            cells.append(f"{numbers:.1f} / {peak:.0f}")
        print(f"{name:26} " + " ".join(f"{cell:>16}" for cell in cells), flush=True)
    print(f"\n{PIXELS} tokens, width {DIM}: MiB of the whole process at its peak (at most 2048)")
    for name in ("MTTT-Linear, moments", "MTTT-MLP, chunked", "MTTT-MLP, SGD 4, chunked", "ViT^3"):
        numbers, peak, whole, seconds = measured(name, PIXELS)
        print(
            f"{name:26} {whole:6.0f}, of that {peak:.0f} beside tokens and libraries; "
            f"kept {numbers:.1f}; {seconds:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    if options.one:
        one_memory(options.one[0], int(options.one[1]))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    times(options.calls)
    if not options.skip_memory:
        memory()


if __name__ == "__main__":
    main()
