"""What only the embedded store has: a file, its locks, and what people do to it."""
from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import BUILD, PATIENCE, Emulator, Stack, eventually, refused, start_refused
from terminal import Terminal

MakeStack = Callable[..., Stack]
KEY = "AIzaSyFallback0123456789-_abc"
LOG_LINES = r" (INFO|WARNING|ERROR) "  # log entries go to standard error while the store is away


@contextmanager
def unreachable(stack: Stack) -> Iterator[None]:
    """Neither readers nor writers get into the store: as if another process recovered its log, and never ended."""
    with (stack.dir / "store.db-shm").open("r+b") as index:
        fcntl.lockf(index, fcntl.LOCK_EX, 3, 120)  # SQLite's locks for writing, checkpoints and recovery
        header = index.read(136)
        index.seek(0)
        index.write(bytes(len(header)))
        index.flush()
        yield
        index.seek(0)
        index.write(header)
        index.flush()


def test_neither_read_nor_written(make_stack: MakeStack, emulator: Emulator, pdf: bytes) -> None:
    stack = make_stack(env={"EXTRACT_STORE_QUERY_TIMEOUT": "1s"})
    stack.allowed_stderr = [LOG_LINES]
    stack.token()
    with unreachable(stack):
        refused(stack.get("/readyz"), "store_unavailable")
        refused(stack.post(pdf), "store_unavailable")
        assert stack.get("/healthz").status == 200
        assert stack.get("/metrics").status == 200
    eventually(lambda: stack.get("/readyz").json().get("store") == "reachable", "the store is back")
    assert stack.post(pdf).status == 200
    assert len(emulator.log()) == 1


