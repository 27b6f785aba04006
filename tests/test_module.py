"""The torch modules: symmetries of the network, conditions, the VAE's likelihood, the moving average, the state."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scvi.distributions import NegativeBinomial
from torch import Tensor, nn

from scperturbdiff.diffusion import NoiseSchedule
from scperturbdiff.module import (
    Components,
    Condition,
    Conditions,
    Generator,
    LatentVAE,
    PerturbationEncoder,
    PerturbDiffModule,
)
from scperturbdiff.module.generator import Randomness
from scperturbdiff.module.vae import negative_binomial_log_prob

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
        torch.randn(n, D),
        torch.rand(n),
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
            self.condition.anchor,
            self.generator.encode_controls(self.controls, self.control_mask),
            Randomness(self.randomness.population, self.randomness.cell[:, cells]),
            mask,
        )


@pytest.fixture
def generator() -> Generator:
    out = Generator(D, n_names=3, width=16, n_layers=2, n_heads=2).eval()
    randomize(out)
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
def test_untrained_generator_predicts_control_plus_anchor() -> None:
    generator = Generator(D, n_names=3, width=16, n_layers=2, n_heads=2)
    condition, start = some_condition(), torch.randn(B, M, D)
    drawn = generator.sample(start, condition, generator.encode_controls(start), n_steps=1)
    assert torch.equal(drawn, start + condition.anchor[:, None])


@torch.no_grad()
def test_untrained_generator_is_the_posterior_mean_of_unit_noise_around_the_controls() -> None:
    generator = Generator(D, n_names=3, width=16, n_layers=1, n_heads=2)
    inputs = Inputs(generator)
    prior = inputs.start + inputs.condition.anchor[:, None]
    alpha, sigma = (f(inputs.t)[:, None, None] for f in (NoiseSchedule().alpha, NoiseSchedule().sigma))
    expected = prior + alpha / (alpha**2 + sigma**2) * (inputs.z - alpha * prior)
    torch.testing.assert_close(inputs.run(), expected, rtol=1e-5, atol=1e-5)


def test_every_weight_learns() -> None:
    """After one step from the zero start, a gradient reaches every parameter (no dead part)."""
    generator = Generator(D, n_names=3, n_categories=(2,), n_numbers=1, width=16, n_layers=2, n_heads=2)
    randomize(generator)
    inputs = Inputs(generator)
    inputs.condition = replace(
        inputs.condition,
        categories=torch.tensor([[0], [1], [0]]),
        numbers=torch.ones(B, 1),
        components=Components(torch.tensor([[0], [1], [2]]), torch.ones(B, 1)),
        keep=torch.tensor([1.0, 0.0, 1.0]),
    )
    inputs.run().square().sum().backward()
    without = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_draws_differ_by_the_noise_of_their_population(generator: Generator) -> None:
    start, condition = torch.randn(1, M, D).expand(2, -1, -1), some_condition(2, [[0], [0]])
    condition = replace(condition, anchor=torch.zeros(2, D), anchor_variance=torch.zeros(2))
    controls = generator.encode_controls(start)
    noise = torch.randn(1, generator.n_population_noise)

    def draw(population_noise: Tensor) -> Tensor:
        torch.manual_seed(0)
        return generator.sample(start, condition, controls, population_noise=population_noise)

    same, changed = draw(noise.expand(2, -1)), draw(torch.cat([noise, noise + 1]))
    assert torch.equal(same[0], changed[0])
    assert (same[1] - changed[1]).abs().max() > 1e-3


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
    assert torch.equal(twice.anchor, condition.anchor[[0, 0, 1, 1, 2, 2]])
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


# ---- perturbation encoder ------------------------------------------------------------------------------------------


@pytest.fixture
def encoder() -> PerturbationEncoder:
    return PerturbationEncoder(n_names=4, n_features=0, width=16).eval()


def components(index: list[list[int]], dose: list[list[float]] | None = None) -> Components:
    at = torch.tensor(index)
    return Components(at, torch.zeros(at.shape) if dose is None else torch.tensor(dose))


@torch.no_grad()
def test_components_have_no_order(encoder: PerturbationEncoder) -> None:
    there = encoder(components([[0, 2, 3]], [[0.5, -1.0, 2.0]]))
    back = encoder(components([[3, 0, 2]], [[2.0, 0.5, -1.0]]))
    swapped = encoder(components([[0, 2, 3]], [[2.0, 0.5, -1.0]]))  # doses belong to components
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)
    assert (there - swapped).abs().max() > 1e-3


@torch.no_grad()
def test_absent_components_leave_no_trace(encoder: PerturbationEncoder) -> None:
    single = encoder(components([[2]], [[0.7]]))
    padded = encoder(components([[2, -1, -1]], [[0.7, 5.0, -5.0]]))
    torch.testing.assert_close(single, padded, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_control_is_the_empty_set(encoder: PerturbationEncoder) -> None:
    control = encoder(components([[-1, -1], [-1, -1]], [[0.0, 0.0], [3.0, -2.0]]))
    assert torch.equal(control[0], control[1])
    assert (encoder(components([[0]])) - control[:1]).abs().max() > 1e-3


@torch.no_grad()
def test_dose_is_continuous(encoder: PerturbationEncoder) -> None:
    doses = torch.linspace(-3, 3, 61)
    codes = encoder(Components(torch.zeros(61, 1, dtype=torch.long), doses[:, None]))
    steps = codes.diff(dim=0).norm(dim=1)
    assert (steps > 0).all() and steps.max() < 0.2 * (codes[0] - codes[-1]).norm()


@torch.no_grad()
def test_a_combination_is_more_than_one_of_its_parts(encoder: PerturbationEncoder) -> None:
    pair, first, second, twice = encoder(components([[0, 1], [0, -1], [1, -1], [0, 0]]))
    assert min((pair - other).abs().max() for other in (first, second, twice)) > 1e-3


@torch.no_grad()
def test_components_known_by_features_only() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16).eval()
    features = torch.randn(5, 3)
    features[4] = features[3]
    known = torch.tensor([True, True, True, True, True])
    named, new, like_new = encoder(components([[1], [3], [4]]), features, known)
    torch.testing.assert_close(new, like_new)
    assert (named - new).abs().max() > 1e-3
    randomize(encoder.name)  # names of others must not leak into a component without a name
    torch.testing.assert_close(encoder(components([[3]]), features, known)[0], new)
    moved = features.clone()
    moved[3] += 1
    assert (encoder(components([[3]]), moved, known)[0] - new).abs().max() > 1e-3


@torch.no_grad()
def test_unknown_features_are_not_read() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16).eval()
    features, known = torch.zeros(2, 3), torch.tensor([False, True])
    before = encoder(components([[0], [1]]), features, known)
    features = features + 7
    after = encoder(components([[0], [1]]), features, known)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@torch.no_grad()
def test_names_are_dropped_in_training_only_where_features_remain() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16, p_drop_name=0.5)
    features, known = torch.randn(2, 3), torch.tensor([True, False])
    many = components([[0]] * 400 + [[1]] * 400)
    in_training = encoder.train()(many, features, known)
    in_use = encoder.eval()(many, features, known)
    same = (in_training - in_use).abs().amax(1) < 1e-5
    assert 0.4 < same[:400].float().mean().item() < 0.6
    assert same[400:].all()


# ---- VAE -----------------------------------------------------------------------------------------------------------


def test_sparse_likelihood_equals_scvi() -> None:
    counts = torch.poisson(torch.rand(6, 30, dtype=torch.float64))
    counts[0] = 0
    counts[1, :3] = torch.tensor([1.0, 50.0, 4000.0])
    mean = (torch.rand(6, 30, dtype=torch.float64) + 0.01).requires_grad_()
    dispersion = (5 * torch.rand(30, dtype=torch.float64) + 0.01).requires_grad_()
    ours = negative_binomial_log_prob(counts, mean, dispersion)
    theirs = NegativeBinomial(mu=mean, theta=dispersion).log_prob(counts).sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)  # cells must not be mixed up
    for found, expected in zip(
        torch.autograd.grad((ours * weights).sum(), (mean, dispersion)),
        torch.autograd.grad((theirs * weights).sum(), (mean, dispersion)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_likelihood_with_a_dispersion_for_each_cell() -> None:
    counts = torch.poisson(torch.full((5, 8), 2.0))
    mean, dispersion = torch.rand(5, 8) + 0.5, torch.rand(5, 8) + 0.5
    theirs = NegativeBinomial(mu=mean, theta=dispersion).log_prob(counts).sum(-1)
    torch.testing.assert_close(negative_binomial_log_prob(counts, mean, dispersion), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def vae() -> LatentVAE:
    return LatentVAE(20, n_batch=2, n_latent=D, n_hidden=16, n_layers=1, gene_likelihood="nb").eval()


def test_encoding_is_deterministic_and_cell_by_cell(vae: LatentVAE) -> None:
    counts = torch.poisson(torch.full((6, 20), 3.0))
    latent = vae.encode(counts)
    assert latent.shape == (6, D)
    assert torch.equal(latent, vae.encode(counts))
    torch.testing.assert_close(latent[2:3], vae.encode(counts[2:3]), rtol=1e-5, atol=1e-6)
    assert (latent[0] - latent[1]).abs().max() > 0


def test_decoded_counts_have_the_library_size_asked_for(vae: LatentVAE) -> None:
    library = torch.tensor([500.0, 5000.0]).repeat(200)
    counts = vae.decode_counts(torch.randn(1, D).expand(400, -1), library, torch.zeros(400))
    assert (counts == counts.round()).all() and (counts >= 0).all()
    for size in (500, 5000):
        assert counts[library == size].sum(1).mean().item() == pytest.approx(size, rel=0.1)


def test_decoding_follows_the_seed_and_the_batch(vae: LatentVAE) -> None:
    latent, library = torch.randn(8, D), torch.full((8,), 1000.0)

    def decode(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return vae.decode_counts(latent, library, torch.zeros(8))

    assert torch.equal(decode(1), decode(1)) and not torch.equal(decode(1), decode(2))
    first, second = (vae.decode_frequencies(latent, torch.full((8,), float(b))) for b in (0, 1))
    torch.testing.assert_close(first.sum(1), torch.ones(8))
    assert (first - second).abs().max() > 1e-4


# ---- joint module --------------------------------------------------------------------------------------------------


def joint(features: np.ndarray | None = None) -> PerturbDiffModule:
    return PerturbDiffModule(
        20, 2, D, 3, features, n_hidden=16, generator_kwargs={"width": 16, "n_layers": 1, "n_heads": 2}
    )


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_moving_average_of_the_weights() -> None:
    module = joint()
    assert all(torch.equal(a, b) for a, b in zip(weights(module.generator_ema), weights(module.generator), strict=True))
    assert not any(p.requires_grad for p in module.generator_ema.parameters())
    before = weights(module.generator_ema)
    randomize(module.generator, 1.0)
    trained = weights(module.generator)
    module.update_ema(0.9)
    for old, new, target in zip(before, weights(module.generator_ema), trained, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.generator), trained, strict=True))
    module.update_ema(0.0)
    for new, target in zip(weights(module.generator_ema), trained, strict=True):
        torch.testing.assert_close(new, target)


def test_latent_scale() -> None:
    module, latent = joint(), torch.randn(500, D) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    module.set_latent_scale(latent)
    scaled = module.standardize(latent)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(D), rtol=0, atol=1e-2)
    torch.testing.assert_close(scaled[:, :3].std(0), torch.ones(3), rtol=1e-3, atol=0)
    assert scaled.isfinite().all()
    torch.testing.assert_close(module.unstandardize(scaled), latent, rtol=1e-4, atol=1e-4)


def test_features_are_scaled_as_in_training() -> None:
    table = np.array([[3.0, 4.0], [np.nan, np.nan], [0.0, 10.0]], np.float32)
    module = joint(table)
    assert module.has_features is not None and module.features is not None
    assert module.has_features.tolist() == [True, False, True]
    assert (module.features[1] == 0).all()
    assert module.features[[0, 2]].square().mean().item() == pytest.approx(1, rel=1e-5)
    more, known = module.scale_features(np.array([[6.0, 8.0]], np.float32))
    assert more is not None and known is not None
    torch.testing.assert_close(more[0], 2 * module.features[0])
    assert joint().features is None


def test_state_holds_everything() -> None:
    table = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    module = joint(table)
    randomize(module.generator)
    module.update_ema(0.5)
    module.set_latent_scale(3 * torch.randn(50, D) + 1)
    rng = np.random.default_rng(1)
    conditions = Conditions(
        rng.normal(size=(6, D)), np.arange(6)[:, None] % 3, np.zeros((6, 1)), np.arange(6) // 3, np.full(6, 0.1)
    )
    module.anchor.fit(conditions, rng.normal(size=(6, D)), table.astype(float))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = joint(np.zeros_like(table))
    other.load_state_dict(torch.load(file, weights_only=False))
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other.state_dict()[name]), name
    asked = conditions.take(np.array([4, 1]))
    features = table.astype(float)
    for novelty in ("seen", "pair", "context", "perturbation"):
        ours, theirs = (m.anchor.predict(asked, novelty, features) for m in (module, other))
        assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.variance, theirs.variance)
