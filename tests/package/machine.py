"""A fresh Debian 12 to install the package in, made by debootstrap, in two ways:

    Chroot    no systemd runs, as in a container
    Booted    systemd-nspawn boots it, with a systemd of its own

Both have a network of their own, with nothing in it but a loopback: ports 80 and 443 are free, whatever else runs here, and
nothing leaves. So what apt will need is downloaded into the tree before. The trees are kept in ~/.cache/extract-fcgi.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "extract-fcgi"
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
PATIENCE = 300.0  # seconds: an upper bound for what must happen, never a delay
LONG = 1800.0     # the same, for what compiles or downloads
EMULATOR = "127.0.0.1:19090"
SQL_SERVER = "localhost:1433"
SQL_PASSWORD = "pa55 w;rd"


def eventually(probe: Callable[[], Any], what: str) -> Any:
    """Asks until the answer is true; its last answer."""
    end = time.monotonic() + PATIENCE
    while not (answer := probe()):
        assert time.monotonic() < end, f"never came true: {what}"
        time.sleep(0.05)
    return answer


def run(*command: str | Path, check: bool = True, **arguments: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=LONG, **{"stdin": subprocess.DEVNULL} | arguments if "input" not in arguments else arguments)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
    return done


# ---- the trees ----


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One run at a time makes a tree."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fresh_tree(include: list[str]) -> Path:
    """A minimal Debian 12 with these packages, its lists of packages read."""
    sources = SOURCES.read_text() if SOURCES.exists() else None
    mirror = re.search(r"(?m)^URIs: (\S+/debian)/?$", sources or "")
    name = f"debian-{hashlib.sha256(json.dumps([include, sources]).encode()).hexdigest()[:16]}"
    tree = CACHE / name
    with locked(name):
        if not tree.exists():
            making = CACHE / f"{name}.making"
            shutil.rmtree(making, ignore_errors=True)
            run("debootstrap", "--variant=minbase", *([f"--include={','.join(include)}"] if include else []), "bookworm",
                making, mirror[1] if mirror else "http://deb.debian.org/debian")
            if sources:
                (making / "etc/apt/sources.list").unlink()
                (making / "etc/apt/sources.list.d/debian.sources").write_text(sources)
            run("chroot", making, "apt-get", "update")
            making.rename(tree)
    return tree


def download(tree: Path, packages: list[str | Path]) -> None:
    """What installing these will need, files of packages among them, is put into the tree's cache of apt."""
    names = [str(package) for package in packages if isinstance(package, str)]
    files = [package for package in packages if isinstance(package, Path)]
    needed = "".join(run("dpkg-deb", "--field", package, "Depends").stdout for package in files) + " ".join(names)
    there = tree / "var/cache/apt" / hashlib.sha256(needed.encode()).hexdigest()
    with locked(tree.name):
        if there.exists():
            return
        copies = [shutil.copy(package, tree / package.name) for package in files]
        try:
            run("chroot", tree, "apt-get", "update")
            run("chroot", tree, "apt-get", "install", "-y", "--download-only", "--no-install-recommends", *names,
                *(f"/{package.name}" for package in files))
        finally:
            for copy in copies:
                copy.unlink()
        there.touch()


