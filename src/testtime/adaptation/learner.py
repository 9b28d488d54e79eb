"""The engine: runs a method's pure functions over one batch and commits what they changed."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from testtime.adaptation import coupling, window
from testtime.adaptation.batched import copy_where, few
from testtime.adaptation.calls import Call, Output, Where, chosen, find_logits, row_of
from testtime.adaptation.checks import Found, check_call, check_objective, check_places, named, some
from testtime.adaptation.copy import private_copy
from testtime.adaptation.core import Method, Net, Objective, Settled, nothing_found
from testtime.adaptation.many import evaluate_each
from testtime.adaptation.optim import Tensors, gate
from testtime.adaptation.preprocessing import Preprocessing
from testtime.adaptation.randomness import Randomness, seeded
from testtime.adaptation.state import State, under

_HALF = (torch.float16, torch.bfloat16)


class _Runner(nn.Module):
    """Lets ``functional_call`` run any function of the network, not its forward alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return f(self.module, *args)


class Learner:
    """What adapts: the configured private copy, its state, and the primitives of a step.

    Within a batch everything works on values of its own (``work``); the state is written once, at
    the end, and only where the whole batch was finite. So an error in the middle changes nothing.
    ``draw`` is the only door to randomness: replace it to put recorded values in.
    """

    @torch.inference_mode(False)  # state that is made under it could never be written again
    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        where: Where = None,
        seed: int = 0,
        source: Iterable[Any] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.method, self.where, self.seed = method, where, seed
        self.preprocessing = preprocessing
        self.original = private_copy(model).eval()
        with seeded(seed):  # a head that the method makes is the same every time
            self.module = method.configure(private_copy(model)).requires_grad_(False)
        for layer in self.module.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.register_forward_pre_hook(_contiguous)
        self.runner = _Runner(self.module)
        self._modules = list(self.module.modules())
        self.tied = any(
            len(list(held())) != len(list(held(remove_duplicate=False)))
            for held in (self.module.named_parameters, self.module.named_buffers)
        )
        selected = set(method.select(self.module))
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        self.selected = [k for k in (*parameters, *buffers) if k in selected]
        if unknown := selected - set(self.selected):
            raise ValueError(
                f"{type(method).__name__}.select names {sorted(unknown)}, which this model does "
                "not have. Return names as named_parameters() and named_buffers() spell them."
            )
        if method.optimizer and not self.selected:
            raise nothing_found(method, self.module)
        weights = {k: _master(parameters[k]) for k in self.selected if k in parameters}
        self.dtypes = {k: parameters[k].dtype for k in weights}
        tensors = [*parameters.values(), *buffers.values()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.state = State(
            weights=weights,
            buffers={k: b.clone() for k, b in buffers.items()},
            slots=method.optimizer.slots(weights) if method.optimizer else {},
            memory={},
            generator=self.generator.get_state(),
            skipped=torch.zeros((), dtype=torch.int64, device=self.device),
        )
        self.start = self._begun_here()
        self.constants: Tensors = {}
        self.work = self.state
        self.answers: Literal["before", "after"] = method.answers
        self.inner = 0
        self.classes = 0
        self.couples: bool | None = None
        self.randomness = Randomness(self.module)
        self.overwrites: bool | None = None
        self.unused: list[str] | None = None
        self._forward, self._drew = 0, False
        self.many = 0
        self.forwards = self.graded = self.backwards = 0
        self.lost = torch.zeros_like(self.state.skipped)  # skipped before the last reset
        self.call: Call | None = None
        self.output: Output | None = None  # what the answer came in, where it is no tensor alone
        self.outputs: list[Output] = []
        self._versions: list[int] = []
        self.notes: dict[str, list[Tensor]] = {}
        self.said: list[str] = []
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        if source is not None:
            self._prepare(source)

    # The network under given values.

    @property
    def live(self) -> Net:
        """The network as it is at this moment of the step."""
        return Net(self, self.work.weights, self.work.buffers)

    def source_output(self, call: Call) -> Any:
        """Return the output of the user's own model in eval mode for a call; nothing changes."""
        return self.plain_output(self.original, call)

    def plain_output(self, module: nn.Module, call: Call) -> Any:
        """Return a module's output for a call; neither its buffers nor the input change."""
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        call = self.spared(call)
        self._forward = -1  # the same noise at every call
        with torch.no_grad(), self.own_randomness(()):
            return functional_call(module, buffers, call.args, call.kwargs)

    def logits_of(self, output: Any) -> Tensor:
        """Return the logits in an output of the model."""
        return find_logits(output, self.where)

    def spared(self, call: Call) -> Call:
        """Return arguments that the model may write to; whether it does shows at its first call."""
        if self.overwrites is False:
            return call
        return call.put({k: t.clone() for k, t in call.tensors().items()})

    def set_mode(self, mode: tuple[str, ...]) -> None:
        """Put the named modules in train mode and all others in eval mode."""
        if any(module.training for module in self._modules):  # the user's train() reaches it
            self.module.eval()
        for name in mode:
            self.module.get_submodule(name).train()

    def own_randomness(self, mode: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
        """Run the next forward on numbers that follow from the seed, the batch and its number."""
        self._forward += 1
        place = (self.seed, self.work.batch, self.inner, self._forward)
        return self.randomness.own(mode, place, self.device)

    # The primitives of a step. Each changes `work` alone.

    def draw(self, name: str, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return a random value: ``make(generator)``. The name tells it apart in its inner step."""
        self._drew = True
        return make(self.generator)

    def gradient(
        self, loss: Callable[[Net, Tensor, Tensors], Objective]
    ) -> tuple[Objective, Tensors]:
        """Return the objective of ``loss(net, x, memory)`` and its gradient by the weights."""
        leaves = {k: w.detach().requires_grad_() for k, w in self.work.weights.items()}
        graded = self.graded
        objective = self._evaluate(loss, leaves)
        check_objective(objective, self.method, self.many)
        if objective.loss is None:
            return objective, {}
        self.backwards += self.graded - graded
        found: Iterable[Tensor | None] = [None] * len(leaves)
        if objective.loss.requires_grad:
            total = objective.loss.sum()
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        grads = {k: g for k, g in zip(leaves, found, strict=True) if g is not None}
        if self.unused is None:
            self._settle_unused(list(leaves), grads)
        self.require_finite(objective.loss, *grads.values())
        self.note(loss=objective.loss)
        return objective, grads

    def descend(self, grads: Tensors, when: Tensor | None = None) -> None:
        """Take one step of the optimiser, where ``when`` holds."""
        if grads and self.method.optimizer is None:
            raise ValueError(
                f"{type(self.method).__name__} has a loss but no optimizer. Give it one, such as "
                "optimizer=SGD(lr=1e-3)."
            )
        if grads and self.method.optimizer:
            self.work.weights, self.work.slots = self.method.optimizer.update(
                self.work.weights, grads, self.work.slots, when
            )

    def write(self, values: Tensors, when: Tensor | None = None) -> None:
        """Set weights or buffers, where ``when`` holds."""
        check_places(values, self.work.weights | self.work.buffers, self.method, self.many)
        for name, value in values.items():
            held = self.work.buffers if name in self.work.buffers else self.work.weights
            held[name] = gate(when, value.detach(), held[name])

    def remember(self, values: Tensors, when: Tensor | None = None) -> None:
        """Set entries of the memory, where ``when`` holds."""
        check_places(values, self.work.memory, self.method, self.many)
        for name, value in values.items():
            self.work.memory[name] = gate(when, value.detach(), self.work.memory[name])

    def note(self, **values: Tensor) -> None:
        """Keep quantities of this inner step to show; they last until the next batch."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(value.detach())

    def say(self, message: str) -> None:
        """Tell the user once what was chosen, approximated or left out."""
        if message not in self.said:
            self.said.append(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def default_step(self, x: Tensor) -> Tensor:
        """Run the method's inner steps on the batch, or on each sample of it; return the logits."""
        method, objective = self.method, Objective()
        for self.inner in range(method.steps):
            objective, grads = self.gradient(self._loss)
            self.descend(grads, objective.when)
            self.remember(objective.memory)
            self.note(**objective.notes)
            settled = self._evaluate(self._settle, self.work.weights)
            self.write(settled.values)
            self.remember(settled.memory)
            self.note(**settled.notes)
        if objective.logits is None:
            self.answers = "after"
            return self.answer()
        return objective.logits

    def answer(self) -> Tensor:
        """Return the logits of the batch under the present values, without adapting."""
        with torch.no_grad():
            predicted = self._evaluate(
                lambda net, x, memory: Objective(logits=self.method.predict(net, x, memory)),
                self.work.weights,
            )
        assert predicted.logits is not None
        return predicted.logits

    # One batch from outside.

    def adapt(self, call: Call, fresh: bool = False) -> Tensor:
        """Adapt to one batch, return its logits, and commit the change if all of it was finite.

        Args:
            call: the batch.
            fresh: from the start, as after a reset; if the step fails nothing has been reset.
        """
        with self.opened(call, fresh=fresh):
            self.notes = {}
            logits = self.answered(self.method.step(self, call.x))
            self.require_finite(logits)
            if fresh:
                drawn = self.generator.get_state()
                self.reset((*self.method.survives, "window"))  # whose rows this step works on
                self.generator.set_state(drawn)
                self._versions = self._count_versions()
            self._commit()
            self.state.batch += 1
        return logits

    def adapt_window(self, call: Call, size: int, fresh: bool = False) -> Tensor:
        """Take one row into the window, adapt to all of it at every ``size``-th; return its logits.

        In between a row is answered beside those that wait, where rows couple, and alone elsewhere;
        nothing adapts, but buffers follow the forward, as they do in a step.
        """
        gathered, place = window.join(self.state, call, size)
        coupling.measure(self, gathered)
        if place == size - 1:
            logits = self.adapt(gathered, fresh)
        else:
            place, gathered = (0, call) if self.couples is False else (place, gathered)
            with self.opened(gathered):
                logits = self.answered(self.answer())
                self.require_finite(logits)
                self._commit()
        window.store(self.state, call, size)
        if self.output is not None:
            self.output = row_of(self.output, place)
        return logits[place : place + 1]

    def predict(self, call: Call) -> Tensor:
        """Return the logits of a batch; nothing changes."""
        begun = self.state.begun
        with self.opened(call):
            logits = self.answered(self.answer())
        self._undo(begun)
        return logits

    @torch.inference_mode(False)
    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a device move to everything that the module itself does not hold."""
        self.original._apply(fn)  # type: ignore[no-untyped-call]
        self.state, self.start = self.state.map(fn), self.start.map(fn)
        self.work, self.lost = self.state, fn(self.lost)
        self.constants = {k: fn(t) for k, t in self.constants.items()}
        device = self.state.skipped.device
        if device != self.device:
            self.device = device
            self.generator = torch.Generator(device).manual_seed(self.seed)
            self.state.generator = self.start.generator = self.generator.get_state()

    def reset(self, survives: tuple[str, ...] = ()) -> None:
        """Restore every tensor, the generator and the counters to the start, to the byte."""
        self.lost += self.state.skipped
        start = self.start.tensors()
        for path, tensor in self.state.tensors().items():
            if not under(path, survives) and path != "generator":
                tensor.copy_(start[path])
        if not under("generator", survives):
            self.generator.set_state(self.start.generator)
        self.state.generator = self.generator.get_state()
        self.state.batch = 0
        if not under("window", survives):
            self.state.window, self.state.seen = {}, 0

    def restore(self, state: State) -> None:
        """Write a state of this very learner back."""
        if not isinstance(state, State):
            raise TypeError(
                f"restore() takes what snapshot() returned, but {type(state).__name__} was given. "
                "A state dict goes to load_state_dict(), a file to load()."
            )
        if state.begun and not self.state.begun:
            raise ValueError(
                "The snapshot holds a memory that this adapted model has not begun. It is of "
                "another one: use save() and load() to go on elsewhere."
            )
        memory = dict(self.state.memory) if state.begun else {}
        target = replace(self.state, memory=memory).tensors()
        given = state.tensors()
        kinds = [{k: (t.shape, t.dtype) for k, t in held.items()} for held in (target, given)]
        if kinds[0] != kinds[1]:
            odd = sorted(set(target) ^ set(given)) or "shapes or dtypes"
            raise ValueError(
                f"The state does not fit this adapted model: {odd} differ. "
                "Restore a snapshot of the same model and method."
            )
        for path, tensor in target.items():
            if path != "generator":
                tensor.copy_(given[path])
        self.generator.set_state(state.generator)
        self.state.generator = state.generator.clone()
        self.state.memory, self.state.batch, self.state.begun = memory, state.batch, state.begun
        self.state.window = {k: t.clone() for k, t in state.window.items()}
        self.state.seen = state.seen

    # How it is done.

    @property
    def _batch(self) -> int:
        return self.call.x.shape[0] if self.call else 1

    def answered(self, logits: Tensor) -> Tensor:
        """Check an answer, and find the output that it came in."""
        rows = self._batch
        if self.many:
            logits = logits.flatten(0, 1)
        else:
            self.output = chosen(self.outputs, logits)
        if logits.shape[0] != rows:
            raise ValueError(
                f"{type(self.method).__name__} answered {logits.shape[0]} rows to a batch of "
                f"{rows}. An answer has a row for every row of the input."
            )
        return logits.detach()

    def _loss(self, net: Net, x: Tensor, memory: Tensors) -> Objective:
        return self.method.loss(net, x, memory, self.draw)

    def _settle(self, net: Net, x: Tensor, memory: Tensors) -> Settled:
        return self.method.settle(net, memory, self.draw)

    def _evaluate(self, f: Callable[[Net, Tensor, Tensors], Found], weights: Tensors) -> Found:
        """Run ``f`` once on the batch, or on every sample with weights of its own."""
        if self.many:
            return evaluate_each(self, f, weights)
        x = self.call.x if self.call else torch.empty(0)
        return named(f(Net(self, weights, self.work.buffers), x, self.work.memory), self.method)

    @contextlib.contextmanager
    def opened(self, call: Call, many: int = 0, fresh: bool = False) -> Iterator[None]:
        """Give the step values of its own; on an error nothing has changed."""
        begun, said = self.state.begun, list(self.said)
        self.call, self.many, self.output, self.outputs = call, many, None, []
        self._forward, self._drew = 0, False
        survives = self.method.survives if fresh else ("",)
        if not under("generator", survives):
            self.generator.set_state(self.start.generator)
        self.finite = torch.ones((many,) if many else (), dtype=torch.bool, device=self.device)
        try:
            self._begin(fresh)
            self.work = self._from_start(survives).values(many)
            self._versions = self._count_versions()
            yield
        except BaseException:
            self._undo(begun)
            self.said = said
            raise
        finally:
            self.work, self.call, self.many, self.inner = self.state, None, 0, 0
            self.outputs = []

    def _from_start(self, survives: tuple[str, ...]) -> State:
        """Return the start, but the state where it survives."""
        if "" in survives:
            return self.state

        def held(path: str, start: Tensors, state: Tensors) -> Tensors:
            return {k: (state if under(f"{path}.{k}", survives) else start)[k] for k in state}

        start, state = self.start.groups(), self.state.groups()
        groups = {path: held(path, start[path], state[path]) for path in state}
        return replace(
            self.start,
            weights=groups["weights"],
            buffers=groups["buffers"],
            memory=groups["memory"],
            slots={slot: groups[f"slots.{slot}"] for slot in self.state.slots},
        )

    def _undo(self, begun: bool) -> None:
        """Take back what was drawn, and a beginning that was only for this call."""
        self.generator.set_state(self.state.generator)
        if not begun:
            self.state.begun, self.state.memory, self.start.memory = False, {}, {}
            self.start.generator = self.state.generator.clone()

    def _begin(self, fresh: bool) -> None:
        """Ask the method for its memory, once, and take the start again."""
        if self.state.begun or self.call is None:
            return
        many, self.many = self.many, 0
        call = self.call
        if fresh:
            self.call = call.rows(slice(0, 1))
        self.work = self.state.values()
        with torch.no_grad():
            memory = self.method.begin(self.live, self.call.x, self.draw)
        self.call, self.many, self.outputs = call, many, []
        self.state.memory = {k: t.detach().clone() for k, t in memory.items()}
        self.start.memory = {k: t.clone() for k, t in self.state.memory.items()}
        self.start.generator = self.generator.get_state()
        self.state.begun = True

    def _commit(self) -> None:
        if self._versions != self._count_versions():
            raise ValueError(
                f"{type(self.method).__name__} changed a weight or its memory in place. Its loss "
                "and settle must be pure: return new values."
            )
        kept, new = [], []
        for path, old in self.state.groups().items():
            values = self.work.groups()[path]
            moved = [name for name in old if values[name] is not old[name]]
            kept += [old[name] for name in moved]
            new += [values[name].detach() for name in moved]
        copy_where(self.finite, kept, new)
        self.state.skipped.add_(~self.finite)
        # Only a method that draws pays for this look: numbers that a skipped batch consumed go
        # back, so that what follows is as if it had not been there.
        if self._drew and not bool(self.finite):
            self.generator.set_state(self.state.generator)
        if self._drew:
            self.state.generator = self.generator.get_state()

    def _count_versions(self) -> list[int]:
        return [t._version for t in (*self.state.weights.values(), *self.state.memory.values())]

    def require_finite(self, *tensors: Tensor) -> None:
        """Note on the device whether all is finite, for the batch or for each sample."""
        rows = max(self.many, 1)
        for one in few([t.detach().reshape(rows, -1) for t in tensors]):
            finite = one.isfinite().all(1)
            self.finite = self.finite & (finite if self.many else finite[0])

    def _settle_unused(self, names: list[str], grads: Tensors) -> None:
        self.unused = [name for name in names if name not in grads]
        if names and not grads:
            raise ValueError(
                f"Nothing that {type(self.method).__name__} adapts ({some(names)}) influences "
                "this model's answer: its forward uses cached or private copies of them, or the "
                "layers are never called. Make the model read its registered parameters."
            )
        if self.unused:
            self.say(
                f"{len(self.unused)} of {len(names)} adapting tensors do not influence the loss "
                f"and stay as they are: {some(self.unused)}."
            )

    def _prepare(self, batches: Iterable[Any]) -> None:
        self.work, self._versions = self.state.values(), self._count_versions()
        with torch.enable_grad():
            self.constants = self.method.prepare(self, self._each_input(batches))
        self.call = None
        bad = [k for k, t in self.constants.items() if not bool(t.isfinite().all())]
        if bad or not bool(self.finite):
            raise ValueError(
                f"What {type(self.method).__name__} computed from the source data is not finite"
                f"{f' ({some(bad)})' if bad else ''}. Look for NaN or infinite values in source=."
            )
        self._commit()
        self.notes, self.unused, self.work = {}, None, self.state
        self.start = self._begun_here()

    def take_constants(self, constants: Tensors, buffers: Tensors) -> None:
        """Begin with what was prepared from source data before: constants, and moved buffers."""
        self.constants = {k: t.to(self.device, copy=True) for k, t in constants.items()}
        for name, value in buffers.items():
            self.state.buffers[name].copy_(value)
        self.start = self._begun_here()

    def _each_input(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """Yield the input of every source batch, bound as the call at hand."""
        name, empty = f"The source data of {type(self.method).__name__}", True
        for batch in batches:
            empty = False
            self.call = Call.of(batch)
            check_call(self.call, self.module, 1, name)
            yield self.call.x
        if empty:
            raise ValueError(f"{name} held no batch. Pass source= with a list or a data loader.")

    def _begun_here(self) -> State:
        """Return the state as the start, sharing what stays as it is: it is only ever read."""
        fixed = dict(self.original.named_parameters()) | dict(self.module.named_buffers())
        start = self.state.map(torch.clone)

        def shared(name: str, value: Tensor) -> Tensor:
            same = name in fixed and fixed[name].dtype == value.dtype
            return fixed[name].detach() if same and torch.equal(fixed[name], value) else value

        start.weights = {k: shared(k, t) for k, t in start.weights.items()}
        start.buffers = {k: shared(k, t) for k, t in start.buffers.items()}
        start.slots = {  # zeros, by definition
            slot: {k: t.new_zeros(()).expand(t.shape) for k, t in held.items()}
            for slot, held in start.slots.items()
        }
        return start


def _contiguous(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # On a CPU the backward pass of torch's GroupNorm (2.13) kills the process where a channels-last
    # input needs no gradient but the scale does, as it is with everything frozen but the norms.
    x = args[0]
    return None if x.is_cuda or x.requires_grad else (x.contiguous(), *args[1:])


def _master(parameter: Tensor) -> Tensor:
    # In half precision a small step rounds away, so what adapts is kept in float32.
    value = parameter.detach()
    return value.float() if value.dtype in _HALF else value.clone()
