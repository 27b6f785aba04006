"""Mini-batches of cells for the first stage, the same whether the cells are in memory or on disk."""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from scvi import REGISTRY_KEYS, settings
from torch.utils.data import DataLoader, Dataset, Sampler

from scperturbdiff.arguments import check_number
from scperturbdiff.seeds import derive_seed, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from scvi.data import AnnDataManager


class Reader(Protocol):
    """What reads counts of cells; those of many batches are announced, as far as `ahead` says."""

    ahead: int

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Counts `(n, n_genes)` of `rows`."""

    def announce(self, rows: NDArray[np.int64]) -> None:
        """Say which rows will be asked for next."""


class RowBatches(Sampler[list[int]]):
    """Batches of row numbers, sorted within a batch.

    scvi-tools sorts the rows it asks of a backed AnnData, but not those of one in memory; with rows in another order,
    dropout falls on other cells and sums round differently.

    Parameters
    ----------
    rows
        Rows to go through.
    batch_size
        Rows a batch, of all processes together; rounded up to a multiple of their number.
    shuffle
        Whether to go through them in a new order each time.
    rank, n_ranks
        Number of this process, and how many share each batch. All have as many batches, of as many rows, and none has a
        row of another's: up to ``n_ranks - 1`` rows are left out of a last batch that is not full.
    seed
        Of the order that several processes have in common. One process has the order of torch's global generator.
    reader
        Is told which rows come next, if any wants to know.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        shuffle: bool,
        rank: int = 0,
        n_ranks: int = 1,
        seed: int = 0,
        reader: Reader | None = None,
    ) -> None:
        if 0 < len(rows) < n_ranks:
            raise ValueError(f"{n_ranks} processes are too many for {len(rows)} cells: each needs one of its own.")
        self.rows, self.shuffle, self.rank, self.n_ranks = rows, shuffle, rank, n_ranks
        self.batch_size = math.ceil(batch_size / n_ranks) * n_ranks
        self.order = stream(derive_seed(seed, "cells")) if n_ranks > 1 else None
        full, rest = divmod(len(rows), self.batch_size)
        # a last batch of one cell would break batch normalisation
        self.n_batches = max(1, full) if shuffle else full + (rest >= n_ranks)
        self.reader = reader

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.rows
        if self.shuffle:
            rows = rows[torch.randperm(len(rows), generator=self.order).numpy()]
        n_ahead = 0 if self.reader is None else self.reader.ahead * self.n_ranks // self.batch_size
        try:
            for i in range(self.n_batches):
                if self.reader is not None and n_ahead > 1 and i % n_ahead == 0:
                    some = range(i, min(i + n_ahead, self.n_batches))
                    self.reader.announce(np.concatenate([self._batch(rows, j) for j in some]))
                yield self._batch(rows, i).tolist()
        finally:
            if n_ahead > 1 and self.reader is not None:
                self.reader.announce(rows[:0])

    def _batch(self, rows: NDArray[np.int64], i: int) -> NDArray[np.int64]:
        """Rows of batch `i` that are those of this process."""
        batch = rows[i * self.batch_size : (i + 1) * self.batch_size]
        each = len(batch) // self.n_ranks
        return np.sort(batch[self.rank * each : (self.rank + 1) * each])


class CellRows(Dataset[dict[str, "NDArray"]]):
    """What is registered of cells, by lists of row numbers; as scvi-tools', but with its own reader of counts."""

    def __init__(self, manager: AnnDataManager, reader: Reader) -> None:
        self.reader = reader
        others = [key for key in manager.data_registry if key != REGISTRY_KEYS.X_KEY]
        self.columns = {key: np.asarray(manager.get_from_registry(key), dtype=np.int64) for key in others}

    def __getitem__(self, rows: list[int]) -> dict[str, NDArray]:
        at = np.asarray(rows)
        return {REGISTRY_KEYS.X_KEY: self.reader(at), **{key: values[at] for key, values in self.columns.items()}}


class CellDataModule(pl.LightningDataModule):
    """Cells of a registered AnnData, split at random into training and validation cells.

    Parameters
    ----------
    manager
        Of the registered AnnData.
    reader
        Reads its counts.
    train_size
        Share of the cells to train on; the others are for validation.
    batch_size
        Cells a step, of all processes together.
    rank, n_ranks, seed
        Which process this is, of how many; see :class:`RowBatches`.
    """

    def __init__(
        self,
        manager: AnnDataManager,
        reader: Reader,
        train_size: float,
        batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("train_size", train_size, "(0, 1]")
        n = manager.adata.n_obs
        self.n_train = math.ceil(train_size * n)
        self.n_val = n - self.n_train
        order = torch.randperm(n).numpy()
        self.train_idx, self.val_idx = np.sort(order[: self.n_train]), np.sort(order[self.n_train :])
        self.test_idx = np.empty(0, np.int64)
        self.manager, self.reader, self.batch_size = manager, reader, batch_size
        self.shared: dict[str, int] = {"rank": rank, "n_ranks": n_ranks, "seed": seed}

    def _loader(self, rows: NDArray[np.int64], shuffle: bool) -> DataLoader:
        reader = copy(self.reader)  # what one loader announces is not what the other will ask for
        # processes that load have readers of their own, which nobody tells anything
        told = None if settings.dl_num_workers else reader
        return DataLoader(
            CellRows(self.manager, reader),
            batch_size=None,
            sampler=RowBatches(rows, self.batch_size, shuffle, **self.shared, reader=told),
            num_workers=settings.dl_num_workers,
            persistent_workers=settings.dl_persistent_workers,
        )

    def train_dataloader(self) -> DataLoader:
        """Training cells in random batches."""
        return self._loader(self.train_idx, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation cells in order; none when training takes all."""
        return self._loader(self.val_idx, shuffle=False) if self.n_val else []
