"""The documents name only what exists."""

import re
from pathlib import Path

import pytest

from tools import reference

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_named_in_the_rules_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/reference/rules.md").read_text())
    assert len(named) > 30
    for file, test in named:
        sources = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {test}(" in source for source in sources), (file, test)


@pytest.mark.parametrize("path", reference.PAGES)
def test_reference_is_what_the_code_says(path: str) -> None:
    assert (ROOT / path).read_text() == reference.PAGES[path](), "make docs"
