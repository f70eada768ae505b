#!/usr/bin/python3
"""A small TDS client for tests: SQL batches and their rows, from a live server or from tds_server.py.

Without FreeTDS, so that what looks at the tables shares nothing with the driver under test. As a program,

    tds_client.py --server HOST:PORT --user NAME --password-file FILE [--database NAME] [--script FILE …] [--keep-going]

runs scripts (batches separated by GO lines) up to the first error, or with --keep-going to their end, as tsql and SSMS
do; without one it reads statements, each ended by a NUL, and answers each with one line: "=" and its first row ("|"
between columns, NULL for NULL), or "!" and the error.
"""
from __future__ import annotations

import argparse
import datetime
import decimal
import re
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import tds
from tds import Reader, Wire


class SqlError(Exception):
    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"error {number}: {message}")
        self.number = number


class LoginRefused(SqlError):
    pass


def literal(value: Any) -> str:
    """A value as T-SQL writes it."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return repr(value)
    return "N'" + str(value).replace("'", "''") + "'"


def plain(value: Any) -> Any:
    """A value as the embedded store would give it: times are ISO 8601 in UTC."""
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S") + f".{value.microsecond // 1000:03d}Z"
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


class Connection:
    """One session. encrypt: where the server can; no certificate is checked."""

    def __init__(self, server: str, user: str, password: str, database: str = "", timeout: float = 30.0,
                 encrypt: bool = True) -> None:
        host, _, port = server.rpartition(":")
        self.wire = Wire(socket.create_connection((host, int(port)), timeout))
        self.messages: list[tuple[int, str]] = []  # INFO tokens of the last batch
        self.returned: int | None = None
        self._log_in(host, user, password, database, tds.ENCRYPT_OFF if encrypt else tds.ENCRYPT_NOT_SUPPORTED)
        self.query("SET QUOTED_IDENTIFIER ON; SET ANSI_NULLS ON; SET ANSI_PADDING ON; SET ANSI_WARNINGS ON;"
                   " SET CONCAT_NULL_YIELDS_NULL ON; SET ARITHABORT ON; SET NOCOUNT OFF")

    def _log_in(self, host: str, user: str, password: str, database: str, encryption: int) -> None:
        self.wire.write_message(tds.PRELOGIN, tds.prelogin(encryption))
        _, data = self.wire.read_message()
        answer = tds.read_prelogin(data)[1][0]
        if answer != tds.ENCRYPT_NOT_SUPPORTED:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            self.wire.start_tls(context, server_side=False, name=host)
        self.wire.write_message(tds.LOGIN7, tds.login(user, password, database, "tests"))
        if answer == tds.ENCRYPT_OFF:
            self.wire.stop_tls()
        try:
            self._read()
        except SqlError as error:
            self.close()
            raise LoginRefused(error.number, str(error)) from error

    def query(self, sql: str) -> list[tuple[list[str], list[list[Any]]]]:
        """Runs a batch; its result sets: names and rows. Raises its first error."""
        headers = b"\x16\0\0\0\x12\0\0\0\2\0" + b"\0" * 8 + b"\1\0\0\0"
        self.wire.write_message(tds.SQL_BATCH, headers + sql.encode("utf-16-le"))
        return self._read()

    def table(self, sql: str, *values: Any) -> tuple[list[str], list[list[Any]]]:
        """The first result set: names and rows; each ? outside of quotes becomes the next value."""
        pieces = re.split(r"('(?:[^']|'')*')", sql)  # those at odd places are literals
        given = iter(values)
        for at, piece in enumerate(pieces):
            if at % 2 == 0:
                pieces[at] = re.sub(r"\?", lambda _: literal(next(given)), piece)
            elif not pieces[at - 1].endswith("N"):
                pieces[at] = f"N{piece}"
        results = self.query("".join(pieces))
        if not results:
            return [], []
        names, rows = results[0]
        return names, [[plain(value) for value in row] for row in rows]

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The same, each row by its names."""
        names, rows = self.table(sql, *values)
        assert len(set(names)) == len(names), f"columns of one name: {names}"
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _read(self) -> list[tuple[list[str], list[list[Any]]]]:
        _, data = self.wire.read_message()
        reader, results, error = Reader(data), [], None
        types: list[tds.Type] = []
        self.messages, self.returned = [], None
        while reader.more():
            token = reader.u8()
            if token == tds.COLMETADATA:
                names, types = self._columns(reader)
                results.append((names, []))
            elif token == tds.ROW:
                results[-1][1].append([reader.value(t, row=True) for t in types])
            elif token == tds.NBCROW:
                nulls = reader.bytes((len(types) + 7) // 8)
                results[-1][1].append([None if nulls[n // 8] >> n % 8 & 1 else reader.value(t, row=True)
                                       for n, t in enumerate(types)])
            elif token in (tds.DONE, tds.DONEPROC, tds.DONEINPROC):
                reader.bytes(12)
            elif token == tds.RETURNSTATUS:
                self.returned = reader.unpack("i")
            elif token in (tds.ERROR, tds.INFO):
                part = Reader(reader.bytes(reader.u16()))
                number = part.unpack("i")
                part.bytes(2)
                text = part.text(part.u16())
                if token == tds.ERROR:
                    error = error or SqlError(number, text)
                else:
                    self.messages.append((number, text))
            elif token in (tds.ENVCHANGE, tds.LOGINACK, tds.ORDER):
                content = reader.bytes(reader.u16())
                if token == tds.ENVCHANGE and content[0] == 4:
                    self.wire.size = int(content[2:2 + 2 * content[1]].decode("utf-16-le"))
            else:
                raise tds.Malformed(f"token 0x{token:02X} at {reader.at - 1}")
        if error is not None:
            raise error
        return results

    @staticmethod
    def _columns(reader: Reader) -> tuple[list[str], list[tds.Type]]:
        names, types = [], []
        for _ in range(reader.u16()):
            reader.bytes(6)
            t = reader.type()
            if t.code in (tds.NTEXT, tds.TEXT, tds.IMAGE):
                for _ in range(reader.u8()):
                    reader.text(reader.u16())
            types.append(t)
            names.append(reader.text(reader.u8()))
        return names, types

    def close(self) -> None:
        self.wire.close()


def batches(script: str) -> list[str]:
    """What stands between the GO lines."""
    return [b for b in re.split(r"^[ \t]*GO[ \t]*;?[ \t]*\r?$", script, flags=re.M | re.I) if b.strip()]


def run_script(connection: Connection, path: Path, keep_going: bool = False) -> None:
    for number, batch in enumerate(batches(path.read_text(encoding="utf-8-sig")), 1):
        try:
            connection.query(batch)
        except SqlError as error:
            said = f"{path.name}, batch {number}: {error}"
            if not keep_going:
                raise SystemExit(f"{said}\n{batch.strip()[:400]}") from error
            print(said)
        for _, message in connection.messages:
            print(message)


def answer_statements(connection: Connection) -> None:
    """For programs: test_store.c."""
    for statement in iter(lambda: read_until_nul(sys.stdin.buffer), None):
        try:
            _, rows = connection.table(statement)
            line = "=" + "|".join("NULL" if v is None else str(v) for v in (rows[0] if rows else []))
        except SqlError as error:
            line = f"!{error}"
        sys.stdout.buffer.write(line.encode() + b"\0")
        sys.stdout.buffer.flush()


def read_until_nul(stream: Any) -> str | None:
    out = bytearray()
    while byte := stream.read(1):
        if byte == b"\0":
            return out.decode()
        out += byte
    return None


BATCH_TIMEOUT = 300.0  # seconds: a slow server may need a while for one of a script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="HOST:PORT")
    parser.add_argument("--user", required=True)
    parser.add_argument("--password-file", type=Path, required=True)
    parser.add_argument("--database", default="")
    parser.add_argument("--script", type=Path, action="append")
    parser.add_argument("--keep-going", action="store_true", help="with the next batch, after an error")
    arguments = parser.parse_args()
    password = arguments.password_file.read_text().rstrip("\r\n")
    try:
        connection = Connection(arguments.server, arguments.user, password, arguments.database, BATCH_TIMEOUT)
    except (OSError, SqlError, tds.Closed) as error:
        raise SystemExit(f"{arguments.server}: {error}") from error
    for path in arguments.script or []:
        run_script(connection, path, arguments.keep_going)
    if not arguments.script:
        answer_statements(connection)


if __name__ == "__main__":
    main()
