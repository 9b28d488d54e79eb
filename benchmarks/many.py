"""Many samples at once, each with weights of its own, beside one after another.

python -m benchmarks.many [--calls 3]
"""

import argparse
import platform
import warnings

import timm
import torch

import testtime as tt
from benchmarks.cost import side_by_side
from testtime.models import ResNetGN

ENTROPY = tt.Tent(statistics="source", steps=2)

# Method, network, side of the images, how many of them.
CASES = {
    "TENT, ResNet-26-GN, 32 pixels": (ENTROPY, lambda: ResNetGN(26), 32, 16),
    "TENT, ViT-Ti/4, 32 pixels": (
        ENTROPY,
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4),
        32,
        16,
    ),
    "TENT, ConvNeXt-Atto, 64 pixels": (ENTROPY, lambda: timm.create_model("convnext_atto"), 64, 16),
    "TENT, ResNet-18, 64 pixels": (ENTROPY, lambda: timm.create_model("resnet18"), 64, 16),
    "MEMO, 32 views, ResNet-26-GN, 32 pixels": (tt.MEMO(), lambda: ResNetGN(26), 32, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # random pixels fit no preprocessing
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("TENT: 16 single images, norm weights, source statistics, 2 steps; MEMO: 4, all weights")
    print(f"minimum of {options.calls} interleaved calls, CPU seconds of all threads, then wall")
    print(f"{'':42} loop s  vmap s  loop/vmap  wall: loop s  vmap s  loop/vmap  difference")
    for name, (method, build, side, images) in CASES.items():
        model, x = build().eval(), torch.rand(images, 3, side, side)
        loop = tt.adapt(model, method, episodic="sample", many="loop")
        many = tt.adapt(model, method, episodic="sample", many="vmap")
        one, all_at_once = loop(x), many(x)
        gap = float((one - all_at_once).abs().max() / one.abs().max())
        (slow, slow_wall), (fast, fast_wall) = side_by_side(loop, many, x, options.calls)
        print(
            f"{name:42} {slow:6.3f} {fast:7.3f} {slow / fast:10.2f} {slow_wall:13.3f} "
            f"{fast_wall:7.3f} {slow_wall / fast_wall:10.2f}  {gap:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
