"""ViT^3: inner steps, the rotation, the layer, blocks, whole networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.errors import Comparison
from tests.parity.official import build, check_gradients, expect
from tests.parity.recording import Recording, Unreplayable
from testtime.layers import ViTTT, record_inner
from testtime.layers.vittt import rotate, rotations
from testtime.models import HViT3, ViT3
from testtime.models.vit3 import Block, DiTBlock, PatchMerging
from testtime.ops.mttt import Dot, mttt


def replay_operator(recording: Recording) -> Comparison:
    """Replay one inner step, or the rotation."""
    if "inner_model" not in recording.config:
        return _replay_rotation(recording)
    config, comparison = recording.config, Comparison(recording)
    kind = config.get("inner_model")
    expect(recording, inner_loss="dot", squash={"glu": "column", "dwconv3x3": "kernel"}.get(kind))
    given = {n: recording[f"in/{n}"].requires_grad_() for n in recording.under("in")}
    k, v = given["k"], given["v"]
    if kind == "glu":
        names, learner, grid = {"w1": "weight_1", "w2": "weight_2"}, "glu", None
        expect(recording, batch=k.shape[0], heads=k.shape[1], tokens=k.shape[2])
        expect(recording, head_dim=k.shape[3])
    elif kind == "dwconv3x3":
        names, learner, grid = {"w": "weight"}, "dwconv", (k.shape[2], k.shape[3])
        expect(recording, batch=k.shape[0], channels=k.shape[1])
        expect(recording, height=grid[0], width=grid[1])
        config.get("official_implementation", None)  # two ways of writing one sum
        k, v = (t.flatten(2).mT[:, None] for t in (k, v))
    else:
        raise Unreplayable(f"its inner model {kind!r} is not known")
    w0 = {own: given[n] if kind == "glu" else given[n].transpose(0, 1) for n, own in names.items()}
    _, _, state = mttt(
        k,
        k,
        v,
        w0,
        Dot(scale=config.get("scale")),
        learner=learner,
        inner_lr=config.get("inner_lr"),
        grid=grid,
        state=True,
    )
    assert state is not None
    total = torch.zeros((), dtype=recording.dtype)
    for name, own in names.items():
        cotangent = recording[f"grad_out/{name}"]
        out = state[own].reshape(cotangent.shape)
        comparison.check(f"out/{name}", out)
        total = total + (out * cotangent).sum()
    total.backward()
    check_gradients(comparison, recording, {n: t.grad for n, t in given.items()})
    return comparison


def _replay_rotation(recording: Recording) -> Comparison:
    comparison, x = Comparison(recording), recording["in/x"].requires_grad_()
    grid, channels = (x.shape[1], x.shape[2]), x.shape[3]
    expect(recording, height=grid[0], width=grid[1], channels=channels, base=10000)
    y = rotate(x.flatten(1, 2), grid).view_as(x)
    (y * recording["grad_out/y"]).sum().backward()
    comparison.check("out/y", y)
    comparison.check("extra/table", rotations(grid, channels))
    check_gradients(comparison, recording, {"x": x.grad})
    return comparison


def replay_layer(recording: Recording) -> Comparison:
    """Replay one call of the layer, of a block, or of the merging between stages."""
    config, comparison = recording.config, Comparison(recording)
    dim, heads = config.get("dim"), config.get("heads")
    grid = (config.get("height"), config.get("width"))
    x = recording["in/0/x"].requires_grad_()
    expect(recording, batch=x.shape[0])
    leaves = {"x": x}
    if "kind" not in config:
        module = build(ViTTT, dim, heads, qkv_bias=config.get("qkv_bias"), rope=config.get("rope"))
        expect(recording, head_dim=dim // heads, inner_lr=1.0, scale=1 / 3)
        _load(module, recording)
        with record_inner(module, state=True) as record:
            y = module(x, grid=grid)
        state = record[""][0].state
        assert state is not None
        for name in recording.under("extra/0"):
            comparison.check(f"extra/0/{name}", state.get(name))
    else:
        kind, ratio = config.get("kind"), config.get("mlp_ratio")
        if kind in ("plain", "hierarchical"):
            module = build(Block, dim, heads, ratio, hierarchical=kind == "hierarchical")
            y = _load(module, recording)(x, grid)
        elif kind == "dit":
            module = build(DiTBlock, dim, heads, ratio)
            leaves["c"] = recording["in/0/c"].requires_grad_()
            y = _load(module, recording)(x, leaves["c"], grid)
        elif kind == "merge":  # `heads` is the width that comes out
            module = build(PatchMerging, dim, heads)
            y, _ = _load(module, recording)(x, grid)
        else:
            raise Unreplayable(f"its block {kind!r} is not known")
    (y * recording["grad_out/y"]).sum().backward()
    comparison.check("out/0/y", y)
    grads = _gradients(module)
    check_gradients(comparison, recording, {**grads, **{n: t.grad for n, t in leaves.items()}})
    return comparison


def replay_model(recording: Recording) -> Comparison:
    """Replay one forward of a network, the loss and every gradient."""
    config, comparison = recording.config, Comparison(recording)
    family, heads, ratio = (config.get(n) for n in ("family", "num_heads", "mlp_ratio"))
    if family == "plain":
        model = build(
            ViT3,
            config.get("embed_dim"),
            config.get("depth"),
            heads,
            config.get("patch_size"),
            ratio,
            config.get("classes"),
        )
    elif family == "hierarchical":
        dims, depths = config.get("dim"), config.get("depths")
        model = build(HViT3, dims, depths, heads, ratio, config.get("classes"))
    else:
        raise Unreplayable(f"its family {family!r} is not known")
    x = recording["in/0/x"].to(recording.dtype)
    expect(recording, batch=x.shape[0], img_size=x.shape[-1])
    _load(model, recording).train(config.get("train"))
    logits = model(x)
    loss = -(recording["in/0/labels"] * F.log_softmax(logits, -1)).sum(-1).mean()
    loss.backward()
    comparison.check("out/0/logits", logits)
    comparison.check("out/0/loss", loss)
    state = model.state_dict()
    for name in recording.under("state/0"):
        comparison.check(f"state/0/{name}", state.get(name))
    check_gradients(comparison, recording, _gradients(model))
    return comparison


def _load(module: nn.Module, recording: Recording) -> nn.Module:
    """Return the module with its recorded parameters and statistics, in eval mode."""
    module = module.to(recording.dtype)
    tensors = {name: recording[f"init/{name}"] for name in recording.under("init")}
    # The authors keep their table of rotations, one for each resolution; here it is made anew.
    tables = [name for name in tensors if name.endswith("rope.rotations")]
    for name in tables:
        del tensors[name]
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = tensor.view(())
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise Unreplayable(f"its network cannot be built ({error})") from error
    return module.eval()


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()
    }


KINDS = {"operator": replay_operator, "layer": replay_layer, "model": replay_model}
