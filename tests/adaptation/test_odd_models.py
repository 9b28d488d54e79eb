"""Models that are built in unusual ways: each works with TENT, or is refused with a sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import testtime as tt
from testtime.models.tiny import convolutional, randomised, tiny

IMAGES = tiny("batchnorm2d")[1]


def conv(norm=nn.BatchNorm2d):
    return randomised(convolutional(norm))


class Wrapped(nn.Module):
    """A network with something odd around it."""

    def __init__(self):
        super().__init__()
        self.net = conv()

    def forward(self, x):
        return self.net(x)


class Tied(Wrapped):
    """Two norm layers share scale and shift, two convolutions share weights."""

    def __init__(self):
        super().__init__()
        self.net[4].weight, self.net[4].bias = self.net[1].weight, self.net[1].bias
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.weight = self.net[3].weight


class BoundHook(Wrapped):
    """A hook that is a method of the model and keeps features on it."""

    def __init__(self):
        super().__init__()
        self.features = None
        self.net[5].register_forward_hook(self.keep)

    def keep(self, layer, args, output):
        self.features = output

    def forward(self, x):
        return self.net(x) + self.features.mean() * 0.1


class ClosureHook(Wrapped):
    """A hook that is a closure over a list outside the model."""

    def __init__(self):
        super().__init__()
        seen = []
        self.net[5].register_forward_hook(lambda layer, args, output: seen.append(output.shape))


class MovingBuffer(Wrapped):
    """A buffer that every forward moves, in eval mode too, and one that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3)).detach()
        return self.net(x - self.mean[:, None, None]) / self.count


class NewWeightNorm(Wrapped):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.net[3])


class NewSpectralNorm(Wrapped):
    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.net[3])


class OldSpectralNorm(Wrapped):
    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.net[3])


class Referring(Wrapped):
    """Modules that hold references to one another, the parent among them."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self.net, "parent", self)
        object.__setattr__(self.net[0], "sibling", self.net[3])


class PlainTensor(Wrapped):
    """A tensor as a plain attribute, and the model's own copy of a frozen weight."""

    def __init__(self):
        super().__init__()
        self.scale = torch.full((1,), 2.0)

    def forward(self, x):
        return self.net(x) * self.scale


class Detached(Wrapped):
    """Caches a product of its weights without a graph."""

    def __init__(self):
        super().__init__()
        self.cached = (self.net[8].weight * 2).detach()

    def forward(self, x):
        return self.net(x) + F.linear(self.net[:8](x), self.cached)


class FrozenNorms(Wrapped):
    """BatchNorm that stays in eval mode whatever its parents do."""

    def __init__(self):
        super().__init__()
        for layer in self.net:
            if isinstance(layer, nn.BatchNorm2d):
                layer.train = lambda mode=True, layer=layer: layer
                layer.eval()
                layer.requires_grad_(False)


class Noisy(Wrapped):
    """Draws from the global generator in eval mode."""

    def forward(self, x):
        return F.dropout(self.net(x), 0.1, training=True)


