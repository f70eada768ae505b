"""The disk of the outbox and of the spools: full, too small for the upload, turned read-only, for good or for a while."""
from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import FALLBACK_KEY
from disks import FailingDisk, fill, may_loop, may_mount, small
from e2e.conftest import PATIENCE, Emulator, refused, start_refused
from rig import LARGE, TOLD, USAGE, Rig, Sent

MakeRig = Callable[..., Rig]
KEY = "key-of-the-company"
IMPATIENT = {"EXTRACT_STORE_QUERY_TIMEOUT": "300ms"}
ALARM = r'^\{"unsettled": '


class FullTmpfs:
    """A file system of a few megabytes, which somebody fills."""

    def __init__(self, where: Path) -> None:
        self.state_dir = where / "state"
        small(self.state_dir, "20m")
        self.filling: Path | None = None

    def fail(self, rig: Rig) -> None:
        self.filling = fill(self.state_dir)

    def mend(self, rig: Rig) -> None:
        assert self.filling is not None
        self.filling.unlink()

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.state_dir)], check=True)


class FileSizeLimit:
    """No file of the service grows past one page: not even the log of the outbox. For where nothing can be mounted."""

    def __init__(self, where: Path) -> None:
        self.state_dir = where / "state"
        self.state_dir.mkdir()

    def fail(self, rig: Rig) -> None:
        rig.limit(resource.RLIMIT_FSIZE, 4000)

    def mend(self, rig: Rig) -> None:
        rig.limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)

    def remove(self) -> None:
        pass


class DiskThatFails:
    """The kernel finds an error in the file system, and lets nobody write to it any more; mended by a restart."""

    def __init__(self, where: Path) -> None:
        self.state_dir = where / "state"
        self.disk = FailingDisk(where / "image", self.state_dir)

    def fail(self, rig: Rig) -> None:
        self.disk.fail()

    def mend(self, rig: Rig) -> None:
        processes = len(rig.pids())
        rig.stop_pool()
        self.disk.repair()
        rig.start_pool(processes)

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.state_dir)], check=True)


DISKS = [FileSizeLimit, *([FullTmpfs] if may_mount() else []), *([DiskThatFails] if may_loop() else [])]


@pytest.fixture(params=DISKS, ids=lambda kind: kind.__name__)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    disk = request.param(tmp_path)
    yield disk
    disk.remove()


@pytest.fixture
def make(make_rig: MakeRig, disk: Any) -> MakeRig:
    """A rig with its state on that disk; its store is elsewhere."""
    def start(env: dict[str, str] | None = None, **settings: Any) -> Rig:
        rig = make_rig(env={**IMPATIENT, "EXTRACT_SERVER_STATE_DIR": str(disk.state_dir), **(env or {})}, **settings)
        rig.allowed_stderr.append(ALARM)
        return rig
    return start


def alarms(rig: Rig) -> list[dict[str, Any]]:
    """The settlements that stand on standard error."""
    lines = (rig.dir / "pool.log").read_text().splitlines()
    return [json.loads(line)["unsettled"] for line in lines if line.startswith('{"unsettled": ')]


def says_all(alarm: dict[str, Any], sent: Sent, emulator: Emulator) -> None:
    """Somebody who finds the line can write the usage down by hand."""
    [usage] = [call["usage"] for call in emulator.log() if call["file_sha256"] == sent.sha256]
    assert (alarm["requested_by"], alarm["company_id"], alarm["request_count"]) == (sent.user, sent.company, 1)
    assert {column: alarm[member] for column, member in TOLD.items()} == {
        column: usage[member] for column, member in USAGE.items()}


def test_before_the_call(make: MakeRig, disk: Any, emulator: Emulator) -> None:
    """The store is away and the outbox takes no reservation: nothing is spent."""
    rig = make(fallback=True)
    with rig.store_away():
        disk.fail(rig)
        for _ in range(3):
            refused(rig.send(tiny=True), "storage_full")
        assert emulator.log() == []
        if not isinstance(disk, DiskThatFails):
            disk.mend(rig)
            assert rig.send().status == 200
    if isinstance(disk, DiskThatFails):
        disk.mend(rig)
    assert alarms(rig) == []
    rig.accounted()


