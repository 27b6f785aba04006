"""The second stage of training: retrieval, states of cells, and the generator of populations."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scperturbdiff.data import FEW_CELLS, matrix_name, stored_layer
from scperturbdiff.diffusion import (
    SELECTION_METRIC,
    GeneratorTrainingPlan,
    NetworkSelection,
    PopulationSampler,
    PopulationTensors,
    Prior,
    RepeatableEpochs,
    StepsDataModule,
    split_callbacks,
)
from scperturbdiff.progress import StageName
from scperturbdiff.responses import (
    MeasuredPopulations,
    ResponseSettings,
    SummedCounts,
    measure_populations,
    replicate_factors,
)
from scperturbdiff.retrieval import OwnGene, Retrieval, draw_factors
from scperturbdiff.training._folds import fold_evidence
from scperturbdiff.training._latent import Stage, encode_cells, standardize_cells
from scperturbdiff.training._own_genes import own_gene
from scperturbdiff.training._parallel import Processes
from scperturbdiff.training._populations import (
    have_features,
    hold_out,
    population_sampler,
    population_tensors,
    predicted_prior,
    rehearsed_priors,
)
from scperturbdiff.training._responsiveness import responsiveness_laws
from scperturbdiff.training._settings import SETTINGS
from scperturbdiff.training._states import StateSearch, describe_states
from scperturbdiff.training._unseen import ShortTraining, UnseenPopulations
from scperturbdiff.training_report import TrainingReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import Novelty

COVARIATES = "If responses differ by them, as by time, give them as context_keys or time as dose_key."


@dataclass(frozen=True)
class PopulationTraining:
    """What the second stage is trained on.

    Attributes
    ----------
    module
        Its latent scale is that of the cells.
    measured
        All populations.
    training, held_out
        Rows of those to train on, and of those that decide when to stop and whether the network is used.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    matrix
        Counts of all cells, `(n_cells, n_genes)`.
    batch
        Batch codes of all cells, `(n_cells,)`.
    features
        Feature table of components.
    seed
        Of all choices.
    short
        How VAEs are trained that do not see some of the conditions.
    enough
        Whether there are populations enough to tell if a network helps, or the user wants it untested.
    own_genes
        Column of the gene that each component is named after, -1 where there is none; `None`: nowhere.
    """

    module: PerturbDiffModule
    measured: MeasuredPopulations
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    latent: torch.Tensor
    matrix: Any
    batch: NDArray[np.int64]
    features: NDArray[np.float64] | None
    seed: int
    short: ShortTraining
    enough: bool = True
    own_genes: NDArray[np.int64] | None = None

    @classmethod
    def prepare(
        cls,
        module: PerturbDiffModule,
        manager: AnnDataManager,
        table: PopulationTable,
        features: NDArray[np.float64] | None,
        validation_size: float | None,
        seed: int,
        own_genes: NDArray[np.int64] | None = None,
        short: ShortTraining = ShortTraining(),
    ) -> PopulationTraining:
        """Fix the latent space, measure the populations in it, hold some of them out."""
        matrix, batch = manager.get_from_registry("X"), manager.get_from_registry("batch").ravel().astype(np.int64)
        counted = SummedCounts(table, matrix, matrix_name(stored_layer(manager.registry)))
        latent = standardize_cells(module, encode_cells(module, counted.blocks(), matrix.shape[0]))
        training, held_out, enough = hold_out(table, validation_size, seed, have_features(features))
        measured = measure_populations(table, latent, counted, batch, module.shares)
        cells = latent, matrix, batch, features
        return cls(module, measured, training, held_out, *cells, seed, short, enough, own_genes)

    def stage(
        self,
        max_epochs: int,
        early_stopping: bool,
        trainer: dict[str, Any],
        asked: bool = False,
        steps_per_epoch: int = SETTINGS.steps_per_epoch,
        gradient_clip_val: float = 1.0,
        ckpt_path: str | Path | None = None,
        processes: Processes = Processes(),
        **plan_kwargs: Any,
    ) -> Stage:
        """Stage 2: retrieve responses, train the generator on populations.

        Of no epochs where there are too few populations to tell whether the network helps, unless they are `asked` for.
        Several `processes` share the populations of each step.
        """
        max_epochs = max_epochs if self.enough or asked else 0
        module, training = self.module, self.measured.take(self.training)
        if (search := self._retrieve(training)) is not None:
            module.by_state = search.choose()
        self._set_replicates(training, self._n_factors(plan_kwargs.get("objective", "energy_score")))
        sampler, tensors = self._training_set(training, rehearse=max_epochs > 0)
        if max_epochs > 0:
            sampler.share(processes.rank, processes.n)
        validation, novelty = self._validation_set() if len(self.held_out) else (None, [])
        selection = NetworkSelection(
            self.measured.table.condition[self.held_out],
            partial(self._strength, training, novelty),
            min_held_out=SETTINGS.min_held_out,
            untested=self.enough,
        )
        steps = max_epochs * steps_per_epoch
        plan = GeneratorTrainingPlan(
            module, self.latent, sampler, tensors, validation, selection, n_steps=steps, seed=self.seed, **plan_kwargs
        )
        for generator in (module.generator, module.generator_ema):
            generator.network_weight.fill_(1)
        module.generator.train()
        checkpoints, others = split_callbacks(trainer.get("callbacks"))
        options: dict[str, Any] = {
            "early_stopping": early_stopping and validation is not None,
            "early_stopping_monitor": SELECTION_METRIC,
            "early_stopping_patience": 10,
            "gradient_clip_val": gradient_clip_val,
            "check_val_every_n_epoch": 1,
            "ckpt_path": ckpt_path,
            **trainer,
            "callbacks": [*others, StageName("Populations"), RepeatableEpochs(self.seed), selection],
        }
        data = StepsDataModule(steps_per_epoch, validation is not None)
        return Stage(plan, data, max_epochs, options, checkpoints, selection, novelty)

    def finish(self, stage: Stage) -> TrainingReport:
        """Let retrieval and the law of replicates know all populations, and report.

        Populations that were held out to score the network are evidence for predictions all the same.
        """
        plan, selection = stage.plan, stage.selection
        if not isinstance(plan, GeneratorTrainingPlan) or selection is None:
            raise TypeError("finish needs the second stage.")
        module = self.module
        if len(self.held_out):
            by_state, search = module.by_state, self._retrieve(self.measured)
            if by_state is not None and search is not None:
                module.by_state = search.fit(by_state.states)
            self._set_replicates(self.measured, self._n_factors(plan.objective))
        if module.retrieval is not None:
            unseen = UnseenPopulations(
                module, self.measured, self.matrix, self.batch, self.features, self.short, self.seed
            )
            folds = fold_evidence(self.measured, module, self.matrix, unseen, self.seed)
            module.retrieval = replace(module.retrieval, folds=folds, own_gene=self._own_gene())
        table, result = self.measured.table, selection.result
        if module.retrieval is not None and not result.weight:
            laws = responsiveness_laws(self.measured, module, module.retrieval, self.seed)
            module.retrieval = replace(module.retrieval, responsiveness=laws)
        retrieval = module.retrieval
        module.generator_ema.network_weight.fill_(result.weight)
        factors = module.generator_ema.replicate_factors
        plan.release()
        selection.release()
        return TrainingReport(
            n_populations=len(table),
            n_conditions=len(np.unique(table.condition)),
            n_contexts=len(np.unique(table.context)),
            n_replicated=int((np.bincount(table.condition) > 1).sum()) if len(table) else 0,
            replicate_directions=int(factors.any(0).sum()),
            retrieval={} if retrieval is None else {str(way): share for way, share in retrieval.explained.items()},
            n_states=1 if module.by_state is None else len(module.by_state.states),
            fold_weight={} if retrieval is None else {str(w): x for w, x in retrieval.fold_weights().items()},
            hardly_respond={} if retrieval is None else retrieval.hardly_respond(),
            held_out=dict(Counter(map(str, stage.novelty))),
            network_weight=result.weight,
            network_reason=result.reason,
            network={k: v for k, v in asdict(result).items() if k not in ("weight", "reason")},
            little_evidence=tuple(table.little_evidence(FEW_CELLS)),
            notes=(*self._of_covariates(), *(() if retrieval is None else retrieval.notes)),
            settings={
                "training": asdict(SETTINGS),
                "responses": asdict(ResponseSettings()),
                "retrieval": asdict(module.retrieval_settings),
                "diffusion": plan.settings(),
            },
        )

    def populations(self) -> pd.DataFrame:
        """One row per population: labels, numbers of cells and controls, and whether it was held out."""
        table = self.measured.table
        return table.report.assign(held_out=np.isin(np.arange(len(table)), self.held_out))

    def states(self, genes: Sequence[str], contexts: Sequence[str]) -> pd.DataFrame | None:
        """What states of cells populations are mixtures of (:func:`describe_states`); `None`: of one."""
        by_state = self.module.by_state
        if by_state is None:
            return None
        return describe_states(by_state, self.measured, self.module.expression, genes, contexts)

    def _strength(
        self, training: MeasuredPopulations, novelty: Sequence[Novelty]
    ) -> Callable[[int, int], NDArray[np.float64]] | None:
        """How strongly cells of held-out populations respond, by the law of the training populations."""
        assert self.module.retrieval is not None  # of the training populations
        found = responsiveness_laws(training, self.module, self.module.retrieval, self.seed)
        laws = [found.get(way) for way in novelty]
        if all(law is None for law in laws):
            return None

        def draw(number: int, n: int) -> NDArray[np.float64]:
            rng, law = np.random.default_rng([self.seed, number]), laws[number]
            return np.ones(n) if law is None else draw_factors(law, n, rng)

        return draw

    def _of_covariates(self) -> tuple[str, ...]:
        n = self.measured.table.n_of_several_covariates
        told = f"Retrieval takes populations that differ in covariates alone for replicates: those of {n} conditions. "
        return (told + COVARIATES,) if n else ()

    def _own_gene(self) -> OwnGene:
        """By how much the gene changes that a perturbation is named after."""
        if self.own_genes is None:
            return OwnGene()
        return own_gene(self.measured.table, self.matrix, self.own_genes, self.seed, self.module.retrieval_settings)

    @staticmethod
    def _n_factors(objective: str) -> int | None:
        """Directions in which draws may vary, at most: objectives other than the energy score ask for none."""
        return None if objective == "energy_score" else 0

    def _retrieve(self, populations: MeasuredPopulations) -> StateSearch | None:
        """Fit retrieval; what states of cells are searched with, or `None` without populations."""
        module, responses = self.module, populations.responses
        module.retrieval = module.by_state = None
        if not len(responses):
            return None
        module.retrieval = Retrieval.fit(responses, self.features, module.retrieval_settings, self.seed)
        return StateSearch(populations, module.retrieval, module.expression, self.seed)

    def _set_replicates(self, populations: MeasuredPopulations, n_factors: int | None) -> None:
        """Give both generators the law of replicates."""
        most = self.module.generator.n_population_noise if n_factors is None else n_factors
        found = replicate_factors(populations, most)
        factors = torch.as_tensor(found, dtype=torch.float32, device=self.latent.device)
        for generator in (self.module.generator, self.module.generator_ema):
            generator.set_replicates(factors)

    def _training_set(
        self, training: MeasuredPopulations, rehearse: bool
    ) -> tuple[PopulationSampler, PopulationTensors]:
        retrieval, device = self.module.retrieval, self.latent.device
        n, rng = len(training.table), np.random.default_rng(self.seed)
        rows = np.sort(rng.permutation(n)[: SETTINGS.rehearsed])  # what is retrieved of each costs as much as there are
        some, priors = training.take(rows), list[Prior]()
        if rehearse and retrieval is not None:
            priors = rehearsed_priors(training, retrieval, self.module.by_state, rows, device)
        return population_sampler(some.table, device), population_tensors(some, priors, device)

    def _validation_set(self) -> tuple[tuple[PopulationSampler, PopulationTensors], list[Novelty]]:
        held_out = self.measured.take(self.held_out)
        assert self.module.retrieval is not None  # see split_populations
        prior, found = predicted_prior(held_out, self.module.retrieval, self.module.by_state, self.latent.device)
        tensors = population_tensors(held_out, [prior], self.latent.device)
        return (population_sampler(held_out.table, self.latent.device), tensors), found.novelty
