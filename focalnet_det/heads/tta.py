"""Test-time augmentation: an image at several sizes and mirrored, and one answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.data import transforms as T
from torch import Tensor, nn

VIEWS = "views"
TRANSFORMS = "transforms"

Record = Mapping[str, Any]


class TestTimeAugmentation(nn.Module):
    """Runs a model on each view of an image and merges the answers, task by task.

    A view is a record of its own under "views": what the model takes, and "transforms", how its
    image came from the original one. Records without views go to the model as they are.

    Args:
        model: put into eval mode before it is called.
    Raises: KeyError, at the first image, for a kind of answer that has no rule in ``MERGERS``.
    """

    __test__ = False  # pytest takes it for a test otherwise

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Detectron2 puts back the mode that it finds here.
        self.training = model.training

    def forward(self, batched_inputs: Sequence[Record]) -> list[dict[str, Any]]:
        """Records -> for each {task: answer}, as the model gives it."""
        return [self.answer(record) for record in batched_inputs]

    def answer(self, record: Record) -> dict[str, Any]:
        """Of one record."""
        if VIEWS not in record:
            answers: dict[str, Any] = self.model([record])[0]
            return answers
        views = record[VIEWS]
        given = ((self.model([view])[0], view[TRANSFORMS]) for view in views)
        return merged(given)


def merged(answers: Any) -> dict[str, Any]:
    """Merges (answer, transforms) pairs one at a time: those of one view are held, not of all."""
    mergers: dict[str, SemanticMerger] = {}
    for answer, transforms in answers:
        for task, value in answer.items():
            if task not in MERGERS:
                raise KeyError(
                    f"Test-time augmentation cannot merge {task!r}. Known: {', '.join(MERGERS)}."
                )
            mergers.setdefault(task, MERGERS[task]()).add(value, transforms)
    return {task: merger.result() for task, merger in mergers.items()}


class SemanticMerger:
    """Mean of the class probabilities of all views.

    Source: open-mmlab/mmsegmentation:mmseg/models/segmentors/encoder_decoder.py (aug_test).
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, logits: Tensor, transforms: T.TransformList) -> None:
        """Adds one view: logits (K, H, W) of the original size, mirrored if the view is."""
        probabilities = logits.softmax(dim=0)
        if mirrored(transforms):
            probabilities = probabilities.flip(-1)
        self.total = probabilities if self.total is None else self.total + probabilities
        self.count += 1

    def result(self) -> Tensor:
        """Probabilities (K, H, W)."""
        assert self.total is not None
        return self.total / self.count


MERGERS: dict[str, Callable[[], SemanticMerger]] = {"sem_seg": SemanticMerger}


def mirrored(transforms: T.TransformList) -> bool:
    """Whether an odd number of horizontal flips is among the transforms."""
    return sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms) % 2 == 1
