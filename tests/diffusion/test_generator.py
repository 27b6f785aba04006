"""The generator of populations: symmetries of the network, conditions, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scperturbdiff.diffusion import Components, Condition, Generator, NoiseSchedule, Prior, Sampler
from scperturbdiff.diffusion._condition import Randomness

B, M, C, D = 3, 7, 9, 4
"""Populations, cells, controls, latent dimensions."""


def randomize(module: nn.Module, scale: float = 0.2) -> None:
    """Give every weight a value: an untrained network ignores much of its input by design."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)


def some_condition(n: int = B, index: list[list[int]] | None = None) -> Condition:
    components = torch.tensor([[0], [1], [2]][:n] if index is None else index)
    return Condition(
        Components(components, torch.zeros(components.shape)),
        Prior(torch.randn(n, D), torch.rand(n), 0.3 * torch.randn(n), torch.randn(n, D)),
        torch.zeros(n, 0, dtype=torch.long),
        torch.zeros(n, 0),
        torch.ones(n),
    )


class Inputs:
    """One call of the generator, with every part replaceable."""

    def __init__(self, generator: Generator, n_cells: int = M) -> None:
        self.generator = generator
        self.z, self.start = torch.randn(B, n_cells, D), torch.randn(B, n_cells, D)
        self.t = torch.tensor([0.2, 0.7, 1.0])
        self.controls, self.control_mask = torch.randn(B, C, D), None
        self.condition = some_condition()
        self.randomness = generator.draw_randomness(B, n_cells, "cpu")

    def run(self, cells: slice | Tensor = slice(None), mask: Tensor | None = None) -> Tensor:
        """Output for the cells chosen."""
        return self.generator(
            self.z[:, cells],
            self.t,
            self.start[:, cells],
            self.generator.embed(self.condition, None, None),
            self.condition.prior,
            self.generator.encode_controls(self.controls, self.control_mask),
            Randomness(self.randomness.population, self.randomness.cell[:, cells]),
            mask,
        )


@pytest.fixture
def generator() -> Generator:
    out = Generator(D, n_names=3, width=16, n_layers=2, n_heads=2).eval()
    randomize(out)
    out.network_weight.fill_(1)
    return out


@pytest.fixture
def inputs(generator: Generator) -> Inputs:
    return Inputs(generator)


