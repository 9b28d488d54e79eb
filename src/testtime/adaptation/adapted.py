"""The user's object: a module that adapts, then answers."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from testtime.adaptation import coupling, persistence
from testtime.adaptation.calls import Call, Where, describe, put_logits
from testtime.adaptation.checks import check_call, check_values
from testtime.adaptation.copy import Watch, shared_tensors, unwrap
from testtime.adaptation.core import Method
from testtime.adaptation.export import Exported, export
from testtime.adaptation.learner import Learner
from testtime.adaptation.many import adapt_each
from testtime.adaptation.methods import find
from testtime.adaptation.preprocessing import Preprocessing, declared
from testtime.adaptation.report import Report
from testtime.adaptation.state import State

CHUNK = 16  # samples adapted at once: on two cores more gain nothing and cost memory

Many = Literal["auto", "vmap", "loop"]


class _Turn:
    """One call at a time; copies and pickles as a fresh one, for locks do neither."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_Turn"], tuple[()]]:
        return (_Turn, ())

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "This adapted model is in the middle of another call. One adapted model belongs to "
                "one thread: make another with adapt() for each thread."
            )
        try:
            yield
        finally:
            self._lock.release()


class Adapted(nn.Module):
    """A model that adapts to every batch it is called on; made by :func:`adapt`.

    Call it as the model itself: the same arguments, the same kind of output, with the method's
    logits in the place of the model's. ``train()`` and ``eval()`` change nothing about it.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        logits: Where,
        episodic: Literal[False, "batch", "sample"],
        reset_every: int | None,
        window: int,
        source: Iterable[Any] | str | PathLike[str] | None,
        preprocessing: Preprocessing | None,
        seed: int,
        many: Many,
        strict: bool,
    ) -> None:
        super().__init__()
        self.method, self.episodic, self.strict, self._many = method, episodic, strict, many
        self.window = window
        self.reset_every = method.reset_every if reset_every is None else reset_every
        self._given, self._own = preprocessing, declared(model)
        self._shared = Watch(shared_tensors(model))
        self._theirs = dict(model.named_buffers())
        file = source if isinstance(source, str | PathLike) else None
        self.learner = Learner(
            model,
            method,
            where=logits,
            seed=seed,
            source=None if isinstance(source, str | PathLike) else source,
            preprocessing=preprocessing or self._own,
        )
        if file is not None:
            persistence.load_source(self.learner, file)
        self._network = self.learner.module  # registered, so that .to() and parameters() see it
        self._turn = _Turn()
        self._unseen = True
        self.suspicion = ""

    # Answers.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adapt to the batch, then answer it as the model would."""
        with self._entered(Call(args, kwargs)) as call:
            if self._unseen or self.strict:
                self._look(call)
            if self.window:
                logits = self._in_window(call)
                self._unseen = False
                return self._answer(logits)
            coupling.measure(self.learner, call)
            if self.episodic == "sample":
                logits = self._each(call)
            else:
                logits = self.learner.adapt(call, fresh=self._is_reset_due())
            self._unseen = False
            return self._answer(logits)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the batch as adapted so far; nothing changes."""
        with self._entered(Call(args, kwargs)) as call:
            return self._answer(self.learner.predict(call))

    def source(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer of the user's own model in eval mode."""
        with self._entered(Call(args, kwargs)) as call:
            return self.learner.source_output(call)

    def fit(self, batches: Iterable[Any], passes: int = 1) -> Self:
        """Adapt to batches without answering (offline).

        Args:
            batches: inputs, or dicts of named arguments, or tuples whose first element is the
                input (what follows, such as labels, is not looked at); with ``passes`` above 1
                something that can be iterated again, such as a list or a data loader.
            passes: how often to go through them.
        """
        if isinstance(batches, Tensor | Mapping):
            raise TypeError(
                f"fit() takes batches, but one {type(batches).__name__} was given. Pass a list of "
                "batches or a data loader."
            )
        if passes < 1:
            raise ValueError(f"fit(passes={passes}): it must be at least 1.")
        if passes > 1 and iter(batches) is batches:
            raise ValueError(
                f"fit(passes={passes}) needs batches that can be gone through again, but an "
                f"iterator ({type(batches).__name__}) was given. Pass a list or a data loader."
            )
        for _ in range(passes):
            for batch in batches:
                call = Call.of(batch)
                self(*call.args, **call.kwargs)
        return self

    @property
    def answers(self) -> Literal["before", "after"]:
        """Whether an answer comes from before or from after the update by its own batch."""
        return self.learner.answers

    # State.

    def reset(self) -> None:
        """Make it the source model again, to the last bit; what the method lets survive stays."""
        with self._turn.taken():
            self._check_shared()
            self.learner.reset(self.method.survives)
            self._unseen = True

    def snapshot(self) -> State:
        """Return a copy of all that changes."""
        with self._turn.taken():
            return self.learner.state.clone()

    def restore(self, state: State) -> None:
        """Put a snapshot of this adapted model back."""
        with self._turn.taken():
            self._check_shared()
            self.learner.restore(state)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the whole state and the identity of model and method, as tensors.

        Raises:
            TypeError: it was asked for by a module around this one, whose own would lack it.
        """
        if args or kwargs.get("destination") is not None:
            raise TypeError(
                "An adapted model inside another module cannot be part of its state dict. Save it "
                "by itself, with save() or its own state_dict()."
            )
        with self._turn.taken():
            self._check_shared()
            return persistence.pack(self.learner)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Continue from a state; one of another model or method is refused, naming what differs."""
        with self._turn.taken():
            self._check_shared()
            persistence.unpack(self.learner, state_dict)
            self._unseen = False

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to one safetensors file, whole or not at all."""
        persistence.save(self.state_dict(), path)

    def load(self, path: str | PathLike[str]) -> Self:
        """Continue from a file; one of another model or method is refused, naming what differs."""
        self.load_state_dict(persistence.load(path))
        return self

    def save_source(self, path: str | PathLike[str]) -> None:
        """Write what the method computed from source data to a file, for ``adapt(source=path)``.

        Raises:
            ValueError: the method computed nothing.
        """
        with self._turn.taken():
            self._check_shared()
            persistence.save(persistence.pack_source(self.learner), path)

    def export(
        self, *args: Any, statistics: Literal["source", "last"] | None = None, **kwargs: Any
    ) -> Exported:
        """Return the adapted network as a plain module in eval mode, and how far its answers are.

        Args:
            args: a batch, as for a call; needed where answers depend on the batch.
            statistics: there, what is frozen: the ``"source"``'s, or this ``"last"`` batch's.
            kwargs: likewise.
        """
        if statistics not in (None, "source", "last"):
            raise ValueError(f"statistics={statistics!r} is not known: use 'source' or 'last'.")
        if not args and not kwargs:
            with self._turn.taken():
                self._check_shared()
                return export(self.learner, None, statistics)
        plain = torch.autocast(self.learner.device.type, enabled=False)
        with plain, self._entered(Call(args, kwargs)) as call:
            return export(self.learner, call, statistics)

    def report(self) -> Report:
        """Return what adapts, what it cost, what was skipped, and everything that was said."""
        learner = self.learner
        total = sum(p.numel() for p in learner.module.parameters())
        return Report(
            method=self.method,
            adapts=tuple(learner.selected),
            share=sum(w.numel() for w in learner.state.weights.values()) / max(total, 1),
            unused=tuple(learner.unused or ()),
            couples=learner.couples,
            batches=learner.state.batch,
            skipped=int(learner.state.skipped + learner.lost),
            forwards=learner.forwards,
            backwards=learner.backwards,
            said=tuple(learner.said),
        )

    @property
    def notes(self) -> dict[str, list[Tensor]]:
        """What the method noted on the last batch, a value for each inner step."""
        return self.learner.notes

    def extra_repr(self) -> str:
        """Show the method and what adapts."""
        learner = self.learner
        weights = sum(w.numel() for w in learner.state.weights.values())
        shown = "\n".join(f"  {name}" for name in learner.selected)
        return (
            f"{self.method}, adapts {len(learner.selected)} tensors ({weights:,} weights):\n{shown}"
        )

    def __repr__(self) -> str:
        """Return the method and the names of everything that may change."""
        return f"Adapted({self.extra_repr()}\n)"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Carry the state along to another device; another dtype is refused."""
        dtypes = {p.dtype for p in self._network.parameters() if p.is_floating_point()}
        device = self.learner.device
        if any(fn(torch.zeros((), dtype=d, device=device)).dtype != d for d in dtypes):
            raise TypeError(
                "An adapted model keeps its dtype, for its state would lose digits. Convert the "
                "model first, then call adapt()."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.learner.move(fn)
        return self

    # How it is done.

    @contextlib.contextmanager
    def _entered(self, call: Call) -> Iterator[Call]:
        device = self.learner.device.type
        cast = torch.is_autocast_enabled(device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._turn.taken())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if cast:
                # With the cache, a second forward would read the weights of the first.
                dtype = torch.get_autocast_dtype(device)
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            smallest = 1 if self.window else self.method.smallest_batch
            check_call(call, self._network, smallest, type(self.method).__name__)
            self._check_shared()
            stack.enter_context(self._left_alone())
            try:
                yield call.put({k: _normal(v) for k, v in call.batched().items()})
            except RuntimeError as error:  # the model's own: which shapes it takes, only it knows
                error.add_note(f"The input was {describe(call.x)}. Nothing has changed.")
                raise

    @contextlib.contextmanager
    def _left_alone(self) -> Iterator[None]:
        """Watch, at the first call, that the copy does not reach the user's own buffers."""
        before = {k: b.clone() for k, b in self._theirs.items()}
        try:
            yield
        finally:
            # By value: batch normalisation moves its statistics without counting a change.
            moved = [
                k
                for k, b in self._theirs.items()
                if not torch.equal(b.nan_to_num(), before[k].nan_to_num())
            ]
            for name in moved:
                self._theirs[name].copy_(before[name])
        if moved:
            self.learner.reset()
            raise TypeError(
                f"Running the private copy of the model moved '{moved[0]}' of your own model (put "
                "back now): something in it, such as a closure in a hook, reaches the original. "
                "Make it reach the module through its arguments or through self."
            )
        self._theirs = {}

    def _is_reset_due(self) -> bool:
        batch = self.learner.state.batch
        return bool(self.episodic or (self.reset_every and batch >= self.reset_every))

    def _in_window(self, call: Call) -> Tensor:
        if call.x.shape[0] != 1:
            raise ValueError(
                f"window={self.window} takes single images, but this batch has {call.x.shape[0]} "
                "rows. Give them one at a time, or leave window= out to adapt to whole batches."
            )
        # A look at each image: one that is not finite would spoil all W steps that it is part of.
        if call.x.is_floating_point() and not bool(call.x.isfinite().all()):
            self.learner.state.skipped += 1
            return self.learner.predict(call)
        return self.learner.adapt_window(call, self.window, fresh=self._is_reset_due())

    def _each(self, call: Call) -> Tensor:
        learner = self.learner
        if self._many == "auto":
            small = all(w.dim() <= 1 for w in learner.state.weights.values())
            self._many = "vmap" if small or learner.device.type != "cpu" else "loop"
            if self._many == "loop":
                learner.say(
                    "Samples are adapted one after another: with whole weight matrices changing, "
                    "many at once are slower on a CPU. many='vmap' forces it."
                )
        if self._many == "vmap" and self.method.looks:
            self._many = "loop"
            learner.say(
                f"Samples are adapted one after another: {type(self.method).__name__} decides on "
                "the host, which many at once cannot."
            )
        if self._many == "vmap":
            try:
                return adapt_each(learner, call, CHUNK)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError) as error:
                refusal = str(error).splitlines()[0] if str(error) else type(error).__name__
                logits = adapt_each(learner, call, 0)
                self._many = "loop"
                learner.say(f"Samples are adapted one after another: vmap refused ({refusal}).")
                return logits
        return adapt_each(learner, call, 0)

    def _answer(self, logits: Tensor) -> Any:
        output = self.learner.output
        self.learner.output = None
        if output is None:
            return logits
        raw, old = output
        return put_logits(raw, old, logits)

    def _look(self, call: Call) -> None:
        """Look at the values of a batch: refuse what cannot be, tell what is only suspicious."""
        self.suspicion = check_values(call.x, self._given, self._own)
        if self.suspicion and self.strict:
            raise ValueError(self.suspicion)
        if self.suspicion:
            self.learner.say(self.suspicion)

    def _check_shared(self) -> None:
        name = self._shared.changed()
        if name is not None:
            raise RuntimeError(
                f"The model that this was made from has been changed in place since (first "
                f"'{name}'), and its weights are shared. Call adapt() again on the changed "
                "model, or adapt a copy.deepcopy of it from the start."
            )


