#!/usr/bin/python3
"""A TDS 7.4 server for tests: SQL Server's part of the conversation with FreeTDS, with faults on demand.

    tds_server.py --listen 127.0.0.1:0 --control 127.0.0.1:0 --password-file FILE [--directory DIR]
                  [--user sa] [--app-user NAME] [--tls DIR] [--encryption off|on|required]

What it is and how to use it: README.md. The databases are stand_in.py's.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import tds
from stand_in import PROCEDURES, Database, Result, ServerError, call
from tds import DONE, DONE_ATTENTION, DONE_COUNT, DONE_ERROR, DONE_MORE, DONEINPROC, DONEPROC, Reader, Wire, Writer

NAME = "tds_server"
VERSION = bytes([16, 0, 16, 26])
MESSAGES = {
    1205: (13, 51, "Transaction was deadlocked on lock resources with another process and has been chosen as the"
                   " deadlock victim. Rerun the transaction."),
    1222: (16, 51, "Lock request time out period exceeded."),
    1105: (17, 2, "Could not allocate space for an object in the database because the filegroup is full."),
    9002: (17, 2, "The transaction log for the database is full."),
    40613: (17, 1, "Database is not currently available. Please retry the connection later."),
    18456: (14, 1, "Login failed."),
}


# ---- faults ----


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` calls of a procedure, or of any ("*")."""

    kind: str  # one of KINDS
    procedure: str = "*"
    times: int = 1
    skip: int = 0  # so many calls go well before
    number: int = 0  # of an error
    seconds: float = 0.0  # of a slow one


KINDS = ("error", "slow", "drop_before", "end_tls", "drop_mid_result", "drop_after_commit")


class Faults:
    """What the control port has ordered, and what came."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sockets: set[socket.socket] = set()  # of the sessions that are open
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.faults: list[Fault] = []
            self.deadlocks, self.random = 0.0, random.Random(0)
            self.refuse_logins, self.refuse_times, self.login_seconds = 0, -1, 0.0
            self.bad_certificate = self.away = False
            self.calls: dict[str, int] = {}
            self.counts = {"connections": 0, "logins": 0, "refused": 0, "deadlocks": 0, "played": 0, "attentions": 0}

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def next_login(self) -> int:
        """The error of this login."""
        with self.lock:
            if self.refuse_times == 0:
                return 0
            self.refuse_times -= 1
            return self.refuse_logins

    def next(self, procedure: str) -> Fault | None:
        """The fault of this call."""
        with self.lock:
            self.calls[procedure] = self.calls.get(procedure, 0) + 1
            for fault in self.faults:
                if fault.procedure.lower() not in ("*", procedure.lower()):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
                self.counts["played"] += 1
                return fault
            if self.deadlocks > 0 and self.random.random() < self.deadlocks:
                self.counts["deadlocks"] += 1
                return Fault("error", number=1205)
        return None

    def order(self, command: dict[str, Any]) -> Any:
        """One command of the control port."""
        do = command.pop("do", None)
        if do == "reset":
            self.reset()
        elif do == "fault":
            fault = Fault(**command)
            if fault.kind not in KINDS or (fault.kind == "error") != (fault.number > 0):
                raise ValueError("kind is one of " + ", ".join(KINDS) + "; an error has a number")
            with self.lock:
                self.faults.append(fault)
        elif do == "deadlocks":
            with self.lock:
                self.deadlocks, self.random = float(command["share"]), random.Random(command.get("seed", 0))
        elif do == "logins":
            with self.lock:
                self.refuse_logins, self.login_seconds = command.get("refuse", 0), command.get("seconds", 0.0)
                self.refuse_times = command.get("times", -1)
        elif do == "certificate":
            with self.lock:
                self.bad_certificate = command["which"] == "bad"
        elif do == "disconnect":
            with self.lock:
                for one in self.sockets:
                    one.shutdown(socket.SHUT_RDWR)
                return {"disconnected": len(self.sockets)}
        elif do == "away":
            self.away = bool(command["away"])
        elif do == "state":
            with self.lock:
                return {"calls": dict(self.calls), "waiting": [dataclasses.asdict(f) for f in self.faults], **self.counts}
        else:
            raise ValueError(f"nobody knows how to do {do!r}")
        return {"ok": True}


# ---- what is shared ----


class AppLock:
    """sp_getapplock's exclusive locks, owned by sessions."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.owners: dict[tuple[str, str], list[Any]] = {}  # (database, resource): [session, how often]

    def take(self, key: tuple[str, str], session: object, timeout_ms: int) -> int:
        """0: at once, 1: after waiting, -1: timeout; as the return code of sp_getapplock."""
        deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms >= 0 else None
        with self.condition:
            waited = 0
            while (owner := self.owners.get(key)) is not None and owner[0] is not session:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return -1
                waited = 1
                self.condition.wait(left)
            if owner is None:
                self.owners[key] = [session, 0]
            self.owners[key][1] += 1
            return waited

    def give(self, key: tuple[str, str], session: object) -> int:
        with self.condition:
            owner = self.owners.get(key)
            if owner is None or owner[0] is not session:
                return -999
            owner[1] -= 1
            if owner[1] == 0:
                del self.owners[key]
                self.condition.notify_all()
            return 0

    def give_all(self, session: object) -> None:
        with self.condition:
            for key in [k for k, owner in self.owners.items() if owner[0] is session]:
                del self.owners[key]
            self.condition.notify_all()


