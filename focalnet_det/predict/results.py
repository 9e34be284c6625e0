"""Write predictions as COCO JSON and label PNGs, such that an interrupted job can go on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image

from ..atomic import replacing, write_text
from .prediction import Prediction

JOURNAL = "predictions.jsonl"
COCO, PANOPTIC, CLASSES = "predictions.json", "panoptic.json", "classes.json"
LABELS = "labels"
# Of things last, so that they stay things where both kinds share one numbering.
KINDS = ("stuff", "thing")


class ResultsWriter:
    """Collects the predictions of a job in a folder.

    A line is added to ``predictions.jsonl`` for every image or video that is done; from it
    ``predictions.json`` is made at the end, in COCO's format, and ``panoptic.json`` in that of COCO
    panoptic. Classes of pixels and panoptic segments are PNGs in ``labels``; the best classes of
    whole images are in ``classes.json``.

    Args:
        folder: of the outputs.
        job: what determines the predictions, such as checkpoint and threshold.
        metadata: of the classes.
        overwrite: begin anew, whatever the folder holds.
    Raises: ValueError if the folder holds the predictions of another job.
    """

    def __init__(
        self, folder: Path, job: dict[str, Any], metadata: Metadata, *, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.metadata = metadata
        self.journal = folder / JOURNAL
        lines = [] if overwrite else list(read_lines(self.journal))
        if lines and lines[0] != job:
            raise ValueError(
                f"{folder} holds predictions of another job ({lines[0]}): give another --output, "
                "or --overwrite."
            )
        self.done = {line["name"]: line for line in lines[1:]}
        # A line that was cut off goes.
        write_text(self.journal, [json.dumps(line) + "\n" for line in lines or [job]])

    def add(self, name: str, frames: list[dict[str, Any]]) -> None:
        """Note that an image, or a video with its frames, is done; see :meth:`describe`."""
        self._append({"name": name, "frames": frames})

    def add_error(self, name: str, error: str) -> None:
        """Note that a file could not be read."""
        self._append({"name": name, "error": error})

    def _append(self, line: dict[str, Any]) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.done[line["name"]] = line

    @property
    def errors(self) -> dict[str, str]:
        """Return what was wrong with the files that could not be read, by name."""
        return {name: line["error"] for name, line in self.done.items() if "error" in line}

    def describe(self, prediction: Prediction, file_name: str, labels: str) -> dict[str, Any]:
        """Return a prediction as JSON can hold it.

        Args:
            file_name: of the image, as ``predictions.json`` names it.
            labels: name of the PNG of its pixels, without suffix.
        """
        height, width = prediction.image.shape[:2]
        frame: dict[str, Any] = {"file_name": file_name, "height": height, "width": width}
        if "instances" in prediction:
            rows = instances_to_coco_json(prediction.instances, 0)
            for row in rows:
                del row["image_id"]
                row["category_id"] = self._dataset_id("thing", row["category_id"])
            frame["annotations"] = rows
        if "panoptic_seg" in prediction:
            ids, segments = prediction.panoptic
            frame["segments_info"] = [self._segment(segment) for segment in segments]
            values = ids.numpy().astype(np.uint32)
            frame["labels"] = self._save(labels, np.stack([values >> s for s in (0, 8, 16)], -1))
        elif "class_scores" in prediction:
            best = prediction.classes
            frame["classes"] = [{"name": name, "score": score} for name, score in best]
        elif "sem_seg" in prediction:
            frame["labels"] = self._save(labels, prediction.semantic.numpy())
        return frame

    def _save(self, name: str, values: np.ndarray) -> str:
        relative = f"{LABELS}/{name}.png"
        depth = np.uint16 if values.ndim == 2 and values.max(initial=0) > 255 else np.uint8
        with replacing(self.folder / relative, durable=False) as temporary:
            Image.fromarray(values.astype(depth)).save(temporary, format="PNG")
        return relative

    def finish(self) -> list[Path]:
        """Write the JSON files of all that is done; return their paths."""
        frames = [f for name in sorted(self.done) for f in self.done[name].get("frames", [])]
        images = [
            {"id": number, **{k: frame[k] for k in ("file_name", "height", "width")}}
            for number, frame in enumerate(frames, 1)
        ]
        written = []
        if any("annotations" in frame for frame in frames):
            rows = [
                {**row, "image_id": number}
                for number, frame in enumerate(frames, 1)
                for row in frame.get("annotations", [])
            ]
            numbered = [{"id": number, **row} for number, row in enumerate(rows, 1)]
            written.append(self._write(COCO, images, numbered, self._categories("thing")))
        if any("segments_info" in frame for frame in frames):
            segments = [
                {
                    "image_id": number,
                    "file_name": frame["labels"],
                    "segments_info": frame["segments_info"],
                }
                for number, frame in enumerate(frames, 1)
            ]
            categories = {c["id"]: c for k in KINDS for c in self._categories(k)}
            written.append(self._write(PANOPTIC, images, segments, list(categories.values())))
        if any("classes" in frame for frame in frames):
            path = self.folder / CLASSES
            write_text(path, json.dumps([frame for frame in frames if "classes" in frame]))
            written.append(path)
        return written

    def _segment(self, segment: dict[str, Any]) -> dict[str, Any]:
        """Return a segment as COCO panoptic files hold it, with its score if it has one."""
        kind = "thing" if segment["isthing"] else "stuff"
        row = {"id": int(segment["id"])}
        row["category_id"] = self._dataset_id(kind, int(segment["category_id"]))
        return row | ({"score": float(segment["score"])} if "score" in segment else {})

    def _ids(self, kind: str) -> dict[int, int]:
        """Return the model's classes of a kind, {id in the dataset: class}."""
        names = self.metadata.get(f"{kind}_classes") or []
        ids = self.metadata.get(f"{kind}_dataset_id_to_contiguous_id")
        return ids or {index: index for index in range(len(names))}

    def _dataset_id(self, kind: str, index: int) -> int:
        return next(number for number, own in self._ids(kind).items() if own == index)

    def _categories(self, kind: str) -> list[dict[str, Any]]:
        names = self.metadata.get(f"{kind}_classes") or []
        return [
            {"id": number, "name": names[index], "isthing": int(kind == "thing")}
            for number, index in self._ids(kind).items()
            if index < len(names)
        ]

    def _write(self, name: str, images: Any, annotations: Any, categories: Any) -> Path:
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = self.folder / name
        write_text(path, json.dumps(content))
        return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal, up to one that was cut off."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
