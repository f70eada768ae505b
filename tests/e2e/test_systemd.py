"""The units in systemd/, and the processes under a service manager.

No systemd runs here. What it does for the pool, Pool does: one listening socket, given to each instance as its standard
input; NOTIFY_SOCKET and WATCHDOG_USEC; restarts of one instance after the other.
"""
from __future__ import annotations

import configparser
import ctypes
import errno
import os
import re
import resource
import shlex
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from broken import padded_pdf
from conftest import BUILD, PATIENCE, ROOT, Emulator, FastCgi, SqlServer, Stack, TlsFront, eventually, start_refused
from tds_process import TdsServer

UNITS = ROOT / "systemd"
TEMPLATE = UNITS / "extract-fcgi@.service"
WATCHDOG_USEC = 200_000  # so that a process says how it is every 50 ms
HELD = {"hold": True}


def run(*command: str | Path, **arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE,
                          **arguments)  # type: ignore[call-overload,no-any-return]


def settings(unit: Path, section: str = "Service") -> dict[str, list[str]]:
    """Each setting of the unit's section, with its values in their order."""
    found: dict[str, list[str]] = {}
    here = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif "=" in line and not line.startswith("#") and here == section:
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


# ---- the files, installed ----


def make(target: str, root: Path, *variables: str) -> None:
    """-o all: whatever BUILD holds is what is installed, however it was built."""
    done = run("make", "-C", ROOT, "--no-print-directory", "-o", "all", target, f"BUILD={BUILD}", *variables, f"DESTDIR={root}")
    assert done.returncode == 0, done.stderr


def files(root: Path) -> dict[str, int]:
    """Each file below root with its permissions."""
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed below a prefix of its own, so that all that the units name is there."""
    prefix = tmp_path_factory.mktemp("prefix")
    make("install", Path("/"), f"prefix={prefix}", f"sysconfdir={prefix}/etc")
    return prefix


def test_units_are_valid(prefix: Path) -> None:
    units = sorted((prefix / "lib/systemd/system").iterdir())
    assert [unit.name for unit in units] == ["extract-fcgi.service", "extract-fcgi.socket", "extract-fcgi.target",
                                             "extract-fcgi@.service"]
    verified = run("systemd-analyze", "verify", *units)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_exposure(prefix: Path) -> None:
    """systemd-analyze's own measure, at most 1.1 of 10."""
    unit = prefix / "lib/systemd/system/extract-fcgi@.service"
    judged = run("systemd-analyze", "security", "--offline=yes", "--threshold=11", "--no-pager", unit)
    level = re.search(r"Overall exposure level for extract-fcgi@\w+\.service: ([\d.]+)", judged.stdout)
    assert level is not None and float(level[1]) <= 1.1, judged.stdout
    assert judged.returncode == 0, judged.stdout


def test_units_agree_with_the_rest() -> None:
    """Paths, user and times stand in several files."""
    socket_unit, service = settings(UNITS / "extract-fcgi.socket", "Socket"), settings(TEMPLATE)
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(re.sub(r"(?m)^#(\w+ =)", r"\1", (UNITS / "extract-fcgi.conf.example").read_text()))
    lines = (UNITS / "extract-fcgi.tmpfiles.conf").read_text().splitlines()
    paths = {line.split()[1]: line.split()[2:5] for line in lines if line[:1] not in ("", "#")}
    user = service["User"][0]

    assert f"server unix:{socket_unit['ListenStream'][0]};" in (ROOT / "nginx/extract-fcgi.site.conf").read_text()
    assert (socket_unit["SocketUser"], socket_unit["SocketGroup"], socket_unit["SocketMode"]) == (
        ["root"], ["www-data"], ["0660"])
    runtime_dir, state_dir = config["server"]["runtime_dir"], config["server"]["state_dir"]
    assert str(Path(socket_unit["ListenStream"][0]).parent) == runtime_dir
    assert service["ReadWritePaths"] == [runtime_dir] and paths[runtime_dir] == ["1775", "root", user]
    assert f"/var/lib/{service['StateDirectory'][0]}" == state_dir and paths[state_dir] == ["0700", user, user]
    assert "RuntimeDirectory" not in service
    assert f"u {user} - " in (UNITS / "extract-fcgi.sysusers.conf").read_text()
    assert float(service["TimeoutStopSec"][0]) > float(config["server"]["deadline"].rstrip("s"))


