"""`make soak SECONDS=600`: mixed load and random faults on a pool of processes, and in the end the account and the memory.

SOAK_SEED repeats the faults of a run (not their moments: the machine has a say, too). One process, the witness, lives from
the beginning to the end: what it holds when all is quiet, after the warm-up and in the end, is compared. Whoever is told
that nothing may leak looks at that number.
"""
from __future__ import annotations

import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import FALLBACK_KEY
from door import Door
from e2e.conftest import PROBLEMS, ROOT, Emulator, form
from rig import PDF, Rig

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10 ** 6))
CLIENTS = 12
PROCESSES = 3
COMPANIES = {"Alpha": 1, "Beta": 3, "Gamma AG": 2, "Délta & Söhne": 2, "Epsilon": 1}  # and how many tokens
LIMITED = 300_000  # tokens, of Epsilon's only one, and more when it is used up
WARM_UP = max(SECONDS / 4, min(20.0, SECONDS / 2))
# Growth that is no leak: SQLite's caches (2 MB each) may not be full after a short warm-up. Measured: none in 600 s, and up to
# 464 KiB in 60 s on a machine that is busy with other things.
NOISE, A_REQUEST = 1 << 20, 25
UPLOADS = (16 << 20) + (64 << 10)  # kept for the next ones, whichever they were; and the page with the sealing keys
LOOKS = 4

SAMPLES = {name: (ROOT / "tests/samples" / name).read_bytes() for name in
           ("invoice.jpeg", "invoice.webp", "invoice.heic", "receipt.png", "invoice-two-pages.pdf", "invoice-ja.pdf")}
STEPS: list[dict[str, Any]] = [
    {"status": 500}, {"status": 503}, {"status": 408}, {"status": 429, "retry_delay": "0.3s"},
    {"status": 429, "retry_delay": "1.5s"}, {"status": 400}, {"status": 404},
    {"close": "before_read"}, {"close": "after_read"}, {"reset": "after_read"}, {"cut": 200}, {"text": "no JSON"},
    {"gzip": "bad"}, {"gzip": True}, {"body": "<html>"}, {"raw_json": {}}, {"usage": None}, {"size": 20_000_000},
    {"size": 300_000}, {"finish_reason": "SAFETY"}, {"block_reason": "OTHER"}, {"die_idle": True},
    {"close_connection": True}, {"delay": 0.2}, {"delay": 0.5}, {"delay": 5}, {"trickle": 0.001}, {"trickle": 0.5}]


LASTING: list[dict[str, Any]] = [  # what takes a token out of service, until it is repaired
    {"status": 403}, {"status": 402}, {"status": 400, "reason": "API_KEY_INVALID"},
    {"status": 429, "quota_id": "GenerateRequestsPerDayPerProjectPerModel"}]


