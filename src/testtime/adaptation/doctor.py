"""Which methods fit a model: what each would change, why the others don't, what is unsafe."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from testtime.adaptation.adapted import Adapted, adapt
from testtime.adaptation.calls import Call, Where
from testtime.adaptation.checks import check_call, check_values
from testtime.adaptation.copy import unwrap
from testtime.adaptation.core import ADVICE
from testtime.adaptation.methods import METHODS
from testtime.adaptation.preprocessing import Preprocessing, declared

# Below this many images a BatchNorm's statistics are too noisy to be sensible (2006.16971).
SENSIBLE_BATCH = 32


@dataclass(frozen=True)
class Finding:
    """What was found for one method.

    Args:
        method: its name.
        fits: whether it works on this model.
        detail: why it does not, or what was seen.
        adapts: names of what would change.
        share: of all parameters, from 0 to 1.
        unsafe: batch sizes to avoid, in words; empty for none.
        changed: largest difference of a logit from the source's after one dry step; none without
            inputs.
    """

    method: str
    fits: bool
    detail: str
    adapts: tuple[str, ...] = ()
    share: float = 0.0
    unsafe: str = ""
    changed: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` found.

    Args:
        findings: one for each method.
        inputs: what is wrong with the inputs; empty if nothing, or if none were given.
        preprocessing: the model's own, in words.
    """

    findings: tuple[Finding, ...]
    inputs: str
    preprocessing: str

    @property
    def fitting(self) -> tuple[str, ...]:
        """The names of the methods that fit."""
        return tuple(f.method for f in self.findings if f.fits)

    def __str__(self) -> str:
        """Return the diagnosis in lines to read."""
        lines = [f"preprocessing: {self.preprocessing}"]
        if self.inputs:
            lines.append(f"INPUTS: {self.inputs}")
        for f in self.findings:
            lines.append(f"{'fits' if f.fits else 'no  '}  {f.method:8} {f.detail}")
            if f.adapts:
                names = ", ".join(f.adapts[:4]) + (" ..." if len(f.adapts) > 4 else "")
                lines.append(f"      changes  {len(f.adapts)} tensors, {f.share:.2%}: {names}")
            if f.unsafe:
                lines.append(f"      unsafe   {f.unsafe}")
        return "\n".join(lines)


def doctor(
    model: nn.Module,
    x: Any = None,
    *,
    logits: Where = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Diagnosis:
    """Return which methods fit a model: each is built and, given inputs, tried on a copy.

    Args:
        model: any module; it is not changed.
        x: a batch: an input, a dict of named arguments, or a sequence that starts with the input;
            none: nothing is run, and only what can be read off the
            model is told.
        logits: where the logits are in the model's output, as for :func:`adapt`.
        mean: of the normalisation outside the model, as for :func:`adapt`.
        std: likewise.

    Example:
        >>> import testtime as tt
        >>> model, images, labels = tt.demo.load()
        >>> "tent" in tt.doctor(model, images[:64]).fitting
        True
    """
    plain = unwrap(model)
    own = declared(plain)
    given = Preprocessing.of(mean, std)
    wrong = ""
    call = None if x is None else Call.of(x)
    if call is not None:
        try:
            check_call(call, plain, 1, "The doctor")
            wrong = check_values(call.x, given, own)
        except (TypeError, ValueError) as error:
            wrong, call = str(error), None
    findings = tuple(
        _examine(name, plain, call, logits=logits, mean=mean, std=std) for name in METHODS
    )
    return Diagnosis(findings, wrong, _words(given, own))


def _words(given: Preprocessing | None, own: Preprocessing | None) -> str:
    if given:
        return f"{given}, as given"
    if own:
        return f"{own}, by the model's own configuration"
    return "unknown: the model does not say; pass mean= and std= if it is outside the model"


def _examine(name: str, model: nn.Module, call: Call | None, **options: Any) -> Finding:
    if METHODS[name]().needs_source:
        return Finding(name, False, "needs source data: adapt(..., source=batches)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _dry_step(adapt(model, name, **options), call)
    except (TypeError, ValueError) as error:
        return Finding(name, False, str(error).removesuffix(ADVICE))
    except Exception as error:  # the model's own, of any kind
        return Finding(name, False, f"the model failed with {type(error).__name__}: {error}")


def _dry_step(adapted: Adapted, call: Call | None) -> Finding:
    report, kind = adapted.report(), adapted.method.adapts
    found = partial(Finding, adapted.method.name, adapts=report.adapts, share=report.share)
    if call is None:
        return found(True, f"adapts {kind}; not run, for there are no usable inputs")

    def logits(f: Callable[..., Any]) -> Tensor:
        return adapted.learner.logits_of(f(*call.args, **call.kwargs))

    before = logits(adapted.predict if adapted.method.optimizer else adapted.source)
    logits(adapted)
    changed = float((logits(adapted.predict) - before).abs().max())
    if kind != "nothing" and not changed:
        return found(False, f"adapts {kind}, but one step on these inputs changed no answer")
    detail = f"adapts {kind}: one step moved logits by up to {changed:.3g}"
    return found(True, detail, unsafe=_unsafe(adapted, call), changed=changed)


def _unsafe(adapted: Adapted, call: Call) -> str:
    if not adapted.report().couples:
        return ""
    words = f"batches under {SENSIBLE_BATCH}, for the answer rests on the batch's statistics"
    try:
        one = call.rows(slice(0, 1))
        adapted.predict(*one.args, **one.kwargs)
    except ValueError:
        return f"{words}; a batch of 1 is refused"
    return words
