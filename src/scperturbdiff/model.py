"""PerturbDiff: the model as users of scvi-tools know one."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pprint import pprint
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from mudata import MuData
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField, MuDataCategoricalObsField, MuDataLayerField
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner
from scvi.utils import setup_anndata_dsp

from scperturbdiff.arguments import check_type
from scperturbdiff.data import (
    CONDITIONS,
    as_anndata,
    build_populations,
    check_cells,
    check_genes,
    check_layer,
    preview,
    read_indices,
    read_space,
    rna_view,
    stored_batches,
    stored_genes,
    stored_layer,
    stored_space,
)
from scperturbdiff.diffusion import restore_module
from scperturbdiff.limits import check_sizes, check_training
from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.prediction import (
    PreparedRequest,
    Settings,
    decode_cells,
    encode_cells,
    perturbation_novelty,
    perturbation_representation,
    predict_cells,
    prepare,
    response_table,
)
from scperturbdiff.progress import shows_progress
from scperturbdiff.saving import CELLS, believing, check_saved, check_weights, pack, saved_cells, set_aside
from scperturbdiff.seeds import resolve_seed, seeded
from scperturbdiff.storage import SavedModel, check_kept, choose_device, find_model
from scperturbdiff.training import (
    Checkpoints,
    PopulationTraining,
    Processes,
    ShortTraining,
    Stage,
    all_or_nothing,
    check_finite,
    check_shared,
    fingerprint,
    finite_vae,
    have_features,
    latent_stage,
    plan_epochs,
    split_populations,
)
from scperturbdiff.transfer import transfer_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal, NoReturn

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.data import ConditionSpace
    from scperturbdiff.diffusion import Sampler
    from scperturbdiff.training_report import TrainingReport

logger = logging.getLogger("scvi.scperturbdiff")  # follows scvi.settings.verbosity

NO_ALARM = (r".*module\(s\) in eval mode", r".*Total length of .* across ranks is zero")
"""Lightning warns of what is meant to be: one stage rests while the other is trained, or nothing is held out."""
SCVI_MARK = "_scvi_uuid"
"""Key of `uns` under which scvi-tools marks registered cells; copies of them have it, too."""
DESCRIBED = (
    "perturbation_key",
    "control",
    "context_keys",
    "batch_key",
    "dose_key",
    "categorical_covariate_keys",
    "continuous_covariate_keys",
    "perturbation_embeddings",
    "control_match_keys",
    "separator",
)
"""Arguments of both set-up methods that say what was done to the cells."""


class PerturbDiff(BaseModelClass):
    """Predict populations of cells under perturbations that were not measured, from control cells alone.

    Four parts: *encode, retrieve, diffuse, count*. A count VAE :cite:p:`lopez2018` gives the latent space. Retrieval,
    kriging over the measured conditions, says how far and where a population moves: what the perturbation did
    elsewhere, and what others did here; state by state (:attr:`states_`), where populations are mixtures and conditions
    left out say that it helps. Functional diffusion :cite:p:`yuan2026`, a set transformer trained with a
    proper score for populations, adds what a shift cannot say: cells that respond beside cells that do not, changes of
    shape. It is used only where populations held out of training show that it helps; elsewhere its weight is 0, and
    ``print(model)`` says so (``model.report_`` in full). Counts of the control cells are then moved to the new means.

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
    vae_kwargs
        Further arguments of :class:`scvi.module.VAE`; and `encoded_share`, the share of each cell's molecules that the
        encoder is shown in training while the decoder predicts the others; 1, the default, gives both all of them.
    retrieval_kwargs
        Fields of :class:`scperturbdiff.retrieval.RetrievalSettings`.
    generator_kwargs
        Further arguments of :class:`scperturbdiff.diffusion.Generator`.

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
    populations_: pd.DataFrame | None
    states_: pd.DataFrame | None
    """States of cells that populations were found to be mixtures of: marker genes, shares of the control cells of each
    context. `None`: cells of a population are predicted to respond alike."""

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
        vae_kwargs: Mapping[str, Any] | None = None,
        retrieval_kwargs: Mapping[str, Any] | None = None,
        generator_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = self._get_init_params(locals())
        check_kept(arguments, "PerturbDiff")
        check_sizes(arguments["non_kwargs"])
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
            vae_kwargs=vae_kwargs,
            retrieval_kwargs=retrieval_kwargs,
            generator_kwargs={
                "width": width,
                "n_layers": n_layers,
                "n_heads": n_heads,
                "dropout": dropout,
                **(generator_kwargs or {}),
            },
        )
        self.populations_: pd.DataFrame | None = None
        self.report_: TrainingReport | None = None
        self.states_: pd.DataFrame | None = None
        self.vae_is_adapted_ = False
        self._model_summary_string = (
            f"PerturbDiff with {len(space.components)} perturbation components, "
            f"{len(space.contexts)} treated contexts, n_latent: {n_latent}, width: {width}, n_layers: {n_layers}"
        )
        self.init_params_ = arguments

    @property
    def summary_string(self) -> str:
        """What ``print(model)`` shows: sizes, and what training found."""
        found = "" if self.report_ is None else f"\n{self.report_}"
        return f"{super().summary_string}{found}"

    # ---- set-up ------------------------------------------------------------------------------------------------------

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
        separator: str | None = "+",
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
            Column with the dose, in any unit: a number, or one number a component in a list or joined like the names.
            0 is control.
        categorical_covariate_keys, continuous_covariate_keys
            Further conditions, the same for all cells of a population: site, sex. Only the network knows them; time
            belongs in `context_keys` or `dose_key`.
        perturbation_embeddings
            Features of perturbation components: a DataFrame with one row a component, a dict of vectors, or a key of
            `adata.uns` with either. Components that training never sees can be predicted from theirs.
        control_match_keys
            Columns on which a population and its controls should agree, the most important first; controls that agree
            on most of them are taken. Default: contexts, covariates and batch. Agreement on contexts is required.
        separator
            Joins the components of a combination; `None`: no name is one. Components of lists are never cut, whatever
            their names hold.

        Raises
        ------
        KeyError
            If a key does not exist.
        ValueError
            If counts are not counts, names repeat, or labels or doses are wrong.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        fields = [
            LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False),  # which we check, wherever they are
            CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            CategoricalObsField(REGISTRY_KEYS.LABELS_KEY, None),
        ]
        cls._register(adata, adata, layer, fields, setup_method_args, kwargs)

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_mudata(
        cls,
        mdata: MuData,
        rna_layer: str | None = None,
        perturbation_key: str | None = None,
        control: str | None = None,
        *,
        context_keys: Sequence[str] | str | None = None,
        batch_key: str | None = None,
        dose_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | str | None = None,
        control_match_keys: Sequence[str] | None = None,
        separator: str | None = "+",
        modalities: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """%(summary_mdata)s

        Parameters
        ----------
        %(param_mdata)s
        rna_layer
            Layer of the RNA modality with raw counts; `None` for its `X`.
        perturbation_key, control, context_keys, batch_key, dose_key, categorical_covariate_keys
            See :meth:`setup_anndata`.
        continuous_covariate_keys, perturbation_embeddings, control_match_keys, separator
            See :meth:`setup_anndata`.
        modalities
            Modality of each argument: ``{"rna_layer": "rna"}`` at least; columns are looked up in the global `obs`
            unless their argument is named too, e.g. ``"perturbation_key": "rna"``.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        of = cls._create_modalities_attr_dict(dict(modalities or {}), setup_method_args)
        cells = rna_view(mdata, setup_method_args["setup_args"])
        x = REGISTRY_KEYS.X_KEY
        fields = [
            MuDataLayerField(x, rna_layer, mod_key=of.rna_layer, mod_required=True, is_count_data=False),
            MuDataCategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key, mod_key=of.batch_key),
            MuDataCategoricalObsField(REGISTRY_KEYS.LABELS_KEY, None, mod_key=None),
        ]
        cls._register(mdata, cells, rna_layer, fields, setup_method_args, kwargs)

    @classmethod
    def _register(
        cls,
        data: AnnData | MuData,
        cells: AnnData,
        layer: str | None,
        fields: list[Any],
        setup_method_args: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Read the conditions of `cells` and register `data` with scvi-tools."""
        given = setup_method_args["setup_args"]
        check_kept(given, "setup_anndata")
        space = read_space(cells, layer, kwargs.get("source_registry"), **{name: given[name] for name in DESCRIBED})
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(data, **kwargs)
        manager.registry[CONDITIONS] = asdict(space)
        cls.register_manager(manager)

    @classmethod
    def _setup_methods(cls) -> dict[str, Callable[..., None]]:
        """What a saved model may have been set up with."""
        return {"setup_anndata": cls.setup_anndata, "setup_mudata": cls.setup_mudata}

    @classmethod
    def setup_annbatch(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered: populations are drawn by condition, which a stream of batches does not allow.

        A `NotImplementedError` names what to use for cells on disk: :func:`scperturbdiff.open_store`.
        """
        raise NotImplementedError(
            "PerturbDiff has no setup_annbatch: it draws cells by condition, and annbatch streams them. Cells on disk: "
            "adata = scperturbdiff.open_store(path), then PerturbDiff.setup_anndata(adata, ...) and PerturbDiff(adata)."
        )

    @property
    def conditions(self) -> ConditionSpace:
        """The conditions the model knows: keys, components, contexts, doses, covariates, features."""
        return stored_space(self.registry_)

    # ---- training ----------------------------------------------------------------------------------------------------

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
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        **trainer_kwargs: Any,
    ) -> None:
        """Train both stages: the latent VAE, then the generator of populations.

        Whatever ends training early, also Ctrl-C, leaves the model as it was before: a trained one still predicts. With
        `checkpoint_dir` training can be gone on with, also after the process was killed.

        Parameters
        ----------
        max_epochs
            Upper bound on the epochs of either stage.
        max_epochs_vae
            Epochs of the first stage (passes over all cells). Default: 15, within 1,250 to 5,000 steps; none when the
            model was trained before. 0 keeps the VAE as it is.
        max_epochs_generator
            Epochs of the second stage (of 50 steps each). Default: 30, and none where fewer than 5 conditions could be
            held out, which say nothing about a network: retrieval predicts alone. 0 trains the VAE only.
        accelerator, devices
            As in scvi-tools; ``"auto"`` takes a GPU where there is one. Several devices train together, one process on
            each: see :doc:`/parallel`.
        train_size
            Share of the cells that the VAE is trained on.
        validation_size
            Share of the *conditions*, with all their populations, that are held out of the second stage to stop it in
            time. Default: 0.1, but 8 conditions at least and a third of them at most. 0 uses the network untested.
        batch_size
            Cells a step of the first stage, of all processes together.
        early_stopping
            Stop the second stage when the network no longer improves on held-out conditions. The same number decides
            which averaged weights are kept, whether or not training stopped early, and whether the network is used: see
            ``model.report_``.
        vae_plan_kwargs
            Passed to :class:`scvi.train.TrainingPlan`, e.g. `lr`, `max_kl_weight`; also `dispersion_lr_factor`, the
            rate of the gene-wise dispersions relative to `lr` (default 10).
        plan_kwargs
            Passed to :class:`scperturbdiff.diffusion.GeneratorTrainingPlan`, e.g. `objective`, `n_cells`, `lr`; also
            `steps_per_epoch`.
        seed
            The same seed gives the same training from the same initial weights; set `scvi.settings.seed` before
            ``PerturbDiff(adata)`` to fix these, too. Default: `scvi.settings.seed`, else one drawn from torch's state.
        ckpt_path
            Checkpoint of the second stage, written by a :class:`lightning.pytorch.callbacks.ModelCheckpoint` in
            `callbacks`: training goes on from there, with the VAE and the seed of the checkpoint, and reaches the state
            of an uninterrupted run. The other arguments must be those of that run.
        checkpoint_dir
            Folder, of this training alone, for what is needed to go on with it: the module once its VAE is trained, the
            second stage after every epoch. It stays when training has ended, and can be removed then.
        resume
            Go on with the training in `checkpoint_dir`, or begin it, if there is nothing yet. Cells and arguments must
            be those of the interrupted run; the state reached is that of an uninterrupted one.
        **trainer_kwargs
            Passed to :class:`scvi.train.Trainer` in both stages: `callbacks`, `logger`, `enable_progress_bar`,
            `check_val_every_n_epoch`, `precision`, `num_nodes`, `strategy` (``"auto"`` or ``"ddp"``), ...

        Raises
        ------
        ValueError
            If there is nothing to train on, an argument is out of range, `checkpoint_dir` holds another training,
            processes are more than populations or were given different trainings, or training diverged: numbers that
            are not finite are never kept.
        FileExistsError
            If `checkpoint_dir` holds checkpoints, and `resume` was not asked for.
        """
        if checkpoint_dir is not None and ckpt_path is not None:
            raise ValueError("Give checkpoint_dir or ckpt_path, not both: either says what to go on from.")
        if self.adata is None:
            raise ValueError(
                "The model was loaded without an AnnData, so there is nothing to train on. Load it with adata=..."
            )
        check_training(locals())
        # they may have been changed since set-up
        check_layer(self._annotated(), stored_layer(self.registry_), sample=True)
        vae_epochs, generator_epochs = plan_epochs(
            self.adata.n_obs,
            batch_size,
            max_epochs,
            max_epochs_vae,
            max_epochs_generator,
            trained=self.is_trained_,
            adapted=self.vae_is_adapted_,
        )
        if not (vae_epochs or generator_epochs or self.is_trained_):
            raise ValueError("Training of 0 epochs makes no trained model: max_epochs must be 1 or more.")
        processes, trainer = Processes.launch(
            {"accelerator": accelerator, "devices": devices, "enable_progress_bar": shows_progress(), **trainer_kwargs}
        )
        # before the first stage, so that populations without controls, or too few of them, are known of at once
        table = build_populations(self.conditions, self._annotated().obs) if generator_epochs else None
        features = self.conditions.feature_matrix()
        described = have_features(features)
        if table is not None and validation_size is not None:
            split_populations(table, validation_size, 0 if seed is None else seed, has_features=described)
        short = ShortTraining.beside(vae_epochs, self.adata.n_obs, batch_size, vae_plan_kwargs)
        plan = {"asked": max_epochs_generator is not None, **(plan_kwargs or {})}
        decides = {
            "max_epochs_vae": vae_epochs, "max_epochs_generator": generator_epochs, "train_size": train_size,
            "validation_size": validation_size, "batch_size": batch_size, "early_stopping": early_stopping,
            "vae_plan_kwargs": vae_plan_kwargs, "plan_kwargs": plan, "processes": processes.n,
            **trainer_kwargs,
        }  # fmt: skip
        of = self._annotated(), table, self.registry_, self.init_params_["non_kwargs"], decides
        processes.check_same(lambda: fingerprint(*of))
        kept = processes.first(lambda: Checkpoints.open(checkpoint_dir, resume, seed, lambda: fingerprint(*of)))
        with all_or_nothing(self, " Go on with resume=True." if checkpoint_dir else ""):
            seed, begun = kept.seed, kept
            kept = processes.first(lambda: begun.restore(self.module))
            if (ckpt_path := ckpt_path or kept.network) is not None:
                vae_epochs, seed = 0, processes.first(lambda: restore_module(self.module, ckpt_path))
            if table is not None:
                split = table, validation_size, seed, described
                check_shared(*split, asked=plan["asked"], n_ranks=processes.n)
            processes.share(self)
            history = kept.history
            with seeded(seed):
                if vae_epochs and not kept.vae_trained:
                    with finite_vae(self.module.vae, (vae_plan_kwargs or {}).get("lr")):
                        cells = self.module, self.adata_manager, vae_epochs, batch_size, train_size, trainer
                        stage = latent_stage(*cells, processes, seed, **(vae_plan_kwargs or {}))
                        history |= self._run(stage)
                    processes.first(lambda: kept.keep_vae(self.module, history))
                processes.place(self)
                if table is not None:
                    genes = self.conditions.target_genes(stored_genes(self.registry_))
                    known = self.module, self.adata_manager, table, features
                    training = PopulationTraining.prepare(*known, validation_size, seed, genes, short)
                    how = {"ckpt_path": ckpt_path, "processes": processes, **plan}
                    stage = training.stage(generator_epochs, early_stopping, trainer, **how)
                    history |= self._run(kept.keep_epochs(stage)) if stage.max_epochs else {}
                    processes.place(self)
                    self.report_, self.populations_ = training.finish(stage), training.populations()
                    contexts = list(self.conditions.context_labels(table.labels))
                    self.states_ = training.states(list(self.adata.var_names), contexts)
                    logger.info(str(self.report_))
                elif vae_epochs:  # what was measured in another latent space
                    self.module.retrieval = self.module.by_state = None
                    self.report_ = self.populations_ = self.states_ = None
            check_finite(self.module)
            self.history_, self.is_trained_ = history, True
            processes.share(self)
            self.module.eval()

    @staticmethod
    def paper_settings() -> dict[str, dict[str, Any]]:
        """Arguments of :meth:`train` and :meth:`predict` for the objective and the sampler of the paper.

        Diffusion of :cite:t:`yuan2026` in the latent space of this package: squared distance of embeddings plus squared
        error, no replicate law, many evaluations, guidance. For comparison; the network is used untested.

        Examples
        --------
        >>> paper = scperturbdiff.PerturbDiff.paper_settings()
        >>> model.train(**paper["train"])
        >>> predicted = model.predict(controls, **paper["predict"])
        """
        plan = {"objective": "mmd+mse", "p_terminal": 0.0}
        return {
            "train": {"plan_kwargs": plan, "validation_size": 0.0},
            "predict": {"n_steps": 50, "sampler": "ddim", "guidance": 1.5},
        }

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData | MuData,
        reference_model: PerturbDiff | str | Path,
        *,
        accelerator: str = "cpu",
        allow_pickle: bool = False,
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
        accelerator, allow_pickle
            Of a saved reference; see :meth:`load`.

        Returns
        -------
        A model to be trained. Weights are taken over for the VAE (decoder weights of a new batch start as the mean of
        the known ones), the transformer, and components and covariate values of the same name; the rest starts afresh
        and is named in the log.

        Raises
        ------
        TypeError
            If `adata` or `reference_model` is something else.
        ValueError
            If genes differ, or the reference is not trained.
        """
        check_type("reference_model", reference_model, (PerturbDiff, str, os.PathLike), "a PerturbDiff or its folder")
        reference = reference_model
        if not isinstance(reference, PerturbDiff):
            reference = cls.load(reference, adata=False, accelerator=accelerator, allow_pickle=allow_pickle)
        if not reference.is_trained_:
            raise ValueError("reference_model is not trained.")
        if not isinstance(adata, MuData):
            check_cells(adata)
        if not cls._is_set_up(adata):
            arguments = dict(reference.registry_["setup_args"])
            cls._setup_methods()[reference.registry_["setup_method_name"]](adata, **arguments)
        manager = cls._get_most_recent_anndata_manager(adata, required=True)
        check_genes(as_anndata(adata, manager.registry), reference.registry_)
        model = cls(adata, **(reference.init_params_["non_kwargs"] | reference.init_params_["kwargs"]))
        fresh = transfer_weights(model.module, reference.module, model.registry_, reference.registry_)
        if fresh:
            logger.info("Not taken over from the reference: %s.", preview(fresh, 30))
        model.vae_is_adapted_ = True
        return model

    @classmethod
    def _is_set_up(cls, adata: AnnData | MuData) -> bool:
        """Whether this very object is registered; the mark of the object that it was copied from is removed."""
        try:
            return cls._get_most_recent_anndata_manager(adata) is not None
        except ValueError:  # a copy, or part, of registered cells
            del adata.uns[SCVI_MARK]
            return False

    @property
    def populations(self) -> pd.DataFrame | None:
        """Training populations, their numbers of cells and controls, and whether controls agreed on every key.

        `None` before the second stage was trained.
        """
        return None if self.populations_ is None else self.populations_.copy()

    def _run(self, stage: Stage) -> dict[str, pd.DataFrame]:
        """Run one stage and return its history (the runner would drop the keys of a second stage)."""
        self.history_, self.is_trained_ = {}, False
        runner = TrainRunner(
            self, training_plan=stage.plan, data_splitter=stage.data, max_epochs=stage.max_epochs, **stage.options
        )
        runner.trainer.callbacks.extend(stage.checkpoints)
        with warnings.catch_warnings():
            for text in NO_ALARM:
                warnings.filterwarnings("ignore", message=text)
            runner()
        if stage.selection is not None and not stage.selection.decided:  # a checkpoint of the last epoch
            stage.selection.on_train_end(runner.trainer, stage.plan.to(self.device))
        return self.history_ or {}

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(
        self,
        dir_path: str | Path,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_kwargs: Mapping[str, Any] | None = None,
        legacy_mudata_format: bool = False,
        datamodule: Any = None,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model to a folder: tensors as safetensors, everything else as JSON.

        No code is run to read it. The new model takes the place of an old one at the very end, in one step: whatever
        fails before leaves the old one whole. Other files of the folder are left alone.

        Parameters
        ----------
        dir_path
            The folder.
        prefix
            What names of files begin with.
        overwrite
            Replace the model of a folder that is there.
        save_anndata
            Save the cells that the model was set up with, too.
        save_kwargs, legacy_mudata_format, datamodule
            Of scvi-tools' own format; not supported.
        **anndata_write_kwargs
            Passed to :meth:`anndata.AnnData.write_h5ad`.

        Raises
        ------
        ValueError
            If the folder is there and `overwrite` is not set, or weights are not finite.
        OSError
            If there is no space, or no permission.
        """
        folder = Path(dir_path)
        if save_kwargs or legacy_mudata_format or datamodule is not None:
            raise TypeError("save_kwargs, legacy_mudata_format and datamodule are not supported: nothing is pickled.")
        if os.path.lexists(folder) and not overwrite:
            raise ValueError(f"{str(folder)!r} is there already. Pass overwrite=True to replace the model in it.")
        if save_anndata and self.adata is None:
            raise ValueError("save_anndata=True, but the model was loaded without an AnnData.")
        cells = CELLS[isinstance(self.adata, MuData)]
        also = {cells: partial(self.adata.write, **anndata_write_kwargs)} if save_anndata else {}
        attributes = {name: value for name, value in self._get_user_attributes() if name.endswith("_")}
        pack(self.module, attributes).write(folder, prefix or "", also)
        set_aside(folder, prefix or "", also)

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | MuData | bool | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        backup_url: str | None = None,
        datamodule: Any = None,
        allowed_classes_names_list: Sequence[str] | None = None,
        *,
        allow_pickle: bool = False,
    ) -> PerturbDiff:
        """Load a saved model. Names, shapes and types of all that is read are checked; none of it is run.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Cells to attach, with the model's genes in its order. `None`: those saved with the model, if any; `False`:
            none, enough for :meth:`predict` with cells of its own.
        accelerator, device
            Where to put the model: ``"cpu"``, ``"gpu"``, ``"mps"``, and the number of the device. ``"auto"`` takes a
            GPU where there is one.
        prefix
            What names of files begin with.
        backup_url, datamodule
            Of scvi-tools' own format.
        allowed_classes_names_list
            Names of further classes whose models may be loaded.
        allow_pickle
            Read the format of scvi-tools, which older versions wrote. **A pickle can run any code of whoever wrote
            it**: only for files that you trust. ``scperturbdiff convert`` writes such a model anew.

        Raises
        ------
        FileNotFoundError
            If the folder holds no model.
        ValueError
            If it is damaged, of another class or format, or a pickle.
        """
        if allow_pickle and (backup_url is not None or not find_model(dir_path, prefix)):
            names = None if allowed_classes_names_list is None else list(allowed_classes_names_list)
            return super().load(str(dir_path), adata, accelerator, device, prefix, backup_url, datamodule, names)
        if backup_url is not None or datamodule is not None:
            raise ValueError("backup_url and datamodule are of scvi-tools' own format, which needs allow_pickle=True.")
        saved, registry, arguments, attributes = cls._read(dir_path, prefix, allowed_classes_names_list)
        cells = saved_cells(Path(dir_path), prefix or "") if adata is None else adata
        if isinstance(cells, bool):
            cells = None
        if cells is not None:
            setup = cls._setup_methods()[registry["setup_method_name"]]
            setup(cells, source_registry=registry, **registry["setup_args"])
        with believing(), torch.device("meta"):  # no memory before shapes are known to be those of the file
            model = cls(cells, registry, **arguments)
        with believing():
            check_weights(model.module, saved.weights)
            model.module.load_state_dict({**saved.weights, "_extra_state": saved.values["retrieval"]}, assign=True)
        for name, value in attributes.items():
            setattr(model, name, value)
        model.to_device(choose_device(accelerator, device))
        model.module.eval()
        if cells is not None:
            model._validate_anndata(cells)
        return model

    @classmethod
    def _read(cls, dir_path: str | Path, prefix: str | None, names: Sequence[str] | None = None) -> tuple[Any, ...]:
        """What was saved, and its registry, arguments and attributes, checked."""
        if not find_model(dir_path, prefix):
            raise ValueError(
                f"{str(dir_path)!r} holds a model in scvi-tools' own format, a pickle, which can run any code when "
                "it is read. If you trust whoever wrote it, pass allow_pickle=True or use `scperturbdiff convert`."
            )
        saved = SavedModel.read(Path(dir_path), prefix or "")
        return saved, *check_saved(saved, {cls.__name__, *(names or ())}, cls._setup_methods(), cls.__init__)

    @staticmethod
    def load_registry(dir_path: str | Path, prefix: str | None = None, *, allow_pickle: bool = False) -> dict[str, Any]:
        """The registry of a saved model: how its data were set up; see :meth:`load`."""
        if allow_pickle and not find_model(dir_path, prefix):
            return dict(BaseModelClass.load_registry(str(dir_path), prefix))
        registry: dict[str, Any] = PerturbDiff._read(dir_path, prefix)[1]
        return registry

    @staticmethod
    def view_setup_args(dir_path: str | Path, prefix: str | None = None) -> None:
        """Print how the data of a saved model were set up."""
        registry = PerturbDiff.load_registry(dir_path, prefix)
        print(f"{registry['model_name']}.{registry['setup_method_name']} with")
        pprint(registry["setup_args"], sort_dicts=False)

    @classmethod
    def convert_legacy_save(cls, *args: Any, **kwargs: Any) -> None:
        """Not supported: scvi-tools wrote this format before this package was."""
        raise NotImplementedError("No PerturbDiff was saved in the format of scvi-tools before 0.15.")

    # ---- prediction --------------------------------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | None = None,
        perturbations: Sequence[str] | pd.DataFrame | None = None,
        *,
        n_cells: int | None = None,
        n_populations: int | None = None,
        n_steps: int | None = None,
        sampler: Sampler = "renoise",
        guidance: float = 1.0,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None = None,
        transform_batch: str | int | None = None,
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
            training perturbations. What is asked for again is drawn again, and ``obs["population"]`` numbers on.
        n_cells
            Cells per context and perturbation; batches share them in proportion to their controls. Default: as many as
            there are controls. Fewer start from a random subset of them. More start from controls that others started
            from: they are no independent cells, and vary less than real ones. Cells that do not fit into the machine's
            memory are refused before any is made; `output` makes room for many more.
        n_populations
            Independent draws of each population, numbered in ``obs["population"]``: each is one population as it might
            be. They vary as replicates do and, where the condition is new, as far as training populations that were
            left out were missed. `None`: the best single guess, the mixture over replicates.
        n_steps
            Network evaluations a population. Default 1; 0: retrieval alone. A network of weight 0 (see
            ``model.report_``) is not evaluated, nor is any for what training could not try out, such as a new context
            where it saw one. ``uns["scperturbdiff"]["n_steps"]`` says how many evaluations there were at most.
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
            Show a progress bar, if output goes to a terminal or a notebook.
        output
            Path of an `.h5ad` or `.zarr` file to write the cells to while they are generated, for requests that do not
            fit into memory. It gets its name when it is whole, and must not exist. What cannot be written there is an
            error before cells are generated.

            Processes that `torchrun` started, or that share a ``torch.distributed`` group, write one `.zarr` store
            together: each calls with the same arguments, `seed` among them, on a disk that all see, and gets the same
            cells as one process. Parts are kept in a hidden folder beside it, from which the same call goes on when it
            was interrupted.

        Returns
        -------
        A new AnnData of predicted cells: log-normalised expression in `X`, sampled counts in ``layers["counts"]``,
        latent vectors in ``obsm["X_perturbdiff"]``; in `obs` the perturbation, dose, contexts, covariates and batch
        under the names of :meth:`setup_anndata`, the control cell each cell started from, the draw, and, with several
        states of cells (:attr:`states_`) and no column of that name of yours, the `state` of the control cell; in
        ``uns["scperturbdiff"]`` how it was made, the conditions with how each is new to the model, doses outside the
        measured range, and the gist of ``model.report_``. With `output`, the matrices of the returned AnnData stay on
        disk and its file stays open; ``to_memory()`` reads them, which AnnData's ``copy()`` cannot.

        Raises
        ------
        KeyError
            If a perturbation was never seen and has no features, or a column is missing.
        ValueError
            If genes are missing, there are no controls, counts are not counts, cells do not fit into memory, or the
            model is damaged: numbers that are not finite are never returned. If several processes were asked for
            different things, or parts beside `output` are of another prediction.
        OSError
            If `output` exists, cannot be written, or the disk would become full; a `ConnectionError` where another of
            several processes fails or is gone.
        """
        prepared = self._prepare(
            adata,
            perturbations,
            perturbation_embeddings,
            layer,
            n_cells=n_cells,
            settings=Settings(resolve_seed(seed), n_populations, 1 if n_steps is None else n_steps, sampler, guidance),
            transform_batch=transform_batch,
        )
        return predict_cells(prepared, target_sum=target_sum, progress=progress, output=output)

    def response(
        self,
        adata: AnnData | None = None,
        perturbations: Sequence[str] | pd.DataFrame | None = None,
        *,
        real: AnnData | None = None,
        n_cells: int | None = None,
        n_populations: int | None = None,
        pseudocount: float = 0.1,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None = None,
        layer: str | None = None,
        target_sum: float = 1e4,
        seed: int | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Fold change of every gene in every condition, of predicted and of observed cells.

        Cells are generated as in :meth:`predict` and averaged as they come; none are kept.

        Parameters
        ----------
        adata, perturbations, n_cells, n_populations, perturbation_embeddings, layer, seed, progress
            See :meth:`predict`.
        real
            AnnData with observed treated and control cells. Default: the cells the model was set up with.
        pseudocount
            Added to both means before their ratio is taken, in counts per `target_sum`: fold changes of genes far below
            it shrink to 0.
        target_sum
            Counts per cell after normalisation; means are taken without logarithm.

        Returns
        -------
        One row per condition (perturbation, dose, contexts, covariates; batches are pooled) and `gene`
        (`measured_gene`, where a column of yours is called `gene`), with
        `control_mean` (of the control cells the generated cells started from), `predicted_mean`, `log2_fold_change`,
        `observed_mean`, `observed_log2_fold_change` (against the observed cells' own matched controls) and
        `n_observed`; NaN where a condition was not observed.
        """
        prepared = self._prepare(
            adata,
            perturbations,
            perturbation_embeddings,
            layer,
            n_cells=n_cells,
            settings=Settings(resolve_seed(seed), n_populations),
            transform_batch=None,
        )
        real = None if real is None and self.adata is None else self._cells(real)
        return response_table(
            prepared,
            layer=self._layer(prepared.controls, layer),
            real=real,
            real_layer=None if real is None else self._layer(real, None),
            pseudocount=pseudocount,
            target_sum=target_sum,
            progress=progress,
        )

    # ---- what the model knows ----------------------------------------------------------------------------------------

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
        rows = None if indices is None else read_indices(indices, cells.n_obs)
        at = self._layer(cells, layer)
        check_layer(cells, at, rows, sample=True)
        self.module.eval()
        return encode_cells(self.module, cells, stored_genes(self.registry_), at, rows)

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        batch_size: int | None = None,
        *,
        transform_batch: str | int | None = None,
        layer: str | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float32] | pd.DataFrame:
        """Expression of cells as the VAE decodes it: the share of each gene in a cell's counts, without counting noise.

        As in scvi-tools: of the cells given, as they are. Cells under another perturbation come from :meth:`predict`.

        Parameters
        ----------
        adata, indices, layer
            See :meth:`get_latent_representation`.
        gene_list
            Genes wanted, in this order. `None`: all.
        library_size
            What shares are multiplied with, or ``"latent"``: the counts of the cell, that is its expected counts.
        n_samples
            Draws from the posterior of a cell's latent vector. A single one is a draw, too.
        return_mean
            Average over draws.
        return_numpy
            An array rather than a DataFrame, which draws that are not averaged always are.
        batch_size
            Cells decoded at a time; changes no value. Default: `scvi.settings.batch_size`.
        transform_batch
            Decode all cells as if they came from this batch. Default: each as from its own.
        seed
            The same seed gives the same draws. Default: `scvi.settings.seed`, else a random one.

        Returns
        -------
        One row a cell, one column a gene, non-negative; with several draws that are not averaged an array of shape
        `(n_samples, n_cells, n_genes)`.

        Raises
        ------
        KeyError
            If the column of batches is missing.
        ValueError
            If genes or batches are not the model's, or counts are not counts.
        """
        self._check_trained("get_normalized_expression")
        cells = self._cells(adata)
        rows = np.arange(cells.n_obs) if indices is None else read_indices(indices, cells.n_obs)
        values, genes = decode_cells(
            self.module,
            cells,
            stored_genes(self.registry_),
            self._layer(cells, layer),
            rows,
            wanted=gene_list,
            batches=stored_batches(self.registry_),
            batch_key=self.conditions.batch_key,
            transform_batch=transform_batch,
            library_size=library_size,
            n_samples=n_samples,
            return_mean=return_mean,
            batch_size=settings.batch_size if batch_size is None else batch_size,
            seed=resolve_seed(seed),
        )
        if len(values) == 1:
            return values[0] if return_numpy else pd.DataFrame(values[0], cells.obs_names[rows], genes)
        if return_numpy is False:
            raise ValueError("return_numpy=False, but draws that are not averaged are no table: return_mean=True.")
        return values

    def differential_expression(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered: it would compare decoded cells, which vary too little. An `AttributeError` names what to use.

        :func:`scanpy.tl.rank_genes_groups` tests predicted cells, which have counting noise, and
        :func:`scperturbdiff.evaluate` compares such tests with those of real cells.
        """
        raise AttributeError(
            "PerturbDiff has no differential_expression: decoded cells lack the noise that a test needs. Predicted "
            "cells have it: pred = model.predict(controls, [...]), then scanpy.tl.rank_genes_groups on pred and the "
            "controls; scperturbdiff.evaluate(pred, real, ...) compares such tests with those of real cells; "
            "model.response(...) has fold changes."
        )

    def get_perturbation_representation(
        self, perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Vectors that the network gives to single perturbation components.

        Parameters
        ----------
        perturbation_embeddings
            Features of further components.

        Returns
        -------
        One row per component (those of training, then those with features only), one column per dimension; with doses,
        at the median training dose.
        """
        self._check_trained("get_perturbation_representation")
        return perturbation_representation(self.module, self._space(perturbation_embeddings))

    def perturbation_novelty(
        self,
        names: Sequence[str] | None = None,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """How far perturbation components are from those of training.

        Parameters
        ----------
        names
            Components; default: all with a name or features.
        perturbation_embeddings
            Features of further components.

        Returns
        -------
        One row per component: `in_training`, `has_features`, `feature_distance` (cosine distance of its features to the
        `nearest` other training component; 0 is the same direction, 1 unrelated) and `unexplained_variance` (share of
        the variance of its response that the training populations leave open, averaged over contexts; near 1 they say
        nothing about it).
        """
        self._check_trained("perturbation_novelty")
        return perturbation_novelty(self.module, self._space(perturbation_embeddings), names)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _prepare(
        self,
        adata: AnnData | None,
        perturbations: Sequence[str] | pd.DataFrame | None,
        perturbation_embeddings: pd.DataFrame | Mapping[str, Any] | None,
        layer: str | None,
        **options: Any,
    ) -> PreparedRequest:
        """Check a request before anything is generated."""
        self._check_trained("predict")
        space = self._space(perturbation_embeddings)
        if self.populations_ is None and space.perturbation_key is not None:
            raise RuntimeError("Only the VAE was trained, which knows of no perturbation: call train() again.")
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
            report=None if self.report_ is None else self.report_.summary(),
            **options,
        )

    def _space(self, perturbation_embeddings: Any = None) -> ConditionSpace:
        space = self.conditions
        return space if perturbation_embeddings is None else space.with_features(perturbation_embeddings)

    def _check_trained(self, what: str) -> None:
        if not self.is_trained_:
            raise RuntimeError(f"PerturbDiff.{what} needs a trained model: call train() first, or load a saved one.")

    def _annotated(self) -> AnnData:
        """The cells the model was set up with, as an AnnData with all annotation in `obs`."""
        return as_anndata(self.adata, self.registry_)

    def _cells(self, adata: AnnData | MuData | None) -> AnnData:
        if adata is None and self.adata is None:
            raise ValueError("The model was loaded without an AnnData: pass adata=... with control cells.")
        return as_anndata(self.adata if adata is None else adata, self.registry_)

    def _layer(self, adata: AnnData, layer: str | None) -> str | None:
        if layer is not None:
            return layer
        at_setup = stored_layer(self.registry_)
        return at_setup if at_setup in adata.layers else None
