"""Starts tds_server.py for tests."""
from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tds_client import Connection

PASSWORD = "Pa€ss 'w0rd"


given_ports: set[int] = set()


def free_port() -> int:
    """One that the kernel gives to no connection, either (32768 and up), nor this to a second caller."""
    while True:
        port = random.randrange(10000, 32768)
        with closing(socket.socket()) as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            if port not in given_ports:
                given_ports.add(port)
                return port


class TdsServer:
    """A server whose databases live in a directory: killed and started again it has what was committed."""

    def __init__(self, directory: Path, encryption: str = "off", app_user: str | None = None) -> None:
        self.directory, self.encryption, self.app_user = directory, encryption, app_user
        self.password_file = directory / "password"
        self.password_file.write_text(PASSWORD + "\n")
        self.password_file.chmod(0o600)
        self.address, self.control_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """At the same address as before, which nobody else has taken meanwhile (free_port)."""
        command = ["/usr/bin/python3", str(Path(__file__).parent / "tds_server.py"), "--listen", self.address,
                   "--control", self.control_address, "--directory", str(self.directory / "databases"), "--tls",
                   str(self.directory / "tls"), "--password-file", str(self.password_file), "--encryption",
                   self.encryption, *(["--app-user", self.app_user] if self.app_user else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]
        self.control_address = self.process.stdout.readline().split()[-1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def connect(self, database: str = "") -> Connection:
        return Connection(self.address, "sa", PASSWORD, database)

    def send_control(self, line: str) -> Any:
        host, _, port = self.control_address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), 30)) as s:
            s.sendall(line.encode() + b"\n")
            with s.makefile() as lines:
                return json.loads(lines.readline())

    def control(self, **command: Any) -> Any:
        """One command (README.md); its answer."""
        answer = self.send_control(json.dumps(command))
        assert "error" not in answer, answer
        return answer

    def __enter__(self) -> TdsServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
        assert self.process is None or self.process.stdout is None or self.process.stdout.close() is None
