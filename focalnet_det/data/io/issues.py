"""Faults of data files, collected and shown together."""

from collections import defaultdict
from collections.abc import Mapping

# Rows of each kind that a message names.
SHOWN = 3


class DataError(ValueError):
    """Say why a data set cannot be used: a line for each kind of fault, with rows and remedy.

    Attributes:
        faults: by kind, None where there is no table of them.
    """

    faults: "Faults | None" = None


class Faults:
    """Collect the faults of a data set by kind.

    Args:
        subject: file or folder that the message begins with.
        remedies: kind -> what to do about it, a sentence.
    """

    def __init__(self, subject: object, remedies: Mapping[str, str]) -> None:
        self.subject = subject
        self.remedies = remedies
        self.rows: dict[str, list[str]] = defaultdict(list)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, kind: str, row: object = "") -> None:
        """Add a fault.

        Args:
            kind: key of ``remedies``.
            row: where it is, and what was read there; shortened to 160 characters.
        Raises: KeyError if the kind has no remedy.
        """
        if kind not in self.remedies:
            raise KeyError(f"No remedy for {kind!r}.")
        self.counts[kind] += 1
        if len(self.rows[kind]) < SHOWN:
            text = str(row)
            self.rows[kind].append(text if len(text) <= 160 else f"{text[:157]}...")

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """Return "N kind: rows. Remedy" of each kind, in the order of ``remedies``."""
        result = []
        for kind, remedy in self.remedies.items():
            if count := self.counts.get(kind):
                rows = "; ".join(filter(None, self.rows[kind]))
                more = "; ..." if count > len(self.rows[kind]) else ""
                result.append(f"{count} x {kind}{f': {rows}{more}' if rows else ''}. {remedy}")
        return result

    def stop(self) -> None:
        """Raise DataError with all faults, if there are any."""
        if self:
            text = "\n".join(f"- {line}" for line in self.lines())
            error = DataError(f"{self.subject} cannot be used:\n{text}")
            error.faults = self
            raise error


def shown(value: object) -> str:
    """Return a short form of a value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
