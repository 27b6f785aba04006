"""PerturbDiff: the model as users of scvi-tools know one."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField
from scvi.model.base import BaseModelClass
from scvi.utils import setup_anndata_dsp

from scperturbdiff.data.conditions import ConditionSpace, learn_conditions
from scperturbdiff.data.counts import check_counts, check_unique_names, get_matrix, read_genes
from scperturbdiff.data.registry import CONDITIONS, check_genes, stored_batches, stored_genes, stored_space
from scperturbdiff.data.seeds import resolve_seed, seeded
from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.prediction import Prediction, Settings, encode_rows, predict_cells, prepare
from scperturbdiff.train.stages import TrainerArguments, plan_epochs, train_generator, train_vae

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.diffusion.samplers import Sampler

logger = logging.getLogger(__name__)


class PerturbDiff(BaseModelClass):
    """Functional diffusion over populations of cells :cite:p:`yuan2026`.

    Learns how populations of single cells respond to perturbations and generates whole populations for perturbations,
    contexts or pairs of both that were never measured, from control cells alone. A count VAE :cite:p:`lopez2018` gives the
    latent space; a set transformer, trained with a proper score for distributions over distributions, generates
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

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        n_latent: int = 32,
        n_hidden: int = 128,
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
        self._model_summary_string = (
            f"PerturbDiff with {len(space.components)} perturbation components, {len(space.contexts)} treated contexts, "
            f"n_latent: {n_latent}, width: {width}, n_layers: {n_layers}"
        )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str | None = None,
        control: str | None = None,
        *,
        layer: str | None = None,
        context_keys: Sequence[str] | str | None = None,
        batch_key: str | None = None,
        dose_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | str | None = None,
        control_match_keys: Sequence[str] | None = None,
        separator: str = "+",
        **kwargs: Any,
    ) -> None:
        """%(summary)s

        Counts, labels and keys are checked here; every error names what is wrong and what is allowed.

        Parameters
        ----------
        %(param_adata)s
        perturbation_key
            Column of `obs` with the perturbation of each cell: a name, a combination such as ``"A+B"``, or a list of
            names. `None`: the cells are unperturbed (marginal pretraining).
        control
            Value of that column that marks control cells.
        %(param_layer)s Must hold raw counts.
        context_keys
            Columns that name the context: cell type, line, patient. A response is transferred between contexts.
        %(param_batch_key)s A population does not reach across batches.
        dose_key
            Column with the dose, in any unit: a number, or one number a component joined like the names. 0 is control.
        categorical_covariate_keys, continuous_covariate_keys
            Further conditions, the same for all cells of a population: time, site, sex.
        perturbation_embeddings
            Features of perturbation components: a DataFrame with one row a component, a dict of vectors, or a key of
            `adata.uns` with either. Components that training never sees can be predicted from theirs.
        control_match_keys
            Columns on which a population and its controls should agree, the most important first; controls that agree
            on most of them are taken. Default: contexts, covariates and batch. Agreement on contexts is required.
        separator
            Joins the components of a combination.

        Raises
        ------
        KeyError
            If a key does not exist.
        ValueError
            If counts are not counts, names repeat, or labels or doses are wrong.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_unique_names(adata)
        check_counts(get_matrix(adata, layer), "adata.X" if layer is None else f"adata.layers[{layer!r}]")
        source = kwargs.get("source_registry")
        if source is not None:
            check_genes(adata, source)
            space = stored_space(source)
        else:
            space = learn_conditions(
                adata,
                perturbation_key=perturbation_key,
                control=control,
                context_keys=context_keys,
                batch_key=batch_key,
                dose_key=dose_key,
                categorical_covariate_keys=categorical_covariate_keys,
                continuous_covariate_keys=continuous_covariate_keys,
                perturbation_embeddings=perturbation_embeddings,
                control_match_keys=control_match_keys,
                separator=separator,
            )
        manager = AnnDataManager(
            fields=[
                LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=True),
                CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
                CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, None),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        manager.registry[CONDITIONS] = asdict(space)
        cls.register_manager(manager)

    @property
    def conditions(self) -> ConditionSpace:
        """The conditions the model knows: keys, components, contexts, doses, covariates, features."""
        return stored_space(self.registry_)

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
        **trainer_kwargs: Any,
    ) -> None:
        """Train both stages: the latent VAE, then the generator of populations.

        Parameters
        ----------
        max_epochs
            Upper bound on the epochs of either stage.
        max_epochs_vae
            Epochs of the first stage (passes over all cells). Default: enough for 2,500 steps. 0 keeps the VAE as it is.
        max_epochs_generator
            Epochs of the second stage (of 50 steps each). 0 trains the VAE only.
        accelerator, devices
            As in scvi-tools; ``"auto"`` takes a GPU where there is one.
        train_size
            Share of the cells that the VAE is trained on.
        validation_size
            Share of the *populations* held out of the second stage to stop it in time. Default: 0.1 with at least 20
            populations, else none.
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
            Makes training repeatable on its own; by default torch's state is used, as set by `scvi.settings.seed`.
        **trainer_kwargs
            Passed to :class:`scvi.train.Trainer` in both stages: `callbacks`, `logger`, `enable_progress_bar`,
            `check_val_every_n_epoch`, `precision`, ...
        """
        if self.adata is None:
            raise ValueError(
                "The model was loaded without an AnnData, so there is nothing to train on. Load it with adata=..."
            )
        vae_epochs, generator_epochs = plan_epochs(
            self.adata.n_obs, batch_size, max_epochs, max_epochs_vae, max_epochs_generator, trained=self.is_trained_
        )
        trainer = TrainerArguments(accelerator, devices, trainer_kwargs)
        split_seed = resolve_seed(seed)
        history: dict[str, pd.DataFrame] = {}
        with nullcontext() if seed is None else seeded(seed):
            if vae_epochs:
                history |= train_vae(self, vae_epochs, batch_size, train_size, trainer, **(vae_plan_kwargs or {}))
            if generator_epochs:
                history |= train_generator(
                    self, generator_epochs, validation_size, early_stopping, split_seed, trainer, **(plan_kwargs or {})
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
            Control cells, with the context, batch and covariate columns of :meth:`setup_anndata`; genes are found by name.
            If it has the perturbation column, only its control cells are used. `None`: the controls the model was trained
            with. Never changed.
        perturbations
            Names (combinations joined by the separator), or a DataFrame with one row a wanted population: a column named
            like `perturbation_key`, and as wanted the dose, covariates, contexts and `n_cells`. `None`: all training
            perturbations.
        n_cells
            Cells per context and perturbation; batches share them in proportion to their controls. Default: as many as
            there are controls.
        n_populations
            Independent draws of each population, numbered in ``obs["population"]``.
        n_steps
            Network evaluations a population. Default 1.
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
            Path of an `.h5ad` or `.zarr` file to write the cells to while they are generated, for requests that do not fit
            into memory.

        Returns
        -------
        A new AnnData of predicted cells: log-normalised expression in `X`, sampled counts in ``layers["counts"]``, latent
        vectors in ``obsm["X_perturbdiff"]``; in `obs` the perturbation, dose, contexts, covariates and batch under the names
        of :meth:`setup_anndata`, the control cell each cell started from, and the draw; in ``uns["scperturbdiff"]`` how it
        was made, the conditions with how each is new to the model, and doses outside the measured range. With `output`, the
        matrices of the returned AnnData stay on disk.

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

    def _prepare(
        self,
        adata: AnnData | None,
        perturbations: Sequence[str] | pd.DataFrame | None,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None,
        layer: str | None,
        **options: Any,
    ) -> Prediction:
        """Check a request before anything is generated."""
        self._check_trained("predict")
        space = self._space(perturbation_embeddings)
        if perturbations is None:
            perturbations = space.training_request(self.populations_)
        cells = self._cells(adata)
        return prepare(
            self.module,
            space,
            cells,
            perturbations,
            genes=stored_genes(self.registry_),
            batches=stored_batches(self.registry_),
            layer=self._layer(cells, layer),
            **options,
        )

    def get_latent_representation(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, layer: str | None = None
    ) -> NDArray[np.float32]:
        """Latent vectors of cells: posterior means of the VAE, the space of ``obsm["X_perturbdiff"]`` of predictions.

        Parameters
        ----------
        adata
            Cells; genes are found by name. `None`: the cells the model was set up with.
        indices
            Rows wanted, in this order. `None`: all.
        layer
            Layer with raw counts; see :meth:`predict`.

        Returns
        -------
        Array of shape `(n_cells, n_latent)`.
        """
        self._check_trained("get_latent_representation")
        cells = self._cells(adata)
        import numpy as np

        rows = None if indices is None else np.asarray(indices)
        self.module.eval()
        counts = read_genes(cells, stored_genes(self.registry_), self._layer(cells, layer), rows)
        latent: NDArray[np.float32] = encode_rows(self.module, counts).cpu().numpy()
        return latent

    def _space(self, perturbation_embeddings: Any = None) -> ConditionSpace:
        space = self.conditions
        return space if perturbation_embeddings is None else space.with_features(perturbation_embeddings)

    def _check_trained(self, what: str) -> None:
        if not self.is_trained_:
            raise RuntimeError(f"PerturbDiff.{what} needs a trained model: call train() first, or load a saved one.")

    def _cells(self, adata: AnnData | None) -> AnnData:
        if adata is None and self.adata is None:
            raise ValueError("The model was loaded without an AnnData: pass adata=... with control cells.")
        return self.adata if adata is None else adata

    def _layer(self, adata: AnnData, layer: str | None) -> str | None:
        if layer is not None:
            return layer
        at_setup: str | None = self.registry_["setup_args"].get("layer")
        return at_setup if at_setup in adata.layers else None
