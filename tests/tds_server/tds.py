"""TDS 7.4 on the wire: what of [MS-TDS] the tests' server and client need, both ways.

    Wire        packets and messages over a socket; TLS inside PRELOGIN packets, as TDS 7.x has it
    Reader      a cursor in received bytes; types and values of parameters and columns
    Writer      the same for what is sent; tokens
Text is UTF-16LE on the wire and str here. Numbers of sections are those of [MS-TDS].
"""
from __future__ import annotations

import dataclasses
import datetime
import decimal
import select
import socket
import ssl
import struct
import uuid
from typing import Any

# packet types (2.2.3.1.1)
SQL_BATCH, RPC, REPLY, ATTENTION, LOGIN7, PRELOGIN = 1, 3, 4, 6, 16, 18
END_OF_MESSAGE = 0x01

# PRELOGIN's answer about encryption (2.2.6.5)
ENCRYPT_OFF, ENCRYPT_ON, ENCRYPT_NOT_SUPPORTED, ENCRYPT_REQUIRED = 0, 1, 2, 3

# tokens (2.2.7)
RETURNSTATUS, COLMETADATA, ORDER, ERROR, INFO, RETURNVALUE, LOGINACK, ROW, NBCROW, ENVCHANGE, DONE, DONEPROC, \
    DONEINPROC = 0x79, 0x81, 0xA9, 0xAA, 0xAB, 0xAC, 0xAD, 0xD1, 0xD2, 0xE3, 0xFD, 0xFE, 0xFF
DONE_MORE, DONE_ERROR, DONE_COUNT, DONE_ATTENTION = 0x01, 0x02, 0x10, 0x20

TDS_7_4 = 0x74000004
COLLATION = bytes.fromhex("0904d00034")  # Latin1_General_CI_AS, what SQL Server calls SQL_Latin1_General_CP1_CI_AS

# types (2.2.5.4): what a value looks like
FIXED = {0x1F: 0, 0x30: 1, 0x32: 1, 0x34: 2, 0x38: 4, 0x3A: 4, 0x3B: 4, 0x3C: 8, 0x3D: 8, 0x3E: 8, 0x7A: 4, 0x7F: 8}
BY_LENGTH = {0x24, 0x26, 0x68, 0x6D, 0x6E, 0x6F}  # GUID, INTN, BITN, FLTN, MONEYN, DATETIMN
NVARCHAR, NCHAR, VARCHAR, CHAR, VARBINARY, BINARY = 0xE7, 0xEF, 0xA7, 0xAF, 0xA5, 0xAD
NTEXT, TEXT, IMAGE = 0x63, 0x23, 0x22
INTN, BITN, FLTN, DECIMALN, NUMERICN = 0x26, 0x68, 0x6D, 0x6A, 0x6C
DATE, TIME, DATETIME2, DATETIMEOFFSET = 0x28, 0x29, 0x2A, 0x2B
EPOCH = datetime.datetime(1900, 1, 1)


class Malformed(Exception):
    """What came is no TDS."""


class Closed(Exception):
    """The other side has closed the connection."""


# ---- packets ----


