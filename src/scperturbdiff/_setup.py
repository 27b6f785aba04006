"""Registration of an AnnData or MuData with the model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalObsField, LayerField, MuDataCategoricalObsField, MuDataLayerField
from scvi.model.base import BaseModelClass
from scvi.utils import setup_anndata_dsp

from scperturbdiff.data.mudata import rna_view
from scperturbdiff.data.registry import CONDITIONS, read_space, stored_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from scperturbdiff.data.conditions import ConditionSpace

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


class ConditionsMixin(BaseModelClass):
    """What a model must be told of its cells."""

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
        space = _read_space(adata, layer, setup_method_args, kwargs)
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
        separator: str = "+",
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
        space = _read_space(cells, rna_layer, setup_method_args, kwargs)
        manager = AnnDataManager(
            fields=[
                MuDataLayerField(
                    REGISTRY_KEYS.X_KEY, rna_layer, mod_key=of.rna_layer, mod_required=True, is_count_data=True
                ),
                MuDataCategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key, mod_key=of.batch_key),
                MuDataCategoricalObsField(REGISTRY_KEYS.LABELS_KEY, None, mod_key=None),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(mdata, **kwargs)
        manager.registry[CONDITIONS] = asdict(space)
        cls.register_manager(manager)

    @property
    def conditions(self) -> ConditionSpace:
        """The conditions the model knows: keys, components, contexts, doses, covariates, features."""
        return stored_space(self.registry_)


def _read_space(
    adata: AnnData, layer: str | None, setup_method_args: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> ConditionSpace:
    given = setup_method_args["setup_args"]
    return read_space(adata, layer, kwargs.get("source_registry"), **{name: given[name] for name in DESCRIBED})
