"""Code in the pages does what they say."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_an_encoder_of_your_own_is_twenty_lines():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "encoders.md").read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 20
    space = {}
    exec(code, space)
    features = space["slide"]["table"].obsm["X_my_encoder"]
    assert features.shape == (300, 32)
    assert features.std(0).max() > 0
    assert space["slide"]["table"].uns["X_my_encoder"]["mpp"] == 1.0
