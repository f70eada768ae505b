"""The guides, as the package brings them: their commands are what the tests type."""
from __future__ import annotations

import re
from pathlib import Path


class Guide:
    def __init__(self, path: Path) -> None:
        self.text = path.read_text()

    def commands(self, heading: str, having: str) -> str:
        """The block of the section that has this in it."""
        [section] = re.findall(rf"(?ms)^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", self.text)
        blocks = [re.sub(r"(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n)+", section)]
        [block] = [block for block in blocks if having in block]
        return str(block)
