"""Fixtures of the fault matrix: those of tests/e2e, and

    make_rig   makes rigs (rig.py): stacks whose processes are the test's own children, and whose account is checked
    tds        a tests/tds_server without any fault yet, for rigs with store="mssql"
    door       stands before the emulator, and fails as networks do (door.py)
"""
from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "faults"), str(TESTS / "tds_server")]
sys.path.append(str(TESTS / "e2e"))
pytest.register_assert_rewrite("e2e.conftest", "rig")

from disks import own_mounts  # noqa: E402
from door import Door  # noqa: E402
from e2e.conftest import (  # noqa: E402, F401
    Emulator, SqlServer, _emulator, _sql_server, certificate, crowd, emulator)
from rig import Rig  # noqa: E402
from tds_process import TdsServer  # noqa: E402

# Needs an allocator that says so when there is no memory.
collect_ignore = ["test_memory.py"] if Rig.is_sanitized() else []

PASSED = pytest.StashKey[bool]()
FALLBACK_KEY = "AIzaSyFallbackOfTheFaults0123456789"


def pytest_configure() -> None:
    own_mounts()  # before the first thread and the first child


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    if call.when == "call":
        item.stash[PASSED] = outcome.get_result().passed  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def _tds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TdsServer]:
    with TdsServer(tmp_path_factory.mktemp("tds"), "on") as server:
        yield server


@pytest.fixture
def tds(_tds: TdsServer) -> TdsServer:
    _tds.control(do="reset")
    return _tds


@pytest.fixture
def door(emulator: Emulator) -> Iterator[Door]:
    with Door(emulator.port) as door:
        yield door


@pytest.fixture
def make_rig(emulator: Emulator, certificate: Path, tmp_path: Path,
             request: pytest.FixtureRequest) -> Iterator[Callable[..., Rig]]:
    """Rigs with sealed API keys. store: sqlite or mssql; fallback: with a fallback key."""
    rigs: list[Rig] = []

    def make(store: str = "sqlite", fallback: bool = False, env: dict[str, str] | None = None, **settings: Any) -> Rig:
        seal = tmp_path / "seal.key"
        if not seal.exists():
            seal.write_text(base64.b64encode(os.urandom(32)).decode() + "\n")
            seal.chmod(0o600)
        env = {"EXTRACT_SEAL_KEY_FILE": str(seal)} | (env or {})
        if fallback:
            (tmp_path / "appSetting.txt").write_text(FALLBACK_KEY + "\n")
            env["EXTRACT_FALLBACK_KEY_FILE"] = str(tmp_path / "appSetting.txt")
        if store == "mssql":
            settings["sql_server"] = SqlServer.of(request.getfixturevalue("tds"))
        rig = Rig(emulator, certificate, env=env, **settings)
        rigs.append(rig)
        if fallback:
            rig.keys[FALLBACK_KEY] = None
        return rig

    yield make
    try:
        assert not request.node.stash.get(PASSED, False) or all(rig.was_accounted for rig in rigs), \
            "the test looked at everything but the account"
    finally:
        emulator.reset()  # it lets go of what it holds
        for rig in rigs:
            rig.close()
