"""The package where no systemd runs."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from guide import Guide
from life import PROGRAM, Life
from machine import Chroot, Machine, eventually


class TestChroot(Life):
    KIND = Chroot
    ALSO = "systemd-standalone-sysusers systemd-standalone-tmpfiles spawn-fcgi multiwatch"
    PACKAGES: list[str | Path] = [*Life.PACKAGES, *ALSO.split()]

    test_certificate = test_change_and_scale = test_watch = test_logs = test_backup = test_sql_server = None
    test_uploads_by_path = None

    SOCKET = "660 extract-fcgi www-data"

    def start(self, machine: Machine, guide: Guide) -> None:
        assert f"`{self.ALSO}`" in guide.text
        machine.run(guide.commands("Without systemd", "spawn-fcgi -n"))

    def upgrade(self, machine: Machine, guide: Guide, command: str) -> Callable[[], str]:
        said = machine.run(command) + machine.run(guide.commands("Without systemd", "pidof extract-fcgi"))
        return lambda: said

    def stop(self, machine: Machine, guide: Guide) -> None:
        machine.run(guide.commands("Without systemd", "pidof multiwatch"))
        eventually(lambda: machine.processes(PROGRAM) == [], "the pool has ended")
