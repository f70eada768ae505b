"""The TDS server against the unmodified FreeTDS: tsql, and db-lib by ctypes."""
from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from stand_in import ATTEMPT, ENTRY, PROCEDURES  # noqa: E402
from tds_client import Connection, LoginRefused, SqlError  # noqa: E402
from tds_process import PASSWORD, TdsServer  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TdsServer]:
    with TdsServer(tmp_path_factory.mktemp("tds"), encryption="on", app_user="app") as started:
        with closing(started.connect()) as sa:
            sa.query("CREATE DATABASE store")
            sa.query("USE store")
            sa.query("CREATE TABLE dbo.SchemaVersion (Version INT)")
            for procedure in PROCEDURES.values():
                sa.query(f"CREATE PROCEDURE dbo.{procedure.work.__name__} AS RETURN 0")
            sa.query("INSERT INTO dbo.SchemaVersion (SchemaVersionID, Version, Major) VALUES (1, 1, 1)")
        yield started


@pytest.fixture
def sa(server: TdsServer) -> Iterator[Connection]:
    server.control(do="reset")
    with closing(server.connect("store")) as connection:
        yield connection


# ---- db-lib ----

CHARACTERS, NTEXT, BIGINT, FLOAT = 39, 99, 127, 62
HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p,
                           ctypes.c_char_p)
MESSAGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int, ctypes.c_int, ctypes.c_char_p,
                           ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)


