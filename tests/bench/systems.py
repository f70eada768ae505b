"""What is measured, each in processes of its own: the product, the floor (floor.c), with and without rows, and the stack
that people would use instead (python_stack.py), all before the same stand-in for Gemini. Product and floor stand behind
the same nginx; the Python stack is asked directly, which is generous."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests/e2e"))

import conftest  # noqa: E402
from probes import cpu_seconds  # noqa: E402
from conftest import BUILD, SqlServer, Stack, eventually, free_port, listening, live_server, start_nginx  # noqa: E402

PROCESSES = int(os.environ.get("PROCESSES", "1"))
THREADS = int(os.environ.get("THREADS", "64"))
MODEL = "gemini-3.5-flash"
STARTERS = ("spawn-fcgi", "multiwatch", "strace", "valgrind")
BY_PATH = bool(os.environ.get("BY_PATH"))  # uploads as files by their path, instead of through the socket
COMPANIES = [f"C{n:02}" for n in range(1, 33)]
conftest.PATIENCE = 100.0  # with 256 uploads of 20 MB at once much may wait


class Upstream:
    """The stand-in for Gemini. Its temporary files are kept in memory where there is such a place: it is not measured."""

    def __init__(self) -> None:
        shm = Path("/dev/shm")
        self.dir = Path(tempfile.mkdtemp(prefix="extract-bench-upstream-", dir=shm if os.access(shm, os.W_OK) else None))
        self.dir.chmod(0o755)
        (self.dir / "tls").mkdir()
        conftest.make_certificate(self.dir / "tls")
        self.port, self.https_port = free_port(), free_port()
        self.nginx = start_nginx(self.dir, HERE / "upstream.conf.in", DIR=self.dir, HTTP_PORT=self.port,
                                 HTTPS_PORT=self.https_port)
        eventually(lambda: listening(self.port), "the upstream listens")

    @property
    def certificate(self) -> Path:
        return self.dir / "tls"

    @property
    def ca_file(self) -> Path:
        return self.dir / "tls/cert.pem"

    def url(self, who: str, tls: bool = False) -> str:
        """What stands before /v1beta/models/… for the calls of one system."""
        return f"https://localhost:{self.https_port}/{who}" if tls else f"http://127.0.0.1:{self.port}/{who}"

    def counts(self, who: str) -> dict[str, int]:
        """Calls of one system: received, answered."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counts/{who}") as answer:
            return json.load(answer)

    def close(self) -> None:
        self.nginx.send_signal(signal.SIGTERM)
        self.nginx.wait(conftest.PATIENCE)
        shutil.rmtree(self.dir)


class Wrong(Exception):
    """The accounting does not hold."""


class System:
    """What parts know of each one: a name, where to post, its processes, and whether its books are right."""

    name: str
    is_ours = True  # a request that fails is our failure

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.who = re.sub(r"[^a-z]+", "-", self.name) + "-" + uuid.uuid4().hex[:6]

    def calls(self) -> dict[str, int]:
        return self.upstream.counts(self.who)

    def url(self, tls: bool) -> str:
        raise NotImplementedError

    def pids(self) -> list[int]:
        raise NotImplementedError

    def quiet(self) -> None:
        """Until nothing of what came before is going on."""

    def audit(self) -> None:
        """Raises Wrong unless everything about each answered call is recorded."""

    def close(self) -> None:
        raise NotImplementedError