def test_install(tmp_path: Path) -> None:
    """What goes where, in a package's root; an edited configuration is nobody's but the administrator's."""
    make("install", tmp_path, "prefix=/usr")
    installed = files(tmp_path)
    assert {name for name, mode in installed.items() if mode == 0o755} == {"usr/sbin/extract-fcgi", "usr/bin/extractctl"}
    assert {mode for mode in installed.values()} == {0o755, 0o644}
    share = "usr/share/extract-fcgi"
    assert installed.keys() >= {
        "etc/extract-fcgi/extract-fcgi.conf", f"{share}/extract-fcgi.conf.example", f"{share}/invoice.pdf", "usr/lib/sysusers.d/extract-fcgi.conf",
        "usr/share/man/man1/extractctl.1", "usr/share/man/man5/extract-fcgi.conf.5", "usr/share/man/man8/extract-fcgi.8",
        "usr/share/bash-completion/completions/extractctl",
        "usr/lib/tmpfiles.d/extract-fcgi.conf",
        *(f"{share}/systemd/{name}" for name in ("README.md", "credentials.conf.example", "extract-fcgi.rules.yml",
                                                 "extract-fcgi.dashboard.json")),
        *(f"usr/lib/systemd/system/{name}" for name in ("extract-fcgi.socket", "extract-fcgi.service",
                                                        "extract-fcgi@.service", "extract-fcgi.target")),
        *(f"{share}/nginx/www/extract-fcgi/{path.name}" for path in (ROOT / "nginx/www/extract-fcgi").iterdir()),
        *(f"{share}/{folder}/{path.name}" for folder in ("nginx", "sql") for path in (ROOT / folder).iterdir()
          if path.suffix in (".conf", ".sql", ".md", ".yaml"))}
    template = settings(tmp_path / "usr/lib/systemd/system/extract-fcgi@.service")
    assert template["ExecStart"] == ["/usr/sbin/extract-fcgi"]
    assert "/usr/sbin/extract-fcgi" in template["ExecPaths"][0].split()

    config = tmp_path / "etc/extract-fcgi/extract-fcgi.conf"
    config.write_text("[server]\nthreads = 4\n")
    make("install", tmp_path, "prefix=/usr")
    assert config.read_text() == "[server]\nthreads = 4\n"
    make("uninstall", tmp_path, "prefix=/usr")
    assert list(files(tmp_path)) == ["etc/extract-fcgi/extract-fcgi.conf"]

    config.unlink()
    make("install", tmp_path, "prefix=/usr")
    make("uninstall", tmp_path, "prefix=/usr")
    assert not files(tmp_path)


def test_user_and_directories(tmp_path: Path) -> None:
    make("install", tmp_path, "prefix=/usr")
    (tmp_path / "etc/extract-fcgi/credentials").mkdir()
    (tmp_path / "etc/extract-fcgi/credentials/sealing-key").write_text("secret")
    assert run("systemd-sysusers", f"--root={tmp_path}").returncode == 0
    name, _, number, _, _, home, shell = (tmp_path / "etc/passwd").read_text().split("\n")[-2].split(":")
    assert (name, home, shell) == ("extract-fcgi", "/var/lib/extract-fcgi", "/usr/sbin/nologin")
    made = run("systemd-tmpfiles", f"--root={tmp_path}", "--create", "extract-fcgi.conf")
    assert "Unknown" not in made.stderr and "extract-fcgi.conf:" not in made.stderr, made.stderr
    if os.geteuid() != 0:  # the rest is chown()
        return
    assert made.returncode == 0, made.stderr
    expected = {"run/extract-fcgi": (0o1775, "root"), "var/lib/extract-fcgi": (0o700, "service"),
                "etc/extract-fcgi/credentials": (0o750, "root"), "etc/extract-fcgi/credentials/sealing-key": (0o640, "root"),
                "etc/extract-fcgi/extract-fcgi.conf": (0o640, "root")}
    for path, (mode, owner) in expected.items():
        found = (tmp_path / path).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, int(number)), path
        assert found.st_uid == (0 if owner == "root" else int(number)), path


