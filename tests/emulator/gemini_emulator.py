#!/usr/bin/env python3
"""A stand-in for Google's generateContent, for evaluation and tests.

    python3 tests/emulator/gemini_emulator.py --listen 127.0.0.1:19090 [--log FILE.jsonl]

Prints `listening on 127.0.0.1:PORT` when it is ready (port 0 picks one); SIGTERM and Ctrl-C end it at once.

It serves

    POST /v1beta/models/{model}:generateContent      checks the request as strictly as Google (gemini_request.py) and
                                                     answers an invoice (gemini_answer.py), or what a script says
    GET  /v1beta/models, /v1beta/models/{model}      what is there
    /__emulator/…                                    the control interface: scripts, the log, holding calls (README.md)

Any key is accepted. A script belongs to a key, or to "*" for all keys that have none of their own: each call takes
the next step of its script as soon as its head is read; after the last step come default answers, or, with repeat,
the last step again.

A call goes through these events; each is counted since the last reset, and /__emulator/wait waits for a count:

    calls      its head was read
    complete   its body was read whole
    held       it waits for /__emulator/release        (the number of now, not a sum)
    gone       the client closed the connection while the call was held or delayed
    answered   its answer was written whole (the kernel took the last byte)
    finished   nothing more happens to it

How it is built: one thread for each connection, plain blocking code; HTTP/1.1 with keep-alive is read by hand, since
the point is to break it on demand. State is shared under one lock, and is replaced as a whole by a reset: calls of
before keep what they began with, and no longer show.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import http.client
import io
import ipaddress
import itertools
import json
import os
import re
import select
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Callable
from urllib.parse import parse_qs, unquote, urlsplit

from gemini_answer import SCENARIOS, Answer, answer_for, check_step, json_answer, script_steps
from gemini_request import MAX_REQUEST_BYTES, GoogleError, Request, check_request

LOGGED_HEADERS = ("host", "content-type", "content-length", "accept-encoding", "expect", "user-agent",
                  "transfer-encoding", "x-front-connection", "x-front-protocol", "traceparent", "tracestate")
MODELS = ("gemini-3.8-flash", "gemini-3.6-flash", "gemini-3.5-flash", "gemini-3.5-flash-lite", "gemini-3.1-flash-lite")
MODEL_NAME = re.compile(r"gemini-[0-9a-z.-]+")
KEPT_CALLS = 100_000
CHUNK = 64 * 1024


# --- what is shared --------------------------------------------------------------------------------------------------

@dataclass
class Call:
    """One call of generateContent: a row of the log."""
    n: int
    time: float                       # when the head was read, seconds since the epoch
    connection: int                   # one number for each TCP connection
    key: str | None
    model: str
    path: str                         # without the query: a key may be there
    http_headers: dict[str, str]
    step: dict[str, Any] | None       # None: the default answer
    mime: str | None = None           # of the first file
    file_sha256: str | None = None
    file_bytes: int | None = None
    prompt: str = ""
    has_schema: bool = False
    generation_config: str = "{}"     # as JSON text: the same one is kept once
    request_bytes: int = 0
    complete: bool = False
    gone: bool = False
    answered: bool = False
    finished: bool = False
    status: int | None = None
    usage: dict[str, Any] | None = None
    ended: float | None = None

    def to_json(self) -> dict[str, Any]:
        row = dict(vars(self))
        row["generationConfig"] = json.loads(row.pop("generation_config"))
        return row


@dataclass
class Script:
    steps: list[dict[str, Any]]
    repeat: bool
    at: int = 0

    def next(self) -> dict[str, Any] | None:
        if self.at < len(self.steps):
            self.at += 1
            return self.steps[self.at - 1]
        return self.steps[-1] if self.repeat and self.steps else None


@dataclass
class Run:
    """Everything between two resets."""
    calls: collections.deque[Call] = field(default_factory=lambda: collections.deque(maxlen=KEPT_CALLS))
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    scripts: dict[str, Script] = field(default_factory=dict)
    tickets: collections.deque[int] = field(default_factory=collections.deque)  # eventfds of held calls, oldest first

    def all_counts(self) -> dict[str, int]:
        names = ("calls", "complete", "gone", "answered", "finished")
        return {name: self.counts[name] for name in names} | {"held": len(self.tickets)}


class State:
    """The run of now, its lock, and the log file. Every method may be called from any thread."""

    def __init__(self, log: BinaryIO | None):
        self.changed = threading.Condition()
        self.run = Run()
        self.log = log

    def begin(self, key: str | None, **facts: Any) -> tuple[Run, Call]:
        with self.changed:
            run = self.run
            script = run.scripts.get(key, run.scripts.get("*")) if key else None
            step = script.next() if script else None
            call = Call(n=next(run.numbers), time=time.time(), key=key, step=step, **facts)
            run.calls.append(call)
            run.counts["calls"] += 1
            self.changed.notify_all()
            return run, call

    def mark(self, run: Run, call: Call, event: str) -> None:
        with self.changed:
            setattr(call, event, True)
            run.counts[event] += 1
            self.changed.notify_all()

    def finish(self, run: Run, call: Call) -> None:
        call.ended = time.time()
        self.mark(run, call, "finished")
        if self.log:
            line = json.dumps(call.to_json(), ensure_ascii=False).encode() + b"\n"
            with self.changed:
                self.log.write(line)

    def pause(self, run: Run, connection: socket.socket, seconds: float | None) -> bool:
        """Waits for the time, or, with None, for a release or a reset; False when the client went away first."""
        if seconds is not None:
            return not peer_closed(connection, seconds)
        ticket = os.eventfd(0)
        try:
            with self.changed:
                if run is not self.run:
                    return True
                run.tickets.append(ticket)
                self.changed.notify_all()
            return not peer_closed(connection, None, ticket)
        finally:
            with self.changed:
                if ticket in run.tickets:
                    run.tickets.remove(ticket)
                    self.changed.notify_all()
                os.close(ticket)

    def release(self, count: int | None) -> int:
        with self.changed:
            tickets = self.run.tickets
            released = len(tickets) if count is None else min(count, len(tickets))
            for _ in range(released):
                os.eventfd_write(tickets.popleft(), 1)
            self.changed.notify_all()
            return released

    def reset(self) -> None:
        with self.changed:
            self.release(None)
            self.run = Run()
            self.changed.notify_all()

    def wait(self, wanted: dict[str, int], timeout: float) -> tuple[bool, dict[str, int]]:
        def reached() -> bool:
            counts = self.run.all_counts()
            return all(counts[name] >= number for name, number in wanted.items())
        with self.changed:
            done = self.changed.wait_for(reached, timeout)
            return done, self.run.all_counts()


def peer_closed(connection: socket.socket, seconds: float | None, ticket: int | None = None) -> bool:
    """Waits until the time is over, the ticket is written or the peer closes; whether it was the peer."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    if ticket is not None:
        poll.register(ticket, select.POLLIN)
    ready = poll.poll(None if seconds is None else seconds * 1000)
    return any(descriptor == connection.fileno() for descriptor, _ in ready)


