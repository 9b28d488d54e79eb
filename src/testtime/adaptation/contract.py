"""The laws of adaptation, as checks that any method can be put through on any model.

For a method of your own, in your tests::

    @pytest.mark.parametrize("law", tt.LAWS, ids=str)
    def test_law(law):
        law(MyMethod(), model, batches)

All of them, without stopping at the first that is broken: :func:`check_method`.
"""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from testtime.adaptation.adapted import Adapted
from testtime.adaptation.calls import Call
from testtime.adaptation.copy import shared_tensors, unwrap
from testtime.adaptation.core import Method
from testtime.adaptation.trial import (
    Batch,
    LawBroken,
    Trial,
    differing,
    expect,
    expect_close,
    expect_same,
    logits,
    portrait,
    randomness,
    reachable,
    refusal,
    same,
    some,
    switches,
)

__all__ = ["LAWS", "Law", "LawBroken", "Result", "check_method"]

NEVER = 10**9  # batches: no reset by itself while a law is tried
MANY_STEPS = 20  # enough to see a memory grow


@dataclass(frozen=True)
class Law:
    """One law; calling it with a method, a model and batches raises where it does not hold.

    Args:
        number: as the laws are counted.
        title: in a few words.
        check: what tries it.
    """

    number: int
    title: str
    check: Callable[[Trial], None]

    def __call__(
        self, method: Method | str, model: nn.Module, batches: Iterable[Batch], **options: Any
    ) -> None:
        """Try the law; what is refused at once, with a sentence, holds.

        Args:
            method: any method, or its name.
            model: any model; it is left as it is.
            batches: at least two batches of at least two rows, as :meth:`Adapted.fit` takes them.
            options: of :func:`adapt`, such as ``source`` or ``logits``.

        Raises:
            LawBroken: it does not hold.
        """
        self.attempt(Trial(method, model, batches, options))

    def attempt(self, trial: Trial) -> None:
        """Try the law in a trial, which keeps what was refused on the way."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what an adapted model says once
                if trial.fits() or self.check in _OF_ANY_MODEL:
                    self.check(trial)
        except LawBroken as broken:
            raise LawBroken(f"Law {self}: {broken}") from broken.__cause__
        except Exception as error:
            raise LawBroken(
                f"Law {self}: it should work, or be refused with a sentence, but failed with "
                f"{type(error).__name__}: {error}"
            ) from error

    def __str__(self) -> str:
        """Return number and title."""
        return f"{self.number}, {self.title}"


@dataclass(frozen=True)
class Result:
    """What became of one law.

    Args:
        law: which.
        passed: whether it holds; what is refused at once, with a sentence, holds.
        detail: what broke it, or what was refused; empty where all was tried and holds.
        applies: whether there was anything to try: the method may not fit the model at all.
    """

    law: Law
    passed: bool
    detail: str = ""
    applies: bool = True

    @property
    def verdict(self) -> str:
        """``holds``, ``broken``, or ``does not apply``."""
        return ("holds" if self.applies else "does not apply") if self.passed else "broken"

    def __str__(self) -> str:
        """Return a line to read."""
        return f"{self.verdict}: {self.law}. {self.detail}".rstrip()


def check_method(
    method: Method | str,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    laws: Iterable[Law] | None = None,
    **options: Any,
) -> list[Result]:
    """Put a method on a model through the laws; never stop at the first that is broken.

    Args:
        method: any method, or its name.
        model: any model; it is left as it is.
        batches: at least two batches of at least two rows, as :meth:`Adapted.fit` takes them.
        laws: which of ``LAWS``; none: all.
        options: of :func:`adapt`, such as ``source`` or ``logits``.

    Example:
        >>> import testtime as tt
        >>> model, images, labels = tt.demo.load()
        >>> batches = list(images[:24].split(8))
        >>> all(result.passed for result in tt.check_method(tt.Tent(), model, batches))
        True
    """
    batches, results = list(batches), []
    for law in LAWS if laws is None else laws:
        trial = Trial(method, model, batches, options)
        try:
            law.attempt(trial)
            applies = trial.fitting or law.check in _OF_ANY_MODEL
            tried = trial.fitting or not applies
            results.append(Result(law, True, " ".join(trial.refusals) if tried else "", applies))
        except LawBroken as broken:
            results.append(Result(law, False, str(broken).removeprefix(f"Law {law}: ")))
    return results


def untouched(trial: Trial) -> None:
    """1. The user's model is bit for bit what it was; changing it later is noticed."""
    model = unwrap(trial.model)
    before, state = portrait(model), randomness()
    with contextlib.suppress(ValueError, TypeError):  # a refusal must leave it alone too
        adapted = trial.adapt()
        trial.run(adapted)
        for f in ("predict", "source"):
            logits(adapted, trial.calls[0], f)
        adapted.load_state_dict(adapted.state_dict())
        adapted.reset()
        adapted.train().requires_grad_(True).zero_grad()
        trial.run(adapted)
    after = portrait(model)
    changed = [k for k in {**before, **after} if k not in before or before[k] != after.get(k)]
    expect(not changed, f"the user's model should be as it was, but {some(changed)} changed")
    expect(state == randomness(), "the global random generators should be as they were, but moved")
    if not refusal(trial.adapt):
        _later_change(trial, copy.deepcopy(model))


