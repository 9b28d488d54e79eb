"""The law of state: all that changes while a model adapts is one value."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from testtime.adaptation.optim import Slots, Tensors


@dataclass
class State:
    """All that changes while a model adapts: nothing else does.

    Args:
        weights: adapting parameters by name; float32 where the model is in half precision.
        buffers: the network's buffers by name.
        slots: the optimiser's state: slot, then name.
        memory: what the method keeps between batches.
        generator: state of the random generator.
        skipped: count of batches that were not finite and changed nothing, int64 scalar.
        batch: batches since the start or the last reset.
        begun: has the method been asked for its memory?
        window: the last single rows by the argument they came in, where they are gathered.
        seen: rows that went into the window.
    """

    weights: Tensors
    buffers: Tensors
    slots: Slots
    memory: Tensors
    generator: Tensor
    skipped: Tensor
    batch: int = 0
    begun: bool = False
    window: Tensors = field(default_factory=dict)
    seen: int = 0

    def tensors(self) -> Tensors:
        """Return every tensor by its path, such as ``slots.exp_avg.bn1.weight``; no window's."""
        found = {"generator": self.generator, "skipped": self.skipped}
        for group, held in self.groups().items():
            found |= {f"{group}.{name}": tensor for name, tensor in held.items()}
        return found

    def groups(self) -> dict[str, Tensors]:
        """Return the dictionaries that hold the tensors of a network and a method, by path."""
        slots = {f"slots.{slot}": held for slot, held in self.slots.items()}
        return {"weights": self.weights, "buffers": self.buffers, "memory": self.memory} | slots

    def values(self, many: int = 0) -> "State":
        """Return the values that a step works on: the same tensors, but buffers as scratch.

        Args:
            many: so many samples with tensors of their own: all but the buffers are stacked.
        """

        def held(tensors: Tensors) -> Tensors:
            return {k: t.expand(many, *t.shape) if many else t for k, t in tensors.items()}

        return State(
            held(self.weights),
            {k: b.clone() for k, b in self.buffers.items()},
            {slot: held(tensors) for slot, tensors in self.slots.items()},
            held(self.memory),
            self.generator,
            self.skipped,
            self.batch,
            self.begun,
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> "State":
        """Return the same state with ``f`` applied to every tensor, the generator's excepted."""
        return State(
            {k: f(t) for k, t in self.weights.items()},
            {k: f(t) for k, t in self.buffers.items()},
            {slot: {k: f(t) for k, t in held.items()} for slot, held in self.slots.items()},
            {k: f(t) for k, t in self.memory.items()},
            self.generator.clone(),
            f(self.skipped),
            self.batch,
            self.begun,
            {k: f(t) for k, t in self.window.items()},
            self.seen,
        )

    def clone(self) -> "State":
        """Return a copy that shares nothing."""
        return self.map(torch.clone)


def under(path: str, parts: tuple[str, ...]) -> bool:
    """Whether a state path is one of the parts or lies under one; the part "" holds all."""
    return any(part == "" or path == part or path.startswith(f"{part}.") for part in parts)
