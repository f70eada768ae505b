"""The store on SQL Server: a server that dies, is slow, deadlocks, breaks off; texts; many processes at once.

What needs faults runs over a tests/tds_server of its own, the rest also over a live server where the environment
names one (conftest.py).
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import BUILD, PATIENCE, ROOT, Answer, Emulator, SqlServer, Stack, eventually, live_server, refused
from tds_client import Connection, SqlError, run_script
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
    time.sleep(0.5)  # so that the outage is met by some
    tds.start()
    answers = [f.result() for f in first + second]

    def one_by_one() -> bool:  # until each of the two processes has found its store again
        answers.extend(stack.post(pdf) for _ in range(10))
        rows = stack.sql("SELECT ProcessID, MAX(ReservationID) AS Newest FROM TokenReservations GROUP BY ProcessID")
        return all(a.status == 200 for a in answers[-10:]) and len(rows) == 2

    eventually(one_by_one, "the pool has found its store again")
    for answer in answers:
        if answer.status != 200:
            refused(answer, answer.code)
            assert answer.code in ("store_unavailable", "overloaded")
    assert sum(a.status == 200 for a in answers) > 10
    settled(stack, answers, unserved={a.headers["X-Request-ID"] for a in answers if a.status != 200})


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
        assert tds.control(do="disconnect")["disconnected"] > 0
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


def test_wrong_password(make: MakeStack, tds: TdsServer, tmp_path: Path) -> None:
    stack = make()
    (tmp_path / "wrong").write_text("not-this-one\n")
    before = tds.control(do="state")["logins"]
    begin = time.monotonic()
    done = start(stack, EXTRACT_STORE_PASSWORD_FILE=str(tmp_path / "wrong"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "login" in done.stderr.lower() and "not-this-one" not in done.stderr and len(done.stderr.splitlines()) <= 2
    assert tds.control(do="state")["logins"] - before <= 2 and time.monotonic() - begin < 20


@pytest.mark.parametrize("env, works", [
    ({}, True),
    ({"EXTRACT_STORE_CA_FILE": "system"}, False),
    ({"EXTRACT_STORE_CA_FILE": "{tls}/bad.pem"}, False),
    ({"EXTRACT_STORE_CA_FILE": "system", "EXTRACT_STORE_ENCRYPT": "off"}, True),
])
def test_certificate(make: MakeStack, tds: TdsServer, env: dict[str, str], works: bool) -> None:
    stack = make()
    done = start(stack, **{name: value.format(tls=tds.directory / "tls") for name, value in env.items()})
    assert done.returncode == (0 if works else 3), done
    assert works or len(done.stderr.splitlines()) <= 2


def test_certificate_of_another(make: MakeStack, tds: TdsServer) -> None:
    """Signed by whom we trust, but for another host."""
    stack = make()
    tds.control(do="certificate", which="bad")
    assert start(stack).returncode == 3
    assert start(stack, EXTRACT_STORE_CA_FILE=str(tds.directory / "tls/bad.pem")).returncode == 3
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
    done = start(stack, EXTRACT_STORE_ENCRYPT="require")
    assert done.returncode == 3 and len(done.stderr.splitlines()) <= 2


def test_nobody_listens(make: MakeStack) -> None:
    stack = make()
    begin = time.monotonic()
    done = start(stack, EXTRACT_STORE_SERVER="127.0.0.1:1")
    assert done.returncode == 3 and len(done.stderr.splitlines()) <= 2
    assert "127.0.0.1:1" in done.stderr and time.monotonic() - begin < 20


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
    stack = anywhere(processes=3, env={"EXTRACT_SERVER_QUEUE": "256", "EXTRACT_GEMINI_RESERVE_TOKENS": "8000",
                                       "EXTRACT_STORE_QUERY_TIMEOUT": "30s"})
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
         "100% [x] _ {}", "\\n\\u0041", "e\u0301"]


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
    for by, column, value in (("day", "Day", row["CreatedAt"][:10]), ("branch", "Branch", "Berlin"),
                              ("user", "RequestedBy", "anna"), ("token", "TokenID", token)):
        [usage] = show("usage", "--by", by)
        assert (usage[column], usage["Requests"], usage["RequestCount"]) == (value, 2, 2)
    assert {r["StatusCode"] for r in show("retries")} == {503, 404}
    assert [r["RequestID"] for r in show("logs", "--errors")] == [answers[2].headers["X-Request-ID"]]
    assert show("reservations") == []
    assert stack.ctl("check", check=False).returncode in (0, 1)


# ---- the setup script, on a live server ----


@pytest.fixture
def live() -> SqlServer:
    server = live_server()
    if server is None:
        pytest.skip("needs a live server: MSSQL_SERVER")
    return server


def scripts() -> list[Path | None]:
    return [None, *sorted((ROOT / "tests/mssql").glob("old_*.sql"))]


def schema(connection: Connection) -> list[tuple[Any, ...]]:
    """All that the script makes, as far as any server tells."""
    rows = connection.rows("SELECT TABLE_NAME, COLUMN_NAME, DATA_TYPE, CHARACTER_MAXIMUM_LENGTH, IS_NULLABLE, COLUMN_DEFAULT"
                           " FROM INFORMATION_SCHEMA.COLUMNS WHERE TABLE_SCHEMA = 'dbo'"
                           " ORDER BY TABLE_NAME, ORDINAL_POSITION")
    routines = connection.rows("SELECT ROUTINE_NAME FROM INFORMATION_SCHEMA.ROUTINES ORDER BY ROUTINE_NAME")
    return [tuple(r.values()) for r in rows + routines]


def counts(connection: Connection) -> dict[str, int]:
    tables = [r["TABLE_NAME"] for r in connection.rows(
        "SELECT TABLE_NAME FROM INFORMATION_SCHEMA.TABLES WHERE TABLE_TYPE = 'BASE TABLE' AND TABLE_SCHEMA = 'dbo'")]
    return {t: connection.rows(f"SELECT COUNT(*) AS n FROM dbo.[{t}]")[0]["n"] for t in tables}


@pytest.mark.parametrize("old", scripts(), ids=lambda path: path.stem if path else "new")
def test_setup_script_twice(live: SqlServer, tmp_path: Path, old: Path | None) -> None:
    """On a new database, and over each kind of old one: it runs, loses nothing, and the second time changes nothing."""
    with closing(live.connect(live.database(tmp_path))) as connection:
        if old is not None:
            run_script(connection, old)
        before = counts(connection)
        run_script(connection, ROOT / "sql/setup_database.sql")
        first = schema(connection), counts(connection)
        run_script(connection, ROOT / "sql/setup_database.sql")
        assert (schema(connection), counts(connection)) == first
        for table, count in before.items():
            assert first[1][table] >= count or table == "TokenUsageSummary", f"{table} has lost rows"
        [sums] = connection.rows("""SELECT COUNT(*) AS n FROM TokenUsageSummary s WHERE s.TotalUsedTokens <>
            (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageLogs u WHERE u.TokenID = s.TokenID) +
            (SELECT COALESCE(SUM(TotalTokensUsed), 0) FROM TokenUsageMonthly m WHERE m.TokenID = s.TokenID)""")
        assert sums["n"] == 0
    live.drop(tmp_path)


def test_old_database_serves(live: SqlServer, make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    """The service upgrades an old database when it starts, and extracts with a token that was in it."""
    for old in sorted((ROOT / "tests/mssql").glob("old_*.sql")):
        directory = Path(tempfile.mkdtemp(prefix="extract-stack-"))
        with closing(live.connect(live.database(directory))) as connection:
            run_script(connection, old)
            connection.query("INSERT INTO TokenMaster (CompanyID, ApiKey, Status) VALUES ('NT047-old', 'key-old', 'Active')")
        stack = make_stack(sql_server=live, directory=directory)
        answer = stack.post(pdf, "NT047-old")
        assert answer.status == 200, (old.name, answer.body)
        stack.balanced()


# ---- rights, on SQL Server itself ----

# (statement, is it allowed) for a login that is a member of extract_app and of nothing else
RIGHTS = [
    ("EXEC dbo.usp_Ping", True),
    ("EXEC dbo.usp_SchemaVersion", True),
    ("EXEC dbo.usp_ExpireReservations", True),
    ("EXEC dbo.usp_RecordLogs @Entries = N'[]', @Attempts = N'[]'", True),
    ("EXEC dbo.usp_AcquireTokens @Items = N'[]'", True),
    ("EXEC dbo.usp_SettleUsage @Items = N'[]'", True),
    *[(f"SELECT COUNT(*) FROM dbo.{name}", False) for name in (
        "TokenMaster", "TokenUsageLogs", "TokenUsageSummary", "TokenUsageMonthly", "TokenReservations", "ApplicationLogs",
        "RetryAttempts", "ClientKeys", "IdempotencyKeys", "AuditLog", "vw_TokenStatus")],
    ("DELETE FROM dbo.ApplicationLogs", False),
    ("UPDATE dbo.TokenMaster SET Status = 'Active'", False),
    ("EXEC dbo.usp_AddToken @Actor = N'x', @CompanyID = N'x', @CompanyName = NULL, @Provider = NULL, @ApiKey = N'x',"
     " @TotalTokenLimit = NULL, @Threshold = NULL", False),
    ("CREATE TABLE dbo.Mine (a INT)", False),
    ("DROP PROCEDURE dbo.usp_Ping", False),
]


@pytest.fixture
def app_login(live: SqlServer, tmp_path: Path) -> Iterator[tuple[str, str, str, Path]]:
    """A database with schema and data, and a login that may do what extract_app may: database, name, password, its file."""
    if os.environ.get("MSSQL_RIGHTS", "yes") == "no":
        pytest.skip("MSSQL_RIGHTS=no: this server has no ownership chaining")
    name, password = f"app_{uuid.uuid4().hex[:10]}", f"Aa1!{uuid.uuid4().hex}"
    database = live.database(tmp_path)
    with closing(live.connect(database)) as sa:
        run_script(sa, ROOT / "sql/setup_database.sql")
        sa.query(f"CREATE LOGIN {name} WITH PASSWORD = N'{password}'")
        sa.query(f"CREATE USER {name} FOR LOGIN {name}")
        sa.query(f"ALTER ROLE extract_app ADD MEMBER {name}")
    (tmp_path / "password").write_text(password + "\n")
    yield database, name, password, tmp_path / "password"
    live.drop(tmp_path)
    with closing(live.connect()) as sa:
        sa.query(f"DROP LOGIN {name}")


def test_rights(live: SqlServer, app_login: tuple[str, str, str, Path]) -> None:
    database, name, password, _ = app_login
    with closing(Connection(live.address.replace("localhost", "127.0.0.1"), name, password, database)) as app:
        for statement, allowed in RIGHTS:
            try:
                app.query(statement)
                assert allowed, statement
            except SqlError as error:
                assert not allowed, f"{statement}: {error}"
                assert error.number in (229, 262, 3701, 2760, 15247, 297), f"{statement}: {error}"


def test_serves_with_the_rights_of_extract_app(live: SqlServer, app_login: tuple[str, str, str, Path], emulator: Emulator,
                                               make_stack: MakeStack, pdf: bytes) -> None:
    """Ownership chaining is all that lets the procedures at the tables."""
    database, name, _, password_file = app_login
    stack = make_stack(sql_server=live, env={"EXTRACT_STORE_DATABASE": database, "EXTRACT_STORE_USER": name,
                                             "EXTRACT_STORE_PASSWORD_FILE": str(password_file)})
    with closing(live.connect(database)) as sa:
        sa.query("EXEC dbo.usp_AddToken @Actor = N'tests', @CompanyID = N'NT047', @CompanyName = NULL, @Provider = NULL,"
                 " @ApiKey = N'key-of-the-test', @TotalTokenLimit = NULL, @Threshold = NULL")
        assert stack.post(pdf).status == 200
        [row] = sa.rows("SELECT COUNT(*) AS n FROM TokenUsageLogs")
        assert row["n"] == 1
