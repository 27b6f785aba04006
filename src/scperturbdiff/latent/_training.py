"""Training plan of the first stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi.train import TrainingPlan

from scperturbdiff.arguments import check_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from torch.optim import Optimizer

    from scperturbdiff.latent._vae import LatentVAE


class LatentTrainingPlan(TrainingPlan):
    """scvi-tools' training plan with a faster rate for the dispersions.

    Parameters
    ----------
    module
        The VAE.
    lr, weight_decay, eps
        Of Adam. scvi-tools' `eps` of 0.01 slows short runs down.
    max_kl_weight
        Weight of the KL term once it has risen.
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
        max_kl_weight: float = 0.05,
        dispersion_lr_factor: float = 10.0,
        **kwargs: Any,
    ) -> None:
        check_number("lr", lr, "(0, 10000]")
        check_number("eps", eps, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        check_number("dispersion_lr_factor", dispersion_lr_factor, "(0, inf)")
        super().__init__(module, lr=lr, weight_decay=weight_decay, eps=eps, max_kl_weight=max_kl_weight, **kwargs)
        self.dispersion_lr_factor = dispersion_lr_factor

    def get_optimizer_creator(self) -> Callable[[Iterable[Tensor]], Optimizer]:
        """scvi-tools' optimizer with a group of its own for the dispersions."""
        make = super().get_optimizer_creator()
        dispersions = {id(p) for name, p in self.module.named_parameters() if name.endswith("px_r")}

        def create(parameters: Iterable[Tensor]) -> Optimizer:
            everything = list(parameters)
            optimizer: Optimizer = make([p for p in everything if id(p) not in dispersions])
            own = [p for p in everything if id(p) in dispersions]
            if own:
                rate = self.lr * self.dispersion_lr_factor
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
            if self.optimizer_name in ("Adam", "AdamW") and all(p.device.type in ("cpu", "cuda") for p in everything):
                for group in optimizer.param_groups:
                    group["fused"] = True  # one call instead of ten for each tensor
            return optimizer

        return create
