"""PerturbDiff: the model as users of scvi-tools know one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from scperturbdiff._describe import DescriptionMixin
from scperturbdiff.data.seeds import resolve_seed, seeded
from scperturbdiff.data.table import build_populations
from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.prediction import Settings, predict_cells
from scperturbdiff.train.query import adapt
from scperturbdiff.train.resume import restore_module
from scperturbdiff.train.stages import TrainerArguments, plan_epochs, train_generator, train_vae

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from scperturbdiff.diffusion.samplers import Sampler

logger = logging.getLogger(__name__)


class PerturbDiff(DescriptionMixin):
    """Functional diffusion over populations of cells :cite:p:`yuan2026`.

    Learns how populations of single cells respond to perturbations and generates whole populations for perturbations,
    contexts or pairs of both that were never measured, from control cells alone. A count VAE :cite:p:`lopez2018` gives
    the latent space; a set transformer, trained with a proper score for distributions over distributions, generates
    populations in it.

    Parameters
    ----------
    adata
        AnnData registered via :meth:`setup_anndata`.
    registry
        Registry of a saved model; used by :meth:`load` when there is no AnnData.
    n_latent
        Dimension of the latent space.
    n_hidden, n_vae_layers, vae_dropout
        Width, depth and dropout of the VAE's encoder and decoder.
    width, n_layers, n_heads, dropout
        Size of the set transformer.
    rho
        Share of the diffusion noise common to all cells of a population, in [0, 1).
    vae_kwargs
        Further arguments of :class:`scvi.module.VAE`.
    generator_kwargs
        Further arguments of :class:`scperturbdiff.module.Generator`.

    Examples
    --------
    >>> adata = scperturbdiff.datasets.simulate()
    >>> scperturbdiff.PerturbDiff.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control", context_keys=["cell_type"]
    ... )
    >>> model = scperturbdiff.PerturbDiff(adata)
    >>> model.train()
    >>> controls = adata[adata.obs["perturbation"] == "control"]
    >>> predicted = model.predict(controls, ["P01", "P02"])
    """

    _module_cls = PerturbDiffModule
    is_trained_: bool

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        n_latent: int = 32,
        n_hidden: int = 256,
        n_vae_layers: int = 1,
        vae_dropout: float = 0.1,
        width: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        dropout: float = 0.0,
        rho: float = 0.0,
        vae_kwargs: Mapping[str, Any] | None = None,
        generator_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(adata, registry)
        space = self.conditions
        self.module = self._module_cls(
            self.summary_stats.n_vars,
            self.summary_stats.n_batch,
            n_latent,
            len(space.components),
            space.feature_matrix(),
            [len((space.categories or {})[key]) for key in space.categorical_keys],
            len(space.continuous_keys),
            n_hidden=n_hidden,
            n_vae_layers=n_vae_layers,
            vae_dropout=vae_dropout,
            rho=rho,
            vae_kwargs=vae_kwargs,
            generator_kwargs={
                "width": width,
                "n_layers": n_layers,
                "n_heads": n_heads,
                "dropout": dropout,
                **(generator_kwargs or {}),
            },
        )
        self.populations_: pd.DataFrame | None = None
        self.vae_is_adapted_ = False
        self._model_summary_string = (
            f"PerturbDiff with {len(space.components)} perturbation components, "
            f"{len(space.contexts)} treated contexts, n_latent: {n_latent}, width: {width}, n_layers: {n_layers}"
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def load_query_data(
        cls, adata: AnnData | MuData, reference_model: PerturbDiff | str | Path, *, accelerator: str = "cpu"
    ) -> PerturbDiff:
        """A model for new data that starts from the weights of a trained one.

        The new data may have perturbations, contexts, covariates and batches that the reference never saw; a reference
        trained on unperturbed cells only is adapted to perturbed ones this way. :meth:`train` then adapts the VAE
        shortly (a fifth of the usual epochs; ``max_epochs_vae=0`` keeps it) and trains the generator on from where it
        was.

        Parameters
        ----------
        adata
            New data, registered with :meth:`setup_anndata` or :meth:`setup_mudata`; else it is registered with the
            reference's own arguments. It must have the reference's genes in the same order.
        reference_model
            Trained model, or the folder of a saved one. It is not changed.
        accelerator
            Where a saved reference is read to.

        Returns
        -------
        A model to be trained. Weights are taken over for the VAE (decoder weights of a new batch start as the mean of
        the known ones), the transformer, and components and covariate values of the same name; the rest starts afresh
        and is named in the log.

        Raises
        ------
        ValueError
            If genes differ, or the reference is not trained.
        """
        if isinstance(reference_model, PerturbDiff):
            return adapt(cls, adata, reference_model)
        return adapt(cls, adata, cls.load(str(reference_model), adata=False, accelerator=accelerator))

    @property
    def populations(self) -> pd.DataFrame | None:
        """Training populations, their numbers of cells and controls, and whether controls agreed on every key.

        `None` before the second stage was trained.
        """
        return None if self.populations_ is None else self.populations_.copy()

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_epochs_vae: int | None = None,
        max_epochs_generator: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float = 1.0,
        validation_size: float | None = None,
        batch_size: int = 128,
        early_stopping: bool = True,
        vae_plan_kwargs: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        seed: int | None = None,
        ckpt_path: str | Path | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train both stages: the latent VAE, then the generator of populations.

        Parameters
        ----------
        max_epochs
            Upper bound on the epochs of either stage.
        max_epochs_vae
            Epochs of the first stage (passes over all cells). Default: 15, within 1,250 to 5,000 steps; none when the
            model was trained before. 0 keeps the VAE as it is.
        max_epochs_generator
            Epochs of the second stage (of 50 steps each). 0 trains the VAE only.
        accelerator, devices
            As in scvi-tools; ``"auto"`` takes a GPU where there is one.
        train_size
            Share of the cells that the VAE is trained on.
        validation_size
            Share of the *populations* held out of the second stage to stop it in time. Default: 0.1, but 8 populations
            at least and a third of them at most; none if there are fewer than 4.
        batch_size
            Cells a step of the first stage.
        early_stopping
            Stop the second stage when the energy distance to held-out populations no longer falls. The weights kept are
            the averaged weights with the best score, whether or not training stopped early.
        vae_plan_kwargs
            Passed to :class:`scvi.train.TrainingPlan`, e.g. `lr`, `max_kl_weight`.
        plan_kwargs
            Passed to :class:`scperturbdiff.train.GeneratorTrainingPlan`, e.g. `objective`, `n_cells`, `lr`; also
            `steps_per_epoch`.
        seed
            The same seed gives the same training. Default: `scvi.settings.seed`, else one drawn from torch's state.
        ckpt_path
            Checkpoint of the second stage, written by a :class:`lightning.pytorch.callbacks.ModelCheckpoint` in
            `callbacks`: training goes on from there, with the VAE and the seed of the checkpoint, and reaches the state
            of an uninterrupted run. The other arguments must be those of that run.
        **trainer_kwargs
            Passed to :class:`scvi.train.Trainer` in both stages: `callbacks`, `logger`, `enable_progress_bar`,
            `check_val_every_n_epoch`, `precision`, ...
        """
        if self.adata is None:
            raise ValueError(
                "The model was loaded without an AnnData, so there is nothing to train on. Load it with adata=..."
            )
        vae_epochs, generator_epochs = plan_epochs(
            self.adata.n_obs,
            batch_size,
            max_epochs,
            max_epochs_vae,
            max_epochs_generator,
            trained=self.is_trained_,
            adapted=self.vae_is_adapted_,
        )
        trainer = TrainerArguments(accelerator, devices, trainer_kwargs)
        seed = resolve_seed(seed)
        if ckpt_path is not None:
            vae_epochs, seed = 0, restore_module(self, ckpt_path)
        # before the first stage, so that populations without controls are known of at once
        table = build_populations(self.conditions, self._annotated().obs) if generator_epochs else None
        history: dict[str, pd.DataFrame] = {}
        with seeded(seed):
            if vae_epochs:
                history |= train_vae(self, vae_epochs, batch_size, train_size, trainer, **(vae_plan_kwargs or {}))
            if table is not None:
                history |= train_generator(
                    self,
                    table,
                    generator_epochs,
                    validation_size,
                    early_stopping,
                    seed,
                    trainer,
                    ckpt_path=ckpt_path,
                    **(plan_kwargs or {}),
                )
        self.history_, self.is_trained_ = history, True
        self.module.eval()

    def predict(
        self,
        adata: AnnData | None = None,
        perturbations: Sequence[str] | pd.DataFrame | None = None,
        *,
        n_cells: int | None = None,
        n_populations: int = 1,
        n_steps: int | None = None,
        sampler: Sampler = "renoise",
        guidance: float = 1.0,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None = None,
        transform_batch: str | None = None,
        layer: str | None = None,
        target_sum: float = 1e4,
        seed: int | None = None,
        progress: bool = True,
        output: str | Path | None = None,
    ) -> AnnData:
        """Predict populations of cells from control cells.

        Parameters
        ----------
        adata
            Control cells, with the context, batch and covariate columns of :meth:`setup_anndata`; genes are found by
            name. If it has the perturbation column, only its control cells are used. `None`: the controls the model was
            trained with. Never changed.
        perturbations
            Names (combinations joined by the separator), or a DataFrame with one row a wanted population: a column
            named like `perturbation_key`, and as wanted the dose, covariates, contexts and `n_cells`. `None`: all
            training perturbations.
        n_cells
            Cells per context and perturbation; batches share them in proportion to their controls. Default: as many as
            there are controls. Fewer start from controls whose mean expression is that of all.
        n_populations
            Independent draws of each population, numbered in ``obs["population"]``.
        n_steps
            Network evaluations a population. Default 1. A network that training found no better than the retrieved
            response alone is silent and evaluated once; ``uns["scperturbdiff"]["n_steps"]`` says how many there were.
        sampler
            ``"renoise"``, ``"ddim"`` or ``"dpm++"``; matters for more than one step. See
            :func:`scperturbdiff.diffusion.sample`.
        guidance
            Weight of classifier-free guidance; 1 is off.
        perturbation_embeddings
            Features of components that :meth:`setup_anndata` was not given.
        transform_batch
            Decode all cells as if they came from this batch.
        layer
            Layer of `adata` with raw counts. Default: the one of :meth:`setup_anndata` if `adata` has it, else `X`.
        target_sum
            Counts per cell of the log-normalised `X`.
        seed
            The same seed gives the same cells. Default: `scvi.settings.seed`, else a random one, kept in `uns`.
        progress
            Show a progress bar.
        output
            Path of an `.h5ad` or `.zarr` file to write the cells to while they are generated, for requests that do not
            fit into memory.

        Returns
        -------
        A new AnnData of predicted cells: log-normalised expression in `X`, sampled counts in ``layers["counts"]``,
        latent vectors in ``obsm["X_perturbdiff"]``; in `obs` the perturbation, dose, contexts, covariates and batch
        under the names of :meth:`setup_anndata`, the control cell each cell started from, and the draw; in
        ``uns["scperturbdiff"]`` how it was made, the conditions with how each is new to the model, and doses outside
        the measured range. With `output`, the matrices of the returned AnnData stay on disk.

        Raises
        ------
        KeyError
            If a perturbation was never seen and has no features, or a column is missing.
        ValueError
            If genes are missing, there are no controls, or counts are not counts.
        """
        prediction = self._prepare(
            adata,
            perturbations,
            perturbation_embeddings,
            layer,
            n_cells=n_cells,
            settings=Settings(resolve_seed(seed), n_populations, 1 if n_steps is None else n_steps, sampler, guidance),
            transform_batch=transform_batch,
        )
        return predict_cells(prediction, target_sum=target_sum, progress=progress, output=output)
