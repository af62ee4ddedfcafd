"""A plain vision transformer for small images (A. Dosovitskiy et al., arXiv 2010.11929).

Pre-norm blocks, as in the paper; the head reads the average of all tokens instead of one extra
token, and positions are learned. Every matrix is a linear layer or the convolution that makes the
patches, so that each is planned, counted and compressed like those of other networks, which the
fused projections of ``torch.nn.MultiheadAttention`` are not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from secateur.errors import SecateurError


class Block(nn.Module):
    """Self-attention and a perceptron four times as wide, each with LayerNorm ahead and a residual.

    Shapes: input and output ``(batch, tokens, width)``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._attention(self.norm1(tokens))
        return tokens + self.fc2(gelu(self.fc1(self.norm2(tokens))))  # type: ignore[no-any-return]

    def _attention(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).unflatten(2, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*parts.unbind(0))
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, blocks of attention, the average, a linear layer.

    Layers: ``patches``, ``blocks.N`` of ``qkv``, ``proj``, ``fc1`` and ``fc2``, ``norm``, ``head``.

    Shapes: input ``(batch, channels, side, side)``, output logits ``(batch, classes)``.

    Args:
        classes: number of outputs.
        channels: of the input images.
        side: pixels of the image each way.
        patch: pixels of a patch each way; it divides ``side``.
        width: of a token; ``heads`` divides it.
        depth: number of blocks.
        heads: of the attention.

    Raises:
        SecateurError: ``patch`` does not divide ``side``, or ``heads`` does not divide ``width``.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        for part, whole, names in ((patch, side, "patch, side"), (heads, width, "heads, width")):
            if part < 1 or whole % part:
                raise SecateurError(f"{names}: {part} does not divide {whole}.")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))  # type: ignore[no-any-return]


def vit_tiny(
    classes: int = 10,
    channels: int = 1,
    side: int = 28,
    patch: int = 4,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
) -> VisionTransformer:
    """Build a ViT-Ti, 192 wide and 12 deep with 3 heads (arXiv 2012.12877), for 28x28 pixels."""
    return VisionTransformer(classes, channels, side, patch, width, depth, heads)
