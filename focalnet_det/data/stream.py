"""The training stream: endless batches that depend on the seed and the iteration alone.

A training that is stopped and resumed sees the pictures it would have seen, augmented as they would
have been, whatever the number of loader processes.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from torch.utils.data import DataLoader, Dataset, Sampler

from .instances.mappers import DATA_ISSUES, SkippedImage
from .workers import protect_workers

# The number of a draw in the stream, and the index of the record that was drawn.
Draw = tuple[int, int]

Mix = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]

# Images in a row that may be skipped before the data set counts as unusable.
MOST_SKIPPED = 50


class DrawSampler(Sampler[list[Draw]]):
    """Endless batches of draws for one process.

    The stream is one permutation of the records after another; process r of W takes every W-th
    draw, from the r-th on, and batches draws of one group with each other.

    Args:
        groups: of each record, such as upright and wide; its length is that of the data set.
        batch_size: draws per batch, of this process.
        seed: of the permutations, the same in all processes.
        start: batches to leave out at the beginning.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        groups: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        return islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[Draw]]:
        waiting: dict[int, list[Draw]] = defaultdict(list)
        for draw in islice(self._draws(), self.rank, None, self.world_size):
            batch = waiting[self.groups[draw[1]]]
            batch.append(draw)
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def _draws(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(self.seed)
        numbers = count()
        while True:
            for index in torch.randperm(len(self.groups), generator=generator).tolist():
                yield next(numbers), index


class DrawnImages(Dataset[dict[str, Any]]):
    """Maps draws to training examples; the randomness of each is that of its draw.

    Args:
        records: in Detectron2's format.
        mapper: record -> example; raises SkippedImage to have another record drawn in its place.
        seed: of the augmentations.
        mix: (example, function that draws another one) -> example; None for none.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
        mix: Mix | None = None,
    ) -> None:
        # Serialised, so that loader processes share its memory; each access gives a fresh copy.
        self.records = DatasetFromList(list(records), copy=False)
        self.mapper = mapper
        self.seed = seed
        self.mix = mix

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        number, index = draw
        with seeded(self.seed, number):
            example = self._usable(index)
            if self.mix is None:
                return example
            return self.mix(example, lambda: self._usable(int(np.random.randint(len(self)))))

    def _usable(self, index: int) -> dict[str, Any]:
        """The record, or if it is skipped, another one at random."""
        skipped: Counter[str] = Counter()
        for _ in range(MOST_SKIPPED):
            try:
                example = self.mapper(self.records[index])
            except SkippedImage as skip:
                skipped.update(skip.issues)
                reason = str(skip)
                index = int(np.random.randint(len(self)))
                continue
            if skipped:
                example[DATA_ISSUES] = dict(skipped + Counter(example.get(DATA_ISSUES, {})))
            return example
        raise ValueError(
            f"{MOST_SKIPPED} training images in a row cannot be used. The last one: {reason}"
        )


def fingerprint(records: Sequence[dict[str, Any]]) -> str:
    """Describe training records so that a resumed run knows whether they are the same.

    Args:
        records: in Detectron2's format. Folders do not count, file names, classes and boxes do.
    Returns: such as "1000 images (3f2a91c07b55)".
    """
    digest = hashlib.sha256()
    for record in records:
        name = record.get("file_name", "").replace("\\", "/").rpartition("/")[2]
        rows = [
            (a.get("category_id"), [round(float(x), 3) for x in a.get("bbox", ())])
            for a in record.get("annotations", ())
        ]
        digest.update(repr((name, record.get("image_id"), rows)).encode())
    return f"{len(records)} images ({digest.hexdigest()[:12]})"


@contextmanager
def seeded(seed: int, number: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers from (seed, number), then as they were."""
    before = random.getstate(), np.random.get_state()
    entropy = np.random.SeedSequence((seed, number)).generate_state(4)
    random.seed(int(entropy[0]))
    np.random.seed(entropy[1:3])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(entropy[3]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def open_stream(
    records: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    groups: Sequence[int],
    batch_size: int,
    num_workers: int,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
    mix: Mix | None = None,
) -> DataLoader[Any]:
    """Batches of one process from batch ``start`` on; arguments as in the classes above."""
    sampler = DrawSampler(
        groups, batch_size=batch_size, seed=seed, start=start, rank=rank, world_size=world_size
    )
    loader: DataLoader[Any] = DataLoader(
        DrawnImages(records, mapper, seed, mix),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_list,
        # Without its own, the loader would take a number from the model's generator.
        generator=torch.Generator().manual_seed(seed),
        # Images then go to a GPU while it computes.
        pin_memory=torch.cuda.is_available(),
    )
    return protect_workers(loader)


def _as_list(examples: list[Any]) -> list[Any]:
    return examples
