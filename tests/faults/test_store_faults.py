"""The store: away before, during and after a request; slow; answering errors; not heard. Both drivers, where both have it."""
from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import FALLBACK_KEY
from e2e.conftest import PATIENCE, Emulator, eventually, refused, start_refused
from rig import TOLD, USAGE, Rig
from tds_process import TdsServer

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"
IMPATIENT = {"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"}
stores = pytest.mark.parametrize("store", ["sqlite", "mssql"])


def keys(emulator: Emulator) -> list[str]:
    return [call["key"] for call in emulator.log()]


def fault(rig: Rig, kind: str, procedure: str, **more: Any) -> None:
    server(rig).control(do="fault", kind=kind, procedure=procedure, **more)


def server(rig: Rig) -> TdsServer:
    assert rig.sql_server is not None and rig.sql_server.tds is not None
    return rig.sql_server.tds


@contextmanager
def file_moved(rig: Rig) -> Iterator[None]:
    (rig.dir / "store.db").rename(rig.dir / "elsewhere.db")
    yield
    (rig.dir / "elsewhere.db").rename(rig.dir / "store.db")


@contextmanager
def server_killed(rig: Rig) -> Iterator[None]:
    server(rig).kill()
    try:
        yield
    finally:
        server(rig).start()


def away(rig: Rig, how: str) -> Any:
    return {"moved": file_moved, "killed": server_killed}.get(how, Rig.store_away)(rig)


def back(rig: Rig) -> None:
    """It has found its store again: after a server was gone, it does not try to log in all the time."""
    eventually(lambda: rig.get("/readyz").json().get("store") == "reachable", "the store is found again")


WAYS = pytest.mark.parametrize("store, how", [("sqlite", "locked"), ("sqlite", "moved"), ("mssql", "silent"),
                                              ("mssql", "killed")])


# ---- away ----


@WAYS
def test_away_before_acquire(make_rig: MakeRig, emulator: Emulator, store: str, how: str) -> None:
    rig = make_rig(store, env=IMPATIENT)
    rig.token(key=KEY)
    with away(rig, how):
        refused(rig.send(), "store_unavailable")
        eventually(lambda: rig.get("/readyz").status == 503, "it says that it is not ready")
    assert keys(emulator) == []
    back(rig)
    assert rig.send().status == 200
    rig.accounted()


@WAYS
def test_away_before_acquire_with_a_fallback(make_rig: MakeRig, emulator: Emulator, store: str, how: str) -> None:
    rig = make_rig(store, fallback=True, env=IMPATIENT)
    rig.token(key=KEY)
    emulator.script(FALLBACK_KEY, {}, {"status": 404}, {"close": "after_read"}, {}, {"usage": None})
    with away(rig, how):
        assert [rig.send().status for _ in range(4)] == [200, 502, 200, 200]
        assert rig.outbox_rows() == 8
    back(rig)
    assert rig.send().status == 200
    assert keys(emulator) == [FALLBACK_KEY] * 5 + [KEY]
    rig.accounted()


@WAYS
def test_away_between_acquire_and_settlement(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor,
                                             store: str, how: str) -> None:
    rig = make_rig(store, env=IMPATIENT)
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True}, {"hold": True, "close": "after_read"}, {"hold": True, "usage": None})
    answers = [crowd.submit(rig.send) for _ in range(3)]
    emulator.wait(held=3)
    with away(rig, how):
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
        assert rig.outbox_rows() == 3
    back(rig)
    rig.accounted()


@stores
def test_away_for_a_long_time(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, store: str) -> None:
    """Three processes, until forty requests have been through it; one of them ends meanwhile."""
    rig = make_rig(store, fallback=True, processes=3, env={**IMPATIENT, "EXTRACT_SERVER_THREADS": "4"})
    rig.token(key=KEY)
    emulator.script(KEY, *[{"hold": True}] * 12)
    before = [crowd.submit(rig.send) for _ in range(12)]
    emulator.wait(held=12)
    with rig.store_away():
        emulator.release()
        during = [crowd.submit(rig.send) for _ in range(28)]
        assert {answer.result(PATIENCE).status for answer in before + during} == {200}
        assert rig.outbox_rows() == 12 + 2 * 28
        rig.terminate(rig.pids()[0])
    rig.start()
    rig.settle_in()
    back(rig)
    assert rig.send().status == 200
    assert sorted(set(keys(emulator))) == [FALLBACK_KEY, KEY]
    rig.accounted()