class Wire:
    """One connection: messages in and out, in packets of at most `size` bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.size = 4096
        self.spid = 0
        self.buffer = b""
        self.tls: ssl.SSLObject | None = None
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    def _receive(self) -> bytes:
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed("end of connection")
        return data

    def _read(self, count: int) -> bytes:
        while len(self.buffer) < count:
            if self.tls is None:
                self.buffer += self._receive()
                continue
            try:
                data = self.tls.read(65536)
                if not data:
                    raise Closed("end of TLS")
                self.buffer += data
            except ssl.SSLWantReadError:
                self.incoming.write(self._receive())
            except ssl.SSLError as error:
                raise Closed(str(error)) from error
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_packet(self) -> tuple[int, int, bytes]:
        kind, status, length = struct.unpack(">BBH4x", self._read(8))
        if length < 8:
            raise Malformed(f"a packet of {length} bytes")
        return kind, status, self._read(length - 8)

    def read_message(self) -> tuple[int, bytes]:
        kind, status, data = self.read_packet()
        parts = [data]
        while not status & END_OF_MESSAGE:
            another, status, data = self.read_packet()
            if another != kind:
                raise Malformed(f"a packet of type {another} inside a message of type {kind}")
            parts.append(data)
        return kind, b"".join(parts)

    def ready(self, seconds: float) -> bool:
        """Does anything come within this time?"""
        if self.buffer or (self.tls is not None and (self.tls.pending() or self.incoming.pending)):
            return True
        return bool(select.select([self.sock], [], [], seconds)[0])

    def send(self, data: bytes) -> None:
        """Bytes as they are: a packet, or a part of one."""
        if self.tls is not None:
            self.tls.write(data)
            data = self.outgoing.read()
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error

    def packets(self, kind: int, message: bytes) -> bytes:
        out, room = [], self.size - 8
        for number, at in enumerate(range(0, len(message) or 1, room), 1):
            piece = message[at:at + room]
            status = END_OF_MESSAGE if at + room >= len(message) else 0
            out.append(struct.pack(">BBHHBB", kind, status, len(piece) + 8, self.spid, number & 0xFF, 0) + piece)
        return b"".join(out)

    def write_message(self, kind: int, message: bytes) -> None:
        self.send(self.packets(kind, message))

    def start_tls(self, context: ssl.SSLContext, server_side: bool, name: str | None = None) -> None:
        """The handshake, each flight inside PRELOGIN packets; what follows is wrapped in TLS."""
        tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=name)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                if flight := self.outgoing.read():
                    self.write_message(PRELOGIN, flight)
                kind, _, data = self.read_packet()
                if kind != PRELOGIN:
                    raise Malformed(f"a packet of type {kind} inside the TLS handshake")
                self.incoming.write(data)
            except ssl.SSLError as error:
                if flight := self.outgoing.read():
                    self.write_message(PRELOGIN, flight)
                raise Closed(str(error)) from error
        if flight := self.outgoing.read():
            self.write_message(PRELOGIN, flight)
        self.tls = tls

    def stop_tls(self) -> None:
        """Only the login was to be encrypted."""
        self.tls = None

    def end_tls(self) -> None:
        """A polite end: close_notify, and the connection."""
        if self.tls is not None:
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                pass  # the other side has not answered, and need not
            self.tls = None
            self.send(self.outgoing.read())
        self.sock.shutdown(socket.SHUT_WR)

    def close(self, reset: bool = False) -> None:
        if reset:  # not a polite end, but what a killed server's kernel sends
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class Type:
    code: int
    size: int = 0  # bytes; of VARCHAR and the like the most there may be, 0xFFFF: MAX
    scale: int = 0

    def __str__(self) -> str:
        names = {NVARCHAR: "nvarchar", NTEXT: "ntext", VARCHAR: "varchar", TEXT: "text", BITN: "bit", FLTN: "float"}
        if self.code == INTN:
            return {1: "tinyint", 2: "smallint", 4: "int", 8: "bigint"}[self.size]
        if self.code in (NVARCHAR, VARCHAR) and self.size == 0xFFFF:
            return f"{names[self.code]}(max)"
        return names.get(self.code, f"type 0x{self.code:02X}")


class Reader:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def bytes(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise Malformed(f"{count} bytes wanted at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count:self.at]

    def unpack(self, form: str) -> Any:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))[0]

    def u8(self) -> int:
        return self.unpack("B")

    def u16(self) -> int:
        return self.unpack("H")

    def u32(self) -> int:
        return self.unpack("I")

    def text(self, characters: int) -> str:
        return self.bytes(2 * characters).decode("utf-16-le")

    def more(self) -> bool:
        return self.at < len(self.data)

    def skip_all_headers(self) -> None:
        self.at += struct.unpack_from("<I", self.data, self.at)[0]

    def type(self) -> Type:
        """TYPE_INFO (2.2.5.6)."""
        code = self.u8()
        if code in FIXED:
            return Type(code, FIXED[code])
        if code in BY_LENGTH:
            return Type(code, self.u8())
        if code in (DECIMALN, NUMERICN):
            size, _, scale = self.bytes(3)
            return Type(code, size, scale)
        if code == DATE:
            return Type(code)
        if code in (TIME, DATETIME2, DATETIMEOFFSET):
            return Type(code, scale=self.u8())
        if code in (NVARCHAR, NCHAR, VARCHAR, CHAR):
            size = self.u16()
            self.bytes(5)
            return Type(code, size)
        if code in (VARBINARY, BINARY):
            return Type(code, self.u16())
        if code in (NTEXT, TEXT):
            size = self.u32()
            self.bytes(5)
            return Type(code, size)
        if code == IMAGE:
            return Type(code, self.u32())
        raise Malformed(f"type 0x{code:02X}")

    def _plp(self) -> bytes | None:
        total = self.unpack("Q")
        if total == 0xFFFFFFFFFFFFFFFF:
            return None
        parts = []
        while size := self.u32():
            parts.append(self.bytes(size))
        whole = b"".join(parts)
        if total not in (len(whole), 0xFFFFFFFFFFFFFFFE):
            raise Malformed(f"{len(whole)} bytes in pieces, {total} announced")
        return whole

    def value(self, t: Type, row: bool = False) -> Any:
        """A value of the type; NULL is None. In rows NTEXT and the like have a pointer before them."""
        code = t.code
        if code in FIXED:
            return None if code == 0x1F else _number(code, self.bytes(t.size))
        if code in BY_LENGTH or code in (DECIMALN, NUMERICN, DATE, TIME, DATETIME2, DATETIMEOFFSET):
            raw = self.bytes(self.u8())
            return _small(t, raw) if raw else None
        if code in (NTEXT, TEXT, IMAGE):
            if row:
                pointer = self.u8()
                if pointer == 0:
                    return None
                self.bytes(pointer + 8)
            size = self.unpack("i")
            return None if size == -1 else _string(code, self.bytes(size))
        if t.size == 0xFFFF:
            whole = self._plp()
            return None if whole is None else _string(code, whole)
        size = self.u16()
        return None if size == 0xFFFF else _string(code, self.bytes(size))


def _string(code: int, raw: bytes) -> str | bytes:
    if code in (NVARCHAR, NCHAR, NTEXT):
        return raw.decode("utf-16-le")
    return raw if code in (VARBINARY, BINARY, IMAGE) else raw.decode("cp1252")


def _number(code: int, raw: bytes) -> Any:
    if code == 0x32:
        return int(raw[0] != 0)
    if code == 0x3D:
        days, ticks = struct.unpack("<iI", raw)
        return EPOCH + datetime.timedelta(days=days, milliseconds=round(ticks * 10 / 3))
    if code == 0x3A:
        days, minutes = struct.unpack("<HH", raw)
        return EPOCH + datetime.timedelta(days=days, minutes=minutes)
    if code in (0x3C, 0x7A):
        high_low = struct.unpack("<iI", raw) if len(raw) == 8 else (0, struct.unpack("<i", raw)[0])
        return decimal.Decimal((high_low[0] << 32) + high_low[1]) / 10000
    return struct.unpack({0x30: "<B", 0x34: "<h", 0x38: "<i", 0x7F: "<q", 0x3B: "<f", 0x3E: "<d"}[code], raw)[0]


def _small(t: Type, raw: bytes) -> Any:
    if t.code == INTN:
        return struct.unpack({1: "<B", 2: "<h", 4: "<i", 8: "<q"}[len(raw)], raw)[0]
    if t.code == BITN:
        return int(raw[0] != 0)
    if t.code == FLTN:
        return struct.unpack({4: "<f", 8: "<d"}[len(raw)], raw)[0]
    if t.code in (DECIMALN, NUMERICN):
        return decimal.Decimal(int.from_bytes(raw[1:], "little") * (1 if raw[0] else -1)).scaleb(-t.scale)
    if t.code == 0x6F:
        return _number(0x3D if len(raw) == 8 else 0x3A, raw)
    if t.code == 0x6E:
        return _number(0x3C if len(raw) == 8 else 0x7A, raw)
    if t.code == 0x24:
        return str(uuid.UUID(bytes_le=raw))
    if t.code == DATE:
        return datetime.date(1, 1, 1) + datetime.timedelta(days=int.from_bytes(raw, "little"))
    if t.code in (TIME, DATETIME2):
        split = len(raw) - (3 if t.code == DATETIME2 else 0)
        ticks = int.from_bytes(raw[:split], "little") * 10 ** (7 - t.scale)
        days = int.from_bytes(raw[split:], "little")
        return datetime.datetime(1, 1, 1) + datetime.timedelta(days=days, microseconds=ticks // 10)
    raise Malformed(f"a value of type 0x{t.code:02X}")


# ---- writing ----


def b_varchar(s: str) -> bytes:
    encoded = s.encode("utf-16-le")
    return bytes([len(encoded) // 2]) + encoded


def us_varchar(s: str) -> bytes:
    encoded = s.encode("utf-16-le")
    return struct.pack("<H", len(encoded) // 2) + encoded


T_INT, T_BIGINT, T_FLOAT, T_BIT = Type(INTN, 4), Type(INTN, 8), Type(FLTN, 8), Type(BITN, 1)
T_TEXT = Type(NVARCHAR, 0xFFFF)


def t_nvarchar(characters: int) -> Type:
    return Type(NVARCHAR, 2 * characters)


class Writer:
    """Tokens of a reply, one after the other."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def message(self) -> bytes:
        return b"".join(self.parts)

    def _token(self, token: int, content: bytes) -> None:
        self.parts.append(struct.pack("<BH", token, len(content)) + content)

    def env(self, kind: int, new: str, old: str) -> None:
        self._token(ENVCHANGE, bytes([kind]) + b_varchar(new) + b_varchar(old))

    def env_collation(self) -> None:
        self._token(ENVCHANGE, bytes([7, len(COLLATION)]) + COLLATION + b"\0")

    def login_ack(self, name: str, version: bytes) -> None:
        self._token(LOGINACK, b"\1" + struct.pack(">I", TDS_7_4) + b_varchar(name) + version)

    def notice(self, token: int, number: int, text: str, severity: int, state: int, server: str,
               procedure: str = "", line: int = 1) -> None:
        """ERROR or INFO."""
        self._token(token, struct.pack("<iBB", number, state, severity) + us_varchar(text) + b_varchar(server)
                    + b_varchar(procedure) + struct.pack("<I", line))

    def columns(self, columns: list[tuple[str, Type]]) -> None:
        self.parts.append(struct.pack("<BH", COLMETADATA, len(columns)))
        for name, t in columns:
            form = struct.pack("<IHB", 0, 0x0009, t.code)  # nullable, updatable
            if t.code == NVARCHAR:
                form += struct.pack("<H", t.size) + COLLATION
            else:
                form += bytes([t.size])
            self.parts.append(form + b_varchar(name))

    def row(self, types: list[Type], values: list[Any]) -> None:
        self.parts.append(bytes([ROW]))
        self.parts.extend(self._value(t, v) for t, v in zip(types, values, strict=True))

    @staticmethod
    def _value(t: Type, v: Any) -> bytes:
        if t.code == NVARCHAR and t.size == 0xFFFF:
            if v is None:
                return b"\xff" * 8
            raw = v.encode("utf-16-le")
            pieces = [struct.pack("<I", len(p)) + p for at in range(0, len(raw), 8000) if (p := raw[at:at + 8000])]
            return struct.pack("<Q", len(raw)) + b"".join(pieces) + b"\0\0\0\0"
        if t.code == NVARCHAR:
            if v is None:
                return b"\xff\xff"
            raw = v.encode("utf-16-le")
            assert len(raw) <= t.size, f"{v!r} for {t.size} bytes"
            return struct.pack("<H", len(raw)) + raw
        if v is None:
            return b"\0"
        form = "<d" if t.code == FLTN else {1: "<B", 4: "<i", 8: "<q"}[t.size]
        return bytes([t.size]) + struct.pack(form, v)

    def return_status(self, value: int) -> None:
        self.parts.append(struct.pack("<Bi", RETURNSTATUS, value))

    def done(self, token: int = DONE, status: int = 0, count: int = 0) -> None:
        self.parts.append(struct.pack("<BHHQ", token, status, 0, count))


