"""What happens to one batch: methods, the network they see, and the state that changes."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from testtime._suggest import suggest
from testtime.adaptation.calls import Call, describe, find_logits
from testtime.adaptation.optim import SGD, Adam, Tensors

if TYPE_CHECKING:
    from testtime.adaptation.learner import Learner

Draw = Callable[[str, Callable[[torch.Generator], Tensor]], Tensor]


@dataclass
class Objective:
    """What a method makes of one batch.

    Args:
        loss: scalar to descend; none: nothing descends.
        logits: the answer, from before the update; none: the batch is predicted after the steps.
        memory: entries of the memory that change.
        when: boolean scalar on the device: may weights and optimiser slots move? None: they may.
        notes: quantities to show, such as masks.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: Tensors = field(default_factory=dict)
    when: Tensor | None = None
    notes: Tensors = field(default_factory=dict)


@dataclass
class Settled:
    """What a method writes after the optimiser's step.

    Args:
        values: weights and buffers to set.
        memory: entries of the memory that change.
        notes: quantities to show.
    """

    values: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    notes: Tensors = field(default_factory=dict)


class Net:
    """An immutable view of the network under given weights; its buffers are scratch of this step.

    Calling it runs the model and returns logits ``[B, C]`` or ``[B, C, ...]``; the other arguments
    of the user's call are bound. Buffers that the forward moves stay moved for this step.
    """

    def __init__(
        self,
        learner: "Learner",
        weights: Tensors,
        buffers: Tensors,
        mode: tuple[str, ...] = (),
    ) -> None:
        self._learner, self.weights, self.buffers, self._mode = learner, weights, buffers, mode

    @property
    def start(self) -> Tensors:
        """Weights and buffers as adaptation began."""
        return {**self._learner.start.weights, **self._learner.start.buffers}

    @property
    def module(self) -> nn.Module:
        """The network's structure; its values are in ``weights`` and ``buffers``."""
        return self._learner.module

    @property
    def constants(self) -> Tensors:
        """What the method's ``prepare`` computed from source data."""
        return self._learner.constants

    @property
    def batch(self) -> int:
        """Batches since the start or the last reset, a host integer."""
        return self._learner.work.batch

    @property
    def inner(self) -> int:
        """The inner step on this batch, from 0, a host integer."""
        return self._learner.inner

    @property
    def classes(self) -> int:
        """The number of classes; before the first answer the source is asked, with one row."""
        learner = self._learner
        if not learner.classes and learner.call:
            row = learner.source_output(learner.call.rows(slice(0, 1)))
            learner.classes = learner.logits_of(row).shape[1]
        return learner.classes

    @property
    def couples(self) -> bool:
        """Whether a row's answer depends on the rows beside it, measured on the first two rows."""
        return bool(self._learner.couples)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of the model for ``x``."""
        learner = self._learner
        call = learner.call or Call((x,), {})
        if x.shape[0] != call.x.shape[0] and call.companions():
            raise ValueError(
                f"{learner.method.name} runs the model on {x.shape[0]} rows where the call has "
                f"{call.x.shape[0]}, but the call's arguments {call.companions()} have a row each. "
                "Use a method that keeps the rows, or bind such arguments in a wrapper."
            )
        given = learner.spared(call.at(x))
        output = self._run(x.shape[0], lambda module: module(*given.args, **given.kwargs))
        if learner.overwrites is None and not learner.many:  # under vmap nothing shows
            learner.overwrites = any(t._version > 0 for t in given.tensors().values())
        logits = find_logits(output, learner.where)
        if learner.classes not in (0, logits.shape[1]):
            raise ValueError(
                f"The logits had {learner.classes} classes along dimension 1 and have "
                f"{logits.shape[1]} now ({describe(logits)}). If classes lie along another "
                "dimension, pass logits= with a function that moves them there."
            )
        learner.classes = logits.shape[1]
        if output is not logits and x.shape[0] == call.x.shape[0]:
            learner.outputs.append((output, logits))
        return logits

    def images(self, x: Tensor) -> Tensor:
        """Return the images in [0, 1] that gave ``x``, for augmentations; ``inputs`` goes back.

        Both do nothing where no normalisation outside the model is known, from the user's ``mean``
        and ``std`` or from the model itself.
        """
        known = self._learner.preprocessing
        return x if known is None else known.undo(x)

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the model takes for images ``[..., C, H, W]`` in [0, 1]."""
        known = self._learner.preprocessing
        return images if known is None else known.apply(images)

    def run(self, f: Callable[..., Any], *args: Any) -> Any:
        """Return ``f(module, *args)`` under these weights: features, hooks, heads."""
        first = next((arg for arg in args if isinstance(arg, Tensor) and arg.dim()), None)
        return self._run(1 if first is None else first.shape[0], f, *args)

    def _run(self, rows: int, f: Callable[..., Any], *args: Any) -> Any:
        learner = self._learner
        cast = {k: w.to(learner.dtypes[k]) for k, w in self.weights.items()}
        values = {f"module.{k}": v for k, v in (cast | self.buffers).items()}
        learner.set_mode(self._mode)
        with learner.own_randomness(self._mode), _told_plainly(learner):
            result = functional_call(learner.runner, values, (f, args), tie_weights=learner.tied)
        # A buffer that the forward replaced, rather than wrote to, comes back in the dictionary.
        self.buffers.update({k: values[f"module.{k}"] for k in self.buffers})
        rows *= max(learner.many, 1)
        learner.forwards += rows
        if learner.many or any(weight.requires_grad for weight in self.weights.values()):
            learner.graded += rows
        return result

    def at(self, values: Tensors) -> "Net":
        """Return the network under other weights, and under other buffers where some are given."""
        buffers = {k: v.clone() for k, v in values.items() if k in self.buffers}
        weights = {k: v for k, v in values.items() if k not in self.buffers}
        return Net(
            self._learner,
            self.weights | weights,
            self.buffers | buffers if buffers else self.buffers,
            self._mode,
        )

    def train(self, names: Iterable[str] | None = None) -> "Net":
        """Return the network with these modules in train mode and all others in eval mode.

        Without an argument the whole network is in train mode; with no names, nothing is.
        """
        return Net(self._learner, self.weights, self.buffers, ("",) if names is None else (*names,))

    def eval(self) -> "Net":
        """Return the network in eval mode."""
        return Net(self._learner, self.weights, self.buffers)

    def gradient(self, f: Callable[["Net"], tuple[Tensor, Any]]) -> tuple[Tensors, Any]:
        """Return the gradient of ``f(net) -> loss, aux`` by the weights, and ``aux``."""
        learner = self._learner
        graded = learner.graded
        if learner.many:

            def loss(weights: Tensors) -> tuple[Tensor, Any]:
                return f(Net(learner, weights, self.buffers, self._mode))

            # Under vmap the weights belong to the outer gradient too: without detaching, the
            # result would be differentiated a second time there, and differ from that in place.
            kept = len(learner.outputs)
            grads, aux = grad(loss, has_aux=True)({k: w.detach() for k, w in self.weights.items()})
            del learner.outputs[kept:]  # torch's wrappers in them are dead outside of grad()
            learner.backwards += learner.graded - graded
            learner.graded = graded  # these are not of the loss around
            return grads, aux
        leaves = {k: w.detach().requires_grad_() for k, w in self.weights.items()}
        loss_value, aux = f(Net(learner, leaves, self.buffers, self._mode))
        values = torch.autograd.grad(
            loss_value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        learner.backwards += learner.graded - graded
        learner.graded = graded
        return dict(zip(leaves, values, strict=True)), aux


@dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """A way to adapt: pure functions of a network and a batch, and hyper-parameters as fields.

    A method of your own overrides ``select`` and ``loss``, most need nothing else. ``loss`` and
    ``settle`` must be pure: no optimiser, no state kept on ``self``, no device named. The same
    lines then run in place, for many samples at once, and inside a captured graph.

    Args:
        optimizer: how weights descend; none for a method without gradients.
        steps: inner steps on every batch.
        survives: paths of the state that outlive a reset, such as ``"slots"``.
        reset_every: reset by itself after so many batches.
    """

    optimizer: SGD | Adam | None = None
    steps: int = 1
    survives: tuple[str, ...] = ()
    reset_every: int | None = None

    name: ClassVar[str] = "method"
    adapts: ClassVar[str] = "nothing"
    needs: ClassVar[str] = ""  # beyond source data and a batch size, in words
    tested: ClassVar[str] = ""  # the streams on which its authors showed it, in words
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the method after its class."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        # Before the dataclass decorator makes one that spells every default.
        cls.__repr__ = Method.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return the method with the fields that are not as the class has them."""
        shown = [
            f"{f.name}={_spell(getattr(self, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def configuration(self) -> dict[str, str]:
        """Return every hyper-parameter by name, spelled, for ledgers and saved states."""
        return {f.name: _spell(getattr(self, f.name)) for f in fields(self)}

    def __post_init__(self) -> None:
        """Check the fields that every method has."""
        if self.optimizer is not None and not isinstance(self.optimizer, SGD | Adam):
            raise TypeError(
                f"{type(self).__name__}(optimizer={self.optimizer!r}): it must be an update rule "
                "of testtime, such as tt.SGD(lr=1e-3) or tt.Adam(lr=1e-3)."
            )
        for what in ("steps", "reset_every"):
            number = getattr(self, what)
            if what == "reset_every" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(
                    f"{type(self).__name__}({what}={number}): it must be a whole number of at "
                    "least 1."
                )

    @classmethod
    def preset(cls, *names: str, **changes: Any) -> Self:
        """Return the method as published: ``official`` is the authors' code to the last quirk.

        Args:
            names: presets, such as ``"official", "imagenet"``; a later one goes over an earlier.
            changes: fields, over all of them.

        Raises:
            ValueError: there is no preset of that name.
        """
        values: dict[str, Any] = {}
        for name in names:
            if name not in cls.presets:
                known = ", ".join(cls.presets) or "none"
                raise ValueError(
                    f"{cls.__name__} has no preset '{name}' (known: {known})."
                    f"{suggest(name, cls.presets)}"
                )
            values |= cls.presets[name]
        return cls(**values | changes)

    # Capabilities as data. A method overrides them by plain attributes of its class, or, where they
    # hang on a hyper-parameter, by properties.

    @property
    def answers(self) -> Literal["before", "after"]:
        """Whether an answer comes from before or from after the update by its own batch."""
        return "before"

    @property
    def needs_source(self) -> bool:
        """Whether ``prepare`` needs source data."""
        return False

    @property
    def smallest_batch(self) -> int:
        """The fewest rows that the method works on."""
        return 1

    @property
    def cost(self) -> tuple[int, int]:
        """How often each image goes forward and backward, at most, in one inner step."""
        return (1, 1)

    @property
    def looks(self) -> int:
        """How often a batch's values decide on the host what is computed."""
        return 0

    def configure(self, module: nn.Module) -> nn.Module:
        """Change the private copy (statistics, heads) before anything is selected."""
        return module

    def select(self, module: nn.Module) -> list[str]:
        """Return the names of the parameters that adapt, and of the buffers that then move.

        Buffers are named for reports: those that a forward moves are kept either way.
        """
        return []

    def prepare(self, learner: "Learner", batches: Iterable[Tensor]) -> Tensors:
        """Return constants computed once from source data; weights stay as they are.

        While an input of ``batches`` is at hand, it is what the learner's ``live`` network and its
        ``gradient`` work on. Buffers that forwards move stay moved, and belong to the start.
        """
        return {}

    def begin(self, net: Net, x: Tensor, draw: Draw) -> Tensors:
        """Return the memory as it is before the first batch; tensors of declared capacity.

        ``x`` is there for its shape, dtype and device, ``net.classes`` is known; a memory made from
        the values of ``x`` would carry the first batch into every later episode.
        """
        return {}

    def loss(self, net: Net, x: Tensor, memory: Tensors, draw: Draw) -> Objective:
        """Return what this batch asks for; pure."""
        return Objective(logits=self.predict(net, x, memory))

    def settle(self, net: Net, memory: Tensors, draw: Draw) -> Settled:
        """Return what to write after the optimiser's step; pure."""
        return Settled()

    def answering(self, net: Net, memory: Tensors) -> Net:
        """Return the network that answers: in its modes, or with a teacher's weights; pure."""
        return net

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        """Return logits for ``x`` without adapting; pure. Override if no network answers alone."""
        return self.answering(net, memory)(x)

    def step(self, learner: "Learner", x: Tensor) -> Tensor:
        """Adapt to one batch and return its logits; own steps are for decisions on the host."""
        return learner.default_step(x)


@contextlib.contextmanager
def _told_plainly(learner: "Learner") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not learner.call or not str(error).startswith("Expected more than 1 "):
            raise
        raise ValueError(
            f"{type(learner.method).__name__} normalises with the statistics of the batch, but a "
            f"layer has one value a channel, for the input is {describe(learner.call.x)}. Use "
            "larger batches, or a method that keeps the source's statistics."
        ) from error


ADVICE = " Use a method that fits; tt.doctor(model) lists them."


def nothing_found(method: Method, module: nn.Module) -> ValueError:
    """Return the error of a method that finds nothing to adapt, naming what there is."""
    kinds = Counter(type(m).__name__ for m in module.modules() if any(True for _ in _own(m)))
    found = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(6)) or "no parameters"
    wanted = getattr(method, "layers", None)
    names = f" ({', '.join(kind.__name__.lstrip('_') for kind in wanted)})" if wanted else ""
    return ValueError(
        f"{type(method).__name__} finds nothing to adapt in this model: it looked for "
        f"{method.adapts}{names} and found {found}.{ADVICE}"
    )


def _own(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _spell(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__.lstrip("_")
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    if isinstance(value, tuple):
        return f"({', '.join(map(_spell, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