class Pool(Stack, System):
    """A pool behind the shipped nginx configuration."""

    def __init__(self, upstream: Upstream, *, tls: bool = False, processes: int = PROCESSES, threads: int = THREADS,
                 env: dict[str, str] | None = None, sql_server: SqlServer | None = None, model: str = MODEL,
                 wrapper: tuple[str, ...] = ()) -> None:
        System.__init__(self, upstream)
        self.wrapper = wrapper
        base_url = upstream.url(self.who, tls)
        try:
            Stack.__init__(self, None, upstream.certificate, processes=processes, by_path=BY_PATH, base_url=base_url,
                           sql_server=sql_server, env={
                               "EXTRACT_SERVER_THREADS": str(threads),
                               "EXTRACT_SERVER_QUEUE": "1024",
                               "EXTRACT_SERVER_QUEUE_WAIT": "120s",
                               "EXTRACT_GEMINI_MODEL": model,
                               "EXTRACT_GEMINI_CA_FILE": str(upstream.ca_file),
                               "FLOOR_URL": f"{base_url}/v1beta/models/{model}:generateContent",
                               "FLOOR_THREADS": str(threads),
                               "FLOOR_CA_FILE": str(upstream.ca_file), **(env or {})})
        except BaseException:  # what has started must not stay
            for process in (getattr(self, "pool", None), getattr(self, "nginx", None)):
                if process is not None:
                    process.terminate()
            raise

    def executable(self) -> Path:
        raise NotImplementedError

    def start_pool(self, processes: int = 1) -> None:
        if self.sql_server is not None:  # not by the relay, which is for tests that cut it
            self.env["EXTRACT_STORE_SERVER"] = self.sql_server.address
        command = ["spawn-fcgi", "-n", "-b", "4096", "-M", "0666", "-s", str(self.socket), "--"]
        if processes > 1:
            command += ["/usr/bin/multiwatch", "-f", str(processes), "--"]
        self.pool = subprocess.Popen([*command, *self.wrapper, str(self.executable())], env=self.env, stderr=self.stderr,
                                     start_new_session=True)

    def pids(self) -> list[int]:
        """The program's processes, without what starts and watches them."""
        assert self.pool is not None
        found = subprocess.run(["pgrep", "-s", str(self.pool.pid), "-f", f"{self.executable()}$"], capture_output=True,
                               text=True)
        pids = [int(pid) for pid in found.stdout.split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() not in STARTERS]

    def url(self, tls: bool) -> str:
        return f"https://localhost:{self.https_port}/extract" if tls else f"http://127.0.0.1:{self.port}/extract"

    def quiet(self) -> None:
        """nginx has no connection to the pool, neither served nor waiting: only the listening one has its path."""
        eventually(lambda: Path("/proc/net/unix").read_text().count(str(self.socket)) <= 1, f"{self.name} is idle")


class Recorded(Pool):
    """A pool that records each call in the store."""

    def books(self) -> dict[str, int]:
        """What must be there once for each answered call, and what must not be there at all."""
        row = self.sql("""
            SELECT (SELECT COUNT(*) FROM TokenUsageLogs WHERE Model IS NULL OR Model <> 'past') AS rows_of_usage,
                   (SELECT COUNT(*) FROM TokenReservations WHERE State = 'settled') AS settled_reservations,
                   (SELECT COUNT(DISTINCT RequestID) FROM ApplicationLogs) AS requests_in_the_log,
                   (SELECT COUNT(*) FROM TokenReservations WHERE State <> 'settled') AS other_reservations""")[0]
        return {name: int(n) for name, n in row.items()}

    def audit(self) -> None:
        """One usage row, one settled reservation and its log entry for each answered call, no other reservation, and the
        equation of the store (conftest: balanced)."""
        self.quiet()

        def right() -> bool:
            calls = self.calls()["answered"]
            return list(self.books().values()) == [calls, calls, calls, 0]
        try:
            eventually(right)
        except AssertionError:
            raise Wrong(f"{self.name}: {self.calls()['answered']} calls were answered, but there are {self.books()}") from None
        try:
            self.balanced()
        except AssertionError as error:
            raise Wrong(f"{self.name}: the store's sums are not those of its rows: {error}") from error


class Product(Recorded):
    name = "product"

    def __init__(self, upstream: Upstream, *, companies: int = 16, **settings: Any) -> None:
        super().__init__(upstream, **settings)
        for company in COMPANIES[:companies]:
            self.token(company)

    def executable(self) -> Path:
        return BUILD / "extract-fcgi"

    def add_tokens(self, company: str, count: int) -> None:
        """Many tokens at once; extractctl would take a process for each."""
        self.sql("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2)"
                 " INSERT INTO TokenMaster (CompanyID, ApiKey, Provider) SELECT ?1, 'key', 'Gemini' FROM n", company, count)

    def add_usage(self, company: str, count: int) -> None:
        """Usage rows of the past, of one token used each, on the company's token."""
        self.sql("""
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?2)
            INSERT INTO TokenUsageLogs (TokenID, Branch, RequestedBy, InputTokens, TotalTokensUsed, LoggedAt, RequestID,
                                        CompanyID, Model, DurationMs)
            SELECT t.TokenID, 'Berlin', 'anna', 1, 1, STRFTIME('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || (?2 - i + 1) || ' seconds'),
                   PRINTF('%08x-0000-7000-8000-%012x', i, i), t.CompanyID, 'past', 1
            FROM n, TokenMaster t WHERE t.CompanyID = ?1""", company, count)
        self.sql("""
            INSERT INTO TokenUsageSummary (TokenID, TotalUsedTokens) SELECT TokenID, ?2 FROM TokenMaster WHERE CompanyID = ?1
            ON CONFLICT (TokenID) DO UPDATE SET TotalUsedTokens = TotalUsedTokens + excluded.TotalUsedTokens""", company, count)

    def audit(self) -> None:
        """All that, and no log entry was dropped."""
        super().audit()
        if dropped := self.metric("extract_log_entries_dropped_total"):
            raise Wrong(f"{self.name}: {dropped:.0f} log entries were dropped")

    def store_connections(self) -> int:
        """Files or sockets that the pool has open to its store."""
        links = []
        for pid in self.pids():
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    links.append(os.readlink(fd))
                except FileNotFoundError:
                    continue
        if self.sql_server is None:
            return links.count(str(self.dir / "store.db"))
        port = f":{int(self.sql_server.address.rpartition(':')[2]):04X}"
        inodes = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            inodes |= {f"socket:[{row[9]}]" for row in rows if row[2].endswith(port) and row[3] == "01"}
        return sum(link in inodes for link in links)