class InitiallyTraining(Wrapped):
    """Left in train mode, with dropout."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.net(x))


class BatchNormWithoutStatistics(nn.Sequential):
    def __init__(self):
        super().__init__(conv(lambda n: nn.BatchNorm2d(n, track_running_stats=False)))


class NoAffine(nn.Sequential):
    """One norm layer has nothing to adapt, the other has."""

    def __init__(self):
        super().__init__(conv())
        self[0][1] = nn.BatchNorm2d(8, affine=False)


class InPlace(Wrapped):
    """Writes to its input."""

    def forward(self, x):
        return self.net(x.mul_(2).sub_(0.5))


class Renorm(nn.BatchNorm2d):
    """A norm of the user's own that works on its buffers by hand."""

    def forward(self, x):
        mean = self.running_mean[:, None, None]
        return (x - mean) * self.weight[:, None, None] + self.bias[:, None, None]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.norm, self.head = nn.LSTM(24, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        rows = x.transpose(1, 2).flatten(2).transpose(0, 1)
        return self.head(self.norm(self.lstm(rows)[0][-1]))


def test_built_and_moved_within_inference_mode():
    model, batches = tiny("batchnorm2d")
    with torch.inference_mode():
        adapted = tt.adapt(model, "tent").to("cpu")
        other = tt.adapt(model, "tent")
        other.load_state_dict(adapted.state_dict())
    for one in (adapted, other):
        assert torch.equal(one(batches[0]), tt.adapt(model, "tent")(batches[0]))


def test_group_norm_after_frozen_channels_last_layers():
    model, batches = tiny("groupnorm")
    plain = tt.adapt(model, "tent")(batches[0])
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(tt.adapt(model, "tent")(batches[0]), plain, atol=1e-6)


def in_inference_mode():
    with torch.inference_mode():
        return conv()


def compiled():
    return torch.compile(conv(), backend="aot_eager")


def compiled_within():
    return nn.Sequential(compiled())


WORKING = [
    Tied,
    BoundHook,
    ClosureHook,
    MovingBuffer,
    NewWeightNorm,
    NewSpectralNorm,
    OldSpectralNorm,
    Referring,
    PlainTensor,
    Detached,
    FrozenNorms,
    Noisy,
    InitiallyTraining,
    BatchNormWithoutStatistics,
    NoAffine,
    InPlace,
    Recurrent,
    in_inference_mode,
    compiled,
    compiled_within,
]


def built(factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory()


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm|TorchScript|jit).*")
@pytest.mark.parametrize("factory", WORKING, ids=lambda factory: factory.__name__)
def test_works(factory):
    results = tt.check_method("tent", built(factory), [x.clone() for x in IMAGES])
    broken = [str(result) for result in results if not result.passed]
    assert not broken, "\n".join(broken)
    assert all(result.applies for result in results), results[2].detail


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 64), ("test_vit", 160)])
def test_a_timm_network(name, size):
    import timm

    model = built(lambda: timm.create_model(name, num_classes=5))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(3, 3, size, size, generator=generator) * 2 - 1 for _ in range(2)]
    results = tt.check_method("tent", model, batches)
    assert all(r.passed and r.applies for r in results), "\n".join(map(str, results))


# What cannot work is refused, and the user's model stays as it was.


class OldWeightNorm(Wrapped):
    def __init__(self):
        super().__init__()
        nn.utils.weight_norm(self.net[3])


class CachedProduct(Wrapped):
    def __init__(self):
        super().__init__()
        self.product = self.net[8].weight * 2

    def forward(self, x):
        return F.linear(self.net[:8](x), self.product)


class ListedWeights(nn.Module):
    """Reads its scales from a list, not from the registered parameters."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.listed = [self.norm.weight, self.norm.bias]

    def forward(self, x):
        x = F.layer_norm(x.mean(1), (8,))
        return self.head((x * self.listed[0] + self.listed[1]).mean(1))


class OwnForward(Wrapped):
    """Its forward is a closure over itself, so that a copy runs the original."""

    def __init__(self):
        super().__init__()
        self.forward = lambda x: self.net(x)


class Reaching(Wrapped):
    """A hook that reaches the original's BatchNorm layer, left in train mode."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(8)
        self.net[5].register_forward_hook(lambda layer, args, output: self.other(output))


def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))


def scripted():
    return torch.jit.script(nn.Sequential(nn.LayerNorm(8), nn.Flatten(), nn.Linear(192, 5)))


def traced():
    return torch.jit.trace(conv().eval(), IMAGES[0])


def parallel():
    return nn.DataParallel(conv())


def distributed():
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    return model


def compiled_parallel():
    return torch.compile(nn.DataParallel(conv()), backend="aot_eager")


def parallel_within():
    return nn.Sequential(nn.DataParallel(conv()))


@pytest.mark.filterwarnings("ignore:.*(weight_norm|TorchScript|jit|do not influence).*")
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (OldWeightNorm, ("computed tensors", "net.3.weight")),
        (CachedProduct, ("product", "buffers")),
        (ListedWeights, ("influences this model's answer", "registered parameters")),
        (OwnForward, ("influences this model's answer",)),
        (Reaching, ("other.running_mean", "closure")),
        (lazy, ("0.weight", "lazy module")),
        (scripted, ("ScriptModule",)),
        (traced, ("ScriptModule",)),
        (parallel, ("DataParallel", "model.module")),
        (distributed, ("DistributedDataParallel", "model.module")),
        (compiled_parallel, ("DataParallel", "model.module")),
        (parallel_within, ("'0' in the model", "DataParallel")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused(factory, words):
    model = built(factory)
    before = {} if factory is lazy else {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        tt.adapt(model, "tent")(IMAGES[0])
    for word in words:
        assert word in str(caught.value)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
