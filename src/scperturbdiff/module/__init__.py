"""Torch modules: the latent VAE, perturbation encoder, population transformer, anchor and what joins them."""

from scperturbdiff.module.anchor import AnchorPrediction, ResponseAnchor
from scperturbdiff.module.condition import Anchor, Condition
from scperturbdiff.module.generator import Generator
from scperturbdiff.module.joint import PerturbDiffModule
from scperturbdiff.module.kernel import Conditions
from scperturbdiff.module.perturbation import Components, PerturbationEncoder
from scperturbdiff.module.transformer import PopulationTransformer
from scperturbdiff.module.vae import LatentVAE

__all__ = [
    "Anchor",
    "AnchorPrediction",
    "Components",
    "Condition",
    "Conditions",
    "Generator",
    "LatentVAE",
    "PerturbDiffModule",
    "PerturbationEncoder",
    "PopulationTransformer",
    "ResponseAnchor",
]
