"""The two programs by themselves: options, configuration, start; extractctl, command by command."""
from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import (BUILD, PATIENCE, ROOT, TEST_STORE, Answer, Emulator, Stack, eventually, form, free_port, listening,
                      start_nginx, start_refused)

SERVICE, CTL = str(BUILD / "extract-fcgi"), str(BUILD / "extractctl")
VERSION = re.search(r"^VERSION\s*:?=\s*(\S+)", (ROOT / "Makefile").read_text(), re.M)[1]  # type: ignore[index]
SECRET = "AIzaSy-secret-key-0123456789"


def clean(**env: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("EXTRACT_")} | env


def run(*command: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=clean(**(env or {})), capture_output=True, text=True, timeout=PATIENCE,
                          **({} if "stdin" in more or "input" in more else {"stdin": subprocess.DEVNULL}), **more)


def settings(output: str) -> dict[str, str]:
    """What --check-config prints, as "section.key": value."""
    found, section = {}, ""
    for line in output.splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[f"{section}.{name.strip()}"] = value.strip()
    return found


# ---- extract-fcgi: options ----


def test_version_and_help() -> None:
    version = run(SERVICE, "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"extract-fcgi {VERSION}\n", "")
    usage = run(SERVICE, "--help")
    assert (usage.returncode, usage.stderr) == (0, "") and usage.stdout.startswith("usage: extract-fcgi ")


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--config"], ["argument"], ["--check-config", "argument"]])
def test_wrong_usage(arguments: list[str]) -> None:
    wrong = run(SERVICE, *arguments)
    assert (wrong.returncode, wrong.stdout) == (2, "") and "usage: extract-fcgi " in wrong.stderr


# ---- extract-fcgi: configuration ----


def test_check_config_shows_each_key_and_where_it_is_from(tmp_path: Path) -> None:
    """The environment before the file, the file before the default; the output is a configuration itself."""
    file = tmp_path / "extract-fcgi.conf"
    file.write_text("[server]\nthreads = 3\nqueue = 5\n\n[gemini]\nproxy = http://user:pass-word@proxy.example:3128\n")
    shown = run(SERVICE, "--config", str(file), "--check-config", env={"EXTRACT_SERVER_THREADS": "7"})
    assert (shown.returncode, shown.stderr) == (0, "")
    values = settings(shown.stdout)
    assert (values["server.threads"], values["server.queue"], values["server.queue_wait"]) == ("7", "5", "10s")
    assert "# from EXTRACT_SERVER_THREADS\nthreads = 7\n" in shown.stdout
    assert f"# from {file}:3\nqueue = 5\n" in shown.stdout
    assert "# from default\nqueue_wait = 10s\n" in shown.stdout
    assert values["gemini.proxy"] == "http://user:***@proxy.example:3128" and "pass-word" not in shown.stdout

    again = tmp_path / "again.conf"
    again.write_text(shown.stdout)
    assert settings(run(SERVICE, "--check-config", env={"EXTRACT_CONFIG": str(again)}).stdout) == values


def test_defaults() -> None:
    """As the contract lists them."""
    values = settings(run(SERVICE, "--check-config").stdout)
    expected = {
        "server.threads": "16", "server.queue": "64", "server.queue_wait": "10s", "server.company_share": "1",
        "server.max_upload": "50M", "server.deadline": "2m", "server.body_file_dir": "", "auth.mode": "bearer",
        "auth.offline_grace": "1h", "auth.key_rate": "6000", "gemini.base_url": "https://generativelanguage.googleapis.com",
        "gemini.model": "gemini-3.5-flash", "gemini.connect_timeout": "10s", "gemini.timeout": "55s",
        "gemini.reserve_tokens": "8000", "retry.max_retries": "3", "retry.initial_delay": "1s",
        "retry.max_delay": "30s", "retry.backoff_multiplier": "2", "retry.jitter": "yes", "retry.auto_disable": "yes",
        "store.driver": "sqlite", "store.auto_create": "yes", "store.query_timeout": "5s",
        "fallback.when": "store_unavailable", "log.level": "INFO", "log.sink": "store"}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("text, line, words", [
    ("[server]\nthread = 3\n", 2, ["thread", "unknown key", "threads"]),
    ("[serve]\nthreads = 3\n", 2, ["unknown key", "server"]),
    ("[server]\n\nthreads = 0\n", 3, ["threads", "1"]),
    ("[server]\nthreads = 3\nthreads = 4\n", 3, ["threads", "given twice"]),
    ("[server]\nmax_upload = much\n", 2, ["max_upload"]),
    ("threads = 3\n", 1, ["section"]),
    ("[server]\nnonsense\n", 2, []),
    ("[gemini]\nbase_url = http://gemini.example\n", 2, ["base_url", "https://"]),
    ("[auth]\nmode = basic\n", 2, ["mode", "bearer"]),
    ("[store]\ndriver = oracle\n", 2, ["driver", "sqlite", "mssql"]),
    ("[store]\ndriver = mssql\nserver = db.example:1433\nconnection_file = /dev/null\n", 3,
     ["server", "connection_file says that already"]),
    ("[seal]\nkey_file = /dev/null\n", 2, ["key_file"]),
    ("[fallback]\nkey_file = /nonexistent/appSetting.txt\n", 2, ["/nonexistent/appSetting.txt"]),
])
def test_faulty_file_is_refused(tmp_path: Path, text: str, line: int, words: list[str]) -> None:
    """By --check-config and at start alike, with the line."""
    file = tmp_path / "extract-fcgi.conf"
    file.write_text(text)
    for arguments in (["--check-config"], []):
        refused = run(SERVICE, "--config", str(file), *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"extract-fcgi: {file}:{line}: ") and refused.stderr.count("\n") == 1
        assert all(word in refused.stderr for word in words), refused.stderr


@pytest.mark.parametrize("name, value, words", [
    ("EXTRACT_SERVER_THREAD", "3", ["unknown variable", "EXTRACT_SERVER_THREADS"]),
    ("EXTRACT_NONSENSE", "3", ["unknown variable"]),
    ("EXTRACT_SERVER_THREADS", "many", ["1024"]),
    ("EXTRACT_AUTH_MODE", "basic", ["bearer"]),
    ("EXTRACT_AUTH_KEY_RATE", "-1", ["0"]),
    ("EXTRACT_STORE_DRIVER", "oracle", ["sqlite", "mssql"]),
    ("EXTRACT_SEAL_KEY_FILE", "/nowhere/seal.key", ["/nowhere/seal.key"]),
    ("EXTRACT_RETRY_INITIAL_DELAY", "60", ["initial_delay", "max_delay"]),
])
def test_faulty_variable_is_refused(name: str, value: str, words: list[str]) -> None:
    for program in ([SERVICE, "--check-config"], [SERVICE]):
        refused = run(*program, env={name: value})
        assert (refused.returncode, refused.stdout) == (1, "")
        assert name in refused.stderr and all(word in refused.stderr for word in words), refused.stderr
    assert run(CTL, "token", "list", env={name: value}).returncode == 2


@pytest.mark.parametrize("missing", ["server", "database", "user", "password_file"])
def test_mssql_needs_to_know_its_server(missing: str) -> None:
    """All of it, or a connection_file."""
    known = {"server": "db.example:1433", "database": "extract", "user": "app", "password_file": "/dev/null"}
    env = {f"EXTRACT_STORE_{name.upper()}": value for name, value in known.items() if name != missing}
    for program in ([SERVICE, "--check-config"], [SERVICE]):
        refused = run(*program, env={"EXTRACT_STORE_DRIVER": "mssql", **env})
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"extract-fcgi: [store] {missing} ") and refused.stderr.count("\n") == 1
        assert "connection_file" in refused.stderr


