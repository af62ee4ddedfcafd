"""Attention whose projections are linear layers, so that each can be compressed like any other.

``nn.MultiheadAttention`` keeps the projections of queries, keys and values in one parameter, which
no layer owns, and writes the number of its heads into every view: nothing that looks for layers
finds it, and a head cannot leave it. :class:`Attention` computes the same with four linear layers
and reads the number of heads off their widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head attention (A. Vaswani et al., arXiv 1706.03762, section 3.2.2).

    It is called like ``nn.MultiheadAttention``, and takes and returns the same shapes.

    Args:
        of: what it computes; its tensors are taken over. It has neither ``add_bias_kv`` nor
            ``add_zero_attn``.

    Attributes:
        query: linear layer, ``(heads * head_size, embed_dim)``; ``key`` and ``value`` are others.
        out_proj: linear layer, ``(embed_dim, heads * head_size)``.
        head_size: channels of a head.
    """

    in_proj_bias = None
    """What ``nn.TransformerEncoderLayer`` asks for before it would fuse the whole layer."""

    def __init__(self, of: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_size, self.batch_first, self.dropout = of.head_dim, of.batch_first, of.dropout
        packed = of.in_proj_weight
        separate = (of.q_proj_weight, of.k_proj_weight, of.v_proj_weight)
        weights = separate if packed is None else packed.chunk(3)
        biases = (None,) * 3 if of.in_proj_bias is None else of.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(of.out_proj.weight, of.out_proj.bias)
        self.train(of.training)

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
        """Attend; see ``nn.MultiheadAttention.forward``.

        ``is_causal`` says what ``attn_mask`` is, as it does there, and changes nothing.
        """
        single = query.ndim == 2
        q, k, v = (
            layer(self._batched(tokens)).unflatten(2, (-1, self.head_size)).transpose(1, 2)
            for layer, tokens in ((self.query, query), (self.key, key), (self.value, value))
        )
        if single and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        mask = _mask(q, attn_mask, key_padding_mask)
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_size**-0.5
            scores = scores if mask is None else scores + mask
            weights = dropout(scores.softmax(3), self.dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            rate = self.dropout if self.training else 0.0
            mixed = scaled_dot_product_attention(q, k, v, mask, rate)
        tokens = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return tokens[0], None if weights is None else weights[0]
        return tokens if self.batch_first else tokens.transpose(0, 1), weights

    def _batched(self, tokens: Tensor) -> Tensor:
        """Return tokens as ``(batch, tokens, width)``."""
        if tokens.ndim == 2:
            return tokens[None]
        return tokens if self.batch_first else tokens.transpose(0, 1)


def separate(model: nn.Module) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` in a network by an :class:`Attention`.

    Outputs stay what they are, up to the order of sums. Those with ``add_bias_kv`` or
    ``add_zero_attn`` stay, and so do subclasses, which may compute something else.

    Args:
        model: changed in place and returned; it is not such a module itself.
    """
    new: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # it would read parameters of attention itself
        for name, child in module._modules.items():
            if child is not None and _replaceable(child):
                new[child] = new.get(child) or Attention(child)  # type: ignore[arg-type]
                module._modules[name] = new[child]
    return model


def separated(model: nn.Module) -> bool:
    """Tell whether a network has any :class:`Attention`."""
    return any(isinstance(module, Attention) for module in model.modules())


def _replaceable(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _mask(
    queries: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Return what is added to the scores, ``(batch or 1, heads or 1, queries or 1, keys)``."""
    found = []
    if attn_mask is not None:
        shape = (len(queries), -1) if attn_mask.ndim == 3 else (1, 1)
        found.append(_added(attn_mask, queries).view(*shape, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        found.append(_added(key_padding_mask, queries)[:, None, None])
    return sum(found[1:], found[0]) if found else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as what is added: minus infinity where a boolean one forbids to look."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