class Unsynced(Product):
    """With an fsync that does nothing."""

    name = "product, fsync does nothing"

    def __init__(self, upstream: Upstream) -> None:
        super().__init__(upstream, env={"LD_PRELOAD": "libeatmydata.so"})


class Floor(Pool):
    is_the_service = False
    name = "floor"

    def __init__(self, upstream: Upstream, **settings: Any) -> None:
        super().__init__(upstream, **settings)
        self.allowed_stderr = [""]

    def executable(self) -> Path:
        return BUILD / "tests/bench/floor"


class FloorWithRows(Floor, Recorded):
    """The floor that writes the rows, too; for COMPANIES[0] alone."""

    name = "floor, with rows"

    def start_pool(self, processes: int = 1) -> None:
        self.token(COMPANIES[0])
        self.env["FLOOR_STORE"] = str(self.dir / "store.db")
        super().start_pool(processes)


class PythonStack(System):
    name = "python stack"
    is_ours = False

    def __init__(self, upstream: Upstream, *, tls: bool = False, processes: int = PROCESSES,
                 sql_server: SqlServer | None = None, env: dict[str, str] | None = None) -> None:
        super().__init__(upstream)
        self.dir = Path(tempfile.mkdtemp(prefix="extract-bench-python-"))
        self.port, self.sql_server = free_port(), sql_server
        env = os.environ | {"UPSTREAM": f"{upstream.url(self.who, tls)}/v1beta", "CA_FILE": str(upstream.ca_file) if tls else "",
                            "SQLITE": str(self.dir / "python_stack.db"), "MODEL": MODEL,
                            "PYTHONDONTWRITEBYTECODE": "1"} | (env or {})
        if sql_server is not None:
            env["DSN"] = self._dsn(sql_server)
        subprocess.run(["/usr/bin/python3", str(HERE / "python_stack.py"), *COMPANIES[:16]], env=env, check=True)
        command = ["/usr/bin/python3", "-m", "uvicorn", "--workers", str(processes), "--port", str(self.port),
                   "--no-access-log", "--log-level", "warning", "--backlog", "4096", "python_stack:app"]
        if tls:
            command += ["--ssl-certfile", str(upstream.ca_file), "--ssl-keyfile", str(upstream.certificate / "key.pem")]
        self.log = (self.dir / "log").open("ab")
        self.process = subprocess.Popen(command, env=env, cwd=HERE, stdout=self.log, stderr=self.log, start_new_session=True)
        eventually(lambda: listening(self.port), "the Python stack listens")

    def _dsn(self, server: SqlServer) -> str:
        host, _, port = server.address.rpartition(":")
        driver = next(Path("/usr/lib").glob("*/odbc/libtdsodbc.so"))
        password = server.password_file.read_text().strip()
        return (f"DRIVER={driver};SERVER={host};PORT={port};TDS_Version=7.4;ClientCharset=UTF-8;"
                f"UID={server.user};PWD={{{password}}};DATABASE={server.database(self.dir)}")

    def url(self, tls: bool) -> str:
        return f"{'https://localhost' if tls else 'http://127.0.0.1'}:{self.port}/extract"

    def pids(self) -> list[int]:
        found = subprocess.run(["pgrep", "-s", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def quiet(self) -> None:
        """No worker uses a processor, or waits for an answer."""
        def still() -> bool:
            before = cpu_seconds(self.pids())
            time.sleep(0.1)
            calls = self.calls()
            return cpu_seconds(self.pids()) == before and calls["received"] == calls["answered"]
        eventually(still, "the Python stack is idle")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(conftest.PATIENCE)
        self.log.close()
        if self.sql_server is not None:
            self.sql_server.drop(self.dir)
        shutil.rmtree(self.dir)


def scratch() -> Path:
    """A directory for what a run needs besides."""
    return Path(tempfile.mkdtemp(prefix="extract-bench-"))