# --- HTTP ------------------------------------------------------------------------------------------------------------

class ClientGone(Exception):
    """The connection ended in the middle of a request."""


class BadHttp(Exception):
    """Not HTTP/1.x as it should be; the connection can't be used further."""


class TooLarge(Exception):
    """More than MAX_REQUEST_BYTES."""


@dataclass
class Head:
    method: str
    path: str
    query: dict[str, list[str]]
    version: str
    headers: dict[str, str]

    @property
    def keep_alive(self) -> bool:
        token = self.headers.get("connection", "").lower()
        return token != "close" and (self.version == "HTTP/1.1" or token == "keep-alive")


class Connection(socketserver.StreamRequestHandler):
    """One client connection: requests are read and answered one after the other."""

    server: Emulator
    rfile: io.BufferedReader
    rbufsize = CHUNK
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.number = next(self.server.connections)
        self.open = True

    def handle(self) -> None:
        try:
            self.serve()
        except (ClientGone, OSError):
            pass

    def serve(self) -> None:
        try:
            while self.open and (head := self.read_head()):
                self.open = head.keep_alive
                self.dispatch(head)
        except BadHttp as error:
            self.open = False
            self.send(json_answer(400, GoogleError(400, f"Malformed HTTP: {error}").to_json()))

    def finish(self) -> None:
        """Ends with a FIN even where the client is still sending: close() with unread data would be a RST."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(2)
            while self.connection.recv(CHUNK):
                pass
        except OSError:
            pass
        super().finish()

    # Reading

    def read_line(self) -> bytes:
        line = self.rfile.readline(CHUNK)
        if not line.endswith(b"\n"):
            raise BadHttp("line too long") if len(line) == CHUNK else ClientGone()
        return line.rstrip(b"\r\n")

    def read_head(self) -> Head | None:
        """The next request's head; None where the client closed between requests."""
        if not self.rfile.peek(1):
            return None
        try:
            method, target, version = self.read_line().decode("ascii").split(" ")
        except ValueError:
            raise BadHttp("request line") from None
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise BadHttp("version")
        headers: dict[str, str] = {}
        while line := self.read_line():
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                raise BadHttp("header field")
            name = name.lower()
            headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
        if version == "HTTP/1.1" and "host" not in headers:
            raise BadHttp("no Host")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise BadHttp("Content-Length and Transfer-Encoding")
        if not re.fullmatch(r"[0-9]+", headers.get("content-length", "0")):
            raise BadHttp("Content-Length")
        if headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise BadHttp("Transfer-Encoding")
        parts = urlsplit(target)
        return Head(method, unquote(parts.path), parse_qs(parts.query, keep_blank_values=True), version, headers)

    def read_body(self, head: Head) -> bytes:
        length = int(head.headers.get("content-length", "0"))
        if length > MAX_REQUEST_BYTES:
            raise TooLarge
        if head.headers.get("expect", "").lower() == "100-continue" and head.version == "HTTP/1.1":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "transfer-encoding" not in head.headers:
            return self.read_exactly(length)
        body = bytearray()
        while size := self.read_chunk_size():
            if len(body) + size > MAX_REQUEST_BYTES:
                raise TooLarge
            body += self.read_exactly(size)
            if self.read_line():
                raise BadHttp("chunk")
        while self.read_line():  # trailer fields
            pass
        return bytes(body)

    def read_chunk_size(self) -> int:
        size = self.read_line().split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise BadHttp("chunk size")
        return int(size, 16)

    def read_exactly(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ClientGone
        return data

    # Writing

    def send(self, answer: Answer, *, cut: int | None = None, trickle: float = 0) -> bool:
        """Writes the answer; with cut only so many bytes of the body, then the end. Whether it was written whole."""
        total = len(answer.body) + answer.padding
        reason = http.client.responses.get(answer.status, "Unknown")
        headers = {"Server": "gemini-emulator", **answer.headers, "Content-Length": str(total)}
        if not self.open:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        body = answer.body if cut is None else answer.body[:cut]
        if trickle:
            self.wfile.write(head)
            for at in range(len(body)):
                if peer_closed(self.connection, trickle):
                    raise ClientGone
                self.wfile.write(body[at:at + 1])
        else:
            self.wfile.write(head + body)
        padding = answer.padding if cut is None else max(0, min(answer.padding, cut - len(body)))
        for at in range(0, padding, CHUNK):
            self.wfile.write(b" " * min(CHUNK, padding - at))
        if cut is not None and cut < total:
            self.open = False
            return False
        return True

    def end(self, *, reset: bool) -> None:
        """Ends the connection without an answer: with a RST, or with finish()'s FIN."""
        self.open = False
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # the file objects hold the socket too, so its close() would not close the descriptor
            os.close(self.connection.detach())

    # Paths

    def dispatch(self, head: Head) -> None:
        """Answers one request."""
        if head.path.startswith("/__emulator/"):
            body = self.read_body(head)
            self.send(control(self.server.state, head, body))
        elif head.method == "POST" and (match := re.fullmatch(r"/v1beta/models/([^/:]+):generateContent", head.path)):
            self.generate_content(head, match[1])
        else:
            self.read_body(head)
            self.send(models_answer(head))

    def generate_content(self, head: Head, model: str) -> None:
        state = self.server.state
        run, call = state.begin(
            head.headers.get("x-goog-api-key") or None, connection=self.number, model=model, path=head.path,
            http_headers={name: head.headers[name] for name in LOGGED_HEADERS if name in head.headers})
        try:
            self.play(head, call, run)
        finally:
            state.finish(run, call)

    def play(self, head: Head, call: Call, run: Run) -> None:
        """One call, from its body to its answer."""
        state = self.server.state
        step = call.step or {}
        if "before_read" in (step.get("close"), step.get("reset")):
            self.end(reset="reset" in step)
            return
        try:
            body = self.read_body(head)
        except TooLarge:
            error = GoogleError(413, f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes.")
            call.status, self.open = error.code, False
            self.send(json_answer(error.code, error.to_json()))
            return
        call.request_bytes = len(body)
        state.mark(run, call, "complete")

        if "delay" in step or "hold" in step:
            waits = [step["delay"]] if "delay" in step else []
            waits += [None] if step.get("hold") else []
            if not all(state.pause(run, self.connection, seconds) for seconds in waits):
                state.mark(run, call, "gone")
                self.open = False
                return
        if "close" in step or "reset" in step:
            self.end(reset="reset" in step)
            return

        try:
            check_access(head, call.model)
            request = check_request(body)
            describe(call, request)
            answer = answer_for(step, request, call.model, f"emulated-{call.n}")
        except GoogleError as error:
            answer = json_answer(error.code, error.to_json())
            step = {}
        call.status = answer.status
        call.usage = answer.usage
        if step.get("close_connection"):
            self.open = False
        if self.send(answer, cut=step.get("cut"), trickle=step.get("trickle", 0)):
            state.mark(run, call, "answered")
        if step.get("die_idle"):
            self.open = False


def check_access(head: Head, model: str | None) -> None:
    """The checks that need no body."""
    for name in head.query:
        if name == "key":
            raise GoogleError(400, "API keys are not taken from the URL. Send x-goog-api-key.")
        if name not in ("alt", "$alt", "prettyPrint", "pageSize", "pageToken"):
            raise GoogleError(400, f"Invalid JSON payload received. Unknown name \"{name}\": Cannot bind query "
                                   f"parameter. Field '{name}' could not be found in request message.")
    if not head.headers.get("x-goog-api-key"):
        raise GoogleError(403, "Method doesn't allow unregistered callers (callers without established identity). "
                               "Please use API Key or other form of API consumer identity to call this API.")
    if model is not None and not MODEL_NAME.fullmatch(model):
        raise GoogleError(404, f"models/{model} is not found for API version v1beta, or is not supported for "
                               f"generateContent. Call ListModels to see the list of available models and their "
                               f"supported methods.")
    content_type = head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if head.method == "POST" and content_type != "application/json":
        raise GoogleError(400, f"Invalid JSON payload received. Content-Type must be application/json, not "
                               f"'{content_type}'.")


def describe(call: Call, request: Request) -> None:
    """What the log says of a request that passed."""
    call.prompt = sys.intern(request.prompt)
    call.has_schema = request.has_schema
    call.generation_config = sys.intern(json.dumps(request.config))
    if request.files:
        call.mime = request.files[0].mime
        call.file_sha256 = hashlib.sha256(request.files[0].data).hexdigest()
        call.file_bytes = len(request.files[0].data)


def model_json(name: str) -> dict[str, Any]:
    return {"name": f"models/{name}", "version": "001", "displayName": name, "inputTokenLimit": 1048576,
            "outputTokenLimit": 65536, "supportedGenerationMethods": ["generateContent"]}


def models_answer(head: Head) -> Answer:
    match = re.fullmatch(r"/v1beta/models(?:/([^/:]+))?", head.path)
    try:
        if head.method != "GET" or not match:
            raise GoogleError(404, f"{head.method} {head.path} is not found.")
        check_access(head, match[1])
    except GoogleError as error:
        return json_answer(error.code, error.to_json())
    return json_answer(200, model_json(match[1]) if match[1] else {"models": [model_json(name) for name in MODELS]})


# --- the control interface -------------------------------------------------------------------------------------------

def control(state: State, head: Head, body: bytes) -> Answer:
    actions: dict[str, Callable[[], Answer]] = {
        "POST script": lambda: control_script(state, body),
        "POST reset": lambda: control_reset(state),
        "POST release": lambda: control_release(state, body),
        "GET log": lambda: control_log(state),
        "GET held": lambda: json_answer(200, {"held": state.wait({}, 0)[1]["held"]}),
        "GET wait": lambda: control_wait(state, head.query),
        "GET scenarios": lambda: json_answer(200, SCENARIOS),
    }
    name = f"{head.method} {head.path.removeprefix('/__emulator/')}"
    if name not in actions:
        return json_answer(404, {"error": f"no {name}; there are: {', '.join(actions)}"})
    try:
        return actions[name]()
    except (ValueError, TypeError) as error:
        return json_answer(400, {"error": str(error)})


def control_fields(body: bytes, known: set[str]) -> dict[str, Any]:
    value = json.loads(body) if body.strip() else {}
    if not isinstance(value, dict) or not value.keys() <= known:
        raise ValueError(f"expected an object with {', '.join(sorted(known))}")
    return value


def control_script(state: State, body: bytes) -> Answer:
    order = control_fields(body, {"key", "steps", "scenario", "repeat"})
    if ("steps" in order) == ("scenario" in order):
        raise ValueError("expected either steps or scenario")
    steps = script_steps(order["scenario"]) if "scenario" in order else order["steps"]
    key, repeat = order.get("key", "*"), order.get("repeat", False)
    if not isinstance(steps, list) or not isinstance(key, str) or not isinstance(repeat, bool):
        raise ValueError("expected key: string, steps: list, repeat: true or false")
    script = Script([check_step(step) for step in steps], repeat)
    with state.changed:
        state.run.scripts[key] = script
    return json_answer(200, {"key": key, "steps": script.steps, "repeat": repeat})


def control_reset(state: State) -> Answer:
    state.reset()
    return json_answer(200, {})


def control_release(state: State, body: bytes) -> Answer:
    count = control_fields(body, {"count"}).get("count")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ValueError("expected count: a number, or null for all")
    return json_answer(200, {"released": state.release(count)})


def control_log(state: State) -> Answer:
    with state.changed:
        rows = [call.to_json() for call in state.run.calls]
    return json_answer(200, rows)


def control_wait(state: State, query: dict[str, list[str]]) -> Answer:
    values = {name: float(texts[-1]) for name, texts in query.items()}
    timeout = values.pop("timeout", 10.0)
    unknown = values.keys() - state.run.all_counts().keys()
    if unknown or not values:
        raise ValueError(f"expected some of {', '.join(state.run.all_counts())} and timeout")
    done, counts = state.wait({name: int(number) for name, number in values.items()}, timeout)
    return json_answer(200 if done else 408, counts)


# --- the program -----------------------------------------------------------------------------------------------------

class Emulator(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 4096

    def __init__(self, address: tuple[str, int], log: BinaryIO | None = None):
        self.state = State(log)
        self.connections = itertools.count(1)
        super().__init__(address, Connection)

    def shutdown_request(self, request: Any) -> None:
        """Closes without a shutdown(): after a RST there is nothing left to shut down."""
        self.close_request(request)


def loopback_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        if not ipaddress.IPv4Address(host).is_loopback or not 0 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not 127.0.0.1:PORT") from None
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Google's generateContent.")
    parser.add_argument("--listen", type=loopback_address, default=("127.0.0.1", 19090), metavar="127.0.0.1:PORT")
    parser.add_argument("--log", metavar="FILE.jsonl", help="append a line for each finished call")
    arguments = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    threading.stack_size(1024 * 1024)
    log = open(arguments.log, "ab", buffering=0) if arguments.log else None
    with Emulator(arguments.listen, log) as server:
        print(f"listening on {arguments.listen[0]}:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
