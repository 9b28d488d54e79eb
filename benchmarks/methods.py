"""What every method costs on one model and batch, beside TENT written by hand, as a Markdown table.

python -m benchmarks.methods [--calls 7] [--batch 64]
"""

import argparse
import platform
import time
import warnings

import timm
import torch

import testtime as tt
from benchmarks.cost import hand_written
from testtime.adaptation.methods import METHODS
from testtime.bench.memory import Peak
from testtime.models import CifarResNet


def measured(adapted, x, calls):
    """Return milliseconds an image (the least of the calls), passes an image, peak MiB."""
    adapted(x)  # memory begins, coupling is measured
    before = adapted.report()
    times = []
    with Peak("cpu") as peak:
        for _ in range(calls):
            started = time.perf_counter()
            adapted(x)
            times.append(time.perf_counter() - started)
    after, images = adapted.report(), calls * len(x)
    passes = [
        (getattr(after, what) - getattr(before, what)) / images
        for what in ("forwards", "backwards")
    ]
    return 1e3 * min(times) / len(x), passes, peak.mib


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.manual_seed(0)
    networks = {
        "ResNet-20, BatchNorm, 32 pixels": (CifarResNet(20).eval(), 32),
        "ViT-Tiny/4, 32 pixels": (
            timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10),
            32,
        ),
    }
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batches of {options.batch}, least of {options.calls} calls\n"
    )
    for title, (model, side) in networks.items():
        model = model.eval()
        x = torch.rand(options.batch, 3, side, side)
        source = [(torch.rand(options.batch, 3, side, side), None) for _ in range(3)]
        hand = hand_written(model)
        hand(x)
        times = []
        for _ in range(options.calls):
            started = time.perf_counter()
            hand(x)
            times.append(time.perf_counter() - started)
        plain = 1e3 * min(times) / len(x)
        print(f"{title}\n")
        print("| method | ms an image | times TENT by hand | forward | backward | peak MiB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        print(f"| TENT by hand | {plain:.2f} | 1.00 | 1 | 1 | |")
        refused = []
        for name, kind in METHODS.items():
            options_of = {"source": source} if kind().needs_source else {}
            try:
                adapted = tt.adapt(model, kind(), mean=0.0, std=1.0, **options_of)
                spent, (forward, backward), mib = measured(adapted, x, options.calls)
            except (ValueError, TypeError, ImportError) as error:
                refused.append(f"`{name}`: {error}")
                continue
            peak = "" if mib is None else f"{mib:.0f}"
            print(
                f"| `{name}` | {spent:.2f} | {spent / plain:.2f} | {forward:.2f} | "
                f"{backward:.2f} | {peak} |",
                flush=True,
            )
        print("\n" + "\n".join(f"Does not fit: {one}" for one in refused) + "\n")


if __name__ == "__main__":
    main()
