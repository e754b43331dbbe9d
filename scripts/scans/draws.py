"""The order of the data, and every random draw, as a function of seed and position."""

from __future__ import annotations

from collections.abc import Iterator

import ignite.distributed as idist
import numpy as np
from torch.utils.data import Dataset, Sampler


class DrawSampler(Sampler):
    """An endless stream of (index, draw): draw = 0, 1, 2, ... is the position in the stream, and the indices are one
    seeded permutation of the dataset after another.

    The batch of iteration k is draws k B .. (k + 1) B - 1, whatever was done before: set `iteration` and the stream
    goes on exactly there. Of n processes, which must divide B, each takes every n-th draw, beginning with its rank:
    the batch is the same, whatever n is.

    Args:
        dataset: something with a length.
        batch_size: B, of all processes together.
        seed: of the permutations.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.iteration = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, draw = len(self.dataset), self.iteration * self.batch_size + idist.get_rank()
        order, epoch = None, -1
        while count:
            if draw // count != epoch:
                epoch = draw // count
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
            yield int(order[draw % count]), draw
            draw += idist.get_world_size()


class RepeatSampler(Sampler):
    """(index, draw) for every volume `repeats` times in a row, always the same: for validation.

    Of several processes each takes its share of the draws, all equally many: some draws come twice where they do not
    divide evenly.
    """

    def __init__(self, dataset: Dataset, repeats: int = 4) -> None:
        self.dataset, self.repeats = dataset, repeats

    def __len__(self) -> int:
        return -(-len(self.dataset) * self.repeats // idist.get_world_size())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, step, count = idist.get_rank(), idist.get_world_size(), len(self.dataset) * self.repeats
        draws = ((first + i * step) % count for i in range(len(self)))
        return ((draw // self.repeats, draw) for draw in draws)