@pytest.mark.parametrize("mode, says", [(0o600, "line 1 is not the base64 of 32 bytes"), (0o644, "open to every user")])
def test_faulty_sealing_key_is_refused(tmp_path: Path, mode: int, says: str) -> None:
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "key").chmod(mode)
    said = start_refused(tmp_path, EXTRACT_SEAL_KEY_FILE=str(tmp_path / "key"))
    assert f"seal.key_file: {tmp_path}/key " in said and says in said and "0123456789" not in said
    checked = run(CTL, "check", env=store_env(tmp_path, EXTRACT_SEAL_KEY_FILE=str(tmp_path / "key")))
    [line] = [line for line in checked.stdout.splitlines() if "seal.key_file" in line]
    assert line.startswith("FAIL") and says in line and "store.path" not in line  # it is not the store that is to be mended


def test_missing_file_is_refused() -> None:
    """The default one alone may be absent."""
    for refused in (run(SERVICE, "--config", "/nonexistent/a.conf", "--check-config"),
                    run(SERVICE, "--check-config", env={"EXTRACT_CONFIG": "/nonexistent/a.conf"})):
        assert refused.returncode == 1 and "/nonexistent/a.conf: No such file" in refused.stderr


# ---- extract-fcgi: start ----


def store_env(directory: Path, **more: str) -> dict[str, str]:
    return {"EXTRACT_SERVER_STATE_DIR": str(directory), "EXTRACT_SERVER_RUNTIME_DIR": str(directory), **more}


@pytest.mark.parametrize("kind", ["/dev/null", "pipe", "connection", "closed"])
def test_start_without_a_listening_socket(tmp_path: Path, kind: str) -> None:
    """Says how it is started, and has touched nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stdin: Any = {"/dev/null": subprocess.DEVNULL, "pipe": subprocess.PIPE, "connection": theirs,
                      "closed": subprocess.DEVNULL}[kind]
        command = ["/bin/sh", "-c", f"exec {SERVICE} <&-"] if kind == "closed" else [SERVICE]
        refused = run(*command, env=store_env(tmp_path), stdin=stdin)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "not a listening socket" in refused.stderr and "spawn-fcgi" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def start_on_a_socket(directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Starts the service as systemd would; for services that are expected to refuse."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / f"{uuid.uuid4().hex[:8]}.sock"))
        listener.listen()
        return run(SERVICE, env=store_env(directory, **env), stdin=listener)


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir"])
@pytest.mark.parametrize("path", ["missing", "file"])
def test_start_without_its_directories(tmp_path: Path, key: str, path: str) -> None:
    (tmp_path / "file").touch()
    refused = start_on_a_socket(tmp_path, **{f"EXTRACT_SERVER_{key.upper()}": str(tmp_path / path)})
    assert refused.returncode == 1
    assert f"server.{key}: " in refused.stderr and str(tmp_path / path) in refused.stderr


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir"])
def test_start_with_a_directory_that_is_not_writable(key: str) -> None:
    """Root may write everywhere: then it is tried by nobody."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        (directory / "closed").mkdir(0o555)
        service = shutil.copy(SERVICE, directory)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "pool.sock"))
            listener.listen()
            refused = run(service, stdin=listener, user=65534 if os.geteuid() == 0 else None, env=store_env(
                directory, **{f"EXTRACT_SERVER_{key.upper()}": str(directory / "closed")}))
        assert refused.returncode == 1 and f"server.{key}: " in refused.stderr
        assert list((directory / "closed").iterdir()) == []