@stores
def test_away_until_the_processes_end(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor,
                                      store: str) -> None:
    """SIGTERM in an outage: what was begun is finished and journalled, and the next start carries on with it."""
    rig = make_rig(store, fallback=True, processes=2, env=IMPATIENT)
    rig.token(key=KEY)
    emulator.script(KEY, *[{"hold": True}] * 4)
    emulator.script(FALLBACK_KEY, *[{"hold": True}] * 4)
    answers = [crowd.submit(rig.send) for _ in range(4)]
    emulator.wait(held=4)
    with rig.store_away():
        answers += [crowd.submit(rig.send) for _ in range(4)]
        emulator.wait(held=8)
        for process in rig.running.values():
            process.send_signal(signal.SIGTERM)
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
        rig.stop_pool()
        assert rig.outbox_rows() == 4 + 2 * 4
    rig.start_pool(2)
    assert rig.send().status == 200
    rig.accounted()


@pytest.mark.parametrize("procedure", ["usp_AcquireTokens", "usp_SettleUsage"])
def test_away_during_a_call_to_it(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, procedure: str) -> None:
    """The server ends while it has the call in hand, and undoes it."""
    rig = make_rig("mssql")
    rig.token(key=KEY)
    fault(rig, "slow", procedure, seconds=60, times=100)
    answer = crowd.submit(rig.send)
    eventually(lambda: server(rig).control(do="state")["calls"].get(procedure, 0) == 1)
    with server_killed(rig):
        if procedure == "usp_AcquireTokens":
            refused(answer.result(PATIENCE), "store_unavailable")
            assert emulator.log() == []
        else:
            assert answer.result(PATIENCE).status == 200
            assert rig.outbox_rows() == 1
    back(rig)
    rig.accounted()