class Databases:
    def __init__(self, directory: Path) -> None:
        self.directory, self.lock = directory, threading.Lock()
        self.open: dict[str, Database] = {}

    def _path(self, name: str) -> Path:
        if not re.fullmatch(r"\w{1,100}", name):
            raise ServerError(911, f"Database '{name}' does not exist.")
        return self.directory / f"{name.lower()}.db"

    def get(self, name: str) -> Database:
        with self.lock:
            path = self._path(name)
            if not path.exists() and name.lower() not in ("master", "tempdb"):
                raise ServerError(911, f"Database '{name}' does not exist. Make sure that the name is entered correctly.")
            if name.lower() not in self.open:
                self.open[name.lower()] = Database(path)
            return self.open[name.lower()]

    def create(self, name: str) -> None:
        with self.lock:
            if self._path(name).exists():
                raise ServerError(1801, f"Database '{name}' already exists.")
            self.open[name.lower()] = Database(self._path(name))

    def drop(self, name: str) -> None:
        with self.lock:
            if not self._path(name).exists():
                raise ServerError(3701, f"Cannot drop the database '{name}', because it does not exist.")
            if (database := self.open.pop(name.lower(), None)) is not None:
                database.close()
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._path(name)}{suffix}").unlink(missing_ok=True)


@dataclasses.dataclass
class Settings:
    databases: Databases
    users: dict[str, str]  # name: password
    app_users: set[str]  # those of them who may only execute the procedures
    encryption: int  # of ENCRYPT_*
    good: ssl.SSLContext | None = None
    bad: ssl.SSLContext | None = None
    faults: Faults = dataclasses.field(default_factory=Faults)
    locks: AppLock = dataclasses.field(default_factory=AppLock)
    verbose: bool = False


# ---- SQL batches ----

