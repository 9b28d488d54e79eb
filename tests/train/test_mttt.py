"""The outer loop's parts; their numbers are replayed in tests/parity."""

import pytest
import torch
from torch import nn

from testtime.models import ViT
from testtime.train.mttt import (
    OfficialAdam,
    mixup,
    mixup_weights,
    parameter_groups,
    warmup_cosine,
)


def test_with_a_single_precision_moment_it_would_be_adamw():
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(50))
    two = nn.Parameter(one.detach().clone())
    ours = OfficialAdam([one], lr=0.01, clip=None)
    theirs = torch.optim.AdamW([two], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        one.grad = torch.randn(50)
        two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    # The old moment is rounded to eight bits, and so is its decay.
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)
    assert not torch.equal(one, two)


def test_the_joint_norm_is_clipped_without_epsilon():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    idle = nn.Parameter(torch.ones(2))
    optimizer = OfficialAdam([{"params": [a, idle]}, {"params": [b]}], lr=1.0, clip=1.0)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[a]["exp_avg_sq"], torch.tensor([0.36e-3, 0.0]))
    torch.testing.assert_close(optimizer.state[b]["exp_avg_sq"], torch.tensor([0.0, 0.64e-3]))
    assert torch.equal(idle, torch.ones(2))  # nor is it decayed
    assert optimizer.state[a]["exp_avg"].dtype == torch.bfloat16


def test_it_goes_on_from_a_saved_state_to_the_bit():
    torch.manual_seed(0)
    grads = [torch.randn(5) for _ in range(6)]

    def run(p, optimizer, grads):
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(5))
    run(whole, OfficialAdam([whole]), grads)
    first = nn.Parameter(torch.ones(5))
    optimizer = OfficialAdam([first])
    run(first, optimizer, grads[:3])
    again = nn.Parameter(first.detach().clone())
    resumed = OfficialAdam([again])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[again]["exp_avg"].dtype == torch.bfloat16
    run(again, resumed, grads[3:])
    assert torch.equal(again, whole)


def test_groups():
    model = ViT("mttt-linear", image_size=32, patch_size=8, dim=24, depth=1, num_heads=3)
    decayed, spared = parameter_groups(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"])
    with pytest.raises(TypeError, match="Linear has no no_weight_decay"):
        parameter_groups(nn.Linear(2, 2))


def test_the_schedule():
    assert warmup_cosine(0, 100, 10) == 0
    assert warmup_cosine(5, 100, 10) == 0.5
    assert warmup_cosine(10, 100, 10) == 1
    assert warmup_cosine(55, 100, 10) == pytest.approx(0.5)
    assert warmup_cosine(100, 100, 10) == warmup_cosine(200, 100, 10) == pytest.approx(0)
    assert warmup_cosine(0, 100, 0) == 1


def test_mixup_weights():
    draws = [mixup_weights(0.2, torch.Generator().manual_seed(i)) for i in range(400)]
    own = torch.stack(draws)[:, 0]
    assert torch.equal(draws[0], mixup_weights(0.2, torch.Generator().manual_seed(0)))
    assert (own >= 0.5).all()
    torch.testing.assert_close(torch.stack(draws).sum(1), torch.ones(400))
    # Of the larger of a symmetric Beta(0.2, 0.2).
    want = torch.distributions.Beta(0.2, 0.2).sample((20_000,))
    assert own.mean() == pytest.approx(float(torch.maximum(want, 1 - want).mean()), abs=0.02)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: OfficialAdam([nn.Parameter(torch.ones(1))], lr=-1), "lr=-1"),
        (lambda: OfficialAdam([nn.Parameter(torch.ones(1))], clip=0), "clip is 0"),
        (lambda: warmup_cosine(0, 10), "warmup_steps is 10000 of 10"),
        (lambda: mixup_weights(0.0), "alpha is 0.0"),
        (lambda: mixup(torch.ones(2, 3), torch.ones(2), torch.ones(2)), "soft labels"),
        (lambda: mixup(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3)), "two weights"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
