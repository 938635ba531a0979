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


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(document: Path) -> None:
    text = re.sub(r"(?s)```.*?```", "", document.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [
        target for target in targets if not (document.parent / (target.partition("#")[0] or ".")).exists()
    ]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.relative_to(ROOT / "docs") for path in DOCUMENTS if "docs" in path.parts}
    listed = {str(page) for page in pages if f"({page})" in index}
    assert {str(page) for page in pages if page.parts[0] != "decisions"} - listed == {"README.md"}
