"""The names that Hugging Face gives to the parameters of a masked autoencoder.

There are three spellings: that of the files on the hub, that of models in memory since transformers
5, and that of what transformers 5 saves. Queries, keys and values are apart in all of them.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from testtime.models.mae.network import MAE
from testtime.models.mae.parts import EPS

_SAME = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
_HUB = {
    **_SAME,
    "blocks": "vit.encoder.layer",
    "decoder_blocks": "decoder.decoder_layers",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# From the authors' names of modules to those of each spelling; inside a block, of its parts.
SPELLINGS: dict[str, dict[str, str]] = {
    "hub": _HUB,
    "memory": {
        **_SAME,
        "blocks": "vit.layers",
        "decoder_blocks": "decoder.decoder_layers",
        "attn.q": "attention.q_proj",
        "attn.k": "attention.k_proj",
        "attn.v": "attention.v_proj",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "saved": {**_HUB, "decoder_blocks": "decoder.decoder_encoder.layer"},
}


def spelling_of(names: list[str]) -> str | None:
    """Return the spelling that knows all of these names, or none. The encoder's alone are "hub"."""
    for spelling, table in SPELLINGS.items():
        words = {there: here for here, there in table.items()}
        if names and all(_translate(name, words) for name in names):
            return spelling
    return None


def to_huggingface(state: Mapping[str, Tensor], spelling: str = "hub") -> dict[str, Tensor]:
    """Return the same tensors under Hugging Face's names, the fused layers split in three.

    Args:
        state: under the authors' names: encoder, and decoder where there is one.
        spelling: a key of ``SPELLINGS``; every version of transformers reads ``"hub"``.

    Raises:
        ValueError: Hugging Face has no place for an entry.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): third for part, third in thirds}
        else:
            split[name] = tensor
    named = {_translate(name, SPELLINGS[spelling]): tensor for name, tensor in split.items()}
    if None in named:
        odd = [name for name in split if _translate(name, SPELLINGS[spelling]) is None]
        raise ValueError(
            f"Hugging Face's ViTMAE has no place for {odd}. Write encoder and decoder alone, and "
            "the head to a file of its own."
        )
    return {name: tensor.contiguous() for name, tensor in named.items() if name}


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the authors' names, from any of the three spellings.

    Raises:
        ValueError: the names are of no spelling, or a query, key or value is missing.
    """
    spelling = spelling_of(list(state))
    if spelling is None:
        known = [{there: here for here, there in table.items()} for table in SPELLINGS.values()]
        odd = [n for n in state if not any(_translate(n, words) for words in known)]
        raise ValueError(
            f"These are not the names of Hugging Face's ViTMAE in any of its spellings "
            f"({', '.join(SPELLINGS)}): {odd[:5] or 'two spellings are mixed'}. Give the weights "
            "of a ViTMAEForPreTraining or a ViTMAEModel."
        )
    words = {there: here for here, there in SPELLINGS[spelling].items()}
    split = {str(_translate(name, words)): tensor for name, tensor in state.items()}
    fused: dict[str, Tensor] = {}
    for name, tensor in split.items():
        if not (found := re.fullmatch(r"(.*\.attn\.)([qkv])(\..*)", name)):
            fused[name] = tensor
        elif found[2] == "q":
            thirds = [split.get(f"{found[1]}{part}{found[3]}") for part in "qkv"]
            present = [third for third in thirds if third is not None]
            if len(present) < 3:
                raise ValueError(
                    f"Query, key and value belong together, but one of them is missing beside "
                    f"{name}. Give a whole file."
                )
            fused[f"{found[1]}qkv{found[3]}"] = torch.cat(present)
    return fused


def _translate(name: str, words: Mapping[str, str]) -> str | None:
    """Return a parameter's name in other words, or none where a word is not known."""
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return words.get(name)
    if block := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module):
        stack, part = words.get(block[1]), words.get(block[3])
        return f"{stack}.{block[2]}.{part}.{leaf}" if stack and part else None
    return f"{words[module]}{dot}{leaf}" if module in words else None


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the configuration with which transformers builds this network, norm floors included.

    Raises:
        ValueError: its ViTMAE cannot be this network, or the decoder's target is not known.
    """
    if not isinstance(model, MAE) or model.task != "reconstruction":
        raise ValueError(
            "Hugging Face's ViTMAE reconstructs, and this network does not. Write it as one of "
            "the authors' families."
        )
    if model.image[0] != model.image[1]:
        raise ValueError(
            f"Hugging Face's ViTMAE takes square images, and these are {model.image}. Write it as "
            "one of the authors' families."
        )
    config: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if model.decoder else "ViTMAEModel"],
        "model_type": "vit_mae",
        "image_size": model.image[0],
        "patch_size": model.patch,
        "num_channels": model.channels,
        "hidden_size": model.sizes.dim,
        "intermediate_size": 4 * model.sizes.dim,
        "num_hidden_layers": model.sizes.depth,
        "num_attention_heads": model.sizes.heads,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": EPS,
        "mask_ratio": 0.75,
    }
    if model.decoder is None:
        return config
    if model.normalised is None:
        raise ValueError(
            "The configuration says what the decoder predicts, and that is not known. Set "
            "model.normalised to False (plain pixels) or True."
        )
    return config | {
        "norm_pix_loss": model.normalised,
        "decoder_hidden_size": model.decoder.dim,
        "decoder_intermediate_size": 4 * model.decoder.dim,
        "decoder_num_hidden_layers": model.decoder.depth,
        "decoder_num_attention_heads": model.decoder.heads,
    }
