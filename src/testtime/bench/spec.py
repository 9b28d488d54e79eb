"""What a row is asked for, in words that another process understands."""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from testtime._suggest import suggest
from testtime.adaptation.core import Method
from testtime.adaptation.methods import METHODS, find
from testtime.shifts import CORRUPTIONS, streams
from testtime.shifts.corruptions import STANDARD
from testtime.shifts.data import Data
from testtime.shifts.shift import CLEAN, parse_corruptions
from testtime.shifts.streams import Stream

# Each shift starts from the source model ("online"), or the model never learns that one has ended.
# "online" is a row for each shift, the others are a row for the whole sequence.
PROTOCOLS: dict[str, Callable[..., Stream]] = {
    "online": lambda data, shifts, **options: streams.single(data, *shifts, **options),
    "continual": streams.continual,
    "mixed": streams.mixed,
    "repeating": streams.repeating,
}


@dataclass(frozen=True)
class Spec:
    """One method on one model over one stream: with model and data at hand, all of a row.

    Args:
        model: a specification that :func:`testtime.models.load.load_model` knows, or a name.
        data: one that :func:`testtime.bench.data.load_data` knows, or a name.
        method: such as ``tent:imagenet:steps=2``; see :func:`parse_method`.
        shifts: what the stream goes through, in turn.
        protocol: a key of ``PROTOCOLS``.
        order: of the samples: ``natural``, ``shuffled``, ``class``, ``dirichlet:0.1``.
        batch_size: samples a batch.
        window: single images are gathered in a window of so many; 0: batches.
        images: so many of the data, from the first; none: all.
        seed: of the stream, of corruptions and of the method.
        source: data that are handed to methods that need source data; empty for none.
        device: such as ``cpu`` or ``cuda``.
    """

    model: str
    data: str
    method: str = "source"
    shifts: tuple[str, ...] = (CLEAN,)
    protocol: str = "online"
    order: str = "natural"
    batch_size: int = 64
    window: int = 0
    images: int | None = None
    seed: int = 0
    source: str = ""
    device: str = "cpu"

    def json(self) -> dict[str, Any]:
        """Return the specification as JSON values."""
        return {**asdict(self), "shifts": list(self.shifts)}

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            ValueError: a method, shift, protocol or number is not possible.
        """
        parse_method(self.method)
        for shift in self.shifts:
            parse_corruptions(shift)
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"There is no protocol '{self.protocol}' (known: {', '.join(PROTOCOLS)})."
                f"{suggest(self.protocol, PROTOCOLS)}"
            )
        if self.protocol == "online" and len(self.shifts) != 1:
            raise ValueError(
                f"The protocol online takes one shift a row, found {list(self.shifts)}. Make a "
                "row for each, or name the protocol continual."
            )
        for what in ("batch_size", "images"):
            number = getattr(self, what)
            if number is not None and number < 1:
                raise ValueError(f"{what}={number}: it must be at least 1.")
        if self.window and self.batch_size != 1:
            raise ValueError(
                f"window={self.window} gathers single images, but batch_size={self.batch_size}. "
                "Set it to 1."
            )

    def stream(self, data: Data | Mapping[str, Data]) -> Stream:
        """Return the stream of the row over data, or over data for each shift."""
        return PROTOCOLS[self.protocol](
            data,
            self.shifts,
            order=self.order,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
        )


def grid(
    models: Iterable[str],
    data: str,
    methods: Iterable[str],
    shifts: Sequence[str] = (CLEAN,),
    protocols: Iterable[str] = ("online",),
    batch_sizes: Iterable[int] = (64,),
    seeds: Iterable[int] = (0,),
    **fixed: Any,
) -> list[Spec]:
    """Return a row for every combination, those of one stream next to one another.

    Args:
        models: specifications or names.
        data: likewise, one.
        methods: such as ``tent:lr=1e-4``.
        shifts: for ``online`` a row each, else the sequence; ``standard:5`` are the 15 standard
            corruptions, ``all:5`` all 19, see :func:`expand`.
        protocols: keys of ``PROTOCOLS``.
        batch_sizes: samples a batch.
        seeds: of everything random.
        fixed: further fields of :class:`Spec`.

    Raises:
        ValueError: one of them is not possible.
    """
    methods, shifts = list(methods), expand(shifts)
    rows = [
        Spec(model, data, method, part, protocol, batch_size=size, seed=seed, **fixed)
        for model in models
        for protocol in protocols
        for size in batch_sizes
        for seed in seeds
        for part in ([(s,) for s in shifts] if protocol == "online" else [tuple(shifts)])
        for method in methods
    ]
    for row in rows:
        row.check()
    return list(dict.fromkeys(rows))


def expand(shifts: Iterable[str]) -> list[str]:
    """Return the shifts with ``standard:5`` as the 15 and ``all:5`` as all 19 corruptions.

    ``standard`` and ``all`` alone are those at every severity, and ``clean`` first.
    """
    groups = {"standard": list(STANDARD), "all": list(CORRUPTIONS)}
    found: list[str] = []
    for shift in shifts:
        group, colon, severity = shift.partition(":")
        if group not in groups:
            found.append(shift)
        elif colon:
            found += [f"{name}:{severity}" for name in groups[group]]
        else:
            found += [CLEAN, *(f"{name}:{s}" for name in groups[group] for s in range(1, 6))]
    return list(dict.fromkeys(found))


def parse_method(spec: str) -> Method:
    """Return the method of a specification: its name, then presets and settings after colons.

    >>> parse_method("tent:imagenet:lr=0.001:steps=2")
    Tent(optimizer=SGD(lr=0.001, momentum=0.9, nesterov=False, weight_decay=0.0), steps=2)

    A setting is a field of the method, or one of its optimiser's (``lr``, ``momentum``).

    Raises:
        ValueError: there is no such method, preset or setting, or it takes no such value.
    """
    name, *parts = spec.split(":")
    kind = type(find(name))
    presets = [part for part in parts if "=" not in part]
    method = kind.preset(*presets)
    own = {f.name for f in fields(method)} - {"optimizer"}
    rule = method.optimizer
    theirs = {f.name for f in fields(rule)} if rule else set()
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals:
            continue
        if key not in own | theirs:
            raise ValueError(
                f"{kind.__name__} has no setting '{key}' (known: "
                f"{', '.join(sorted(own | theirs))}).{suggest(key, own | theirs)}"
            )
        value = _value(text)
        try:
            if key in own:
                method = replace(method, **{key: value})
            else:
                assert method.optimizer is not None
                method = replace(method, optimizer=replace(method.optimizer, **{key: value}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{spec}: {error}") from error
    return method


def known_methods() -> list[str]:
    """Return the names of all methods."""
    return list(METHODS)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
