"""The pages' Python runs as it stands, pasted into a session; links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_A_RUN = ["own_model.md", "trainer.md"]  # which tests/training runs
BLOCKS = {
    page.name: found
    for page in PAGES
    if page.name not in OF_A_RUN
    if (found := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_there_are_blocks():
    assert sum(map(len, BLOCKS.values())) >= 3


@pytest.mark.parametrize("page", BLOCKS)
def test_the_python_blocks_run(page):
    """One after another in one interactive session, which goes on after an error; with
    classes, between whose methods there are blank lines, as a file."""
    code = "\n".join(BLOCKS[page])
    how = ["-c", code] if "\nclass " in code else ["-q", "-i"]
    done = subprocess.run(
        [sys.executable, "-W", "error", *how],
        input=code,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    errors = re.sub(r"^(>>> |\.\.\. )+|\s+", "", done.stderr, flags=re.MULTILINE)
    assert not errors, done.stderr
    assert done.stdout.count("(") >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
