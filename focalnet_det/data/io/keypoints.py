"""Infer which keypoints a horizontal flip swaps, from their names."""

import re
from collections.abc import Sequence

SIDES = {
    **dict.fromkeys(("left", "l", "lt", "lft"), "left"),
    **dict.fromkeys(("right", "r", "rt", "rgt"), "right"),
}
# Splits "left_eye", "Left Eye", "LeftEye", "eyeL", "l.eye", "EYE-R2" into words.
WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
# Fallback for "lefteye" and "eyeright", where no word is a side.
INSIDE = re.compile("left|right", re.IGNORECASE)


def side_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the side that a name contains ("left", "right" or None), and its other words."""
    words = [word.lower() for word in WORDS.findall(name)]
    sides = [k for k, word in enumerate(words) if word in SIDES]
    if len(sides) == 1:
        k = sides[0]
        return SIDES[words[k]], (*words[:k], "*", *words[k + 1 :])
    found = INSIDE.findall(name)
    if not sides and len(found) == 1:
        return found[0].lower(), (INSIDE.sub("*", name).lower(),)
    return None, tuple(words)


def flip_pairs(names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (left, right) pairs of names, and names with a side but without counterpart."""
    left: dict[tuple[str, ...], str] = {}
    right: dict[tuple[str, ...], str] = {}
    for name in names:
        side, rest = side_and_rest(name)
        if side is not None:
            (left if side == "left" else right)[rest] = name
    pairs = [(name, right[rest]) for rest, name in left.items() if rest in right]
    unpaired = [name for rest, name in left.items() if rest not in right]
    return pairs, unpaired + [name for rest, name in right.items() if rest not in left]
