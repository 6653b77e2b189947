"""`nn.MultiheadAttention` computes the width of a head as embed_dim // num_heads, so it cannot lose a head.

`HeadwiseAttention` is the same module, with the same parameters under the same names, that takes the width of its heads
from the weights it has. A model is analysed and cut with its attention modules seen as such; their class is changed on
the copy only, and only where a cut reaches them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadwiseAttention(nn.MultiheadAttention):
    """Multi-head attention with `num_heads` heads of `head_dim`, whatever `embed_dim` is.

    The arguments and results of `forward` are those of `nn.MultiheadAttention`.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, or `nn.TransformerEncoderLayer` takes a fused path that computes the width of a head."""
        return False

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
    ) -> tuple[Tensor, Tensor | None]:
        """(query, key, value) of shape (batch, length, width), or (length, batch, width), or without a batch."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        bias = self._bias(key_padding_mask, attn_mask, q, k, batched)
        dropout = self.dropout if self.training else 0.0
        scale = float(self.head_dim) ** -0.5
        weights = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = (scores if bias is None else scores + bias).softmax(-1)
            mixed = F.dropout(weights, dropout, self.training) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, bias))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads * width) -> (batch, heads, length, width)."""
        split: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return split.transpose(1, 2)

    def _bias(
        self, padding: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor, batched: bool
    ) -> Tensor | None:
        """What is added to the scores: minus infinity where a boolean mask is true."""
        parts: list[Tensor] = []
        if mask is not None:
            mask = _additive(mask, q)
            parts.append(mask if mask.dim() == 2 else mask.reshape(q.shape[0], -1, *mask.shape[1:]))
        if padding is not None:
            padding = _additive(padding if batched else padding.unsqueeze(0), q)
            parts.append(padding[:, None, None, :])
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def headwise(module: nn.Module) -> bool:
    """Whether a module is a multi-head attention that `HeadwiseAttention` can stand in for."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
    )


def see_heads(model: nn.Module, changed: Iterable[str] | None = None) -> nn.Module:
    """Change the class of the multi-head attentions in `model`, in place: all, or those that own a `changed` tensor."""
    owners = None if changed is None else {name.rpartition(".")[0].removesuffix(".out_proj") for name in changed}
    for name, module in model.named_modules():
        if headwise(module) and (owners is None or name in owners):
            module.__class__ = HeadwiseAttention
    return model
