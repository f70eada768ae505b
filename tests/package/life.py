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
from machine import EMULATOR, PATIENCE, ROOT, SQL_PASSWORD, SQL_SERVER, Machine, eventually

PROGRAM = "extract-fcgi"
SHARE = "/usr/share/extract-fcgi"
CONFIG = "/etc/extract-fcgi/extract-fcgi.conf"
CREDENTIALS = "/etc/systemd/system/extract-fcgi@.service.d/credentials.conf"
SITE = "/etc/nginx/sites-available/extract-fcgi"
FIRST = "From nothing to the first invoice"
NAME = "invoices.example.org"  # as in the guides
IN_FLIGHT = 4

CERTBOT = """#!/bin/bash -e
[ "$1 $2 $3 $5 $7" = 'certonly --webroot -w -d --deploy-hook' ]
mkdir -p "$4/.well-known/acme-challenge" "/etc/letsencrypt/live/$6"
echo word > "$4/.well-known/acme-challenge/token"
[ "$(curl -sS --fail "http://$6/.well-known/acme-challenge/token")" = word ]
cd "/etc/letsencrypt/live/$6"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$6" -addext "subjectAltName=DNS:$6" \\
    -keyout privkey.pem -out fullchain.pem
eval "$8"
"""


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
        client, check = guide.commands(FIRST, "client-key add").splitlines()
        machine.run(guide.commands(FIRST, "token add"), input="the-api-key\n")
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
        machine.run(guide.commands("Installing the site", "worker_connections"))
        assert "worker_connections 4096;" in machine.run("nginx -T && nginx -s reload")
        for page in ("", "dashboard", "extract-fcgi/page.css"):
            machine.run(f"curl -sS --fail https://{NAME}/{page}")

    def test_extraction(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        answer = self.first_extraction(machine, guide)
        assert answer["attempts"] == 1
        [_, row] = machine.run(guide.commands(FIRST, "extractctl usage")).splitlines()
        assert row.split()[1] == "1"
        assert "the-api-key" not in machine.path("/var/lib/extract-fcgi/store.db").read_bytes().decode("latin-1")
        assert json.loads(machine.run(f"curl -sS https://{NAME}/readyz"))["status"] == "ok"

    def test_administrator(self, machine: Machine) -> None:
        _, guide = self.guides(machine)
        assert re.search(r"[\w-]{40,}", machine.run(guide.commands("The dashboard", "client-key add")))
        said = machine.run(guide.commands("For administrators: /admin/", "errors.csv").replace("curl ", "curl -sS "))
        assert '"CompanyID": "NT047"' in said
        assert machine.path("/root/errors.csv").read_text().startswith("LogID,Timestamp,")

    # ---- what needs systemd, in between (test_chroot.py leaves it out)

    def test_certificate(self, machine: Machine) -> None:
        """One of an authority, whose part a script plays: it looks for its word where the command puts it, by plain HTTP."""
        _, guide = self.guides(machine)
        install, commands = guide.commands("Certificates", "certbot certonly").split("\n", 1)
        assert install == "apt-get install -y certbot"
        certbot = machine.path("/usr/local/bin/certbot")
        certbot.write_text(CERTBOT)
        certbot.chmod(0o755)
        machine.run(commands)
        machine.run(guide.commands("Certificates", "--fresh"))
        live = f"/etc/letsencrypt/live/{NAME}/fullchain.pem"
        ask = f"curl -sS --fail https://{NAME}/healthz"
        eventually(lambda: machine.succeeds(f"{ask} --cacert {live}"), "nginx has the new certificate")
        assert not machine.succeeds(ask)  # the trial one is trusted no longer
        machine.run(f"cp {live} /usr/local/share/ca-certificates/authority.crt && update-ca-certificates && {ask}")

    def test_change_and_scale(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        before = machine.processes(PROGRAM)
        machine.run(guide.commands("Change something", "--check-config"))
        machine.run(guide.commands("Scale", "enable --now").splitlines()[0])
        after = machine.processes(PROGRAM)
        assert len(after) == 4 and not set(before) & set(after)
        machine.run(guide.commands("Scale", "enable --now").splitlines()[1])
        assert len(machine.processes(PROGRAM)) == 3
        machine.run("systemctl disable --now extract-fcgi@3")

    def test_watch(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        machine.run(guide.commands("Watch", "apt-get install"))
        for said in re.findall(r"(?m)^\| `(curl [^`]+)`", guide.text):
            machine.run(said.replace("curl ", "curl -sS --fail "))
        ask = "curl -sS 'http://127.0.0.1:9090/api/v1/query?query=extract_processes'"
        eventually(lambda: '"2"]' in machine.run(f"{ask} || true"), "Prometheus has read /metrics")
        assert "ExtractDown" in machine.run("curl -sS http://127.0.0.1:9090/api/v1/rules")

    def test_logs(self, machine: Machine) -> None:
        guide, _ = self.guides(machine)
        request = json.loads(machine.run("extractctl logs --since 1h --json"))[0]["RequestID"] or "none"
        said = machine.run(guide.commands("Logs", "--by user").replace("REQUEST_ID", request))
        assert "\nNT047      anna " in said
        assert "Started extract-fcgi@1.service" in machine.run(guide.commands("Logs", "journalctl"))

    def test_backup(self, machine: Machine) -> None:
        """The drill with the backup, then in earnest, then another sealing key."""
        guide, _ = self.guides(machine)
        section = "Back up, and practise coming back"
        machine.run(guide.commands(section, "'.backup "))
        [day] = re.findall(r"(?m)^20\d\d-.*", (drill := machine.run(guide.commands(section, "mkdir -m 700 /tmp/drill"))))
        assert day.split()[1] == "1" and "1 sealed, none in clear" in drill and "\nok\n" in f"\n{drill}"
        assert not machine.path("/tmp/drill").exists()
        machine.run(guide.commands(section, "outbox drain"))
        machine.run(guide.commands(section, "store.db-wal"))
        key = machine.path("/etc/extract-fcgi/credentials/sealing-key")
        old = key.read_bytes()
        machine.run(guide.commands(section, "extractctl seal"))
        assert len(key.read_text().splitlines()) == 1 and key.read_bytes() != old
        assert "1 sealed, none in clear" in machine.run("extractctl check --after-install")

    def test_sql_server(self, machine: Machine) -> None:
        """By a stand-in that knows no logins: that the two guides name the same ones is looked at; and back to the embedded store."""
        guide, _ = self.guides(machine)
        database = Guide(machine.path(f"{SHARE}/sql/README.md"))
        logins = database.commands("Setting up", "CREATE LOGIN")
        made = re.findall(r"CREATE LOGIN (\w+) .*\nCREATE USER (\w+) FOR LOGIN (\w+)\nALTER ROLE (\w+) ADD MEMBER (\w+)\n", logins)
        script = machine.path(f"{SHARE}/sql/setup_database.sql").read_text()
        assert '"extract-fcgi: schema version … is complete"' in database.text
        assert re.search(r"\nPRINT N'extract-fcgi: schema version \d+ is complete'\n", script)
        roles = re.findall(r"CREATE ROLE (\w+)", script)
        connection = guide.commands("The store", "driver = mssql")
        users = re.findall(r"(?m)^(?:admin_)?user = (\w+)$", connection)
        assert [names[0] for names in made] == users and len(roles) == 3
        for names in made:
            assert len({names[0], names[1], names[2], names[4]}) == 1 and names[0] not in roles and names[3] in roles

        service, administrator = users
        authority = "/etc/ssl/certs/sql-server.pem"
        shutil.copy(machine.start_sql_server(service, administrator), machine.path(authority))
        machine.sql(administrator, "", database.commands("Setting up", "CREATE DATABASE"))
        machine.sql(administrator, "ExtractDB", script)

        before = {machine.path(name): machine.path(name).read_text() for name in (CONFIG, CREDENTIALS)}
        key = self.client_key
        assert "`cat > /etc/extract-fcgi/credentials/store-password`" in guide.text
        for name in ("store-password", "admin-password"):
            machine.run(f"cat > /etc/extract-fcgi/credentials/{name}", input=f"{SQL_PASSWORD}\n")
        machine.run(connection.replace("db1.example.org:1433", SQL_SERVER).replace("\nEND\n", f"\nca_file = {authority}\nEND\n"))
        assert "driver = mssql\n" in machine.run("extract-fcgi --check-config")
        self.first_extraction(machine, guide)
        assert "\nNT047 " in machine.run("extractctl usage --by user")

        type(self).client_key = key
        for path, text in before.items():
            path.write_text(text)
        machine.run("systemctl daemon-reload && systemctl reload extract-fcgi")
        assert "\nNT047 " in machine.run("extractctl usage --by user")

    # ---- and again all

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

    def test_uploads_by_path(self, machine: Machine) -> None:
        """And back."""
        guide, web = self.guides(machine)
        machine.run(guide.commands("What the service may do", "chown -R www-data"))
        site = machine.path(SITE).read_text()
        line = "include extract-fcgi/extract-fcgi-body-file.conf;"
        assert f"`{line}`" in web.text and f"# {line}" in site
        machine.path(SITE).write_text(site.replace(f"# {line}", line))
        machine.run("nginx -t && systemctl reload nginx")
        assert json.loads(machine.run(self.curl(machine)))["status"] == "success"
        for process in machine.processes(PROGRAM):
            assert machine.run(f"stat -c %U /proc/{process}") == "www-data\n"

        machine.path(SITE).write_text(site)
        machine.run("""systemctl stop extract-fcgi.target 'extract-fcgi@*'
            rm /etc/systemd/system/extract-fcgi@.service.d/body-file.conf /etc/tmpfiles.d/extract-fcgi.conf
            chown -R extract-fcgi:extract-fcgi /var/lib/extract-fcgi
            find /run/extract-fcgi -type f -delete
            systemd-tmpfiles --create extract-fcgi.conf
            systemctl daemon-reload
            systemctl start extract-fcgi.target
            nginx -t && systemctl reload nginx""")

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
