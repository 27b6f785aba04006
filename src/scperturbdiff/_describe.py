"""What a trained model says beside predicted cells: responses of genes, representations, distances to training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff._setup import ConditionsMixin
from scperturbdiff.data.counts import check_layer, read_genes
from scperturbdiff.data.mudata import as_anndata
from scperturbdiff.data.registry import stored_batches, stored_genes, stored_layer
from scperturbdiff.data.seeds import resolve_seed
from scperturbdiff.prediction import Prediction, Settings, encode_rows, prepare
from scperturbdiff.prediction.novelty import perturbation_novelty, perturbation_representation
from scperturbdiff.prediction.response import response_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from scperturbdiff.data.conditions import ConditionSpace


class DescriptionMixin(ConditionsMixin):
    """Tables of a trained model."""

    populations_: pd.DataFrame | None

    def response(
        self,
        adata: AnnData | None = None,
        perturbations: Sequence[str] | pd.DataFrame | None = None,
        *,
        real: AnnData | None = None,
        n_cells: int | None = None,
        n_populations: int = 1,
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
        One row per condition (perturbation, dose, contexts, covariates; batches are pooled) and gene, with
        `control_mean` (of the control cells the generated cells started from), `predicted_mean`, `log2_fold_change`,
        `observed_mean`, `observed_log2_fold_change` (against the observed cells' own matched controls) and
        `n_observed`; NaN where a condition was not observed.
        """
        prediction = self._prepare(
            adata,
            perturbations,
            perturbation_embeddings,
            layer,
            n_cells=n_cells,
            settings=Settings(resolve_seed(seed), n_populations),
            transform_batch=None,
        )
        real = self._annotated() if real is None and self.adata is not None else real
        return response_table(
            prediction,
            layer=self._layer(prediction.controls, layer),
            real=real,
            real_layer=None if real is None else self._layer(real, None),
            pseudocount=pseudocount,
            target_sum=target_sum,
            progress=progress,
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
        `nearest` other training component; 0 is the same direction, 1 unrelated) and `anchor_variance` (share of the
        variance of its response that the training populations leave open, averaged over contexts; near 1 they say
        nothing about it).
        """
        self._check_trained("perturbation_novelty")
        return perturbation_novelty(self.module, self._space(perturbation_embeddings), names)

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
        rows = None if indices is None else np.asarray(indices)
        at = self._layer(cells, layer)
        check_layer(cells, at)
        self.module.eval()
        counts = read_genes(cells, stored_genes(self.registry_), at, rows)
        latent: NDArray[np.float32] = encode_rows(self.module, counts).cpu().numpy()
        return latent

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
