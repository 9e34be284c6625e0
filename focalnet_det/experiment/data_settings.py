"""Derive settings from the data: classes, weights, batch, length, periods, learning rate."""

import logging
from contextlib import suppress
from dataclasses import replace

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..checkpoint.dino_fit import conventions_of_file
from ..data.io.labels import balanced_weights, pixel_counts
from ..data.semantic.label_folders import paired_files, read_class_list
from ..heads.dino.dino_conventions import AUTO, DEFAULT
from .length import fit_length
from .own_data import DataFacts, OwnData, register
from .settings import Given, ModelSettings, Settings

logger = logging.getLogger("focalnet_det")

# Up to this many images, classes are weighted: rare or thin ones would not be learned otherwise.
FEW_IMAGES = 1000
# evaluator_type of a recipe's data sets -> kind of data, and advice on recipes for each kind.
KIND_OF_EVALUATOR = {
    "coco": "coco",
    "coco_panoptic_seg": "panoptic",
    "sem_seg": "labels",
    "classification": "classes",
    "unlabeled": "unlabeled",
}
RECIPES = {
    "coco": "COCO files (--coco-json) need a detector: see configs/COCO-Detection, "
    "configs/COCO-InstanceSegmentation, configs/COCO-Keypoints.",
    "panoptic": "Panoptic files (--panoptic-json) need a panoptic model: see "
    "configs/*PanopticSegmentation.",
    "labels": "Label folders (--sem-images) need a semantic segmentor: see "
    "configs/*SemanticSegmentation.",
    "classes": "Class folders (--class-images) need a classifier: see configs/*Classification.",
    "unlabeled": "Images without labels (--unlabeled-images) are for pretraining: see "
    "configs/*Pretraining.",
}


def scale_learning_rate(settings: Settings, given: Given) -> Settings:
    """Scale the learning rate with the batch size (linear rule), and log it.

    An explicit learning rate is kept. ``recipe_batch`` is set to the batch size, so a saved config
    is not scaled again.

    Source: arXiv:1706.02677, section 2.1.
    """
    recipe, batch = settings.options.recipe_batch, settings.batch_size
    if recipe in (0, batch):
        return settings
    options = replace(settings.options, recipe_batch=batch)
    if "learning_rate" in given:
        return replace(settings, options=options)
    rate = settings.learning_rate * batch / recipe
    logger.info(
        "The batch size is %d instead of the recipe's %d: the learning rate is scaled by %g to "
        "%g. To set it: %s.",
        batch, recipe, batch / recipe, rate, given.override("learning_rate", "VALUE"),
    )  # fmt: skip
    return replace(settings, learning_rate=rate, options=options)


def raise_detections(settings: Settings, given: Given) -> Settings:
    """Raise the model's limit of detections per image to the number evaluated, and log it."""
    limit, evaluated = settings.model.detections, settings.options.max_dets
    if limit is None or limit >= evaluated or "detections" in given:
        return settings
    logger.info(
        "The model returns up to %d detections per image, the number that is evaluated.", evaluated
    )
    return replace(settings, model=replace(settings.model, detections=evaluated))


def settle_conventions(settings: Settings) -> Settings:
    """Return settings whose DINO has the conventions of its initial weights, and log them.

    Weights that are no whole DINO have none: then those of detrex are taken. What cannot be read is
    named when it is loaded.
    """
    if settings.model.conventions != AUTO:
        return settings
    weights, found = settings.options.init_checkpoint, None
    if weights:
        with suppress(ValueError, OSError):
            found = conventions_of_file(weights)
    if found is not None:
        logger.info("Conventions of %s, as the weights in %s have.", found, weights)
    model = replace(settings.model, conventions=found or DEFAULT)
    return replace(settings, model=model)


def kind_of(settings: Settings) -> str | None:
    """Return the kind of data that a recipe is for, None if its sets are not registered."""
    names = (*settings.train_sets, *settings.test_sets)
    kinds = [MetadataCatalog.get(name).get("evaluator_type") for name in names]
    return next((KIND_OF_EVALUATOR[kind] for kind in kinds if kind in KIND_OF_EVALUATOR), None)


def with_own_data(settings: Settings, data: OwnData, given: Given) -> Settings:
    """Register the user's own data sets, and return settings for them.

    Class counts come from the data; batch, length, periods and learning rate are fitted to it
    unless they are overridden. Up to 1,000 images, a loss with class weights weights the classes by
    their pixels.

    Raises: ValueError if files are invalid, or the recipe is for another kind of data.
    """
    if kind_of(settings) not in (None, data.kind):
        raise ValueError(RECIPES[data.kind])
    facts = register(data, unified=settings.model.unified)
    model = with_classes(settings.model, facts)
    if not has_fixed_weights(settings, given) and data.kind == "labels":
        weights = class_weights(data, facts, given)
        model = replace(model, class_weights=weights)
    settings = replace(
        settings, model=model, train_sets=facts.train, test_sets=facts.val, own_data=data
    )
    if not data.train:
        return settings
    return fit_length(settings, given, facts.num_images, comm.get_world_size())


def with_classes(model: ModelSettings, facts: DataFacts) -> ModelSettings:
    """Return model settings for the classes and keypoints of a data set.

    Raises: ValueError if the data is panoptic and the model is not.
    """
    if not facts.classes:
        return model
    stuff = len(facts.stuff) or None
    if model.unified and stuff:
        return replace(model, classes=stuff, things=facts.things)
    if stuff and model.stuff is None:
        raise ValueError(RECIPES["panoptic"])
    keypoints = model.keypoints and (facts.keypoints or model.keypoints)
    return replace(model, classes=len(facts.classes), stuff=stuff, keypoints=keypoints)


def has_fixed_weights(settings: Settings, given: Given) -> bool:
    """Tell whether the class weights are already set, or the loss does not have any."""
    model = settings.model
    return not model.weighted or model.class_weights is not None or "class_weights" in given


def class_weights(data: OwnData, facts: DataFacts, given: Given) -> tuple[float, ...] | None:
    """Compute class weights from the pixels of a small training set, and log their range.

    Returns: one weight per class; None without a training set, or if it is large.
    Raises: ValueError if a label file has values that are not classes.
    """
    if not data.train or facts.num_images > FEW_IMAGES:
        return None
    assert data.classes is not None
    rule = read_class_list(data.classes, data.first_label).rule
    files = (label for row in data.train for _, label in paired_files(row.images, row.labels))
    weights = balanced_weights(pixel_counts(files, rule))
    low, high = min(weights), max(weights)
    logger.info(
        "The data set is small: the loss weights classes by their pixels, from %g (%s) to %g (%s). "
        "For equal weights: %s.",
        low,
        facts.classes[weights.index(low)],
        high,
        facts.classes[weights.index(high)],
        given.override("class_weights", given.none),
    )
    return tuple(weights)
