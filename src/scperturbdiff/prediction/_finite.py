"""Numbers that are not finite are errors, never cells."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from scperturbdiff.module import PerturbDiffModule

ADVICE = "The model is of no use: load an undamaged one, or train again, with a lower lr or other cells."


def check_weights(module: PerturbDiffModule) -> None:
    """Raise a `ValueError` that names weights that predictions use and that are not finite."""
    vae, network = module.vae, module.generator_ema
    named = [("vae.", chain(vae.named_parameters(), vae.named_buffers())), ("", module.named_buffers(recurse=False))]
    named.append(("generator_ema.", network.named_buffers()))
    if network.network_weight:
        named.append(("generator_ema.", network.named_parameters()))
    values = {prefix + name: value for prefix, of in named for name, value in of}
    values |= {f"exp({name})": value.exp() for name, value in values.items() if name.endswith("px_r")}
    wrong = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(f"Weights are NaN or infinite: {', '.join(wrong[:3])}. {ADVICE}")


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values, all of which must be finite."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what} are NaN or infinite. {ADVICE}")
    return values
