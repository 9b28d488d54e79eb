"""Law 12: what was learned, as a plain module, and through ONNX and torch.export."""

import pytest
import torch
from torch import nn

import testtime as tt

VARIANTS = [
    tt.Tent(),
    tt.BNAdapt(),
    tt.BNAdapt(variant="mix", prior=0.3),
    tt.BNAdapt(variant="cumulative"),
    tt.BNAdapt.preset("official"),
]


def batch_norm_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return net.eval()


def group_norm_net():
    net = batch_norm_net()
    net[1] = nn.GroupNorm(4, 8)
    return net


@pytest.fixture
def x():
    return torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def learned(model, method, x):
    adapted = tt.adapt(model, method)
    for _ in range(3):
        adapted(x)
    return adapted


def test_where_rows_do_not_couple_it_answers_as_predict(x):
    for model, method in [
        (group_norm_net(), tt.Tent()),
        (batch_norm_net(), tt.BNAdapt(variant="moving")),
        (batch_norm_net(), tt.Source()),
    ]:
        adapted = learned(model, method, x)
        module, gap = adapted.export(x)
        assert not module.training
        assert gap is not None
        assert gap <= 1e-6
        assert torch.allclose(module(x), adapted.predict(x), atol=1e-6)
        assert adapted.export().gap is None


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_the_last_batchs_statistics_answer_that_batch_alike(method, x):
    adapted = learned(batch_norm_net(), method, x)
    assert adapted.export(x, statistics="last").gap < 1e-5


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_what_is_frozen_must_be_said(method, x):
    adapted = learned(batch_norm_net(), method, x)
    for call in (lambda: adapted.export(), lambda: adapted.export(x)):
        with pytest.raises(ValueError, match=r"depend on the batch .* Say what to freeze"):
            call()


def test_the_gap_to_the_sources_statistics_is_measured(x):
    adapted = learned(batch_norm_net(), tt.Tent(), x)
    module, gap = adapted.export(x, statistics="source")
    assert gap == pytest.approx(float((module(x) - adapted.predict(x)).abs().max()))
    assert gap > 0.01
    source = batch_norm_net()
    assert torch.equal(module[1].running_mean, source[1].running_mean)
    assert not torch.equal(module[1].weight, source[1].weight)


def test_before_any_batch_it_is_not_known_whether_rows_couple(x):
    with pytest.raises(ValueError, match="Without a batch it is not known"):
        tt.adapt(batch_norm_net(), tt.Tent()).export()
    adapted = tt.adapt(batch_norm_net(), tt.Tent())
    assert adapted.export(x, statistics="last").gap < 1e-5


def test_it_shares_nothing(x):
    model = group_norm_net()
    adapted = learned(model, tt.Tent(), x)
    before, weights = adapted.predict(x), [p.clone() for p in model.parameters()]
    module = adapted.export().module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(adapted.predict(x), before)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_through_torch_export(x):
    adapted = learned(batch_norm_net(), tt.Tent(), x)
    module = adapted.export(x, statistics="last").module
    program = torch.export.export(module, (x,))
    assert torch.allclose(program.module()(x), adapted.predict(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_through_onnx(x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    adapted = learned(batch_norm_net(), tt.Tent(), x)
    module = adapted.export(x, statistics="last").module
    torch.onnx.export(module, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(answer), adapted.predict(x), atol=1e-4)
