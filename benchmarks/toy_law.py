"""Does one evaluation of the network sample the law of populations? A toy with a hidden factor that moves them.

Every treated population lies elsewhere: its cells are `0.5 * normal + h * direction`, with one unrecorded `h` for the
population, of two modes (-1.5 or 1.5), Gaussian (standard deviation 1.5) or always 0. Nothing that the network is given
tells `h`, so populations drawn for the same condition should spread as the true ones do. The functional energy score
asks for that; the squared distance of kernel mean embeddings asks for the mixture of all populations.

Run `python benchmarks/toy_law.py`; `--steps`, `--seeds`, `--laws` and `--objectives` change what is run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from scperturbdiff.diffusion import functional_energy_score, squared_mmd
from scperturbdiff.module import Anchor, Components, Condition, Generator

N_LATENT, N_CELLS, WITHIN, BETWEEN = 4, 32, 0.5, 1.5
LAWS = ("two modes", "gaussian", "none")
OBJECTIVES = {"functional energy score": functional_energy_score, "squared MMD": squared_mmd}


@dataclass(frozen=True)
class Spread:
    """Standard deviations of populations, over all latent dimensions.

    Attributes
    ----------
    between
        Of the means of populations.
    within
        Of the cells of a population, per dimension.
    far
        Share of populations whose mean is nearer to one of the two modes than to the middle.
    """

    between: float
    within: float
    far: float


def draw_truth(law: str, n_populations: int) -> Tensor:
    """Populations `(n_populations, N_CELLS, N_LATENT)` of a law."""
    if law not in LAWS:
        raise ValueError(f"law={law!r} is not one of {LAWS}.")
    direction = torch.full((N_LATENT,), N_LATENT**-0.5)
    if law == "two modes":
        hidden = torch.randint(2, (n_populations, 1, 1)) * 2.0 - 1
    else:
        hidden = torch.randn(n_populations, 1, 1) * (law == "gaussian")
    return draw_controls(n_populations) + BETWEEN * hidden * direction


def draw_controls(n_populations: int) -> Tensor:
    """Control cells `(n_populations, N_CELLS, N_LATENT)`."""
    return WITHIN * torch.randn(n_populations, N_CELLS, N_LATENT)


def one_condition(n_populations: int) -> Condition:
    """The same perturbation for all, no anchor, no covariates."""
    none = torch.zeros(n_populations, 0)
    return Condition(
        Components(torch.zeros(n_populations, 1, dtype=torch.long), torch.zeros(n_populations, 1)),
        Anchor.none(n_populations, N_LATENT),
        none.long(),
        none,
        torch.ones(n_populations),
    )


def train(
    law: str,
    objective: str,
    n_steps: int,
    seed: int,
    n_populations: int = 16,
    n_draws: int = 2,
    p_terminal: float = 0.5,
) -> Generator:
    """Train a small generator on fresh populations of `law`."""
    torch.manual_seed(seed)
    score = OBJECTIVES[objective]
    generator = Generator(N_LATENT, n_names=1, width=64, n_layers=2, n_heads=4)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps, pct_start=0.1)
    condition = one_condition(n_populations)
    for _ in range(n_steps):
        clean = draw_truth(law, n_populations)
        start = torch.stack([draw_controls(n_populations) for _ in range(n_draws)], dim=1)
        t = generator.schedule.sample_times((n_populations,), p_terminal, "cpu")
        noise = generator.schedule.noise_like(start)
        # draws share the noised population, except at pure noise, where each starts from its own
        noise = torch.where((t >= 1)[:, None, None, None], noise, noise[:, :1].expand_as(noise))
        z_t = generator.schedule.add_noise(clean[:, None].expand_as(start), t[:, None], noise)
        estimate = generator(
            z_t.flatten(0, 1),
            t.repeat_interleave(n_draws),
            start.flatten(0, 1),
            generator.embed(condition, None, None).repeat_interleave(n_draws, 0),
            condition.anchor.repeat(n_draws),
            generator.encode_controls(start[:, 0]).repeat(n_draws),
            generator.draw_randomness(n_populations * n_draws, N_CELLS, "cpu"),
        ).unflatten(0, (n_populations, n_draws))
        loss = score(estimate, clean).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return generator.eval()


@torch.no_grad()
def draw(generator: Generator, n_populations: int = 500, n_steps: int = 1) -> Tensor:
    """Populations drawn for the one condition."""
    start = draw_controls(n_populations)
    return generator.sample(
        start, one_condition(n_populations), generator.encode_controls(draw_controls(n_populations)), n_steps=n_steps
    )


def measure(populations: Tensor) -> Spread:
    """How populations spread."""
    means = populations.mean(1)
    along = means.sum(-1).abs() * N_LATENT**-0.5
    return Spread(
        means.var(0).sum().sqrt().item(),
        populations.var(1).mean().sqrt().item(),
        (along > BETWEEN / 2).float().mean().item(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--laws", nargs="+", default=LAWS, choices=LAWS)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--n-steps", type=int, default=1, help="evaluations of the network a population")
    arguments = parser.parse_args()
    print("| hidden factor | objective | s.d. of population shifts (true) | within (true) | far (true) | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    torch.set_num_threads(1)  # matrices this small are slower on several threads
    for law in arguments.laws:
        for objective in arguments.objectives:
            found, began = [], time.perf_counter()
            for seed in range(arguments.seeds):
                found.append(measure(draw(train(law, objective, arguments.steps, seed), n_steps=arguments.n_steps)))
            seconds = (time.perf_counter() - began) / arguments.seeds
            true = measure(draw_truth(law, 2000))
            columns = [
                f"{mean(getattr(s, name) for s in found):.2f} ({getattr(true, name):.2f})"
                for name in ("between", "within", "far")
            ]
            print(f"| {law} | {objective} | {' | '.join(columns)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
