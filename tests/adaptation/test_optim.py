"""The update rules against torch.optim, and what they do that torch.optim does not."""

import pytest
import torch

from testtime.adaptation.optim import SGD, Adam, AdamW

RULES = [
    (SGD(0.1), torch.optim.SGD, {"lr": 0.1}),
    (SGD(0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (
        SGD(0.1, momentum=0.8, nesterov=True, weight_decay=0.03),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.03},
    ),
    (Adam(0.01), torch.optim.Adam, {"lr": 0.01}),
    (
        Adam(0.01, betas=(0.7, 0.99), eps=1e-6, weight_decay=0.05),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.7, 0.99), "eps": 1e-6, "weight_decay": 0.05},
    ),
    (AdamW(0.01), torch.optim.AdamW, {"lr": 0.01}),
]


def steps(rule, weights, grads, when=None):
    slots = rule.slots(weights)
    for grad in grads:
        weights, slots = rule.update(weights, grad, slots, when)
    return weights, slots


def case(dtype, count=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights = {"a": draw(7), "b": draw(3, 4)}
    return weights, [{k: draw(*w.shape) for k, w in weights.items()} for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rule", "peer", "options"), RULES, ids=str)
def test_equal_to_torch(rule, peer, options, dtype):
    weights, grads = case(dtype)
    theirs = {k: w.clone().requires_grad_() for k, w in weights.items()}
    optimizer = peer(theirs.values(), foreach=False, **options)
    for grad in grads:
        for name, weight in theirs.items():
            weight.grad = grad[name].clone()
        optimizer.step()
    ours, _ = steps(rule, weights, grads)
    for name, weight in theirs.items():
        gap = (ours[name] - weight).abs().max() / weight.abs().max()
        bar = 0 if isinstance(rule, SGD) else 6e-8 if dtype == torch.float32 else 1e-15
        assert gap <= bar, f"{name} differs by {gap:.2g}"


@pytest.mark.parametrize(("rule", "_peer", "_options"), RULES, ids=str)
def test_a_closed_gate_is_a_skipped_step(rule, _peer, _options):
    weights, grads = case(torch.float32)
    slots = rule.slots(weights)
    gated, gated_slots = rule.update(weights, grads[0], slots, torch.tensor(False))
    for name, weight in weights.items():
        assert torch.equal(gated[name], weight)
    for slot, held in slots.items():
        assert all(torch.equal(gated_slots[slot][k], tensor) for k, tensor in held.items())
    after, _ = rule.update(gated, grads[1], gated_slots, torch.tensor(True))
    alone, _ = rule.update(weights, grads[1], slots)
    assert all(torch.equal(after[name], alone[name]) for name in weights)


@pytest.mark.parametrize(("rule", "_peer", "_options"), RULES, ids=str)
def test_a_tensor_without_gradient_is_left_alone(rule, _peer, _options):
    weights, grads = case(torch.float32)
    after, _ = steps(rule, weights, [{"a": grad["a"]} for grad in grads])
    assert torch.equal(after["b"], weights["b"])
    assert not torch.equal(after["a"], weights["a"])


@pytest.mark.parametrize(("rule", "_peer", "_options"), RULES, ids=str)
def test_nothing_is_written_in_place(rule, _peer, _options):
    weights, grads = case(torch.float32)
    before = {name: weight.clone() for name, weight in weights.items()}
    steps(rule, weights, grads)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize(("rule", "_peer", "_options"), RULES, ids=str)
def test_stacked_samples_step_as_they_would_alone(rule, _peer, _options):
    weights, grads = case(torch.float64, count=3)
    stacked = {name: weight.expand(2, *weight.shape) for name, weight in weights.items()}
    slots = {
        s: {k: t.expand(2, *t.shape) for k, t in h.items()} for s, h in rule.slots(weights).items()
    }
    when = torch.tensor([True, False])
    both = {name: torch.stack([grads[0][name], grads[1][name]]) for name in weights}
    after, _ = rule.update(stacked, both, slots, when)
    alone, _ = rule.update(weights, grads[0], rule.slots(weights))
    for name, weight in weights.items():
        assert torch.equal(after[name][0], alone[name])
        assert torch.equal(after[name][1], weight)
