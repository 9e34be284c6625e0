"""Report what became of every tensor of a file that was loaded."""

from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Report on every tensor of a file and of the model.

    Attributes:
        loaded: names loaded without changes.
        resized: names padded, cropped or rearranged to another shape.
        dropped: names in the file that the model does not need.
        missing: names in the model that the file does not have; they keep their initial values.
        renamed: name in the model -> name in the file, where they differ.
        rules: name of a dropped tensor -> rule by which it was dropped.
        layout: key of the file's layout in ``focalnet_det.checkpoint.layouts.tables.LAYOUTS``.
        share: fraction of the backbone's elements that came from the file, 0..1, without output
            norms.
        notes: assumed defaults, and the effects of resizing.
        warnings: what was lost; also logged.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    layout: str = "official"
    share: float = 0.0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"Loaded {len(self.loaded)} tensors, resized {len(self.resized)}, "
            f"dropped {len(self.dropped)}; {len(self.missing)} are new."
        )
        text += f" Layout: {self.layout}. {100 * self.share:.1f} % of the backbone."
        for rule in dict.fromkeys(self.rules.values()):
            text += _listed(f"Dropped, {rule}", [n for n, r in self.rules.items() if r == rule])
        text += _listed("Resized", self.resized) + _listed("New", self.missing)
        text += "".join(f"\n  Note: {note}" for note in self.notes)
        return text + "".join(f"\n  Warning: {warning}" for warning in self.warnings)


def _listed(title: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"\n  {title}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
