"""The laws hold for every method on a network of every kind, and each of them can be broken."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation import adapted as adapted_module
from testtime.adaptation import select
from testtime.adaptation.contract import Law
from testtime.adaptation.methods import METHODS
from testtime.adaptation.objectives import entropy
from testtime.adaptation.optim import SGD
from testtime.models.tiny import KINDS, tiny

LAW = {law.number: law for law in tt.LAWS}
# As they come, these look at 32 views of each image, which show nothing that two do not.
# Of tiny networks' unsure predictions these methods would keep none, and nothing would move.
KEEPS_ALL = {"margin": 1.0, "redundancy": 1.0, "optimizer": SGD(lr=1.0, momentum=0.9)}
TRIED = {
    "cotta": tt.CoTTA(views=2),
    "deyo": tt.DeYO(margin=None, plpd=None, optimizer=SGD(lr=1.0, momentum=0.9)),
    "eata": tt.EATA(strength=1.0, **KEEPS_ALL),
    "eta": tt.ETA(**KEEPS_ALL),
    "rdumb": tt.RDumb(reset_every=2, **KEEPS_ALL),
    "memo": tt.MEMO(views=2),
    # It learns after as many images as its bank holds, which are more than there are.
    "rotta": tt.RoTTA(capacity=5, every=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_law(law, method, kind):
    law(TRIED.get(method, method), *tiny(kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["batchnorm2d", "groupnorm", "transformer"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_law_on_a_gpu(law, method, kind):
    model, batches = tiny(kind)
    law(method, model.cuda(), [batch.cuda() for batch in batches])


@pytest.mark.parametrize("kind", ["batchnorm2d", "transformer"])
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_law_in_double(law, kind):
    model, batches = tiny(kind)
    law(tt.Tent(steps=2), model.double(), [x.double() for x in batches])


# Methods that each break one law. All descend the entropy, as TENT does, or do nothing.


@dataclass(frozen=True)
class Good(tt.Method):
    optimizer: SGD = SGD(lr=0.1)
    adapts = "the scales and shifts of normalisation layers"

    def select(self, module):
        return select.norm_affine(module)

    def loss(self, net, x, memory, draw):
        logits = net(x)
        return tt.Objective(loss=entropy(logits).mean(), logits=logits)


@dataclass(frozen=True)
class WritesThroughData(Good):
    def configure(self, module):
        next(module.parameters()).data.mul_(2)
        return module


@dataclass(frozen=True)
class DrawsGlobally(Good):
    def loss(self, net, x, memory, draw):
        return super().loss(net, x + 0.01 * torch.rand_like(x), memory, draw)


@dataclass(frozen=True)
class CopiesFrozen(Good):
    def configure(self, module):
        module[0] = copy.deepcopy(module[0])
        return module


@dataclass(frozen=True)
class HoldsMore(Good):
    def configure(self, module):
        module.cache = torch.zeros(10_000)
        return module


@dataclass(frozen=True)
class Remembers(Good):
    """Hides state on itself: a step counts for more each time."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "seen", [])

    def loss(self, net, x, memory, draw):
        self.seen.append(None)
        objective = super().loss(net, x, memory, draw)
        objective.logits = objective.logits * len(self.seen)
        return objective


@dataclass(frozen=True)
class WritesTheState(Good):
    """Writes past the guard against batches that are not finite."""

    def step(self, learner, x):
        for weight in learner.state.weights.values():
            weight.data.add_(0.01)
        return learner.default_step(x)


@dataclass(frozen=True)
class SurvivesEpisodes(Good):
    """What outlives a reset carries over from one episode to the next."""

    survives: tuple[str, ...] = ("memory",)

    def begin(self, net, x, draw):
        return {"count": torch.ones(())}

    def loss(self, net, x, memory, draw):
        objective = super().loss(net, x, memory, draw)
        objective.memory = {"count": memory["count"] + 1}
        objective.logits = objective.logits * memory["count"]
        return objective


@dataclass(frozen=True)
class FlipsASwitch(Good):
    def loss(self, net, x, memory, draw):
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return super().loss(net, x, memory, draw)