@pytest.mark.parametrize("key, content", [("prompt_file", b""), ("schema_file", b"{"), ("ca_file", b"certificate")])
def test_start_with_a_useless_file(tmp_path: Path, key: str, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refused = start_on_a_socket(tmp_path, **{f"EXTRACT_GEMINI_{key.upper()}": str(tmp_path / "file")})
    assert refused.returncode == 1 and f"gemini.{key}" in refused.stderr, refused.stderr


def test_start_without_a_schema_that_it_may_not_create(tmp_path: Path) -> None:
    refused = start_on_a_socket(tmp_path, EXTRACT_STORE_AUTO_CREATE="no")
    assert refused.returncode == 1 and "extractctl migrate" in refused.stderr


def test_start_with_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"this is not a database, but long enough to look at" * 100)
    refused = start_on_a_socket(tmp_path)
    assert refused.returncode == 1 and "store" in refused.stderr
    assert (tmp_path / "store.db").read_bytes().startswith(b"this is not a database")


@pytest.fixture
def plain_front(tmp_path: Path) -> Iterator[int]:
    """An nginx that knows of nothing but Debian's fastcgi_params, before pool.sock in tmp_path; its port."""
    port = free_port()
    (tmp_path / "plain.conf").write_text(f"""
        {"user root;" if os.geteuid() == 0 else ""} daemon off; pid {tmp_path}/nginx.pid; events {{ }}
        http {{
            client_body_temp_path {tmp_path}/body; fastcgi_temp_path {tmp_path}/fastcgi; access_log off;
            proxy_temp_path {tmp_path}/proxy; scgi_temp_path {tmp_path}/scgi; uwsgi_temp_path {tmp_path}/uwsgi;
            server {{
                listen 127.0.0.1:{port};
                client_max_body_size 60m;
                location / {{
                    include /etc/nginx/fastcgi_params;
                    fastcgi_pass unix:{tmp_path}/pool.sock;
                }}
            }}
        }}
    """)
    process = start_nginx(tmp_path, tmp_path / "plain.conf")
    eventually(lambda: listening(port), "nginx listens")
    yield port
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)


def test_serves_with_variables_spawn_fcgi_and_any_nginx(plain_front: int, emulator: Emulator, pdf: bytes,
                                                        tmp_path: Path) -> None:
    """No configuration file, no multiwatch, no include of ours."""
    script = f"""
        EXTRACT_STORE_DRIVER=sqlite EXTRACT_STORE_PATH=$D/store.db \\
        EXTRACT_SERVER_STATE_DIR=$D EXTRACT_SERVER_RUNTIME_DIR=$D \\
        EXTRACT_GEMINI_BASE_URL={emulator.url} EXTRACT_AUTH_MODE=none \\
        exec spawn-fcgi -n -s $D/pool.sock -- {BUILD.name}/extract-fcgi
    """
    pool = subprocess.Popen(["/bin/sh", "-c", script], cwd=BUILD.parent, stderr=subprocess.PIPE,
                            env={"PATH": os.environ["PATH"], "D": str(tmp_path)})

    def request(method: str, path: str, body: bytes = b"", content_type: str = "") -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", plain_front, timeout=PATIENCE)) as client:
            client.request(method, path, body, {"Content-Type": content_type})
            answer = client.getresponse()
            return Answer(answer.status, answer.headers, answer.read())

    try:
        eventually(lambda: request("GET", "/healthz").status == 200, "the pool answers")
        added = run(CTL, "token", "add", "--company", "NT047", input=f"{SECRET}\n",
                    env=store_env(tmp_path, EXTRACT_STORE_PATH=f"{tmp_path}/store.db"))
        assert (added.returncode, added.stdout) == (0, "1\n"), added.stderr
        answer = request("POST", "/extract", *form(pdf))
        assert answer.status == 200 and answer.json()["status"] == "success"
        assert answer.headers.get_all("X-Request-ID") == [answer.json()["request_id"]]
        assert [call["key"] for call in emulator.log()] == [SECRET]
        with closing(sqlite3.connect(tmp_path / "store.db")) as store:
            assert store.execute("SELECT RequestID, TokenID, TotalTokensUsed FROM TokenUsageLogs").fetchall() == [
                (answer.json()["request_id"], 1, answer.json()["usage"]["total_tokens"])]
        refused = {("POST", "/extract?a=b"): (400, "bad_request"), ("GET", "/extract"): (405, "method_not_allowed"),
                   ("GET", "/nothing"): (404, "not_found"), ("POST", "/healthz"): (405, "method_not_allowed")}
        for (method, path), (status, code) in refused.items():
            answer = request(method, path)
            assert (answer.status, answer.code) == (status, code)
            assert answer.headers["Content-Type"] == "application/problem+json"
        large = request("POST", "/extract", *form(bytes(50 << 20)))
        assert (large.status, large.code) == (413, "file_too_large")
        assert request("HEAD", "/healthz").status == request("GET", "/readyz").status == 200
    finally:
        pool.terminate()
        _, stderr = pool.communicate(timeout=PATIENCE)
    assert (pool.returncode, stderr) == (0, b"")


