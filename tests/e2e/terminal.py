"""extractctl at a terminal, as somebody sees it who sits there."""
from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

PATIENCE = 60.0  # seconds: an upper bound for what must happen, never a delay


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\033\[[\d;]*m", "", text)


class Terminal:
    """Standard input is the terminal; so are standard output and standard error, unless they are told to be pipes."""

    def __init__(self, program: Path, *arguments: str, env: dict[str, str], columns: int = 400, stdout: bool = True,
                 stderr: bool = True) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.raw = b""
        # No signal is ignored at a terminal, even where the tests run in a shell's background.
        self.process = subprocess.Popen(["env", "--default-signal", "setsid", "--ctty", str(program), *arguments], env=env,
                                        stdin=self.slave, stdout=self.slave if stdout else subprocess.PIPE,
                                        stderr=self.slave if stderr else subprocess.PIPE)

    def read(self, until: str | None = None) -> str:
        """What has come, when it holds this, or when the program has ended."""
        end = time.monotonic() + PATIENCE
        while until is None or until not in self.text:
            assert time.monotonic() < end, f"{until!r} never came: {self.text!r}"
            readable, _, _ = select.select([self.master], [], [], 0.02)
            if readable:
                self.raw += os.read(self.master, 65536)
            elif self.process.poll() is not None:
                assert until is None, f"it has ended without {until!r}: {self.text!r}"
                break
        return self.text

    @property
    def text(self) -> str:
        return self.raw.decode().replace("\r\n", "\n")

    @property
    def screen(self) -> list[str]:
        """The lines as they stand there at last, without colours and without those that are empty."""
        lines = []
        for line in plain(self.text).split("\n"):
            shown = ""
            for part in line.split("\r"):
                part, erased, rest = part.partition("\033[K")
                shown = part + rest if erased else part + shown[len(part):]
            lines.append(shown)
        return [line for line in lines if line]

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def echoes(self) -> bool:
        """Does it show what is typed?"""
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def end(self) -> tuple[int, str, str]:
        """Waits for it; its exit status and what went into pipes."""
        self.read()
        stdout, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, (stdout or b"").decode(), (stderr or b"").decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=PATIENCE)
        os.close(self.master)
        os.close(self.slave)