def test_away_for_a_minute(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """Under load, until it is looked for but seldom. The outbox is replayed all the same when it is there again."""
    # The log entries of a minute come 64 at a time: on a busy machine that takes longer than IMPATIENT waits.
    rig = make_rig("mssql", fallback=True, processes=2,
                   env={"EXTRACT_STORE_QUERY_TIMEOUT": "2s", "EXTRACT_SERVER_THREADS": "4"})
    rig.token(key=KEY)
    emulator.script(FALLBACK_KEY, {"delay": 0.3}, repeat=True)
    served: list[int] = []

    def client() -> None:
        while (outbox := rig.outbox())["oldest_seconds"] < 60:
            assert outbox["usable"] and rig.send().status == 200
            served.append(outbox["waiting"])

    with server_killed(rig):
        assert rig.send().status == 200
        for one in [crowd.submit(client) for _ in range(4)]:
            one.result(4 * PATIENCE)
        assert rig.outbox_rows() == 2 * (len(served) + 1) and sorted(served)[-1] > 20
    back(rig)
    assert rig.send().status == 200
    eventually(lambda: rig.outbox_rows() == 0, "it is replayed")
    rig.accounted()


@stores
def test_away_for_good(make_rig: MakeRig, emulator: Emulator, tmp_path: Path, store: str) -> None:
    """The processes serve, and what was spent stands in the outbox, whole, also when they have ended. Where there is no server
    none starts: it says why and ends, and systemd tries again. (The store comes back in the end, for the account.)"""
    rig = make_rig(store, fallback=True, processes=2, env=IMPATIENT)
    rig.token(key=KEY)
    with away(rig, "locked" if store == "sqlite" else "killed"):
        assert [rig.send().status for _ in range(6)] == [200] * 6
        if store == "mssql":
            assert "cannot be reached" in start_refused(tmp_path, **rig.env)
        rig.stop_pool()
        assert rig.outbox_rows() == 2 * 6
        spent = [json.loads(row["Payload"]) for row in rig.in_outbox("SELECT Payload FROM Outbox WHERE Kind = 'settlement'")]
        for member, column in ((TOLD[name], USAGE[name]) for name in USAGE):
            assert sum(one[member] for one in spent) == sum(call["usage"].get(column, 0) for call in emulator.log())
    rig.start_pool(2)
    back(rig)
    assert rig.send().status == 200
    rig.accounted()


@stores
def test_away_between_two_tokens(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, store: str) -> None:
    """One is rate limited, the next cannot be had: what was spent on the first is written down all the same."""
    rig = make_rig(store, env=IMPATIENT)
    rig.token(key=KEY)
    emulator.script(KEY, {"text": "no JSON"}, {"hold": True, "status": 429, "retry_delay": "3600s"})
    answer = crowd.submit(rig.send)
    emulator.wait(held=1)
    with rig.store_away():
        emulator.release()
        refused(answer.result(PATIENCE), "store_unavailable", spent=True)
    rig.accounted()


# ---- slow ----


def test_slow_but_in_time(make_rig: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    rig = make_rig("mssql")
    rig.token()
    fault(rig, "slow", "*", seconds=0.1, times=1000)
    answers = [crowd.submit(rig.send) for _ in range(24)]
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    server(rig).control(do="reset")
    rig.accounted()


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("procedure", ["usp_AcquireTokens", "usp_SettleUsage"])
def test_slower_than_anyone_waits(make_rig: MakeRig, emulator: Emulator, procedure: str, times: int) -> None:
    """The call is cancelled, and made once more."""
    rig = make_rig("mssql", env=IMPATIENT)
    rig.token()
    fault(rig, "slow", procedure, seconds=60, times=times)
    answer = rig.send()
    server(rig).control(do="reset")
    if (procedure, times) == ("usp_AcquireTokens", 1000):
        refused(answer, "store_unavailable")
    else:
        assert answer.status == 200
    rig.accounted()


def test_long_transaction_of_somebody_else(make_rig: MakeRig, crowd: ThreadPoolExecutor) -> None:
    """A DBA's update that takes its time: within query_timeout everybody waits for it."""
    rig = make_rig(env={"EXTRACT_STORE_QUERY_TIMEOUT": "30s"})
    rig.token()
    with rig.store_away():
        answers = [crowd.submit(rig.send) for _ in range(8)]
        eventually(lambda: rig.metric("extract_upload_bytes_total") > 7 * 60_000)
        assert not any(answer.done() for answer in answers)
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    rig.accounted()


# ---- errors ----


@pytest.mark.parametrize("number, times, code", [
    (1205, 1, None), (1222, 1, None), (40613, 1, None), (1205, 50, "store_unavailable"),
    (40613, 50, "store_unavailable"), (9002, 50, "storage_full"), (1105, 50, "storage_full"), (50000, 50, "internal_error"),
])
def test_errors_to_acquires(make_rig: MakeRig, emulator: Emulator, number: int, times: int, code: str | None) -> None:
    rig = make_rig("mssql", env=IMPATIENT)
    rig.token()
    fault(rig, "error", "usp_AcquireTokens", number=number, times=times)
    answer = rig.send()
    if code is None:
        assert answer.status == 200
    else:
        refused(answer, code)
        assert emulator.log() == []
    server(rig).control(do="reset")
    assert rig.send().status == 200
    rig.accounted()


@pytest.mark.parametrize("number", [1205, 40613, 9002, 1105, 50000])
def test_errors_to_settlements(make_rig: MakeRig, emulator: Emulator, number: int) -> None:
    """Whatever it says: the settlement waits until it is taken."""
    rig = make_rig("mssql", env=IMPATIENT)
    rig.token()
    fault(rig, "error", "usp_SettleUsage", number=number, times=1000)
    assert [rig.send().status for _ in range(3)] == [200] * 3
    assert rig.outbox()["waiting"] == 3
    server(rig).control(do="reset")
    rig.accounted()


OVERFLOW = "SELECT ABS(-9223372036854775807 - 1)"  # SQLITE_ERROR: nobody's data is at fault


@pytest.mark.parametrize("when, code", [("BEFORE INSERT ON TokenReservations", "internal_error"),
                                        ("BEFORE UPDATE ON TokenUsageSummary", "internal_error")])
def test_trouble_in_the_embedded_store_with_acquires(make_rig: MakeRig, emulator: Emulator, when: str,
                                                     code: str) -> None:
    rig = make_rig()
    rig.token()
    assert rig.send().status == 200
    rig.sql(f"CREATE TRIGGER Broken {when} BEGIN {OVERFLOW}; END")
    refused(rig.send(), code)
    assert len(emulator.log()) == 1
    rig.sql("DROP TRIGGER Broken")
    assert rig.send().status == 200
    rig.accounted()


def test_trouble_in_the_embedded_store_with_settlements(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.token()
    rig.sql(f"CREATE TRIGGER Broken BEFORE INSERT ON TokenUsageLogs BEGIN {OVERFLOW}; END")
    assert [rig.send().status for _ in range(3)] == [200] * 3
    assert rig.outbox()["waiting"] == 3
    rig.sql("DROP TRIGGER Broken")
    rig.accounted()


def test_settlement_that_is_refused_for_good(make_rig: MakeRig) -> None:
    """It goes to the dead table with an alarm, and blocks nobody; put back by hand, it counts."""
    rig = make_rig()
    rig.token()
    rig.sql("CREATE TRIGGER Refusing BEFORE INSERT ON TokenUsageLogs WHEN NEW.RequestedBy = 'user-2'"
            " BEGIN SELECT RAISE(ABORT, 'no'); END")
    assert [rig.send().status for _ in range(3)] == [200] * 3
    assert rig.outbox() | {"records": 0} == {"usable": True, "waiting": 0, "records": 0, "dead": 1, "oldest_seconds": 0}
    rig.rows("SELECT 1 AS x FROM ApplicationLogs WHERE LogLevel = 'CRITICAL' AND Message LIKE '%dead table%'")
    [sent] = [sent for sent in rig.sent.values() if sent.user == "user-2"]
    assert rig.states(sent) == ["open"] and len(rig.sql("SELECT 1 AS x FROM TokenUsageLogs")) == 2
    rig.balanced()
    rig.sql("DROP TRIGGER Refusing")
    rig.in_outbox("INSERT INTO Outbox (Kind, RequestID, TokenID, Payload, CreatedAt)"
                  " SELECT Kind, RequestID, TokenID, Payload, CreatedAt FROM OutboxDead")
    rig.in_outbox("DELETE FROM OutboxDead")
    rig.accounted()


# ---- not heard ----

LOST = ["drop_after_commit", "drop_mid_result", "drop_before", "end_tls"]


@pytest.mark.parametrize("kind", LOST)
def test_acquire_whose_answer_is_lost(make_rig: MakeRig, emulator: Emulator, kind: str) -> None:
    """Asked once more, the store gives the same token."""
    rig = make_rig("mssql")
    rig.token(key=KEY)
    rig.token(key="key-of-the-other-token")
    for _ in range(4):
        fault(rig, kind, "usp_AcquireTokens")
        assert rig.send().status == 200
    assert [rig.states(sent) for sent in rig.sent.values()] == [["settled"]] * 4
    rig.accounted()


@pytest.mark.parametrize("fallback", [False, True], ids=["", "fallback"])
@pytest.mark.parametrize("kind", LOST)
def test_acquire_whose_answers_are_all_lost(make_rig: MakeRig, emulator: Emulator, kind: str, fallback: bool) -> None:
    """Whatever is reserved by then is released, not spent."""
    rig = make_rig("mssql", fallback=fallback)
    token = rig.token(key=KEY)
    fault(rig, kind, "usp_AcquireTokens", times=1000)
    answer = rig.send()
    server(rig).control(do="reset")
    if fallback:
        assert answer.status == 200
    else:
        refused(answer, "store_unavailable")
    assert keys(emulator) == [FALLBACK_KEY] * fallback
    rig.is_quiet()
    [sent] = rig.sent.values()
    assert {row["State"] for row in rig.reservations(sent) if row["TokenID"] == token} <= {"released"}
    rig.accounted()


@pytest.mark.parametrize("times", [1, 2, 8])
@pytest.mark.parametrize("kind", LOST)
def test_settlement_whose_answer_is_lost(make_rig: MakeRig, kind: str, times: int) -> None:
    """Done or not: it is done once."""
    rig = make_rig("mssql")
    rig.token()
    fault(rig, kind, "usp_SettleUsage", times=times)
    assert rig.send().status == 200
    rig.accounted()


def test_deadlocks_everywhere(make_rig: MakeRig, crowd: ThreadPoolExecutor) -> None:
    rig = make_rig("mssql", processes=2)
    for _ in range(2):
        rig.token()
    server(rig).control(do="deadlocks", share=0.2, seed=4)
    answers = [crowd.submit(rig.send) for _ in range(60)]
    assert {answer.result(PATIENCE).status for answer in answers} == {200}
    server(rig).control(do="reset")
    rig.accounted()
