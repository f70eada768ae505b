"""The page and the dashboard in Chromium: starts the stacks that *.test.mjs need, and these. Node's own lines are the report.

The fixtures are those of tests/e2e (PYTHONPATH, see the Makefile). BROWSER_TESTS, a pattern, chooses tests; SCREENSHOTS, a
directory, keeps pictures of what was looked at.
"""
from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import BUILD, ROOT, Emulator, Stack, _emulator, _sql_server, certificate, emulator, make_stack  # noqa: F401

HERE = Path(__file__).resolve().parent

# What each stack is for; all have quick retries and no client keys unless said otherwise.
PAGE: dict[str, dict[str, str]] = {
    "open": {},
    "bearer": {"EXTRACT_AUTH_MODE": "bearer"},
    "share": {"EXTRACT_SERVER_COMPANY_SHARE": "0.125"},  # a company may have one request at a time
    "late": {"EXTRACT_SERVER_DEADLINE": "4s"},  # no attempt starts that late
    "away": {"EXTRACT_STORE_QUERY_TIMEOUT": "1s"},  # nothing can be written to its store
    "dead": {},  # it has no pool
    "mortal": {},  # its process dies
}
DASHBOARD: dict[str, dict[str, str]] = {"open": {}, "dead": {}}


@pytest.mark.parametrize("name, settings", [("page", PAGE), ("dashboard", DASHBOARD)], ids=["page", "dashboard"])
def test_in_chromium(make_stack: Callable[..., Stack], emulator: Emulator, tmp_path: Path, name: str,
                     settings: dict[str, dict[str, str]]) -> None:
    stacks = {stack: make_stack(env=env) for stack, env in settings.items()}
    stacks["dead"].stop_pool()
    for stack in stacks.keys() & {"away", "mortal"}:
        stacks[stack].allowed_stderr = [r" (INFO|WARNING|ERROR|CRITICAL) "]
    (tmp_path / "stacks.json").write_text(json.dumps({
        key: {"url": f"https://localhost:{stack.https_port}", "pids": stack.pids(),
               "env": {variable: value for variable, value in stack.env.items() if variable.startswith("EXTRACT_")}}
        for key, stack in stacks.items()}))
    pattern = os.environ.get("BROWSER_TESTS")
    with ExitStack() as while_it_runs:
        if "away" in stacks:
            while_it_runs.enter_context(stacks["away"].store_away())
        done = subprocess.run(
            ["node", "--test", "--test-reporter=spec", *([f"--test-name-pattern={pattern}"] if pattern else []),
             f"{name}.test.mjs"], cwd=HERE,
            env=os.environ | {"STACKS": str(tmp_path / "stacks.json"), "EMULATOR_URL": emulator.url, "BUILD": str(BUILD),
                              "DOWNLOADS": str(tmp_path), "SAMPLES": str(ROOT / "tests/samples")})
    assert done.returncode == 0, "see node's lines above"
