"""Language models of TTT layers for transformers, with the key names of the authors' PyTorch code.

Importing this file makes ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know "ttt".

Source: Sun et al., arXiv 2407.04620; test-time-training/ttt-lm-pytorch, cd831db1.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.layers.cache import LayerCache
from testtime.layers.rows import Rows, last_columns
from testtime.layers.ttt import TTTMLP, CausalConv, TTTLayer, TTTLinear

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        Cache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        initialization,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "Language models need transformers 5.17 or newer, which cannot be imported "
        f"({error}): pip install 'testtime[models]'."
    ) from error

# Table of the paper's appendix: layers, width, heads, width of the SwiGLU.
SIZES = {
    "tiny": (2, 64, 4, 160),
    "125m": (12, 768, 12, 2048),
    "350m": (24, 1024, 16, 2736),
    "760m": (24, 1536, 16, 4096),
    "1b": (24, 2048, 32, 5504),
}

# What outputs call the cache: transformers renamed it in 5.24.
CACHE = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)

# Tokens that a cache remembers once generation asks it to (assisted decoding, prompt lookup).
REMEMBER = 64


class TTTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and variant of a TTT language model; the names are the authors'.

    Args:
        vocab_size: number of tokens.
        hidden_size: width C.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each TTT layer.
        ttt_layer_type: "linear" or "mlp".
        ttt_base_lr: inner learning rate; none: the paper's, 1.0 for linear and 0.1 for mlp.
        mini_batch_size: tokens of a chunk.
        share_qk: one projection for q and k, with convolutions. The Mamba backbone is ``share_qk``,
            ``use_gate`` and ``pre_conv`` together; the Transformer backbone has none of them.
        use_gate: a gate on the output of the TTT layer.
        pre_conv: a convolution before the TTT layer.
        conv_kernel: its taps.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of weights at the start.
    """

    model_type = "ttt"

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5504
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    ttt_layer_type: str = "linear"
    ttt_base_lr: float | None = None
    mini_batch_size: int = 16
    share_qk: bool = False
    use_gate: bool = False
    pre_conv: bool = False
    conv_kernel: int = 4
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | Sequence[int] | None = 2
    pad_token_id: int | None = None

    @classmethod
    def sized(cls, size: str, *, mamba: bool = True, **changes: Any) -> "TTTConfig":
        """Return the configuration of a published size, or "tiny".

        Args:
            size: a key of ``SIZES``.
            mamba: the Mamba backbone, which the paper takes for its main results.
            changes: further fields.

        Raises:
            ValueError: there is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"There is no size '{size}'; those there are: {', '.join(SIZES)}.")
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        backbone = dict.fromkeys(("share_qk", "use_gate", "pre_conv"), mamba)
        return cls(**dict(zip(names, SIZES[size], strict=True)) | backbone | changes)


class TTTCacheLayer(LayerCache):
    """The cache of one block, as transformers' ``Cache`` handles the layers that it holds."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def reset(self) -> None:
        """Forget all tokens: the next call starts from the learned start parameters again."""
        self.state, self.tails = None, {}