TEXT = r"N?'((?:[^']|'')*)'"
STRING = re.compile(r"\bN('(?:[^']|'')*')", re.I)
SYSUTC = re.compile(r"DATEADD\(\s*(MILLI)?SECOND\s*,\s*(-?\d+)\s*,\s*SYSUTCDATETIME\(\)\s*\)", re.I)
CHECK = re.compile(r"ALTER TABLE (\w+) (?:WITH \w+ )?ADD CONSTRAINT (\w+) CHECK \((.*)\);?\s*$", re.I | re.S)
RENAME = re.compile(rf"EXEC(?:UTE)? (?:sys\.)?sp_rename {TEXT}, {TEXT}(?:, N'OBJECT')?;?\s*$", re.I)
CALL = re.compile(rf"EXEC(?:UTE)?\s+((?:dbo\.)?usp_\w+)((?:[\s,]+@\w+\s*=\s*(?:{TEXT}|[\w.-]+))*)\s*;?", re.I)
TRANSACTION = re.compile(r"(BEGIN|COMMIT|ROLLBACK) TRAN(?:SACTION)?;?$", re.I)
GET_LOCK = re.compile(r"\bsp_getapplock\b", re.I)
GIVE_LOCK = re.compile(r"\bsp_releaseapplock\b", re.I)


def to_sqlite(sql: str) -> str:
    """The few T-SQL spellings that tests use, in SQLite's."""
    sql = SYSUTC.sub(lambda m: "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '"
                               f"{int(m[2]) / (1000 if m[1] else 1):+} seconds')", sql)
    sql = re.sub(r"\bSYSUTCDATETIME\(\)", "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')", sql, flags=re.I)
    return re.sub(r"\bdbo\.", "", STRING.sub(r"\1", sql), flags=re.I)


def without_comments(sql: str) -> str:
    """What looks like one within a literal is none."""
    return re.sub(r"('(?:[^']|'')*')|/\*.*?\*/|--[^\n]*", lambda m: m[1] or " ", sql, flags=re.S).strip()


def lock_arguments(sql: str, at: int) -> dict[str, str]:
    """@Name = value of the call that begins there."""
    return {name.lower(): text if text is not None else number for name, text, number in
            ((m[1], m[2], m[3]) for m in re.finditer(rf"@(\w+)\s*=\s*(?:{TEXT}|(-?\d+))", sql[at:]))}


def call_arguments(text: str) -> list[tuple[str, Any]]:
    """@Name = literal, …"""
    arguments: list[tuple[str, Any]] = []
    for name, string, word in re.findall(rf"(@\w+)\s*=\s*(?:{TEXT}|([\w.-]+))", text):
        number = float(word) if "." in word else int(word) if word and word.upper() != "NULL" else None
        arguments.append((name, number if word else string.replace("''", "'")))
    return arguments


