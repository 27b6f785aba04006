"""The perturbation encoder: from a set of components with doses and features to one vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Components:
    """Perturbations of `b` populations as padded sets of at most `c` components.

    Attributes
    ----------
    index
        Row of each component in the tables of names and features, `(b, c)`; -1 where there is none.
    dose
        Log-scaled dose of each component, `(b, c)`: 0 without a dose key.
    """

    index: Tensor
    dose: Tensor

    @property
    def mask(self) -> Tensor:
        """Where there is a component, `(b, c)`."""
        return self.index >= 0

    def take(self, rows: Tensor) -> Components:
        """The perturbations of `rows`."""
        return Components(self.index[rows], self.dose[rows])


class PerturbationEncoder(nn.Module):
    """Vector of a perturbation: components are embedded by name and features, modulated by dose, summed.

    Parameters
    ----------
    n_names
        Components with a learned vector of their own (those seen in training).
    n_features
        Dimension of the feature table, 0 without one.
    width
        Dimension of the output.
    p_drop_name
        Probability with which a component with features loses its name in training, so that features alone carry
        a component that training never saw.
    """

    def __init__(self, n_names: int, n_features: int, width: int, p_drop_name: float = 0.5) -> None:
        super().__init__()
        self.n_names, self.n_features, self.p_drop_name = n_names, n_features, p_drop_name
        self.name = nn.Embedding(max(n_names, 1), width)
        nn.init.normal_(self.name.weight, std=0.5)
        self.feature = (
            nn.Sequential(nn.Linear(n_features, width), nn.SiLU(), nn.Linear(width, width)) if n_features else None
        )
        self.dose = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.component = nn.Sequential(nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, width))

    def forward(
        self, components: Components, features: Tensor | None = None, has_features: Tensor | None = None
    ) -> Tensor:
        """Encode `components`, `(b, width)`.

        Parameters
        ----------
        components
            Indices at or beyond `n_names` have no name of their own and live on their features.
        features
            Table `(n_components, n_features)`, standardised.
        has_features
            Which rows of the table are known, `(n_components,)`.
        """
        index = components.index.clamp_min(0)
        named = (index < self.n_names)[..., None]
        vector = self.name(index.clamp_max(max(self.n_names - 1, 0)))
        if self.feature is not None and features is not None and has_features is not None:
            known = has_features[index][..., None]
            if self.training:
                named = named & ~(known & (torch.rand(index.shape, device=index.device) < self.p_drop_name)[..., None])
            vector = vector * named + self.feature(features[index]) * known
        else:
            vector = vector * named
        dose = components.dose[..., None]
        scale, shift = self.dose(torch.cat([dose, dose.square()], dim=-1)).chunk(2, dim=-1)
        vector = self.component(vector * (1 + scale) + shift) * components.mask[..., None]
        return self.out(vector.sum(-2))