class LoggedEmulator(Emulator):
    """One whose log is as long as the run."""

    def __init__(self, port: int, path: Path) -> None:
        super().__init__(port)
        self.path = path

    def log(self) -> list[dict[str, Any]]:
        names = ("key", "step", "complete", "answered", "finished", "status", "usage", "file_sha256")
        with self.path.open() as lines:
            return [{name: row[name] for name in names} for row in map(json.loads, lines)]


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    log = tmp_path / "calls.jsonl"
    process = subprocess.Popen(
        ["/usr/bin/python3", str(ROOT / "tests/emulator/gemini_emulator.py"), "--listen", "127.0.0.1:0", "--log", str(log)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert process.stdout is not None
    yield LoggedEmulator(int(process.stdout.readline().rsplit(":", 1)[1]), log)
    process.terminate()
    process.wait(30)


class Load:
    """Clients until stop; while paused they begin nothing."""

    def __init__(self, rig: Rig, bearer: dict[str, str]) -> None:
        self.rig, self.bearer = rig, bearer
        self.pause_between = 0.0  # seconds, at the most
        self.stop, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.lock = threading.Lock()
        self.under_way, self.ended = 0, threading.Condition(self.lock)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.strange: list[str] = []
        self.clicks: dict[str, list[str]] = {company: [] for company in COMPANIES}
        self.threads = [threading.Thread(target=self._client, args=(random.Random(SEED * 1000 + n),), daemon=True)
                        for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def pause(self) -> None:
        with self.lock:
            self.go.clear()
            assert self.ended.wait_for(lambda: self.under_way == 0, 120), "a client waits for ever"
        self.rig.is_quiet()

    def end(self) -> None:
        self.stop.set()
        self.go.set()
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive(), "a client waits for ever"

    def _client(self, chance: random.Random) -> None:
        while not self.stop.is_set():
            self.go.wait()
            with self.lock:
                if not self.go.is_set():
                    continue
                self.under_way += 1
            try:
                self._one(chance, chance.random())
            except Exception as error:  # noqa: BLE001: what a client may not meet is a finding
                self.strange.append(repr(error))
            finally:
                with self.lock:
                    self.under_way -= 1
                    self.ended.notify_all()
            time.sleep(chance.random() * self.pause_between)

    def _one(self, chance: random.Random, kind: float) -> None:
        company = chance.choice(list(COMPANIES))
        headers = {"Authorization": f"Bearer {self.bearer[company]}"}
        if chance.random() < 0.25:
            headers["Idempotency-Key"] = self._click(chance, company)
        if kind < 0.04:
            self._count(self.rig.post(b"GIF89a" if kind < 0.02 else PDF[:5000], company, headers=headers))
        elif kind < 0.06:
            self._count(self.rig.post(PDF, "Nobody", headers={"Authorization": "Bearer " + "x" * 51} if kind < 0.05
                                      else headers))
        elif kind < 0.08:
            self._count(self.rig.post(None, company, headers=headers))
        elif kind < 0.14:
            self._hang_up(chance, company, headers)
        else:
            base = SAMPLES[chance.choice(list(SAMPLES))] if kind < 0.35 else None
            size = int(chance.expovariate(1 / 1_500_000)) if kind > 0.9 else 0
            request = self.rig.upload(company, min(size, 10_000_000), base=base)
            self._count(self.rig.send(sent=request, headers=headers))

    def _click(self, chance: random.Random, company: str) -> str:
        """A new key, or one of the last."""
        with self.lock:
            recent = self.clicks[company]
            if recent and chance.random() < 0.4:
                return chance.choice(recent)
            recent.append(f"click-{chance.getrandbits(64):x}")
            del recent[:-20]
            return recent[-1]

    def _hang_up(self, chance: random.Random, company: str, headers: dict[str, str]) -> None:
        """In the middle of the upload, or right after it, or a little later."""
        sent, file = self.rig.upload(company, chance.choice((0, 0, 1_200_000)))
        body, content_type = form(file, company, sent.user)
        upto = chance.choice((len(body) // 2, len(body), len(body)))
        head = {"Host": "localhost", "Content-Type": content_type, "Content-Length": str(len(body)), **headers}
        text = "POST /extract HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in head.items()) + "\r\n"
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.rig.port)) as client:
            client.sendall(text.encode() + body[:upto])
            time.sleep(chance.choice((0, 0.005, 0.1)))
        with self.lock:
            self.outcomes["hung up"] += 1

    def _count(self, answer: Any) -> None:
        code = "success"
        if answer.status != 200:
            code = answer.json()["code"]
            by_nginx = "-" not in answer.json()["request_id"]
            if code == "internal_error" and not by_nginx:
                self.strange.append(repr(answer.body))
            assert code in PROBLEMS and answer.headers["Content-Type"] == "application/problem+json", answer
            code = f"{code} (nginx)" if by_nginx else code
        with self.lock:
            self.outcomes[code] += 1


class Faults:
    """One after the other, and sometimes none."""

    def __init__(self, rig: Rig, door: Door, witness: int, tokens: dict[str, list[tuple[int, str]]]) -> None:
        self.rig, self.door, self.witness, self.tokens = rig, door, witness, tokens
        self.chance = random.Random(SEED)
        self.done: collections.Counter[str] = collections.Counter()
        self.limit = LIMITED
        self.killed: set[int] = set()
        weights: dict[Callable[[], None], int] = {
            self.kill: 3, self.restart: 3, self.restart_all: 1, self.stall: 1, self.store_away: 4, self.network: 3,
            self.gemini: 8, self.repair: 3, self.drain: 1}
        if rig.sql_server is None:
            weights[self.store_moved] = 2
        self.kinds, self.weights = list(weights), list(weights.values())

    def for_a_while(self, most: float = 2.5) -> None:
        time.sleep(self.chance.uniform(0.1, most))

    def one(self) -> None:
        kind = self.chance.choices(self.kinds, self.weights)[0]
        kind()
        self.done[kind.__name__] += 1
        self.rig.nobody_died()

    def victim(self) -> int:
        return self.chance.choice([pid for pid in self.rig.pids() if pid != self.witness])

    def kill(self) -> None:
        self.killed.add(self.rig.kill(self.victim()))
        self.for_a_while(0.5)
        self.rig.start()
        self.rig.settle_in()

    def restart(self) -> None:
        self.rig.replace(self.victim())

    def restart_all(self) -> None:
        for pid in [pid for pid in self.rig.pids() if pid != self.witness]:
            self.rig.replace(pid)

    def stall(self) -> None:
        """A process that gets no time for a while."""
        pid = self.victim()
        os.kill(pid, signal.SIGSTOP)
        self.for_a_while(1.0)
        os.kill(pid, signal.SIGCONT)

    def store_away(self) -> None:
        with self.rig.store_away():
            self.for_a_while()

    def store_moved(self) -> None:
        store, elsewhere = self.rig.dir / "store.db", self.rig.dir / "elsewhere.db"
        store.rename(elsewhere)
        self.for_a_while(1.0)
        elsewhere.rename(store)

    def network(self) -> None:
        before = self.door.taken
        self.door.turn(self.chance.choice(("refuse", "full", "reset", "black_hole")))
        self.for_a_while(1.5)
        self.rig.anywhere += self.door.taken - before  # at the most: each can have been one call
        self.door.turn("open")

    def gemini(self) -> None:
        keys = [key for company in self.tokens.values() for _, key in company]
        for key in [*self.chance.sample(keys, 4), FALLBACK_KEY]:
            steps = [self.chance.choice(LASTING if self.chance.random() < 0.02 else STEPS)
                     for _ in range(self.chance.randint(3, 20))]
            self.rig.emulator.script(key, *steps)
        self.for_a_while(1.0)

    def repair(self) -> None:
        """What an administrator does: tokens that lost their status get it back, a used up one a higher limit."""
        for row in self.rig.sql("SELECT TokenID, Status FROM TokenMaster WHERE Status <> 'Active' OR CooldownUntil IS NOT NULL"):
            self.rig.ctl("token", "set-status", str(row["TokenID"]), "Active")
        [(limited, _)] = self.tokens["Epsilon"]
        [used] = self.rig.sql("SELECT TotalUsedTokens AS n FROM TokenUsageSummary WHERE TokenID = ?", limited) or [{"n": 0}]
        if used["n"] > self.limit * 0.9:
            self.limit += LIMITED
            self.rig.ctl("token", "set-limit", str(limited), str(self.limit))

    def drain(self) -> None:
        self.rig.ctl("outbox", "drain", check=False)


def memory(pid: int) -> tuple[int, int]:
    """What is the process's alone, in bytes: but for uploads; and of uploads, which are left out of a core dump (dd)."""
    of_uploads = {False: 0, True: 0}
    size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Anonymous":
            size = int(value.split()[0]) << 10
        elif name == "VmFlags":
            of_uploads["dd" in value.split()] += size
    return of_uploads[False], of_uploads[True]


def requests_of(rig: Rig, pid: int) -> int:
    return rig.sql("SELECT COUNT(*) AS n FROM TokenReservations WHERE ProcessID = ?", pid)[0]["n"]


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


@contextmanager
def what_to_do(rig: Rig, calls: Path) -> Iterator[None]:
    """Where it fails: what was left stays, and is named."""
    try:
        yield
    except BaseException:
        rig.own_directory = False
        say(f"FAILED. `make soak SECONDS={SECONDS:.0f} SEED={SEED}` plays the same faults again. Kept: {rig.dir} (store.db,"
            f" outbox.db, pool.log, error.log), {calls} (what Gemini answered). What to look for: tests/README.md, Faults")
        raise


def companies(rig: Rig) -> tuple[dict[str, list[tuple[int, str]]], dict[str, str]]:
    """Their tokens, with the API keys, and a client key for each."""
    tokens: dict[str, list[tuple[int, str]]] = {company: [] for company in COMPANIES}
    bearer = {}
    for company, count in COMPANIES.items():
        for n in range(count):
            key = f"key-of-{company.encode().hex()}-{n}"
            limit = ["--limit", str(LIMITED)] if company == "Epsilon" else []
            tokens[company].append((rig.token(company, key, *limit), key))
        bearer[company] = rig.ctl("client-key", "add", "--company", company).stdout.strip()
        rig.secrets.add(bearer[company])
    return tokens, bearer


def soak(rig: Rig, door: Door) -> None:
    tokens, bearer = companies(rig)
    witness = rig.pids()[0]
    rig.answers_get_lost = True
    faults = Faults(rig, door, witness, tokens)
    load = Load(rig, bearer)
    begun = time.monotonic()

    def until(end: float) -> None:
        while (now := time.monotonic() - begun) < end:
            faults.one()
            time.sleep(faults.chance.uniform(0, 1.0))
            if int(now) // 30 != int(time.monotonic() - begun) // 30:
                say(f"{now:.0f} s: {sum(load.outcomes.values())} requests, {dict(faults.done)}")

    try:
        warm = 0  # the most at several moments: a store that was moved away takes its connections' caches with it
        for look in range(1, LOOKS + 1):
            load.go.set()
            until(WARM_UP * look / LOOKS)
            load.pause()
            warm = max(warm, memory(witness)[0])
        served = requests_of(rig, witness)
        load.pause_between = 0.05
        load.go.set()
        until(SECONDS)
        load.pause()
        now, uploads = memory(witness)
        grown, served = now - warm, requests_of(rig, witness) - served
    finally:
        load.end()

    say(f"{dict(load.outcomes)}")
    say(f"{dict(faults.done)}")
    say(f"the witness had {warm >> 10} KiB in the warm-up, and {grown >> 10} KiB more after {served} requests;"
        f" {uploads >> 10} KiB beside them are kept for uploads")
    assert load.strange == [], load.strange[:20]
    lost = [rig.sent[row["RequestedBy"]] for row in
            rig.sql("SELECT DISTINCT RequestedBy FROM TokenReservations WHERE State = 'open'")]
    for sent in lost:
        assert sent.answer is None or sent.answer.code == "internal_error", "it was answered, and its reservation is open"
    say(f"{len(lost)} requests are unsettled because their process was killed")
    assert len(lost) <= len(faults.killed) * rig.workers
    rig.accounted(unsettled=lost)
    if not rig.is_sanitized():
        assert grown <= NOISE + A_REQUEST * served, f"memory grows: {grown} bytes in {served} requests"
        assert uploads <= UPLOADS, f"{uploads} bytes are kept for uploads"


def test_soak(make_rig: Callable[..., Rig], door: Door, tmp_path: Path) -> None:
    say(f"{SECONDS:.0f} s, seed {SEED}")
    rig = make_rig(fallback=True, processes=PROCESSES, base_url=door.url, env={
        "EXTRACT_AUTH_MODE": "bearer", "EXTRACT_AUTH_KEY_RATE": "0", "EXTRACT_STORE_QUERY_TIMEOUT": "500ms",
        "EXTRACT_GEMINI_TIMEOUT": "2s", "EXTRACT_GEMINI_CONNECT_TIMEOUT": "500ms", "EXTRACT_SERVER_DEADLINE": "20s",
        # what is freed goes back: a leak is then all that grows
        "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"})
    with what_to_do(rig, tmp_path / "calls.jsonl"):
        soak(rig, door)
