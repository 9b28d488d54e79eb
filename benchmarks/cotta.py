"""What CoTTA costs beside a plain transcription, with views and without; 2 cores, ResNet-26-GN.

python -m benchmarks.cotta [--calls 3] [--batches 1,16,64]
"""

import argparse
import copy
import platform
import warnings
from collections.abc import Callable

import torch
import torchvision.transforms.functional as V
from torch import Tensor, nn

import testtime as tt
from benchmarks.cost import side_by_side
from testtime.models import ResNetGN

NEVER, ALWAYS = 0.0, 1.1  # thresholds of the source's confidence


def plain_view(x: Tensor) -> Tensor:
    """Return one view by torchvision, an operation after another, on the whole padded image."""
    size = x.shape[-1]
    brightness, contrast, saturation, hue, gamma = (
        float(torch.empty(1).uniform_(low, high))
        for low, high in ((0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3))
    )
    colours = [
        lambda x: V.adjust_brightness(x, brightness),
        lambda x: V.adjust_contrast(x, contrast),
        lambda x: V.adjust_saturation(x, saturation),
        lambda x: V.adjust_hue(x, hue),
        lambda x: V.adjust_gamma(x.clamp(1e-8, 1), gamma),
    ]
    x = x.clamp(0, 1)
    for k in torch.randperm(5).tolist():
        x = colours[k](x)
    x = V.pad(x, [size // 2], padding_mode="edge")
    angle, scale = float(torch.empty(1).uniform_(-15, 15)), float(torch.empty(1).uniform_(0.9, 1.1))
    moves = [int(m) for m in torch.empty(2).uniform_(-size / 8, size / 8).round()]
    x = V.affine(x, angle, moves, scale, [0.0], V.InterpolationMode.BILINEAR, fill=[0.0])
    sigma = float(torch.empty(1).uniform_(0.001, 0.5))
    x = V.center_crop(V.gaussian_blur(x, [5, 5], [sigma, sigma]), [size, size])
    if float(torch.rand(1)) < 0.5:
        x = V.hflip(x)
    return (x + 0.005 * torch.randn_like(x)).clamp(0, 1)


def plain(model: nn.Module, threshold: float) -> Callable[[Tensor], Tensor]:
    """Return CoTTA for CIFAR step by step, in place: 32 views whether they are used or not."""
    student, teacher, anchor = (copy.deepcopy(model) for _ in range(3))
    for frozen in (teacher, anchor):
        frozen.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    source = {k: v.clone() for k, v in student.state_dict().items()}

    def step(x: Tensor) -> Tensor:
        logits = student(x)
        confidence = anchor(x).softmax(1).amax(1).mean()
        target = teacher(x)
        averaged = torch.stack([teacher(plain_view(x)) for _ in range(32)]).mean(0)
        if confidence < threshold:
            target = averaged
        loss = -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.copy_(0.999 * slow + 0.001 * fast)
            for name, weight in student.named_parameters():
                mask = (torch.rand(weight.shape) < 0.01).float()
                weight.copy_(source[name] * mask + weight * (1 - mask))
        return target

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--batches", default="1,16,64")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"CoTTA on ResNet-26-GN, 32 pixels; minimum of {options.calls} interleaved calls")
    print("batch views    plain: cpu s wall s   ours: cpu s wall s   plain / ours: cpu  wall")
    for batch in map(int, options.batches.split(",")):
        for views, threshold in (("unused", NEVER), ("used", ALWAYS)):
            model, x = ResNetGN(26).eval(), torch.rand(batch, 3, 32, 32)
            theirs = plain(model, threshold)
            ours = tt.adapt(model, tt.CoTTA(threshold=threshold))
            theirs(x), ours(x)
            (cpu, wall), (own_cpu, own_wall) = side_by_side(theirs, ours, x, options.calls)
            print(
                f"{batch:5} {views:7} {cpu:13.3f} {wall:6.3f} {own_cpu:13.3f} {own_wall:6.3f} "
                f"{cpu / own_cpu:18.2f} {wall / own_wall:5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
