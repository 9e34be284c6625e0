"""Predict images and videos in bulk: pictures, videos, COCO JSON and label PNGs."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from ..atomic import replacing
from .prediction import Prediction
from .predictor import Predictor, to_picture
from .results import ResultsWriter
from .sources import Source, find_sources
from .video import VideoWriter, open_video

logger = logging.getLogger("focalnet_det")

PICTURES, VIDEOS = "pictures", "videos"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Options of the output of a job.

    Attributes:
        output: folder.
        batch_size: images that are computed at once, if they have one size.
        pictures: draw the predictions.
        overwrite: begin anew in a folder that holds predictions.
    """

    output: Path
    batch_size: int = 1
    pictures: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """Counts and files of a finished job.

    Attributes:
        predicted: number of images and videos.
        skipped: how many of them an earlier start had predicted.
        errors: what was wrong with the files that could not be read, by name.
        files: that were written at the end.
    """

    predicted: int
    skipped: int
    errors: dict[str, str]
    files: list[Path]


def predict_sources(
    predictor: Predictor, inputs: Sequence[str | Path], options: JobOptions
) -> Summary:
    """Predict everything that a user names, see :func:`~.sources.find_sources`.

    Files that an earlier start of the same job has done are left out; files that cannot be read
    are counted and named, and do not stop the others.

    Raises: ValueError if an input names nothing, no file could be read, or the folder holds the
        predictions of another job.
    """
    sources = find_sources(inputs)
    stat = predictor.checkpoint.stat()
    job = {
        "checkpoint": predictor.checkpoint.name,
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "threshold": predictor.threshold,
    }
    results = ResultsWriter(options.output, job, predictor.metadata, overwrite=options.overwrite)
    # What could not be read may have been mended.
    left = [s for s in sources if s.name not in results.done or s.name in results.errors]
    images = [source for source in left if not source.is_video]
    for batch in track(list(_batches(images, options.batch_size)), "images", disable=not images):
        _predict_images(predictor, batch, results, options)
    for source in left:
        if source.is_video:
            _predict_video(predictor, source, results, options)
    errors = {s.name: results.errors[s.name] for s in sources if s.name in results.errors}
    if len(errors) == len(sources):
        first = next(iter(errors.values()))
        raise ValueError(f"None of {len(sources)} files could be read. The first: {first}")
    return Summary(len(sources) - len(errors), len(sources) - len(left), errors, results.finish())


def _batches(items: Sequence[Source], size: int) -> Iterator[list[Source]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _predict_images(
    predictor: Predictor, batch: list[Source], results: ResultsWriter, options: JobOptions
) -> None:
    with ThreadPoolExecutor(max_workers=min(len(batch), 8)) as pool:
        read = list(pool.map(_read, batch))
    for source, picture in zip(batch, read, strict=True):
        if isinstance(picture, str):
            results.add_error(source.name, picture)
    readable = [(s, p) for s, p in zip(batch, read, strict=True) if isinstance(p, Image.Image)]
    predictions = predictor([picture for _, picture in readable])
    for (source, _), prediction in zip(readable, predictions, strict=True):
        if options.pictures:
            _save_picture(prediction, options.output / PICTURES / f"{source.name}.jpg")
        frame = results.describe(prediction, str(source.path), source.name)
        results.add(source.name, [frame])


def _read(source: Source) -> Image.Image | str:
    """Return a picture, or what is wrong with its file."""
    try:
        return to_picture(source.path)
    except (OSError, ValueError) as error:
        return str(error)


def _save_picture(prediction: Prediction, path: Path) -> None:
    drawn = Image.fromarray(prediction.draw(min_score=0))
    with replacing(path, durable=False) as temporary:
        drawn.save(temporary, format="JPEG", quality=92)


def _predict_video(
    predictor: Predictor, source: Source, results: ResultsWriter, options: JobOptions
) -> None:
    try:
        described = list(_described_frames(predictor, source, results, options))
    except ValueError as error:
        results.add_error(source.name, str(error))
    else:
        results.add(source.name, described)


def _described_frames(
    predictor: Predictor, source: Source, results: ResultsWriter, options: JobOptions
) -> Iterator[dict[str, Any]]:
    rate, frames = open_video(source.path)
    path = options.output / VIDEOS / f"{source.name}.mp4"
    with VideoWriter(path, rate) as video:
        for number, frame in enumerate(track(frames, source.path.name)):
            prediction = predictor(frame)
            video.add(prediction.draw(min_score=0))
            labels = f"{source.name}/{number:06d}"
            yield results.describe(prediction, f"{source.path}#{number}", labels)


def predict_camera(predictor: Predictor, number: int, options: JobOptions) -> Path:
    """Record what a camera sees, with predictions, until Ctrl-C; return the video.

    Args:
        number: of the camera: 0 for ``/dev/video0``.
    Raises: ValueError if there is no such camera.
    """
    rate, frames = open_video(f"/dev/video{number}", format_name="v4l2")
    path = options.output / VIDEOS / f"camera_{number}.mp4"
    logger.info("Recording to %s; Ctrl-C ends it.", path)
    with VideoWriter(path, rate) as video:
        try:
            for frame in frames:
                video.add(predictor(frame).draw(min_score=0))
        except KeyboardInterrupt:
            logger.info("Recording ended.")
    return path
