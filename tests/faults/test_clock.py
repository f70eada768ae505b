"""The wall clock is set by an hour, forwards and backwards, while something is under way. The service's own waits go by
monotonic time; rows, expiries and cooldowns go by the wall clock, and end earlier or later, but nothing is lost."""
from __future__ import annotations

import datetime
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import FALLBACK_KEY
from e2e.conftest import PATIENCE, ROOT, Emulator, eventually, refused
from rig import Rig

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"
HOUR = 3600
steps = pytest.mark.parametrize("step", [HOUR, -HOUR], ids=["forwards", "backwards"])


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("step_clock") / "step_clock.so"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(built),
                    str(ROOT / "tests/faults/step_clock.c")], check=True)
    return built


class Clock:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.step(0)

    def step(self, seconds: int) -> None:
        """It is wrong by so much from now on."""
        with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as file:
            file.write(struct.pack("=q", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


@pytest.fixture
def make(make_rig: MakeRig, clock: Clock, library: Path) -> MakeRig:
    def start(env: dict[str, str] | None = None, **settings: Any) -> Rig:
        rig = make_rig(env={"LD_PRELOAD": str(library), "STEP_CLOCK": str(clock.path),
                            # a sanitizer wants to be the first library, and need not be
                            "ASAN_OPTIONS": "verify_asan_link_order=0", **(env or {})}, **settings)
        return rig
    return start


def logged_hours_from_now(rig: Rig) -> list[int]:
    rows = rig.sql("SELECT LoggedAt FROM TokenUsageLogs ORDER BY UsageID")
    now = datetime.datetime.now(datetime.timezone.utc)
    return [round((datetime.datetime.fromisoformat(row["LoggedAt"].replace("Z", "+00:00")) - now).total_seconds() / HOUR)
            for row in rows]


@steps
def test_during_a_call(make: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, clock: Clock, step: int) -> None:
    rig = make()
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True, "status": 503}, {})
    answer = crowd.submit(rig.send)
    emulator.wait(held=1)
    clock.step(step)
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    clock.step(0)
    assert rig.send().status == 200
    assert logged_hours_from_now(rig) == [step // HOUR, 0]
    rig.accounted()


def test_reservation_that_expires_too_early(make: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor,
                                            clock: Clock) -> None:
    """The clock is set forwards, and another process takes this one for dead: its reservation is unsettled for a while, and
    settled when its settlement comes."""
    rig = make()
    token = rig.token(key=KEY)
    emulator.script(KEY, {"hold": True})
    request = rig.upload()
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    clock.step(HOUR)
    with rig.one_more():
        eventually(lambda: rig.states(request[0]) == ["unsettled"])
    reserved = "SELECT ReservedTokens FROM TokenUsageSummary WHERE TokenID = ?"
    assert rig.sql(reserved, token) == [{"ReservedTokens": 0}]
    rig.balanced()
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    assert rig.states(request[0]) == ["settled"]
    assert rig.sql(reserved, token) == [{"ReservedTokens": 0}]
    rig.accounted()


@steps
def test_during_a_cooldown(make: MakeRig, emulator: Emulator, clock: Clock, step: int) -> None:
    """It ends by the store's clock, an hour too early or too late; an administrator can end it, too."""
    rig = make()
    token = rig.token(key=KEY)
    emulator.script(KEY, {"status": 429, "retry_delay": "1800s"})
    refused(rig.send(), "upstream_rate_limited")
    clock.step(step)
    if step > 0:
        assert rig.send().status == 200
    else:
        answer = rig.send()
        refused(answer, "upstream_rate_limited")
        assert 1700 + HOUR < int(answer.headers["Retry-After"]) <= 1800 + HOUR
        rig.ctl("token", "set-status", str(token), "Active")
        assert rig.send().status == 200
    rig.accounted()


@steps
def test_during_a_wait(make: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, clock: Clock, step: int) -> None:
    """A backoff between two attempts is neither cut short nor drawn out."""
    rig = make(env={"EXTRACT_RETRY_INITIAL_DELAY": "1.0", "EXTRACT_RETRY_MAX_DELAY": "1.0"})
    rig.token(key=KEY)
    emulator.script(KEY, {"status": 503}, {})
    answer = crowd.submit(rig.send)
    emulator.wait(finished=1)
    clock.step(step)
    assert answer.result(PATIENCE).json()["attempts"] == 2
    first, second = emulator.log()
    assert second["time"] - first["time"] >= 0.5
    rig.accounted()


@steps
def test_with_a_full_outbox(make: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, clock: Clock,
                            step: int) -> None:
    """What waits there has the time of before: reservations, settlements, one of them with a cooldown."""
    rig = make(fallback=True, env={"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"})
    token = rig.token(key=KEY)
    emulator.script(KEY, {"hold": True}, {"hold": True, "status": 429, "retry_delay": "7200s"})
    emulator.script(FALLBACK_KEY, {}, {"close": "after_read"}, {})
    answers = [crowd.submit(rig.send) for _ in range(2)]
    emulator.wait(held=2)
    with rig.store_away():
        emulator.release()
        assert {answer.result(PATIENCE).status for answer in answers} == {200}
        assert rig.send().status == 200
        clock.step(step)
        assert rig.send().status == 200
        assert rig.get("/readyz").json()["outbox"]["oldest_seconds"] >= 0
    rig.is_quiet()
    [row] = rig.sql("SELECT CooldownUntil IS NOT NULL AS cools FROM TokenMaster WHERE TokenID = ?", token)
    assert row == {"cools": 1}
    rig.accounted()


@steps
def test_with_idempotency_keys(make: MakeRig, emulator: Emulator, crowd: ThreadPoolExecutor, clock: Clock,
                               step: int) -> None:
    """A second click is one, before and after."""
    rig = make()
    rig.token(key=KEY)
    key = {"Idempotency-Key": "k"}
    emulator.script(KEY, {"hold": True})
    answer = crowd.submit(rig.send, headers=key)
    emulator.wait(held=1)
    clock.step(step)
    refused(rig.send(headers=key), "request_in_progress")
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    refused(rig.send(headers=key), "already_processed")
    clock.step(0)
    refused(rig.send(headers=key), "already_processed")
    rig.accounted()


@steps
def test_between_two_processes(make: MakeRig, clock: Clock, step: int) -> None:
    """A restart in between: what was left by the other clock is found."""
    rig = make(processes=2)
    rig.token()
    assert rig.send().status == 200
    clock.step(step)
    for pid in rig.pids():
        rig.replace(pid)
        assert rig.send().status == 200
    clock.step(0)
    assert rig.send().status == 200
    rig.accounted()
