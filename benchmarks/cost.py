"""What the library adds to TENT: CPU seconds, memory and time to build, beside a plain loop.

python -m benchmarks.cost [--compiled] [--calls 10]
"""

import argparse
import copy
import platform
import time
import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import testtime as tt

CASES = [("resnet50", 8), ("vit_base_patch16_224", 8), ("resnet50", 16)]


def hand_written(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return TENT as one would write it for one model, in place, with torch's own Adam."""
    model = copy.deepcopy(model).requires_grad_(False)
    adapting = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            adapting += [layer.weight.requires_grad_(), layer.bias.requires_grad_()]
    optimizer = torch.optim.Adam(adapting, lr=1e-3)

    def step(x: Tensor) -> Tensor:
        logits = model(x)
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return logits.detach()

    step.model = model
    return step


def seconds(step: Callable[[Tensor], object], x: Tensor) -> tuple[float, float]:
    """Return CPU seconds, of all threads, and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    step(x)
    return time.process_time() - cpu, time.perf_counter() - wall


def side_by_side(
    one: Callable[[Tensor], object], other: Callable[[Tensor], object], x: Tensor, calls: int
) -> list[tuple[float, float]]:
    """Return the least CPU and wall seconds of each of two, called in turn."""
    pairs = [(seconds(one, x), seconds(other, x)) for _ in range(calls)]
    return [
        (min(call[0] for call in column), min(call[1] for call in column))
        for column in zip(*pairs, strict=True)
    ]


def storages(*held: object) -> dict[int, int]:
    """Return the bytes of every storage that modules and tensors hold, by address."""
    found = {}
    for one in held:
        tensors = [*one.parameters(), *one.buffers()] if isinstance(one, nn.Module) else [one]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def extra_mib(adapted: tt.Adapted, model: nn.Module) -> tuple[float, float]:
    """Return what the adapted model holds beyond the user's, and what law 2 allows, in MiB."""
    learner = adapted.learner
    states = [t for s in (learner.state, learner.start) for t in s.tensors().values()]
    mine, theirs = storages(learner.module, learner.original, *states), storages(model)
    extra = sum(size for address, size in mine.items() if address not in theirs)
    allowed = 0
    for held in (learner.state.weights, *learner.state.slots.values()):
        allowed += sum(t.nbytes for t in held.values())
    # Buffers once for the state, and once for each of the two private copies.
    allowed += 3 * sum(t.nbytes for t in model.buffers())
    allowed += 2 * (learner.state.generator.nbytes + learner.state.skipped.nbytes)
    return extra / 2**20, allowed / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiled", action="store_true", help="measure under inductor too")
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # random pixels fit no preprocessing
    torch.manual_seed(0)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"minimum of {options.calls} interleaved calls; ratio: library / hand-written")
    print("                               CPU seconds         ratio   extra MiB")
    print("model                 batch   hand    ours    CPU   wall   (allowed)     build s  form")
    for name, batch in CASES:
        model, x = timm.create_model(name).eval(), torch.randn(batch, 3, 224, 224)
        for form in ("eager", "inductor") if options.compiled else ("eager",):
            hand = hand_written(model)
            started = time.perf_counter()
            adapted = tt.adapt(model, tt.Tent())
            build = time.perf_counter() - started
            if form == "inductor":
                hand.model.compile()
                adapted.learner.module.compile()
            for _ in range(2):
                hand(x), adapted(x)
            theirs, ours = side_by_side(hand, adapted, x, options.calls)
            extra, allowed = extra_mib(adapted, model)
            print(
                f"{name:22} {batch:3} {theirs[0]:7.3f} {ours[0]:7.3f} {ours[0] / theirs[0]:6.3f} "
                f"{ours[1] / theirs[1]:6.3f}  {extra:6.2f} ({allowed:.2f})  {build:7.3f}  {form}",
                flush=True,
            )


if __name__ == "__main__":
    main()
