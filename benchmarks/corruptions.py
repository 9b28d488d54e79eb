"""Corruptions of batches on two threads, beside imgcorr on two processes, which is its better form.

python -m benchmarks.corruptions [--calls 9] [--names fog,snow] [--memory]

imgcorr is as shipped. It needs scikit-image, opencv, numba and the pkg_resources of an older
setuptools; so that .venv stays as it is, they go into a folder of their own:

    export PEERS=$(mktemp -d)
    .venv/bin/pip install --target $PEERS --no-deps imgcorr opencv-python-headless \
        scikit-image numba llvmlite imageio lazy-loader tifffile scipy "setuptools<70"
    PYTHONPATH=$PEERS .venv/bin/python -m benchmarks.corruptions

At 32 pixels imgcorr does other work: it has only the constants made for 224.
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from testtime.shifts import CORRUPTIONS, corrupt
from testtime.shifts.corruptions import STANDARD
from testtime.shifts.corruptions.textures import find_textures

SEVERITY, THREADS, PROCESSES = 3, 2, 2
SIZES = {32: 64, 224: 8}  # pixels: images a batch


def photographs(side: int, count: int) -> Tensor:
    """Return images [count, 3, side, side], uint8, that have the smoothness of photographs."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side))
    frequency[0, 0] = 1 / side
    noise = torch.fft.rfft2(torch.randn(count, 3, side, side, generator=generator))
    clouds = torch.fft.irfft2(noise / frequency, s=(side, side))
    clouds = 0.5 + 0.2 * clouds / clouds.std(dim=(2, 3), keepdim=True)
    return (255 * clouds.clamp(0, 1)).round().byte()


def work(pipe: Connection, images: Sequence[np.ndarray]) -> None:
    """Corrupt the images with imgcorr whenever a name comes in; answer with CPU seconds."""
    from imgcorr import corrupt

    while name := pipe.recv():
        started = time.process_time()
        for image in images:
            corrupt(image, severity=SEVERITY, corruption_name=name)
        pipe.send(time.process_time() - started)


class Peer:
    """imgcorr on processes of its own, each of which holds its share of the images."""

    def __init__(self, images: Tensor):
        arrays = list(images.permute(0, 2, 3, 1).numpy())
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(PROCESSES):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, arrays[i::PROCESSES]))
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, name: str) -> tuple[float, float]:
        """Return wall and CPU seconds of one batch."""
        started = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(name)
        cpu = [pipe.recv() for pipe in self.pipes]
        return time.perf_counter() - started, sum(cpu)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send("")
            process.join()


def ours(x: Tensor, name: str, generator: torch.Generator) -> tuple[float, float]:
    """Return wall and CPU seconds of one batch."""
    cpu, wall = time.process_time(), time.perf_counter()
    corrupt(x, name, SEVERITY, generator=generator)
    return time.perf_counter() - wall, time.process_time() - cpu


def middle(calls: Sequence[tuple[float, float]]) -> tuple[float, float]:
    wall, cpu = zip(*calls, strict=True)
    return 1000 * statistics.median(wall), 1000 * statistics.median(cpu)


def compare(side: int, names: Sequence[str], calls: int) -> None:
    """Print a line a corruption: median milliseconds of calls that took turns."""
    images = photographs(side, SIZES[side])
    x, generator = images / 255, torch.Generator().manual_seed(0)
    peer = Peer(images)
    print(f"\n{SIZES[side]} images of {side} pixels, severity {SEVERITY}; ms, and imgcorr / ours")
    print(f"{'':18}      ours (CPU)      imgcorr (CPU)   wall   CPU")
    ratios = {}
    for name in names:
        ours(x, name, generator), peer(name)
        pairs = [(ours(x, name, generator), peer(name)) for _ in range(calls)]
        (wall, cpu), (their_wall, their_cpu) = (
            middle(column) for column in zip(*pairs, strict=True)
        )
        ratios[name] = their_wall / wall
        print(
            f"{name:18} {wall:8.2f} ({cpu:7.2f}) {their_wall:8.2f} ({their_cpu:7.2f}) "
            f"{their_wall / wall:6.2f} {their_cpu / cpu:6.2f}",
            flush=True,
        )
    peer.close()
    for label, group in {"15": list(STANDARD), "19": list(CORRUPTIONS)}.items():
        if all(name in ratios for name in group):
            mean = math.exp(statistics.mean(math.log(ratios[name]) for name in group))
            print(f"geometric mean of the {label}, wall: {mean:.2f}")
    slower = [name for name, ratio in ratios.items() if ratio < 1]
    print(f"slower than imgcorr: {', '.join(slower) or 'none'}")


def peak_of(name: str, side: int) -> None:
    """Print the peak memory of one call, the batch among it, in sizes of the batch."""
    x = photographs(side, 64_000_000 // (12 * side * side)) / 255
    corrupt(x[:1], name, SEVERITY)  # libraries load, tables are made
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here on
    before = _status("VmRSS")
    corrupt(x, name, SEVERITY)
    print(f"{1 + 1024 * (_status('VmHWM') - before) / x.nbytes:.1f}")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def measure_memory(names: Sequence[str]) -> None:
    """Print the peak memory of each corruption, each in a process of its own."""
    print(
        "\npeak memory in sizes of the batch, the batch itself counted, at "
        f"{' and '.join(map(str, SIZES))} pixels"
    )
    # Freed memory goes back at once, and small blocks are not cut from it.
    environment = os.environ | {"TESTTIME_TRIM": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in names:
        found = []
        for side in SIZES:
            command = [sys.executable, "-m", "benchmarks.corruptions", "--peak-of", name, str(side)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            found.append(done.stdout.strip() or done.stderr.strip().splitlines()[-1])
        print(f"{name:18} {'  '.join(f'{value:>5}' for value in found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--names", default=",".join(CORRUPTIONS))
    parser.add_argument("--sizes", default="32,224")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--peak-of", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peak_of:
        peak_of(options.peak_of[0], int(options.peak_of[1]))
        return
    names = options.names.split(",")
    if options.memory:
        measure_memory(names)
        return
    print(f"{platform.machine()}, {THREADS} threads, torch {torch.__version__}")
    print(f"load before: {os.getloadavg()[0]:.1f}; median of {options.calls} calls in turns")
    print(f"frost's textures: {find_textures()}; imgcorr decodes its file for every image")
    for side in map(int, options.sizes.split(",")):
        compare(side, names, options.calls)


if __name__ == "__main__":
    main()
