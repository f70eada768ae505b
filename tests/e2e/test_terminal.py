"""extractctl at a terminal, and where there is none: colours, width, progress, interruption, the prompt."""
from __future__ import annotations

import base64
import json
import os
import re
import signal
import sqlite3
import subprocess
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import BUILD, Stack
from terminal import PATIENCE, Terminal, plain

CTL = BUILD / "extractctl"
RED, YELLOW, DIM = "\033[1;31m", "\033[33m", "\033[2m"
At = Callable[..., Terminal]


def painted(text: str, color: str) -> list[str]:
    """What is shown in that colour."""
    return re.findall(re.escape(color) + r"([^\033]*)\033\[0m", text)


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


@pytest.fixture
def at() -> Iterator[At]:
    """Starts extractctl at a terminal: an xterm without NO_COLOR, unless env says otherwise (None: unset)."""
    terminals: list[Terminal] = []

    def start(env: dict[str, str], *arguments: str, changes: dict[str, str | None] | None = None, **settings: object) -> Terminal:
        merged = {k: v for k, v in env.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | (changes or {})
        terminals.append(Terminal(CTL, *arguments, env={k: v for k, v in merged.items() if v is not None},
                                  **settings))  # type: ignore[arg-type]
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def piped(env: dict[str, str], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([CTL, *arguments], env=env, input=stdin, capture_output=True, text=True, timeout=PATIENCE)


# ---- colours ----


@pytest.fixture
def tokens(stack: Stack, company: str) -> dict[str, int]:
    """Five tokens of a company with a wide name beside them, each in another state."""
    found = {name: stack.token(company, None, "--limit", "1000", "--company-name", "株式会社山田")
             for name in ("good", "near", "full", "cooling", "cooled")}
    stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 850 WHERE TokenID = ?", found["near"])
    stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 1000 WHERE TokenID = ?", found["full"])
    for name, until in (("cooling", "2999-01-01T00:00:00.000Z"), ("cooled", "2020-01-01T00:00:00.000Z")):
        stack.sql("UPDATE TokenMaster SET CooldownUntil = ? WHERE TokenID = ?", until, found[name])
    stack.ctl("token", "set-status", str(found["full"]), "Exceeded", "--reason", "長い理由: too much")
    yield found
    for token in found.values():
        stack.sql("UPDATE TokenUsageSummary SET TotalUsedTokens = 0 WHERE TokenID = ?", token)


def test_colours_say_where_to_look_and_take_no_room(stack: Stack, company: str, tokens: dict[str, int], at: At) -> None:
    terminal = at(stack.env, "token", "list", "--company", company)
    assert terminal.end()[0] == 0
    table = stack.ctl("token", "list", "--company", company).stdout
    assert plain(terminal.text) == table and "\033" not in table
    rows = {line.split()[0]: raw for line, raw in zip(table.splitlines(), terminal.text.splitlines())}
    good, near, full, cooling, cooled = (rows[str(tokens[name])] for name in ("good", "near", "full", "cooling", "cooled"))
    assert painted(good, RED) == painted(good, YELLOW) == [] and set(painted(good, DIM)) == {"-"}
    assert painted(near, YELLOW)[0] == "850" and painted(near, RED) == []
    assert painted(full, RED)[:2] == ["Exceeded", "1000"]
    assert painted(cooling, YELLOW) == ["2999-01-01T00:00:00.000Z"]
    assert "2020-01-01T00:00:00.000Z" in painted(cooled, DIM) and painted(cooled, YELLOW) == []


@pytest.mark.parametrize("options, changes, colored", [
    ([], {}, True), ([], {"NO_COLOR": ""}, True), ([], {"NO_COLOR": "1"}, False), ([], {"TERM": "dumb"}, False),
    ([], {"TERM": None}, False), (["--color=never"], {}, False), (["--color=auto"], {}, True),
    (["--color=always"], {"NO_COLOR": "1"}, True), (["--color"], {"TERM": "dumb"}, True),
    (["--color=never", "--color=always"], {}, True), (["--json"], {}, False), (["--json", "--color=always"], {}, False),
], ids=str)
def test_when_a_terminal_gets_colours(stack: Stack, company: str, tokens: dict[str, int], at: At, options: list[str],
                                      changes: dict[str, str | None], colored: bool) -> None:
    terminal = at(stack.env, "token", "list", "--company", company, *options, changes=changes)
    assert terminal.end()[0] == 0
    assert ("\033" in terminal.text) == colored and "Exceeded" in terminal.text


def test_a_pipe_gets_colours_only_when_told(stack: Stack, company: str, tokens: dict[str, int], at: At) -> None:
    """Each of standard output and standard error for itself."""
    arguments = ["token", "list", "--company", company]
    assert "\033" not in piped(stack.env, *arguments).stdout
    assert "\033" not in piped(stack.env, *arguments, "--color=auto").stdout
    forced = piped(stack.env, *arguments, "--color=always").stdout
    assert "Exceeded" in painted(forced, RED) and plain(forced) == piped(stack.env, *arguments).stdout
    status, stdout, _ = at(stack.env, *arguments, stdout=False).end()
    assert status == 0 and "Exceeded" in stdout and "\033" not in stdout
    wrong = at(stack.env, "token", "set-status", "987654", "Active", stdout=False)
    assert wrong.end()[0] == 1 and painted(wrong.text, RED) == ["extractctl:"] and painted(wrong.text, YELLOW) == ["Next:"]
    wrong = at(stack.env, "token", "set-status", "987654", "Active", stderr=False)
    assert "\033" not in wrong.end()[2] and wrong.text == ""


def test_other_tables(stack: Stack, company: str, at: At) -> None:
    """Levels, revoked keys, what is unsettled, what fails."""
    request = str(uuid.uuid4())
    for level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        stack.sql("INSERT INTO ApplicationLogs (LogLevel, Message, RequestID) VALUES (?, 'x', ?)", level, request)
    logs = at(stack.env, "logs", "--request", request)
    assert logs.end()[0] == 0
    assert set(painted(logs.text, RED)) == {"ERROR", "CRITICAL"} and painted(logs.text, YELLOW) == ["WARNING"]
    assert "DEBUG" in painted(logs.text, DIM) and "INFO" in plain(logs.text)

    stack.ctl("client-key", "add", "--company", company, "--label", "old")
    [key] = json.loads(stack.ctl("client-key", "list", "--company", company, "--json").stdout)
    stack.ctl("client-key", "revoke", key["ClientKeyID"])
    keys = at(stack.env, "client-key", "list", "--company", company)
    assert keys.end()[0] == 0 and {key["ClientKeyID"], "old"} <= set(painted(keys.text, DIM))

    check = at(stack.env | {"EXTRACT_GEMINI_BASE_URL": "http://127.0.0.1:1"}, "check", columns=60)
    assert check.end()[0] == 1 and painted(check.text, RED) == ["FAIL"]
    assert max(map(width, check.screen)) <= 60 and "ok    state_dir" in plain(check.text)


def test_wrong_colour(at: At) -> None:
    wrong = piped(dict(os.environ), "usage", "--color=sometimes")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "auto, always or never" in wrong.stderr


# ---- width ----


@pytest.mark.parametrize("columns", [50, 60, 80])
def test_narrow_terminal(stack: Stack, company: str, tokens: dict[str, int], at: At, columns: int) -> None:
    """Rows stand one below the other, each cell after its name, and no line is broken by the terminal."""
    terminal = at(stack.env, "token", "list", "--company", company, columns=columns)
    assert terminal.end()[0] == 0
    assert max(map(width, terminal.screen)) <= columns
    blocks = plain(terminal.text).strip().split("\n\n")
    assert len(blocks) == len(tokens)
    assert [re.search(r"(?m)^TokenID +(\d+)$", block)[1] for block in blocks] == [  # type: ignore[index]
        str(token) for token in sorted(tokens.values(), reverse=True)]
    assert all(re.search(rf"(?m)^CompanyID +{company}$", block) for block in blocks)


def test_help_fits(at: At) -> None:
    for command in (["--help"], ["token", "add", "--help"], ["seal", "--help"]):
        for columns in (60, 80):
            terminal = at(dict(os.environ), *command, columns=columns)
            assert terminal.end()[0] == 0 and max(map(len, terminal.screen)) <= columns
            assert " ".join(terminal.text.split()) == " ".join(piped(dict(os.environ), *command).stdout.split())


# ---- progress and interruption ----


class Embedded:
    """A store that nobody serves, and that can be locked."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "store.db"
        (directory / "seal.key").write_text(base64.b64encode(os.urandom(32)).decode())
        (directory / "seal.key").chmod(0o600)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("EXTRACT_")} | {
            "EXTRACT_STORE_DRIVER": "sqlite", "EXTRACT_STORE_PATH": str(self.path), "EXTRACT_SERVER_STATE_DIR": str(directory),
            "EXTRACT_SERVER_RUNTIME_DIR": str(directory), "EXTRACT_STORE_QUERY_TIMEOUT": f"{PATIENCE:.0f}s"}
        for number in range(3):
            assert piped(self.env, "token", "add", "--company", "A", stdin=f"key-{number}\n").returncode == 0
        self.sealing = self.env | {"EXTRACT_SEAL_KEY_FILE": str(directory / "seal.key")}

    def rows(self, sql: str) -> list[tuple]:
        with closing(sqlite3.connect(self.path)) as db:
            return db.execute(sql).fetchall()

    def sealed(self) -> int:
        return self.rows("SELECT COUNT(*) FROM TokenMaster WHERE ApiKey LIKE 'sealed:%'")[0][0]

    @contextmanager
    def locked(self) -> Iterator[None]:
        with closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("ROLLBACK")


@pytest.fixture
def embedded(tmp_path: Path) -> Embedded:
    return Embedded(tmp_path)


def test_progress_is_a_line_that_goes_away(tmp_path: Path, at: At) -> None:
    """On a terminal. Those beside it, each with a store of its own, began earlier: they would have shown it by then."""
    for name in ("pipe", "dumb", "terminal"):
        (tmp_path / name).mkdir()
    pipe, dumb, shown = (Embedded(tmp_path / name) for name in ("pipe", "dumb", "terminal"))
    command = ("token", "set-limit", "1", "7")
    with pipe.locked(), dumb.locked(), shown.locked():
        silent = [at(pipe.env, *command, stderr=False), at(dumb.env, *command, changes={"TERM": "dumb"})]
        changes = at(shown.env, *command, columns=30)
        changes.read("changing token 1 (")  # for seconds
        assert "\n" not in changes.text
    assert changes.end() == (0, "", "")
    assert [line.split() for line in changes.screen] == [["TokenID", "TotalTokenLimit"], ["1", "7"]]
    assert [terminal.end()[0::2] for terminal in silent] == [(0, ""), (0, "")]
    assert "changing" not in silent[0].text + silent[1].text and "\r" not in silent[1].text.replace("\r\n", "\n")


def test_progress_fits_a_narrow_terminal(embedded: Embedded, at: At) -> None:
    with embedded.locked():
        changes = at(embedded.env, "token", "set-limit", "1", "7", columns=12)
        changes.read("\rchanging to\033[K")
    assert changes.end()[0] == 0


def test_progress_of_standard_error_alone(embedded: Embedded, at: At) -> None:
    """Standard output in a pipe, as in `extractctl … | sort`."""
    with embedded.locked():
        sealing = at(embedded.sealing, "seal", "--json", stdout=False)
        sealing.read("\rsealing API keys: 0 of 3 ...\033[K")
    status, stdout, _ = sealing.end()
    assert (status, json.loads(stdout)) == (0, [{"Sealed": 3, "Unreadable": 0}])
    assert sealing.screen == []


def test_seal_that_fails_says_how_far_it_came(embedded: Embedded) -> None:
    embedded.rows("CREATE TRIGGER no BEFORE UPDATE ON TokenMaster WHEN NEW.TokenID = 2 BEGIN SELECT RAISE(FAIL, 'no'); END")
    failed = piped(embedded.sealing, "seal")
    assert (failed.returncode, failed.stdout) == (1, "") and "(sealed before that, and left so: 1)" in failed.stderr
    assert embedded.sealed() == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_interrupted_seal_ends_after_the_key_in_hand(embedded: Embedded, at: At, terminal: bool) -> None:
    """What was sealed is said, and stays; another run does the rest."""
    with embedded.locked():
        sealing = at(embedded.sealing, "seal")
        sealing.read("0 of 3 ...")
        if terminal:
            sealing.type("\x03")
        else:
            sealing.process.send_signal(signal.SIGTERM)
        sealing.read("interrupted, ends after this step")
        assert embedded.sealed() == 0
    assert sealing.end()[0] == -(signal.SIGINT if terminal else signal.SIGTERM)
    assert [line.split() for line in sealing.screen if "^C" not in line][:2] == [["Sealed", "Unreadable"], ["1", "0"]]
    assert "extractctl: interrupted: run it again for the rest" in sealing.screen
    assert embedded.sealed() == 1
    again = piped(embedded.sealing, "seal", "--json")
    assert json.loads(again.stdout) == [{"Sealed": 2, "Unreadable": 0}] and embedded.sealed() == 3


def test_interrupted_twice_it_ends_at_once(embedded: Embedded, at: At) -> None:
    with embedded.locked():
        sealing = at(embedded.sealing, "seal")
        sealing.read("0 of 3 ...")
        sealing.type("\x03")
        sealing.read("interrupted, ends after this step")
        sealing.type("\x03")
        assert sealing.end()[0] == -signal.SIGINT
    assert embedded.sealed() == 0
    assert json.loads(piped(embedded.sealing, "seal", "--json").stdout) == [{"Sealed": 3, "Unreadable": 0}]


def test_interrupted_change_says_what_is_open(embedded: Embedded, at: At) -> None:
    with embedded.locked():
        changing = at(embedded.env, "token", "set-status", "2", "Disabled")
        changing.read("changing token 2 ...")
        changing.type("\x03")
        assert changing.end()[0] == -signal.SIGINT
    assert "extractctl: interrupted while changing token 2" in changing.screen[-1]
    assert embedded.rows("SELECT Status FROM TokenMaster WHERE TokenID = 2") == [("Active",)]


def test_interruption_that_is_ignored(embedded: Embedded) -> None:
    """As under nohup."""
    with embedded.locked():
        sealing = subprocess.Popen(["/bin/sh", "-c", f"trap '' HUP; exec {CTL} seal --json"], env=embedded.sealing,
                                   stdout=subprocess.PIPE, text=True)
        status = Path(f"/proc/{sealing.pid}/status")
        blocked = 1 << (signal.SIGTERM - 1)
        while not int(re.search(r"SigBlk:\s+(\w+)", status.read_text())[1], 16) & blocked:  # type: ignore[index]
            assert sealing.poll() is None
        sealing.send_signal(signal.SIGHUP)
    stdout, _ = sealing.communicate(timeout=PATIENCE)
    assert (sealing.returncode, json.loads(stdout)) == (0, [{"Sealed": 3, "Unreadable": 0}])


# ---- the prompt ----


def test_key_is_typed_unseen(embedded: Embedded, at: At) -> None:
    prompt = at(embedded.env, "token", "add", "--company", "B")
    prompt.read("API key (not shown): ")
    while prompt.echoes():
        assert prompt.process.poll() is None
    prompt.type("typed-key-0123\n")
    assert prompt.end()[0] == 0 and prompt.echoes()
    assert prompt.screen == ["API key (not shown): ", "4"] and "typed" not in prompt.text
    assert embedded.rows("SELECT ApiKey FROM TokenMaster WHERE TokenID = 4") == [("typed-key-0123",)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_prompt_that_is_interrupted(embedded: Embedded, at: At, number: signal.Signals) -> None:
    """The terminal is as before, nothing was added, and nobody is told of visible ASCII."""
    prompt = at(embedded.env, "token", "add", "--company", "B")
    prompt.read("API key (not shown): ")
    while prompt.echoes():
        assert prompt.process.poll() is None
    prompt.type("half\x03") if number == signal.SIGINT else prompt.process.send_signal(number)
    assert prompt.end()[0] == -number and prompt.echoes()
    assert "half" not in prompt.text and "ASCII" not in prompt.text
    assert embedded.rows("SELECT COUNT(*) FROM TokenMaster") == [(3,)]
