"""TTT with rotations, and the network with two heads that it learns by."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import testtime as tt
from testtime.adaptation import views
from testtime.models import ResNetGN, rotation_head
from testtime.models.tiny import randomised, tiny
from testtime.train.joint import joint_step, rotations

KINDS = ["groupnorm", "batchnorm2d"]


def headed(kind, classes=4):
    """Return a tiny network with a second head from its second convolution on, and batches."""
    model, batches = tiny(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = randomised(
            nn.Sequential(
                nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
            )
        )
    return tt.TwoHeads(model, head, branch="3").eval(), batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_law(law, kind):
    law(tt.TTT(views=2, optimizer=tt.SGD(lr=0.1)), *headed(kind))


@pytest.mark.parametrize("number", [3, 5, 6])
def test_law_with_a_threshold_and_several_steps(number):
    (law,) = (law for law in tt.LAWS if law.number == number)
    law(tt.TTT(views=2, steps=2, threshold=0.5, optimizer=tt.SGD(lr=0.1)), *headed("batchnorm2d"))


def test_only_the_shared_part_and_the_head_adapt():
    model, batches = headed("groupnorm")
    adapted = tt.adapt(model, tt.TTT(views=2))
    names = adapted.report().adapts
    assert names == (
        *(f"net.{k}" for k in ("0.weight", "0.bias", "1.weight", "1.bias")),
        *(f"head.{k}" for k, _ in model.head.named_parameters()),
    )
    adapted(batches[0])
    state, start = adapted.learner.state.weights, adapted.learner.start.weights
    still = [k for k in names if torch.equal(state[k], start[k])]
    assert set(still) <= {"head.0.bias"}  # before a BatchNorm: its gradient is rounding
    without = tt.adapt(model, tt.TTT(views=2, head=False))
    assert without.report().adapts == names[:4]
    without(batches[0])
    moved = without.learner.state.buffers
    assert torch.equal(moved["head.1.running_mean"], model.head[1].running_mean)


def test_a_step_is_what_a_loop_over_views_gives():
    model, batches = headed("groupnorm")
    x = batches[0][:2]
    adapted = tt.adapt(model, tt.TTT(views=3, optimizer=tt.SGD(lr=0.5), statistics="source"))
    drawn = {}
    draw = adapted.learner.draw

    def keep(name, make):
        drawn[name] = draw(name, make)
        return drawn[name]

    adapted.learner.draw = keep
    answer = adapted(x)
    assert drawn["views"].shape == (3, 2, 3, 8, 8)
    twin = copy.deepcopy(model)
    losses = [
        F.cross_entropy(twin.task(view.rot90(int(k), (1, 2))[None]), k[None])
        for image, labels in zip(drawn["views"], drawn["labels"], strict=True)
        for view, k in zip(image, labels, strict=True)
    ]
    loss = torch.stack(losses).mean()
    assert torch.allclose(adapted.notes["loss"][0], loss, atol=1e-6)
    loss.backward()
    with torch.no_grad():
        for name in twin.shared():
            parameter = twin.get_parameter(name)
            parameter -= 0.5 * parameter.grad
        assert torch.allclose(answer, twin(x), atol=1e-5)


def test_a_sure_image_changes_nothing_not_even_statistics():
    model, batches = headed("batchnorm2d")
    adapted = tt.adapt(model, tt.TTT(views=2, threshold=1e-6))
    start = adapted.snapshot()
    assert torch.allclose(adapted(batches[0]), model(batches[0]), atol=1e-6)
    state = adapted.snapshot()
    for path, tensor in start.tensors().items():
        if path != "generator":
            assert torch.equal(tensor, state.tensors()[path]), path
    assert 0 < float(adapted.notes["upright"][0]) < 1


def test_it_costs_what_it_says():
    model, batches = headed("groupnorm")
    for method in (tt.TTT(views=3), tt.TTT(views=2, threshold=0.9), tt.TTT(views=2, steps=2)):
        adapted = tt.adapt(model, method)
        adapted(batches[0])  # looks of the first batch included
        before, rows = adapted.report(), len(batches[1])
        adapted(batches[1])
        after, (forward, backward) = adapted.report(), method.cost
        answers = method.steps - 1  # one answer, however many steps
        assert after.forwards - before.forwards == rows * (forward * method.steps - answers)
        assert after.backwards - before.backwards == rows * backward * method.steps


def test_a_state_of_another_head_is_refused(tmp_path):
    model, batches = headed("groupnorm")
    adapted = tt.adapt(model, tt.TTT(views=2))
    adapted(batches[0])
    adapted.save(tmp_path / "state")
    tt.adapt(model, tt.TTT(views=2)).load(tmp_path / "state")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head[4].bias.add_(1)
    with pytest.raises(ValueError, match=r"another model: 1 of .*'head\.4\.bias'"):
        tt.adapt(other, tt.TTT(views=2)).load(tmp_path / "state")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.adapt(tiny("groupnorm")[0], "ttt"), "predicts rotations.*model is Sequential"),
        (lambda: tt.adapt(headed("groupnorm")[0], "ttt")(torch.rand(2, 3, 8, 6)), "square images"),
        (lambda: tt.TTT(views=0), "views=0"),
        (lambda: tt.TTT(statistics="mixed"), "statistics='mixed'"),
        (lambda: tt.TwoHeads(tiny("groupnorm")[0], nn.Identity(), "layer3"), "no such module"),
        (lambda: tt.TwoHeads(tiny("groupnorm")[0], nn.Identity(), "0"), "would share nothing"),
    ],
)
def test_what_cannot_work_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


class SkipsItsBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_features_stop_at_the_branch():
    model = headed("batchnorm2d")[0].train()
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.features(x), model.net[:3](x))
    assert int(model.net[1].num_batches_tracked) == 2
    assert int(model.net[4].num_batches_tracked) == 0
    assert not model.net[3]._forward_pre_hooks
    with pytest.raises(ValueError, match="never calls its module 'unused'"):
        tt.TwoHeads(SkipsItsBranch(), nn.Identity(), "unused").features(torch.rand(1, 2))


def test_the_doctor_knows_what_fits_two_heads():
    assert "ttt" in tt.doctor(*headed_with_one_batch()).fitting
    assert "second head" in str(tt.doctor(tiny("groupnorm")[0]))


def headed_with_one_batch():
    model, batches = headed("groupnorm")
    return model, batches[0]


def test_crops_and_turns_are_those_of_a_loop():
    x = torch.rand(3, 2, 6, 6)
    top, left, flip = views.crop_draws(x, 5, 2, torch.Generator().manual_seed(0))
    crops = views.crops(x, top, left, flip, 2)
    padded = F.pad(x, (2, 2, 2, 2))
    assert {*top.flatten().tolist(), *left.flatten().tolist()} <= set(range(5))
    assert flip.any()
    assert not flip.all()
    for v in range(5):
        for b in range(3):
            r, c = int(top[v, b]), int(left[v, b])
            crop = padded[b, :, r : r + 6, c : c + 6]
            assert torch.equal(crops[v, b], crop.flip(2) if flip[v, b] else crop)
    quarters = torch.tensor([3, 0, 1])
    for b, k in enumerate(quarters):
        assert torch.equal(views.turned(x, quarters)[b], x[b].rot90(int(k), (1, 2)))


def test_the_published_head_and_its_joint_training():
    torch.manual_seed(0)
    network = ResNetGN(8, num_classes=3, width=8)
    for branch, shared in (("layer3", 13), ("fc", 21)):
        model = tt.TwoHeads(network, rotation_head(network, branch), branch)
        x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        made = [joint_step(model, optimizer, x, y, rotations(x, "expand")) for _ in range(6)]
        assert made[0].task_logits.shape == (16, 4)
        assert made[-1].loss < made[0].loss
        assert len(model.shared()) == shared
        tt.adapt(model, tt.TTT(views=2))(x)
    assert set(rotations(x, "rand", torch.Generator().manual_seed(1)).tolist()) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="5 rotations for 4 images"):
        joint_step(model, optimizer, x, y, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="use 'expand' or 'rand'"):
        rotations(x, "all")
    with pytest.raises(ValueError, match="layer3 or fc, found 'layer2'"):
        rotation_head(network, "layer2")


def test_batch_norm_in_the_place_of_group_norm():
    network = ResNetGN(8, width=4, groups=0)
    assert not [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert isinstance(network.layer2[0].bn1, nn.BatchNorm2d)
