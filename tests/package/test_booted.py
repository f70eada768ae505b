"""The package where systemd runs."""
from __future__ import annotations

from guide import Guide
from life import Life
from machine import Booted, Machine


class TestBooted(Life):
    KIND = Booted

    def start(self, machine: Machine, guide: Guide) -> None:
        said = machine.run(guide.commands("Start", "systemctl start"))
        for unit in ("extract-fcgi.target", "extract-fcgi.socket", "extract-fcgi@1.service", "extract-fcgi@2.service"):
            assert f"● {unit} - " in said, said

    def is_restarting(self, machine: Machine, before: list[int]) -> bool:
        return not machine.succeeds("! systemctl show -P ActiveState 'extract-fcgi@*' | grep -q deactivating")
