"""Speed of both stages as ratios in one run: training, prediction, and the cost of the paper's configuration.

    python benchmarks/speed.py                                   # a laptop's sizes
    python benchmarks/speed.py --precision bf16-mixed --compile  # what these change
    python benchmarks/speed.py --device cuda --width 512 --layers 8 --cells 256 --populations 8 --precision bf16-mixed

Prints tables and writes benchmarks/results/speed_<part>.csv. Times are wall clock; on cuda the device is waited for at
every boundary of the split, and not at all where whole epochs are timed.
"""

from __future__ import annotations

import platform
import resource
import time
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from common import RESULTS, found, parser, quiet
from torch.utils.flop_counter import FlopCounterMode

import scperturbdiff as spd
from scperturbdiff.diffusion import Components, Condition, Generator, Prior
from scperturbdiff.prediction import _destinations

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from anndata import AnnData

PAPER_EVALUATIONS, TIMED_EVALUATIONS = 200, 3
PARTS = ("drawing", "forward", "distance", "backward", "optimiser", "rest")


def wait(device: str) -> None:
    """Let the device finish."""
    if device == "cuda":
        torch.cuda.synchronize()


class Watch(pl.Callback):
    """Times the parts of a training step of the real training loop; the first epoch warms up.

    Parameters
    ----------
    device
        Where training runs.
    split
        Time the parts of a step; `False`: whole epochs only.
    """

    def __init__(self, device: str, split: bool) -> None:
        self.device, self.split = device, split
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.steps: list[float] = []
        self.flops = 0.0
        self._current: dict[str, float] = {}

    def _now(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            out = function(*args, **kwargs)
            self._current[name] = self._now() - start
            return out

        return timed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan: Any = pl_module
        step = plan.training_step
        if not self.split:
            return
        log, plan.log = plan.log, lambda *args, **kwargs: None
        with FlopCounterMode(display=False) as counter:
            step(None, 0).backward()
        plan.zero_grad()
        plan.log = log
        self.flops = float(counter.get_total_flops())
        plan.sampler.draw = self._timed("drawing", plan.sampler.draw)
        plan._objective = self._timed("distance", plan._objective)
        plan.training_step = self._timed("forward", step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch = self._now()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.split:
            self._current, self._start = {}, self._now()

    def on_before_backward(self, *args: Any) -> None:
        if self.split:
            self._backward = self._now()

    def on_after_backward(self, *args: Any) -> None:
        if self.split:
            self._optimiser = self._now()
            self._current["backward"] = self._optimiser - self._backward

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.split or trainer.current_epoch == 0:
            return
        end, parts = self._now(), self._current
        parts["optimiser"] = end - self._optimiser
        parts["forward"] -= parts["drawing"] + parts["distance"]
        parts["rest"] = end - self._start - sum(parts.values())
        for name, value in parts.items():
            self.parts[name].append(value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.steps.append((self._now() - self._epoch) / trainer.num_training_batches)


def peak_memory(device: str) -> float:
    """GB: of the device on cuda, of the process otherwise."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_peak(device: str, bf16: bool, n: int) -> float:
    """Floating point operations per second of a large matrix product."""
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    times = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        x @ x
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def make_screen(n_genes: int, n_cells: int) -> AnnData:
    """Simulated screen with populations of `n_cells` and the larger pools of controls."""
    adata = spd.datasets.simulate(
        n_contexts=3, n_perturbations=6, n_cells_per_population=n_cells, n_genes=n_genes, n_batches=1, seed=0
    )
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"])
    return adata


def timed_training(
    adata: AnnData, options: argparse.Namespace, split: bool, **size: int
) -> tuple[Watch, spd.PerturbDiff]:
    """Train the second stage for three epochs of `options.steps` steps, the first of them a warm-up."""
    watch = Watch(options.device, split)
    model = spd.PerturbDiff(adata, width=size["width"], n_layers=options.layers, n_heads=options.heads)
    common = {"accelerator": options.device, "precision": options.precision, "enable_progress_bar": False, "seed": 0}
    model.train(max_epochs_vae=1, max_epochs_generator=0, **common)
    model.train(
        max_epochs_vae=0,
        max_epochs_generator=3,
        validation_size=0.0,
        callbacks=[watch],
        **common,
        plan_kwargs={
            "n_cells": size["cells"],
            "n_populations": size["populations"],
            "steps_per_epoch": options.steps,
            **({"compile": True} if options.compile else {}),
        },
    )
    return watch, model


def training(options: argparse.Namespace) -> tuple[pd.DataFrame, spd.PerturbDiff, AnnData]:
    """Populations per second and split of a step, one size changed at a time."""
    base = {"width": options.width, "cells": options.cells, "populations": options.populations}
    sizes = [base]
    if not options.only_base:
        for name in base:
            sizes += [{**base, name: base[name] // 2}, {**base, name: base[name] * 2}]
    peak = matmul_peak(options.device, options.precision != "32-true", 8192 if options.device == "cuda" else 2048)
    rows = []
    screens: dict[int, AnnData] = {}
    for size in sizes:
        adata = screens.setdefault(size["cells"], make_screen(options.genes, size["cells"]))
        watch, _ = timed_training(adata, options, True, **size)
        whole, model = timed_training(adata, options, False, **size)
        step = median(whole.steps)
        parts = {name: median(watch.parts[name]) for name in PARTS}
        total = sum(parts.values())
        rows.append(
            {
                **size,
                "ms_step": 1e3 * step,
                "populations_s": size["populations"] / step,
                "cells_s": size["populations"] * size["cells"] / step,
                **{f"{name}_share": parts[name] / total for name in PARTS},
                "share_of_matmul_peak": watch.flops / step / peak,
                "peak_memory_gb": peak_memory(options.device),
            }
        )
        if size is base:
            kept = (model, adata)
        print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    print(f"matrix products reach {peak / 1e9:.0f} GFLOP/s here")
    return pd.DataFrame(rows).assign(gflops_matmul=peak / 1e9), *kept


def prediction(options: argparse.Namespace, model: spd.PerturbDiff, adata: AnnData) -> pd.DataFrame:
    """Predicted cells per second and where the time goes, for growing numbers of cells."""
    model.module.to(options.device)
    module, generator = model.module, model.module.generator_ema
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait(options.device)
            start = time.perf_counter()
            out = function(*args, **kwargs)
            wait(options.device)
            spent[name] += time.perf_counter() - start
            return out

        return run

    generator.sample = timed("sampling", generator.sample)
    module.decode = timed("decoding", module.decode)
    _destinations.respond = timed("counts", _destinations.respond)
    rows: list[dict[str, Any]] = []
    for n_cells in options.predict:
        spent.clear()
        start = time.perf_counter()
        predicted = model.predict(perturbations=["P01", "P02"], n_cells=n_cells, seed=0, progress=False)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "cells": predicted.n_obs,
                "seconds": seconds,
                "cells_s": predicted.n_obs / seconds,
                "sampling_share": spent["sampling"] / seconds,
                "decoding_share": spent["decoding"] / seconds,
                "counts_share": spent["counts"] / seconds,
            }
        )
    table = pd.DataFrame(rows)
    slope = np.polyfit(np.log(table["cells"]), np.log(table["seconds"]), 1)[0]
    print(table.round(3).to_string(index=False))
    print(f"seconds grow as cells to the power {slope:.2f}", flush=True)
    return table.assign(power=slope)


def one_population(n_latent: int, device: str) -> Condition:
    """A condition without anything known."""
    none = torch.zeros(1, 0, device=device)
    return Condition(
        Components(torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, 1, device=device)),
        Prior.none(1, n_latent, device),
        none.long(),
        none,
        torch.ones(1, device=device),
    )


@torch.no_grad()
def seconds_per_cell(options: argparse.Namespace, n_latent: int, n_steps: int, cells: int = 256) -> float:
    """Seconds of sampling a cell of `n_latent` numbers in `n_steps` evaluations, controls encoded once."""
    device = options.device
    generator = (
        Generator(n_latent, n_names=1, width=options.width, n_layers=options.layers, n_heads=options.heads)
        .to(device)
        .eval()
    )
    generator.network_weight.fill_(1)  # a network without weight is not evaluated
    start = torch.randn(1, cells, n_latent, device=device)
    condition, times = one_population(n_latent, device), []
    for _ in range(7):
        wait(device)
        began = time.perf_counter()
        generator.sample(start, condition, generator.encode_controls(start), n_steps=n_steps)
        wait(device)
        times.append(time.perf_counter() - began)
    return median(times[2:]) / cells


def paper(options: argparse.Namespace, predicted: pd.DataFrame) -> pd.DataFrame:
    """Against the cost of the paper's configuration: the same network on all genes, 200 evaluations."""
    ours = seconds_per_cell(options, 32, 1)
    few = seconds_per_cell(options, options.genes, TIMED_EVALUATIONS)
    theirs = few * PAPER_EVALUATIONS / TIMED_EVALUATIONS
    whole = 1 / predicted["cells_s"].iloc[-1]
    row = {
        "genes": options.genes,
        "latent_1_us_cell": 1e6 * ours,
        "genes_200_us_cell": 1e6 * theirs,
        "ratio_sampling": theirs / ours,
        "predict_us_cell": 1e6 * whole,
        "ratio_predict": theirs / whole,
    }
    table = pd.DataFrame([row])
    print(table.round(1).to_string(index=False))
    print(f"(the {PAPER_EVALUATIONS} evaluations are {TIMED_EVALUATIONS} timed ones, scaled)", flush=True)
    return table


def machine(options: argparse.Namespace) -> str:
    """What the numbers were taken on."""
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--width", type=int, default=64)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--heads", type=int, default=4)
    arguments.add_argument("--cells", type=int, default=64, help="cells of a population in training")
    arguments.add_argument("--populations", type=int, default=16, help="populations of a training step")
    arguments.add_argument("--steps", type=int, default=20, help="steps of an epoch; two epochs are timed")
    arguments.add_argument("--genes", type=int, default=2000)
    arguments.add_argument("--predict", type=int, nargs="+", default=[250, 500, 1000, 2000], help="cells per condition")
    arguments.add_argument("--only-base", action="store_true", help="train the base size only")
    arguments.add_argument("--name", default="", help="suffix of the results files")
    options = arguments.parse_args()
    quiet()
    print(machine(options))
    trained, model, adata = training(options)
    predicted = prediction(options, model, adata)
    tables = {"training": trained, "prediction": predicted, "paper": paper(options, predicted)}
    RESULTS.mkdir(exist_ok=True)
    for name, table in tables.items():
        settings = {"precision": options.precision, "compile": options.compile, "machine": machine(options)}
        table.assign(**settings, **found(model)).round(5).to_csv(
            RESULTS / f"speed_{name}{options.name}.csv", index=False
        )


if __name__ == "__main__":
    main()
