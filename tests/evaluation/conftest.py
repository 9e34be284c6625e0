"""Ground truth and predictions of a few images."""

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def small() -> tuple[dict[str, Any], Any, int]:
    """Ground truth, the predictions of one of its images and that image's id."""
    from tests.helpers.coco_scores import random_predictions, random_truth, to_instances

    truth = random_truth(np.random.default_rng(7))
    image_id = truth["images"][1]["id"]
    fields = random_predictions(truth, np.random.default_rng(7))[image_id]
    return truth, to_instances(fields), image_id