class Batch:
    """Judges one SQL batch of a session."""

    def __init__(self, session: Session, sql: str) -> None:
        self.session, self.sql, self.bare = session, sql, without_comments(sql)

    def run(self) -> list[Result]:
        first = (re.match(r"[a-z]+", self.bare, re.I) or [""])[0].upper()
        if first == "USE":
            self.session.use(re.sub(r"^USE\s+\[?(\w+)\]?.*", r"\1", self.bare, flags=re.I | re.S))
            return []
        if first in ("EXEC", "EXECUTE", "DECLARE", "IF") and (GET_LOCK.search(self.bare) or GIVE_LOCK.search(self.bare)):
            return self._lock()
        if match := re.match(r"CREATE DATABASE \[?(\w+)", self.bare, re.I):
            self._owners_only(262, "CREATE DATABASE permission denied in database 'master'.")
            self.session.settings.databases.create(match[1])
            return []
        if match := re.match(r"DROP DATABASE (?:IF EXISTS )?\[?(\w+)", self.bare, re.I):
            self._owners_only(3701, "Cannot drop the database.")
            self.session.settings.databases.drop(match[1])
            return []
        if match := TRANSACTION.match(self.bare):
            self.session.transaction(match[1].upper())
            return []
        if match := CHECK.match(self.bare):
            return self._check(*match.groups())
        if match := RENAME.match(self.bare):
            return self._query(f"ALTER TABLE {match[1].removeprefix('dbo.')} RENAME TO {match[2]}")
        if first in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH") or re.match(r"(DROP VIEW|DROP TABLE) \w", self.bare):
            return self._query(self.bare)
        if match := CALL.fullmatch(self.bare):
            result = call(self.session.database(), match[1], call_arguments(match[2]))
            return [result] if result is not None else []
        self._setup()
        return []

    def _owners_only(self, number: int, message: str) -> None:
        if self.session.user in self.session.settings.app_users:
            raise ServerError(number, message, 14)

    def _lock(self) -> list[Result]:
        results = []
        for match in sorted([*GET_LOCK.finditer(self.bare), *GIVE_LOCK.finditer(self.bare)], key=lambda m: m.start()):
            arguments = lock_arguments(self.bare, match.start())
            status = self.session.app_lock(match[0], arguments)
            if status < 0 and "THROW" not in self.bare.upper():
                results.append(Result([("", tds.T_INT)], [[status]]))
            elif status < 0:
                raise ServerError(50000, "the application lock was not granted")
            elif re.search(r"\bSELECT\s+@", self.bare, re.I):
                results.append(Result([("", tds.T_INT)], [[status]]))
        return results

    def _check(self, table: str, name: str, condition: str) -> list[Result]:
        """A CHECK constraint on an existing table, which SQLite has not: a trigger."""
        columns = {row[1] for row in self.session.database().run(f"PRAGMA table_info({table})")}
        rule = re.sub(r"\b[A-Z]\w*", lambda m: f"NEW.{m[0]}" if m[0] in columns else m[0], condition)
        for event in ("INSERT", "UPDATE"):
            self._query(f"CREATE TRIGGER {name}_{event} BEFORE {event} ON {table} WHEN NOT ({rule})"
                        f" BEGIN SELECT RAISE(ABORT, 'CHECK constraint {name}'); END")
        return []

    def _query(self, sql: str) -> list[Result]:
        import sqlite3
        self._owners_only(229, "The SELECT permission was denied on the object.")
        database = self.session.database()
        if "@@" in sql or re.search(r"SERVERPROPERTY|DB_NAME|SUSER_|COMPATIBILITY", sql, re.I):
            return []
        try:
            with database.lock:
                cursor = database.run(to_sqlite(sql))
                rows = [list(row) for row in cursor]
        except sqlite3.IntegrityError as error:
            raise ServerError(547, str(error)) from error
        except sqlite3.Error as error:
            number = 208 if "no such table" in str(error) else 207 if "no such column" in str(error) else 102
            raise ServerError(number, f"{error}") from error
        if cursor.description is None:
            return []
        columns = []
        for at, column in enumerate(cursor.description):
            kinds = {type(row[at]) for row in rows} - {type(None)}
            columns.append((column[0], tds.T_BIGINT if kinds == {int} else
                            tds.T_FLOAT if kinds and kinds <= {int, float} else tds.T_TEXT))
        for row in rows:
            row[:] = [str(v) if t == tds.T_TEXT and v is not None else v for v, (_, t) in zip(row, columns, strict=True)]
        return [Result(columns, rows)]

    def _setup(self) -> None:
        """A batch of the setup script, or session settings: nothing to judge, but what it creates is noted."""
        names = re.findall(r"\b(?:CREATE|ALTER|CREATE OR ALTER)\s+PROC(?:EDURE)?\s+(?:\[?dbo\]?\.)?\[?(\w+)", self.bare, re.I)
        ddl = re.search(r"\b(CREATE|ALTER|DROP|GRANT|DENY)\s+(TABLE|VIEW|PROC|ROLE|INDEX|EXECUTE|SELECT)", self.bare, re.I)
        if ddl:
            self._owners_only(262, f"{ddl[1].upper()} {ddl[2].upper()} permission denied in database.")
        database = self.session.database()
        if re.search(r"\bCREATE\s+TABLE\s+(dbo\.)?\[?SchemaVersion", self.bare, re.I):
            database.create_tables()
        if re.search(r"\bCREATE\s+VIEW\s+(dbo\.)?\[?vw_", self.bare, re.I):
            database.create_views()
        for name in names:
            if name.lower() not in PROCEDURES:
                if self.session.settings.verbose:
                    print(f"the script creates {name}, which has no stand-in", file=sys.stderr)
                continue
            database.create_procedure(name)
        if re.search(r"\b(INSERT\s+(INTO\s+)?|UPDATE\s+)(dbo\.)?\[?SchemaVersion", self.bare, re.I) and not names:
            with database.lock:
                database.create_tables()
                version, major = self._version()
                database.run("INSERT INTO SchemaVersion (SchemaVersionID, Version, Major) VALUES (1, ?1, ?2)"
                             " ON CONFLICT (SchemaVersionID) DO UPDATE SET Version = ?1, Major = ?2 WHERE ?1 > Version",
                             version, major)

    def _version(self) -> tuple[int, int]:
        found = {name.lower(): int(number) for name, number in
                 re.findall(r"\b(Version|Major)\b\s*=\s*(\d+)", self.bare, re.I)}
        values = re.search(r"VALUES\s*\(\s*(?:1\s*,\s*)?(\d+)\s*,\s*(\d+)", self.bare, re.I)
        if values:
            return int(values[1]), int(values[2])
        return found.get("version", 1), found.get("major", 1)


