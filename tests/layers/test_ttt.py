"""TTT layers: padding changes nothing, any split is the whole, caches are values."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.ops.cases import error
from testtime.layers.cache import LayerCache
from testtime.layers.rows import Rows
from testtime.layers.ttt import TTTMLP, TTTLayer, TTTLinear

LAYERS = {"linear": TTTLinear, "mlp": TTTMLP}
BACKBONES = {"transformer": (False, False), "mamba": (True, True)}
every = pytest.mark.parametrize(
    ("kind", "backbone"), [(kind, backbone) for kind in LAYERS for backbone in BACKBONES]
)


def made(kind: str, backbone: str, dtype: torch.dtype = torch.float64) -> TTTLayer:
    share, gate = BACKBONES[backbone]
    torch.manual_seed(0)
    layer = LAYERS[kind](16, 2, chunk=4, base_lr=1.0, share_qk=share, use_gate=gate)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer.to(dtype)


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@every
def test_absent_tokens_are_as_if_they_were_not_there(kind: str, backbone: str) -> None:
    layer, x = made(kind, backbone), tokens(4, 11)
    mask = torch.tensor(
        [[0, 0, 0] + [1] * 8, [1] * 7 + [0] * 4, [1] * 11, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]]
    )
    y = layer(x, mask)
    for row in range(4):
        real = mask[row].bool()
        assert error(y[row][real], layer(x[row : row + 1, real])[0]) < 1e-12
        assert not y[row][~real].any()
    noisy = torch.where(mask.bool()[..., None], x, 100 * torch.rand_like(x))
    assert torch.equal(layer(noisy, mask), y)


@every
@pytest.mark.parametrize(
    "cuts", [[0, 13, 14, 15, 23], [0, 1, 2, 3, 4, 5, 23], [0, 6, 8, 9, 17, 23]]
)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_any_split_is_the_whole(
    kind: str, backbone: str, cuts: list[int], dtype: torch.dtype, bar: float
) -> None:
    layer, x = made(kind, backbone, dtype), tokens(2, 23, dtype)
    cache = LayerCache()
    with torch.no_grad():
        pieces = [layer(x[:, a:b], cache=cache) for a, b in pairwise(cuts)]
        assert error(torch.cat(pieces, 1), layer(x)) < bar


@every
def test_gradients_flow_through_caches(kind: str, backbone: str) -> None:
    layer, x = made(kind, backbone), tokens(2, 14).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    cache = LayerCache()
    y = torch.cat([layer(x[:, a:b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 14))], 1)
    mine = torch.autograd.grad(y.square().sum(), leaves)
    assert max(map(error, mine, expected)) < 1e-10
    cache.detach()
    assert not any(t.requires_grad for t in cache.tensors().values())


@every
def test_padded_rows_go_on_from_where_they_are(kind: str, backbone: str) -> None:
    layer, x = made(kind, backbone), tokens(2, 17)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    cache = LayerCache()
    with torch.no_grad():
        first = layer(x[:, :7], mask, cache)
        mask = torch.cat((mask, torch.ones(2, 10, dtype=torch.long)), 1)
        rest = [layer(x[:, 7:12], mask[:, :12], cache)]
        rest += [layer(x[:, t : t + 1], mask[:, : t + 1], cache) for t in range(12, 17)]
        whole = [layer(x[:1, 3:])[0], layer(x[1:])[0]]
    together = torch.cat((first, *rest), 1)
    assert error(together[0, 3:], whole[0]) < 1e-12
    assert error(together[1], whole[1]) < 1e-12


@every
def test_caches_roll_back_reorder_save_and_load(kind: str, backbone: str) -> None:
    layer, x = made(kind, backbone), tokens(3, 20)
    cache = LayerCache(remember=6)
    with torch.no_grad():
        whole = layer(x)
        layer(x[:, :9], cache=cache)
        layer(x[:, 9:16], cache=cache)
        cache.roll_back(torch.tensor([6, 6, 6]))
        assert error(layer(x[:, 10:13], cache=cache), whole[:, 10:13]) < 1e-12
        loaded = LayerCache.load(cache.tensors(), remember=6)
        copied = copy.deepcopy(cache)
        third = [layer(x[:, 13:15], cache=one) for one in (cache, loaded, copied)]
        assert torch.equal(third[0], third[1])
        assert torch.equal(third[0], third[2])
        index = torch.tensor([2, 0])
        cache.rows(index)
        assert error(layer(x[index, 15:], cache=cache), whole[index, 15:]) < 1e-12
        # Begun now, remembering looks ahead only.
        fresh = LayerCache()
        layer(x[:, :5], cache=fresh)
        fresh.remembering(6)
        with pytest.raises(ValueError, match="remembers"):
            fresh.roll_back(1)
        layer(x[:, 5:11], cache=fresh)
        fresh.roll_back(6)
        assert error(layer(x[:, 5:], cache=fresh), whole[:, 5:]) < 1e-12


@every
def test_half_precision(kind: str, backbone: str) -> None:
    layer, x = made(kind, backbone, torch.float32), tokens(2, 20, torch.float32)
    expected = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    cache = LayerCache()
    with torch.no_grad():
        y = torch.cat([half(x[:, a:b].bfloat16(), cache=cache) for a, b in ((0, 13), (13, 20))], 1)
    assert y.dtype == torch.bfloat16
    assert cache.state.now.start[0].dtype == torch.float32
    assert (y.float() - expected).norm() / expected.norm() < 5e-2


@every
def test_it_starts_as_the_authors_start(kind: str, backbone: str) -> None:
    share, gate = BACKBONES[backbone]
    layer = LAYERS[kind](64, 2, share_qk=share, use_gate=gate)
    assert layer.base_lr == {"linear": 1.0, "mlp": 0.1}[kind]
    assert float(layer.W1.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not layer.b1.any()
    assert torch.allclose(layer.coefficient(), 1 / torch.arange(1, 17))
    lr = layer.inner_lr(torch.zeros(1, 1, 64))
    assert torch.allclose(lr, torch.full_like(lr, layer.base_lr / 64))


def test_a_multiplier_scales_the_inner_rate() -> None:
    layer, x = made("linear", "transformer"), tokens(1, 3)
    lr = layer.inner_lr(x)
    layer.lr_scale = 0.1
    assert torch.allclose(layer.inner_lr(x), 0.1 * lr)


def test_what_does_not_fit_is_refused() -> None:
    for sizes in ((16, 3), (6, 2)):
        with pytest.raises(ValueError, match="even head dimension"):
            TTTLinear(*sizes)
    with pytest.raises(ValueError, match="chunk at least 1"):
        TTTLinear(16, 2, chunk=0)
    layer, x = made("linear", "transformer"), tokens(2, 5)
    for mask in (torch.ones(2, 4), torch.ones(1, 5), torch.ones(2, 1, 5, 5)):
        with pytest.raises(ValueError, match="attention_mask"):
            layer(x, mask)
    with pytest.raises(ValueError, match="nothing to roll back"):
        LayerCache().roll_back(1)
    cache = LayerCache()
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="the tokens of 1"):
        layer(x[:1], cache=cache)


def test_rows_and_back() -> None:
    x = torch.arange(1, 9.0).view(2, 4, 1)
    rows = Rows.masked(torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]))
    assert rows.pack(x).flatten().tolist() == [2, 4, 0, 0, 5, 6, 7, 0]
    assert rows.lengths.tolist() == [2, 3]
    assert rows.unpack(rows.pack(x)).flatten().tolist() == [0, 2, 0, 4, 5, 6, 7, 0]
    rows = Rows.packed(torch.tensor([0, 3, 8]), 8)
    assert rows.pack(x.view(1, 8, 1)).flatten().tolist() == [1, 2, 3, 0, 0, 4, 5, 6, 7, 8]
    assert torch.equal(rows.unpack(rows.pack(x.view(1, 8, 1))), x.view(1, 8, 1))
