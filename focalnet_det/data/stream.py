"""Stream endless training batches that depend on the seed and the iteration alone.

A resumed run therefore processes the same images with the same augmentations as an uninterrupted
one, regardless of the number of loader workers.
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

# Position in the stream, and index of the record.
StreamIndex = tuple[int, int]

# (sample, function that loads another random sample) -> sample.
MixFunction = Callable[[dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]

# Consecutive images that may be skipped before the dataset counts as unusable.
MAX_SKIPPED_IMAGES = 50


class StreamSampler(Sampler[list[StreamIndex]]):
    """Endless batch sampler for one process.

    The stream is a concatenation of random permutations of the records. Rank r of W takes every
    W-th element, starting at the r-th, and batches elements of the same group.

    Args:
        groups: group of each record, such as portrait or landscape; one entry per record.
        batch_size: samples per batch of this process.
        seed: seed of the permutations, the same in all processes.
        start: number of batches to skip at the beginning.
        rank, world_size: rank of this process, and number of processes.
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

    def __iter__(self) -> Iterator[list[StreamIndex]]:
        return islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[StreamIndex]]:
        buffers: dict[int, list[StreamIndex]] = defaultdict(list)
        for index in islice(self._indices(), self.rank, None, self.world_size):
            batch = buffers[self.groups[index[1]]]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def _indices(self) -> Iterator[StreamIndex]:
        generator = torch.Generator().manual_seed(self.seed)
        positions = count()
        while True:
            for record in torch.randperm(len(self.groups), generator=generator).tolist():
                yield next(positions), record


class StreamDataset(Dataset[dict[str, Any]]):
    """Dataset of training samples, each augmented with random numbers of its stream position.

    Args:
        records: in Detectron2's format.
        mapper: record -> sample; raises SkippedImage to have another record sampled instead.
        seed: seed of the augmentations.
        mix: combines a sample with others, such as copy-paste; None for none.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
        mix: MixFunction | None = None,
    ) -> None:
        # Serialized, so that loader workers share the memory; each access returns a fresh copy.
        self.records = DatasetFromList(list(records), copy=False)
        self.mapper = mapper
        self.seed = seed
        self.mix = mix

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: StreamIndex) -> dict[str, Any]:
        position, record = index
        with temporary_seed(self.seed, position):
            sample = self._load(record)
            if self.mix is None:
                return sample
            return self.mix(sample, lambda: self._load(int(np.random.randint(len(self)))))

    def _load(self, index: int) -> dict[str, Any]:
        """Load a record, or if it is skipped, a random other one."""
        skipped: Counter[str] = Counter()
        for _ in range(MAX_SKIPPED_IMAGES):
            try:
                sample = self.mapper(self.records[index])
            except SkippedImage as skip:
                skipped.update(skip.issues)
                reason = str(skip)
                index = int(np.random.randint(len(self)))
                continue
            if skipped:
                sample[DATA_ISSUES] = dict(skipped + Counter(sample.get(DATA_ISSUES, {})))
            return sample
        raise ValueError(
            f"{MAX_SKIPPED_IMAGES} consecutive training images are unusable. The last one: {reason}"
        )


def fingerprint(records: Sequence[dict[str, Any]]) -> str:
    """Hash training records, so that a resumed run can detect whether they changed.

    Args:
        records: in Detectron2's format. File names, classes and boxes are hashed, folders are not.
    Returns: such as "1000 images (3f2a91c07b55)".
    """
    digest = hashlib.sha256()
    for record in records:
        name = record.get("file_name", "").replace("\\", "/").rpartition("/")[2]
        rows = [
            (a.get("category_id"), [round(float(x), 3) for x in a.get("bbox", ())])
            for a in record.get("annotations", ())
        ]
        described = [name, record.get("image_id"), rows]
        described += [record["label"]] if "label" in record else []
        digest.update(repr(tuple(described)).encode())
    return f"{len(records)} images ({digest.hexdigest()[:12]})"


@contextmanager
def temporary_seed(seed: int, position: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch from (seed, position), and restore their states on exit."""
    states = random.getstate(), np.random.get_state()
    entropy = np.random.SeedSequence((seed, position)).generate_state(4)
    random.seed(int(entropy[0]))
    np.random.seed(entropy[1:3])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(entropy[3]))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def build_stream_loader(
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
    mix: MixFunction | None = None,
) -> DataLoader[Any]:
    """Build the loader of one process, starting at batch ``start``.

    Args:
        records, mapper, mix: see :class:`StreamDataset`.
        groups, batch_size, start, rank, world_size: see :class:`StreamSampler`.
        num_workers: loader workers of this process.
        seed: seed of permutations and augmentations.
    """
    sampler = StreamSampler(
        groups, batch_size=batch_size, seed=seed, start=start, rank=rank, world_size=world_size
    )
    loader: DataLoader[Any] = DataLoader(
        StreamDataset(records, mapper, seed, mix),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_identity,
        # By default the loader draws its base seed from the global generator, which the model uses.
        generator=torch.Generator().manual_seed(seed),
        # Pinned memory lets copies to the GPU overlap with computation.
        pin_memory=torch.cuda.is_available(),
    )
    return protect_workers(loader)


def _identity(samples: list[Any]) -> list[Any]:
    return samples
