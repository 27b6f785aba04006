"""The denoiser: a set transformer over noised cells that looks at control cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of `t` in [0, 1], `(...,) -> (..., width)`."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=t.device, dtype=t.dtype))
    angles = t[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of one set to another, with keys masked where there is no cell."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"width={width} must be divisible by n_heads={n_heads}.")
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(..., n_heads, n_cells, width / n_heads)` of a set, to be attended to."""
        key, value = self.key_value(x).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `x` `(b, n, width)`; `mask` is `(b, n_keys)`, `True` where there is a cell."""
        attend = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(self._heads(self.query(x)), key, value, attn_mask=attend)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Sequential):
    """Two-layer perceptron of a transformer block."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


@dataclass(frozen=True)
class EncodedControls:
    """Control cells as the denoiser sees them: `tokens` `(b, n_controls, width)` and `mask` `(b, n_controls)`."""

    tokens: Tensor
    mask: Tensor | None

    def repeat(self, times: int) -> EncodedControls:
        """The same controls for `times` draws each, draws of a population next to each other."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return EncodedControls(self.tokens.repeat_interleave(times, 0), mask)


class ControlEncoder(nn.Module):
    """Self-attention over the control cells of a population.

    It sees neither time nor perturbation, so controls are encoded once for all draws, steps and perturbations.
    """

    def __init__(self, n_latent: int, width: int, n_heads: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(n_latent, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * n_layers))
        self.attentions = nn.ModuleList(Attention(width, n_heads) for _ in range(n_layers))
        self.feed_forwards = nn.ModuleList(FeedForward(width, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, controls: Tensor, mask: Tensor | None = None) -> EncodedControls:
        """Encode `controls` `(b, n_controls, n_latent)`."""
        h = self.project(controls)
        for i, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            assert isinstance(attention, Attention)
            x = self.norms[2 * i](h)
            h = h + attention(x, *attention.keys_values(x), mask)
            h = h + feed_forward(self.norms[2 * i + 1](h))
        return EncodedControls(self.norm(h), mask)


class Block(nn.Module):
    """Transformer block over noised cells and controls, modulated by the condition (adaLN-Zero, Peebles & Xie 2023)."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_feed_forward = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, n_heads)
        self.control_key_value = nn.Linear(width, 2 * width)
        self.feed_forward = FeedForward(width, dropout)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor, controls: EncodedControls, mask: Tensor | None) -> Tensor:
        """Update cells `h` `(b, n, width)` under `condition` `(b, width)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None, :].chunk(6, dim=-1)
        x = self.norm_attention(h) * (1 + scale1) + shift1
        key, value = self.attention.keys_values(x)
        control_key, control_value = (
            self.attention._heads(part) for part in self.control_key_value(controls.tokens).chunk(2, dim=-1)
        )
        attended = self.attention(
            x,
            torch.cat([key, control_key], dim=-2),
            torch.cat([value, control_value], dim=-2),
            _joined_mask(h, controls, mask),
        )
        h = h + gate1 * attended
        x = self.norm_feed_forward(h) * (1 + scale2) + shift2
        return h + gate2 * self.feed_forward(x)


def _joined_mask(h: Tensor, controls: EncodedControls, mask: Tensor | None) -> Tensor | None:
    if mask is None and controls.mask is None:
        return None  # the fast attention kernels want no mask
    ours = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask
    theirs = (
        torch.ones(controls.tokens.shape[:2], dtype=torch.bool, device=h.device)
        if controls.mask is None
        else controls.mask
    )
    return torch.cat([ours, theirs], dim=-1)


class PopulationTransformer(nn.Module):
    """Set transformer from noised cells, control cells and a condition to one output vector per cell.

    Equivariant to permutations of the noised cells, invariant to permutations of the controls; no positional code.

    Parameters
    ----------
    n_latent
        Dimension of a cell.
    n_features
        Dimension of what is known of each noised cell: its noised vector, source control cell and extra noise.
    width, n_layers, n_heads
        Size of the transformer.
    n_control_layers
        Self-attention layers over the controls.
    dropout
        Dropout in the feed-forward parts.
    """

    def __init__(
        self,
        n_latent: int,
        n_features: int,
        width: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        n_control_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(n_features, width)
        self.control_encoder = ControlEncoder(n_latent, width, n_heads, n_control_layers, dropout)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, n_latent)
        for layer in (self.modulation, self.out):  # the untrained network predicts "no correction"
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, cells: Tensor, t: Tensor, condition: Tensor, controls: EncodedControls, mask: Tensor | None = None
    ) -> Tensor:
        """Output vectors `(b, n_cells, n_latent)`.

        Parameters
        ----------
        cells
            `(b, n_cells, n_features)`.
        t
            Time of each population, `(b,)`.
        condition
            `(b, width)`.
        controls
            Encoded controls of each population.
        mask
            Which cells there are, `(b, n_cells)`.
        """
        condition = F.silu(condition + self.time(time_embedding(t, self.width)))
        h = self.project(cells)
        for block in self.blocks:
            h = block(h, condition, controls, mask)
        shift, scale = self.modulation(condition)[:, None, :].chunk(2, dim=-1)
        return self.out(self.norm(h) * (1 + scale) + shift)
