"""The page in Chromium: starts the stacks that page.test.mjs needs, and that. Node's own lines are the report.

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

from conftest import BUILD, ROOT, Emulator, Stack, _emulator, _sql_server, certificate, emulator, make_stack  # noqa: F401

HERE = Path(__file__).resolve().parent

# What each stack is for; all have quick retries and no client keys unless said otherwise.
SETTINGS: dict[str, dict[str, str]] = {
    "open": {},
    "bearer": {"EXTRACT_AUTH_MODE": "bearer"},
    "share": {"EXTRACT_SERVER_COMPANY_SHARE": "0.125"},  # a company may have one request at a time
    "late": {"EXTRACT_SERVER_DEADLINE": "4s"},  # no attempt starts that late
    "away": {"EXTRACT_STORE_QUERY_TIMEOUT": "1s"},  # nothing can be written to its store
    "dead": {},  # it has no pool
    "mortal": {},  # its process dies
}


def test_page(make_stack: Callable[..., Stack], emulator: Emulator, tmp_path: Path) -> None:
    stacks = {name: make_stack(env=env) for name, env in SETTINGS.items()}
    stacks["dead"].stop_pool()
    for name in ("away", "mortal"):
        stacks[name].allowed_stderr = [r" (INFO|WARNING|ERROR|CRITICAL) "]
    (tmp_path / "stacks.json").write_text(json.dumps({
        name: {"url": f"https://localhost:{stack.https_port}", "pids": stack.pids(),
               "env": {key: value for key, value in stack.env.items() if key.startswith("EXTRACT_")}}
        for name, stack in stacks.items()}))
    pattern = os.environ.get("BROWSER_TESTS")
    with ExitStack() as while_it_runs:
        while_it_runs.enter_context(stacks["away"].store_away())
        done = subprocess.run(
            ["node", "--test", "--test-reporter=spec", *([f"--test-name-pattern={pattern}"] if pattern else []),
             "page.test.mjs"], cwd=HERE,
            env=os.environ | {"STACKS": str(tmp_path / "stacks.json"), "EMULATOR_URL": emulator.url, "BUILD": str(BUILD),
                              "DOWNLOADS": str(tmp_path), "SAMPLES": str(ROOT / "tests/samples")})
    assert done.returncode == 0, "see node's lines above"
