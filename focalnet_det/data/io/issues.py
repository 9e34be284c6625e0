"""Collect the errors of data files, to report them together."""

from collections import defaultdict
from collections.abc import Mapping

# Examples of each kind of error in a message.
SHOWN = 3


class DataError(ValueError):
    """Report why a dataset is unusable: one line per kind of error, with examples and remedy.

    Attributes:
        errors: the errors by kind, None if there is only a message.
    """

    errors: "ValidationErrors | None" = None


class ValidationErrors:
    """Collector of the errors of a dataset, by kind.

    Args:
        subject: file or folder that the message begins with.
        remedies: kind -> remedy, a sentence.
    """

    def __init__(self, subject: object, remedies: Mapping[str, str]) -> None:
        self.subject = subject
        self.remedies = remedies
        self.rows: dict[str, list[str]] = defaultdict(list)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, kind: str, row: object = "") -> None:
        """Add an error.

        Args:
            kind: key of ``remedies``.
            row: location and value, shortened to 160 characters.
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
        """Format each kind as "N x kind: rows. Remedy", in the order of ``remedies``."""
        result = []
        for kind, remedy in self.remedies.items():
            if count := self.counts.get(kind):
                rows = "; ".join(filter(None, self.rows[kind]))
                more = "; ..." if count > len(self.rows[kind]) else ""
                result.append(f"{count} x {kind}{f': {rows}{more}' if rows else ''}. {remedy}")
        return result

    def raise_if_any(self) -> None:
        """Raise DataError with all errors, if any."""
        if self:
            text = "\n".join(f"- {line}" for line in self.lines())
            error = DataError(f"{self.subject} cannot be used:\n{text}")
            error.errors = self
            raise error


def shorten(value: object) -> str:
    """Return the repr of a value, truncated to 60 characters for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
