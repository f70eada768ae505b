"""The guides, as the package brings them: their commands are what the tests type."""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar


class Guide:
    typed: ClassVar[set[str]] = set()  # blocks that a test has asked for, of any guide

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()

    def blocks(self) -> Iterator[tuple[str, str]]:
        """The heading above it, and each block of lines that are indented."""
        for heading, section in re.findall(r"(?ms)^#+ (.*?)\n(.*?)(?=^#+ |\Z)", self.text):
            for block in re.findall(r"(?m)(?:^    .*\n)+", section):
                yield heading, re.sub(r"(?m)^    ", "", block)

    def commands(self, heading: str, having: str) -> str:
        """The block of the section that has this in it."""
        [block] = [block for above, block in self.blocks() if above == heading and having in block]
        self.typed.add(self.wherever(block))
        return block

    def untyped(self) -> Iterator[tuple[str, str]]:
        return ((heading, block) for heading, block in self.blocks() if self.wherever(block) not in self.typed)

    @staticmethod
    def wherever(block: str) -> str:
        """The same for an installation by make and for the package."""
        return block.replace("/usr/local/", "/usr/")