class Moody(nn.Module):
    """Answers more loudly each time it is put into train mode."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.trained = inner, 0

    def train(self, mode=True):
        self.trained += mode
        return super().train(mode)

    def forward(self, x):
        return self.inner(x) * (1 + self.trained)


@dataclass(frozen=True)
class WrapsMoody(Good):
    def configure(self, module):
        return Moody(module)


@dataclass(frozen=True)
class Silent(tt.Method):
    """Finds nothing, says nothing."""

    adapts = "the statistics of BatchNorm layers"


@dataclass(frozen=True)
class Hoards(Good):
    seen: list = field(default_factory=list, compare=False)

    def loss(self, net, x, memory, draw):
        self.seen.append(x)
        return super().loss(net, x, memory, draw)


@dataclass(frozen=True)
class AnswersWithItsState(Good):
    """The answer is memory itself, which the next batch writes over."""

    def begin(self, net, x, draw):
        return {"last": torch.zeros(x.shape[0], 5)}

    def loss(self, net, x, memory, draw):
        objective = super().loss(net, x, memory, draw)
        objective.memory, objective.logits = {"last": objective.logits}, memory["last"]
        return objective


@pytest.mark.parametrize(
    ("number", "method", "words"),
    [
        (1, WritesThroughData(), "weight changed"),
        (1, DrawsGlobally(), "random generators"),
        (2, CopiesFrozen(), "should share the user's storage, but there are copies"),
        (2, HoldsMore(), "bytes"),
        (3, Remembers(), "second pass"),
        (4, Remembers(), "after loading"),
        (5, WritesTheState(), "NaN"),
        (6, SurvivesEpisodes(), "another order"),
        (6, Remembers(), "another order"),
        (7, FlipsASwitch(), "cudnn benchmark"),
        (8, WrapsMoody(), "after train()"),
        (9, Remembers(), "second adapted model"),
        (10, Silent(), "silently changes nothing"),
        (11, Hoards(), "no more memory"),
        (11, AnswersWithItsState(), "earlier answers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tt.Method) else None,
)
def test_each_law_can_be_broken(number, method, words):
    model, batches = tiny("groupnorm")
    try:
        with pytest.raises(tt.LawBroken, match=f"Law {number}, ") as caught:
            LAW[number](method, model, batches)
    finally:
        torch.backends.cudnn.benchmark = False
    assert words in str(caught.value)


@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_the_sound_one_of_them_breaks_none(law):
    law(Good(), *tiny("groupnorm"))


@pytest.mark.parametrize(("kind", "words"), [("groupnorm", "says"), ("batchnorm2d", "says")])
def test_an_export_that_answers_otherwise_breaks_law_12(kind, words, monkeypatch):
    whole = adapted_module.export

    def altered(*args):
        exported = whole(*args)
        with torch.no_grad():
            for parameter in exported.module.parameters():
                parameter.mul_(1.5)
        return exported

    monkeypatch.setattr(adapted_module, "export", altered)
    with pytest.raises(tt.LawBroken, match=words):
        LAW[12](Good(), *tiny(kind))


def test_what_an_export_cannot_hold_is_refused_and_that_holds():
    @dataclass(frozen=True)
    class Doubles(Good):
        def predict(self, net, x, memory):
            return 2 * net(x)

    (result,) = tt.check_method(Doubles(), *tiny("groupnorm"), laws=[LAW[12]])
    assert result.passed
    assert "answers otherwise than its network's forward" in result.detail


# A model can break a law as well as a method can.


class Drifts(nn.Module):
    """Counts its own calls where nobody looks, and answers by the count."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = tiny("groupnorm")[0], []

    def forward(self, x):
        self.calls.append(None)
        return self.inner(x) * len(self.calls)


@pytest.mark.parametrize("number", [3, 6])
def test_a_model_can_break_a_law(number):
    with pytest.raises(tt.LawBroken):
        LAW[number]("tent", Drifts(), tiny("groupnorm")[1])


def test_a_crash_is_no_refusal():
    def crash(trial):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(tt.LawBroken, match="refused with a sentence, but failed with RuntimeError"):
        Law(13, "of this test", crash)("tent", *tiny("groupnorm"))


def test_check_method_does_not_stop_at_the_first():
    results = tt.check_method(Remembers(), *tiny("groupnorm"))
    assert [result.law.number for result in results] == [law.number for law in tt.LAWS]
    broken = {result.law.number for result in results if not result.passed}
    assert {3, 4, 6, 9} <= broken
    assert 5 not in broken
    assert str(results[2]).startswith("broken: 3, a reset is exact. a second pass")


def test_check_method_says_what_was_refused():
    refused = {result.law.number: result for result in tt.check_method("bn", *tiny("groupnorm"))}
    assert all(result.passed for result in refused.values())
    assert [number for number, result in refused.items() if result.applies] == [1, 10]
    assert "found 2 Conv2d, 2 GroupNorm, 1 Linear" in refused[3].detail
    [result] = tt.check_method("tent", *tiny("batchnorm1d"), laws=[LAW[7]])
    assert result.applies
    assert result.passed
    assert "A batch of 1 is refused: Tent normalises with" in result.detail


def test_batches_too_few_or_too_small():
    model, batches = tiny("groupnorm")
    for few in (batches[:1], [x[:1] for x in batches]):
        with pytest.raises(ValueError, match="at least two batches of at least two rows"):
            tt.check_method("tent", model, few)
