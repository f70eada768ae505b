"""The store on SQL Server: a server that dies, is slow, deadlocks, breaks off; texts; many processes at once.

What needs faults runs over a tests/tds_server of its own, the rest also over a live server where the environment
names one (conftest.py).
"""
from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import (BUILD, PATIENCE, Answer, Emulator, SqlServer, Stack, eventually, keeps_escapes, live_server,
                      refused)
from tds_process import TdsServer

MakeStack = Callable[..., Stack]
LOG_LINES = r"^\S+Z (INFO|WARNING|ERROR|CRITICAL) "  # log entries go to standard error while the store is away


@pytest.fixture
def tds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TdsServer]:
    with TdsServer(tmp_path_factory.mktemp("tds"), "on", app_user="app") as server:
        yield server


@pytest.fixture
def make(tds: TdsServer, make_stack: MakeStack) -> MakeStack:
    """A stack over the fixture's server, which outlives it."""
    def start(**settings: Any) -> Stack:
        stack = make_stack(sql_server=SqlServer.of(tds), **settings)
        stack.allowed_stderr = [LOG_LINES]
        return stack
    return start


@pytest.fixture
def anywhere(tds: TdsServer, make_stack: MakeStack) -> MakeStack:
    """A stack over the live server where there is one, else over the fixture's."""
    def start(**settings: Any) -> Stack:
        stack = make_stack(sql_server=live_server() or SqlServer.of(tds), **settings)
        stack.allowed_stderr = [LOG_LINES]
        return stack
    return start


