"""What the kernel, strace and valgrind tell about processes."""
from __future__ import annotations

import dataclasses
import os
import re
import signal
import struct
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

TICKS = os.sysconf("SC_CLK_TCK")


def machine_is_idle() -> bool:
    """For three tenths of a second nine tenths of its processors had nothing to do."""
    def times() -> tuple[int, int]:
        ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)
    idle, total = times()
    time.sleep(0.3)
    now_idle, now_total = times()
    return now_idle - idle >= 0.9 * (now_total - total)


def cpu_seconds(pids: list[int]) -> tuple[float, float]:
    """User and system time of processes."""
    user = system = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        user, system = user + int(fields[11]), system + int(fields[12])
    return user / TICKS, system / TICKS


def context_switches(pids: list[int]) -> int:
    """Of all threads: voluntary ones (waiting) and others."""
    total = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            total += sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", status.read_text()))
    return total


def pss(pids: list[int]) -> dict[str, float]:
    """Proportional set size in MB: Pss, and of it Pss_Anon, Pss_File, Pss_Shmem."""
    total: Counter[str] = Counter()
    for pid in pids:
        for name, kib in re.findall(r"^(Pss\w*):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M):
            total[name] += int(kib)
    return {name: total[name] * 1024 / 1e6 for name in ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")}


def fsync_seconds(directory: Path, times: int = 100) -> list[float]:
    """What one durable write of a page costs in this directory."""
    path, took = directory / "fsync-probe", []
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for at in range(times):
            os.pwrite(fd, b"x" * 4096, 4096 * at)
            begun = time.perf_counter()
            os.fdatasync(fd)
            took.append(time.perf_counter() - begun)
    finally:
        os.close(fd)
        path.unlink()
    return took


@dataclasses.dataclass
class Counts:
    """count_io.c's struct, in its order."""
    copied: int
    copies: int
    read: int
    reads: int
    written: int
    writes: int
    fsync_ns: int
    fsyncs: int

    @staticmethod
    def of(path: Path) -> Counts:
        return Counts(*struct.unpack("8q", path.read_bytes()[:64]))

    def since(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)))


def counted(library: Path, directory: Path) -> tuple[Path, dict[str, str]]:
    """A file for counts, and the environment that makes a program count there."""
    path = directory / "counts"
    path.write_bytes(bytes(4096))
    return path, {"LD_PRELOAD": str(library), "BENCH_COUNTS": str(path)}


@contextmanager
def system_calls(pids: list[int], directory: Path) -> Iterator[Counter[str]]:
    """System calls of processes while it lasts, by name; complete when it has ended."""
    out = directory / "strace"
    strace = subprocess.Popen(["strace", "-f", "-c", "-o", str(out), *(f"-p{pid}" for pid in pids)],
                              stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids)
    attached = 0
    while attached < len(pids):  # it says so for each process, with the number of its threads
        line = strace.stderr.readline()
        if not line:
            raise RuntimeError(f"strace cannot attach to {pids} ({threads} threads)")
        attached += "attached" in line
    calls: Counter[str] = Counter()
    try:
        yield calls
    finally:
        strace.send_signal(signal.SIGINT)
        strace.communicate()
    for line in out.read_text().splitlines():
        if match := re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", line):
            if match[2] != "total":
                calls[match[2]] += int(match[1])


def callgrind(directory: Path) -> tuple[str, ...]:
    """What runs a program under callgrind; instructions() reads what it writes."""
    return ("/usr/bin/valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={directory}/callgrind.%p")


def instructions(pid: int, directory: Path, top: int = 12) -> tuple[int, list[str], list[str]]:
    """Instructions in user space since the last call of this; the functions that have most of them in themselves; and the
    program's own functions that have most of them in themselves and in what they call."""
    for old in directory.glob(f"callgrind.{pid}*"):
        old.unlink()
    subprocess.run(["callgrind_control", "-d", str(pid)], check=True, capture_output=True)
    dump = max(directory.glob(f"callgrind.{pid}*"), key=lambda path: path.stat().st_size)
    # Calls that began before the first dump are counted 0 times, which callgrind_annotate takes for a cost of the caller.
    dump.write_text(re.sub(r"^calls=0 .*\n.*\n", "", dump.read_text(), flags=re.M))

    def annotate(inclusive: str) -> list[tuple[int, str]]:
        text = subprocess.run(["callgrind_annotate", "--threshold=100", f"--inclusive={inclusive}", str(dump)],
                              capture_output=True, text=True).stdout
        return [(int(n.replace(",", "")), re.sub(r"^\S+?:(?=\w)", "", what))
                for n, what in re.findall(r"^\s*([\d,]+) \([ \d.]+%\)\s+(.+)$", text, re.M)]

    own, within = annotate("no"), annotate("yes")
    total = own[0][0]  # PROGRAM TOTALS
    program = f"[{Path(f'/proc/{pid}/cmdline').read_text().rstrip(chr(0)).split(chr(0))[-1]}]"
    return (total, [f"{n / total:6.1%}  {what}" for n, what in own[1:top + 1]],
            [f"{n / total:6.1%}  {what.removesuffix(program).strip()}" for n, what in within if what.endswith(program)][:3 * top])
