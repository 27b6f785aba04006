"""Training plan of the first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.train import TrainingPlan

if TYPE_CHECKING:
    from scperturbdiff.latent._vae import LatentVAE


class LatentTrainingPlan(TrainingPlan):
    """scvi-tools' training plan with a faster rate for the dispersions.

    Parameters
    ----------
    module
        The VAE.
    lr, weight_decay, eps
        Of Adam. scvi-tools' `eps` of 0.01 slows short runs down.
    dispersion_lr_factor
        Rate of the gene-wise dispersions relative to `lr`: at the common rate they hardly move in short runs.
    **kwargs
        Passed to :class:`scvi.train.TrainingPlan`.
    """

    def __init__(
        self,
        module: LatentVAE,
        *,
        lr: float = 2e-3,
        weight_decay: float = 1e-6,
        eps: float = 1e-8,
        dispersion_lr_factor: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, lr=lr, weight_decay=weight_decay, eps=eps, **kwargs)
        self.dispersion_lr_factor = dispersion_lr_factor

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam with two rates."""
        dispersion = [p for name, p in self.module.named_parameters() if name == "px_r"]
        others = [p for name, p in self.module.named_parameters() if name != "px_r" and p.requires_grad]
        groups = [
            {"params": others, "weight_decay": self.weight_decay},
            {"params": dispersion, "weight_decay": 0.0, "lr": self.lr * self.dispersion_lr_factor},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in others)
        groups = [group for group in groups if group["params"]]
        return {"optimizer": torch.optim.Adam(groups, lr=self.lr, eps=self.eps, fused=fused)}
