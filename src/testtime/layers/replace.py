"""Put another mixing layer in place of the attention of a model that exists.

Each way of calling attention has its stand-in: timm's, PyTorch's, Hugging Face's, this library's.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from testtime.layers.attention import LinearAttention, SoftmaxAttention
from testtime.layers.mixer import mixer as build_mixer
from testtime.layers.mttt import MTTT
from testtime.layers.vittt import ViTTT

_HUGGING_FACE = ("ViTAttention", "DeiTAttention", "Dinov2Attention", "IJepaAttention")
_OFF_GRID = (
    *("cls_token", "class_token", "dist_token", "distillation_token"),
    *("reg_token", "register_tokens"),
)

Map = tuple[Tensor, Tensor | None]  # weight [out, in] and bias


class _Attention(NamedTuple):
    """One attention taken apart, and how it is called."""

    dim: int
    num_heads: int
    query: Map
    key: Map
    value: Map
    out: Map
    stand_in: Callable[[nn.Module], nn.Module]


def replace_attention(
    model: nn.Module,
    mixer: str | Callable[[int, int], nn.Module],
    where: str | Callable[[str], bool] | None = None,
    init: str = "attention",
    **changes: Any,
) -> nn.Module:
    """Return the model, with another mixing layer in place of each of its attentions.

    The model is changed in place, after every attention has been checked: either all that are
    chosen are replaced or none. Works on timm's ``Attention``, ``nn.MultiheadAttention`` (so on
    torchvision's ViT), Hugging Face's ViT, DeiT, DINOv2 and I-JEPA, and this library's attentions.
    Under ``init="attention"`` the key becomes phi, the query psi, the value the decoder and the
    output h. That reproduces linear attention with the identity map exactly as ``"mttt-linear"``;
    a model with softmax loses its accuracy until it is trained, and a warning says so.

    Class and register tokens are tokens like all others: the learner is fitted to them and asked
    for them, as attention attends to them and from them. ``vittt`` refuses them, for they have no
    place on its grid.

    >>> from testtime.models import ViT
    >>> model = ViT("linear", image_size=32, patch_size=8, depth=2)
    >>> model = replace_attention(model, "mttt-linear")
    >>> model.blocks[1].attn.mixer.learner
    'linear'

    Args:
        model: holds attentions.
        mixer: a name of ``testtime.layers.MIXERS``, or a function from (dim, num_heads) to a layer
            ``[B, N, C] -> [B, N, C]``.
        where: which ones, as a pattern of their names (``re.search``) or a function of the name;
            by default all.
        init: ``"attention"`` takes the attention's weights over, ``"fresh"`` keeps the new layer's
            own start.
        changes: further arguments of a mixer that is given by name.

    Raises:
        ValueError: no attention was found, or one has what the mixer cannot honour: masks made
            for it, relative positions, causal use, norms of queries and keys, rotations, gates,
            dropout of the attention. The message names it; nothing has been changed.
    """
    if init not in ("attention", "fresh"):
        raise ValueError(f"init is '{init}'; choose 'attention' or 'fresh'.")
    chosen = _choose(model, where)
    _refuse_decoders(model, chosen)
    found = {name: _read(name, module) for name, module in chosen.items()}

    made = {}
    for name, attention in found.items():
        if isinstance(mixer, str):
            layer = build_mixer(mixer, attention.dim, attention.num_heads, **changes)
        else:
            layer = mixer(attention.dim, attention.num_heads)
        if isinstance(layer, ViTTT):
            _refuse_off_grid(model)
        layer = layer.to(attention.out[0]).train(chosen[name].training)
        if init == "attention":
            _take_over(name, layer, attention)
        made[name] = attention.stand_in(layer)
    if not all(isinstance(m, LinearAttention) for m in chosen.values()) and not all(
        isinstance(m.mixer, SoftmaxAttention) for m in made.values() if isinstance(m, _StandIn)
    ):
        warnings.warn(
            f"{len(made)} softmax attentions were replaced by {mixer}: the model answers otherwise "
            "than before and has lost its accuracy until it is trained.",
            stacklevel=2,
        )
    for name, layer in made.items():
        if not name:  # the model is an attention itself
            return layer
        model.set_submodule(name, layer)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Padded rows would be cut to nested tensors, by the weights of an attention.
            module.use_nested_tensor = False
    return model


class _StandIn(nn.Module):
    """Calls a mixing layer as an attention is called."""

    def __init__(self, mixer: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.mixer = mixer
        self.drop = nn.Identity() if drop is None else drop

    def mix(self, x: Tensor, key_padding_mask: Tensor | None = None, **refused: Any) -> Tensor:
        """Return mixed tokens; further arguments that are set are such as no mixer can honour."""
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"The layer that replaced attention cannot honour {name}; call the model "
                    "without it."
                )
        y: Tensor = self.drop(self.mixer(x, key_padding_mask=key_padding_mask))
        return y


class Plain(_StandIn):
    """As this library's layers are called: ``layer(x)``."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``[B, N, C]``."""
        return self.mix(x, key_padding_mask)


