"""One method on one model, put to the test: builds, calls, compares; what the laws are made of."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime.adaptation.adapted import Adapted, adapt
from testtime.adaptation.calls import Call
from testtime.adaptation.core import Method
from testtime.adaptation.methods import find
from testtime.adaptation.state import State

# A batch as Adapted.fit() takes it: an input, a tuple that starts with it, or named arguments.
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


class LawBroken(AssertionError):  # noqa: N818 - it says what happened, as StopIteration does
    """A law does not hold: the message says what was expected and what was found."""


class Trial:
    """A method, a model and batches, and what was refused on the way.

    Every ``Adapted`` gets a copy of the method, as a new process would: what a method hides on
    itself must not pass for state.
    """

    def __init__(
        self,
        method: Method | str,
        model: nn.Module,
        batches: Iterable[Batch],
        options: Mapping[str, Any],
    ) -> None:
        self.method, self.model, self.options = find(method), model, dict(options)
        batches = list(batches)
        if self.method.needs_source:
            self.options.setdefault("source", batches)
        self.calls = [Call.of(batch) for batch in batches]
        self.refusals: list[str] = []
        self.fitting = True
        rows = [call.x.shape[0] for call in self.calls]
        if len(rows) < 2 or min(rows) < 2:
            raise ValueError(
                f"The laws need at least two batches of at least two rows, but batches of {rows} "
                "rows were given. Pass more."
            )

    def adapt(self, model: nn.Module | None = None, **options: Any) -> Adapted:
        """Return a new adapted model over the user's own, or over another."""
        method = options.pop("method", None) or copy.deepcopy(self.method)
        return adapt(self.model if model is None else model, method, **{**self.options, **options})

    def run(
        self, adapted: Adapted, calls: Sequence[Call] | None = None, f: str = "forward"
    ) -> list[Tensor]:
        """Return copies of the logits of these calls (none: of all), one after another."""
        chosen = self.calls if calls is None else calls
        return [logits(adapted, call, f).clone() for call in chosen]

    def fits(self) -> bool:
        """Whether the model can be adapted and takes a first batch; a refusal is kept."""
        self.fitting = self.tries("It", lambda: logits(self.adapt(), self.calls[0]))
        return self.fitting

    def tries(self, what: str, f: Callable[[], Any]) -> bool:
        """Run what may be refused with a sentence; keep that, and return whether it went through.

        A :class:`LawBroken` and errors of any other kind pass.
        """
        message = refusal(f)
        if message and message not in (kept.partition(": ")[2] for kept in self.refusals):
            self.refusals.append(f"{what} is refused: {message}")
        return not message

    def must_refuse(self, what: str, adapted: Adapted, f: Callable[[], Any]) -> None:
        """Expect a refusal that changes nothing."""
        before = adapted.snapshot()
        expect(bool(refusal(f)), f"{what} should be refused with a sentence, but was taken")
        changed = differing(before, adapted.snapshot())
        expect(not changed, f"{what} was refused, but changed {some(changed)} before")

    @property
    def tolerance(self) -> float:
        """Relative error that kernels make by running another batch size or layout."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if dtypes & {torch.bfloat16, torch.float16}:
            return 0.05
        return 1e-10 if dtypes == {torch.float64} else 1e-5


def logits(adapted: Adapted, call: Call, f: str = "forward") -> Tensor:
    """Return the logits of a call, or of ``predict`` or ``source``."""
    output = (adapted if f == "forward" else getattr(adapted, f))(*call.args, **call.kwargs)
    return output if isinstance(output, Tensor) else adapted.learner.logits_of(output)


def expect(holds: bool, sentence: str) -> None:
    """Raise :class:`LawBroken` with the sentence unless it holds."""
    if not holds:
        raise LawBroken(f"{sentence}.")


def refusal(f: Callable[[], Any]) -> str:
    """Return the sentence with which a call was refused; empty if it went through."""
    try:
        f()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bits(one), _bits(other))


def differing(one: State, other: State, *but: str) -> list[str]:
    """Return the paths at which two states differ, those under ``but`` left out."""
    a, b = one.tensors(), other.tensors()
    paths = [p for p in {**a, **b} if p not in a or p not in b or not same(a[p], b[p])]
    paths += ["batch"] if one.batch != other.batch else []
    return [p for p in paths if not any(p == part or p.startswith(f"{part}.") for part in but)]


def expect_same(ones: Sequence[Tensor], others: Sequence[Tensor], what: str) -> None:
    """Expect answers that are equal to the bit on a CPU, or within 1e-5 on other devices."""
    if ones[0].device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        expect_close(ones, others, what, 1e-5)
        return
    for batch, (one, other) in enumerate(zip(ones, others, strict=True)):
        expect(
            same(one, other),
            f"{what} should be the same to the bit, but batch {batch} differs by "
            f"{float((one.float() - other.float()).abs().max()):.3g}",
        )


def expect_close(
    ones: Sequence[Tensor], others: Sequence[Tensor], what: str, tolerance: float
) -> None:
    """Expect answers that differ by rounding only."""
    for batch, (one, other) in enumerate(zip(ones, others, strict=True)):
        error = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        expect(
            error <= tolerance,
            f"{what} should be the same within {tolerance:g}, but batch {batch} is off by "
            f"{error:.3g} of the largest logit",
        )


def reachable(*roots: Any) -> dict[int, tuple[str, Tensor]]:
    """Return every tensor that can be reached through attributes and containers, by its id."""
    found: dict[int, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    queue = [("", root) for root in roots]
    while queue:
        path, value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = (path.lstrip("."), value)
        queue += [(f"{path}.{key}", part) for key, part in _parts(value)]
    return found


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple | set):
        yield from enumerate(value)
    elif callable(value) and hasattr(value, "__closure__"):
        yield from enumerate(cell.cell_contents for cell in value.__closure__ or ())
    ours = type(value).__module__.startswith("testtime.") or isinstance(value, nn.Module | Method)
    if ours or is_dataclass(value):
        yield from getattr(value, "__dict__", {}).items()


def portrait(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that adapting must leave alone: tensors, flags, hooks, gradients."""
    picture: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            path = f"{name}.{key}".lstrip(".")
            # Parameters, buffers, modules and hooks sit in dictionaries of the module.
            for part, held in value.items() if isinstance(value, dict) else [("", value)]:
                plain = isinstance(held, bool | int | float | str)
                picture[f"{path}.{part}".rstrip(".")] = held if plain else id(held)
    for path, tensor in reachable(model).values():
        picture[f"tensor {path}"] = Picture(tensor)
    return picture


class Picture:
    """What a tensor is, its values and gradient included; equal to another only to the bit."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.detach().clone()
        self._grad = None if not tensor.is_leaf or tensor.grad is None else tensor.grad.clone()
        self._rest = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride())

    def __eq__(self, other: object) -> bool:
        """Compare everything, values to the bit."""
        if not isinstance(other, Picture) or self._rest != other._rest:
            return False
        grads = (self._grad, other._grad)
        if grads[0] is None or grads[1] is None:
            return grads[0] is grads[1] and same(self._values, other._values)
        return same(grads[0], grads[1]) and same(self._values, other._values)

    __hash__ = None  # type: ignore[assignment]


def randomness() -> list[Any]:
    """Return the states of the global random generators."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [random.getstate(), *(state.tolist() for state in (torch.get_rng_state(), *devices))]


def switches() -> dict[str, Any]:
    """Return torch's modes that belong to the caller."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic cudnn": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }


def some(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