# ---- PRELOGIN and LOGIN7 ----


def prelogin(encryption: int, version: bytes = bytes([16, 0, 16, 26, 0, 0])) -> bytes:
    options = [(0, version), (1, bytes([encryption])), (2, b"\0"), (3, b""), (4, b"\0")]
    head, body, at = b"", b"", 5 * len(options) + 1
    for token, value in options:
        head += struct.pack(">BHH", token, at + len(body), len(value))
        body += value
    return head + b"\xff" + body


def read_prelogin(data: bytes) -> dict[int, bytes]:
    options, at = {}, 0
    while data[at:at + 1] not in (b"\xff", b""):
        token, offset, length = struct.unpack_from(">BHH", data, at)
        if offset + length > len(data):
            raise Malformed(f"PRELOGIN option {token} lies outside the packet")
        options[token] = data[offset:offset + length]
        at += 5
    return options


@dataclasses.dataclass
class Login:
    version: int
    packet_size: int
    host: str
    user: str
    password: str
    application: str
    database: str


def _hide(password: bytes) -> bytes:
    return bytes(((b << 4 | b >> 4) & 0xFF) ^ 0xA5 for b in password)


def _show(hidden: bytes) -> bytes:
    return bytes(((b ^ 0xA5) << 4 | (b ^ 0xA5) >> 4) & 0xFF for b in hidden)