# ---- extractctl: usage ----


@pytest.mark.parametrize("arguments", [
    [], ["nonsense"], ["token"], ["token", "nonsense"], ["token", "add"], ["token", "list", "--by", "day"],
    ["token", "set-status", "1"], ["token", "set-status", "1", "Broken"], ["token", "set-status", "one", "Active"],
    ["token", "set-limit", "1", "much"], ["token", "set-limit", "1", "-5"], ["token", "set-key"], ["usage", "more"],
    ["token", "set-limit", "1", "5", "--threshold", "2"], ["token", "set-limit", "1", "5", "--threshold", "0"],
    ["usage", "--by", "week"], ["usage", "--since", "yesterday"], ["usage", "--since", "2026-02-31"],
    ["usage", "--nonsense"], ["logs", "--rows", "0"], ["logs", "--request"], ["usage", "--by", "day", "--by", "user"],
    ["token", "list", "--company", " blank"], ["client-key", "add"], ["client-key", "revoke"], ["seal"],
], ids=" ".join)
def test_ctl_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    """Exit status 2, a line that says why, and no store was made."""
    wrong = run(CTL, *arguments, env=store_env(tmp_path))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--help" in wrong.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctl_help_and_version() -> None:
    for arguments in (["--help"], ["token", "--help"], ["token", "add", "--help"], ["usage", "--help"],
                      ["logs", "--help"], ["retries", "--help"], ["reservations", "--help"], ["outbox", "--help"],
                      ["check", "--help"], ["migrate", "--help"]):
        shown = run(CTL, *arguments)
        assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith("usage: extractctl ")
    overview = run(CTL, "--help").stdout
    for command in ("token add", "token list", "token set-status", "token set-key", "token set-limit", "usage", "logs",
                    "retries", "outbox status", "outbox drain", "reservations", "check", "migrate"):
        assert re.search(rf"^  {command}\b", overview, re.M), command
    assert run(CTL, "--version").stdout == f"extractctl {VERSION}\n"


# ---- extractctl: the store ----


@pytest.mark.parametrize("path", ["missing/store.db", "text", "."])
@pytest.mark.parametrize("command", ["token list", "usage", "logs", "retries", "reservations", "migrate",
                                     "token set-status 1 Active"])
def test_ctl_without_a_store(tmp_path: Path, path: str, command: str) -> None:
    """Exit status 3, and what to do next."""
    (tmp_path / "text").write_bytes(b"this is not a database" * 100)
    failed = run(CTL, *command.split(), env=store_env(tmp_path, EXTRACT_STORE_PATH=str(tmp_path / path)))
    assert (failed.returncode, failed.stdout) == (3, "")
    assert "Next: " in failed.stderr and str(tmp_path) in failed.stderr


@pytest.mark.parametrize("settings, command, status, says, next_step", [
    ({"EXTRACT_STORE_PATH": "{dir}/text"}, "usage", 3, "{dir}/text: ", "correct store.path, .* holds something else"),
    ({"EXTRACT_STORE_PATH": "{dir}"}, "usage", 3, "{dir}: ", "correct store.path, .* holds something else"),
    ({"EXTRACT_SERVER_STATE_DIR": "{dir}/none"}, "outbox status", 3, "server.state_dir: {dir}/none: No such file", "the directory {dir}/none"),
    ({"EXTRACT_SERVER_STATE_DIR": "{dir}/none"}, "outbox drain", 3, "server.state_dir: {dir}/none: No such file", "the directory {dir}/none"),
    ({"EXTRACT_SERVER_STATE_DIR": "{dir}/bad"}, "outbox status", 3, "outbox.db: file is not a database", "outbox.db in it is whole"),
    ({}, "token set-status 9 Active", 1, "there is no token 9", "`extractctl token list`"),
    ({}, "token set-limit 9 none", 1, "there is no token 9", "`extractctl token list`"),
    ({}, "client-key revoke 0123", 1, "there is no client key 0123", "`extractctl client-key list`"),
    ({}, "client-key add --company nobody", 0, "this once only", "`extractctl token add --company nobody`"),
])
def test_ctl_says_what_is_wrong_and_what_to_do(tmp_path: Path, settings: dict[str, str], command: str, status: int, says: str,
                                               next_step: str) -> None:
    (tmp_path / "text").write_bytes(b"this is not a database" * 100)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/outbox.db").write_bytes(b"this is not a database" * 100)
    done = run(CTL, *command.split(), env=store_env(tmp_path) | {name: value.format(dir=tmp_path) for name, value in settings.items()})
    lines = done.stderr.splitlines()
    assert done.returncode == status and says.format(dir=tmp_path) in lines[0], done
    assert re.search("^Next: .*" + next_step.format(dir=tmp_path), lines[1]) and lines[1].endswith(".") and len(lines) == 2


