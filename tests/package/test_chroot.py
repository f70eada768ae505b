"""The package where no systemd runs."""
from __future__ import annotations

from pathlib import Path

from guide import Guide
from life import Life
from machine import Chroot, Machine, eventually


class TestChroot(Life):
    KIND = Chroot
    ALSO = "systemd-standalone-sysusers systemd-standalone-tmpfiles spawn-fcgi multiwatch"
    PACKAGES: list[str | Path] = [*Life.PACKAGES, *ALSO.split()]

    def start(self, machine: Machine, guide: Guide) -> None:
        assert f"`{self.ALSO}`" in guide.text
        machine.run(guide.commands("Without systemd", "spawn-fcgi -n"))
        eventually(lambda: machine.succeeds("test -S /run/extract-fcgi/pool.sock"), "the socket is there")

    def restart_command(self, guide: Guide) -> str:
        return guide.commands("Without systemd", "pidof extract-fcgi")

    def restart(self, machine: Machine, guide: Guide) -> None:
        machine.run(self.restart_command(guide))

    def is_restarting(self, machine: Machine, before: list[int]) -> bool:
        return True

    def stop(self, machine: Machine, guide: Guide) -> None:
        machine.run(guide.commands("Without systemd", "pidof multiwatch"))
        eventually(lambda: machine.processes("/usr/sbin/extract-fcgi") == [], "the pool has ended")