# ---- a session ----


class Session(socketserver.BaseRequestHandler):
    """One connection, from PRELOGIN to its end."""

    settings: Settings
    wire: Wire
    user = ""
    database_name = "master"
    held: Database | None = None  # where this session has begun a transaction

    def handle(self) -> None:
        self.settings = self.server.settings  # type: ignore[attr-defined]
        faults = self.settings.faults
        faults.count("connections")
        self.wire = Wire(self.request)
        with faults.lock:
            faults.sockets.add(self.request)
        try:
            if self._log_in():
                while True:
                    self._serve(*self.wire.read_message())
                    self._let_go()
        except (tds.Closed, ConnectionError, TimeoutError, ValueError) as error:
            if self.settings.verbose:
                print(f"{self.client_address}: {error}", file=sys.stderr)
        except Exception:  # noqa: BLE001: a mistake of the server's own must be seen in the test's output
            traceback.print_exc()
        finally:
            with faults.lock:
                faults.sockets.discard(self.request)
            self._roll_back()
            self.settings.locks.give_all(self)

    def database(self) -> Database:
        return self.settings.databases.get(self.database_name)

    def use(self, name: str) -> None:
        self.settings.databases.get(name)
        self.database_name = name

    # -- transactions --

    def transaction(self, word: str) -> None:
        """BEGIN, COMMIT or ROLLBACK. Whoever has begun one has the database for itself."""
        if word == "BEGIN":
            if self.held is not None:
                raise ServerError(50905, "the stand-in knows no transaction inside another")
            database = self.database()
            if not database.lock.acquire(timeout=60):
                raise ServerError(1222, "Lock request time out period exceeded.")
            self.held = database
            database.run("BEGIN IMMEDIATE")
        elif self.held is None:
            raise ServerError(3902 if word == "COMMIT" else 3903, f"The {word} TRANSACTION request has no corresponding BEGIN TRANSACTION.")
        elif word == "COMMIT":
            self._commit(self.held)
        else:
            self._roll_back()

    def _commit(self, held: Database) -> None:
        fault = self.settings.faults.next("COMMIT TRANSACTION")
        kind = fault.kind if fault else ""
        if kind != "drop_before":
            held.run("COMMIT")
        if kind in ("drop_before", "drop_after_commit"):
            self.wire.close(reset=True)
            raise tds.Closed("as ordered")

    def _roll_back(self) -> None:
        if self.held is not None and self.held.db.in_transaction:
            self.held.run("ROLLBACK")
        self._let_go()

    def _let_go(self) -> None:
        """The database is for others again where the transaction is over, also by an error (SET XACT_ABORT ON)."""
        if self.held is not None and not self.held.db.in_transaction:
            held, self.held = self.held, None
            held.lock.release()

    # -- PRELOGIN, TLS, LOGIN7 --

    def _encryption(self, asked: int) -> int:
        """The answer to what the client asks for (2.2.6.5)."""
        mine = self.settings.encryption
        if mine == tds.ENCRYPT_NOT_SUPPORTED:
            return tds.ENCRYPT_NOT_SUPPORTED
        if mine == tds.ENCRYPT_REQUIRED:
            return tds.ENCRYPT_REQUIRED if asked == tds.ENCRYPT_NOT_SUPPORTED else tds.ENCRYPT_ON
        if asked == tds.ENCRYPT_NOT_SUPPORTED:
            return tds.ENCRYPT_NOT_SUPPORTED
        return tds.ENCRYPT_ON if asked in (tds.ENCRYPT_ON, tds.ENCRYPT_REQUIRED) else tds.ENCRYPT_OFF

    def _log_in(self) -> bool:
        kind, data = self.wire.read_message()
        encrypt_all = encrypt_login = False
        if kind == tds.PRELOGIN:
            asked = tds.read_prelogin(data).get(1, b"\0")[0]
            answer = self._encryption(asked)
            self.wire.write_message(tds.REPLY, tds.prelogin(answer))
            encrypt_all = answer in (tds.ENCRYPT_ON, tds.ENCRYPT_REQUIRED)
            encrypt_login = answer == tds.ENCRYPT_OFF
            if encrypt_all or encrypt_login:
                faults = self.settings.faults
                context = self.settings.bad if faults.bad_certificate else self.settings.good
                assert context is not None
                self.wire.start_tls(context, server_side=True)
            kind, data = self.wire.read_message()
            if encrypt_login:
                self.wire.stop_tls()
        if kind != tds.LOGIN7:
            raise tds.Malformed(f"a packet of type {kind} instead of LOGIN7")
        return self._judge(tds.read_login(data))

    def _judge(self, login: tds.Login) -> bool:
        faults, out = self.settings.faults, Writer()
        if login.version != tds.TDS_7_4:
            raise tds.Malformed(f"TDS version 0x{login.version:08x}, not 7.4")
        faults.count("logins")
        if faults.login_seconds:
            time.sleep(faults.login_seconds)
        number = faults.next_login()
        if not number and self.settings.users.get(login.user) != login.password:
            number = 18456
        try:
            if not number and login.database:
                self.use(login.database)
        except ServerError:
            number = 4060
        if number:
            faults.count("refused")
            text = {18456: f"Login failed for user '{login.user}'.",
                    4060: f'Cannot open database "{login.database}" requested by the login. The login failed.'}
            out.notice(tds.ERROR, number, text.get(number) or MESSAGES.get(number, (0, 0, "error"))[2],
                       14 if number == 18456 else 11, 1, NAME)
            out.done(status=DONE_ERROR)
            self.wire.write_message(tds.REPLY, out.message())
            return False
        self.user = login.user
        out.env(1, self.database_name, "master")
        out.notice(tds.INFO, 5701, f"Changed database context to '{self.database_name}'.", 0, 2, NAME)
        out.env_collation()
        out.env(2, "us_english", "")
        out.notice(tds.INFO, 5703, "Changed language setting to us_english.", 0, 1, NAME)
        out.login_ack("Microsoft SQL Server", VERSION)
        size = login.packet_size if 512 <= login.packet_size <= 32767 else 4096
        out.env(4, str(size), "4096")
        out.done()
        self.wire.write_message(tds.REPLY, out.message())
        self.wire.size = size
        return True

    # -- requests --

    def _serve(self, kind: int, data: bytes) -> None:
        out = Writer()
        if kind == tds.ATTENTION:
            self.settings.faults.count("attentions")
            out.done(status=DONE_ATTENTION)
        elif kind == tds.SQL_BATCH:
            reader = Reader(data)
            reader.skip_all_headers()
            self._batch(data[reader.at:].decode("utf-16-le"), out)
        elif kind == tds.RPC:
            if not self._rpc(Reader(data), out):
                return
        else:
            raise tds.Malformed(f"a packet of type {kind}")
        self.wire.write_message(tds.REPLY, out.message())

    def _error(self, out: Writer, error: ServerError, procedure: str = "") -> None:
        out.notice(tds.ERROR, error.number, error.message, error.severity, error.state, NAME, procedure)

    @staticmethod
    def _result(out: Writer, result: Result, token: int, last: bool) -> None:
        types = [t for _, t in result.columns]
        out.columns(result.columns)
        for row in result.rows:
            out.row(types, row)
        out.done(token, DONE_COUNT | (0 if last else DONE_MORE), len(result.rows))

    def _batch(self, sql: str, out: Writer) -> None:
        if self.settings.verbose:
            print(f"{self.user}: {sql[:200]!r}", file=sys.stderr)
        try:
            before = self.database_name
            results = Batch(self, sql).run()
            if self.database_name != before:
                out.env(1, self.database_name, before)
            for result in results[:-1]:
                self._result(out, result, DONE, last=False)
            if results:
                self._result(out, results[-1], DONE, last=True)
            else:
                out.done()
        except ServerError as error:
            self._roll_back()
            self._error(out, error)
            out.done(status=DONE_ERROR)

    def app_lock(self, procedure: str, arguments: dict[str, Any]) -> int:
        owner = str(arguments.get("lockowner", "Transaction"))
        if owner.lower() != "session":
            raise ServerError(50904, "the stand-in knows application locks of sessions only")
        key = (self.database_name.lower(), str(arguments["resource"]))
        if procedure.lower() == "sp_releaseapplock":
            return self.settings.locks.give(key, self)
        return self.settings.locks.take(key, self, int(arguments.get("locktimeout", -1)))

    def _arguments(self, reader: Reader) -> list[tuple[str, Any]]:
        arguments = []
        while reader.more():
            name = reader.text(reader.u8())
            status = reader.u8()
            value = reader.value(reader.type())
            if not status & 2:  # else: the default
                arguments.append((name, value))
        return arguments

    def _rpc(self, reader: Reader, out: Writer) -> bool:
        """Runs one procedure. False: there is nothing to send, the connection is gone or was cancelled."""
        reader.skip_all_headers()
        length = reader.u16()
        if length == 0xFFFF:
            raise tds.Malformed(f"RPC by number ({reader.u16()}), which the application does not use")
        name = reader.text(length)
        reader.u16()
        arguments = self._arguments(reader)
        bare = re.sub(r"^(\[?dbo\]?|sys)\.", "", name, flags=re.I).strip("[]")
        if self.settings.verbose:
            print(f"{self.user}: {name} {arguments!r:.300}", file=sys.stderr)
        if bare.lower() in ("sp_getapplock", "sp_releaseapplock"):
            try:
                status = self.app_lock(bare, {n.removeprefix("@").lower(): v for n, v in arguments})
            except ServerError as error:
                self._error(out, error)
                status = -999
            out.return_status(status)
            out.done(DONEPROC)
            return True
        return self._play(name, bare, arguments, out)

    def _play(self, name: str, bare: str, arguments: list[tuple[str, Any]], out: Writer) -> bool:
        while self.settings.faults.away:
            if not self._wait(0.02):
                return False
        fault = self.settings.faults.next(bare)
        kind = fault.kind if fault else ""
        if fault and kind == "slow" and not self._wait(fault.seconds):
            return False
        if kind == "drop_before":
            self.wire.close(reset=True)
            raise tds.Closed("as ordered")
        if kind == "end_tls":
            self.wire.end_tls()
            raise tds.Closed("as ordered")
        try:
            if fault and kind == "error":
                severity, state, text = MESSAGES.get(fault.number, (16, 1, "an error was ordered"))
                raise ServerError(fault.number, text, severity, state)
            result = call(self.database(), name, arguments)
            if result is not None:
                self._result(out, result, DONEINPROC, last=False)
            out.return_status(0)
            out.done(DONEPROC)
        except ServerError as error:
            self._roll_back()
            self._error(out, error, bare)
            out.done(DONEPROC, DONE_ERROR)
        if kind in ("drop_after_commit", "drop_mid_result"):
            if kind == "drop_mid_result":
                whole = self.wire.packets(tds.REPLY, out.message())
                self.wire.send(whole[:max(9, len(whole) // 2)])
                time.sleep(0.02)  # so that it arrives before the reset
            self.wire.close(reset=True)
            raise tds.Closed("as ordered")
        return True

    def _wait(self, seconds: float) -> bool:
        """Is slow. False where the client cancelled meanwhile (and was told so)."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.wire.ready(min(left, 0.5)):
                kind, data = self.wire.read_message()
                self._serve(kind, data)
                return False
        return True


# ---- certificates ----


def make_certificate(directory: Path, stem: str, name: str) -> None:
    names = f"subjectAltName=DNS:{name}" + (",IP:127.0.0.1" if name == "localhost" else "")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", f"/CN={name}",
                    "-addext", names, "-keyout", f"{stem}-key.pem", "-out", f"{stem}.pem"],
                   cwd=directory, check=True, capture_output=True)


def context(directory: Path, stem: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.maximum_version = ssl.TLSVersion.TLSv1_2  # as TDS 7.x servers have it: 1.3 writes after its handshake
    made.load_cert_chain(directory / f"{stem}.pem", directory / f"{stem}-key.pem")
    return made


# ---- control and start ----


class Control(socketserver.StreamRequestHandler):
    """One JSON object a line in, one a line out."""

    def handle(self) -> None:
        for line in self.rfile:
            try:
                answer = self.server.settings.faults.order(json.loads(line))  # type: ignore[attr-defined]
            except (ValueError, TypeError, KeyError) as error:
                answer = {"error": str(error)}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: str, handler: type[socketserver.BaseRequestHandler], settings: Settings) -> None:
        host, _, port = address.rpartition(":")
        self.settings = settings
        super().__init__((host, int(port)), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (tds.Closed, OSError)):
            traceback.print_exc()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0: any; it is printed")
    parser.add_argument("--control", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--directory", type=Path, help="where the databases are; kept. Without it: nowhere, forgotten")
    parser.add_argument("--user", default="sa", help="who may do everything")
    parser.add_argument("--password-file", type=Path, required=True)
    parser.add_argument("--app-user", help="who may execute the procedures only, with the same password")
    parser.add_argument("--encryption", choices=("off", "on", "required"), default="off")
    parser.add_argument("--tls", type=Path, help="directory of good.pem, bad.pem and their keys; made where missing")
    parser.add_argument("--verbose", action="store_true", help="what comes, on standard error")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="tds-server-"))
    directory.mkdir(exist_ok=True)
    password = arguments.password_file.read_text().rstrip("\r\n")
    settings = Settings(
        Databases(directory), {arguments.user: password}, set(),
        {"off": tds.ENCRYPT_NOT_SUPPORTED, "on": tds.ENCRYPT_ON, "required": tds.ENCRYPT_REQUIRED}[arguments.encryption],
        verbose=arguments.verbose)
    if arguments.app_user:
        settings.users[arguments.app_user] = password
        settings.app_users.add(arguments.app_user)
    if arguments.encryption != "off":
        tls = arguments.tls or directory
        tls.mkdir(exist_ok=True)
        for stem, name in (("good", "localhost"), ("bad", "elsewhere.example")):
            if not (tls / f"{stem}.pem").exists():
                make_certificate(tls, stem, name)
        settings.good, settings.bad = context(tls, "good"), context(tls, "bad")
    server, control = Server(arguments.listen, Session, settings), Server(arguments.control, Control, settings)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    print("listening on {}:{}".format(*server.server_address[:2]))
    print("control on {}:{}".format(*control.server_address[:2]), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve_forever()
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
