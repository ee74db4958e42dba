"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
from torch import Tensor

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[1])
def test_snippet_runs(snippet):
    names: dict = {}
    exec(snippet, names)
    results = [x for x in names.values() if isinstance(x, Tensor)]
    assert results
    assert all(x.isfinite().all() for x in results)
