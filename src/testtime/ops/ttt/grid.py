"""Where tokens stand on the chunk grid, row by row.

A row that has r tokens of an unfinished chunk continues on place r of the grid. The tokens to
choose from are the K places of that chunk, the T new tokens, and one of zeros for what is empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def source(places: Tensor, filled: Tensor, lengths: Tensor, chunk: int, count: int) -> Tensor:
    """Return the number, among the tokens to choose from, of the token at each place.

    Args:
        places: on the grid, int64 [S] or [B, S].
        filled: tokens of the unfinished chunk, [B].
        lengths: new tokens, [B].
        chunk: K.
        count: T.

    Returns:
        Int64 [B, S], from 0 to K + T.
    """
    new = places - filled[:, None]
    chosen = torch.where(new < 0, places, chunk + new)
    return torch.where(new < lengths[:, None], chosen, chunk + count)


def take(tokens: Sequence[Tensor], index: Tensor) -> Tensor:
    """Return the tokens [B, H, S, ...] with these numbers among joined tensors.

    Args:
        tokens: [B, H, ., ...] each; a last token of zeros is added.
        index: int64 [B, S].
    """
    nothing = tokens[0].new_zeros(*tokens[0].shape[:2], 1, *tokens[0].shape[3:])
    whole = torch.cat((*tokens, nothing), 2)
    shape = (*whole.shape[:2], index.shape[1], *whole.shape[3:])
    return whole.gather(2, index.view(len(index), 1, -1, *[1] * (whole.dim() - 3)).expand(shape))


def packed(boundaries: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return how sequences that lie one behind the other become rows.

    Args:
        boundaries: ``cu_seqlens``, int [N + 1], from 0 to the number of tokens.
        total: tokens.

    Returns:
        The token of each row and place ``[N, L]``, ``total`` where there is none; the lengths
        ``[N]``; and for each token its place in the rows laid end to end, ``[total]``.
    """
    first, lengths = boundaries[:-1].long(), boundaries.diff().long()
    longest = int(lengths.max()) if len(lengths) else 0
    places = torch.arange(longest, device=boundaries.device)
    index = torch.where(places < lengths[:, None], first[:, None] + places, total)
    row = torch.arange(len(lengths), device=boundaries.device).repeat_interleave(lengths)
    return index, lengths, row * longest + torch.arange(total, device=row.device) - first[row]


def to_rows(tokens: Tensor, index: Tensor) -> Tensor:
    """From tokens one sequence behind the other [1, H, total, ...] to rows [N, H, L, ...]."""
    rows = take((tokens,), index.view(1, -1))[0]
    return rows.view(len(rows), *index.shape, *rows.shape[2:]).transpose(0, 1)


def from_rows(rows: Tensor, place: Tensor) -> Tensor:
    """From rows [M, N, H, L, ...] to tokens one sequence behind the other [M, 1, H, total, ...]."""
    tokens = rows.transpose(1, 2).flatten(2, 3)
    return tokens.index_select(2, place)[:, None]
