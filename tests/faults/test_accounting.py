"""The account itself: it holds where nothing went wrong, and sees each thing that can be wrong with it."""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from e2e.conftest import ROOT, Emulator, eventually
from rig import LARGE, Rig

MakeRig = Callable[..., Rig]


@pytest.mark.parametrize("store", ["sqlite", "mssql"])
def test_every_kind_of_outcome(make_rig: MakeRig, emulator: Emulator, store: str) -> None:
    rig = make_rig(store)
    rig.token(key="key-of-the-test")
    emulator.script("key-of-the-test", {}, {"status": 503}, {}, {"text": "no JSON"}, {}, {"finish_reason": "SAFETY"},
                    {"close": "after_read"}, {}, {"usage": None}, {"status": 404})
    assert [rig.send().status for _ in range(7)] == [200, 200, 200, 422, 200, 200, 502]
    assert rig.outbox()["waiting"] == 0
    rig.accounted()


def test_many_at_once(make_rig: MakeRig, crowd: ThreadPoolExecutor) -> None:
    rig = make_rig(processes=3)
    for company in ("A", "B", "B", "B"):
        rig.token(company)
    answers = [crowd.submit(rig.send, "AB"[n % 2], LARGE * (n % 5 == 0)) for n in range(60)]
    assert {answer.result().status for answer in answers} == {200}
    rig.accounted()


USER_1 = "WHERE RequestedBy = 'user-1'"


@pytest.mark.parametrize("tampering, says", [
    (f"DELETE FROM TokenUsageLogs {USER_1}", "'logged'"),
    (f"UPDATE TokenUsageLogs SET TotalTokensUsed = TotalTokensUsed + 1 {USER_1}", "'logged'"),
    (f"UPDATE TokenUsageLogs SET InputTokens = InputTokens + 1 {USER_1}", "InputTokens"),
    (f"UPDATE TokenUsageLogs SET RequestCount = 2 {USER_1}", "RequestCount"),
    ("INSERT INTO TokenUsageLogs (RequestedBy) VALUES ('nobody')", "usage rows, and calls answered"),
    (f"UPDATE TokenUsageLogs SET UnknownCalls = 1 {USER_1}", "unknown calls"),
    (f"UPDATE TokenUsageLogs SET RequestID = 'another' {USER_1}", "another"),
    (f"UPDATE TokenUsageLogs SET UnknownCalls = 1, RequestCount = 0 {USER_1}", "RequestCount"),
    (f"UPDATE TokenReservations SET State = 'open' {USER_1}", "'held'"),
    (f"UPDATE TokenReservations SET State = 'unsettled', UnknownCalls = 1 {USER_1}", "settled, and unsettled too"),
    ("UPDATE TokenUsageSummary SET ReservedTokens = 1", "'held'"),
    ("UPDATE TokenUsageSummary SET TotalRemainingTokens = 1", "'limit'"),
    ("UPDATE TokenMaster SET StatusReason = 'key-of-the-test'", "a key stands in"),
], ids=lambda value: value.partition(" WHERE")[0] if " " in value else "")
def test_rows_that_are_wrong_are_seen(make_rig: MakeRig, tampering: str, says: str) -> None:
    rig = make_rig()
    rig.token(key="key-of-the-test")
    assert [rig.send().status for _ in range(2)] == [200, 200]
    rig.accounted()
    rig.sql(tampering)
    with pytest.raises(AssertionError, match=says):
        rig.accounted()
    rig.sql("UPDATE TokenMaster SET StatusReason = NULL")  # the stack's own end would see a key there, too


def test_settlement_that_is_lost_is_seen(make_rig: MakeRig) -> None:
    """All of it: row, sums and reservation agree with each other, and only the emulator knows better."""
    rig = make_rig()
    rig.token()
    assert rig.send().status == 200
    rig.sql("DELETE FROM TokenUsageLogs")
    rig.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 0")
    rig.sql("UPDATE TokenReservations SET State = 'released'")
    with pytest.raises(AssertionError, match="usage rows, and calls answered"):
        rig.accounted()
    rig.was_accounted = True


def test_request_shown_as_unsettled_that_is_not(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.token()
    sent, file = rig.upload()
    assert rig.send(sent=(sent, file)).status == 200
    with pytest.raises(AssertionError, match="usage rows, and calls answered"):
        rig.accounted(unsettled=[sent])
    rig.accounted()


def test_process_that_died_is_seen(make_rig: MakeRig) -> None:
    rig = make_rig(processes=2)
    rig.token()
    assert rig.send().status == 200
    rig.accounted()
    pid = rig.pids()[0]
    os.kill(pid, 9)  # behind the rig's back
    rig.running[pid].wait()
    with pytest.raises(AssertionError, match=f"{pid}: -9"):
        rig.nobody_died()
    rig.running.pop(pid)


def test_leaks_are_seen(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    rig.token()
    assert rig.send().status == 200
    rig.accounted()
    [pid] = rig.pids()
    with closing(rig.begin(rig.upload(size=LARGE), upto=1000)):
        eventually(lambda: rig.metric("extract_requests_in_flight") == 1)
        monkeypatch.setattr("e2e.conftest.PATIENCE", 0.5)
        with pytest.raises(AssertionError, match=r"holds more than before: .*\.sock.*mapped spool"):
            rig.nothing_leaked()
    rig.before[pid]["thread"] -= 1
    with pytest.raises(AssertionError, match="holds more than before: {'thread'"):
        rig.nothing_leaked()
    rig.before[pid]["thread"] += 1
    (rig.dir / "upload-abc").touch()
    with pytest.raises(AssertionError, match="upload-abc"):
        rig.nothing_leaked()


def test_false_answer_is_seen(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.token()
    assert rig.send().status == 200
    rig.accounted()
    [sent] = rig.sent.values()
    assert sent.answer is not None
    sent.answer.body = sent.answer.body.replace(b'"input_tokens": ', b'"input_tokens": 1')
    with pytest.raises(AssertionError, match="InputTokens"):
        rig.accounted()


def test_each_test_has_its_row() -> None:
    """In the table of tests/README.md, and each row its test."""
    faults = (ROOT / "tests/README.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ")][2:]  # without the head
    tests = [re.findall(r"`(test_\w+|make soak)`", row.rsplit(" | ", 1)[1]) for row in rows]
    assert all(tests), [row for row, names in zip(rows, tests) if not names]
    there = {name for path in (ROOT / "tests/faults").glob("test_*.py") if path.name != Path(__file__).name
             for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.M)}
    assert {name for names in tests for name in names} == there | {"make soak"}
