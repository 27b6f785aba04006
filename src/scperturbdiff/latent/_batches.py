"""Mini-batches of cells for the first stage, the same whether the cells are in memory or on disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
from scvi import settings
from torch.utils.data import DataLoader, Sampler

from scperturbdiff.arguments import check_number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from scvi.data import AnnDataManager


class RowBatches(Sampler[list[int]]):
    """Batches of row numbers, sorted within a batch.

    scvi-tools sorts the rows it asks of a backed AnnData, but not those of one in memory; with rows in another order,
    dropout falls on other cells and sums round differently.
    """

    def __init__(self, rows: NDArray[np.int64], batch_size: int, shuffle: bool) -> None:
        self.rows, self.batch_size, self.shuffle = rows, batch_size, shuffle
        # a last batch of one cell would break batch normalisation
        self.n_batches = max(1, len(rows) // batch_size) if shuffle else math.ceil(len(rows) / batch_size)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.rows[torch.randperm(len(self.rows)).numpy()] if self.shuffle else self.rows
        for i in range(self.n_batches):
            yield np.sort(rows[i * self.batch_size : (i + 1) * self.batch_size]).tolist()


class CellDataModule(pl.LightningDataModule):
    """Cells of a registered AnnData, split at random into training and validation cells.

    Parameters
    ----------
    manager
        Of the registered AnnData.
    train_size
        Share of the cells to train on; the others are for validation.
    batch_size
        Cells a step.
    """

    def __init__(self, manager: AnnDataManager, train_size: float, batch_size: int) -> None:
        super().__init__()
        check_number("train_size", train_size, "(0, 1]")
        n = manager.adata.n_obs
        self.n_train = math.ceil(train_size * n)
        self.n_val = n - self.n_train
        order = torch.randperm(n).numpy()
        self.train_idx, self.val_idx = np.sort(order[: self.n_train]), np.sort(order[self.n_train :])
        self.test_idx = np.empty(0, np.int64)
        self.manager, self.batch_size = manager, batch_size

    def _loader(self, rows: NDArray[np.int64], shuffle: bool) -> DataLoader:
        return DataLoader(
            self.manager.create_torch_dataset(),
            batch_size=None,
            sampler=RowBatches(rows, self.batch_size, shuffle),
            num_workers=settings.dl_num_workers,
            persistent_workers=settings.dl_persistent_workers,
        )

    def train_dataloader(self) -> DataLoader:
        """Training cells in random batches."""
        return self._loader(self.train_idx, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation cells in order; none when training takes all."""
        return self._loader(self.val_idx, shuffle=False) if self.n_val else []
