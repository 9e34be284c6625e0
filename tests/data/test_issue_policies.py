"""The tally of odd images and labels, and the page of what happens to them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data import issue_policies
from focalnet_det.data.issue_policies import ISSUE_POLICIES, IssueCounter, policy_table
from tests.helpers.paths import ROOT


def test_tally_adds_merges_and_resumes() -> None:
    first, second = IssueCounter(), IssueCounter()
    first.add({issue_policies.CROWD: 2, issue_policies.EMPTY_BOX: 1})
    second.add({issue_policies.CROWD: 3})
    second.merge(first)
    assert second.counts == {issue_policies.CROWD: 5, issue_policies.EMPTY_BOX: 1}
    resumed = IssueCounter()
    resumed.add({issue_policies.NO_MASK: 7})
    resumed.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert resumed.counts == second.counts
    resumed.add({issue_policies.CROWD: 1})
    assert (resumed.counts[issue_policies.CROWD], second.counts[issue_policies.CROWD]) == (6, 5)


def test_tally_refuses_unknown_problems() -> None:
    counts = IssueCounter()
    counts.add({issue_policies.CROWD: 1})
    with pytest.raises(KeyError, match="'croud'.*Known: unreadable image"):
        counts.add({issue_policies.CROWD: 1, "croud": 1})
    with pytest.raises(KeyError, match="croud"):
        counts.load_state_dict({"counts": {"croud": 1}})
    assert counts.counts == {issue_policies.CROWD: 1}


def test_tally_prints_what_was_met() -> None:
    counts = IssueCounter()
    assert counts.table() == "Images and labels: no issues."
    counts.add(
        {
            issue_policies.BOX_OUTSIDE: 1200,
            issue_policies.UNREADABLE_IMAGE: 3,
            issue_policies.EMPTY_MASK: 0,
        }
    )
    assert counts.table().splitlines() == [
        "images and labels      policy    count",
        "unreadable image       skipped       3",
        "box outside the image  repaired   1200",
    ]


# Names that issues had in checkpoints of earlier versions, as those versions wrote them.
EARLIER = {
    "label file of another size": "label size differs from image",
    "label of no class": "unknown label value",
    "file of several pictures": "image file with several frames",
    "image listed twice": "duplicate image entry",
    "annotation without an id of its own": "missing or duplicate annotation id",
    "box taken from the mask": "box computed from the mask",
    "area that cannot be": "implausible area",
    "object listed twice": "duplicate object",
    "pixels of no listed segment": "pixels of an unlisted segment",
}


def test_counts_of_earlier_checkpoints_keep_counting() -> None:
    counts = IssueCounter()
    saved = {name: number for number, name in enumerate(EARLIER, 1)} | {"empty mask": 50}
    counts.load_state_dict({"counts": saved})
    assert counts.counts == {new: number for number, new in enumerate(EARLIER.values(), 1)} | {
        "empty mask": 50
    }


def test_every_problem_has_a_policy_and_the_page_shows_it() -> None:
    names = {
        value
        for name, value in vars(issue_policies).items()
        if name.isupper() and name not in ("ISSUE_POLICIES", "RENAMED_ISSUES")
    }
    assert names == set(ISSUE_POLICIES)
    actions = {"repaired", "dropped", "skipped", "kept", "stopped"}
    assert {p.training for p in ISSUE_POLICIES.values()} == actions
    assert {p.evaluation for p in ISSUE_POLICIES.values()} <= actions - {"skipped"}
    page = (ROOT / "datasets" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## What happens to odd images and labels\n")[2].split("\n## ")[0]
    assert policy_table() in section