class Timm(_StandIn):
    """As timm calls attention: ``layer(x, attn_mask=None, is_causal=False)``."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens ``[B, N, C]``."""
        return self.mix(x, attn_mask=attn_mask, is_causal=is_causal)


class HuggingFace(_StandIn):
    """As Hugging Face calls attention: ``layer(hidden_states, attention_mask)[0]``."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Mix tokens ``[B, N, C]``; there are no attention weights to return."""
        return self.mix(hidden_states, attention_mask=attention_mask), None


class Torch(_StandIn):
    """As PyTorch calls attention: ``layer(x, x, x, need_weights=False)[0]``."""

    # What nn.TransformerEncoderLayer asks of its attention, to see that its fast path is no option.
    in_proj_bias = in_proj_weight = None
    _qkv_same_embed_dim = True

    def __init__(self, mixer: nn.Module, attention: nn.MultiheadAttention) -> None:
        super().__init__(mixer)
        self.batch_first = attention.batch_first
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Mix tokens ``[B, N, C]`` (``[N, B, C]`` unless ``batch_first``); no weights come back."""
        if query is not key or key is not value:
            raise ValueError(
                "The layer that replaced attention mixes the tokens of one sequence: query, key "
                "and value must be the same tensor."
            )
        if query.dim() != 3:
            raise ValueError(f"Tokens are [B, N, C], found {[*query.shape]}; add a dimension.")
        x = query if self.batch_first else query.transpose(0, 1)
        padded = None if key_padding_mask is None else _as_boolean(key_padding_mask)
        y = self.mix(x, padded, attn_mask=attn_mask, is_causal=is_causal)
        return y if self.batch_first else y.transpose(0, 1), None


def _as_boolean(mask: Tensor) -> Tensor:
    """Return a padding mask as booleans; PyTorch's layers turn it into zeros and -inf."""
    if mask.dtype == torch.bool:
        return mask
    padded = mask.isneginf()
    if not bool((padded | (mask == 0)).all()):
        raise ValueError(
            "key_padding_mask adds other values than 0 and -inf, which only attention can honour; "
            "give booleans, true at padded tokens."
        )
    return padded


def _choose(model: nn.Module, where: str | Callable[[str], bool] | None) -> dict[str, nn.Module]:
    """Return the attentions that are meant, by name."""
    every = {n: m for n, m in model.named_modules() if _is_attention(m)}
    # An attention inside an attention is a part of it.
    inner = {n for n in every for outer in every if outer != n and n.startswith(f"{outer}.")}
    every = {n: m for n, m in every.items() if n not in inner}
    if where is None:
        chosen = every
    else:
        meant = (lambda n: re.search(where, n)) if isinstance(where, str) else where
        chosen = {n: m for n, m in every.items() if meant(n)}
    if not chosen:
        names = ", ".join(list(every)[:3]) + (", ..." if len(every) > 3 else "")
        raise ValueError(
            f"No attention to replace in {type(model).__name__}"
            + (f" under where={where!r}; there are {names}." if every else ": it has none.")
        )
    return chosen


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    # Blocks that hold an attention are none, nor are pools that attend to one learned query.
    named_so = re.search(r"(Attention(Rope|\dd)?|Attn)$", name)
    return isinstance(module, nn.MultiheadAttention) or named_so is not None


def _refuse_decoders(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerDecoderLayer):
            for name in chosen:
                if name.startswith(f"{path}." if path else ""):
                    _refuse(name, causal_use_or_another_sequence_to_attend_to=True)


def _read(name: str, module: nn.Module) -> _Attention:
    """Take an attention apart; refuse one that does more than a mixer can."""
    kind, place = type(module).__name__, type(module).__module__
    if isinstance(module, nn.MultiheadAttention):
        return _read_torch(name, module)
    if isinstance(module, SoftmaxAttention | LinearAttention):
        return _read_own(name, module)
    if place.startswith("timm.") and kind == "Attention":
        return _read_timm(name, module)
    if place.startswith("transformers.") and kind in _HUGGING_FACE:
        return _read_hugging_face(name, module)
    raise ValueError(
        f"'{name}' is {place}.{kind}, which may have relative positions, rotations, windows or "
        "masks of its own that a mixer cannot honour. Known are timm's Attention, "
        f"nn.MultiheadAttention, {', '.join(_HUGGING_FACE)} of transformers; leave '{name}' out by "
        "where=."
    )


