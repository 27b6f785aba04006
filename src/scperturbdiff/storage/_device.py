"""Where a model that is read is put."""

from __future__ import annotations

import torch


def choose_device(accelerator: str = "auto", device: int | str = "auto") -> torch.device:
    """The device of an accelerator as scvi-tools names them.

    Parameters
    ----------
    accelerator
        `"cpu"`, `"gpu"` or `"cuda"`, `"mps"`; `"auto"`: a GPU where there is one.
    device
        Its number; `"auto"`: the first.

    Raises
    ------
    ValueError
        If there is no such accelerator here.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    there["gpu"], there["auto"] = there["cuda"] or there["mps"], 1
    if there.get(accelerator, 0) == 0:
        known = ", ".join(name for name, n in there.items() if n)
        raise ValueError(f"accelerator={accelerator!r} is not here. Allowed: {known}.")
    number = 0 if device == "auto" else int(device)
    kind = accelerator
    if accelerator in ("gpu", "auto"):
        kind = "cuda" if there["cuda"] else "cpu" if accelerator == "auto" else "mps"
    if not 0 <= number < there[kind]:
        raise ValueError(f"device={device!r} is not one of the {there[kind]} of accelerator={accelerator!r}.")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, number)