def _later_change(trial: Trial, model: nn.Module) -> None:
    adapted, shared = trial.adapt(model), list(shared_tensors(model).values())
    with torch.no_grad():
        for tensor in shared[:1]:
            tensor.mul_(1)  # counts as a change in place; the values stay
    for what, f in (("a call", lambda: trial.run(adapted)), ("reset()", adapted.reset)):
        try:
            f()
        except RuntimeError:
            continue
        expect(not shared, f"{what} after a change of the shared weights should be refused")


def nothing_duplicated(trial: Trial) -> None:
    """2. What does not adapt shares the user's storage; the rest is state, and no more."""
    adapted = trial.adapt()
    model, learner = unwrap(trial.model), adapted.learner
    theirs = {_storage(p): (k, p.detach()) for k, p in shared_tensors(model).items()}
    own = {_storage(t) for _, t in reachable(model).values()}
    buffers = [b for net in (learner.module, learner.original) for b in net.buffers()]

    def extra(*but: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        states = (learner.state, learner.start)
        held = [t for state in states for t in state.tensors().values()]
        known = {*own, *map(_storage, chain(held, learner.constants.values(), *but))}
        found = reachable(adapted).values()
        return [(path, t) for path, t in found if t.numel() > 1 and _storage(t) not in known]

    # Buffers and other tensors that may move are there once for each of the two networks; a head
    # that the method made is new.
    shared = {id(p) for p in shared_tensors(model).values()}
    unshared = dict(found for key, found in reachable(model).items() if key not in shared)
    made = [p for p in learner.module.parameters() if _storage(p) not in theirs]
    allowed, found = 2 * _bytes(unshared.values()) + _bytes(made), _bytes(t for _, t in extra())
    expect(
        found <= allowed,
        f"beyond its state and two copies of buffers, {allowed} bytes, it should hold nothing when "
        f"built, but it holds {found}",
    )
    trial.run(adapted)
    copies = [
        f"{path} of {twin}"
        for path, tensor in extra(buffers)
        for twin, parameter in theirs.values()
        # A tensor of one value, such as ones, may well be there twice; a second name of a parameter
        # in the user's model is a tensor of its own in the copy, for a forward may write to it.
        if not path.endswith(tuple(unshared))
        and same(parameter, tensor)
        and bool((parameter != parameter.flatten()[0]).any())
    ]
    expect(
        not copies,
        f"what is frozen should share the user's storage, but there are copies: {some(copies)}",
    )


def reset_is_exact(trial: Trial) -> None:
    """3. A reset restores every byte, and a second pass equals the first; the source stays."""
    adapted = trial.adapt(reset_every=NEVER)
    fresh = adapted.snapshot()
    survives = adapted.method.survives
    source = trial.run(adapted, f="source")
    first = trial.run(adapted)
    ended = adapted.snapshot()
    adapted.reset()
    for what, start in (("built", fresh), ("begun", adapted.learner.start)):
        # Memory, and what beginning it draws, are there from the first batch on.
        later = ("memory", "generator") if what == "built" else ()
        wrong = differing(start, adapted.snapshot(), *survives, *later)
        expect(not wrong, f"a reset should restore all as it was {what}, but not {some(wrong)}")
    expect_same(trial.run(adapted, f="source"), source, "source() before and after")
    if survives:
        trial.refusals.append(f"A second pass is not held to the first: {some(survives)} survives.")
        return
    expect_same(trial.run(adapted), first, "a second pass and the first")
    wrong = differing(ended, adapted.snapshot())
    expect(not wrong, f"a second pass should end as the first did, but {some(wrong)} differ")


def goes_on_after_saving(trial: Trial) -> None:
    """4. Save, load elsewhere, go on: equal to never having stopped."""
    half = max(len(trial.calls) // 2, 1)
    adapted, other = trial.adapt(), trial.adapt()
    trial.run(adapted, trial.calls[:half])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        adapted.save(path)
        other.load(path)
    wrong = differing(adapted.snapshot(), other.snapshot())
    expect(not wrong, f"a loaded state should be the saved one, but {some(wrong)} differ")
    rest = trial.calls[half:]
    expect_same(trial.run(other, rest), trial.run(adapted, rest), "answers after loading")
    wrong = differing(adapted.snapshot(), other.snapshot())
    expect(not wrong, f"after loading it should go on alike, but {some(wrong)} differ")


def bad_input_changes_nothing(trial: Trial) -> None:
    """5. Bad shapes and values are refused before, or masked while, anything changes."""
    adapted, call = trial.adapt(reset_every=NEVER), trial.calls[0]
    floating = call.x.is_floating_point()
    if floating:
        for rows in (slice(0, 1), slice(None)):
            spoiled = call.at(_spoiled(call.x, rows))
            trial.must_refuse("a first batch with NaN", adapted, partial(logits, adapted, spoiled))
    trial.run(adapted)
    trial.must_refuse("an empty batch", adapted, partial(logits, adapted, call.rows(slice(0, 0))))
    if not floating:
        trial.refusals.append("The input is integers: there is no NaN and no other dtype to try.")
        return
    wrong = torch.float32 if call.x.dtype == torch.float64 else torch.float64
    odd = call.at(call.x.to(wrong))
    trial.must_refuse(f"an input of {wrong}", adapted, partial(logits, adapted, odd))
    before = adapted.snapshot()
    try:
        logits(adapted, call.at(call.x[..., :0]))
    except Exception:  # the model's own error, of any kind
        moved = differing(before, adapted.snapshot())
        expect(not moved, f"a wrong shape changed {some(moved)} before it was refused")
    for rows in (slice(None), slice(0, 1)):
        before = adapted.snapshot()
        logits(adapted, call.at(_spoiled(call.x, rows)))
        after = adapted.snapshot()
        # The generator's state is on the host, which does not know.
        moved = differing(before, after, "batch", "skipped", "generator")
        what = "a NaN batch" if rows == slice(None) else "one NaN row"
        expect(not moved, f"{what} should change nothing, but changed {some(moved)}")
        expect(after.batch == before.batch + 1, f"{what} should count as a batch, but does not")
        skipped = int(after.skipped - before.skipped)
        expect(skipped == 1, f"{what} should be counted once as skipped, but {skipped} are")


def episodes_are_independent(trial: Trial) -> None:
    """6. Episodic answers depend on neither the order of batches nor, by sample, on the batch."""
    calls, size = trial.calls, trial.method.smallest_batch
    forward = trial.run(trial.adapt(episodic="batch"))
    backward = trial.run(trial.adapt(episodic="batch"), calls[::-1])[::-1]
    expect_close(backward, forward, "episodic answers in another order", trial.tolerance)
    if size > 1:
        trial.refusals.append(f"Episodes of one sample are refused: it needs batches of {size}.")
        return

    def samples() -> None:
        whole = trial.run(trial.adapt(episodic="sample"), calls[:1])
        parts = [calls[0].rows(slice(k, k + 1)) for k in range(calls[0].x.shape[0])][::-1]
        for many in ("vmap", "loop"):
            alone = trial.run(trial.adapt(episodic="sample", many=many), parts)
            what = f"answers of samples alone and in a batch ({many})"
            expect_close([torch.cat(alone[::-1])], whole, what, trial.tolerance)

    trial.tries("An episode of one sample", samples)


def works_where_it_is_called(trial: Trial) -> None:
    """7. The caller's modes, dtypes, layouts and batch sizes: it works, or says that it cannot."""
    plain, found = trial.run(trial.adapt()), switches()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            inside = switches()
            # The calls' tensors made in here too, as a data loader would.
            answers = trial.run(trial.adapt(), [c.at(c.x.clone()) for c in trial.calls])
            _expect_switches(inside)
        expect_same(answers, plain, f"answers within {context.__name__}()")
    expect(not any(t.requires_grad for t in plain), "answers should not require gradients")
    again = [trial.calls[0]] * 2
    first, second = trial.run(trial.adapt(), again)
    # By more than rounding, which a coarser dtype may well round away.
    moves = bool((second - first).abs().max() > trial.tolerance * first.abs().max())
    device = trial.calls[0].x.device.type

    def under_autocast() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            inside = switches()
            answers = trial.run(trial.adapt(), again)
            _expect_switches(inside)
        _expect_alive(answers, moves, "under autocast to bfloat16")

    def in_bfloat16() -> None:
        half = copy.deepcopy(unwrap(trial.model)).to(torch.bfloat16)
        calls = [c.at(c.x.bfloat16()) if c.x.is_floating_point() else c for c in again]
        try:
            copy.deepcopy(half).eval()(*calls[0].args, **calls[0].kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"The model itself does not run in it: {error}") from error
        adapted = trial.adapt(half)
        answers, state, start = trial.run(adapted, calls), adapted.snapshot(), adapted.learner.start
        weights = [p for p in differing(start, state) if p.startswith("weights.")]
        _expect_alive(answers, False, "in a bfloat16 model")
        expect(bool(weights) or not (moves and state.weights), "bfloat16 weights should move")

    def channels_last() -> None:
        layout = torch.channels_last if trial.calls[0].x.dim() == 4 else torch.channels_last_3d
        calls = [c.at(c.x.contiguous(memory_format=layout)) for c in trial.calls]
        answers = trial.run(trial.adapt(), calls)
        expect_close(answers, plain, "channels-last answers", 10 * trial.tolerance)

    trial.tries("Autocast to bfloat16", under_autocast)
    trial.tries("A bfloat16 model", in_bfloat16)
    if trial.calls[0].x.dim() in (4, 5):
        trial.tries("Channels-last", channels_last)
    rows = trial.calls[0].x.shape[0]
    for what, size in (("A short last batch", rows - rows // 2), ("A batch of 1", 1)):
        adapted = trial.adapt()
        trial.run(adapted)
        before, short = adapted.snapshot(), trial.calls[0].rows(slice(0, size))
        if not trial.tries(what, partial(trial.run, adapted, [short])):
            moved = differing(before, adapted.snapshot())
            expect(not moved, f"{what} was refused, but changed {some(moved)} before")
    _expect_switches(found)


def modes_and_looks_do_not_matter(trial: Trial) -> None:
    """8. Neither modes, nor ``.to(device)``, nor predicting change what it answers."""
    plain, device = trial.run(trial.adapt()), trial.calls[0].x.device
    turns: list[tuple[str, Callable[[Adapted], Any]]] = [
        ("train()", nn.Module.train),
        ("eval()", nn.Module.eval),
        ("to(device)", partial(nn.Module.to, device=device)),
        ("predict()", lambda adapted: logits(adapted, trial.calls[-1], "predict")),
    ]
    for what, f in turns:
        adapted, answers = trial.adapt(), []
        for call in trial.calls:
            f(adapted)
            answers += trial.run(adapted, [call])
        expect_same(answers, plain, f"answers after {what}")


def two_do_not_meet(trial: Trial) -> None:
    """9. Two adapted models over one model, with one method, do not see each other."""
    plain = trial.run(trial.adapt())
    method = copy.deepcopy(trial.method)
    one, other = trial.adapt(method=method), trial.adapt(method=method)
    answers = []
    for call in trial.calls:
        answers += trial.run(one, [call])
        trial.run(other, trial.calls[::-1])
    expect_same(answers, plain, "answers with a second adapted model at work")


def misfits_are_refused(trial: Trial) -> None:
    """10. What cannot work is refused when it is built, a batch that is too small when it comes."""
    if trial.method.adapts != "nothing":
        # Nothing in here can change: what is built must at least change the answer.
        device = trial.calls[0].x.device
        bare, calls = _Bare(), [Call((torch.rand(4, 3, 8, 8, device=device),), {})] * 3
        options = {k: v for k, v in trial.options.items() if k != "source"}
        refused = Trial(trial.method, bare, [c.x for c in calls], options)
        adapted: list[Adapted] = []
        if not refusal(lambda: adapted.append(refused.adapt())):
            answers = refused.run(adapted[0], calls)
            source = refused.run(adapted[0], calls, "source")
            expect(
                not all(map(same, answers, source)),
                f"a model without parameters or norm layers should be refused by a method that "
                f"adapts {trial.method.adapts}, but it was built and silently changes nothing",
            )
    if not refusal(trial.adapt) and (size := trial.method.smallest_batch) > 1:
        built = trial.adapt()
        small = trial.calls[0].rows(slice(0, size - 1))
        trial.must_refuse(f"a batch of {size - 1}", built, partial(logits, built, small))


def no_labels_no_future_no_growth(trial: Trial) -> None:
    """11. Labels never get in, later batches change no earlier answer, memory does not grow."""
    call = trial.calls[0]
    labels = torch.zeros(call.x.shape[0], dtype=torch.int64, device=call.x.device)
    adapted = trial.adapt()
    labelled = Call(call.args, {**call.kwargs, "labels": labels})
    trial.must_refuse("a call with labels=", adapted, partial(logits, adapted, labelled))
    if call.args:
        other = trial.adapt().fit([(call.x, labels)])
        wrong = differing(trial.adapt().fit([call.x]).snapshot(), other.snapshot())
        expect(not wrong, f"labels beside the input should not count, but {some(wrong)} moved")

    held = [logits(adapted, call) for call in trial.calls]
    kept = [answer.clone() for answer in held]
    trial.run(adapted)
    expect_same(held, kept, "earlier answers, once later batches came,")
    before = _bytes(t for _, t in reachable(adapted).values())
    trial.run(adapted, [call.at(call.x.clone()) for _ in range(MANY_STEPS)])
    trial.run(adapted, trial.calls[-1:])  # the last notes are of the same batch as before
    after = _bytes(t for _, t in reachable(adapted).values())
    expect(
        after <= before,
        f"{MANY_STEPS} more steps should hold no more memory, but {before} bytes became {after}",
    )


def exports_plainly(trial: Trial) -> None:
    """12. An exported module is plain, and answers as predict() or by the gap that is told."""
    adapted, call = trial.adapt(reset_every=NEVER), trial.calls[0]
    trial.run(adapted)
    expected = logits(adapted, call, "predict")
    couples = adapted.report().couples

    def check(statistics: Literal["source", "last"] | None) -> None:
        module, gap = adapted.export(*call.args, statistics=statistics, **call.kwargs)
        held = {_storage(t) for t in (*module.parameters(), *module.buffers())}
        shared = [k for k, p in shared_tensors(unwrap(trial.model)).items() if _storage(p) in held]
        expect(not module.training, "an exported module should be in eval mode, but is not")
        expect(not shared, f"an exported module should share nothing, but shares {some(shared)}")
        if adapted.learner.randomness.draws:
            trial.refusals.append("The model draws in eval mode: no two answers are compared.")
            return
        given = call.at(call.x.clone())
        with torch.no_grad():
            answer = adapted.learner.logits_of(module(*given.args, **given.kwargs))
        found = float((answer - expected).abs().max())
        expect(
            gap is not None and abs(found - gap) <= trial.tolerance * float(expected.abs().max()),
            f"an exported module should answer as far from predict() as export() says, {gap}, but "
            f"is {found:.3g} off",
        )
        if not couples:
            expect_close([answer], [expected], "an exported module and predict()", trial.tolerance)

    if couples:
        unsaid = partial(adapted.export, *call.args, **call.kwargs)
        trial.must_refuse("exporting without saying what is frozen", adapted, unsaid)
        for statistics in ("source", "last"):
            trial.tries("Exporting", partial(check, statistics))
    else:
        trial.tries("Exporting", partial(check, None))


LAWS: tuple[Law, ...] = (
    Law(1, "the model is untouched", untouched),
    Law(2, "nothing frozen is duplicated", nothing_duplicated),
    Law(3, "a reset is exact", reset_is_exact),
    Law(4, "a saved state goes on", goes_on_after_saving),
    Law(5, "bad input changes nothing", bad_input_changes_nothing),
    Law(6, "episodes are independent", episodes_are_independent),
    Law(7, "it works where it is called", works_where_it_is_called),
    Law(8, "modes and looks do not matter", modes_and_looks_do_not_matter),
    Law(9, "two do not meet", two_do_not_meet),
    Law(10, "misfits are refused", misfits_are_refused),
    Law(11, "no labels, no future, no growth", no_labels_no_future_no_growth),
    Law(12, "an export is plain", exports_plainly),
)

# These say something about a model that the method does not fit, too.
_OF_ANY_MODEL = (untouched, misfits_are_refused)


class _Bare(nn.Module):
    """Logits without a single parameter or buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _expect_switches(before: dict[str, Any]) -> None:
    after = switches()
    moved = [f"{k} from {v} to {after[k]}" for k, v in before.items() if after[k] != v]
    expect(not moved, f"torch's modes should be as they were found, but it changed {some(moved)}")


def _expect_alive(answers: list[Tensor], moves: bool, where: str) -> None:
    expect(
        all(bool(t.isfinite().all()) for t in answers),
        f"answers {where} should be finite, but are not",
    )
    expect(
        not moves or not same(*answers),
        f"two answers to one batch {where} should differ, as elsewhere: the weights move unseen",
    )


def _spoiled(x: Tensor, rows: slice) -> Tensor:
    x = x.clone()
    x[rows].reshape(x[rows].shape[0], -1)[:, 0] = torch.nan
    return x


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