# ---- symmetries ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_permuted_cells_give_permuted_cells(inputs: Inputs) -> None:
    order = torch.randperm(M)
    torch.testing.assert_close(inputs.run(order), inputs.run()[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_order_of_controls_does_not_matter(inputs: Inputs) -> None:
    before = inputs.run()
    inputs.controls = inputs.controls[:, torch.randperm(C)]
    torch.testing.assert_close(inputs.run(), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cells_look_at_each_other_and_at_the_controls(inputs: Inputs) -> None:
    before = inputs.run()
    inputs.controls = inputs.controls + 1
    assert (inputs.run() - before).abs().amin((1, 2)).gt(0).all()
    alone = inputs.run(slice(0, 1))
    assert (alone - inputs.run()[:, :1]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_does_not_change_the_cells(generator: Generator) -> None:
    inputs = Inputs(generator, n_cells=M + 5)
    mask = torch.arange(M + 5).expand(B, -1) < M
    padded = inputs.run(mask=mask)
    torch.testing.assert_close(padded[:, :M], inputs.run(slice(0, M)), rtol=1e-4, atol=1e-5)
    assert (inputs.run()[:, :M] - padded[:, :M]).abs().max() > 1e-3  # unmasked, the padding would count


@torch.no_grad()
def test_padded_controls_do_not_count(inputs: Inputs) -> None:
    before = inputs.run()
    inputs.controls = torch.cat([inputs.controls, 5 * torch.randn(B, 4, D)], dim=1)
    inputs.control_mask = torch.arange(C + 4).expand(B, -1) < C
    torch.testing.assert_close(inputs.run(), before, rtol=1e-4, atol=1e-5)
    inputs.control_mask = None
    assert (inputs.run() - before).abs().max() > 1e-3


@torch.no_grad()
def test_populations_of_a_batch_are_independent(inputs: Inputs) -> None:
    before = inputs.run()
    inputs.z[0] += 3
    inputs.start[0] += 3
    after = inputs.run()
    torch.testing.assert_close(after[1:], before[1:])
    assert (after[0] - before[0]).abs().min() > 0


# ---- generator -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_untrained_generator_moves_controls_as_retrieval_says(weight: float) -> None:
    generator = Generator(D, n_names=3, width=16, n_layers=2, n_heads=2)
    assert generator.network_weight == 0  # until training says otherwise
    generator.network_weight.fill_(weight)
    condition, start = some_condition(), torch.randn(B, M, D)
    drawn = generator.sample(start, condition, generator.encode_controls(start), n_steps=1)
    torch.testing.assert_close(drawn, condition.prior.move(start), rtol=0, atol=1e-6)
    plain = replace(condition.prior, spread=torch.zeros(B))
    torch.testing.assert_close(plain.move(start), start + condition.prior.shift[:, None])


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["renoise", "ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_network_without_weight_is_not_evaluated(
    generator: Generator, sampler: Sampler, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition, start = some_condition(), torch.randn(B, M, D)
    options = {"n_steps": 7, "sampler": sampler, "guidance": guidance}
    controls = generator.encode_controls(start)
    with_network = generator.sample(start, condition, controls, **options)
    assert generator.n_evaluations(7) == 7 and (with_network - condition.prior.move(start)).abs().max() > 0.1
    generator.network_weight.fill_(0)
    assert generator.n_evaluations(7) == 0

    def never(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("The network was evaluated.")

    for part in (generator.transformer, generator.perturbation):
        monkeypatch.setattr(part, "forward", never)
    drawn = generator.sample(start, condition, controls, **options)
    assert torch.equal(drawn, condition.prior.move(start))


@torch.no_grad()
def test_the_weight_scales_what_the_network_adds(inputs: Inputs) -> None:
    full = inputs.run()
    inputs.generator.network_weight.fill_(0)
    without = inputs.run()
    inputs.generator.network_weight.fill_(0.25)
    torch.testing.assert_close(inputs.run() - without, 0.25 * (full - without), rtol=1e-4, atol=1e-5)


def test_the_weight_is_saved_with_the_weights(generator: Generator) -> None:
    generator.network_weight.fill_(0.5)
    other = Generator(D, n_names=3, width=16, n_layers=2, n_heads=2)
    other.load_state_dict(generator.state_dict())
    assert other.network_weight == 0.5 and not any(p is other.network_weight for p in other.parameters())


def test_the_prior_moves_the_mean_and_scales_the_spread() -> None:
    start = torch.randn(2, 500, D)
    centre = start.mean(1)
    moved = Prior(torch.ones(2, D), torch.zeros(2), torch.tensor([0.0, -0.7]), centre).move(start)
    torch.testing.assert_close(moved.mean(1), centre + 1, rtol=1e-4, atol=1e-4)
    ratio = (moved.std(1) / start.std(1)).log()
    torch.testing.assert_close(ratio, torch.tensor([0.0, -0.7])[:, None].expand(-1, D), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_untrained_generator_is_the_posterior_mean_of_unit_noise_around_the_controls() -> None:
    generator = Generator(D, n_names=3, width=16, n_layers=1, n_heads=2)
    generator.network_weight.fill_(1)
    inputs = Inputs(generator)
    prior = inputs.condition.prior.move(inputs.start)
    alpha, sigma = (f(inputs.t)[:, None, None] for f in (NoiseSchedule().alpha, NoiseSchedule().sigma))
    expected = prior + alpha / (alpha**2 + sigma**2) * (inputs.z - alpha * prior)
    torch.testing.assert_close(inputs.run(), expected, rtol=1e-5, atol=1e-5)


def test_every_weight_learns() -> None:
    """After one step from the zero start, a gradient reaches every parameter (no dead part)."""
    size = {"width": 16, "n_layers": 2, "n_heads": 2}
    generator = Generator(D, n_names=3, n_categories=(2,), n_numbers=1, **size)
    randomize(generator)
    generator.network_weight.fill_(1)
    generator.set_replicates(torch.randn(D, 1))
    inputs = Inputs(generator)
    inputs.condition = replace(
        inputs.condition,
        categories=torch.tensor([[0], [1], [0]]),
        numbers=torch.ones(B, 1),
        components=Components(torch.tensor([[0], [1], [2]]), torch.ones(B, 1)),
        keep=torch.tensor([1.0, 0.0, 1.0]),
    )
    inputs.run().square().sum().backward()
    without = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-4]
    assert without == ["transformer.out.bias"]  # which would only move the mean


@torch.no_grad()
@pytest.mark.parametrize("n_factors", [0, 1])
def test_draws_differ_by_the_noise_of_their_population(generator: Generator, n_factors: int) -> None:
    """Where replicates lie apart; else draws differ by their cells only."""
    generator.set_replicates(torch.randn(D, n_factors))
    start, condition = torch.randn(1, M, D).expand(2, -1, -1), some_condition(2, [[0], [0]])
    condition = replace(condition, prior=Prior.none(2, D))
    controls = generator.encode_controls(start)
    noise = torch.randn(1, generator.n_population_noise)

    def draw(population_noise: Tensor) -> Tensor:
        torch.manual_seed(0)
        return generator.sample(start, condition, controls, population_noise=population_noise)

    same, changed = draw(noise.expand(2, -1)), draw(torch.cat([noise, noise + 1]))
    assert torch.equal(same[0], changed[0])
    assert bool((same[1] - changed[1]).abs().max() > 1e-3) == bool(n_factors)


@torch.no_grad()
@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
def test_network_shapes_populations_and_does_not_move_them(
    generator: Generator, n_steps: int, sampler: Sampler
) -> None:
    """Means are those of retrieval, plus where the replicate lies, whatever the network and the number of steps."""
    generator.set_replicates(torch.randn(D, 1))
    m = 4000
    start, condition = torch.randn(1, m, D), some_condition(1, [[0]])
    controls = generator.encode_controls(start[:, :50])
    noise = torch.randn(1, generator.n_population_noise)
    wanted = (condition.prior.move(start).mean(1) + generator.replicate_offset(noise))[0]
    torch.manual_seed(0)
    options = {"population_noise": noise, "n_steps": n_steps, "sampler": sampler}
    drawn = generator.sample(start, condition, controls, **options)
    torch.testing.assert_close(drawn.mean(1)[0], wanted, atol=0.1, rtol=0)
    shape = drawn - drawn.mean(1, keepdim=True)
    moved = condition.prior.move(start)
    assert (shape - (moved - moved.mean(1, keepdim=True))).square().mean() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 5])
def test_corrections_of_the_cells_that_are_there_sum_to_zero(generator: Generator, m: int) -> None:
    """One cell alone is corrected by nothing; cells that are not there do not count."""
    inputs = Inputs(generator)
    mask = torch.arange(M).expand(B, -1) < m
    with_network = inputs.run(mask=mask)
    generator.network_weight.fill_(0)
    correction = (with_network - inputs.run(mask=mask))[:, :m]
    torch.testing.assert_close(correction.sum(1), torch.zeros(B, D), rtol=0, atol=1e-5)
    assert (correction.abs().max() > 1e-3) == (m > 1)


# ---- the law of replicates -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("mixture", [False, True])
def test_populations_without_a_perturbation_are_no_replicates(
    generator: Generator, weight: float, mixture: bool
) -> None:
    """A response varies, controls do not: beside one another in a call, too."""
    generator.network_weight.fill_(weight)
    condition = replace(some_condition(2, [[-1], [0]]), prior=Prior.none(2, D))
    start = torch.randn(1, M, D).expand(2, -1, -1)
    controls = generator.encode_controls(start)
    noise = torch.ones(2, generator.n_population_noise)

    def draw(factors: Tensor) -> Tensor:
        generator.set_replicates(factors)
        torch.manual_seed(0)
        return generator.sample(start, condition, controls, population_noise=noise, mixture=mixture)

    apart = draw(5 * torch.randn(D, 2)) - draw(torch.zeros(D, 0))
    assert apart[1].abs().max() > 0.1
    moved = apart[0].mean(0)  # the network sees which directions there are, and shapes cells by them
    torch.testing.assert_close(moved, torch.zeros(D), rtol=0, atol=1e-5)
    if not weight:
        assert torch.equal(apart[0], torch.zeros(M, D))


@torch.no_grad()
def test_a_mixture_spreads_cells_as_replicates_and_leaves_the_population(generator: Generator) -> None:
    """The covariance of cells grows by that of replicates; the mean of the population does not wander."""
    generator.network_weight.fill_(0)
    factors = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.0, 0.0]])
    generator.set_replicates(factors)
    m = 20_000
    start, condition = torch.randn(1, m, D).expand(2, -1, -1), some_condition(2, [[0], [0]])
    condition = replace(condition, prior=Prior.none(2, D))
    controls = generator.encode_controls(start[:, :5])
    torch.manual_seed(0)
    offset = generator.sample(start, condition, controls, mixture=True) - start
    for population in offset:
        torch.testing.assert_close(torch.cov(population.T), factors @ factors.T, rtol=0.05, atol=0.05)
        assert (population.mean(0).abs() < 5 * factors.norm(dim=1) / m**0.5 + 1e-9).all()
    torch.manual_seed(0)
    offset = generator.sample(start, condition, controls) - start  # one replicate: all cells together
    assert offset.std(1).max() < 1e-5 and (offset[0, 0] - offset[1, 0]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
def test_more_steps_keep_the_spread_of_a_mixture(generator: Generator, n_steps: int, sampler: Sampler) -> None:
    """The covariance that replicates add to cells, with a network that adds nothing."""
    for parameter in generator.transformer.out.parameters():
        parameter.zero_()
    factors = torch.tensor([[2.0], [1.0], [0.0], [0.0]])
    b, m = 20, 250
    start, condition = 0.5 * torch.randn(1, m, D).expand(b, -1, -1), some_condition(1, [[0]]).repeat(b)
    condition = replace(condition, prior=Prior.none(b, D))
    controls = generator.encode_controls(start[:, :5])

    def covariance(of: Tensor) -> Tensor:
        generator.set_replicates(of)
        torch.manual_seed(0)
        options = {"mixture": True, "n_steps": n_steps, "sampler": sampler}
        drawn = generator.sample(start, condition, controls, **options)
        torch.testing.assert_close(drawn.mean((0, 1)), start.mean((0, 1)), rtol=0, atol=0.1)
        return torch.cov(drawn.flatten(0, 1).T)

    added = covariance(factors) - covariance(torch.zeros(D, 0))
    torch.testing.assert_close(added, factors @ factors.T, rtol=0.1, atol=0.15)


@torch.no_grad()
def test_guidance_zero_hides_the_perturbation(generator: Generator) -> None:
    start, condition = torch.randn(B, M, D), some_condition()
    controls = generator.encode_controls(start)

    def draw(condition: Condition, guidance: float) -> Tensor:
        torch.manual_seed(0)
        return generator.sample(start, condition, controls, n_steps=2, guidance=guidance)

    hidden, shown = draw(condition.hidden(), 1.0), draw(condition, 1.0)
    torch.testing.assert_close(draw(condition, 0.0), hidden)
    assert (shown - hidden).abs().max() > 1e-3
    # one step is linear in the weight
    torch.manual_seed(0)
    one, zero, two = [], [], []
    for weight, kept in ((1.0, one), (0.0, zero), (2.0, two)):
        torch.manual_seed(0)
        kept.append(generator.sample(start, condition, controls, guidance=weight))
    torch.testing.assert_close(two[0], 2 * one[0] - zero[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hidden_perturbation_leaves_no_trace(generator: Generator) -> None:
    condition = some_condition()
    other = replace(condition, components=Components(torch.tensor([[2], [2], [0]]), torch.ones(3, 1)))
    assert torch.equal(generator.embed(condition.hidden(), None, None), generator.embed(other.hidden(), None, None))
    assert not torch.equal(generator.embed(condition, None, None), generator.embed(other, None, None))


@torch.no_grad()
def test_repeated_conditions_stay_next_to_each_other() -> None:
    condition = some_condition()
    twice = condition.repeat(2)
    assert torch.equal(twice.prior.shift, condition.prior.shift[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(twice.prior.spread, condition.prior.spread[[0, 0, 1, 1, 2, 2]])
    assert twice.components.index[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@torch.no_grad()
def test_covariates_count_and_dropped_ones_do_not() -> None:
    generator = Generator(D, n_names=3, n_categories=(2, 3), n_numbers=1, width=16, n_layers=1, n_heads=2)
    condition = replace(
        some_condition(), numbers=torch.zeros(B, 1), categories=torch.tensor([[-1, -1], [0, 1], [1, 2]])
    )
    plain = replace(condition, categories=torch.full((B, 2), -1))
    with_codes, without = generator.embed(condition, None, None), generator.embed(plain, None, None)
    assert torch.equal(with_codes[0], without[0])
    expected = generator.categorical[0].weight[1] + generator.categorical[1].weight[2]
    torch.testing.assert_close(with_codes[2] - without[2], expected, rtol=1e-4, atol=1e-5)


def test_width_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="width=10 must be divisible by n_heads=4"):
        Generator(D, n_names=1, width=10, n_heads=4)