def _refuse(name: str, **found: bool) -> None:
    """Raise if an attention has anything that no mixer can honour."""
    if has := [what.replace("_", " ") for what, there in found.items() if there]:
        raise ValueError(
            f"'{name}' has {', '.join(has)}, which the mixer cannot honour. Build the model "
            f"without, or leave '{name}' out by where=. Nothing has been changed."
        )


def _read_torch(name: str, module: nn.MultiheadAttention) -> _Attention:
    _refuse(
        name,
        attention_dropout=module.dropout > 0,
        keys_of_another_width=not module._qkv_same_embed_dim,
        key_and_value_biases=module.bias_k is not None,
        a_zero_to_attend_to=module.add_zero_attn,
    )
    weight, bias, dim = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    q, k, v = _thirds(weight, bias, dim)
    out = (module.out_proj.weight, module.out_proj.bias)
    return _Attention(dim, module.num_heads, q, k, v, out, lambda m: Torch(m, module))


def _read_timm(name: str, module: Any) -> _Attention:
    dim = module.qkv.in_features
    _refuse(
        name,
        norms_of_queries_and_keys=not isinstance(module.q_norm, nn.Identity),
        a_norm_before_its_output=not isinstance(getattr(module, "norm", None), nn.Identity | None),
        a_gate=getattr(module, "gate", None) is not None,
        attention_dropout=module.attn_drop.p > 0,
        another_width_inside=(module.qkv.out_features, module.proj.out_features) != (3 * dim, dim),
    )
    q, k, v = _thirds(module.qkv.weight, module.qkv.bias, dim)
    out, drop = (module.proj.weight, module.proj.bias), module.proj_drop
    return _Attention(dim, module.num_heads, q, k, v, out, lambda m: Timm(m, drop))


def _read_hugging_face(name: str, module: Any) -> _Attention:
    if not hasattr(module, "o_proj"):
        raise ValueError(
            f"'{name}' has no q_proj, k_proj, v_proj and o_proj; this version of transformers "
            "builds it otherwise. Take 5.24 or newer."
        )
    q, k, v, out = (getattr(module, f"{part}_proj") for part in "qkvo")
    dim = q.in_features
    _refuse(
        name,
        attention_dropout=module.attention_dropout > 0,
        causal_use=bool(module.is_causal),
        another_width_inside=q.out_features != dim,
    )
    heads = module.num_attention_heads
    return _Attention(dim, heads, _map(q), _map(k), _map(v), _map(out), HuggingFace)


def _read_own(name: str, module: SoftmaxAttention | LinearAttention) -> _Attention:
    if isinstance(module, LinearAttention):
        _refuse(
            name,
            an_elu_feature_map=module.feature_map != "identity",
            a_divisor_from_the_data=module.normalizer != "constant",
        )
        last = module.proj
    else:
        last = module.out
    q, k, v = _map(module.query), _map(module.key), _map(module.value)
    return _Attention(module.dim, module.num_heads, q, k, v, _map(last), Plain)


def _map(layer: nn.Linear) -> Map:
    return layer.weight, layer.bias


def _thirds(weight: Tensor, bias: Tensor | None, dim: int) -> list[Map]:
    biases = [None] * 3 if bias is None else torch.split(bias, dim)
    return list(zip(torch.split(weight, dim), biases, strict=True))


def _refuse_off_grid(model: nn.Module) -> None:
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] in _OFF_GRID:
            raise ValueError(
                f"The model has '{name}', a token that has no place on the grid of vittt. Build it "
                "without (timm: class_token=False, global_pool='avg'), or choose another mixer."
            )


@torch.no_grad()
def _take_over(name: str, layer: nn.Module, attention: _Attention) -> None:
    """Give a mixing layer the weights of an attention."""
    if isinstance(layer, MTTT):
        _copy(layer.phi, attention.key)
        _copy(layer.psi, attention.query)
        _copy(layer.h, attention.out)
        weight, bias = attention.value
        layer.g.weight.copy_(weight.view_as(layer.g.weight))
        if bias is not None:
            # The decoder's bias is seen through the decoder: G g_b = -b_v for all heads at once.
            g_b = torch.linalg.lstsq(weight.double().cpu(), -bias.double().cpu()[:, None]).solution
            layer.g.bias.copy_(g_b[:, 0])
    elif isinstance(layer, SoftmaxAttention | LinearAttention):
        _copy(layer.query, attention.query)
        _copy(layer.key, attention.key)
        _copy(layer.value, attention.value)
        _copy(layer.out if isinstance(layer, SoftmaxAttention) else layer.proj, attention.out)
    else:
        raise ValueError(
            f"{type(layer).__name__} has no place for the weights of '{name}'; give init='fresh'."
        )


def _copy(layer: nn.Linear, given: Map) -> None:
    weight, bias = given
    layer.weight.copy_(weight)
    if bias is None:
        nn.init.zeros_(layer.bias)
    else:
        layer.bias.copy_(bias)
