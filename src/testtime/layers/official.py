"""Parameters by the names and in the layout of the authors' JAX code, both ways."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


class Official(NamedTuple):
    """A parameter's own name, and its layout there and back."""

    own: str
    out: View
    into: View


@runtime_checkable
class Named(Protocol):
    """A module that knows the official names of its parameters."""

    def official(self) -> dict[str, Official]:
        """Return them by official name."""
        ...


def to_official(module: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return parameters by official name, as views where the layout allows it.

    Args:
        module: a layer or a model of this library that has official names.
        values: by the module's own names; by default its parameters. Gradients convert likewise.

    Raises:
        TypeError: the module has no official names.
    """
    own = dict(module.named_parameters()) if values is None else values
    return {name: view.out(own[view.own]) for name, view in _names(module).items()}


@torch.no_grad()
def from_official(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy official parameters into the module.

    Raises:
        TypeError: the module has no official names.
        ValueError: names or shapes differ; nothing has been changed.
    """
    names, own = _names(module), dict(module.named_parameters())
    missing, unknown = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    if missing or unknown:
        raise ValueError(
            f"The official parameters do not fit: missing {sorted(missing)}, unknown "
            f"{sorted(unknown)}. Build the module as those were."
        )
    converted = {}
    for name, view in names.items():
        target = view.out(own[view.own])
        if target.shape != tensors[name].shape:
            raise ValueError(
                f"The official {name} is {[*tensors[name].shape]} and the module's "
                f"{[*target.shape]}. Build the module as that was."
            )
        converted[view.own] = view.into(tensors[name])
    for name, tensor in converted.items():
        own[name].copy_(tensor)


def _names(module: nn.Module) -> dict[str, Official]:
    if not isinstance(module, Named):
        raise TypeError(f"{type(module).__name__} has no official parameter names.")
    return module.official()


def same(own: str) -> Official:
    """Return a parameter whose layout is the same."""
    return Official(own, lambda t: t, lambda t: t)


def row(own: str) -> Official:
    """Return a vector [d] that is [1, d] there."""
    return Official(own, lambda t: t[None], lambda t: t[0])


def transposed(own: str) -> Official:
    """Return a matrix [out, in] that is [in, out] there."""
    return Official(own, lambda t: t.mT, lambda t: t.mT)


def split(own: str, heads: int) -> Official:
    """Return a bias [H p] that is [H, p] there."""
    return Official(own, lambda t: t.view(heads, -1), lambda t: t.flatten())


def into_heads(own: str, heads: int) -> Official:
    """Return a matrix [H p, d] that is [H, d, p] there."""
    return Official(
        own,
        lambda t: t.view(heads, -1, t.shape[1]).mT,
        lambda t: t.mT.flatten(0, 1),
    )


def out_of_heads(own: str, heads: int) -> Official:
    """Return a matrix [d, H p] that is [H, p, d] there."""
    return Official(
        own,
        lambda t: t.view(t.shape[0], heads, -1).permute(1, 2, 0),
        lambda t: t.permute(2, 0, 1).flatten(1),
    )


def within(prefix: str, own: str, names: Mapping[str, Official]) -> dict[str, Official]:
    """Return the names of a part under its own path and its official one."""
    return {f"{prefix}/{k}": v._replace(own=f"{own}.{v.own}") for k, v in names.items()}


def into_width(own: str, heads: int) -> Official:
    """Return a matrix [H p, d] that is [d, H, p] there."""
    return Official(
        own,
        lambda t: t.mT.reshape(t.shape[1], heads, -1),
        lambda t: t.flatten(1).mT,
    )