def settled(stack: Stack, answers: list[Answer], unserved: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Each success has one usage row with its tokens, and nobody else has one. What is still reserved belongs to requests
    that were refused because the answer to their acquire was lost: it is held until it expires."""
    successes = {a.headers["X-Request-ID"]: a.json()["usage"]["total_tokens"] for a in answers if a.status == 200}
    stack.rows("SELECT RequestID FROM TokenUsageLogs", count=len(successes))
    rows = stack.sql("SELECT RequestID, TotalTokensUsed, RequestCount FROM TokenUsageLogs")
    assert {r["RequestID"]: r["TotalTokensUsed"] for r in rows} == successes
    assert len(rows) == len(successes) and {r["RequestCount"] for r in rows} <= {1}
    held = "SELECT RequestID FROM TokenReservations WHERE State = 'open'"
    eventually(lambda: {r["RequestID"] for r in stack.sql(held)} <= unserved, "nothing else is reserved any more")
    [total] = stack.sql("SELECT SUM(TotalUsedTokens) AS used FROM TokenUsageSummary")
    assert total == {"used": sum(successes.values())}
    stack.balanced()


# ---- the server goes away ----


def test_server_killed_and_restarted(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor,
                                     pdf: bytes) -> None:
    """In the middle of two hundred extractions. What was answered is settled, once; who was refused was told why."""
    stack = make(processes=2, env={"EXTRACT_STORE_QUERY_TIMEOUT": "1s", "EXTRACT_SERVER_QUEUE": "256"})
    for _ in range(4):
        stack.token()
    first = [crowd.submit(stack.post, pdf) for _ in range(100)]
    eventually(lambda: len(stack.sql("SELECT 1 AS x FROM TokenUsageLogs")) > 10)
    tds.kill()
    second = [crowd.submit(stack.post, pdf) for _ in range(50)]
    eventually(lambda: any(f.done() and f.result().status == 503 for f in second), "the outage is met by some")
    tds.start()
    answers = [f.result() for f in first + second]
    [outage] = stack.sql("SELECT MAX(ReservationID) AS id FROM TokenReservations")

    def found_again() -> bool:  # by each of the two processes
        answers.extend(crowd.map(lambda _: stack.post(pdf), range(20)))
        rows = stack.sql("SELECT ProcessID, MAX(ReservationID) AS id FROM TokenReservations GROUP BY ProcessID")
        return sum(r["id"] > outage["id"] for r in rows) == 2

    eventually(found_again, "the pool has found its store again")
    for answer in answers:
        if answer.status != 200:
            refused(answer, answer.code)
            assert answer.code in ("store_unavailable", "overloaded")
    assert sum(a.status == 200 for a in answers) > 10
    last = list(crowd.map(lambda _: stack.post(pdf), range(50)))
    assert [a.json() for a in last if a.status != 200] == [], "once each process has its store again, nobody is refused"
    settled(stack, answers + last, unserved={a.headers["X-Request-ID"] for a in answers if a.status != 200})


def test_login_after_an_outage_is_waited_for(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor,
                                             pdf: bytes) -> None:
    """The server is back, and the first login is under way: whoever comes now is served by it, or by the next."""
    stack = make(env={"EXTRACT_SERVER_THREADS": "32"})
    stack.token()
    answers = [stack.post(pdf)]
    tds.kill()
    refused(stack.post(pdf), "store_unavailable")
    tds.start()
    tds.control(do="logins", seconds=0.3)
    probe = crowd.submit(lambda: eventually(lambda: stack.get("/readyz").status == 200))
    eventually(lambda: tds.control(do="state")["logins"] > 0)
    answers += crowd.map(lambda _: stack.post(pdf), range(40))
    probe.result()
    assert [a.status for a in answers] == [200] * 41
    settled(stack, answers)


def test_one_login_may_break(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    """While a server starts, or is told to end all sessions: that is no outage yet."""
    stack = make(env={"EXTRACT_STORE_POOL_SIZE": "1"})
    stack.token()
    answers = [stack.post(pdf)]
    for _ in range(3):
        eventually(lambda: stack.get("/readyz").status == 200)
        tds.control(do="logins", refuse=17142, times=1)
        tds.control(do="disconnect")
        answers.append(stack.post(pdf))
    assert [a.status for a in answers] == [200] * 4
    settled(stack, answers)


def test_absent_server_is_not_overrun(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor,
                                      pdf: bytes) -> None:
    """All requests are refused, and few logins tried: one at a time, and with pauses."""
    stack = make(env={"EXTRACT_STORE_QUERY_TIMEOUT": "2s", "EXTRACT_STORE_POOL_SIZE": "64", "EXTRACT_SERVER_THREADS": "32",
                      "EXTRACT_SERVER_QUEUE": "256"})
    stack.token()

    def all_are_refused() -> None:
        for answer in crowd.map(lambda _: stack.post(pdf), range(120)):
            refused(answer, "store_unavailable")

    tds.control(do="logins", refuse=17142)  # it says no at once
    tds.control(do="disconnect")
    all_are_refused()
    assert 1 <= tds.control(do="state")["refused"] < 60

    host, _, port = tds.address.rpartition(":")
    tds.kill()
    with socket.create_server((host, int(port)), backlog=256) as silent:  # it takes connections and says nothing
        silent.setblocking(False)
        taken: list[socket.socket] = []

        def logins() -> int:
            with suppress(BlockingIOError):
                while True:
                    taken.append(silent.accept()[0])
            return len(taken)

        eventually(lambda: stack.get("/readyz").status == 503 and logins(), "one login is under way, or was")
        all_are_refused()
        assert logins() < 30
        for connection in taken:
            connection.close()
    tds.start()
    eventually(lambda: stack.post(pdf).status == 200)


def test_settlement_waits_for_the_server(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor,
                                         pdf: bytes) -> None:
    stack = make(env={"EXTRACT_STORE_QUERY_TIMEOUT": "500ms"})
    stack.token("NT047", "key-of-the-test")
    emulator.script("key-of-the-test", {"hold": True})
    future = crowd.submit(stack.post, pdf)
    emulator.wait(held=1)
    tds.kill()
    emulator.release()
    answer = future.result()
    assert answer.status == 200
    refused(stack.get("/readyz"), "store_unavailable")
    tds.start()
    settled(stack, [answer])
    assert stack.get("/readyz").json()["store"] == "reachable"


def test_restarted_between_requests(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    stack = make()
    stack.token()
    answers = [stack.post(pdf)]
    for _ in range(3):
        tds.stop()
        tds.start()
        eventually(lambda: stack.get("/readyz").status == 200)
        answers.append(stack.post(pdf))
    assert [a.status for a in answers] == [200] * 4
    settled(stack, answers)


def test_kept_connections_die(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor,
                              pdf: bytes) -> None:
    """A firewall forgets them, an administrator ends them: no client hears of it."""
    stack = make()
    stack.token()
    answers = list(crowd.map(lambda _: stack.post(pdf), range(8)))
    for _ in range(3):
        eventually(lambda: stack.get("/readyz").status == 200 and tds.control(do="disconnect")["disconnected"] > 0)
        answers += crowd.map(lambda _: stack.post(pdf), range(4))
    assert [a.status for a in answers] == [200] * 20
    settled(stack, answers)


def test_slow_server(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """store.query_timeout ends the wait; pages that need no store do not wait at all."""
    stack = make(env={"EXTRACT_STORE_QUERY_TIMEOUT": "1s"})
    stack.token()
    assert stack.post(pdf).status == 200
    tds.control(do="fault", kind="slow", seconds=60, times=1000)
    begin = time.monotonic()
    futures = [crowd.submit(stack.post, pdf) for _ in range(8)]
    assert stack.get("/healthz").status == 200 and stack.get("/metrics").status == 200
    for future in futures:
        refused(future.result(), "store_unavailable")
    took = time.monotonic() - begin
    assert 0.9 < took < 6, "a call is repeated once where its outcome is unknown"
    tds.control(do="reset")
    eventually(lambda: stack.post(pdf).status == 200)
    assert len(emulator.log()) == 2, "nothing was spent without a reservation"
    stack.balanced()


def test_full_server(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    stack = make()
    stack.token()
    tds.control(do="fault", kind="error", procedure="usp_AcquireTokens", number=9002, times=100)
    refused(stack.post(pdf), "storage_full")
    assert emulator.log() == []


def test_missing_procedure(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    stack = make()
    stack.token()
    tds.control(do="fault", kind="error", procedure="usp_AcquireTokens", number=2812, times=100)
    answer = stack.post(pdf)
    assert answer.status in (500, 503) and b"usp_" not in answer.body
    entry = stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ?", answer.headers["X-Request-ID"])[-1]
    assert "extractctl migrate" in entry["Exception"]


def test_connection_after_an_unknown_error(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    """It may have a transaction open: nobody uses it again. What is known leaves nothing behind."""
    stack = make(env={"EXTRACT_STORE_POOL_SIZE": "1"})
    stack.token()
    for number, code, logins in ((547, "internal_error", 0), (1205, "", 0), (8134, "internal_error", 1)):
        stack.rows("SELECT 1 AS x FROM ApplicationLogs WHERE RequestID = ?", stack.post(pdf).headers["X-Request-ID"])
        before = tds.control(do="state")["logins"]
        tds.control(do="fault", kind="error", procedure="usp_AcquireTokens", number=number)
        answer = stack.post(pdf)
        assert answer.status == 200 if not code else refused(answer, code)
        stack.rows("SELECT 1 AS x FROM ApplicationLogs WHERE RequestID = ?", answer.headers["X-Request-ID"])
        assert tds.control(do="state")["logins"] - before == logins, number


# ---- answers get lost ----


@pytest.mark.parametrize("procedure", ["usp_AcquireTokens", "usp_SettleUsage"])
@pytest.mark.parametrize("kind", ["drop_before", "drop_mid_result", "drop_after_commit"])
def test_lost_answer(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes, procedure: str, kind: str) -> None:
    """Whatever the server did before the connection broke: it is done once, and the client is served."""
    stack = make()
    stack.token()
    for times in (1, 2):
        tds.control(do="fault", kind=kind, procedure=procedure, times=times)
        answer = stack.post(pdf)
        assert answer.status == 200
    eventually(lambda: len(stack.sql("SELECT 1 AS x FROM TokenReservations WHERE State = 'settled'")) == 2)
    assert len(stack.sql("SELECT 1 AS x FROM TokenReservations")) == len(stack.sql("SELECT 1 AS x FROM TokenUsageLogs")) \
        == len(emulator.log()) == 2
    stack.balanced()


@pytest.mark.parametrize("fault", [{"kind": "drop_mid_result"}, {"kind": "drop_after_commit"}, {"kind": "slow", "seconds": 60}],
                         ids=lambda fault: fault["kind"])
def test_reservation_that_nobody_heard_of_is_released(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes,
                                                      fault: dict[str, Any]) -> None:
    """Each answer to the acquire is lost: the outbox releases what it has reserved, or keeps it from reserving later."""
    stack = make(env={"EXTRACT_STORE_QUERY_TIMEOUT": "1s"})
    stack.token()
    tds.control(do="fault", procedure="usp_AcquireTokens", times=1000, **fault)
    answer = stack.post(pdf, headers={"Idempotency-Key": "k"})
    refused(answer, "store_unavailable")
    tds.control(do="reset")
    [row] = stack.rows("SELECT State, EstimatedTokens, ClosedAt FROM TokenReservations WHERE RequestID = ? AND State = 'released'",
                       answer.headers["X-Request-ID"])
    assert row["ClosedAt"] is not None and (row["EstimatedTokens"] > 0) == (fault["kind"] != "slow")
    assert stack.sql("SELECT ReservedTokens FROM TokenUsageSummary") == [{"ReservedTokens": 0}]
    assert emulator.log() == []
    assert stack.post(pdf, headers={"Idempotency-Key": "k"}).status == 200, "and the key is free"
    stack.balanced()


def test_what_is_done_at_the_end_is_logged(make: MakeStack, tds: TdsServer) -> None:
    """A process is told to stop while reservations expire: that they have stands in the log, like all else."""
    stack = make()
    token_id = stack.token()
    stack.stop_pool()
    stack.socket.unlink()
    stack.sql("INSERT INTO TokenReservations (RequestID, Sequence, TokenID, CompanyID, CreatedAt, ExpiresAt)"
              " VALUES ('lost', 1, ?, 'NT047', '2026-01-01 00:00:00', '2026-01-01 00:03:00')", token_id)
    tds.control(do="fault", kind="slow", procedure="usp_ExpireReservations", seconds=1)
    stack.start_pool()
    eventually(lambda: tds.control(do="state")["waiting"] == [], "reservations are being expired")
    stack.stop_pool()
    assert stack.sql("SELECT State FROM TokenReservations") == [{"State": "unsettled"}]
    assert stack.sql("SELECT LogLevel FROM ApplicationLogs WHERE Message = ?",
                     "1 reservations of ended processes are unsettled now") == [{"LogLevel": "WARNING"}]


@pytest.mark.parametrize("number", [1205, 9002, 8134])
def test_what_reserved_nothing_needs_no_release(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes,
                                                number: int) -> None:
    """The server says that it did nothing, or it was not even asked."""
    stack = make()
    stack.token()
    tds.control(do="fault", kind="error", number=number, procedure="usp_AcquireTokens", times=1000)
    assert stack.post(pdf).code in ("store_unavailable", "storage_full", "internal_error")
    tds.control(do="logins", refuse=18456)
    tds.control(do="disconnect")
    refused(stack.post(pdf), "store_unavailable")
    [outbox] = json.loads(stack.ctl("outbox", "status", "--json").stdout)
    assert outbox["Waiting"] == 0
    tds.control(do="reset")
    assert stack.sql("SELECT State FROM TokenReservations") == []


# ---- a token whose key is sealed: two procedures, one transaction ----


@pytest.fixture
def sealing(make: MakeStack, tmp_path: Path) -> Stack:
    """A stack whose keys are sealed."""
    (tmp_path / "seal.key").write_text(base64.b64encode(bytes(range(32))).decode() + "\n")
    (tmp_path / "seal.key").chmod(0o600)
    return make(env={"EXTRACT_SEAL_KEY_FILE": str(tmp_path / "seal.key"), "EXTRACT_STORE_QUERY_TIMEOUT": "2s"})


def one_sealed_token(stack: Stack) -> bool:
    [row] = stack.sql("SELECT ApiKey, Status FROM TokenMaster")
    audit = stack.sql("SELECT Action FROM AuditLog")
    return row["ApiKey"].startswith("sealed:v1:") and row["Status"] == "Active" and audit == [{"Action": "token added"}]


@pytest.mark.parametrize("procedure", ["usp_AddToken", "usp_ActivateToken"])
@pytest.mark.parametrize("fault", [{"kind": "drop_before"}, {"kind": "drop_mid_result"}, {"kind": "drop_after_commit"},
                                   {"kind": "error", "number": 1205}, {"kind": "error", "number": 547},
                                   {"kind": "error", "number": 8134}],
                         ids=lambda fault: str(fault.get("number", fault["kind"])))
def test_sealed_token_is_added_whole_or_not(sealing: Stack, tds: TdsServer, emulator: Emulator, pdf: bytes, procedure: str,
                                            fault: dict[str, Any]) -> None:
    tds.control(do="fault", procedure=procedure, times=1000, **fault)
    done = sealing.ctl("token", "add", "--company", "NT047", stdin="key-of-the-test\n", check=False)
    assert done.returncode != 0 and done.stdout == ""
    assert sealing.sql("SELECT TokenID FROM TokenMaster") == sealing.sql("SELECT AuditID FROM AuditLog") == []
    tds.control(do="reset")
    tds.control(do="fault", procedure=procedure, **fault)
    sealing.ctl("token", "add", "--company", "NT047", stdin="key-of-the-test\n", check=False)
    if fault.get("number") not in (547, 8134):  # nothing had happened, and it was done again
        assert one_sealed_token(sealing)
        assert sealing.post(pdf).status == 200
    else:
        assert sealing.sql("SELECT TokenID FROM TokenMaster") == []
    tds.control(do="reset")


def test_deadlocks(make: MakeStack, tds: TdsServer, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """One call of ten is a deadlock's victim: no client sees one, no row is lost or doubled."""
    stack = make(processes=2, env={"EXTRACT_SERVER_QUEUE": "256"})
    for _ in range(4):
        stack.token()
    tds.control(do="deadlocks", share=0.1, seed=11)
    answers = list(crowd.map(lambda _: stack.post(pdf), range(200)))
    assert {a.status for a in answers} == {200}
    assert tds.control(do="state")["deadlocks"] > 3
    tds.control(do="deadlocks", share=0)
    settled(stack, answers)
    stack.rows("SELECT 1 AS x FROM ApplicationLogs WHERE Message LIKE 'extracted:%'", count=200)
    assert len(stack.sql("SELECT 1 AS x FROM ApplicationLogs WHERE Message LIKE 'extracted:%'")) == 200


# ---- starting ----


def start(stack: Stack, **env: str) -> subprocess.CompletedProcess[str]:
    """extractctl, which opens the store as the service does."""
    return subprocess.run([str(BUILD / "extractctl"), "token", "list"], env=stack.env | env, capture_output=True, text=True,
                          timeout=PATIENCE)


def advice(stack: Stack, **env: str) -> str:
    """What extractctl says of a store that cannot be opened: one line, what is wrong and what to do."""
    done = start(stack, **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done
    return done.stderr


def test_wrong_password(make: MakeStack, tds: TdsServer, tmp_path: Path) -> None:
    stack = make()
    (tmp_path / "wrong").write_text("not-this-one\n")
    wrong = str(tmp_path / "wrong")
    said = advice(stack, EXTRACT_STORE_PASSWORD_FILE=wrong)
    assert "refuses login sa" in said and "18456" in said and "correct store.user and store.password_file" in said
    assert tds.control(do="state")["refused"] <= 2
    said += advice(stack, EXTRACT_STORE_ADMIN_USER="boss", EXTRACT_STORE_ADMIN_PASSWORD_FILE=wrong)
    assert "refuses login boss" in said and "correct store.admin_user and store.admin_password_file" in said
    assert "not-this-one" not in said


def test_login_that_may_not_be_used(make: MakeStack, tds: TdsServer) -> None:
    stack = make()
    for number, word in ((18470, "disabled"), (18486, "locked"), (18487, "expired"), (40615, "firewall")):
        tds.control(do="logins", refuse=number)
        said = advice(stack)
        assert word in said and str(number) in said and "password_file" not in said
    tds.control(do="logins", refuse=0)


def test_missing_database(make: MakeStack) -> None:
    said = advice(make(), EXTRACT_STORE_DATABASE="nowhere", EXTRACT_STORE_QUERY_TIMEOUT="500ms")
    assert "database nowhere" in said and "4060" in said and "correct store.database" in said


def test_connection_file(make: MakeStack, tmp_path: Path) -> None:
    """Advice names what stands in the file, where one is used."""
    stack = make()
    path, server = tmp_path / "DBConnection.txt", stack.env["EXTRACT_STORE_SERVER"].replace(":", ",")
    env = {f"EXTRACT_STORE_{name}": "" for name in ("SERVER", "DATABASE", "USER", "PASSWORD_FILE")}
    env["EXTRACT_STORE_CONNECTION_FILE"] = str(path)

    def told(**values: str) -> str:
        pairs = {"SERVER": server, "DATABASE": stack.env["EXTRACT_STORE_DATABASE"], "UID": "sa", "PWD": "x", "Encrypt": "yes"}
        path.write_text(";".join(f"{k}={v}" for k, v in (pairs | values).items()))
        return advice(stack, **env, EXTRACT_STORE_QUERY_TIMEOUT="500ms")

    password = Path(stack.env["EXTRACT_STORE_PASSWORD_FILE"]).read_text().rstrip()
    assert "correct UID and PWD in store.connection_file" in told()
    assert "correct SERVER in store.connection_file" in told(SERVER="127.0.0.1,1")
    assert "correct DATABASE in store.connection_file" in told(DATABASE="nowhere", PWD=password)


@pytest.mark.parametrize("env, fault", [
    ({}, ""),
    ({"EXTRACT_STORE_CA_FILE": "system"}, "store.ca_file (system)"),
    ({"EXTRACT_STORE_CA_FILE": "{tls}/bad.pem"}, "store.ca_file (/"),
    ({"EXTRACT_STORE_CA_FILE": "system", "EXTRACT_STORE_ENCRYPT": "off"}, ""),
    ({"EXTRACT_STORE_ENCRYPT": "request", "EXTRACT_STORE_CA_FILE": "{tls}/bad.pem"}, "store.ca_file (/"),
])
def test_certificate(make: MakeStack, tds: TdsServer, env: dict[str, str], fault: str) -> None:
    stack = make()
    env = {name: value.format(tls=tds.directory / "tls") for name, value in env.items()}
    if fault:
        said = advice(stack, **env)
        assert "certificate" in said and "not signed" in said and fault in said and "store.server" not in said
    else:
        assert start(stack, **env).returncode == 0


def test_certificate_of_another(make: MakeStack, tds: TdsServer) -> None:
    """Signed by whom we trust, but for another host."""
    stack = make()
    tds.control(do="certificate", which="bad")
    assert "not signed" in advice(stack)
    said = advice(stack, EXTRACT_STORE_CA_FILE=str(tds.directory / "tls/bad.pem"))
    assert "not for the name localhost" in said and "store.server" in said and "store.ca_file" not in said
    tds.control(do="certificate", which="good")
    assert start(stack).returncode == 0


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[TdsServer]:
    with TdsServer(tmp_path, "off") as server:
        yield server


def test_server_that_does_not_encrypt(plain: TdsServer, make_stack: MakeStack) -> None:
    stack = make_stack(sql_server=SqlServer.of(plain, "off"))
    stack.allowed_stderr = [LOG_LINES]
    assert start(stack).returncode == 0
    assert start(stack, EXTRACT_STORE_ENCRYPT="request").returncode == 0
    said = advice(stack, EXTRACT_STORE_ENCRYPT="require")
    assert "offers no TLS" in said and "store.encrypt" in said


def test_nobody_listens(make: MakeStack) -> None:
    stack = make()
    said = advice(stack, EXTRACT_STORE_SERVER="127.0.0.1:1")
    assert "127.0.0.1:1" in said and "Connection refused" in said and "correct store.server" in said
    said = advice(stack, EXTRACT_STORE_SERVER="no-such-host.invalid")
    assert "its name is not known" in said and "correct store.server" in said


# What an administrator may have in FreeTDS's own files, of any user's and under any name.
FOREIGN_CONF = """\
[global]
tds version = 4.2
encryption = off
client charset = ISO-8859-1
text size = 64
port = 1
[localhost]
host = 127.0.0.1
port = 1
[extract-fcgi-1.invalid.]
host = 127.0.0.1
port = 1
"""


def test_other_configurations_of_freetds(make: MakeStack, tmp_path: Path) -> None:
    """A freetds.conf of the host's changes nothing, whatever it says of the same names."""
    stack = make()
    company = "Ánh Dương " + "漢" * 70
    stack.token(company)
    for name in (".freetds.conf", "freetds.conf"):
        (tmp_path / name).write_text(FOREIGN_CONF)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/freetds.conf").write_text(FOREIGN_CONF)
    done = start(stack, HOME=str(tmp_path), FREETDSCONF=str(tmp_path / "freetds.conf"), FREETDS=str(tmp_path))
    assert done.returncode == 0 and company in done.stdout, done
    for name in ("TDSHOST", "TDSPORT", "TDSVER", "TDSDUMP", "TDSDUMPCONFIG"):
        refused_to_start = start(stack, **{name: "7.0"})
        assert refused_to_start.returncode == 2 and name in refused_to_start.stderr


def test_ten_processes_at_once(anywhere: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """On a database without schema: one sets up, nine find it done, none starts a second time."""
    stack = anywhere(processes=10, env={"EXTRACT_SERVER_THREADS": "4", "EXTRACT_STORE_QUERY_TIMEOUT": "30s"})
    started = stack.rows("SELECT Message FROM ApplicationLogs WHERE Message LIKE 'started: %'", count=10)
    assert sorted(int(row["Message"].split("pid=")[1].split()[0]) for row in started) == sorted(stack.pids())
    assert len(stack.sql("SELECT Version FROM SchemaVersion")) == 1
    stack.token()
    answers = list(crowd.map(lambda _: stack.post(pdf), range(40)))
    assert {a.status for a in answers} == {200}
    settled(stack, answers)


def test_without_the_right_to_set_up(make: MakeStack, tds: TdsServer, emulator: Emulator, pdf: bytes) -> None:
    """The application's own login may execute procedures and no more: an administrator's sets up."""
    stack = make()  # as sa
    stack.token()
    app = {"EXTRACT_STORE_USER": "app"}
    assert start(stack, **app).returncode == 0
    empty = f"empty_{uuid.uuid4().hex[:8]}"
    with closing(tds.connect()) as sa:
        sa.query(f"CREATE DATABASE {empty}")
    done = start(stack, **app, EXTRACT_STORE_DATABASE=empty)
    assert done.returncode != 0 and "extractctl migrate" in done.stderr
    admin = app | {"EXTRACT_STORE_DATABASE": empty, "EXTRACT_STORE_ADMIN_USER": "sa",
                   "EXTRACT_STORE_ADMIN_PASSWORD_FILE": stack.env["EXTRACT_STORE_PASSWORD_FILE"]}
    migrated = subprocess.run([str(BUILD / "extractctl"), "migrate"], env=stack.env | admin, capture_output=True, text=True,
                              timeout=PATIENCE)
    assert migrated.returncode == 0, migrated.stderr
    assert start(stack, **app, EXTRACT_STORE_DATABASE=empty).returncode == 0


def test_administrators_read_by_a_login_of_their_own(make: MakeStack, tds: TdsServer, tmp_path: Path, pdf: bytes) -> None:
    """One that cannot log in stops no extraction, and no start."""
    password = tmp_path / "reader-password"
    shutil.copy(tds.password_file, password)
    stack = make(env={"EXTRACT_STORE_READER_USER": "app", "EXTRACT_STORE_READER_PASSWORD_FILE": str(password)})
    stack.token()
    key = {"Authorization": f"Bearer {stack.ctl('client-key', 'add', '--admin').stdout.strip()}"}
    before = tds.control(do="state")["logins"]
    assert [row["CompanyID"] for row in stack.get("/admin/tokens", headers=key).json()["rows"]] == ["NT047"]
    assert tds.control(do="state")["logins"] == before + 1
    stack.stop_pool()
    password.write_text("wrong\n")
    stack.start_pool()
    stack.answers()
    answer = stack.get("/admin/tokens", headers=key)
    refused(answer, "store_unavailable")
    assert stack.post(pdf).status == 200
    [row] = stack.rows("SELECT Exception FROM ApplicationLogs WHERE RequestID = ?", answer.headers["X-Request-ID"])
    assert "refuses login app" in row["Exception"] and "store.reader_user and store.reader_password_file" in row["Exception"]
    password.unlink()
    assert "reader-password" in start(stack).stderr


def test_slow_queries_of_administrators_hold_up_nobody_else(make: MakeStack, tds: TdsServer, crowd: ThreadPoolExecutor,
                                                            pdf: bytes) -> None:
    """Two at a time run, some wait, the rest is told to come again; health and extractions go on."""
    stack = make(env={"EXTRACT_STORE_QUERY_TIMEOUT": "10s"})
    stack.token()
    key = {"Authorization": f"Bearer {stack.ctl('client-key', 'add', '--admin').stdout.strip()}"}
    assert stack.get("/admin/errors", headers=key).status == 200
    tds.control(do="fault", kind="slow", procedure="usp_ListTokens", seconds=60, times=2)
    slow = [crowd.submit(stack.get, "/admin/tokens", headers=key) for _ in range(2)]
    eventually(lambda: tds.control(do="state")["played"] == 2, "both are under way")
    others = [crowd.submit(stack.get, "/admin/errors", headers=key) for _ in range(40)]
    refusals = eventually(lambda: [o for o in others if o.done()] if sum(o.done() for o in others) >= 24 else None)
    assert [stack.get(path).status for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
    assert stack.post(pdf).status == 200
    assert not any(query.done() for query in slow)
    for answer in refusals:
        refused(answer.result(), "overloaded")
    assert {query.result().status for query in slow} <= {200, 503}
    assert sorted(o.result().status for o in others) == [200] * 16 + [503] * 24


# ---- one and sixteen tokens ----


@pytest.mark.parametrize("tokens", [1, 16])
def test_two_hundred_at_once(anywhere: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes,
                             tokens: int) -> None:
    stack = anywhere(processes=4, env={"EXTRACT_SERVER_QUEUE": "256", "EXTRACT_SERVER_THREADS": "16",
                                       "EXTRACT_SERVER_QUEUE_WAIT": "100s", "EXTRACT_STORE_POOL_SIZE": "4",
                                       "EXTRACT_STORE_QUERY_TIMEOUT": "60s"})
    for _ in range(tokens):
        stack.token()
    answers = list(crowd.map(lambda _: stack.post(pdf), range(200)))
    assert [a.json() for a in answers if a.status != 200] == []
    assert len({r["TokenID"] for r in stack.sql("SELECT TokenID FROM TokenUsageLogs")}) == tokens
    settled(stack, answers)


def test_limit_under_load(anywhere: MakeStack, emulator: Emulator, crowd: ThreadPoolExecutor, pdf: bytes) -> None:
    """Never more is reserved and used than the limit allows, by whichever process."""
    stack = anywhere(processes=3, env={"EXTRACT_SERVER_QUEUE": "256", "EXTRACT_SERVER_QUEUE_WAIT": "100s",
                                       "EXTRACT_GEMINI_RESERVE_TOKENS": "8000", "EXTRACT_STORE_QUERY_TIMEOUT": "60s"})
    stack.token("NT047", None, "--limit", "40000")
    watching, over = threading.Event(), []

    def watch() -> None:
        while not watching.wait(0.01):
            for row in stack.sql("SELECT TotalUsedTokens, ReservedTokens FROM TokenUsageSummary"):
                if row["TotalUsedTokens"] + row["ReservedTokens"] > 40000 and row["ReservedTokens"] > 8000:
                    over.append(row)

    watcher = crowd.submit(watch)
    answers = list(crowd.map(lambda _: stack.post(pdf), range(60)))
    watching.set()
    watcher.result()
    assert over == []
    assert {a.code for a in answers if a.status != 200} <= {"token_busy", "token_unavailable"}
    settled(stack, answers)


# ---- texts ----

TEXTS = ["Ánh Dương", "Jörg O'Neill", "東京 支店", "Ελλάδα", "Москва", "ירושלים", "القاهرة", "😀🧾 beyond", "a\U0010fffdz",
         "100% [x] _ {}", "e\u0301", *([] if keeps_escapes() else ["\\n\\u0041"])]


@pytest.mark.parametrize("text", TEXTS)
def test_any_script(text_stack: Stack, emulator: Emulator, pdf: bytes, text: str) -> None:
    company = f"{text} {uuid.uuid4().hex[:8]}"
    key = f"key-{uuid.uuid4().hex}"
    text_stack.token(company, key, "--company-name", text)
    emulator.script(key, {}, {"status": 404, "message": text})
    answer = text_stack.post(pdf, company, user=text, branch=text)
    assert answer.status == 200
    [row] = text_stack.sql("SELECT CompanyID, RequestedBy, Branch FROM TokenUsageLogs WHERE RequestID = ?",
                           answer.headers["X-Request-ID"])
    assert row == {"CompanyID": company, "RequestedBy": text, "Branch": text}
    refused(failed := text_stack.post(pdf, company, branch=""), "upstream_rejected")
    [entry] = text_stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND LogLevel = 'ERROR'",
                              failed.headers["X-Request-ID"])
    escaped = text.replace("\\", "\\\\")
    assert entry["Exception"].endswith(escaped) and f"company={company}".replace("\\", "\\\\") in entry["Message"]
    shown = json.loads(text_stack.ctl("logs", "--errors", "--request", failed.headers["X-Request-ID"], "--json").stdout)
    assert escaped in json.dumps(shown, ensure_ascii=False).replace("\\\\", "\\")
    [reservation] = text_stack.sql("SELECT Branch FROM TokenReservations WHERE RequestID = ?",
                                   failed.headers["X-Request-ID"])
    assert reservation == {"Branch": ""}
    assert company in text_stack.ctl("token", "list", "--company", company.upper()).stdout


@pytest.fixture(scope="module")
def text_stack(_emulator: Emulator, certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    live = live_server()
    tds = None if live else TdsServer(tmp_path_factory.mktemp("tds"), "on")
    stack = Stack(_emulator, certificate, sql_server=live or SqlServer.of(tds))  # type: ignore[arg-type]
    stack.allowed_stderr = [LOG_LINES]
    yield stack
    stack.balanced()
    stack.close()
    if tds is not None:
        tds.stop()


@pytest.mark.parametrize("length", [250, 100_000])
@pytest.mark.parametrize("character", ["x", "漢", "😀", "'"])
def test_long_texts(text_stack: Stack, emulator: Emulator, company: str, pdf: bytes, character: str, length: int) -> None:
    """What Gemini says at length is cut, but not by the store, and its Unicode stays whole."""
    key = f"key-{uuid.uuid4().hex}"
    text_stack.token(company, key)
    emulator.script(key, {"status": 404, "message": character * length})
    answer = text_stack.post(pdf, company)
    refused(answer, "upstream_rejected")
    [entry] = text_stack.rows("SELECT * FROM ApplicationLogs WHERE RequestID = ? AND LogLevel = 'ERROR'",
                              answer.headers["X-Request-ID"])
    said = entry["Exception"].removeprefix("HTTP 404 NOT_FOUND: ")
    assert set(said.rstrip("?")) == {character} and len(said) > 50


# ---- extractctl, all views ----


def test_views(anywhere: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    """Every command shows over SQL Server what it shows over the embedded store."""
    stack = anywhere()
    token = stack.token("NT047", "key-of-the-test", "--limit", "1000000")
    emulator.script("key-of-the-test", {}, {"status": 503}, {}, {"status": 404})
    answers = [stack.post(pdf), stack.post(pdf), stack.post(pdf)]
    assert [a.status for a in answers] == [200, 200, 502]
    stack.rows("SELECT 1 AS x FROM ApplicationLogs WHERE RequestID = ?", answers[2].headers["X-Request-ID"])
    stack.rows("SELECT 1 AS x FROM RetryAttempts", count=2)

    def show(*command: str) -> list[dict[str, Any]]:
        out = json.loads(stack.ctl(*command, "--json").stdout)
        return out if isinstance(out, list) else next(v for v in out.values() if isinstance(v, list))

    [row] = show("token", "list")
    assert (row["TokenID"], row["CompanyID"], row["ApiKey"], row["Status"], row["TotalTokenLimit"], row["ReservedTokens"]) \
        == (token, "NT047", "…test", "Active", 1000000, 0)
    assert row["CooldownUntil"] is None and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["CreatedAt"])
    for by, column, value in (("day", "Day", row["CreatedAt"][:10]), ("company", "CompanyID", "NT047"), ("branch", "Branch", "Berlin"),
                              ("user", "RequestedBy", "anna"), ("token", "TokenID", token)):
        [usage] = show("usage", "--by", by)
        assert (usage[column], usage["Requests"], usage["RequestCount"]) == (value, 2, 2)
    assert {r["StatusCode"] for r in show("retries")} == {503, 404}
    assert [r["RequestID"] for r in show("logs", "--errors")] == [answers[2].headers["X-Request-ID"]]
    assert show("reservations") == []
    assert stack.ctl("check", check=False).returncode in (0, 1)
