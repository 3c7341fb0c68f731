"""The README's example, as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import Product

pytestmark = pytest.mark.stack
README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_example_prints_a_decision(product: Product) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "127.0.0.1:7001" in example
    code = example.replace("127.0.0.1:7001", str(product.stack.endpoints.decision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ACTION_(TRADE|NO_TRADE|ABSTAIN) ", done.stdout), done.stdout
