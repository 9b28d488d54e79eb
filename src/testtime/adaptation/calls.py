"""What goes into a model and what comes out of it: the call's tensors, and where the logits are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

Where = str | int | Callable[[Any], Tensor] | None
Output = tuple[Any, Tensor]  # what a model returned, and the logits in it


@dataclass(frozen=True)
class Call:
    """The arguments of one call; ``x``, the first tensor among them, is what methods work on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: Any) -> "Call":
        """Return the call of a batch as loaders give it.

        Args:
            batch: an input, named arguments, or a sequence whose first element is the input; what
                follows, such as labels, is not looked at.
        """
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        return cls((batch if isinstance(batch, Tensor) else batch[0],), {})

    @property
    def _place(self) -> int | str:
        if self.args:
            return 0
        named = (key for key, value in self.kwargs.items() if isinstance(value, Tensor))
        key = next(named, None)
        if key is None:
            raise TypeError(
                "The call has no input: no positional argument and no tensor among "
                f"{list(self.kwargs)}. Call the adapted model as you call your own."
            )
        return key

    @property
    def x(self) -> Tensor:
        """The input: the first positional argument, or else the first tensor given by name."""
        place = self._place
        value = self.args[0] if isinstance(place, int) else self.kwargs[place]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The first argument must be a tensor, but {type(value).__name__} was given. "
                "Pass one batch, [B, ...]; a data loader goes to fit()."
            )
        return value

    def tensors(self) -> dict[int | str, Tensor]:
        """Return the arguments that are tensors."""
        every: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return {k: v for k, v in every if isinstance(v, Tensor)}

    def batched(self) -> dict[int | str, Tensor]:
        """Return the arguments with a row for every row of ``x``, ``x`` among them."""
        batch = self.x.shape[0]
        return {k: t for k, t in self.tensors().items() if t.dim() > 0 and t.shape[0] == batch}

    def put(self, values: dict[int | str, Tensor]) -> "Call":
        """Return the call with some arguments replaced."""
        args = tuple(values.get(k, v) for k, v in enumerate(self.args))
        return Call(args, {k: values.get(k, v) for k, v in self.kwargs.items()})

    def at(self, x: Tensor) -> "Call":
        """Return the same call with another input."""
        return self.put({self._place: x})

    def rows(self, index: slice) -> "Call":
        """Return the call for some rows of the batch."""
        return self.put({k: v[index] for k, v in self.batched().items()})

    def companions(self) -> list[str]:
        """Return which other arguments have a row for every row of ``x``."""
        return [str(k) for k in self.batched() if k != self._place]


def find_logits(output: Any, where: Where) -> Tensor:
    """Return the logits in a model's output.

    Args:
        output: a tensor, a tuple, a dict, or a Hugging Face output.
        where: a key, an index or a function; none: the tensor itself, ``.logits``, ``["logits"]``,
            or the only tensor.

    Raises:
        TypeError: they cannot be found; the message says what was.
    """
    try:
        found = _look(output, where)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise TypeError(
            f"There are no logits at {where!r} in the model's output, {describe(output)}. "
            "Pass logits= with a key, an index or a function that returns them."
        ) from error
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise TypeError(
            "The logits must be a floating tensor [B, C] or [B, C, ...], but the model's output "
            f"is {describe(output)}. Pass logits= with a key, an index or a function for them."
        )
    return found


def _look(output: Any, where: Where) -> Any:
    if callable(where):
        return where(output)
    if where is not None:
        named = isinstance(where, str) and not isinstance(output, Tensor | Mapping)
        return getattr(output, str(where)) if named else output[where]
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    values = list(output.values()) if isinstance(output, Mapping) else output
    tensors = [v for v in values if isinstance(v, Tensor)] if _is_sequence(values) else []
    return tensors[0] if len(tensors) == 1 else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple)


def tree(f: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply ``f`` to the tensors of equally built containers, and build the same kind again."""
    if isinstance(first, Tensor):
        return f(first, *others)
    if isinstance(first, Mapping):
        items = {k: tree(f, v, *(o[k] for o in others)) for k, v in first.items()}
        return type(first)(**items) if is_dataclass(first) else type(first)(items)  # type: ignore[call-arg]
    if _is_sequence(first):
        parts = [tree(f, *column) for column in zip(first, *others, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if is_dataclass(first) and not isinstance(first, type):
        named = [field.name for field in fields(first) if field.init]
        return replace(
            first,
            **{k: tree(f, getattr(first, k), *(getattr(o, k) for o in others)) for k in named},
        )
    return first


def put_logits(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return the output with ``new`` in the place of the tensor ``old``, same kind of container.

    Where ``old`` is not itself in the output (a function computed it), ``new`` alone is returned.
    """
    hits: list[bool] = []

    def swap(tensor: Tensor) -> Tensor:
        if tensor is old:
            hits.append(True)
            return new
        return tensor.detach()

    swapped = tree(swap, output)
    return swapped if hits else new


def chosen(outputs: list[Output], answer: Tensor) -> Output | None:
    """Return the output that an answer came in; for a computed answer, that of the first forward.

    Args:
        outputs: of the forwards on the whole batch, in order, where they are no tensors.
        answer: the method's logits.
    """
    first = outputs[0] if outputs else None
    return next((output for output in outputs if output[1] is answer), first)


def row_of(output: Output, row: int) -> Output:
    """Return one row of an output, and the logits in it."""
    raw, logits = output
    rows, found = logits.shape[0], logits[row : row + 1]

    def cut(tensor: Tensor) -> Tensor:
        if tensor is logits:
            return found
        return tensor[row : row + 1] if tensor.dim() and tensor.shape[0] == rows else tensor

    return tree(cut, raw), found


def describe(output: Any) -> str:
    """Return what an output is, in words, for messages."""
    if isinstance(output, Tensor):
        return f"a {str(output.dtype).removeprefix('torch.')} tensor {list(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(repr, output))}"
    if _is_sequence(output):
        return f"{type(output).__name__} of {', '.join(map(describe, output)) or 'nothing'}"
    return type(output).__name__