def adapt(
    model: nn.Module,
    method: Method | str,
    *,
    logits: Where = None,
    episodic: Literal[False, "batch", "sample"] = False,
    reset_every: int | None = None,
    window: int = 0,
    source: Iterable[Any] | str | PathLike[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    seed: int = 0,
    many: Many = "auto",
    strict: bool = False,
) -> Adapted:
    """Return a module that adapts a private copy of ``model`` to every batch, then answers.

    The user's model is never changed; parameters that do not adapt are shared with it.

    Args:
        model: any trained module that returns logits ``[B, C]`` or ``[B, C, ...]`` (a tensor, or
            within a tuple, a dict or a Hugging Face output).
        method: a method or its name, such as ``"tent"``.
        logits: a key, an index or a function where the logits cannot be found in the output.
        episodic: ``"batch"`` starts from the source at every batch, ``"sample"`` at every sample.
        reset_every: reset by itself after so many batches; overrides the method's.
        window: take single images, and adapt to the last so many at every so many-th; 0: batches.
        source: batches of source data, for methods that need them, or a file of
            :meth:`Adapted.save_source`.
        mean: of the normalisation outside the model, for each channel or for all.
        std: likewise; inputs are ``(image - mean) / std`` of images in [0, 1].
        seed: of everything random.
        many: how episodes of samples run: ``"vmap"`` many at once, ``"loop"``, or ``"auto"``.
        strict: look at the values of every batch, and refuse what is only suspicious.

    Raises:
        TypeError: the model cannot be copied, or is of a kind that cannot adapt.
        ValueError: the method finds nothing to adapt in this model, or an argument is not known.

    Example:
        >>> import testtime as tt
        >>> model, images, labels = tt.demo.load()
        >>> adapted = tt.adapt(model, tt.Tent())
        >>> logits = adapted(images[:64])
        >>> adapted.reset()
    """
    method = find(method)
    if episodic not in (False, "batch", "sample"):
        raise ValueError(f"episodic={episodic!r} is not known: use False, 'batch' or 'sample'.")
    whole = isinstance(reset_every, int) and not isinstance(reset_every, bool)
    if reset_every is not None and (not whole or reset_every < 1):
        raise ValueError(
            f"reset_every={reset_every}: it must be a whole number of batches, at least 1."
        )
    _check_window(window, method, episodic)
    if many not in ("auto", "vmap", "loop"):
        raise ValueError(f"many={many!r} is not known: use 'auto', 'vmap' or 'loop'.")
    if method.needs_source and source is None:
        raise ValueError(
            f"{type(method).__name__} needs source data, but none was given. "
            "Pass source= with batches like those that the model was trained on."
        )
    # Built inside the caller's inference mode, the state could take no gradient later.
    with torch.inference_mode(False):
        return Adapted(
            unwrap(model),
            method,
            logits=logits,
            episodic=episodic,
            reset_every=reset_every,
            window=window,
            source=source,
            preprocessing=Preprocessing.of(mean, std),
            seed=seed,
            many=many,
            strict=strict,
        )


def _check_window(window: int, method: Method, episodic: str | bool) -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < 0 or window == 1:
        raise ValueError(
            f"window={window!r}: it must be 0, for none, or a number of images, at least 2."
        )
    if window and episodic:
        raise ValueError(
            f"window={window} gathers images over calls, but episodic={episodic!r} starts afresh "
            "at each. Leave one of them out."
        )
    if window and window < method.smallest_batch:
        raise ValueError(
            f"{type(method).__name__} needs batches of at least {method.smallest_batch}, but "
            f"window={window}. Use a larger window."
        )


def _normal(tensor: Tensor) -> Tensor:
    # An inference tensor cannot be saved for a backward pass.
    return tensor.clone() if tensor.is_inference() else tensor
