"""Many samples at once, each with weights of its own, beside one after another.

python -m benchmarks.many [--calls 3]
"""

import argparse
import platform
import time
import warnings

import timm
import torch
from torch import nn

import testtime as tt
from testtime.models import ResNetGN

MODELS = {
    "ResNet-26-GN, 32 pixels": (lambda: ResNetGN(26), 32),
    "ViT-Ti/4, 32 pixels": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4),
        32,
    ),
    "ConvNeXt-Atto, 64 pixels": (lambda: timm.create_model("convnext_atto"), 64),
    "ResNet-18, source statistics, 64 pixels": (lambda: timm.create_model("resnet18"), 64),
}


def wall(adapted: nn.Module, x: torch.Tensor) -> float:
    started = time.perf_counter()
    adapted(x)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # random pixels fit no preprocessing
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("entropy of 16 single images, norm weights, 2 steps; best of", options.calls)
    print(f"{'model':42} loop s  vmap s  loop/vmap  largest relative difference")
    for name, (build, side) in MODELS.items():
        model, x = build().eval(), torch.randn(16, 3, side, side)
        method = tt.Tent(statistics="source", steps=2)
        loop = tt.adapt(model, method, episodic="sample", many="loop")
        many = tt.adapt(model, method, episodic="sample", many="vmap")
        one, all_at_once = loop(x), many(x)
        gap = float((one - all_at_once).abs().max() / one.abs().max())
        pairs = [(wall(loop, x), wall(many, x)) for _ in range(options.calls)]
        slow, fast = (min(column) for column in zip(*pairs, strict=True))
        print(f"{name:42} {slow:6.3f} {fast:7.3f} {slow / fast:10.2f}  {gap:.1e}", flush=True)


if __name__ == "__main__":
    main()
