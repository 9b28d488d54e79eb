"""What a model takes and gives: every kind of output comes back as the model's own kind."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from testtime.models.tiny import randomised, tiny

MODEL, BATCHES = tiny("groupnorm")
Pair = namedtuple("Pair", ["features", "scores"])


@dataclass
class Answer:
    logits: Tensor
    features: Tensor
    note: str = "kept"


class Giving(nn.Module):
    """The tiny network with features beside the logits, in a container."""

    def __init__(self, pack):
        super().__init__()
        self.net, self.pack = tiny("groupnorm")[0], pack

    def forward(self, x):
        features = self.net[:-1](x)
        return self.pack(self.net[-1](features), features)


def second(output):
    return output[1]


# how to pack, where the logits are said to be, how to take logits and features out of the answer
CONTAINERS = {
    "tuple": (lambda z, f: (z, f), 0, lambda o: (o[0], o[1])),
    "tuple_from_behind": (lambda z, f: (f, z), -1, lambda o: (o[1], o[0])),
    "function": (lambda z, f: (f, z), second, lambda o: (o[1], o[0])),
    "list": (lambda z, f: [f, z], 1, lambda o: (o[1], o[0])),
    "namedtuple": (lambda z, f: Pair(f, z), "scores", lambda o: (o.scores, o.features)),
    "namedtuple_index": (lambda z, f: Pair(f, z), 1, lambda o: (o.scores, o.features)),
    "dict": (
        lambda z, f: {"logits": z, "features": f, "name": "x"},
        None,
        lambda o: (o["logits"], o["features"]),
    ),
    "dict_key": (lambda z, f: {"z": z, "f": f}, "z", lambda o: (o["z"], o["f"])),
    "ordered": (lambda z, f: OrderedDict(f=f, z=z), "z", lambda o: (o["z"], o["f"])),
    "dataclass": (Answer, None, lambda o: (o.logits, o.features)),
    "nested": (
        lambda z, f: {"out": (z, [f])},
        lambda o: o["out"][0],
        lambda o: (o["out"][0], o["out"][1][0]),
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_laws(law, kind):
    pack, where, _ = CONTAINERS[kind]
    law("tent", Giving(pack), BATCHES, logits=where)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_kind_logits_and_the_rest(kind):
    pack, where, take = CONTAINERS[kind]
    model, plain = Giving(pack), tt.adapt(MODEL, "tent")
    adapted = tt.adapt(model, "tent", logits=where)
    for x in BATCHES:
        output, answer = adapted(x), plain(x)
        logits, features = take(output)
        assert type(output) is type(model(x))
        assert torch.equal(logits, answer)
        assert not logits.requires_grad
        assert not features.requires_grad
    looked = take(adapted.predict(x))
    assert torch.equal(looked[0], plain.predict(x))
    assert torch.allclose(take(adapted.source(x))[1], model.net[:-1](x))


@pytest.mark.parametrize("many", ["vmap", "loop"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_episodes_of_samples_give_the_rest_too(kind, many):
    pack, where, take = CONTAINERS[kind]
    method = tt.Tent(steps=2, optimizer=tt.SGD(lr=0.1))
    x = BATCHES[0]
    options = {"episodic": "sample", "many": many}
    output = tt.adapt(Giving(pack), method, logits=where, **options)(x)
    logits, features = take(output)
    assert type(output) is type(pack(x, x))
    plain = tt.adapt(MODEL, method, **options)(x)
    assert torch.allclose(logits, plain, rtol=1e-5, atol=1e-6)
    assert features.shape == (6, 8)
    rows = [
        take(tt.adapt(Giving(pack), method, logits=where, **options)(row)) for row in x.split(1)
    ]
    assert torch.allclose(features, torch.cat([row[1] for row in rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"episodic": "sample"}], ids=["stream", "sample"])
def test_a_function_that_computes_the_logits_gives_them_alone(options):
    model = Giving(lambda z, f: (z, f))
    adapted = tt.adapt(model, "tent", logits=lambda output: output[0] * 2, **options)
    answer = adapted(BATCHES[0])
    assert torch.allclose(answer, 2 * model(BATCHES[0])[0], atol=1e-6)


class Dense(nn.Module):
    """Logits for every pixel."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("law", tt.LAWS, ids=str)
def test_dense_logits(law):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomised(Dense())
    law("tent", model, BATCHES)


# Hugging Face


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_labels=5,
        )
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=5,
            max_position_embeddings=16,
        )
    )


def made(factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().eval()


def texts():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        ids = torch.randint(1, 50, (4, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def test_vision_transformer_of_hugging_face():
    model = made(vit)
    results = tt.check_method("tent", model, [{"pixel_values": x} for x in BATCHES])
    assert all(r.passed and r.applies for r in results), "\n".join(map(str, results))
    adapted = tt.adapt(model, "tent")
    output = adapted(BATCHES[0], output_hidden_states=True)
    assert type(output) is type(model(BATCHES[0]))
    assert torch.equal(output.logits, output["logits"])
    assert len(output.hidden_states) == 2


def test_text_classifier_of_hugging_face():
    model, batches = made(bert), texts()
    results = tt.check_method("tent", model, batches)
    assert all(r.passed and r.applies for r in results), "\n".join(map(str, results))
    adapted, padded = tt.adapt(model, "tent"), {k: v[1:, :6] for k, v in batches[0].items()}
    assert torch.allclose(
        adapted.predict(**batches[0]).logits[1:], adapted.predict(**padded).logits, atol=1e-6
    )
    with pytest.raises(ValueError, match="labels must never reach"):
        adapted(**batches[0], labels=torch.zeros(4, dtype=torch.int64))


# Its attention mask is made by a branch on values.
@pytest.mark.filterwarnings("ignore:Samples are adapted one after another. vmap refused")
@pytest.mark.parametrize("many", ["vmap", "loop"])
def test_text_classifier_by_sample(many):
    model, batches = made(bert), texts()
    options = {"episodic": "sample", "many": many}
    method = tt.Tent(steps=2, optimizer=tt.SGD(lr=0.1))
    whole = tt.adapt(model, method, **options)(**batches[0])
    for row in range(4):
        one = {k: v[row : row + 1] for k, v in batches[0].items()}
        alone = tt.adapt(model, method, **options)(**one)
        assert torch.allclose(whole.logits[row], alone.logits[0], rtol=1e-5, atol=1e-6)


# Where there are no logits


@pytest.mark.parametrize(
    ("pack", "where", "words"),
    [
        (lambda z, f: (z, f), None, ("tuple of a float32 tensor [6, 5]", "Pass logits=")),
        (lambda z, f: {"a": z, "b": f}, None, ("dict with 'a', 'b'", "Pass logits=")),
        (lambda z, f: {"a": z}, "b", ("no logits at 'b'", "dict with 'a'")),
        (lambda z, f: (z, f), 4, ("no logits at 4", "tuple of")),
        (lambda z, f: z.argmax(1), None, ("must be a floating tensor", "int64 tensor [6]")),
        (lambda z, f: z.sum(), None, ("must be a floating tensor", "float32 tensor []")),
        (lambda z, f: None, None, ("NoneType", "Pass logits=")),
        (lambda z, f: z, lambda output: output.nothing, ("no logits at", "Pass logits=")),
    ],
)
def test_no_logits(pack, where, words):
    adapted = tt.adapt(Giving(pack), "tent", logits=where)
    with pytest.raises(TypeError) as caught:
        adapted(BATCHES[0])
    for word in words:
        assert word in str(caught.value)
    assert adapted.report().batches == 0
