"""TTT-Linear and TTT-MLP: operators fed at once and in pieces, layers, blocks, models, decoding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.parity.errors import Comparison
from tests.parity.recording import Recording, Unreplayable
from tests.parity.systems import Replay
from testtime.ops.ttt.run import Output
from testtime.ops.ttt.state import State

Operator = Callable[..., Output]
INPUTS = ("q", "k", "v", "lr", "token_coef", "ln_weight", "ln_bias")


def kinds(operator: Operator, names: Sequence[str]) -> dict[str, Replay]:
    """Return the replays of a system.

    Args:
        operator: ``ttt_linear`` or ``ttt_mlp``, as the authors have it.
        names: what recordings call its parameters.
    """

    def replay_operator(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        _note_sizes(recording)
        leaves = {n: recording[f"in/{n}"].requires_grad_() for n in (*INPUTS, *names)}
        start = [leaves[name] for name in names]
        _require_chunk(comparison, recording, leaves["token_coef"])
        found = operator(
            *(leaves[name] for name in INPUTS), start, eps=recording.config.get("ln_eps")
        )
        read = zip(names, found.state.read(), strict=True)
        outputs = {"o": found.o} | {f"{name}_last": tensor for name, tensor in read}
        for name, tensor in outputs.items():
            comparison.check(f"out/{name}", tensor)
        given = {name: recording[f"grad_out/{name}"] for name in recording.under("grad_out")}
        torch.autograd.backward([outputs[n] for n in given], list(given.values()))
        for name, leaf in leaves.items():
            comparison.check(f"grad/{name}", _gradient(leaf))
        return comparison

    def replay_steps(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        _note_sizes(recording)
        coefficient, weight, bias = (recording[f"init/{n}"] for n in INPUTS[4:])
        _require_chunk(comparison, recording, coefficient)
        state: State | list[Tensor] = [recording[f"init/{name}"] for name in names]
        for step in recording.steps():
            tokens = [recording[f"in/{step}/{name}"] for name in INPUTS[:4]]
            found = operator(
                *(*tokens, coefficient, weight, bias, state), eps=recording.config.get("ln_eps")
            )
            state = found.state
            comparison.check(f"out/{step}/o", found.o)
            _check_state(comparison, recording, f"extra/{step}/", names, state)
        return comparison

    return {"operator": replay_operator, "steps": replay_steps}


def _check_state(
    comparison: Comparison, recording: Recording, prefix: str, names: Sequence[str], state: State
) -> None:
    """Compare the parameters at the chunk's start and the sums, where they were recorded."""
    for name, start, total in zip(names, state.now.start, state.sums(), strict=True):
        if f"{prefix}{name}_states" in recording:
            comparison.check(f"{prefix}{name}_states", start)
            comparison.check(f"{prefix}{name}_grad", total)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _require_chunk(comparison: Comparison, recording: Recording, coefficient: Tensor) -> None:
    comparison.require("config.chunk", recording.config.get("chunk") == len(coefficient))


# What the shapes of the tensors say, or what made the random numbers.
SIZES = ("heads", "head_dim", "batch", "length", "seed", "inner_hidden", "per_sequence_state")


def _note_sizes(recording: Recording) -> None:
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    for name in (*SIZES, "pieces"):
        recording.config.get(name, None)
