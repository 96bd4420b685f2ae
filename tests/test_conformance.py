"""The grid of families x axes: every cell is proven here, and docs/families.md says what was proven."""

from pathlib import Path

from slimlmm.conformance import cells, page
from slimlmm.families import FAMILIES
from zoo import CONFIGS

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
#: self-checks that fail for a reason that is not ours to mend, and are refused with it
KNOWN = {
    ("blip-2-t5", "text.blocks"): "an encoder of fewer blocks than the decoder has no cache in the stock class",
}


def test_every_axis_of_a_family_is_proven_or_refused_and_the_page_says_so(sampled_family):
    family = sampled_family
    found = cells(family, CONFIGS[family]())
    failed = {(cell.family, cell.axis): cell.reason for cell in found if cell.reason.startswith("self-check")}
    assert set(failed) <= set(KNOWN), failed
    shown = dict(zip(heads(), line_of(family), strict=True))
    for cell in found:
        word = {"exact": "exact", "close": "close (", "refused": "- ("}[cell.verdict]
        assert shown[cell.axis].startswith(word), (cell, shown[cell.axis])


def test_the_page_has_every_family_and_no_other():
    lines = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert lines[1:] == list(CONFIGS)
    assert set(FAMILIES) <= {CONFIGS[name]().model_type for name in CONFIGS}


def test_a_reason_is_numbered_once():
    found = cells("llava-clip-llama", CONFIGS["llava-clip-llama"]())
    text = page({"one": found, "two": found})
    assert text.count("heads go with vision.width") == 1
    assert text.count("close (") == 2


def heads() -> list[str]:
    return next(split(line) for line in PAGE.read_text().splitlines() if line.startswith("| family"))


def line_of(family: str) -> list[str]:
    return next(split(line) for line in PAGE.read_text().splitlines() if line.startswith(f"| {family} |"))


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[2:-1]]