@pytest.mark.parametrize("company", ["A", "Müller & Söhne", "O'Neill's", "--company", "$HOME `id`", "'" * 256])
def test_ctl_next_step_is_a_command(tmp_path: Path, company: str) -> None:
    """Whatever the company is called, its name is one word of the command that comes next."""
    done = run(CTL, "client-key", "add", f"--company={company}", env=store_env(tmp_path))
    [command] = re.findall(r" yet: `extractctl (.*)`\.$", done.stderr, re.M)
    assert shlex.split(command) == ["token", "add", "--company", company]


def test_ctl_locked_store(tmp_path: Path) -> None:
    env = store_env(tmp_path, EXTRACT_STORE_QUERY_TIMEOUT="300ms")
    assert run(CTL, "token", "add", "--company", "A", input="key-of-a\n", env=env).returncode == 0
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as store:
        store.execute("BEGIN IMMEDIATE")
        locked = run(CTL, "token", "set-status", "1", "Disabled", env=env)
    assert locked.returncode == 3 and "locked" in locked.stderr
    assert f"Next: see who holds it (fuser -v {tmp_path}/store.db)" in locked.stderr


def test_ctl_file_that_it_may_not_read() -> None:
    """Root may read everything: then it is tried by nobody."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "a.conf").touch(mode=0)
        ctl = shutil.copy(CTL, directory)
        done = run(ctl, "--config", f"{directory}/a.conf", "usage", user=65534 if os.geteuid() == 0 else None)
    assert done.returncode == 2 and f"{directory}/a.conf: Permission denied\nNext: run it as root" in done.stderr


def test_ctl_unknown_company(tmp_path: Path) -> None:
    """Nothing is no error; but who misspelt the company learns of it."""
    env = store_env(tmp_path)
    assert run(CTL, "token", "add", "--company", "NT047", input="key-of-a\n", env=env).returncode == 0
    assert run(CTL, "usage", "--company", "nt047", env=env).stderr == "(nothing)\n"
    unknown = run(CTL, "usage", "--company", "NT074", env=env)
    assert (unknown.returncode, unknown.stdout) == (0, "") and "no token is of company NT074" in unknown.stderr


@pytest.mark.parametrize("arguments, says", [
    (["usage", "--colr"], "there is no option --colr"), (["usage", "-x"], "there is no option -x"),
    (["usage", "--nothing=3"], "there is no option --nothing\n"), (["usage", "--c", "x"], "more than one option begins so"),
    (["usage", "--json=3"], "--json takes no value"), (["usage", "--company"], "--company needs its ID"),
    (["token"], "add, list, set-status, set-key, set-limit"), (["outbox", "dran"], "there is no command `outbox dran`; there are: status, drain"),
    (["nonsense"], "there is no command `nonsense`"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_ctl_names_what_is_wrong_in_a_command_line(arguments: list[str], says: str) -> None:
    wrong = run(CTL, *arguments)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert says in wrong.stderr and re.fullmatch(r"extractctl: .*\nTry `extractctl[a-z -]* --help`\.\n", wrong.stderr)


def test_migrate(tmp_path: Path) -> None:
    """Creates the schema also where auto_create says no; a second time changes nothing; then the service starts."""
    env = store_env(tmp_path, EXTRACT_STORE_AUTO_CREATE="no")
    refused = run(CTL, "token", "list", env=env)
    assert refused.returncode == 3 and "extractctl migrate" in refused.stderr
    for _ in range(2):
        done = run(CTL, "migrate", "--json", env=env)
        assert (done.returncode, json.loads(done.stdout)) == (0, [{"SchemaVersion": 4}])
    assert re.fullmatch(r"SchemaVersion\s*\n\s*4\s*\n", run(CTL, "migrate", env=env).stdout)
    assert (tmp_path / "store.db").stat().st_mode & 0o777 == 0o600
    listed = run(CTL, "token", "list", "--json", env=env)
    assert (listed.returncode, json.loads(listed.stdout)) == (0, [])


@pytest.mark.parametrize("column, status", [("Version", 0), ("Major", 3)])
def test_newer_schema(tmp_path: Path, column: str, status: int) -> None:
    """A newer version is accepted, for rolling upgrades; one that says that older programs can't work is not."""
    env = store_env(tmp_path)
    assert run(CTL, "migrate", env=env).returncode == 0
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as store:
        store.execute(f"UPDATE SchemaVersion SET Version = 99, {column} = 99")
    assert run(CTL, "token", "list", env=env).returncode == status
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as store:
        assert store.execute("SELECT Version FROM SchemaVersion").fetchall() == [(99,)]


# ---- extractctl: tokens ----


def audit(stack: Stack, token: int) -> list[tuple[str, str]]:
    rows = stack.sql("SELECT Action, Actor, Detail, CompanyID FROM AuditLog WHERE ObjectType = 'TokenMaster'"
                     " AND ObjectID = ? ORDER BY AuditID", str(token))
    assert all(re.fullmatch(r".+@.+", row["Actor"]) and row["CompanyID"] for row in rows)
    return [(row["Action"], row["Detail"] or "") for row in rows]


def token_row(stack: Stack, token: int) -> dict[str, Any]:
    rows = json.loads(stack.ctl("token", "list", "--json").stdout)
    return next(row for row in rows if row["TokenID"] == token)