class TTTCache(Cache):  # type: ignore[misc]
    """The state of a model: a layer's in each of ``layers``, and how many columns were seen.

    Columns count absent tokens too, as attention masks and ``get_seq_length`` do.

    Args:
        config: of the model.
        remember: how many columns can be cropped at any time.
    """

    def __init__(self, config: TTTConfig, remember: int = 0) -> None:
        super().__init__(layers=[TTTCacheLayer(remember) for _ in range(config.num_hidden_layers)])
        self.seen = 0
        self.remember = remember
        self.real: Tensor | None = None  # which of the last columns are tokens, [B, .]

    def move_on(self, mask: Tensor | None, batch: int, length: int) -> None:
        """Count columns that the layers have read."""
        self.seen += length
        if self.remember:
            mask = torch.ones(batch, length) if mask is None else mask
            before = mask.new_ones(batch, 0) if self.real is None else self.real.to(mask)
            self.real = torch.cat((before, mask), 1)[:, -self.remember :]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back; the number is negative, as transformers gives it.

        Raises:
            ValueError: it is positive, or further back than is remembered.
        """
        back = -tokens_to_remove
        if back < 0 or back > self.seen:
            raise ValueError(
                f"A cache of {self.seen} columns cannot be cropped by {tokens_to_remove}; give the "
                "number of columns to remove, negative."
            )
        if back == 0:
            return
        if self.real is None or back > self.real.shape[1]:
            kept = 0 if self.real is None else self.real.shape[1]
            raise ValueError(
                f"The cache cannot be cropped by {back} columns: it remembers {kept}. Make it with "
                "TTTCache(config, remember=...)."
            )
        tokens = self.real[:, -back:].sum(1).long()
        for layer in self.layers:
            layer.roll_back(tokens)
        self.real, self.seen = self.real[:, :-back], self.seen - back

    def activate_past_recording(self) -> None:
        """Remember columns from now on, for ``crop``."""
        self.remember = max(self.remember, REMEMBER)
        for layer in self.layers:
            layer.remembering(self.remember)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows in this order."""
        for layer in self.layers:
            layer.rows(beam_idx)
        if self.real is not None:
            self.real = self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        state = self.layers[0].state
        if state is not None:
            rows = torch.arange(len(state.position), device=state.position.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()
        self.seen, self.real = 0, None

    @property
    def batch_size(self) -> int:
        """Return the number of rows, or -1 before the first token."""
        state = self.layers[0].state
        return -1 if state is None else len(state.position)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, in float32 at least.

    Args:
        width: of the last axis.
        eps: inside the root.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]."""
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., C] to [..., C]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class PreConv(nn.Module):
    """The convolution before a TTT layer, with its norm."""

    def __init__(self, config: TTTConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConv(config.hidden_size, config.conv_kernel)
        self.chunk = config.mini_batch_size

    def forward(self, x: Tensor, lengths: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Convolve [B, T, C]."""
        x = self.norm(x)
        tail = None if cache is None else cache.tail("pre", x, lengths, self.conv, self.chunk)
        y: Tensor = self.conv(x, tail)
        return y


class TTTBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """A residual block: a convolution if there is one, the TTT layer, the SwiGLU."""

    def __init__(self, config: TTTConfig) -> None:
        super().__init__()
        kinds: dict[str, type[TTTLayer]] = {"linear": TTTLinear, "mlp": TTTMLP}
        if config.ttt_layer_type not in kinds:
            raise ValueError(
                f"ttt_layer_type must be 'linear' or 'mlp', found '{config.ttt_layer_type}'."
            )
        width, eps = config.hidden_size, config.rms_norm_eps
        self.conv = PreConv(config) if config.pre_conv else None
        self.seq_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.seq_modeling_block = kinds[config.ttt_layer_type](
            width,
            config.num_attention_heads,
            chunk=config.mini_batch_size,
            base_lr=config.ttt_base_lr,
            share_qk=config.share_qk,
            use_gate=config.use_gate,
            conv_kernel=config.conv_kernel,
            rope_theta=config.rope_theta,
            eps=eps,
        )
        self.mlp = SwiGLU(width, config.intermediate_size)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map rows [B, T, C], whose first ``lengths`` tokens are real, to rows of that shape."""
        if self.conv is not None:
            x = x + self.conv(x, lengths, cache)
        x = x + self.seq_modeling_block.mix(self.seq_norm(x), lengths, cache)
        y: Tensor = x + self.mlp(self.ffn_norm(x))
        return y


class TTTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What both models share: how they start and what stays float32."""

    config_class = TTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TTTBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        *("W1", "b1", "W2", "b2", "ttt_norm_weight", "ttt_norm_bias", "learnable_token_idx"),
        *("learnable_ttt_lr_weight", "learnable_ttt_lr_bias"),
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, CausalConv):
            bound = module.kernel_size[0] ** -0.5
            for tensor in (module.weight, module.bias):
                initialization.uniform_(tensor, -bound, bound)
        elif isinstance(module, TTTLayer):
            for weight in (module.learnable_ttt_lr_weight, *module.start()[::2]):
                initialization.normal_(weight, std=std)
            biases = (module.learnable_ttt_lr_bias, *module.start()[1::2])
            for zero in (*biases, module.learnable_token_idx, module.ttt_norm_bias):
                initialization.zeros_(zero)
            initialization.ones_(module.ttt_norm_weight)