def test_credentials_reach_the_configuration(tmp_path: Path) -> None:
    """Each pair of the example names a variable that there is, and the file that it loads."""
    text = re.sub(r"(?m)^#(\w+=)", r"\1", (UNITS / "credentials.conf.example").read_text())
    example = tmp_path / "credentials.conf"
    example.write_text(text)
    pairs = settings(example)
    loaded = dict(value.split(":", 1) for value in pairs["LoadCredential"])
    variables = dict(value.replace("%d", str(tmp_path)).split("=", 1) for value in pairs["Environment"])
    assert [Path(path).name for path in variables.values()] == list(loaded)
    assert all(path.startswith("/etc/extract-fcgi/credentials/") for path in loaded.values())
    for path in variables.values():
        Path(path).write_text("secret\n")
    # what the template takes away from the service
    cleared = dict(word.split("=", 1) for word in shlex.split(settings(TEMPLATE)["Environment"][0]))
    (tmp_path / "admin.conf").write_text("[store]\nadmin_user = admin\nadmin_password_file = /nowhere\n")
    shown = run(BUILD / "extract-fcgi", "--config", tmp_path / "admin.conf", "--check-config",
                env={"PATH": os.environ["PATH"], **cleared, **variables})
    assert shown.returncode == 0, shown.stderr
    for name, path in variables.items():
        assert f"# from {name}\n{name.split('_', 2)[2].lower()} = {path}\n" in shown.stdout
    assert "admin_user = \n" in shown.stdout and "admin_password_file = \n" in shown.stdout


# ---- processes under a manager ----


class Instance:
    def __init__(self, process: subprocess.Popen[bytes], said: list[dict[str, str]]) -> None:
        self.process = process
        self.pid = process.pid
        self.said = said  # what it told the manager

    def has_said(self, name: str, value: str | None = None) -> bool:
        return any(name in message and value in (None, message[name]) for message in self.said)


