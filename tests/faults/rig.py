"""A stack for faults: its processes are the test's own children, its requests can be told apart, and in the end its account
is checked to the last token.

What accounted() proves, against the log of the emulator, which knows what was really answered:

  - each answer of Gemini's is in exactly one usage row, with its tokens, or its request has exactly one unsettled
    reservation with that token (each that it had, where its process died); nothing else has either
  - what clients were told (request_id, usage, spent) is what the rows say
  - the sums equal the rows (Stack.balanced), and nothing is reserved in the end
  - no process has ended but those that were told to, none holds more than before: descriptors, threads, spools
  - no API key stands in any file that was written, or in any answer
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from e2e.conftest import BUILD, PATIENCE, QUICK, ROOT, UUID_V7, Answer, Emulator, FastCgi, Stack, eventually, form

TINY = b"%PDF-1.4\n1 0 obj<</Type /Catalog>>endobj\n"
LARGE = 9_000_000  # bytes of an upload that goes to a file
PDF = (ROOT / "tests/samples/invoice-de.pdf").read_bytes()
LOG_LINE = r"^\S+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) "  # entries that can't reach the store, nor the outbox
ANSWER_MAX = 16 << 20  # what the service reads of one
CALLS_MAX = 5  # of a request with one token
STORE_CONNECTIONS = 8  # of one process to SQL Server, at the most
USAGE = {  # column of TokenUsageLogs: member of usageMetadata
    "InputTokens": "promptTokenCount", "OutputTokens": "candidatesTokenCount", "TotalTokensUsed": "totalTokenCount",
    "ThoughtsTokens": "thoughtsTokenCount", "CachedTokens": "cachedContentTokenCount",
}
TOLD = {  # the same in an answer
    "InputTokens": "input_tokens", "OutputTokens": "output_tokens", "TotalTokensUsed": "total_tokens",
    "ThoughtsTokens": "thoughts_tokens", "CachedTokens": "cached_tokens",
}


@dataclasses.dataclass
class Sent:
    """A request. Its user names it in the rows, its file at the emulator."""
    user: str
    company: str
    sha256: str
    answer: Answer | None = None  # None: nobody heard one


# ---- what a process holds ----


def unix_sockets() -> dict[str, str]:
    """By inode: the name; accepted ones have their listener's. Those without are pairs: libcurl has one in each worker."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {fields[6]: fields[7] if len(fields) > 7 else "socket pair" for fields in lines}


def held(pid: int) -> collections.Counter[str]:
    """Descriptors by what they are, mappings of spools, threads."""
    counts: collections.Counter[str] = collections.Counter()
    unix = unix_sockets()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(path)
            if match := re.fullmatch(r"socket:\[(\d+)\]", name):
                name = unix.get(match[1], "inet socket")
            counts[name] += 1
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if re.search(r"/#\d+ \(deleted\)|/upload-", line):
            counts["mapped spool"] += 1
    counts["thread"] = len(os.listdir(f"/proc/{pid}/task"))
    return counts


def excess(pid: int, before: collections.Counter[str], workers: int, store: int) -> dict[str, tuple[int, int]]:
    """What it holds more than before: how many, instead of how many. Connections are kept, one for each worker and some
    to SQL Server, each with an eventfd of FreeTDS's; of a database's log and index each connection opens its own when it
    first reads; of the store's log the writers have another one, from the beginning."""
    found = {}
    for name, count in held(pid).items():
        allowed = before[name]
        if name == "inet socket":
            allowed = workers + store
        elif name == "anon_inode:[eventfd]":
            allowed = before[name] + store
        elif name == "socket pair":
            allowed = before[name] + 2 * workers
        elif match := re.fullmatch(r"(.*\.db)-(wal|shm)", name):
            allowed = max(before[name], before[match[1]])
        if count > allowed:
            found[name] = count, allowed
    return found


# ---- the rig ----