class TTTModel(TTTPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(TTTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TTTCache | None = None,
        past_key_values: TTTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return hidden states [B, T, C] and the cache.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] or longer by earlier columns, 0 for absent tokens.
            position_ids: read for one thing only: without mask and cache, each 0 in a batch of one
                begins a packed sequence.
            cache: where earlier calls left off; it is moved on.
            past_key_values: the same by the name of transformers before 5.24.
            inputs_embeds: [B, T, C] in the place of ids.
            use_cache: return the cache, a new one if none is given.
            output_hidden_states: return the input of each block and the output.
            return_dict: false for a tuple.
            cu_seq_lens_q: boundaries of packed sequences in a batch of one.
            kwargs: not used.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache if past_key_values is None else past_key_values
        if cache is not None and not isinstance(cache, TTTCache):
            raise ValueError(
                f"A TTT model keeps its state in a TTTCache, found {type(cache).__name__}. "
                "Make one with TTTCache(model.config), or give none."
            )
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (
            (not self.training and self.config.use_cache) if use_cache is None else use_cache
        )
        if cache is None and use_cache and not checkpointing:
            cache = TTTCache(self.config)
        elif checkpointing:
            cache = None
        batch, length = x.shape[:2]
        if cache is not None and cache.batch_size not in (-1, batch):
            raise ValueError(
                f"The cache is of {cache.batch_size} rows and the input of {batch}. Give the cache "
                "of the same rows, or choose some by cache.batch_select_indices()."
            )
        mask = None
        if attention_mask is not None:
            mask = last_columns(attention_mask, batch, length)
            # Full masks are the rule in generation, and cost nothing then.
            mask = None if bool(mask.all()) else mask
        rows = None if mask is None else Rows.masked(mask)
        boundaries = cu_seq_lens_q
        if boundaries is None and attention_mask is None and (cache is None or not cache.seen):
            boundaries = _boundaries(position_ids)
        if boundaries is not None and len(boundaries) > 2:
            cache, rows = None, Rows.packed(boundaries.to(x.device), length)
        x = x if rows is None else rows.pack(x)
        lengths = None if rows is None else rows.lengths
        seen = []
        for number, block in enumerate(self.layers):
            seen.append(x)
            x = block(x, lengths, None if cache is None else cache.layers[number])
        x = self.norm(x)
        seen.append(x)
        if cache is not None:
            cache.move_on(mask, batch, length)
        back = [
            t if rows is None else rows.unpack(t) for t in (seen if output_hidden_states else [x])
        ]
        found = BaseModelOutputWithPast(
            last_hidden_state=back[-1],
            hidden_states=tuple(back) if output_hidden_states else None,
            **{CACHE: cache},
        )
        return found if return_dict is not False else found.to_tuple()


class TTTForCausalLM(TTTPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model: ``TTTModel`` and a head, which by default is the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        self.model = TTTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Take another head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TTTCache | None = None,
        past_key_values: TTTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits [B, T, vocab] in float32 at least, and with labels the loss.

        Args:
            input_ids: as in ``TTTModel``, like all that is not named below.
            attention_mask: likewise.
            position_ids: likewise.
            cache: likewise.
            past_key_values: likewise.
            inputs_embeds: likewise.
            labels: [B, T]; the logits at t are compared with the label at t + 1, -100 is left out.
            use_cache: as in ``TTTModel``.
            output_hidden_states: likewise.
            return_dict: likewise.
            logits_to_keep: logits of so many last tokens, or of those with these numbers; 0: all.
            num_items_in_batch: what the summed loss is divided by, in the place of the tokens here.
            kwargs: for ``TTTModel``.
        """
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, keep])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = None
        if labels is not None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            target = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            **{CACHE: getattr(found, CACHE)},
        )
        return output if return_dict is not False else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Put a TTTCache where ``generate`` puts a cache of keys and values."""
        prepared = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        for name, made in list(model_kwargs.items()):
            if isinstance(made, Cache) and not isinstance(made, TTTCache):
                model_kwargs[name] = TTTCache(self.config)
                if getattr(generation_config, "is_assistant", False):
                    model_kwargs[name].activate_past_recording()
        return prepared


def _boundaries(position_ids: Tensor | None) -> Tensor | None:
    """Return where packed sequences begin and end, if there are several."""
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1:
        return None
    begins = (position_ids[0] == 0).nonzero()[:, 0]
    return torch.cat((begins, begins.new_tensor([position_ids.shape[1]])))


AutoConfig.register("ttt", TTTConfig, exist_ok=True)
AutoModel.register(TTTConfig, TTTModel, exist_ok=True)
AutoModelForCausalLM.register(TTTConfig, TTTForCausalLM, exist_ok=True)