class Pool(Stack):
    """A stack whose instances are started as systemd starts them."""

    def __init__(self, *arguments: object, stderr: int | None = None, setup: Callable[[], None] | None = None,
                 **more: object) -> None:
        self.instance_stderr, self.setup = stderr, setup
        super().__init__(*arguments, **more)  # type: ignore[arg-type]

    def start_pool(self, processes: int = 1) -> None:
        self.instances: list[Instance] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.socket.chmod(0o666)
        self.listener.listen(1024)
        self.said: dict[int, list[dict[str, str]]] = {}
        self.news = threading.Condition()
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.manager.bind(str(self.dir / "notify"))
        self.hearing = threading.Thread(target=self.hear)
        self.hearing.start()
        for _ in range(processes):
            self.start_instance()

    def hear(self) -> None:
        """The manager: files each message under the process that sent it. An empty one ends it."""
        while True:
            text, ancillary, _, _ = self.manager.recvmsg(4096, socket.CMSG_SPACE(12))
            if not text:
                return
            with self.news:
                pid = struct.unpack("iii", ancillary[0][2])[0]
                message = dict(line.split("=", 1) for line in text.decode().splitlines())
                self.said.setdefault(pid, []).append(message)
                self.news.notify_all()

    def hear_until(self, condition: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(condition, PATIENCE)

    def spawn(self, stderr: int | None = None, **env: str) -> Instance:
        process = subprocess.Popen(
            [str(BUILD / "extract-fcgi")], stdin=self.listener, preexec_fn=self.setup, env=self.env | {
                "NOTIFY_SOCKET": str(self.dir / "notify"), "WATCHDOG_USEC": str(WATCHDOG_USEC)} | env,
            stderr=stderr or self.instance_stderr or self.stderr)
        with self.news:
            return Instance(process, self.said.setdefault(process.pid, []))

    def start_instance(self) -> Instance:
        """Started, and ready."""
        instance = self.spawn()
        self.instances.append(instance)
        eventually(lambda: instance.has_said("READY", "1") or instance.process.poll() is not None, "it starts")
        assert instance.has_said("READY", "1"), instance.process.returncode
        return instance

    def restart(self, instance: Instance) -> Instance:
        """As `systemctl restart`: returns when the new one is ready."""
        instance.process.send_signal(signal.SIGTERM)
        self.hear_until(lambda: instance.has_said("STOPPING", "1"))
        assert instance.process.wait(PATIENCE) == 0
        self.instances.remove(instance)
        return self.start_instance()

    def pids(self) -> list[int]:
        return [instance.pid for instance in self.instances]

    def stop_pool(self, number: signal.Signals = signal.SIGTERM) -> int:
        for instance in self.instances:
            instance.process.send_signal(number)
        try:
            statuses = [instance.process.wait(PATIENCE) for instance in self.instances]
        finally:
            for instance in self.instances:
                instance.process.kill()
        self.listener.close()
        if self.hearing.is_alive():
            with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as last:
                last.sendto(b"", str(self.dir / "notify"))
            self.hearing.join()
        self.manager.close()
        return max(map(abs, statuses), default=0)


@pytest.fixture
def make_pool(emulator: Emulator, certificate: Path) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(**arguments: object) -> Pool:
        pools.append(Pool(emulator, certificate, **arguments))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_life_of_an_instance(make_pool: Callable[..., Pool], emulator: Emulator, crowd: ThreadPoolExecutor,
                             pdf: bytes) -> None:
    """Ready, alive, busy, stopping, gone: as `systemctl status` shows it."""
    pool = make_pool(env={"EXTRACT_SERVER_THREADS": "2"})
    pool.token(key="key")
    emulator.script("key", HELD)
    instance = pool.instances[0]
    assert {"READY": "1", "STATUS": "serving"} in instance.said
    pool.hear_until(lambda: instance.has_said("STATUS", "serving: 0 of 2 workers busy, 0 requests waiting"))
    answer = crowd.submit(pool.post, pdf)
    emulator.wait(held=1)
    pool.hear_until(lambda: instance.has_said("STATUS", "serving: 1 of 2 workers busy, 0 requests waiting"))
    assert all("READY" in message or message["WATCHDOG"] == "1" for message in instance.said)

    instance.process.send_signal(signal.SIGTERM)
    pool.hear_until(lambda: instance.has_said("STATUS", "draining: 1 requests to finish"))
    stopping = next(message for message in instance.said if "STOPPING" in message)
    # the deadline, 60 s for what follows it, 10 s to write the log: whatever TimeoutStopSec= says
    assert stopping == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "190000000"}
    assert instance.process.poll() is None
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    assert instance.process.wait(PATIENCE) == 0


