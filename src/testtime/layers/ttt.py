"""TTT-Linear and TTT-MLP as layers, with the parameter names of the authors' PyTorch code.

Source: Sun et al., arXiv 2407.04620; test-time-training/ttt-lm-pytorch, cd831db1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testtime.layers.cache import LayerCache
from testtime.layers.rows import Rows, last_columns
from testtime.ops.ttt.run import Output
from testtime.ops.ttt.state import State
from testtime.ops.ttt_linear import ttt_linear
from testtime.ops.ttt_mlp import ttt_mlp

KERNEL = 4


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution over time, with bias: from [B, T, C] to [B, T, C].

    Args:
        channels: C.
        kernel: taps, the last of which is for the current token.
    """

    def __init__(self, channels: int, kernel: int = KERNEL) -> None:
        super().__init__(channels, channels, kernel, groups=channels)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """Convolve, after the inputs of ``tail`` [B, time, C], or after zeros."""
        before = self.kernel_size[0] - 1
        if tail is None:
            x = F.pad(x, (0, 0, before, 0))
        else:
            x = torch.cat((tail[:, tail.shape[1] - before :].to(x.dtype), x), 1)
        return super().forward(x.mT).mT


class TTTLayer(nn.Module):
    """A sequence layer whose hidden state is a model trained on the tokens it reads.

    Tokens that the attention mask calls absent, wherever they are, are as if they were not there:
    they move no state and no position, and their output is zero. In a model of half precision the
    start parameters, the inner norm, the position offsets and the gate of the inner learning rate
    may stay float32; the state is float32 in any case.

    Args:
        hidden_size: C, a multiple of ``num_heads``; the head dimension D is even.
        num_heads: H.
        chunk: K, tokens whose gradients are taken at the same parameters ("mini-batch size").
        base_lr: the largest inner learning rate, before the division by D; 1.0 for TTT-Linear and
            0.1 for TTT-MLP in the paper.
        share_qk: one projection for q and k, told apart by two convolutions (Mamba backbone).
        use_gate: multiply the output by a gate (Mamba backbone).
        rope_theta: base of the rotary embedding of a token's place in its chunk.
        eps: of the inner and of the post norm.
        official: the authors' constants, rounded to eight digits, in TTT-MLP's inner derivative.

    Raises:
        ValueError: sizes that do not divide.

    Source: Sun et al., arXiv 2407.04620, section 2 and figure 13.
    """

    default_lr = 1.0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        chunk: int = 16,
        base_lr: float | None = None,
        share_qk: bool = False,
        use_gate: bool = False,
        conv_kernel: int = KERNEL,
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
        official: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size // num_heads % 2 or chunk < 1:
            raise ValueError(
                "hidden_size must be num_heads times an even head dimension and chunk at least 1; "
                f"found hidden_size={hidden_size}, num_heads={num_heads}, chunk={chunk}."
            )
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.chunk, self.share_qk, self.official = chunk, share_qk, official
        self.base_lr = self.default_lr if base_lr is None else base_lr
        self.rope_theta, self.eps = rope_theta, eps
        # What the inner rate is multiplied by: training warms it up (0.1 to 1 for TTT-MLP).
        self.lr_scale = 1.0

        def square() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias=False)

        self.q_proj, self.v_proj, self.o_proj = square(), square(), square()
        if share_qk:
            self.conv_q = CausalConv(hidden_size, conv_kernel)
            self.conv_k = CausalConv(hidden_size, conv_kernel)
        else:
            self.k_proj = square()
        self.g_proj = square() if use_gate else None
        self.learnable_ttt_lr_weight = nn.Parameter(torch.empty(num_heads, 1, hidden_size))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.empty(num_heads, 1))
        self.learnable_token_idx = nn.Parameter(torch.empty(chunk))
        self.ttt_norm_weight = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.ttt_norm_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.post_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.make_start()
        self.reset_parameters()

    def make_start(self) -> None:
        """Make the start parameters of the inner model."""
        raise NotImplementedError

    def start(self) -> tuple[Tensor, ...]:
        """Return the start parameters of the inner model."""
        raise NotImplementedError

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, state: State | None, **options: Any
    ) -> Output:
        """Run the operator on tokens [B, H, T, D]."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the parameters anew as the authors do, but those of convolutions and post norm."""
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj"):
            if (projection := getattr(self, name, None)) is not None:
                projection.weight.normal_(0, std)
        self.reset_inner(std)

    @torch.no_grad()
    def reset_inner(self, std: float = 0.02) -> None:
        """Draw anew what is neither projection nor convolution nor post norm."""
        self.learnable_ttt_lr_weight.normal_(0, std)
        self.ttt_norm_weight.fill_(1)
        weights, biases = self.start()[::2], self.start()[1::2]
        for zero in (
            self.learnable_ttt_lr_bias,
            self.learnable_token_idx,
            self.ttt_norm_bias,
            *biases,
        ):
            zero.zero_()
        for weight in weights:
            weight.normal_(0, std)

    def coefficient(self) -> Tensor:
        """Return c by position in the chunk, [K]: 1 / i and a learned offset, not below 0."""
        offset = _wide(self.learnable_token_idx)
        return (1 / torch.arange(1, self.chunk + 1).to(offset) + offset).clamp(min=0)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return the layer's output, [B, T, C].

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, T], 0 for absent tokens; or longer at the front by earlier tokens.
            cache: where earlier calls left off; it is moved on.
        """
        if attention_mask is None:
            return self.mix(hidden_states, None, cache)
        mask = last_columns(attention_mask, *hidden_states.shape[:2])
        rows = Rows.masked(mask)
        return rows.unpack(self.mix(rows.pack(hidden_states), rows.lengths, cache))

    def mix(self, x: Tensor, lengths: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Return the output for rows whose first ``lengths`` tokens are real (none: all are)."""
        state = None if cache is None else cache.state
        if state is not None and len(state.position) != len(x):
            raise ValueError(
                f"The cache is of {len(state.position)} rows and the tokens of {len(x)}. Give the "
                "cache that this layer filled with the same rows, or choose some by cache.rows()."
            )
        q, v = self.q_proj(x), self.v_proj(x)
        if self.share_qk:
            tail = None if cache is None else cache.tail("q", q, lengths, self.conv_q, self.chunk)
            q, k = self.conv_q(q, tail), self.conv_k(q, tail)
        else:
            k = self.k_proj(x)
        q, k, v = (t.view(*t.shape[:2], self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        first = 0 if state is None else state.filled
        q, k = (self.rotate(t, first) for t in (q, k))
        found = self.read(
            q,
            k,
            v,
            self.inner_lr(x),
            state,
            lengths=lengths,
            remember=cache.remember if cache else 0,
        )
        if cache is not None:
            cache.state = found.state
        y = self.post_norm(found.o.transpose(1, 2).flatten(2))
        if self.g_proj is not None:
            y = y * F.gelu(self.g_proj(x), approximate="tanh")
        out: Tensor = self.o_proj(y)
        return out

    def inner_lr(self, x: Tensor) -> Tensor:
        """Return the inner learning rate of each token, [B, H, T]."""
        weight, bias = _wide(self.learnable_ttt_lr_weight), _wide(self.learnable_ttt_lr_bias)
        gate = F.linear(x.to(weight.dtype), weight[:, 0], bias[:, 0]).sigmoid()
        return (self.base_lr * self.lr_scale / self.head_dim) * gate.transpose(1, 2)

    def rotate(self, x: Tensor, first: Tensor | int) -> Tensor:
        """Rotate [B, H, T, D] by each token's place in its chunk, adjacent components in pairs.

        Args:
            x: queries or keys.
            first: place of the first token in its chunk, [B], or 0 for all rows.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        time = torch.arange(x.shape[2], device=x.device)
        place = (time if isinstance(first, int) else first[:, None, None] + time) % self.chunk
        pairs = torch.arange(0, self.head_dim, 2, device=x.device).to(wide) / self.head_dim
        angle = place.to(wide)[..., None] * self.rope_theta**-pairs
        cos, sin = angle.cos(), angle.sin()
        a, b = x.to(wide).view(*x.shape[:3], -1, 2).unbind(4)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), 4).flatten(3).to(x.dtype)

    def extra_repr(self) -> str:
        """Show what parameters do not."""
        return f"num_heads={self.num_heads}, chunk={self.chunk}, base_lr={self.base_lr}"


class TTTLinear(TTTLayer):
    """TTT-Linear: the inner model is x W + b."""

    def make_start(self) -> None:
        """Make W and b, which the authors call W1 and b1."""
        self.W1 = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.head_dim))
        self.b1 = nn.Parameter(torch.empty(self.num_heads, 1, self.head_dim))

    def start(self) -> tuple[Tensor, ...]:
        """Return W and b."""
        return self.W1, self.b1

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, state: State | None, **options: Any
    ) -> Output:
        """Run ``ttt_linear``."""
        norm = (self.ttt_norm_weight, self.ttt_norm_bias)
        begin = self.start() if state is None else state
        return ttt_linear(q, k, v, lr, self.coefficient(), *norm, begin, eps=self.eps, **options)


class TTTMLP(TTTLayer):
    """TTT-MLP: the inner model is gelu(x W1 + b1) W2 + b2, four times as wide inside."""

    default_lr = 0.1

    def make_start(self) -> None:
        """Make the weights and biases of both layers."""
        heads, dim, wide = self.num_heads, self.head_dim, 4 * self.head_dim
        self.W1 = nn.Parameter(torch.empty(heads, dim, wide))
        self.b1 = nn.Parameter(torch.empty(heads, 1, wide))
        self.W2 = nn.Parameter(torch.empty(heads, wide, dim))
        self.b2 = nn.Parameter(torch.empty(heads, 1, dim))

    def start(self) -> tuple[Tensor, ...]:
        """Return the weights and biases of both layers."""
        return self.W1, self.b1, self.W2, self.b2

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, state: State | None, **options: Any
    ) -> Output:
        """Run ``ttt_mlp``."""
        norm = (self.ttt_norm_weight, self.ttt_norm_bias)
        begin = self.start() if state is None else state
        return ttt_mlp(
            *(q, k, v, lr, self.coefficient(), *norm, begin),
            eps=self.eps,
            official=self.official,
            **options,
        )


def _wide(parameter: Tensor) -> Tensor:
    return parameter if parameter.dtype == torch.float64 else parameter.float()