# ---- the machines ----


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Machine:
    """A copy of the tree, running; `pid` is what its process 1 is called here."""

    pid: int

    def __init__(self, tree: Path, directory: Path) -> None:
        self.root = directory / "root"
        self.log = directory / "console"
        self.children: list[subprocess.Popen[Any]] = []
        run("cp", "--archive", "--reflink=auto", tree, self.root)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # as Debian's installer has it
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        raise NotImplementedError

    def spawn(self, *command: str | Path, at_our_end: str = "KILL") -> subprocess.Popen[Any]:
        """Gets the signal when the tests are killed, too."""
        with self.log.open("ab") as log:
            self.children.append(subprocess.Popen(["setpriv", "--pdeathsig", at_our_end, *(str(word) for word in command)],
                                                  stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return self.children[-1]

    def command(self, script: str) -> list[str]:
        """Bash in the machine, as root in /root."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd", "--",
                "/usr/bin/env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "/bin/bash", "-ec", f"cd /root\n{script}"]

    def run(self, script: str, **arguments: Any) -> str:
        """What it says, on either output; it must succeed."""
        return run(*self.command(script), **arguments).stdout

    def succeeds(self, script: str) -> bool:
        return run(*self.command(script), check=False).returncode == 0

    def background(self, script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(script), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def path(self, name: str) -> Path:
        """A file of the machine's, as it is called here."""
        return self.root / name.lstrip("/")

    def processes(self, name: str) -> list[int]:
        """Those of the machine's with this name, as they are called there."""
        running = self.run("grep -H . /proc/[0-9]*/comm || true")
        return sorted(map(int, re.findall(rf"(?m)^/proc/(\d+)/comm:{re.escape(name)}$", running)))

    # ---- Gemini's stand-in, on the machine's loopback

    def start_emulator(self) -> None:
        self.spawn("nsenter", f"--target={self.pid}", "--net", "env", "PYTHONDONTWRITEBYTECODE=1", "/usr/bin/python3",
                   ROOT / "tests/emulator/gemini_emulator.py", "--listen", EMULATOR)
        eventually(lambda: self.emulator("held", check=False), "the emulator answers")

    def emulator(self, path: str, body: Any = None, check: bool = True) -> Any:
        """Its control interface (tests/emulator/README.md)."""
        done = subprocess.run(["nsenter", f"--target={self.pid}", "--net", "curl", "-sS", "--fail", "--noproxy", "*",
                               *([] if body is None else ["-d", json.dumps(body)]), f"http://{EMULATOR}/__emulator/{path}"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=check)
        return json.loads(done.stdout) if done.returncode == 0 else None

    # ---- SQL Server's stand-in, there too

    def start_sql_server(self, service: str, administrator: str) -> Path:
        """With these two logins; the certificate of its authority."""
        home = self.log.parent / "sql"
        home.mkdir()
        (home / "password").write_text(SQL_PASSWORD)
        self.spawn("nsenter", f"--target={self.pid}", "--net", "env", "PYTHONDONTWRITEBYTECODE=1", "/usr/bin/python3",
                   ROOT / "tests/tds_server/tds_server.py", "--listen", SQL_SERVER.replace("localhost", "127.0.0.1"),
                   "--encryption", "required", "--tls", home, "--directory", home / "databases",
                   "--password-file", home / "password", "--user", administrator, "--app-user", service)
        eventually(lambda: self.sql(administrator, "", "SELECT 1", check=False).returncode == 0, "the SQL server answers")
        return home / "good.pem"

    def sql(self, login: str, database: str, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        home = self.log.parent / "sql"
        (home / "script").write_text(script)
        return run("nsenter", f"--target={self.pid}", "--net", "env", "PYTHONDONTWRITEBYTECODE=1", "/usr/bin/python3",
                   ROOT / "tests/tds_server/tds_client.py", "--server", SQL_SERVER, "--user", login, "--database", database,
                   "--password-file", home / "password", "--script", home / "script", check=check)

    def end(self) -> None:
        """Ends what start() has started; there may be less of it."""
        raise NotImplementedError

    def close(self) -> None:
        try:
            self.end()
        finally:
            for child in self.children:
                child.kill()
                child.wait()
            shutil.rmtree(self.root)


class Chroot(Machine):
    """Namespaces of its own, so that whatever was started in it ends with it."""

    INCLUDE: list[str] = []

    def start(self) -> None:
        script = f"""
            mount --make-rprivate /
            mount --bind '{self.root}' '{self.root}'
            cd '{self.root}'
            mount -t proc proc proc
            mount -t tmpfs tmpfs run
            ip link set lo up
            exec chroot . /bin/bash -c 'touch /run/ready; sleep infinity & wait'"""
        holder = self.spawn("unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child",
                            "/bin/bash", "-ec", script)

        def started() -> bool:
            assert holder.poll() is None, self.log.read_text()
            self.pid = next(iter(children(holder.pid)), 0)
            return self.pid != 0 and Path(f"/proc/{self.pid}/root/run/ready").exists()

        eventually(started, "the namespaces are there")

    def end(self) -> None:
        pass  # --kill-child


class Booted(Machine):
    INCLUDE = ["systemd", "systemd-sysv", "dbus"]

    def start(self) -> None:
        self.nspawn = self.spawn("systemd-nspawn", "--boot", f"--directory={self.root}", f"--machine=extract-{uuid.uuid4().hex[:12]}",
                                 "--register=no", "--keep-unit", "--private-network", "--resolv-conf=off",
                                 "--timezone=off", "--link-journal=no", "--console=pipe", "--quiet", at_our_end="TERM")

        def booted() -> bool:
            assert self.nspawn.poll() is None, self.log.read_text(errors="replace")
            for pid in children(self.nspawn.pid):
                with suppress(FileNotFoundError):
                    if re.search(r"(?m)^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_text()):
                        self.pid = pid
                        state = run(*self.command("systemctl is-system-running"), check=False).stdout.strip()
                        return state in ("running", "degraded")
            return False

        eventually(booted, "the machine has booted")

    def end(self) -> None:
        """As by its switch; nspawn passes SIGTERM on."""
        self.nspawn.terminate()
        self.nspawn.wait(PATIENCE)


def why_not(kind: type[Machine], directory: Path) -> str | None:
    """Why there can be no such machine here; None: it was tried, and there can. Not to get a tree is no reason."""
    tree = fresh_tree(kind.INCLUDE)
    try:
        kind(tree, directory).close()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        return str(error).strip() or repr(error)
    return None