class DbLib:
    """As the driver uses it: RPC, and nothing else."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL("libsybdb.so.5")
        for name in ("dblogin", "dbopen", "tdsdbopen", "dbdata", "dbcolname"):
            getattr(self.c, name).restype = ctypes.c_void_p
        self.errors: list[int] = []
        self.messages: list[int] = []
        self._error = HANDLER(lambda _p, _s, number, *_: self.errors.append(number) or 2)  # INT_CANCEL
        self._message = MESSAGE(lambda _p, number, *_: self.messages.append(number) or 0)
        self.c.dbinit()
        self.c.dberrhandle(self._error)
        self.c.dbmsghandle(self._message)

    def open(self, server: str, user: str = "sa", password: str = PASSWORD, seconds: int = 10) -> Any:
        login = ctypes.c_void_p(self.c.dblogin())
        self.errors.clear()
        self.messages.clear()
        self.c.dbsetlogintime(seconds)
        self.c.dbsettime(seconds)
        for which, value in ((2, user), (3, password), (5, "tests"), (10, "UTF-8"), (14, "store")):
            assert self.c.dbsetlname(login, value.encode(), which) == 1
        assert self.c.dbsetlversion(login, 8) == 1  # 7.4
        opened = self.c.tdsdbopen(login, server.encode(), 0)
        self.c.dbloginfree(login)
        return ctypes.c_void_p(opened) if opened else None

    def call(self, p: Any, name: str, *parameters: tuple[str, int, Any]) -> list[dict[str, Any]] | None:
        """The rows; None after an error."""
        keep = []
        self.errors.clear()
        self.messages.clear()
        assert self.c.dbrpcinit(p, name.encode(), 0) == 1
        for parameter, kind, value in parameters:
            raw: Any = None if value is None else value.encode() if kind in (CHARACTERS, NTEXT) else value
            if kind == BIGINT:
                cell, size = ctypes.c_int64(raw or 0), -1 if raw is not None else 0
            elif kind == FLOAT:
                cell, size = ctypes.c_double(raw or 0), -1 if raw is not None else 0
            else:
                cell, size = ctypes.create_string_buffer(raw or b""), len(raw or b"")
            keep.append((cell, parameter.encode()))
            data = None if raw is None else ctypes.byref(cell)
            assert self.c.dbrpcparam(p, keep[-1][1], ctypes.c_ubyte(0), kind, -1, size, data) == 1
        if self.c.dbrpcsend(p) != 1 or self.c.dbsqlok(p) != 1:
            return None
        return self._rows(p)

    def _rows(self, p: Any) -> list[dict[str, Any]] | None:
        rows = []
        while (result := self.c.dbresults(p)) == 1:
            columns = range(1, self.c.dbnumcols(p) + 1)
            names = [ctypes.string_at(self.c.dbcolname(p, n)).decode() for n in columns]
            while (row := self.c.dbnextrow(p)) == -1:
                rows.append({name: self._value(p, n) for name, n in zip(names, columns, strict=True)})
            if row == 0:
                return None
        return rows if result == 2 and not [m for m in self.messages if m > 0 and m not in (5701, 5703)] else None

    def _value(self, p: Any, n: int) -> Any:
        data, size = self.c.dbdata(p, n), self.c.dbdatlen(p, n)
        if not data:
            return None
        raw = ctypes.string_at(data, size)
        kind = self.c.dbcoltype(p, n)
        if kind in (56, 127, 52, 48):
            return int.from_bytes(raw, "little", signed=True)
        return ctypes.c_double.from_buffer_copy(raw).value if kind == 62 else raw.decode()

    def dead(self, p: Any) -> bool:
        return bool(self.c.dbdead(p) & 0xFF)

    def close(self, p: Any) -> None:
        self.c.dbclose(p)


@pytest.fixture(scope="module")
def dblib(server: TdsServer) -> DbLib:
    conf = server.directory / "freetds.conf"
    conf.write_text(f"[global]\nencryption = require\nca file = {server.directory}/tls/good.pem\n"
                    "check certificate hostname = no\ntext size = 2147483647\n")
    os.environ["FREETDSCONF"] = str(conf)
    return DbLib()


@pytest.fixture
def dbproc(server: TdsServer, dblib: DbLib) -> Iterator[Any]:
    p = dblib.open(server.address)
    assert p is not None, dblib.errors
    yield p
    dblib.close(p)


# ---- logging in ----


@pytest.mark.parametrize("mode", ["off", "request", "require"])
@pytest.mark.parametrize("serving", ["off", "on", "required"])
def test_encryption(tmp_path: Path, mode: str, serving: str) -> None:
    with TdsServer(tmp_path, encryption=serving) as other:
        conf = tmp_path / "freetds.conf"
        conf.write_text(f"[global]\ntds version = 7.4\nclient charset = UTF-8\nencryption = {mode}\n")
        done = subprocess.run(["tsql", "-H", "127.0.0.1", "-p", other.address.rpartition(":")[2], "-U", "sa", "-P",
                               PASSWORD, "-o", "fhq"], input="SELECT 'x' AS a, N'Grüße 😀' AS b, NULL AS c\ngo\n",
                              capture_output=True, text=True, timeout=30,
                              env={**os.environ, "FREETDSCONF": str(conf), "LC_ALL": "C.UTF-8"})
    if (mode, serving) == ("require", "off"):
        assert "Grüße" not in done.stdout and done.returncode != 0, done
    else:
        assert done.stdout.split("\n")[0].split("\t") == ["x", "Grüße 😀", "NULL"], done


def test_login(server: TdsServer, sa: Connection) -> None:
    for user, password, database, number in (("sa", "wrong", "", 18456), ("nobody", PASSWORD, "", 18456),
                                             ("sa", PASSWORD, "missing", 4060)):
        with pytest.raises(LoginRefused) as refused:
            Connection(server.address, user, password, database)
        assert refused.value.number == number
    server.control(do="logins", refuse=40613)
    with pytest.raises(LoginRefused) as refused:
        server.connect()
    assert refused.value.number == 40613
    assert server.control(do="state")["refused"] == 4


def test_bad_certificate(server: TdsServer, sa: Connection, dblib: DbLib) -> None:
    server.control(do="certificate", which="bad")
    assert dblib.open(server.address) is None
    server.control(do="certificate", which="good")
    p = dblib.open(server.address)
    assert p is not None
    dblib.close(p)


def test_rights(server: TdsServer, sa: Connection) -> None:
    with closing(Connection(server.address, "app", PASSWORD, "store")) as app:
        for sql, number in (("SELECT * FROM TokenMaster", 229), ("CREATE TABLE x (a INT)", 262),
                            ("GRANT EXECUTE ON dbo.usp_Ping TO app", 262), ("CREATE DATABASE mine", 262)):
            with pytest.raises(SqlError) as refused:
                app.query(sql)
            assert refused.value.number == number
        assert app.query("EXEC dbo.usp_Ping") == [(["Ok"], [[1]])]


# ---- calls ----


def entry(**members: Any) -> dict[str, Any]:
    return dict.fromkeys(ENTRY) | {"timestamp": "2026-11-22T12:13:21.123Z", "level": "INFO", "line": 1} | members


@pytest.mark.parametrize("length", [1, 3999, 4000, 4001, 8001, 100_000])
@pytest.mark.parametrize("character", ["x", "ü", "漢", "😀"])
def test_long_texts(sa: Connection, dblib: DbLib, dbproc: Any, character: str, length: int) -> None:
    sa.query("DELETE FROM ApplicationLogs")
    message = character * length
    entries = json.dumps([entry(message=message, exception="")], ensure_ascii=False)
    assert dblib.call(dbproc, "dbo.usp_RecordLogs", ("@Entries", NTEXT, entries), ("@Attempts", NTEXT, "[]")) == []
    assert sa.rows("SELECT Message, Exception FROM ApplicationLogs") == [{"Message": message, "Exception": ""}]
    [row] = dblib.call(dbproc, "dbo.usp_ListLogs", ("@Rows", BIGINT, 10)) or []
    assert (row["Message"], row["Exception"] or "", row["RequestID"]) == (message, "", None)


def test_types(sa: Connection, dblib: DbLib, dbproc: Any) -> None:
    sa.query("DELETE FROM TokenUsageSummary; ".split(";")[0])
    sa.query("DELETE FROM TokenMaster")

    def add(company: str, limit: int | None, threshold: float | None) -> list[dict[str, Any]] | None:
        return dblib.call(dbproc, "usp_AddToken", ("@Actor", CHARACTERS, "anna"), ("@CompanyID", CHARACTERS, company),
                          ("@CompanyName", CHARACTERS, None), ("@Provider", CHARACTERS, None),
                          ("@ApiKey", CHARACTERS, "key-" + "k" * 1000), ("@TotalTokenLimit", BIGINT, limit),
                          ("@Threshold", FLOAT, threshold))

    [row] = add("Ánh Dương 東京", 2 ** 53 + 1, 0.1) or []
    assert (row["Code"], row["TokenID"] > 0) == ("ok", True)
    assert add("B", None, None) is not None
    rows = dblib.call(dbproc, "usp_ListTokens") or []
    assert [(r["CompanyID"], r["CompanyName"], r["TotalTokenLimit"], r["Threshold"]) for r in rows] \
        == [("B", None, None, 0.8), ("Ánh Dương 東京", None, 2 ** 53 + 1, 0.1)]


@pytest.mark.parametrize("name, parameters, number", [
    ("usp_Nothing", [], 2812),
    ("usp_Ping", [("@More", BIGINT, 1)], 8144),
    ("usp_SettleUsage", [("@Item", NTEXT, "[]")], 8145),
    ("usp_SettleUsage", [], 201),
    ("usp_SetTokenKey", [("@Actor", CHARACTERS, "a"), ("@TokenID", CHARACTERS, "x"), ("@ApiKey", CHARACTERS, "k")], 8114),
    ("usp_SettleUsage", [("@Items", NTEXT, "[")], 13609),
    ("usp_SettleUsage", [("@Items", NTEXT, '[{"i": 0}]')], 13608),
    ("usp_RecordLogs", [("@Entries", NTEXT, json.dumps([entry(odd=1)])), ("@Attempts", NTEXT, "[]")], 50901),
    ("usp_RecordLogs", [("@Entries", NTEXT, "[]"), ("@Attempts", NTEXT, json.dumps([dict.fromkeys(ATTEMPT, "x")]))], 245),
])
def test_refusals(sa: Connection, dblib: DbLib, dbproc: Any, name: str, parameters: list[Any], number: int) -> None:
    assert dblib.call(dbproc, name, *parameters) is None
    assert number in dblib.messages
    assert dblib.call(dbproc, "usp_Ping") == [{"Ok": 1}], "the connection is as good as before"


def test_calls_in_batches(sa: Connection) -> None:
    """With literals, as a DBA writes them."""
    add = "EXEC dbo.usp_AddToken @Actor = N'it''s me', @CompanyID = 'B, @C = 1', @ApiKey = N'key'"
    [(names, [[code, message, token]])] = sa.query(f"{add}, @TotalTokenLimit = 12, @Threshold = 0.5, @Provider = NULL")
    assert (names, code, message) == (["Code", "Message", "TokenID"], "ok", None)
    assert sa.rows("SELECT CompanyID, TotalTokenLimit FROM TokenMaster WHERE TokenID = ?", token) \
        == [{"CompanyID": "B, @C = 1", "TotalTokenLimit": 12}]
    assert sa.rows("SELECT Actor FROM AuditLog ORDER BY AuditID DESC")[0] == {"Actor": "it's me"}
    for call, number in (("EXEC usp_SetTokenKey @Actor = N'a', @TokenID = 1", 201),
                         ("EXEC usp_SetTokenKey @Actor = N'a', @TokenID = N'1', @ApiKey = N'k'", 8114)):
        with pytest.raises(SqlError) as refused:
            sa.query(call)
        assert refused.value.number == number


def test_comments(sa: Connection) -> None:
    """Keys are random, and may hold what looks like one."""
    assert sa.rows("SELECT /* none */ 'K--x''/*y*/' AS a, ? AS b -- nor this", "--'z") == [{"a": "K--x'/*y*/", "b": "--'z"}]


def test_scripts_to_their_end(server: TdsServer, sa: Connection, tmp_path: Path) -> None:
    """--keep-going: an error ends its batch only."""
    script = tmp_path / "script.sql"
    script.write_text("DELETE FROM ApplicationLogs\nGO\nSELECT Odd FROM Nowhere\nGO\n"
                      "INSERT INTO ApplicationLogs (LogLevel) VALUES ('INFO')\nGO\n")
    (tmp_path / "password").write_text(PASSWORD)
    command = [str(HERE / "tds_client.py"), "--server", server.address, "--user", "sa", "--password-file",
               str(tmp_path / "password"), "--database", "store", "--script", str(script)]
    for more, status, rows in (([], 1, 0), (["--keep-going"], 0, 1)):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=30)
        assert done.returncode == status and "batch 2: error 208" in done.stdout + done.stderr
        assert sa.rows("SELECT COUNT(*) AS n FROM ApplicationLogs") == [{"n": rows}]


def test_application_lock(server: TdsServer, sa: Connection) -> None:
    def take(timeout: int) -> str:
        return f"EXEC sp_getapplock @Resource = N'x', @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = {timeout}"

    with closing(server.connect("store")) as other:
        sa.query(take(0))
        assert other.query(take(50)) == [([""], [[-1]])]
        sa.query("EXEC sp_releaseapplock @Resource = N'x', @LockOwner = 'Session'")
        assert other.query(take(50)) == []
    assert sa.query(take(5000)) == [], "a session that ends lets go"


def test_transactions(server: TdsServer, sa: Connection) -> None:
    def add(connection: Connection, key: str) -> None:
        call = f"EXEC dbo.usp_AddClientKey @Actor = N'anna', @ClientKeyID = N'{key}', @KeyHash = N'{key * 64}'"
        assert connection.rows(call) == [{"Code": "ok", "Message": None}]

    def count() -> Any:
        return sa.rows("SELECT COUNT(*) AS n FROM ClientKeys")[0]["n"]

    sa.query("DELETE FROM ClientKeys")
    with closing(server.connect("store")) as other:
        for word, there, number in (("ROLLBACK", 0, 3903), ("COMMIT", 1, 3902)):
            other.query("BEGIN TRANSACTION")
            add(other, "a")
            other.query(f"{word} TRANSACTION")
            assert count() == there
            with pytest.raises(SqlError) as refused:
                other.query(f"{word} TRANSACTION")
            assert refused.value.number == number
        other.query("BEGIN TRANSACTION")
        add(other, "b")
        with pytest.raises(SqlError):
            other.query("EXEC dbo.usp_RevokeClientKey @Nobody = 1")
        assert count() == 1, "an error ends it"
        other.query("BEGIN TRANSACTION")
        add(other, "c")
    assert count() == 1, "and so does the end of the session"


# ---- faults ----


def test_errors_for_the_next_calls(server: TdsServer, sa: Connection, dblib: DbLib, dbproc: Any) -> None:
    server.control(do="fault", kind="error", procedure="usp_Ping", number=1205, times=2)
    for number in (1205, 1205):
        assert dblib.call(dbproc, "usp_SchemaVersion") == [{"Version": 1, "Major": 1}]
        assert dblib.call(dbproc, "usp_Ping") is None and number in dblib.messages
    assert dblib.call(dbproc, "usp_Ping") == [{"Ok": 1}]
    assert server.control(do="state")["calls"] == {"usp_SchemaVersion": 2, "usp_Ping": 3}


@pytest.mark.parametrize("kind, happens", [("drop_before", 0), ("drop_mid_result", 1), ("drop_after_commit", 1)])
def test_dropped(server: TdsServer, sa: Connection, dblib: DbLib, dbproc: Any, kind: str, happens: int) -> None:
    before = sa.rows("SELECT COUNT(*) AS n FROM ApplicationLogs")[0]["n"]
    server.control(do="fault", kind=kind, procedure="usp_RecordLogs")
    arguments = ("@Entries", NTEXT, json.dumps([entry(message="once")])), ("@Attempts", NTEXT, "[]")
    assert dblib.call(dbproc, "usp_RecordLogs", *arguments) is None
    assert dblib.dead(dbproc)
    assert sa.rows("SELECT COUNT(*) AS n FROM ApplicationLogs")[0]["n"] == before + happens


def test_slow(server: TdsServer, sa: Connection, dblib: DbLib) -> None:
    p = dblib.open(server.address, seconds=1)
    server.control(do="fault", kind="slow", procedure="usp_Ping", seconds=0.2)
    assert dblib.call(p, "usp_Ping") == [{"Ok": 1}]
    server.control(do="fault", kind="slow", procedure="usp_Ping", seconds=30)
    begin = time.monotonic()
    assert dblib.call(p, "usp_Ping") is None
    assert 20003 in dblib.errors and time.monotonic() - begin < 10  # SYBETIME
    dblib.close(p)


def test_deadlocks_are_drawn_alike(server: TdsServer, sa: Connection, dblib: DbLib, dbproc: Any) -> None:
    def play() -> list[bool]:
        server.control(do="deadlocks", share=0.1, seed=7)
        return [dblib.call(dbproc, "usp_Ping") is None for _ in range(100)]

    first = play()
    assert 3 < sum(first) < 25 and play() == first


@pytest.mark.parametrize("command", ["{}", "nonsense", '{"do": "fault", "kind": "odd"}',
                                     '{"do": "fault", "kind": "error"}', '{"do": "fault", "kind": "slow", "x": 1}'])
def test_control_refuses(server: TdsServer, command: str) -> None:
    assert "error" in server.send_control(command)


# ---- whoever speaks no TDS ----


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n\r\n", b"\x12\x01\0\x09\0\0\0\0\0", b"\x10\x01\0\x10\0\0\0\0" + b"\0" * 8,
                                  b"\x12\x01\0\x0e\0\0\0\0\1\0\xff\0\x09\xff", b""])
def test_noise(server: TdsServer, sa: Connection, data: bytes) -> None:
    import socket
    with closing(socket.create_connection(server.address.split(":"), 10)) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        while s.recv(4096):
            pass
    assert sa.query("EXEC usp_Ping") == [(["Ok"], [[1]])]
