"""Training plan of the second stage."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from scperturbdiff.diffusion._distances import energy_distance
from scperturbdiff.diffusion._scores import (
    check_objective,
    functional_energy_score,
    mean_squared_error,
    squared_mmd,
)
from scperturbdiff.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from scperturbdiff.diffusion._condition import PopulationTensors
    from scperturbdiff.diffusion._generator import Generator
    from scperturbdiff.diffusion._populations import PopulationSampler
    from scperturbdiff.diffusion._scores import Objective
    from scperturbdiff.diffusion._selection import NetworkSelection, Strength

VALIDATION_METRIC = "energy_score_validation"
"""Mean functional energy score of populations generated for held-out conditions, decoded log-normalised expression."""
SELECTION_METRIC = "network_change_validation"
"""Mean relative change by the network, see :class:`NetworkSelection`: decides when training stops and what is kept."""
VALIDATION_CHUNK = 8
"""Held-out populations scored at a time: distances between all their cells and draws are in memory at once."""


class GeneratorModule(Protocol):
    """What the plan needs of the module that it trains."""

    generator: Generator
    generator_ema: Generator
    features: Tensor | None
    has_features: Tensor | None

    def update_ema(self, decay: float) -> None:
        """Move the averaged generator towards the trained one."""

    def expression(self, latent: Tensor) -> Tensor:
        """Expected log-normalised expression `(..., n_genes)` of standardised latent vectors."""

    def uneven_expression(self, start: Tensor, moved: Tensor, factor: Tensor) -> Tensor:
        """The same of cells `(n_cells, n_latent)` that respond `factor` `(n_cells,)` times as strongly."""


class GeneratorTrainingPlan(pl.LightningModule):
    """Trains the generator on populations drawn on the device.

    Parameters
    ----------
    module
        The joint module; only its generator is trained.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    sampler
        Draws training populations.
    tensors
        Their conditions.
    validation
        Sampler and conditions of held-out populations.
    selection
        Decides what is kept; a callback of the trainer, too.
    objective
        ``"energy_score"`` (functional energy score), ``"mmd"``, ``"mmd+mse"`` (the paper's), ``"mse"``.
    n_populations, n_cells, n_draws
        Populations a step (of all processes together, rounded up to a multiple of their number), cells a population,
        draws a population (at least 2 for the energy score).
    n_steps
        Steps planned: the learning rate falls along a cosine to a tenth.
    lr, weight_decay, warmup_steps
        Of AdamW.
    ema_decay
        Of the moving average, reached gradually.
    p_terminal
        Share of populations trained at pure noise, where one-step generation starts.
    p_drop_condition
        Share of populations whose perturbation is hidden (for guidance).
    mse_weight
        Weight of the squared error in ``"mmd+mse"``.
    validation_populations, validation_cells, validation_draws
        Held-out populations that are scored, cells of each, and draws for each, at most.
    seed
        Of the validation draws.
    compile
        Compile the network with :func:`torch.compile`: `True`, or the name of a backend. It takes about a minute before
        the first step and a C++ compiler on a CPU.
    """

    def __init__(
        self,
        module: GeneratorModule,
        latent: Tensor,
        sampler: PopulationSampler,
        tensors: PopulationTensors,
        validation: tuple[PopulationSampler, PopulationTensors] | None = None,
        selection: NetworkSelection | None = None,
        *,
        objective: Objective = "energy_score",
        n_populations: int = 16,
        n_cells: int = 64,
        n_draws: int = 2,
        n_steps: int = 1000,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 50,
        ema_decay: float = 0.995,
        p_terminal: float = 0.5,
        p_drop_condition: float = 0.1,
        mse_weight: float = 1.0,
        validation_populations: int = 128,
        validation_cells: int = 128,
        validation_draws: int = 4,
        seed: int = 0,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        check_objective(objective, n_draws)
        self.module = module
        self.register_buffer("latent", latent, persistent=False)
        self.sampler, self.tensors, self.validation, self.selection = sampler, tensors, validation, selection
        self.objective, self.seed = objective, seed
        self.validation_populations, self.validation_cells = validation_populations, validation_cells
        self.validation_draws = validation_draws
        self.n_populations, self.n_cells, self.n_draws = n_populations, n_cells, n_draws
        self.n_steps, self.lr, self.weight_decay, self.warmup_steps = n_steps, lr, weight_decay, warmup_steps
        self.ema_decay, self.mse_weight = ema_decay, mse_weight
        self.p_terminal, self.p_drop_condition = p_terminal, p_drop_condition
        # a function, not a module: names of weights in checkpoints stay as they are
        self._denoise: Callable[..., Tensor] = module.generator.forward
        if compile:
            self._denoise = torch.compile(self._denoise, backend="inductor" if compile is True else compile)
        self.last_distances: Tensor | None = None

    latent: Tensor

    def release(self) -> None:
        """Let go of cells and populations: scvi-tools keeps its trainer, and so the plan, with the model."""
        for name in ("latent", "sampler", "tensors", "validation"):
            setattr(self, name, None)

    def settings(self) -> dict[str, Any]:
        """Plain values of the arguments that decide what is trained, for the report."""
        names = (
            "objective", "n_populations", "n_cells", "n_draws", "n_steps", "lr", "weight_decay", "warmup_steps",
            "ema_decay", "p_terminal", "p_drop_condition", "mse_weight", "validation_populations", "validation_cells",
            "validation_draws", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def setup(self, stage: str) -> None:
        """Train the generator alone: several processes would wait for gradients of all else."""
        trained = {id(p) for p in self.module.generator.parameters()}
        self._resting = [p for p in self.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in self._resting:
            parameter.requires_grad_(False)

    def teardown(self, stage: str) -> None:
        """Let the rest be trained again."""
        for parameter in self._resting:
            parameter.requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        """Put cells in a new order."""
        self.sampler.shuffle()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draw populations, noise them, denoise them `n_draws` times and score the result."""
        own = math.ceil(self.n_populations / self.sampler.n_ranks)
        drawn = self.sampler.draw(own, self.n_cells, self.n_draws)
        clean, start, controls = (self.latent[rows] for rows in (drawn.cells, drawn.starts, drawn.controls))
        b, k = drawn.group.shape[0], self.n_draws
        generator, device = self.module.generator, clean.device
        novelty = torch.randint(self.tensors.n_novelties, (b,), device=device)
        keep = (torch.rand(b, device=device) >= self.p_drop_condition).float()
        condition = self.tensors.condition(drawn.group, novelty, keep)
        t = generator.schedule.sample_times((b,), self.p_terminal, device)
        z_t = generator.schedule.add_noise(clean[:, None].expand_as(start), t[:, None], self._noise(start, t))
        embedded = generator.embed(condition, self.module.features, self.module.has_features)
        randomness = generator.draw_randomness(b * k, self.n_cells, device)
        estimate = self._denoise(
            z_t.flatten(0, 1),
            t.repeat_interleave(k, 0),
            start.flatten(0, 1),
            embedded.repeat_interleave(k, 0),
            condition.prior.repeat(k),
            generator.encode_controls(controls).repeat(k),
            randomness,
            drawn.mask.repeat_interleave(k, 0),
        ).unflatten(0, (b, k))
        loss = self._objective(estimate, clean, drawn.mask, t).mean()
        self.log(
            "generator_loss_train", loss, on_step=False, on_epoch=True, batch_size=b, prog_bar=True, sync_dist=True
        )
        return loss

    def _noise(self, start: Tensor, t: Tensor) -> Tensor:
        """Noise `(b, n_draws, n_cells, n_latent)`: independent at pure noise, else shared by the draws."""
        noise = self.module.generator.schedule.noise_like(start)
        return torch.where((t >= 1)[:, None, None, None], noise, noise[:, :1].expand_as(noise))

    def _objective(self, estimate: Tensor, clean: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        if self.objective == "energy_score":
            return functional_energy_score(estimate, clean, mask, mask)
        error = mean_squared_error(estimate, clean, mask)
        if self.objective == "mse":
            return error
        distance = squared_mmd(estimate, clean, mask, mask)
        return distance if self.objective == "mmd" else distance + self.mse_weight * error

    def on_train_batch_end(self, *args: Any) -> None:
        """Move the average of the weights."""
        step = self.global_step
        self.module.update_ema(min(self.ema_decay, (1 + step) / (10 + step)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the scores of the averaged weights."""
        scores, distances = self.validation_scores()
        self.last_distances = distances
        n = self.validation[0].n_populations if self.validation is not None else 1
        how: dict[str, Any] = {"on_epoch": True, "batch_size": n, "sync_dist": True}
        self.log(VALIDATION_METRIC, scores.mean(), prog_bar=True, **how)
        self.log("energy_distance_validation", distances.mean(), **how)
        if self.selection is not None and not self.trainer.sanity_checking:
            self.log(SELECTION_METRIC, self.selection.change(distances).mean(), **how)

    @cached_property
    def scored(self) -> Tensor:
        """Held-out populations that are scored: all, or a random choice of many."""
        assert self.validation is not None
        with seeded(self.seed, self.device):
            return torch.randperm(self.validation[0].n_populations, device=self.device)[: self.validation_populations]

    @torch.no_grad()
    def validation_scores(self, strength: Strength | None = None) -> tuple[Tensor, Tensor]:
        """Generate held-out populations with the averaged weights from fixed seeds and score them.

        Several processes share the populations, and each returns the scores of all, as one process would.

        Parameters
        ----------
        strength
            How strongly cells of a held-out population respond; `None`: all alike.

        Returns
        -------
        Functional energy scores `(n_populations,)` and energy distances (U-statistic) `(n_populations, n_draws)`.
        """
        assert self.validation is not None
        generator = self.module.generator_ema
        was_training = generator.training
        generator.eval()
        parts = []
        for number, group in enumerate(self.scored.split(VALIDATION_CHUNK)):
            if number % self.sampler.n_ranks != self.sampler.rank:
                nothing = torch.zeros(len(group), self.validation_draws, device=self.device)
                parts.append((nothing[:, 0], nothing))
                continue
            # the same cells whether or not the network draws random numbers of its own
            with seeded(derive_seed(self.seed, "validation", number), self.device):
                parts.append(self._score_populations(group, strength))
        generator.train(was_training)
        scores, distances = (self._of_all(torch.cat(values)) for values in zip(*parts, strict=True))
        return scores, distances

    def _of_all(self, values: Tensor) -> Tensor:
        """Sum over processes: each has zeros where another scores."""
        if self.sampler.n_ranks == 1:
            return values
        strategy = self.trainer.strategy
        total: Tensor = strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
        return total.to(values.device)

    def _score_populations(self, group: Tensor, strength: Strength | None) -> tuple[Tensor, Tensor]:
        """Functional energy score `(b,)` and energy distance `(b, n_draws)` of held-out populations `group` `(b,)`."""
        assert self.validation is not None
        sampler, tensors = self.validation
        generator, k = self.module.generator_ema, self.validation_draws
        cells, mask = sampler.cells.draw(group, min(int(sampler.cells.count.max()), self.validation_cells))
        starts, _ = sampler.controls.draw(sampler.control_group[group], k * cells.shape[1])
        start = self.latent[starts].unflatten(1, (k, -1))
        condition = tensors.condition(group, torch.zeros_like(group), torch.ones(len(group), device=self.device))
        drawn = generator.sample(
            start.flatten(0, 1),
            condition.repeat(k),
            generator.encode_controls(start[:, 0]).repeat(k),
            features=self.module.features,
            has_features=self.module.has_features,
        ).unflatten(0, (-1, k))
        # where predictions are used: what is better in the latent space may be worse in the genes it decodes to
        target = self.module.expression(self.latent[cells])
        drawn = self.module.expression(drawn) if strength is None else self._uneven(start, drawn, group, strength)
        distance = energy_distance(drawn, target[:, None], mask[:, None].expand(-1, k, -1), mask[:, None])
        return functional_energy_score(drawn, target, mask, mask), distance

    def _uneven(self, start: Tensor, drawn: Tensor, group: Tensor, strength: Strength) -> Tensor:
        """Expression of draws `(b, n_draws, n_cells, n_latent)` whose cells respond unevenly."""
        each = drawn.shape[1] * drawn.shape[2]
        factor = torch.as_tensor(np.concatenate([strength(number, each) for number in group.tolist()])).to(drawn)
        found = self.module.uneven_expression(start.flatten(0, 2), drawn.flatten(0, 2), factor)
        return found.unflatten(0, drawn.shape[:3])

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay; no weight decay on vectors."""
        parameters = [p for p in self.module.generator.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        # one call instead of ten for each tensor; Lightning does not clip the gradients of one in mixed precision
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters) and self.trainer.precision == "32-true"
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        scale = partial(relative_rate, warmup_steps=self.warmup_steps, n_steps=self.n_steps)  # a closure is not pickled
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def relative_rate(step: int, warmup_steps: int, n_steps: int) -> float:
    """Learning rate of a step relative to the highest: it rises in a line, then falls along a cosine to a tenth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = min((step - warmup_steps) / max(n_steps - warmup_steps, 1), 1.0)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


class StepsDataModule(pl.LightningDataModule):
    """Counts training steps: populations are drawn on the device inside the step, no cell passes through a loader."""

    def __init__(self, steps_per_epoch: int, with_validation: bool) -> None:
        super().__init__()
        self.steps_per_epoch, self.with_validation = steps_per_epoch, with_validation

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """Numbers of the steps of an epoch."""
        return torch.utils.data.DataLoader(range(self.steps_per_epoch), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> torch.utils.data.DataLoader | list[Any]:
        """One step: all held-out populations at once."""
        return torch.utils.data.DataLoader(range(1), batch_size=None) if self.with_validation else []  # type: ignore[arg-type]
