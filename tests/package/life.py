"""The life of the package on a fresh system: installed, set up as the guides say, used, upgraded, removed, purged.

The steps are the same in each kind of machine; a kind says how its pool is started, restarted and ended. They come one after
the other, each on what the one before has left. What is typed stands in the guides that the package brings, but for what
nobody could know: that Gemini is the emulator here.
"""
from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import HIGHER, Packages
from guide import Guide
from machine import EMULATOR, PATIENCE, ROOT, Machine, eventually

PROGRAM = "extract-fcgi"
SHARE = "/usr/share/extract-fcgi"
CONFIG = "/etc/extract-fcgi/extract-fcgi.conf"
SITE = "/etc/nginx/sites-available/extract-fcgi"
FIRST = "From nothing to the first invoice"
NAME = "invoices.example.org"  # as in the guides
IN_FLIGHT = 4


class Life:
    KIND: type[Machine]
    PACKAGES: list[str | Path] = ["nginx-light", "curl", "man-db"]
    ALSO = ""  # on the line that installs

    client_key = ""

    # ---- what the kinds differ in

    SOCKET = "660 root www-data"

    def start(self, machine: Machine, guide: Guide) -> None:
        raise NotImplementedError

    def upgrade(self, machine: Machine, guide: Guide, command: str) -> Callable[[], str]:
        """Returns when processes have been asked to end, which they can't yet. What it returns waits for the end, and tells
        what was said."""
        raise NotImplementedError

    def does_not_suit(self, machine: Machine, said: str) -> None:
        """What more there is to see after an upgrade that the configuration does not suit."""

    def stop(self, machine: Machine, guide: Guide) -> None:
        """What is to be done before the removal."""

    # ---- helpers

    @staticmethod
    def guides(machine: Machine) -> tuple[Guide, Guide]:
        return Guide(machine.path(f"{SHARE}/systemd/README.md")), Guide(machine.path(f"{SHARE}/nginx/README.md"))

    @staticmethod
    def give(machine: Machine, package: Path) -> None:
        shutil.copy(package, machine.path("/root"))

    def first_extraction(self, machine: Machine, guide: Guide) -> Any:
        """A token and a client key, both of which the other steps use, and an invoice: the answer."""
        token, client, check = guide.commands(FIRST, "token add").splitlines()
        machine.run(token, input="the-api-key\n")
        [key] = re.findall(r"extract_[\w-]{40,}", machine.run(client))
        type(self).client_key = key
        said = machine.run(f"KEY={key}\n{guide.commands(FIRST, '/extract ').replace('curl ', 'curl -sS ', 1)}")
        answer = json.loads(said)
        assert said.startswith('{"status": "success"') and answer["data"]["document_type"] == "invoice"
        machine.run(check)
        machine.run(f"cp {SHARE}/invoice.pdf .")  # what the other examples post
        return answer

    def curl(self, machine: Machine) -> str:
        """As nginx/README.md says, "Calling it", "curl"."""
        command = self.guides(machine)[1].commands("curl", "-F companyID")
        assert command.startswith("curl ") and f" https://{NAME}/extract " in command
        return f"KEY={type(self).client_key}\n{command.replace('curl ', 'curl -sS ', 1)}"

    @staticmethod
    def state(machine: Machine) -> dict[str, tuple[int, str, str]]:
        """Of what must not change: mode and owner of what there is."""
        names = [CONFIG, "/etc/extract-fcgi/credentials", "/var/lib/extract-fcgi", "/run/extract-fcgi"]
        found = {}
        for line in machine.run(f"stat -c '%n %a %U %G' {' '.join(names)}").splitlines():
            name, mode, user, group = line.split()
            found[name] = (int(mode, 8), user, group)
        return found

    # ---- the steps

    def test_install(self, machine: Machine, packages: Packages) -> None:
        """The first commands come from the source's guide: the other is not there yet."""
        self.give(machine, packages.first)
        guide = Guide(ROOT / "systemd/README.md")
        command = guide.commands(FIRST, "nginx-light").replace("0.1.0", packages.version)
        said = machine.run(f"{command.rstrip()} {self.ALSO} man-db")
        assert f'Next: step 2 in {SHARE}/systemd/README.md' in said
        assert machine.processes(PROGRAM) == []
        assert not list(machine.path("/etc/nginx/sites-enabled").glob("extract*"))

        assert self.state(machine) == {CONFIG: (0o640, "root", "extract-fcgi"),
                                       "/etc/extract-fcgi/credentials": (0o750, "root", "extract-fcgi"),
                                       "/var/lib/extract-fcgi": (0o700, "extract-fcgi", "extract-fcgi"),
                                       "/run/extract-fcgi": (0o1775, "root", "extract-fcgi")}
        assert machine.run("getent passwd extract-fcgi").rstrip().endswith(":/var/lib/extract-fcgi:/usr/sbin/nologin")
        conffiles = machine.run("dpkg-query -W -f '${Conffiles}' extract-fcgi").split()
        assert conffiles[::2] == [CONFIG, SITE]
        assert machine.run("dpkg --verify extract-fcgi") == ""
        assert machine.run("extract-fcgi --version").split()[-1] == packages.version
        for name in (SITE, f"{SHARE}/nginx/extract-fcgi-http.conf"):
            assert stat.S_IMODE(machine.path(name).stat().st_mode) == 0o644

    def test_manuals(self, machine: Machine) -> None:
        for section, page in (("8", "extract-fcgi"), ("1", "extractctl"), ("5", "extract-fcgi.conf")):
            assert machine.run(f"man -w {section} {page}").strip() == f"/usr/share/man/man{section}/{page}.{section}.gz"
            assert machine.run(f"man --warnings {section} {page} | head -c 20").strip()
        assert machine.path("/usr/share/doc/extract-fcgi/guides").readlink() == Path("../../extract-fcgi")

    def test_guide_names_what_is_there(self, machine: Machine) -> None:
        """Its own copy of the guide: no path of an installation by make, and each of the package's own is there."""
        text = self.guides(machine)[0].text
        assert set(re.findall(r"/usr/local\S*", text)) <= {"/usr/local:", "/usr/local)"}, text
        for name in re.findall(r"/usr/(?:share|lib|sbin|bin)/[\w./-]*extract[\w./-]*\w", text):
            assert machine.succeeds(f"test -e {name}"), name

    def test_configure(self, machine: Machine) -> None:
        """The sealing key, which is made once, and Gemini is another here."""
        guide, _ = self.guides(machine)
        sealing, key = guide.commands(FIRST, "openssl rand"), machine.path("/etc/extract-fcgi/credentials/sealing-key")
        machine.run(sealing)
        first = key.read_bytes()
        assert not machine.succeeds(sealing) and key.read_bytes() == first
        machine.run(f"sed -i 's|^#base_url = .*|base_url = http://{EMULATOR}|' {CONFIG}")
        shown = machine.run(guide.commands("Configure", "--check-config"))
        assert f"base_url = http://{EMULATOR}\n" in shown and "key_file = /etc/extract-fcgi/credentials/sealing-key\n" in shown

    def test_start(self, machine: Machine) -> None:
        self.start(machine, self.guides(machine)[0])
        eventually(lambda: len(machine.processes(PROGRAM)) == 2, "two processes run")
        assert machine.run("stat -c '%a %U %G' /run/extract-fcgi/pool.sock") == f"{self.SOCKET}\n"

    def test_site(self, machine: Machine) -> None:
        """nginx -t before anything is enabled, too: the package breaks no nginx that is there."""
        _, guide = self.guides(machine)
        machine.run("nginx -t")
        machine.run(guide.commands("Installing the site", "sites-enabled"))
        machine.run(guide.commands("Installing the site", "openssl req"))
        reload = guide.commands("Installing the site", "nginx -t")
        if not machine.succeeds("test -s /run/nginx.pid"):
            assert "`nginx` in the place of `nginx -s reload`" in guide.text
            reload = reload.replace("nginx -s reload", "nginx")
        machine.run(reload)
        said = machine.run(guide.commands("Installing the site", "update-ca-certificates"))
        assert '{"status": "ok"}' in said and f'It says `{{"status": "ok"}}`' in guide.text
        for page in ("", "dashboard", "extract-fcgi/page.css"):
            machine.run(f"curl -sS --fail https://{NAME}/{page}")

    def test_extraction(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        answer = self.first_extraction(machine, guide)
        assert answer["attempts"] == 1
        assert "NT047" in machine.run(guide.commands(FIRST, "extractctl usage"))
        assert "the-api-key" not in machine.path("/var/lib/extract-fcgi/store.db").read_bytes().decode("latin-1")
        assert json.loads(machine.run(f"curl -sS https://{NAME}/readyz"))["status"] == "ok"

    def test_administrator(self, machine: Machine) -> None:
        _, guide = self.guides(machine)
        assert re.search(r"[\w-]{40,}", machine.run(guide.commands("The dashboard", "client-key add")))
        said = machine.run(guide.commands("For administrators: /admin/", "errors.csv").replace("curl ", "curl -sS "))
        assert '"CompanyID": "NT047"' in said
        assert machine.path("/root/errors.csv").read_text().startswith("LogID,Timestamp,")

    def test_upgrade(self, machine: Machine, packages: Packages) -> None:
        """With requests in the hands of both processes; new ones meanwhile."""
        guide, _ = self.guides(machine)
        self.give(machine, packages.higher)
        config, site = machine.path(CONFIG).read_text(), machine.path(SITE).read_text()
        before, web = machine.processes(PROGRAM), machine.processes("nginx")
        machine.emulator("script", {"steps": [{"hold": True}] * IN_FLIGHT})
        requests = [machine.background(self.curl(machine)) for _ in range(IN_FLIGHT)]
        machine.emulator(f"wait?held={IN_FLIGHT}&timeout=120")

        command = guide.commands("The package", "force-confold").replace("0.2.0", HIGHER)
        end = self.upgrade(machine, guide, command)
        requests.append(machine.background(self.curl(machine)))
        machine.emulator("release", {})
        answers = [json.loads(request.communicate(timeout=PATIENCE)[0]) for request in requests]
        assert [answer["status"] for answer in answers] == ["success"] * (IN_FLIGHT + 1)
        said = end()

        eventually(lambda: len(after := machine.processes(PROGRAM)) == 2 and not set(after) & set(before),
                   f"two other processes run: {said}")
        eventually(lambda: set(web) & set(machine.processes("nginx")) == {min(web)}, "nginx has other workers")
        assert machine.run("extract-fcgi --version").split()[-1] == HIGHER
        assert (machine.path(CONFIG).read_text(), machine.path(SITE).read_text()) == (config, site)
        for name in (CONFIG, SITE):
            assert machine.path(f"{name}.dpkg-dist").read_text().endswith(f"# as of {HIGHER}\n")
        assert self.state(machine)[CONFIG] == (0o640, "root", "extract-fcgi")
        assert json.loads(machine.run(self.curl(machine)))["status"] == "success"
        [usage] = json.loads(machine.run("extractctl usage --company NT047 --json"))
        assert usage["Requests"] == IN_FLIGHT + 3
        machine.run("extractctl check --after-install")

    def test_upgrade_that_does_not_suit(self, machine: Machine) -> None:
        """The pool goes on as it is; what is installed is installed."""
        before, config = machine.processes(PROGRAM), machine.path(CONFIG).read_text()
        machine.path(CONFIG).write_text(f"{config}\nunknown_key = 1\n")
        said = machine.run(f"apt-get install -y --reinstall ./extract-fcgi_{HIGHER}_*.deb")
        machine.path(CONFIG).write_text(config)
        assert machine.run("dpkg-query -W -f '${Status}' extract-fcgi") == "install ok installed"
        assert machine.processes(PROGRAM) == before
        assert json.loads(machine.run(self.curl(machine)))["status"] == "success"
        self.does_not_suit(machine, said)

    def test_removal(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        self.stop(machine, guide)
        kept = [CONFIG, SITE, "/etc/extract-fcgi/credentials/sealing-key", "/var/lib/extract-fcgi/store.db",
                "/var/lib/extract-fcgi/outbox.db"]
        before = {name: machine.path(name).read_bytes() for name in kept[:3]}
        machine.run(guide.commands("The package", "apt-get remove"))
        assert machine.processes(PROGRAM) == []
        for name in ("/usr/sbin/extract-fcgi", "/usr/bin/extractctl", SHARE, "/run/extract-fcgi", "/usr/lib/sysusers.d/extract-fcgi.conf",
                     "/etc/nginx/sites-enabled/extract-fcgi", "/etc/systemd/system/extract-fcgi.target.wants",
                     "/etc/systemd/system/multi-user.target.wants/extract-fcgi.target"):
            assert not machine.succeeds(f"test -e {name} -o -L {name}"), name
        for name in kept:
            assert machine.succeeds(f"test -s {name}"), name
        assert {name: machine.path(name).read_bytes() for name in before} == before
        machine.run("nginx -t")  # whatever else it serves, it goes on

    def test_installed_again(self, machine: Machine) -> None:
        config = machine.path(CONFIG).read_text()
        machine.run(f"apt-get install -y --no-install-recommends ./extract-fcgi_{HIGHER}_*.deb")
        assert machine.path(CONFIG).read_text() == config
        assert machine.processes(PROGRAM) == []
        [usage] = json.loads(machine.run("extractctl usage --company NT047 --json"))
        assert usage["Requests"] > IN_FLIGHT + 3

    def test_purge(self, machine: Machine) -> None:
        """At once, without a removal before."""
        guide, _ = self.guides(machine)
        said = machine.run(guide.commands("The package", "apt-get purge"))
        for name in ("/var/lib/extract-fcgi", "/etc/extract-fcgi/credentials", "/etc/systemd/system/extract-fcgi@.service.d"):
            assert f"extract-fcgi: left: {name}\n" in said
        for name in (CONFIG, SITE, "/etc/nginx/extract-fcgi"):
            assert not machine.succeeds(f"test -e {name} -o -L {name}"), name
        for name in ("/etc/extract-fcgi/credentials/sealing-key", "/var/lib/extract-fcgi/store.db",
                     "/var/lib/extract-fcgi/outbox.db"):
            assert machine.succeeds(f"test -s {name}"), name
        assert machine.run("stat -c %U /var/lib/extract-fcgi/store.db") == "extract-fcgi\n"

        machine.run(guide.commands("The package", "rm -rf"))
        for name in ("/var/lib/extract-fcgi", "/etc/extract-fcgi", "/etc/ssl/extract-fcgi", "/var/log/nginx/extract-fcgi.access.log"):
            assert not machine.succeeds(f"test -e {name}"), name
        assert not machine.succeeds("getent passwd extract-fcgi")