def test_token_add(stack: Stack, company: str) -> None:
    added = stack.ctl("token", "add", "--company", company, "--company-name", "Müller & Söhne", "--limit", "5000",
                      "--threshold", "0.5", "--provider", "Google", "--json", stdin=f"  {SECRET}\r\n")
    token = json.loads(added.stdout)[0]["TokenID"]
    assert stack.sql("SELECT ApiKey, Status FROM TokenMaster WHERE TokenID = ?", token) == [
        {"ApiKey": SECRET, "Status": "Active"}]
    row = token_row(stack, token)
    assert (row["CompanyID"], row["CompanyName"], row["Provider"]) == (company, "Müller & Söhne", "Google")
    assert (row["TotalTokenLimit"], row["TotalRemainingTokens"], row["Threshold"]) == (5000, 5000, 0.5)
    assert row["ApiKey"] == "…6789"
    assert [action for action, _ in audit(stack, token)] == ["token added"]
    listed = stack.ctl("token", "list", "--company", company.upper()).stdout
    header, line = listed.splitlines()
    assert header.split()[:2] == ["TokenID", "CompanyID"] and line.split()[:2] == [str(token), company]
    assert line.index(company) == header.index("CompanyID")


@pytest.mark.parametrize("stdin", ["", "\n", "two words\n", "ключ\n", "x" * 1025 + "\n", "tab\tin it\n"],
                         ids=["nothing", "empty", "blank", "not ASCII", "too long", "tab"])
def test_token_add_refuses_what_is_no_key(stack: Stack, company: str, stdin: str) -> None:
    refused = stack.ctl("token", "add", "--company", company, stdin=stdin, check=False)
    assert (refused.returncode, refused.stdout) == (2, "") and "API key" in refused.stderr
    assert stack.sql("SELECT 1 FROM TokenMaster WHERE CompanyID = ?", company) == []


@pytest.mark.parametrize("status", ["Expired", "exceeded", "DISABLED", "Active"])
def test_token_set_status(stack: Stack, company: str, status: str) -> None:
    token = stack.token(company)
    changed = stack.ctl("token", "set-status", str(token), status, "--reason", "as asked", "--json")
    assert json.loads(changed.stdout) == [{"TokenID": token, "Status": status.capitalize()}]
    row = token_row(stack, token)
    assert (row["Status"], row["StatusReason"]) == (status.capitalize(), "as asked")
    actions = audit(stack, token)
    assert len(actions) == 2 and status.capitalize() in actions[1][1]


