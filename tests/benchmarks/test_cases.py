"""The edits with a known answer: as many as the figures say, and each of them a real edit."""

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks import cases


def test_there_are_twelve_of_every_kind_and_no_edit_twice() -> None:
    found = cases.load()
    assert Counter(case.kind for case in found) == dict.fromkeys(cases.KINDS, 12)
    assert len({case.name for case in found}) == len({(case.source_prompt, case.target_prompt) for case in found}) == 60
    assert [case.name for case in cases.load(1)] == [f"{kind.replace(' ', '-')}-1" for kind in cases.KINDS]


@pytest.mark.parametrize("case", cases.load(), ids=lambda case: case.name)
def test_what_changes_is_in_the_region(case: cases.Case) -> None:
    """Soft edges of the sprites reach a little beyond it, so the change outside is small rather than none."""
    change = np.abs(case.target.astype(int) - case.source).mean(2)
    assert case.source_prompt != case.target_prompt
    assert change[case.region].mean() > 10
    assert change[~case.region].mean() < 5


def test_all_of_them_take_less_than_two_megabytes() -> None:
    files = list(cases.FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 2_000_000
    named = {entry[part] for entry in _listing() for part in ("source", "target", "mask")}
    assert {file.name for file in files if file.suffix == ".png"} == named


def _listing() -> list[dict[str, str]]:
    listing: list[dict[str, str]] = json.loads((cases.FOLDER / "cases.json").read_text())["cases"]
    return listing