def read_login(data: bytes) -> Login:
    """LOGIN7 (2.2.6.4)."""
    if len(data) < 94:
        raise Malformed("LOGIN7 is too short")
    length, version, packet_size = struct.unpack_from("<III", data)
    if length != len(data):
        raise Malformed(f"LOGIN7 says {length} bytes and has {len(data)}")

    def raw(at: int) -> bytes:
        offset, count = struct.unpack_from("<HH", data, at)
        if offset + 2 * count > len(data):
            raise Malformed("a field of LOGIN7 lies outside the packet")
        return data[offset:offset + 2 * count]

    def text(at: int) -> str:
        return raw(at).decode("utf-16-le")

    return Login(version, packet_size, text(36), text(40), _show(raw(44)).decode("utf-16-le"), text(48), text(68))


def login(user: str, password: str, database: str, application: str, packet_size: int = 4096) -> bytes:
    fields = ["tests", user, None, application, "", "", "tests", "", database]
    at, table, body = 94, b"", b""
    for field in fields:
        encoded = _hide(password.encode("utf-16-le")) if field is None else field.encode("utf-16-le")
        table += struct.pack("<HH", at + len(body), len(encoded) // 2)
        body += encoded
    table += b"\0" * 6 + struct.pack("<HHHHHHI", at + len(body), 0, at + len(body), 0, at + len(body), 0, 0)
    head = struct.pack("<IIIIIIBBBBiI", at + len(body), TDS_7_4, packet_size, 7, 0, 0, 0xE0, 0x03, 0, 0, 0, 0x0409)
    return head + table + body