def test_token_set_key(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """The next request goes with the new one."""
    token = stack.token(company, "key-before")
    changed = stack.ctl("token", "set-key", str(token), stdin=f"{SECRET}\n")
    assert SECRET not in changed.stdout + changed.stderr
    assert stack.post(pdf, company).status == 200
    assert [call["key"] for call in emulator.log()] == [SECRET]
    assert len(audit(stack, token)) == 2


def test_token_set_limit(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """A limit below what is used makes it Exceeded; a higher one, or none, makes it Active again."""
    token = stack.token(company)
    assert stack.post(pdf, company).status == 200
    used = token_row(stack, token)["TotalUsedTokens"]
    stack.ctl("token", "set-limit", str(token), "20000", "--threshold", "0.25")
    row = token_row(stack, token)
    assert (row["TotalTokenLimit"], row["TotalRemainingTokens"], row["Threshold"]) == (20000, 20000 - used, 0.25)
    stack.ctl("token", "set-status", str(token), "Exceeded")
    assert stack.post(pdf, company).code == "token_unavailable"
    stack.ctl("token", "set-limit", str(token), "30000")
    assert token_row(stack, token)["Status"] == "Active" and token_row(stack, token)["Threshold"] == 0.25
    changed = stack.ctl("token", "set-limit", str(token), "none", "--json")
    assert json.loads(changed.stdout) == [{"TokenID": token, "TotalTokenLimit": None}]
    assert (token_row(stack, token)["TotalTokenLimit"], token_row(stack, token)["TotalRemainingTokens"]) == (None, None)
    assert len(audit(stack, token)) == 5
    stack.balanced()


@pytest.mark.parametrize("command", [["set-status", "987654", "Active"], ["set-key", "987654"],
                                     ["set-limit", "987654", "5"]], ids=lambda c: c[0])
def test_token_that_does_not_exist(stack: Stack, command: list[str]) -> None:
    refused = stack.ctl("token", *command, stdin="some-key\n", check=False)
    assert (refused.returncode, refused.stdout) == (1, "") and refused.stderr
    assert audit(stack, 987654) == []


# ---- extractctl: what was done ----


@pytest.fixture(scope="module")
def history(_stack: Stack, _emulator: Emulator, pdf: bytes) -> dict[str, Any]:
    """Company H: three extractions, one of them at the second attempt, and one that failed for good."""
    _emulator.reset()
    token = _stack.token("H", "key-history")
    posts = [("anna", "Berlin"), ("anna", "Lyon"), ("bert", "Berlin")]
    _emulator.script("key-history", {}, {}, {"status": 503}, {}, {"close": "after_read"}, repeat=True)
    answers = [_stack.post(pdf, "H", user, branch) for user, branch in posts]
    failed = _stack.post(pdf, "H")
    assert [answer.status for answer in [*answers, failed]] == [200, 200, 200, 502]
    _stack.rows("SELECT 1 FROM RetryAttempts WHERE CompanyID = 'H'", count=5)
    _stack.rows("SELECT 1 FROM ApplicationLogs WHERE RequestID = ? AND LogLevel = 'ERROR'", failed.json()["request_id"])
    each = [answer.json()["usage"]["total_tokens"] for answer in answers]
    return {"token": token, "requests": [answer.json()["request_id"] for answer in answers],
            "failed": failed.json()["request_id"], "each": each[0], "all": sum(each)}


def listed(stack: Stack, *arguments: str) -> list[dict[str, Any]]:
    return json.loads(stack.ctl(*arguments, "--json").stdout)


@pytest.mark.parametrize("by, column, expected", [
    ("day", "Day", None), ("company", "CompanyID", {"H": 3}), ("branch", "Branch", {"Berlin": 2, "Lyon": 1}),
    ("user", "RequestedBy", {"anna": 2, "bert": 1}), ("token", "TokenID", {"token": 3})])
def test_usage(stack: Stack, history: dict[str, Any], by: str, column: str, expected: dict[str, int] | None) -> None:
    rows = listed(stack, "usage", "--company", "h", "--by", by)
    if expected is None:
        expected = {stack.sql("SELECT MIN(LoggedAt) AS First FROM TokenUsageLogs")[0]["First"][:10]: 3}
    expected = {history.get(name, name): count for name, count in expected.items()}
    assert {row[column]: row["Requests"] for row in rows} == expected
    assert {row[column]: row["TotalTokensUsed"] for row in rows} == {
        name: count * history["each"] for name, count in expected.items()}
    table = stack.ctl("usage", "--company", "H", "--by", by).stdout.splitlines()
    assert len(table) == 1 + len(expected) and column in table[0]


def test_usage_of_a_period(stack: Stack, history: dict[str, Any]) -> None:
    assert listed(stack, "usage") and listed(stack, "usage", "--since", "2026-01-01") == listed(stack, "usage")
    assert listed(stack, "usage", "--company", "H", "--since", "1h")[0]["Requests"] == 3
    assert listed(stack, "usage", "--since", "2999-01-01") == []
    assert listed(stack, "usage", "--until", "2020-01-01") == []
    assert listed(stack, "usage", "--company", "nobody") == []
    nothing = stack.ctl("usage", "--company", "nobody")
    assert (nothing.returncode, nothing.stdout) == (0, "") and "nothing" in nothing.stderr


def test_logs(stack: Stack, history: dict[str, Any]) -> None:
    """Newest first; of one request; errors only; of a time."""
    rows = listed(stack, "logs")
    assert [row["LogID"] for row in rows] == sorted((row["LogID"] for row in rows), reverse=True)
    assert {"INFO", "ERROR"} <= {row["LogLevel"] for row in rows}
    errors = listed(stack, "logs", "--errors")
    assert errors and {row["LogLevel"] for row in errors} <= {"ERROR", "CRITICAL"}
    of_one = listed(stack, "logs", "--request", history["requests"][0])
    assert [row["RequestID"] for row in of_one] == history["requests"][:1] and "extracted" in of_one[0]["Message"]
    failed = listed(stack, "logs", "--errors", "--request", history["failed"])
    assert len(failed) == 1 and failed[0]["Message"].startswith("upstream_unavailable")
    assert listed(stack, "logs", "--since", "2999-01-01") == []
    assert len(listed(stack, "logs", "--rows", "2")) == 2
    cut = stack.ctl("logs", "--rows", "2")
    assert len(re.findall(r"^\d{4}-\d\d-\d\dT", cut.stdout, re.M)) == 2 and "--rows" in cut.stderr


def test_retries(stack: Stack, history: dict[str, Any]) -> None:
    rows = listed(stack, "retries", "--company", "H")
    assert len(rows) == 5
    recovered = listed(stack, "retries", "--request", history["requests"][2])
    assert [(row["Attempt"], row["StatusCode"], row["IsRetryable"]) for row in recovered] == [(1, 503, 1)]
    failed = listed(stack, "retries", "--request", history["failed"], "--since", "1h")
    assert [row["Attempt"] for row in failed] == [4, 3, 2, 1] and {row["StatusCode"] for row in failed} == {None}
    assert "503" in stack.ctl("retries", "--request", history["requests"][2]).stdout


def test_reservations(stack: Stack, emulator: Emulator, crowd: Any, history: dict[str, Any], pdf: bytes) -> None:
    """The call that may have been billed is there until somebody has looked; so is one in flight, as open."""
    unsettled = listed(stack, "reservations", "--unsettled", "--company", "H")
    assert [(row["RequestID"], row["State"], row["UnknownCalls"]) for row in unsettled] == [
        (history["failed"], "unsettled", 4)]
    emulator.script("key-history", {"hold": True})
    answer = crowd.submit(stack.post, pdf, "H")
    emulator.wait(held=1)
    assert [row["State"] for row in listed(stack, "reservations", "--company", "H")] == ["open", "unsettled"]
    assert listed(stack, "reservations", "--unsettled", "--company", "H") == unsettled
    emulator.release()
    assert answer.result(PATIENCE).status == 200
    assert "unsettled" in stack.ctl("reservations", "--company", "H").stdout


def test_outbox(stack: Stack) -> None:
    """Empty where the store was always there."""
    assert listed(stack, "outbox", "status") == [{"Waiting": 0, "Records": 0, "Dead": 0, "OldestSeconds": 0}]
    assert listed(stack, "outbox", "drain") == [{"Replayed": 0, "Waiting": 0, "Records": 0, "Dead": 0}]
    assert stack.ctl("outbox", "status").stdout.split() == ["Waiting", "Records", "Dead", "OldestSeconds", "0", "0", "0", "0"]


def test_key_is_never_shown(stack: Stack, emulator: Emulator, company: str, pdf: bytes) -> None:
    """By no command, in no table but TokenMaster, by no answer: not even where Gemini repeats it."""
    key = f"AIzaSy-{uuid.uuid4().hex}"
    said = [stack.ctl("token", "add", "--company", company, stdin=key + "\n")]
    token = said[0].stdout.strip()
    emulator.script(key, {"status": 400, "message": f"API key not valid: {key}", "reason": "API_KEY_INVALID"})
    answer = stack.post(pdf, company)
    assert answer.code == "token_unavailable"
    said.append(stack.ctl("token", "set-key", token, stdin=key + "\n"))
    said.append(stack.ctl("token", "set-status", token, "Active"))
    stack.rows("SELECT 1 FROM RetryAttempts WHERE RequestID = ?", answer.json()["request_id"])
    stack.rows("SELECT 1 FROM ApplicationLogs WHERE RequestID = ?", answer.json()["request_id"])
    for command in ("token list", "usage --by token", "logs", "logs --errors", "retries", "reservations", "check",
                    "outbox status"):
        said += [stack.ctl(*command.split(), check=False), stack.ctl(*command.split(), "--json", check=False)]
    assert not [result.args for result in said if key in result.stdout + result.stderr]
    assert key.encode() not in answer.body
    assert [table for table in stack.tables() if key in json.dumps(stack.sql(f'SELECT * FROM "{table}"'))] == [
        "TokenMaster"]


# ---- extractctl check ----


def results(output: str) -> dict[str, str]:
    return {row["Check"]: row["Result"] for row in json.loads(output)}


def test_check(make_stack: Callable[..., Stack], pdf: bytes) -> None:
    """Before and after the installation is complete."""
    stack = make_stack()
    plain = stack.ctl("check")
    assert plain.returncode == 0 and {line.split()[0] for line in plain.stdout.splitlines()} == {"ok"}
    assert len(plain.stdout.splitlines()) == len(listed(stack, "check"))
    early = stack.ctl("check", "--after-install", "--json", check=False)
    assert early.returncode == 1
    assert [name for name, result in results(early.stdout).items() if result != "ok"] == ["tokens"]
    stack.token()
    assert stack.ctl("check", "--after-install").returncode == 0
    stack.sql("INSERT INTO ApplicationLogs (LogLevel, Message) VALUES ('ERROR', 'something')")
    noisy = stack.ctl("check", "--after-install", check=False)
    assert noisy.returncode == 1 and re.search(r"^FAIL +errors .*logs --errors", noisy.stdout, re.M)
    assert stack.ctl("check").returncode == 0


# Settings with which the store cannot be opened.
NO_STORE = {
    "sqlite": [{"EXTRACT_STORE_PATH": "/nonexistent/store.db"}, {"EXTRACT_STORE_PATH": "{text}"}],
    "mssql": [{"EXTRACT_STORE_SERVER": "127.0.0.1:1"}, {"EXTRACT_STORE_DATABASE": "nonexistent"},
              {"EXTRACT_STORE_PASSWORD_FILE": "{text}"}],
}[TEST_STORE]
SAYS_WHAT_TO_DO = r": run `|correct store\.|must hold a password"


@pytest.mark.parametrize("env, failing, status", [
    ({"EXTRACT_GEMINI_BASE_URL": "http://127.0.0.1:1"}, "Gemini", 1),
    ({"EXTRACT_SERVER_STATE_DIR": "/nonexistent"}, "state_dir", 1),
    ({"EXTRACT_SERVER_RUNTIME_DIR": "/nonexistent"}, "runtime_dir", 1),
    *[(env, "store", 3) for env in NO_STORE],
    ({"EXTRACT_NONSENSE": "1"}, "configuration", 1),
], ids=lambda value: value if isinstance(value, str) else "")
def test_check_names_what_is_wrong(stack: Stack, tmp_path: Path, env: dict[str, str], failing: str,
                                   status: int) -> None:
    """With a remedy, as a line and as JSON, unless it says itself what to correct."""
    (tmp_path / "text").write_bytes(b"this is not a database" * 100)
    env = {name: value.replace("{text}", str(tmp_path / "text")) for name, value in env.items()}
    for arguments in ([], ["--json"]):
        checked = run(CTL, "check", *arguments, env={**{k: v for k, v in stack.env.items() if k.startswith("EXTRACT_")},
                                                     **env})
        assert checked.returncode == status, checked
        if arguments:
            rows = json.loads(checked.stdout)
            assert [row["Check"] for row in rows if row["Result"] != "ok"] == [failing]
            assert all(row["Next"] or re.search(SAYS_WHAT_TO_DO, row["Detail"]) for row in rows if row["Result"] != "ok")
        else:
            assert re.search(rf"^FAIL +{failing} .*(; next: |{SAYS_WHAT_TO_DO})", checked.stdout, re.M), checked.stdout


def test_check_changes_nothing(tmp_path: Path, emulator: Emulator) -> None:
    """On a machine without a store it makes none."""
    checked = run(CTL, "check", env=store_env(tmp_path, EXTRACT_GEMINI_BASE_URL=emulator.url))
    assert checked.returncode in (1, 3) and "extractctl migrate" in checked.stdout
    assert list(tmp_path.iterdir()) == []