class Rig(Stack):
    def __init__(self, emulator: Emulator, certificate: Path, *, processes: int = 1, env: dict[str, str] | None = None,
                 **settings: Any) -> None:
        self.emulator = emulator
        self.workers = int((env or {}).get("EXTRACT_SERVER_THREADS", QUICK["EXTRACT_SERVER_THREADS"]))
        self.listener: socket.socket | None = None
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.starting: dict[int, socket.socket] = {}
        self.before: dict[int, collections.Counter[str]] = {}
        self.keys: dict[str, int | None] = {}  # API key: its TokenID
        self.secrets: set[str] = set()  # what must stand nowhere, besides those
        self.astray: collections.Counter[int | None] = collections.Counter()  # calls that need not have reached the emulator
        self.anywhere = 0  # the same, and nobody knows of which token
        self.answers_get_lost = False  # a network may have swallowed what the emulator has answered
        self.sent: dict[str, Sent] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        self.was_accounted = False
        self.store_path: Path | None = None  # where it is not store.db in dir
        # memory that nobody has written to is never zero by accident
        try:
            super().__init__(emulator, certificate, processes=processes, env={"MALLOC_PERTURB_": "85", **(env or {})},
                             **settings)
        except BaseException:
            self.kill_all()
            raise
        self.state_dir = Path(self.env["EXTRACT_SERVER_STATE_DIR"])
        self.allowed_stderr = [LOG_LINE]

    @staticmethod
    def is_sanitized() -> bool:
        """A sanitizer's allocator ends the process where there is no memory, and holds back what was freed."""
        program = (BUILD / "extract-fcgi").read_bytes()
        return b"__asan_init" in program or b"__tsan_init" in program

    # -- processes --

    def start_pool(self, processes: int = 1) -> None:
        if self.listener is None:  # the listener outlives the processes, as systemd's does
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(self.socket))
            self.socket.chmod(0o666)
            self.listener.listen(1024)
        for _ in range(processes):
            self.start()
        self.settle_in()

    def start(self) -> int:
        """One process more."""
        assert self.listener is not None
        said = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # what it says to its service manager
        name = f"extract-rig-{uuid.uuid4().hex}"
        said.bind(f"\0{name}")
        said.setblocking(False)
        # SIGXFSZ stays ignored, as it is in Python: a file past its limit is then an error, as on a full disk.
        process = subprocess.Popen([str(BUILD / "extract-fcgi")], stdin=self.listener, stdout=subprocess.DEVNULL,
                                   stderr=self.stderr, env={**self.env, "NOTIFY_SOCKET": f"@{name}"}, restore_signals=False,
                                   start_new_session=True)
        self.running[process.pid], self.starting[process.pid] = process, said
        return process.pid

    def settle_in(self) -> None:
        """Until the new ones serve, with all their threads; what they hold then is what they may hold in the end."""
        for pid in list(self.starting):
            with self.starting.pop(pid) as said:
                eventually(lambda: self.nobody_died() or self.is_ready(said), "a process serves")
            first = held(pid)
            self.before[pid] = first & held(pid)  # what comes and goes does not count
            self.before[pid][str(self.socket)] = 1  # the listener

    @staticmethod
    def is_ready(said: socket.socket) -> bool:
        with contextlib.suppress(BlockingIOError):
            return b"READY=1" in said.recv(4096)
        return False

    def pids(self) -> list[int]:
        return sorted(self.running)

    def _ended(self, pid: int, status: int) -> None:
        process = self.running.pop(pid)
        assert process.wait(2 * PATIENCE) == status, f"process {pid} ended with {process.returncode}, not {status}"

    def kill(self, pid: int | None = None) -> int:
        """kill -9; of one where none is named. Which."""
        pid = pid or self.pids()[0]
        self.running[pid].kill()
        self._ended(pid, -signal.SIGKILL)
        return pid

    def terminate(self, pid: int) -> None:
        """SIGTERM, and its end."""
        self.running[pid].terminate()
        self._ended(pid, 0)

    def replace(self, pid: int) -> int:
        """A rolling restart's step: ends one, starts another in its place."""
        self.terminate(pid)
        new = self.start()
        self.settle_in()
        return new

    def limit(self, which: int, value: int) -> None:
        """Of each process: resource.RLIMIT_…"""
        for pid in self.pids():
            resource.prlimit(pid, which, (value, resource.prlimit(pid, which)[1]))

    def stop_pool(self, number: signal.Signals = signal.SIGTERM) -> int:
        for process in self.running.values():
            process.send_signal(number)
        for pid in self.pids():
            self._ended(pid, 0)
        return 0

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.kill_all()

    def kill_all(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        for one in [*self.starting.values(), *([self.listener] if self.listener is not None else [])]:
            one.close()

    # -- requests --

    def token(self, company: str = "NT047", key: str | None = None, *arguments: str) -> int:
        key = key or f"key-{uuid.uuid4().hex}"
        self.keys[key] = super().token(company, key, *arguments)
        return self.keys[key]  # type: ignore[return-value]

    def upload(self, company: str = "NT047", size: int = 0, tiny: bool = False,
               base: bytes | None = None) -> tuple[Sent, bytes]:
        """A request's file, at least so large: no other has the same, nor, up to 40, as many pages, and so tokens."""
        with self.lock:
            n = next(self.numbers)
        file = (base or (TINY if tiny else PDF)) + f"% {uuid.uuid4()} ".encode() + b"/Type /Page " * (n % 41)
        file += bytes(max(0, size - len(file))) + b"\n%%EOF\n"
        sent = Sent(f"user-{n}", company, hashlib.sha256(file).hexdigest())
        self.sent[sent.user] = sent
        return sent, file

    def send(self, company: str = "NT047", size: int = 0, tiny: bool = False, sent: tuple[Sent, bytes] | None = None,
             **arguments: Any) -> Answer:
        request, file = sent or self.upload(company, size, tiny)
        request.answer = self.post(file, request.company, user=request.user, **arguments)
        return request.answer

    def begin(self, request: tuple[Sent, bytes], upto: int | None = None) -> FastCgi:
        """The request without nginx: so many bytes of its body, or, with None, all of it. Nobody reads its answer yet."""
        sent, file = request
        body, content_type = form(file, sent.company, sent.user)
        client = FastCgi(self.socket)
        client.begin()
        client.params({"REQUEST_METHOD": "POST", "DOCUMENT_URI": "/extract", "REMOTE_ADDR": "127.0.0.1",
                       "CONTENT_TYPE": content_type, "CONTENT_LENGTH": str(len(body))})
        client.send(FastCgi.STDIN, body[:upto])
        if upto is None:
            client.send(FastCgi.STDIN)
        return client

    def sql(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        if self.store_path is None:
            return super().sql(statement, *values)
        with contextlib.closing(sqlite3.connect(self.store_path, timeout=PATIENCE, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(statement, values)]

    def reservations(self, sent: Sent) -> list[dict[str, Any]]:
        return self.sql("SELECT * FROM TokenReservations WHERE RequestedBy = ? ORDER BY ReservationID", sent.user)

    def states(self, sent: Sent) -> list[str]:
        return [row["State"] for row in self.reservations(sent)]

    def outbox(self) -> dict[str, Any]:
        """Of /readyz: usable, waiting, records, dead; when the store is found again."""
        return eventually(lambda: self.get("/readyz").json().get("outbox"), "it is ready")

    def in_outbox(self, statement: str) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.state_dir / "outbox.db", timeout=PATIENCE, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(statement)]

    def outbox_rows(self) -> int:
        """Settlements and reservations that wait, without releases of acquires that nobody heard of. Not by the service."""
        return self.in_outbox("SELECT COUNT(*) AS n FROM Outbox"
                              " WHERE IFNULL(json_extract(Payload, '$.release_sequence'), 0) = 0")[0]["n"]

    # -- the account --

    def accounted(self, unsettled: Iterable[Sent] = ()) -> None:
        """See above. unsettled: requests whose process died, or whose settlement found no place: nobody knows any more
        what was spent, and that is what must be shown. The pool runs, and the store and the outbox are usable."""
        lost = {sent.user for sent in unsettled}
        self.is_quiet()
        self.nobody_died()
        self.nothing_leaked()
        self.balanced()
        self.expire(lost)
        self.every_call_is_counted(lost)
        self.balanced()
        reserved = self.sql("SELECT TokenID, ReservedTokens FROM TokenUsageSummary WHERE ReservedTokens <> 0")
        assert reserved == [], "reserved by nobody"
        self.no_key_anywhere()
        self.was_accounted = True

    def is_quiet(self) -> None:
        """Until nothing is under way any more: no call, no request, nothing in the outbox."""
        def no_call() -> bool:
            counts = self.emulator.wait(calls=0)
            return counts["calls"] == counts["finished"]

        eventually(no_call, "every call ends")
        eventually(lambda: self.metric("extract_requests_in_flight") + self.metric("extract_requests_queued") == 0,
                   "every request ends")
        eventually(lambda: self.ctl("outbox", "drain", check=False).returncode == 0, "the outbox is drained")
        outbox = self.outbox()
        assert (outbox["usable"], outbox["waiting"], outbox["dead"]) == (True, 0, 0), outbox

    def nobody_died(self) -> None:
        ended = {pid: process.returncode for pid, process in self.running.items() if process.poll() is not None}
        assert ended == {}, f"{ended}\n" + (self.dir / "pool.log").read_text(errors="replace")[-4000:]

    def nothing_leaked(self) -> None:
        store = 0 if self.sql_server is None else STORE_CONNECTIONS
        for pid in self.pids():
            more: dict[str, tuple[int, int]] = {}

            def as_before() -> bool:
                more.clear()
                more.update(excess(pid, self.before[pid], self.workers, store))
                return not more

            try:
                eventually(as_before)
            except AssertionError:
                raise AssertionError(f"process {pid} holds more than before: {more}") from None
        spools = [path for directory in {self.dir, self.state_dir} for path in directory.rglob("upload-*")]
        assert spools == [], spools

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        pid = self.start()
        self.settle_in()
        yield
        self.terminate(pid)

    def expire(self, lost: set[str]) -> None:
        """What is reserved still is reserved by the lost: their time passes, and a process that starts sees it."""
        held_by = {row["RequestedBy"] for row in self.sql("SELECT RequestedBy FROM TokenReservations WHERE State = 'open'")}
        assert held_by <= lost, f"reserved by nobody: {held_by - lost}"
        if held_by:
            self.sql("UPDATE TokenReservations SET ExpiresAt = CreatedAt WHERE State = 'open'")
            with self.one_more():
                eventually(lambda: self.sql("SELECT 1 AS x FROM TokenReservations WHERE State = 'open'") == [],
                           "reservations expire")

    def every_call_is_counted(self, lost: set[str]) -> None:
        by_file = {sent.sha256: sent.user for sent in self.sent.values()}
        answered: dict[tuple[str, int | None], list[dict[str, int]]] = collections.defaultdict(list)
        least: collections.Counter[int | None] = collections.Counter()  # calls that may have been billed, by token
        most: collections.Counter[int | None] = collections.Counter(self.astray)
        for call in self.emulator.log():
            assert call["key"] in self.keys and call["finished"], call
            token = self.keys[call["key"]]
            step = call["step"] or {}
            readable = step.get("gzip") != "bad" and step.get("size", 0) <= ANSWER_MAX
            if call["answered"] and call["usage"] and readable:
                assert call["file_sha256"] in by_file, call
                answered[by_file[call["file_sha256"]], token].append(call["usage"])
            elif call["status"] in (None, 200):  # no answer, half of one, or one that says nothing about its usage
                least[token] += call["complete"]
                most[token] += 1
            else:
                most[token] += self.answers_get_lost

        rows = self.sql("SELECT * FROM TokenUsageLogs")
        settled = {(row["RequestedBy"], row["TokenID"]): row for row in rows}
        assert len(settled) == len(rows), "a request has two usage rows of one token"
        heard = {who for who in answered if who[0] not in lost}
        assert heard == settled.keys() or self.answers_get_lost and heard > settled.keys(), "usage rows, and calls answered"
        for who in heard:
            most[who[1]] += self.not_heard(answered[who], settled.get(who))

        pending = self.sql("SELECT * FROM TokenReservations WHERE State = 'unsettled'")
        shown = [(row["RequestedBy"], row["TokenID"]) for row in pending]
        for (user, _), count in collections.Counter(shown).items():  # a process that died leaves all that it held
            assert count == 1 or self.broke_off(user), "a request has two unsettled reservations of one token"
        assert not set(shown) & settled.keys(), "settled, and unsettled too"
        assert heard - settled.keys() <= set(shown), "answered, and neither settled nor unsettled"
        assert lost <= {user for user, _ in shown}, f"not shown as unsettled: {lost - {user for user, _ in shown}}"
        for row in pending:
            assert row["UnknownCalls"] >= 1, row
        unknown: collections.Counter[int | None] = collections.Counter()
        for row in rows + pending:
            if row["RequestedBy"] in lost:  # calls without an answer, and perhaps answers that nobody wrote down
                most[row["TokenID"]] += row["UnknownCalls"]
                least[row["TokenID"]] -= CALLS_MAX
            unknown[row["TokenID"]] += row["UnknownCalls"]
        for token in unknown.keys() | least.keys():
            bounds = least[token], most[token] + self.anywhere
            assert bounds[0] <= unknown[token] <= bounds[1], f"unknown calls of token {token}: {unknown[token]}, not {bounds}"
        self.clients_were_told(lost, settled, {user for user, _ in shown})

    def broke_off(self, user: str) -> bool:
        """Perhaps its process died: there is no answer, or nginx's."""
        answer = self.sent[user].answer
        return answer is None or answer.json().get("code") == "internal_error"

    def not_heard(self, answers: list[dict[str, int]], row: dict[str, Any] | None) -> int:
        """Compares a request's usage row with the answers that it got. How many did not arrive, and must be unknown calls."""
        count = 0 if row is None else row["RequestCount"]
        missing = len(answers) - count
        assert missing == 0 or self.answers_get_lost and 0 < missing, ("RequestCount", row, answers)
        if row is None:
            return missing
        assert missing <= row["UnknownCalls"], ("UnknownCalls", row, answers)
        sums = [{column: sum(answer.get(member, 0) for answer in some) for column, member in USAGE.items()}
                for some in itertools.combinations(answers, count)]
        assert {column: row[column] for column in USAGE} in sums, (row, answers)
        return missing

    def clients_were_told(self, lost: set[str], settled: dict[tuple[str, int | None], dict[str, Any]],
                          shown: set[str]) -> None:
        rows_of: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        for (user, _), row in settled.items():
            rows_of[user].append(row)
        for sent in self.sent.values():
            if sent.answer is None or sent.user in lost:
                continue
            problem = sent.answer.json()
            if not UUID_V7.fullmatch(problem["request_id"]):
                continue  # nginx's own answer
            rows = rows_of[sent.user]
            assert {row["RequestID"] for row in rows} <= {problem["request_id"]} == {sent.answer.headers["X-Request-ID"]}
            if sent.answer.status == 200:
                for column, member in TOLD.items():
                    assert problem["usage"][member] == sum(row[column] for row in rows), (column, problem["usage"], rows)
            else:
                assert problem["spent"] == (rows != [] or sent.user in shown), (problem, rows)

    def no_key_anywhere(self) -> None:
        secrets = [key.encode() for key in {*self.keys, *self.secrets}]
        files = [path for directory in {self.dir, self.state_dir} for path in directory.rglob("*") if path.is_file()]
        if self.sql_server is not None and self.sql_server.tds is not None:
            files += (self.sql_server.tds.directory / "databases").glob(f"{self.sql_server.database(self.dir)}*")
        for path in files:
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), f"a key stands in {path}"
        for sent in self.sent.values():
            if sent.answer is not None:
                content = sent.answer.body + str(sent.answer.headers).encode()
                assert not any(secret in content for secret in secrets), f"a key stands in an answer: {content!r}"