def test_ready_only_when_it_serves(make_pool: Callable[..., Pool]) -> None:
    """With too few descriptors it fails at each step of its start, one after the other, and never says READY=1 before. With
    enough it does, and then it waits for connections."""
    pool = make_pool()
    steps = []
    enough = len(os.listdir(f"/proc/{pool.instances[0].pid}/fd"))
    for number in range(enough - 4, enough + 8):
        pool.setup = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
        instance = pool.spawn(stderr=subprocess.PIPE)
        eventually(lambda: instance.process.poll() is not None or instance.has_said("READY", "1"))
        if instance.process.poll() is None:
            break
        with instance.process.stderr as stderr:  # type: ignore[union-attr]
            steps.append(stderr.read().decode())
        so_far = len(pool.instances[0].said)
        pool.hear_until(lambda: len(pool.instances[0].said) > so_far)  # what was said before has been heard
        assert instance.process.returncode == 1 and not instance.has_said("READY", "1")
    assert any("the listening socket cannot be watched" in step for step in steps), steps
    assert instance.has_said("READY", "1")
    assert 0 in watched(instance.pid)
    instance.process.terminate()
    with instance.process.stderr:  # type: ignore[union-attr]
        assert instance.process.wait(PATIENCE) == 0


def watched(pid: int) -> list[int]:
    """The descriptors that the process waits for by epoll."""
    found = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            found += [int(fd) for fd in re.findall(r"(?m)^tfd: +(\d+) ", path.read_text())]
    return found


