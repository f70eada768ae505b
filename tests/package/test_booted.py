"""The package where systemd runs."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from guide import Guide
from life import FIRST, HIGHER, PROGRAM, Life
from machine import PATIENCE, ROOT, Booted, Machine, eventually


# What is in a block and is not typed by these tests: the section, a part of it (all of it: empty), why.
NOT_TYPED = (
    ("What is where", "nginx ──▶", "a picture"),
    ("From the source", "", "not from the package"),
    ("Without systemd", "", "test_chroot.py"),
    ("Upgrade without downtime", "make install", "not from the package"),
    ("Remove", "make uninstall", "not from the package"),
    ("What the service may do", "IPAddressDeny=any", "a drop-in to be edited"),
    ("What the service may do", "ReadWritePaths=/srv", "a drop-in to be edited"),
    ("Installing the site", "install -d /etc/nginx/extract-fcgi", "not from the package: tests/e2e/test_nginx.py"),
    ("The dashboard", "ssh -L", "on another machine"),
    ("For administrators: /admin/", '{"request_id"', "an answer"),
    ("For administrators: /admin/", "location ^~ /admin/", "for nginx: tests/e2e/test_nginx.py has the one like it"),
)


class TestBooted(Life):
    KIND = Booted
    PACKAGES: list[str | Path] = [*Life.PACKAGES, "sqlite3", "prometheus"]

    def start(self, machine: Machine, guide: Guide) -> None:
        said = machine.run(guide.commands(FIRST, "systemctl start"))
        for unit in ("extract-fcgi.target", "extract-fcgi.socket", "extract-fcgi@1.service", "extract-fcgi@2.service"):
            assert f"● {unit} - " in said, said

    def upgrade(self, machine: Machine, guide: Guide, command: str) -> Callable[[], str]:
        upgrading = machine.background(command)
        eventually(lambda: machine.succeeds("systemctl show -P ActiveState 'extract-fcgi@*' | grep -q ^deactivating"),
                   "a process has been asked to end")

        def end() -> str:
            said, _ = upgrading.communicate(timeout=PATIENCE)
            assert upgrading.returncode == 0, said
            return str(said)

        return end

    def does_not_suit(self, machine: Machine, said: str) -> None:
        """It says so; then a process that cannot start, for a reason that no --check-config by hand can see."""
        assert "unknown_key" in said and "Mend the configuration, then: systemctl reload extract-fcgi" in said
        before = machine.processes(PROGRAM)
        drop_in = machine.path("/etc/systemd/system/extract-fcgi@1.service.d/test.conf")
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nEnvironment=EXTRACT_SERVER_THREADS=none\n")
        said = machine.run(f"apt-get install -y --reinstall ./extract-fcgi_{HIGHER}_*.deb")
        assert "a process did not come back; the others go on as they are" in said
        assert json.loads(machine.run(self.curl(machine)))["status"] == "success"
        after = machine.processes(PROGRAM)
        assert len(set(before) & set(after)) == 1
        drop_in.unlink()
        drop_in.parent.rmdir()
        machine.run("systemctl daemon-reload && systemctl restart extract-fcgi@1")

    def test_every_command_was_typed(self) -> None:
        """By the steps before; of nginx's guide, in the sections that a sysadmin follows."""
        sections = ("Installing the site", "Certificates", "The dashboard", "curl", "For administrators: /admin/")
        web = [found for found in Guide(ROOT / "nginx/README.md").untyped() if found[0] in sections]
        for heading, block in [*Guide(ROOT / "systemd/README.md").untyped(), *web]:
            assert any(heading == section and part in block for section, part, _ in NOT_TYPED), f"{heading}:\n{block}"
