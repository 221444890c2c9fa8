"""What a search asks of the place where the candidates' vectors lie, and what it gets.

Comes in: query vectors. Goes out: a short list of stored items. `index_altmoe` is the backend in this process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass
class ShortList:
    """What a backend found for a batch of queries.

    Attributes:
        ids: the `m` distinct items that any query found.
        latents: `(m, latent_size)` float32 as stored; None with `scores`.
        places: `(queries, k)` int64 into `ids`, best first; -1 where a query found fewer.
        read_columns: metadata of the item at a place; called only for what is shown.
        hubness: `(m,)` the last component of `item_vectors`, where the backend keeps it; None: computed.
        rows: `(m,)` row numbers in the store; None for a database.
        scores: `(queries, k)` whole scores in falling order, from a backend that is `whole`; None: computed.
        candidates: how many items could have been found (fewer than all under a condition); None: all.
    """

    ids: list[str]
    latents: torch.Tensor | None
    places: np.ndarray
    read_columns: Callable[[int], dict]
    hubness: torch.Tensor | None = None
    rows: np.ndarray | None = None
    scores: np.ndarray | None = None
    candidates: int | None = None

    def columns(self, place: int) -> dict:
        """Metadata of one item."""
        return self.read_columns(place)


class Backend(Protocol):
    """Where the candidates' vectors lie.

    `whole` (default: False) says that `nearest` takes whole query vectors, as `query_vectors` makes them, and returns
    `scores`. Otherwise it takes unit vectors `(queries, latent_size)`, whose inner product with
    `model.gallery(direction, latents)` ranks.
    """

    def __len__(self) -> int:
        """Items that can be found."""

    def nearest(self, vectors: np.ndarray, k: int, where: dict[str, Any] | None) -> ShortList:
        """The `k` nearest items of each query among those that meet the (checked) conditions."""

    def describe(self) -> str:
        """What kind of index this is, in a few words."""