def test_after_the_call(make: MakeRig, disk: Any, emulator: Emulator, crowd: ThreadPoolExecutor) -> None:
    """The client has its invoice, standard error the usage, and the reservation shows as unsettled."""
    rig = make()
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True})
    request = rig.upload(tiny=True)
    answer = crowd.submit(rig.send, sent=request)
    emulator.wait(held=1)
    with rig.store_away():
        disk.fail(rig)
        emulator.release()
        assert answer.result(PATIENCE).status == 200
    [alarm] = alarms(rig)
    says_all(alarm, request[0], emulator)
    assert rig.metric("extract_unsettled_alarms_total") == 1
    disk.mend(rig)
    assert rig.send().status == 200
    rig.accounted(unsettled=[request[0]])


def test_between_reservation_and_settlement_of_the_fallback(make: MakeRig, disk: Any, emulator: Emulator,
                                                            crowd: ThreadPoolExecutor) -> None:
    """The reservation is in the outbox, its settlement does not fit any more."""
    rig = make(fallback=True)
    emulator.script(FALLBACK_KEY, {"hold": True})
    request = rig.upload(tiny=True)
    with rig.store_away():
        answer = crowd.submit(rig.send, sent=request)
        emulator.wait(held=1)
        disk.fail(rig)
        emulator.release()
        assert answer.result(PATIENCE).status == 200
    [alarm] = alarms(rig)
    says_all(alarm, request[0], emulator)
    disk.mend(rig)
    rig.accounted(unsettled=[request[0]])


def test_while_the_store_is_there(make: MakeRig, disk: Any, emulator: Emulator) -> None:
    """Nothing but a large upload needs it: that is refused before anything is spent."""
    if isinstance(disk, FileSizeLimit):
        disk.fail = lambda rig: rig.limit(resource.RLIMIT_FSIZE, LARGE - 1_000_000)  # type: ignore[method-assign]
    rig = make()
    rig.token()
    disk.fail(rig)
    refused(rig.send(size=LARGE), "storage_full")
    assert emulator.log() == []
    assert [rig.send().status for _ in range(3)] == [200] * 3
    disk.mend(rig)
    assert rig.send(size=LARGE).status == 200
    rig.accounted()


@pytest.mark.parametrize("when", ["before", "after"])
def test_embedded_store_on_the_same_disk(make: MakeRig, disk: Any, emulator: Emulator, crowd: ThreadPoolExecutor,
                                         when: str) -> None:
    rig = make(env={"EXTRACT_STORE_PATH": str(disk.state_dir / "store.db")})
    rig.store_path = disk.state_dir / "store.db"
    rig.token(key=KEY)
    emulator.script(KEY, {"hold": True}, repeat=True)
    request = rig.upload(tiny=True)
    if when == "before":
        disk.fail(rig)
        answer = rig.send(sent=request)
        assert answer.code in ("storage_full", "store_unavailable"), answer.body
        refused(answer, answer.code)
        assert emulator.log() == []
    else:
        pending = crowd.submit(rig.send, sent=request)
        emulator.wait(held=1)
        disk.fail(rig)
        emulator.release()
        assert pending.result(PATIENCE).status == 200
        [alarm] = alarms(rig)
        says_all(alarm, request[0], emulator)
    disk.mend(rig)
    emulator.script(KEY)
    assert rig.send().status == 200
    rig.accounted(unsettled=[request[0]] if when == "after" else [])


if may_mount():
    def test_read_only_from_the_start(tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "state")], check=True)
        try:
            said = start_refused(tmp_path, EXTRACT_SERVER_STATE_DIR=str(tmp_path / "state"), EXTRACT_AUTH_MODE="none")
            assert "server.state_dir" in said and str(tmp_path / "state") in said
        finally:
            subprocess.run(["umount", str(tmp_path / "state")], check=True)