@pytest.mark.parametrize("away", [False, True], ids=["replaced", "moved away first"])
def test_store_is_replaced(make_stack: MakeStack, emulator: Emulator, pdf: bytes, away: bool) -> None:
    """mv backup.db store.db while the pool runs: all processes go on with the backup, and it stays whole."""
    stack = make_stack(processes=3)
    stack.allowed_stderr = [r" WARNING .* the file of the embedded store was replaced"]  # said by the recorder itself
    stack.token(key="key-before")
    backup = stack.dir / "backup.db"
    stack.sql(f"VACUUM INTO '{backup}'")
    with closing(sqlite3.connect(backup, isolation_level=None)) as db:
        db.execute("UPDATE TokenMaster SET ApiKey = 'key-of-the-backup'")
    before = [stack.post(pdf) for _ in range(6)]
    if away:
        (stack.dir / "store.db").rename(stack.dir / "old.db")
    backup.rename(stack.dir / "store.db")
    # Nobody else opens the new file yet: the old one's log still lies beside it.
    eventually(lambda: stack.post(pdf).status == 200)
    for _ in range(20):
        assert stack.get("/readyz").json()["store"] == "reachable"
        assert stack.post(pdf).status == 200
    called = [call["key"] for call in emulator.log()]
    assert called == ["key-before"] * 6 + ["key-of-the-backup"] * (len(called) - 6)
    assert len(stack.sql("SELECT * FROM TokenUsageLogs")) == len(called) - 6
    stack.balanced()
    if away:  # what was used before is not lost
        with closing(sqlite3.connect(stack.dir / "old.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert {row[0] for row in db.execute("SELECT RequestID FROM TokenUsageLogs")} == {
                answer.json()["request_id"] for answer in before}


def test_store_is_removed(make_stack: MakeStack, pdf: bytes) -> None:
    """Nobody makes an empty store where one was; when the file is back, all is well."""
    stack = make_stack()
    stack.allowed_stderr = [LOG_LINES]
    stack.token()
    assert stack.post(pdf).status == 200
    (stack.dir / "store.db").rename(stack.dir / "elsewhere.db")
    refused(stack.post(pdf), "store_unavailable")
    refused(stack.get("/readyz"), "store_unavailable")
    assert not (stack.dir / "store.db").exists()
    (stack.dir / "elsewhere.db").rename(stack.dir / "store.db")
    assert stack.post(pdf).status == 200
    assert stack.get("/readyz").json()["store"] == "reachable"
    stack.balanced()


def test_store_in_a_missing_directory(tmp_path: Path, emulator: Emulator) -> None:
    """`extractctl migrate` could not help, and is not named."""
    missing = tmp_path / "missing"
    for command in (["check"], ["token", "list"], ["migrate"]):
        done = subprocess.run([str(BUILD / "extractctl"), *command], capture_output=True, text=True, timeout=PATIENCE,
                              env=os.environ | {"EXTRACT_STORE_PATH": str(missing / "store.db"),
                                                "EXTRACT_SERVER_STATE_DIR": str(tmp_path),
                                                "EXTRACT_SERVER_RUNTIME_DIR": str(tmp_path),
                                                "EXTRACT_GEMINI_BASE_URL": emulator.url})
        said = done.stdout + done.stderr
        assert done.returncode == 3, said
        assert f"the directory {missing} is missing" in said and "migrate" not in said
    assert f"the directory {missing} is missing" in start_refused(tmp_path, EXTRACT_STORE_PATH=str(missing / "store.db"))


@pytest.fixture
def fallback(make_stack: MakeStack, tmp_path: Path) -> Stack:
    """A stack with a fallback key and a token, that gives the store up quickly."""
    (tmp_path / "appSetting.txt").write_text(KEY + "\n")
    stack = make_stack(env={"EXTRACT_FALLBACK_KEY_FILE": str(tmp_path / "appSetting.txt"),
                            "EXTRACT_STORE_QUERY_TIMEOUT": "200ms"})
    stack.allowed_stderr = [LOG_LINES]
    stack.token(key="key-1")
    return stack


def test_drain_that_is_interrupted(fallback: Stack, pdf: bytes) -> None:
    """On a terminal it says how far it is; what it has replayed stays, and another run does the rest, each once."""
    with fallback.store_away():
        answers = [fallback.post(pdf) for _ in range(3)]
        assert {answer.status for answer in answers} == {200}
        fallback.stop_pool()  # which would replay them itself
        waiting = json.loads(fallback.ctl("outbox", "status", "--json").stdout)[0]["Waiting"]
        assert waiting >= 6
        terminal = Terminal(BUILD / "extractctl", "outbox", "drain", env=fallback.env | {
            "TERM": "xterm", "EXTRACT_STORE_QUERY_TIMEOUT": f"{PATIENCE:.0f}s"})
        try:
            terminal.read("replaying the outbox: 0 of ")  # with the log entries that wait, too
            terminal.type("\x03")
            terminal.read("interrupted, ends after this step")
        except BaseException:
            terminal.close()
            raise
    assert terminal.end()[0] == -signal.SIGINT
    terminal.close()
    assert "Replayed  Waiting  Records  Dead" in terminal.screen
    assert any("interrupted: what was replayed is in the store" in line for line in terminal.screen)
    left = json.loads(fallback.ctl("outbox", "status", "--json").stdout)[0]["Waiting"]
    assert left == waiting - 1
    done = json.loads(fallback.ctl("outbox", "drain", "--json").stdout)[0]
    assert (done["Replayed"] >= left, done["Waiting"]) == (True, 0)
    for answer in answers:
        assert len(fallback.sql("SELECT 1 FROM TokenUsageLogs WHERE RequestID = ?", answer.json()["request_id"])) == 1
    fallback.balanced()


def test_dead_entries_and_how_to_see_them(fallback: Stack) -> None:
    drained(fallback)
    fallback.stop_pool()
    for command in ("status", "drain"):
        with closing(sqlite3.connect(fallback.dir / "outbox.db", timeout=PATIENCE)) as outbox, outbox:
            outbox.execute("INSERT INTO OutboxDead (Kind, RequestID, Payload, CreatedAt, LastError)"
                           " VALUES ('settlement', 'r-1', '{}', 0, 'no')")
        said = fallback.ctl("outbox", command)
        query = re.search(r"^Next: .*: sqlite3 (\S+) '(.*)'\.$", said.stderr, re.M)
        assert query is not None, said.stderr
        with closing(sqlite3.connect(query[1])) as outbox:
            assert outbox.execute(query[2]).fetchone()[1:] == ("settlement", "r-1", "no")


def drained(stack: Stack) -> None:
    eventually(lambda: stack.get("/readyz").json()["outbox"]["waiting"] == 0, "the outbox is empty")
    assert stack.get("/readyz").json()["outbox"]["dead"] == 0


def test_damaged_store(fallback: Stack, emulator: Emulator, pdf: bytes) -> None:
    """A file that is no database any more is a store that is away: served by the fallback key, and nothing is lost."""
    assert fallback.post(pdf).status == 200
    store, good = fallback.dir / "store.db", fallback.dir / "good.db"
    store.rename(good)
    (fallback.dir / "garbage.db").write_bytes(b"no database" * 1000)
    (fallback.dir / "garbage.db").rename(store)
    answer = fallback.post(pdf)
    assert answer.status == 200, answer.body
    assert [call["key"] for call in emulator.log()] == ["key-1", KEY]
    assert fallback.get("/readyz").json()["store"] == "unreachable"
    assert store.read_bytes() == b"no database" * 1000
    good.rename(store)
    drained(fallback)
    assert fallback.sql("SELECT TokenSource FROM TokenUsageLogs WHERE RequestID = ?", answer.headers["X-Request-ID"]) \
        == [{"TokenSource": "fallback"}]
    assert fallback.post(pdf).status == 200
    assert [call["key"] for call in emulator.log()] == ["key-1", KEY, "key-1"]
    fallback.balanced()


def test_trigger_that_fails(fallback: Stack, pdf: bytes) -> None:
    """One of a DBA's: the settlement waits until it's gone, and is not taken for refused."""
    fallback.sql("CREATE TRIGGER broken AFTER INSERT ON TokenUsageLogs BEGIN SELECT ABS(-9223372036854775807 - 1); END")
    answer = fallback.post(pdf)
    assert answer.status == 200, answer.body
    status = fallback.get("/readyz").json()["outbox"]
    assert (status["waiting"], status["dead"]) == (1, 0)
    fallback.sql("DROP TRIGGER broken")
    drained(fallback)
    assert len(fallback.sql("SELECT 1 FROM TokenUsageLogs WHERE RequestID = ?", answer.headers["X-Request-ID"])) == 1
    fallback.balanced()


def test_company_is_folded_whole(make_stack: MakeStack, pdf: bytes) -> None:
    """As Unicode folds, not character by character; SQL Server does the latter."""
    stack = make_stack()
    stack.token("MÜLLER-ß")
    assert stack.post(pdf, "müller-SS").status == 200
    assert stack.sql("SELECT CompanyID FROM TokenUsageLogs") == [{"CompanyID": "MÜLLER-ß"}]