class FullPipe:
    """A standard error that nobody reads: who writes to it waits."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.text = b""

    def fill(self) -> None:
        # by a description of its own: O_NONBLOCK belongs to the description, which the process shares
        fd = os.open(f"/proc/self/fd/{self.write_end}", os.O_WRONLY | os.O_NONBLOCK)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while True:
                    os.write(fd, b"-" * size)
        os.close(fd)

    def read(self) -> None:
        """Makes room, once."""
        self.text += os.read(self.read_end, 1 << 20)

    def rest(self) -> str:
        """All that was written, once those who may write have ended."""
        os.close(self.write_end)
        with open(self.read_end, "rb") as pipe:
            return (self.text + pipe.read()).decode()


@pytest.fixture
def full_pipe() -> FullPipe:
    return FullPipe()


def test_stuck_acceptor(make_pool: Callable[..., Pool], full_pipe: FullPipe) -> None:
    """It says that it can accept nothing, to a standard error that nobody reads: the watchdog hears no more of the process,
    until it goes on."""
    pool = make_pool(stderr=full_pipe.write_end, env={"EXTRACT_LOG_SINK": "stderr"})
    instance = pool.instances[0]
    limits = resource.prlimit(instance.pid, resource.RLIMIT_NOFILE)
    full_pipe.fill()
    resource.prlimit(instance.pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{instance.pid}/fd")), limits[1]))
    with closing(FastCgi(pool.socket)):
        is_not_heard_of(pool, instance, "stuck: the acceptor should have been heard of")
    resource.prlimit(instance.pid, resource.RLIMIT_NOFILE, limits)
    full_pipe.read()
    is_heard_of(pool, instance)
    assert pool.get("/healthz").status == 200
    assert pool.stop_pool() == 0
    assert "no connection can be accepted: Too many open files" in full_pipe.rest()


def test_stuck_background_thread(make_pool: Callable[..., Pool], full_pipe: FullPipe, emulator: Emulator,
                                 crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """It has replayed the outbox, and says so to nobody."""
    pool = make_pool(stderr=full_pipe.write_end, env={"EXTRACT_LOG_SINK": "stderr", "EXTRACT_STORE_QUERY_TIMEOUT": "0.2s"})
    instance = pool.instances[0]
    pool.token(key="key")
    emulator.script("key", HELD)
    answer = crowd.submit(pool.post, pdf)
    emulator.wait(held=1)
    with pool.store_away():
        emulator.release()
        assert answer.result(PATIENCE).status == 200
        full_pipe.fill()
    is_not_heard_of(pool, instance, "stuck: the store's background thread should have been heard of")
    full_pipe.read()
    is_heard_of(pool, instance)
    assert pool.stop_pool() == 0
    assert "1 entries of the outbox have reached the store" in full_pipe.rest()


def is_not_heard_of(pool: Pool, instance: Instance, why: str) -> None:
    pool.hear_until(lambda: instance.said[-1].get("STATUS", "").startswith(why))
    so_far = len(instance.said)
    pool.hear_until(lambda: len(instance.said) > so_far + 5)
    assert not any("WATCHDOG" in message for message in instance.said[so_far:])


def is_heard_of(pool: Pool, instance: Instance) -> None:
    so_far = len(instance.said)
    pool.hear_until(lambda: any("WATCHDOG" in message for message in instance.said[so_far:]))


def test_manager_at_an_abstract_socket(make_pool: Callable[..., Pool]) -> None:
    """And a watchdog that is meant for another process."""
    pool = make_pool()
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.settimeout(PATIENCE)
        manager.bind("")  # the kernel chooses a name
        name = manager.getsockname().decode().replace("\0", "@", 1)
        instance = pool.spawn(NOTIFY_SOCKET=name, WATCHDOG_PID="1")
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving"
        instance.process.send_signal(signal.SIGTERM)
        assert manager.recv(4096).startswith(b"STOPPING=1\n")
        assert instance.process.wait(PATIENCE) == 0
        manager.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                assert b"WATCHDOG" not in manager.recv(4096)


@pytest.mark.parametrize("name", ["", "relative", "/" + "x" * 108])
def test_no_manager(make_pool: Callable[..., Pool], name: str) -> None:
    """It serves all the same, and says so where the name cannot be meant."""
    pool = make_pool(env={"EXTRACT_LOG_SINK": "stderr"})
    pool.allowed_stderr += ["INFO", "WARNING .* NOTIFY_SOCKET is not a socket's path"]
    pool.instances[0].process.terminate()
    assert pool.instances.pop().process.wait(PATIENCE) == 0
    pool.instances.append(pool.spawn(NOTIFY_SOCKET=name))
    assert pool.get("/healthz").status == 200
    assert ("NOTIFY_SOCKET" in (pool.dir / "pool.log").read_text()) == (name != "")


# ---- restarts ----


def test_listener_that_somebody_made_blocking(make_pool: Callable[..., Pool]) -> None:
    """O_NONBLOCK belongs to all who share the socket, and systemd takes it away whenever it starts one: those that serve do not
    wait in accept() for a connection that does not come."""
    pool = make_pool()
    assert not os.get_blocking(pool.listener.fileno())
    os.set_blocking(pool.listener.fileno(), True)
    assert pool.get("/healthz").status == 200
    assert pool.stop_pool() == 0


def test_rolling_restart_loses_no_request(make_pool: Callable[..., Pool], emulator: Emulator, crowd: ThreadPoolExecutor,
                                          pdf: bytes) -> None:
    """As `systemctl reload extract-fcgi`, twice, with more requests than workers all the time: each is answered, paid once and
    written down."""
    pool = make_pool(processes=3, env={"EXTRACT_SERVER_THREADS": "2"})
    pool.token(key="key")
    emulator.script("key", {"delay": 0.01}, repeat=True)
    stop = threading.Event()
    seen: list[int] = []

    def go_on() -> None:
        while not stop.is_set():
            seen.append(pool.post(pdf).status)

    clients = [crowd.submit(go_on) for _ in range(12)]
    try:
        for _ in range(2 * len(pool.instances)):
            so_far = len(seen)
            pool.restart(pool.instances[0])  # the oldest: a new one is the last
            eventually(lambda: len(seen) >= so_far + 24)
    finally:
        stop.set()
    for client in clients:
        client.result(2 * PATIENCE)
    assert set(seen) == {200}
    assert len(pool.sql("SELECT 1 FROM TokenUsageLogs")) == len(seen) == len(emulator.log())
    assert pool.sql("SELECT 1 FROM TokenReservations WHERE State <> 'settled'") == []
    pool.balanced()


def test_restart_of_the_only_instance(make_pool: Callable[..., Pool], emulator: Emulator, crowd: ThreadPoolExecutor,
                                      pdf: bytes) -> None:
    """What comes while none is running waits in the socket."""
    pool = make_pool()
    pool.token(key="key")
    instance = pool.instances.pop()
    instance.process.terminate()
    assert instance.process.wait(PATIENCE) == 0
    answers = [crowd.submit(pool.post, pdf) for _ in range(20)]
    eventually(lambda: connected(pool.socket) >= 20)
    assert not any(answer.done() for answer in answers)
    pool.start_instance()
    assert [answer.result(PATIENCE).status for answer in answers] == [200] * 20


def connected(path: Path) -> int:
    """Connections to the socket, accepted or not."""
    return sum(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines()) - 1


def test_accepted_and_silent_while_it_stops(make_pool: Callable[..., Pool]) -> None:
    """A web server that has connected, and is only then given the processor to say what it wants, gets its answer."""
    pool = make_pool()
    instance = pool.instances[0]
    idle = len(watched(instance.pid))
    with closing(FastCgi(pool.socket)) as client:
        eventually(lambda: len(watched(instance.pid)) > idle, "it is accepted")
        instance.process.terminate()
        pool.hear_until(lambda: instance.has_said("STATUS", "draining: 0 requests to finish"))
        client.begin()
        client.params({"REQUEST_METHOD": "GET", "DOCUMENT_URI": "/healthz"})
        client.send(FastCgi.STDIN)
        assert client.answer().status == 200
    assert instance.process.wait(PATIENCE) == 0


# ---- under the template's own limits ----

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # seccomp.h
PROT_EXEC = 4
MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ
SOCKET_FAMILIES = 46  # as many as Linux knows


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = [("argument", ctypes.c_uint), ("operation", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def members(names: str) -> set[str]:
    """The system calls of a value of SystemCallFilter=, sets taken apart."""
    found: set[str] = set()
    for name in names.lstrip("~").split():
        if name.startswith("@"):
            listed = run("systemd-analyze", "syscall-filter", "--no-pager", name)
            assert listed.returncode == 0, name
            found |= members(" ".join(line for line in listed.stdout.split("\n")[1:] if not line.strip().startswith("#")))
        else:
            found.add(name)
    return found


def limits_of_the_template(unit: Path, *more: str) -> Callable[[], None]:
    """To be called in a new process: it goes on under the unit's SystemCallFilter=, MemoryDenyWriteExecute= and
    RestrictAddressFamilies=. Where systemd makes a denied call an error (SystemCallErrorNumber=), which a program might not
    even mention, this kills the process: nothing that it does may be denied. (An address family is: whoever asks for one has
    to live without.)"""
    service = settings(unit)
    allowed: set[str] = set()
    for names in service["SystemCallFilter"]:
        allowed = allowed - members(names) if names.startswith("~") else allowed | members(names)
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p

    def number(name: str) -> int:
        return int(seccomp.seccomp_syscall_resolve_name(name.encode()))

    def rule(context: int, action: int, name: str, *comparisons: Comparison) -> None:
        array = (Comparison * max(1, len(comparisons)))(*comparisons)
        if number(name) >= 0:  # there is such a call on this machine
            assert seccomp.seccomp_rule_add_array(ctypes.c_void_p(context), ctypes.c_uint32(action), number(name),
                                                  len(comparisons), array) == 0, name

    contexts = [seccomp.seccomp_init(ctypes.c_uint32(action)) for action in (KILL, ALLOW, ALLOW)]
    calls, memory, families = contexts
    for name in allowed | set(more):
        rule(calls, ALLOW, name)
    assert service["MemoryDenyWriteExecute"] == ["yes"]
    rule(memory, KILL, "mmap", Comparison(2, MASKED_EQUAL, PROT_EXEC | 2, PROT_EXEC | 2))
    rule(memory, KILL, "mprotect", Comparison(2, MASKED_EQUAL, PROT_EXEC, PROT_EXEC))
    may = {int(getattr(socket, name)) for name in service["RestrictAddressFamilies"][0].split()}
    for family in set(range(SOCKET_FAMILIES)) - may:
        rule(families, ERRNO | errno.EAFNOSUPPORT, "socket", Comparison(0, MASKED_EQUAL, 0xFFFFFFFF, family))

    def enter() -> None:
        for context in reversed(contexts):  # seccomp_load needs calls that the first one denies
            if seccomp.seccomp_load(ctypes.c_void_p(context)) != 0:
                os._exit(99)

    return enter


# With root, SQLite gives its files to the owner of the database; the service is not root.
AS_ROOT = ("fchown",) if os.geteuid() == 0 else ()


def test_what_the_template_denies() -> None:
    """So that the test below means something: another program under the same limits."""
    enter = limits_of_the_template(TEMPLATE)

    def python(code: str) -> subprocess.CompletedProcess[str]:
        code = f"import ctypes, mmap, os, socket; libc = ctypes.CDLL(None); {code}"
        return run("/usr/bin/python3", "-c", code, preexec_fn=enter)

    assert python("print('fine')").stdout == "fine\n"
    for code in ("os.setgroups([])", "os.chown('/', 0, 0)", "os.sched_setaffinity(0, {0})", "libc.mount(b'', b'/', b'', 0, 0)",
                 "libc.ptrace(0, 0, 0, 0)", "libc.reboot(0)", "libc.shmget(0, 4096, 0)", "mmap.mmap(-1, 4096, prot=7)"):
        assert python(code).returncode == -signal.SIGSYS, code
    for family in ("AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
        assert "Address family not supported" in python(f"socket.socket(socket.{family})").stderr


@pytest.fixture(params=["sqlite", "mssql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlServer | None]:
    """With EXTRACT_TEST_STORE=mssql both are SQL Server."""
    if request.param == "sqlite":
        yield None
        return
    tds = TdsServer(tmp_path, "on")
    server = SqlServer.of(tds)
    yield server
    server.close()
    tds.stop()


def test_service_needs_nothing_that_is_denied(store: SqlServer | None, make_pool: Callable[..., Pool], emulator: Emulator,
                                              tls_front: TlsFront, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """All that it ever does: start, uploads of each size, TLS, retries, an outage with fallback and outbox, the end."""
    key_file = Path(tls_front.ca_file).with_name("appSetting.txt")
    key_file.write_text("fallback-key\n")
    pool = make_pool(base_url=tls_front.url.replace("localhost", "127.0.0.1"), sql_server=store,
                     setup=limits_of_the_template(TEMPLATE, *AS_ROOT), processes=2,
                     env={"EXTRACT_GEMINI_CA_FILE": str(tls_front.ca_file), "EXTRACT_FALLBACK_KEY_FILE": str(key_file),
                          "EXTRACT_STORE_QUERY_TIMEOUT": "1s",
                          "ASAN_OPTIONS": "detect_leaks=0"})  # which asks for ptrace at the end; the unit denies it
    pool.allowed_stderr.append(r" INFO store ")  # the log's own store may still be away when the outbox's is back
    pool.token(key="key")
    emulator.scenario("key", "overloaded")
    files = [pdf, padded_pdf(3 << 20), pdf, padded_pdf(200_000)]
    answers = [crowd.submit(pool.post, file) for file in files * 4]
    assert [answer.result(2 * PATIENCE).status for answer in answers] == [200] * len(answers)
    assert [pool.get(path).status for path in ("/healthz", "/readyz", "/metrics", "/nowhere")] == [200, 200, 200, 404]
    with pool.store_away():
        answer = pool.post(pdf)
        assert answer.status == 200, answer.body
    eventually(lambda: pool.sql("SELECT 1 FROM TokenUsageLogs WHERE TokenSource = 'fallback'"), "the outbox is replayed")
    for instance in list(pool.instances):
        pool.restart(instance)
    assert pool.post(pdf).status == 200
    pool.balanced()
