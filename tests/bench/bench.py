#!/usr/bin/python3
"""make bench: measures the product beside the floor and the Python stack. README.md says what each figure means.

    PART=throughput,latency,…   some of it: throughput, mssql, latency, cost, memory, growth
    RUNS=5                      how often each figure is measured; tables show median (lowest to highest)
    FULL=1                      also measures in each run what else is measured in the first one only
    PYTHON_STACK=no             leaves it out
    PROCESSES=1 THREADS=64      of the pools       BY_PATH=1   uploads by path
    MSSQL_SERVER=host:port MSSQL_USER=… MSSQL_PASSWORD_FILE=…   part mssql, as for make check-mssql

Exits 1 if the product's or the floor's requests fail, or if an account does not balance. No figure makes it fail.
"""
from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

import probes  # noqa: E402
from load import Result, Uploads, curl, direct_url, outcome, percentile, wrk  # noqa: E402
from systems import (BUILD, BY_PATH, COMPANIES, MODEL, PROCESSES, THREADS, Floor, FloorWithRows, Product, PythonStack,  # noqa: E402
                     System, Unsynced, Upstream, Wrong, live_server, scratch)
from conftest import eventually  # noqa: E402

RUNS = int(os.environ.get("RUNS") or 5)
FULL = bool(os.environ.get("FULL"))
WITH_PYTHON = os.environ.get("PYTHON_STACK") != "no"
KB, MB = 1000, 1000 * 1000
SIZES = {"10 KB": 10 * KB, "20 KB": 20 * KB, "100 KB": 100 * KB, "200 KB": 200 * KB, "1 MB": MB, "4 MB": 4 * MB, "10 MB": 10 * MB,
         "20 MB": 20 * MB, "50 MB": 50 * MB}


class Bench:
    """What all parts share; what they find out about the targets, and what went wrong."""

    def __init__(self, directory: Path, upstream: Upstream) -> None:
        self.dir, self.upstream, self.uploads = directory, upstream, Uploads(directory)
        self.targets: list[tuple[str, str, str, bool | None]] = []
        self.faults: list[str] = []

    def product(self, **settings: Any) -> Callable[[], Product]:
        return lambda: Product(self.upstream, **settings)

    def unsynced(self) -> Callable[[], Unsynced]:
        return lambda: Unsynced(self.upstream)

    def floor(self, **settings: Any) -> Callable[[], Floor]:
        return lambda: Floor(self.upstream, **settings)

    def floor_with_rows(self, **settings: Any) -> Callable[[], FloorWithRows]:
        return lambda: FloorWithRows(self.upstream, **settings)

    def python(self, **settings: Any) -> list[Callable[[], PythonStack]]:
        """The Python stack, where it is wanted."""
        return [lambda: PythonStack(self.upstream, **settings)] if WITH_PYTHON else []

    def target(self, what: str, aim: str, values: list[float], holds: Callable[[float], bool], unit: str = "") -> None:
        self.targets.append((what, aim, spread(values, unit), holds(statistics.median(values))))

    def load(self, system: System, size: int, clients: int, seconds: int, tls: bool = False, companies: int = 1) -> Result:
        """One measurement. It ends when nothing of it is in flight any more."""
        uploads = [self.uploads.of(size, company) for company in COMPANIES[:companies]]
        result = outcome(wrk(system.url(tls), clients, seconds, uploads))
        system.quiet()
        if result.failed:
            what = f"{system.name}: {result.failed} of {result.requests} requests failed ({clients} clients, {size} bytes)"
            say(what)
            if system.is_ours:
                self.faults.append(what)
        return result

    def audit(self, *systems: System) -> None:
        for system in systems:
            try:
                system.audit()
            except Wrong as wrong:
                self.faults.append(str(wrong))
                say(str(wrong))


def say(what: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: list[float], unit: str = "") -> str:
    """The median, and where there are several the lowest and the highest."""
    if not values:
        return ""
    text = number(statistics.median(values))
    if len(values) > 1:
        text += f" ({number(min(values))} to {number(max(values))})"
    return f"{text} {unit}".strip()


def table(title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}\n")
    for row in [columns, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if note:
        print(f"\n  {note}")
    sys.stdout.flush()


@contextmanager
def running(*makers: Callable[[], System]) -> Iterator[list[Any]]:
    """Makes systems, and ends them whatever happens."""
    with ExitStack() as stack:
        systems = []
        for make in makers:
            systems.append(make())
            stack.callback(systems[-1].close)
        yield systems


# ---- throughput ----


def seconds_for(size: int, clients: int) -> int:
    """Long enough for each client to be answered more than once."""
    if size <= 200 * KB:
        return {1: 1, 32: 2, 256: 3}[clients]
    if size == 4 * MB:
        return {1: 2, 32: 4, 256: 15}[clients]
    return {1: 3, 32: 8, 256: 30}[clients]


Cell = tuple[str, int, bool, int]  # size, clients, TLS, companies

# Measured in every run; of them those with the Python stack beside.
EVERY_RUN: list[Cell] = [
    ("20 KB", 1, False, 1), ("200 KB", 1, False, 1), ("4 MB", 1, False, 1),
    ("20 KB", 32, False, 1), ("200 KB", 32, False, 1), ("4 MB", 32, False, 1), ("20 MB", 32, False, 1),
    ("20 KB", 256, False, 1), ("200 KB", 256, False, 1),
    ("20 KB", 32, False, 16), ("200 KB", 32, False, 16),
    ("200 KB", 1, True, 1), ("20 KB", 32, True, 1), ("200 KB", 32, True, 1), ("4 MB", 32, True, 1)]
BESIDE_PYTHON: list[Cell] = [("200 KB", 1, False, 1), ("20 KB", 32, False, 1), ("200 KB", 32, False, 1), ("4 MB", 32, False, 1),
                             ("20 KB", 32, False, 16), ("200 KB", 32, False, 16), ("20 KB", 32, True, 1), ("200 KB", 32, True, 1)]
# These take long; in the first run only, unless FULL is set.
FIRST_RUN: list[Cell] = [
    ("20 MB", 1, False, 1), ("4 MB", 256, False, 1), ("20 MB", 256, False, 1),
    ("20 KB", 1, True, 1), ("4 MB", 1, True, 1), ("20 MB", 1, True, 1), ("20 MB", 32, True, 1),
    ("20 KB", 256, True, 1), ("200 KB", 256, True, 1), ("4 MB", 256, True, 1)]
# Where fsync is what is waited for: the product once more, with an fsync that does nothing, to show how much it is.
UNSYNCED: list[Cell] = [("20 KB", 32, False, 1), ("200 KB", 32, False, 1)]
# How much of what the product is below the floor are the rows.
WITH_ROWS: list[Cell] = [("20 KB", 32, False, 1), ("200 KB", 32, False, 1), ("4 MB", 32, False, 1), ("20 MB", 32, False, 1)]


def throughput(bench: Bench) -> None:
    measure_throughput(bench, "the embedded store", None, 10, EVERY_RUN, FIRST_RUN)


def mssql(bench: Bench) -> None:
    server = live_server()
    if server is None:
        print("\nmssql: no server (MSSQL_SERVER=host:port MSSQL_USER=… MSSQL_PASSWORD_FILE=…)")
        return
    try:
        measure_throughput(bench, "a live TDS server", server, 4, [cell for cell in EVERY_RUN if not cell[2] and "KB" in cell[0]], [])
    finally:
        server.close()


def measure_throughput(bench: Bench, store: str, server: Any, aim: float, cells: list[Cell], first_run: list[Cell]) -> None:
    found: dict[Cell, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        systems: dict[bool, list[System]] = {}
        for tls in sorted({cell[2] for cell in cells}):
            plain = [bench.floor_with_rows(), bench.unsynced()] if server is None and not tls else []
            systems[tls] = stack.enter_context(running(bench.product(tls=tls, sql_server=server), bench.floor(tls=tls), *plain,
                                                       *bench.python(tls=tls, sql_server=server)))
            for system in systems[tls]:  # connections, caches; a server plans each procedure for each of its sessions
                bench.load(system, 20 * KB, 2 * THREADS, 1 if server is None else 5, tls)
        for run in range(RUNS):
            say(f"throughput on {store}, run {run + 1} of {RUNS}")
            for cell in cells + (first_run if run == 0 or FULL else []):
                size, clients, tls, companies = cell
                for system in systems[tls]:
                    if (isinstance(system, PythonStack) and cell not in BESIDE_PYTHON
                            or isinstance(system, Unsynced) and cell not in UNSYNCED
                            or isinstance(system, FloorWithRows) and cell not in WITH_ROWS):
                        continue
                    seconds = seconds_for(SIZES[size], clients)
                    if server is not None:  # it plans anew for each connection; and who gave up has left it work
                        bench.load(system, SIZES[size], clients, 4, tls, companies)
                        eventually(probes.machine_is_idle, "the server has nothing left to do")
                        seconds += 1
                    found[cell][system.name].append(bench.load(system, SIZES[size], clients, seconds, tls, companies))
            bench.audit(*(system for made in systems.values() for system in made))

    def ratios(cell: Cell, other: str, name: str = "product") -> list[float]:
        return [a.rate / b.rate for a, b in zip(found[cell][name], found[cell][other]) if b.requests]

    rows = []
    for cell in sorted(found, key=lambda cell: (cell[2], cell[3], cell[1], SIZES[cell[0]])):
        size, clients, tls, companies = cell
        row = [size, str(clients), "TLS" if tls else "plain", str(companies)]
        for name in ("product", "floor", FloorWithRows.name, "python stack"):
            results = found[cell][name]
            row += [spread([r.rate for r in results]),
                    " / ".join(number(statistics.median(times) * 1000) for times in ([r.p50 for r in results], [r.p99 for r in results])
                               if times)]
        rows.append([*row, spread(ratios(cell, "floor")), spread(ratios(cell, FloorWithRows.name)), spread(ratios(cell, "floor", Unsynced.name)),
                     spread(ratios(cell, "python stack"))])
    table(f"Throughput on {store}: requests/s, and p50 / p99 in ms; {PROCESSES} x {THREADS} threads"
          + (", uploads by path" if BY_PATH else ""),
          ["upload", "clients", "wire", "companies", "product", "ms", "floor", "ms", FloorWithRows.name, "ms", "python stack", "ms",
           "of the floor", "... with rows", "... without fsync", "times python"], rows)
    for size in ("20 KB", "200 KB", "4 MB", "20 MB"):
        cell = (size, 32, False, 1)
        if values := ratios(cell, "python stack"):
            if size in ("20 KB", "200 KB"):
                bench.target(f"throughput, 32 clients, {size}, {store}, over the Python stack", f"at least {aim}", values,
                             lambda v: v >= aim)
        if server is None and (values := ratios(cell, "floor")):
            floor = {"20 KB": 0.6, "200 KB": 0.85}.get(size, 0.9)
            bench.target(f"throughput, 32 clients, {size}, of the floor", f"at least {floor}", values, lambda v, f=floor: v >= f)
    if server is None:
        bench.targets.append((f"of the floor with rows, 32 clients, {'; '.join(cell[0] for cell in WITH_ROWS)}", "shown",
                              "; ".join(spread(ratios(cell, FloorWithRows.name)) for cell in WITH_ROWS), None))


# ---- latency ----


def latency(bench: Bench) -> None:
    """One client, 200 KB, beside the same call made directly, all by curl on one connection."""
    size = 200 * KB
    counts, counting = probes.counted(BUILD / "tests/bench/count_io.so", bench.dir)
    call = bench.uploads.call(size)
    url = direct_url(bench.upstream, MODEL)
    found: dict[str, list[list[float]]] = defaultdict(list)
    fsyncs, fsync_ms, disk = [], [], []
    makers = [bench.product(), bench.unsynced(), bench.product(env=counting), bench.floor()]
    with running(*makers, *bench.python()) as systems:
        product, unsynced, counted, *others = systems
        for system in systems:
            curl(system.url(False), *bench.uploads.of(size), 20)
        for run in range(RUNS):
            say(f"latency, run {run + 1} of {RUNS}")
            found["direct"].append(curl(url, "application/json", call, 500))
            found["product"].append(curl(product.url(False), *bench.uploads.of(size), 500))
            found["direct again"].append(curl(url, "application/json", call, 500))
            found[Unsynced.name].append(curl(unsynced.url(False), *bench.uploads.of(size), 500))
            before = probes.Counts.of(counts)
            curl(counted.url(False), *bench.uploads.of(size), 200)
            counted.quiet()
            spent = probes.Counts.of(counts).since(before)
            fsyncs.append(spent.fsyncs / 200)
            fsync_ms.append(spent.fsync_ns / 1e6 / max(1, spent.fsyncs))
            disk.append(statistics.median(probes.fsync_seconds(product.dir)) * 1000)
            for system in others:
                found[system.name].append(curl(system.url(False), *bench.uploads.of(size), 500 if system.is_ours else 50))
            bench.audit(*systems)

    def ms(name: str, percent: float, over: bool = False) -> list[float]:
        return [(percentile(values, percent) - (percentile(base, percent) if over else 0)) * 1000
                for values, base in zip(found[name], found["direct"], strict=True)]

    table(f"Latency of one request of 200 KB, one client, ms; added: over the same call made directly in the same run",
          ["", "p50", "p99", "added p50", "added p99"],
          [[name, spread(ms(name, 50)), spread(ms(name, 99)), spread(ms(name, 50, True)) if name != "direct" else "",
            spread(ms(name, 99, True)) if name != "direct" else ""] for name in found],
          f"fsyncs: {spread(fsyncs)} a request, {spread(fsync_ms)} ms each (some after the answer); a durable page on this disk, alone: "
          f"{spread(disk)} ms")
    name = Unsynced.name
    bench.target("added latency, one client, 200 KB, p50, beside fsync", "at most 1.5 ms", ms(name, 50, True), lambda v: v <= 1.5, "ms")
    bench.target("added latency, one client, 200 KB, p99, beside fsync", "at most 5 ms", ms(name, 99, True), lambda v: v <= 5, "ms")
    bench.targets.append(("of it with fsync: p50; p99", "shown", f"{spread(ms('product', 50, True))}; "
                          f"{spread(ms('product', 99, True))} ms", None))


# ---- what a request costs ----


def cost(bench: Bench) -> None:
    cells = [("20 KB", 2), ("200 KB", 2), ("4 MB", 2)]
    cpu: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    round_trips: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with running(bench.product(), bench.floor(), bench.floor_with_rows(), *bench.python()) as systems:
        for system in systems:
            bench.load(system, 20 * KB, 32, 1)
        for run in range(RUNS):
            say(f"cost, run {run + 1} of {RUNS}")
            for size, seconds in cells:
                for system in systems:
                    pids, calls = system.pids(), system.calls()["answered"]
                    before, switches = probes.cpu_seconds(pids), probes.context_switches(pids)
                    batches = store_metrics(system)
                    bench.load(system, SIZES[size], 32, seconds)
                    n = system.calls()["answered"] - calls
                    after = probes.cpu_seconds(pids)
                    cpu[system.name, size].append(((after[0] - before[0]) / n * 1000, (after[1] - before[1]) / n * 1000,
                                                   (probes.context_switches(pids) - switches) / n))
                    if isinstance(system, Product):
                        now = store_metrics(system)
                        round_trips[size].append(((now[0] - batches[0]) / n, (now[1] - batches[1]) / n))
            bench.audit(*systems)
        table("CPU of a request, 32 clients, ms in the pool's processes (nginx and upstream are not in it), and context switches",
              ["", "upload", "user", "system", "both", "switches"],
              [[name, size, spread([v[0] for v in values]), spread([v[1] for v in values]), spread([v[0] + v[1] for v in values]),
                spread([v[2] for v in values]) if name != PythonStack.name else ""] for (name, size), values in cpu.items()],
              "Of the Python stack's threads some end meanwhile, and with them their counts of switches.")
        table("Store round trips of a request, 32 clients, embedded store", ["upload", "round trips", "items in them"],
              [[size, spread([v[0] for v in values]), spread([v[1] for v in values])] for size, values in round_trips.items()],
              "An item is an acquire or a settle; without batches there are two round trips. Log entries travel by themselves.")
        count_system_calls(bench, [s for s in systems if s.is_ours])
    count_copies(bench)
    count_instructions(bench)


def store_metrics(system: System) -> tuple[float, float]:
    if not isinstance(system, Product):
        return 0, 0
    return system.metric("extract_store_batches_total"), system.metric("extract_store_batch_items_total")


def count_system_calls(bench: Bench, systems: list[System]) -> None:
    rows = []
    for size in ("20 KB", "200 KB", "4 MB"):
        for system in systems:
            calls = system.calls()["answered"]
            with probes.system_calls(system.pids(), bench.dir) as names:
                bench.load(system, SIZES[size], 32, 2)
            n = system.calls()["answered"] - calls
            top = ", ".join(f"{name} {number(count / n)}" for name, count in names.most_common(12))
            rows.append([system.name, size, number(sum(names.values()) / n), top])
    bench.audit(*systems)
    table("System calls of a request, 32 clients, under strace (which makes everything slow, and batches larger)",
          ["", "upload", "all", "the most frequent"], rows)


def count_copies(bench: Bench) -> None:
    counts, counting = probes.counted(BUILD / "tests/bench/count_io.so", bench.dir)
    rows = []
    for make in (bench.product, bench.floor, bench.floor_with_rows):
        with running(make(env=counting)) as (system,):
            for size in ("20 KB", "200 KB", "4 MB"):
                curl(system.url(False), *bench.uploads.of(SIZES[size]), 10)
                for clients in (1, 32):
                    calls, before = system.calls()["answered"], probes.Counts.of(counts)
                    bench.load(system, SIZES[size], clients, 1)
                    n = system.calls()["answered"] - calls
                    spent = probes.Counts.of(counts).since(before)
                    rows.append([system.name, size, str(clients), *(number(v / n / SIZES[size]) for v in (spent.copied, spent.read, spent.written)),
                                 *(number(v / n) for v in (spent.copies, spent.reads, spent.writes, spent.fsyncs, spent.fsync_ns / 1e6))])
            bench.audit(system)
    table("Bytes copied by a request, in sizes of the upload, and how often (counted in the process: count_io.c)",
          ["", "upload", "clients", "memcpy", "read", "written", "memcpys", "reads", "writes", "fsyncs", "ms in fsync"], rows,
          "The least: read 1.00, written 1.33 (base64).")


def count_instructions(bench: Bench) -> None:
    rows, functions = [], []
    for make in (bench.product, bench.floor, bench.floor_with_rows):
        with running(make(processes=1, threads=4, wrapper=probes.callgrind(bench.dir))) as (system,):
            pid = system.pids()[0]
            for size, times in (("20 KB", 40), ("200 KB", 40), ("4 MB", 10)):
                curl(system.url(False), *bench.uploads.of(SIZES[size]), 5)
                probes.instructions(pid, bench.dir)
                curl(system.url(False), *bench.uploads.of(SIZES[size]), times)
                system.quiet()
                total, top, own = probes.instructions(pid, bench.dir)
                rows.append([system.name, size, number(total / times / 1000)])
                functions.append((f"{system.name}, {size}, in the function itself", top))
                if system.name == "product":
                    functions.append((f"{system.name}, {size}, with what it calls", own))
            bench.audit(system)
    table("Instructions of a request in user space (callgrind, one client), thousands", ["", "upload", "instructions"], rows)
    for title, top in functions:
        print(f"\n  {title}:")
        for line in top:
            print(f"    {line}")


# ---- memory ----


def memory(bench: Bench) -> None:
    flight, size = 1000, 200 * KB
    uploads_mb = flight * (size + 500) / 1e6
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns = ["idle", "after load", "1,000 in flight", "anonymous", "files", "shared", "beyond the uploads", "KB a request", "store connections"]
    one: dict[str, list[float]] = defaultdict(list)
    for run in range(RUNS):
        say(f"memory, run {run + 1} of {RUNS}")
        for make in (bench.product, bench.floor):
            with running(make(processes=4, threads=250, model="slow-5")) as (system,):
                values = rows[system.name]
                values["idle"].append(probes.pss(system.pids())["Pss"])
                load = wrk(system.url(False), flight, 60, [bench.uploads.of(size)])
                eventually(lambda: system.calls()["received"] >= flight, f"{flight} in flight")
                calls = system.calls()
                if calls["answered"]:
                    say(f"{system.name}: {calls['answered']} of {flight} were answered before all were in flight")
                now = probes.pss(system.pids())
                connections = system.store_connections() if isinstance(system, Product) else 0
                eventually(lambda: system.calls()["answered"] >= flight, f"{flight} answered")
                result = outcome(load, stop=True)
                if result.failed:
                    bench.faults.append(f"{system.name}: {result.failed} requests failed with {flight} in flight")
                system.quiet()
                values["after load"].append(probes.pss(system.pids())["Pss"])
                for column, name in zip(columns[2:6], ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem"), strict=True):
                    values[column].append(now[name])
                values["beyond the uploads"].append(now["Pss"] - uploads_mb)
                values["KB a request"].append((now["Pss"] - values["idle"][-1]) * 1000 / flight)
                values["store connections"].append(connections)
                bench.audit(system)
            with running(make(processes=1, threads=4, model="slow-0.5")) as (system,):
                one[system.name].append(one_large(bench, system))
                bench.audit(system)
        for make in bench.python():
            with running(make) as (system,):
                rows[system.name]["idle"].append(probes.pss(system.pids())["Pss"])
    table(f"Memory of the pool, PSS in MB: 4 processes of 250 threads, {flight:,} requests of 200 KB in flight, answers after 5 s",
          ["", *columns], [[name, *(spread(values[column]) for column in columns)] for name, values in rows.items()],
          f"The uploads themselves: {uploads_mb:.0f} MB. Python stack: {PROCESSES} process{'es' * (PROCESSES > 1)}, idle; it can have 40 requests a process in flight.")
    table("Memory of one upload of 50 MB, MB beyond the upload itself (its spool), highest seen", ["", "MB"],
          [[name, spread(values)] for name, values in one.items()])
    product = rows["product"]
    bench.target("memory, 1,000 in flight of 200 KB, beyond the uploads", "at most 150 MB", product["beyond the uploads"], lambda v: v <= 150, "MB")
    bench.target("store connections then", "at most 32", product["store connections"], lambda v: v <= 32)
    bench.target("memory of one 50 MB upload beyond its spool", "at most 1 MB", one["product"], lambda v: v <= 1, "MB")


def one_large(bench: Bench, system: System) -> float:
    """The pool's PSS while one upload of 50 MB is served, over what it was after a small one and over the upload: the highest."""
    curl(system.url(False), *bench.uploads.of(20 * KB), 3)
    size = 50 * 1024 * 1024 - 4096
    upload, pids, before, highest = bench.uploads.of(size), system.pids(), probes.pss(system.pids()), 0.0
    load, calls = wrk(system.url(False), 1, 60, [upload]), system.calls()["answered"]
    while system.calls()["answered"] == calls:
        now = probes.pss(pids)
        spool = now["Pss_File"] + now["Pss_Shmem"] - before["Pss_File"] - before["Pss_Shmem"]
        highest = max(highest, now["Pss_Anon"] - before["Pss_Anon"] + max(0.0, spool - upload[1].stat().st_size / 1e6))
    result = outcome(load, stop=True)
    if result.failed:
        bench.faults.append(f"{system.name}: a request of 50 MB failed")
    system.quiet()
    return highest


# ---- growth ----


def growth(bench: Bench) -> None:
    grow_bytes(bench)
    grow_tokens(bench)
    grow_rows(bench)
    grow_companies(bench)
    grow_processes(bench)


def grow_bytes(bench: Bench) -> None:
    sizes = {"10 KB": 60, "100 KB": 60, "1 MB": 40, "10 MB": 10, "50 MB": 5}
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    with running(bench.product(), bench.floor()) as systems:
        for system in systems:
            curl(system.url(False), *bench.uploads.of(20 * KB), 20)
        for run in range(RUNS):
            say(f"growth in bytes, run {run + 1} of {RUNS}")
            for size, times in sizes.items():
                for system in systems:
                    took[system.name, size].append(statistics.median(curl(system.url(False), *bench.uploads.of(SIZES[size]), times)) * 1000)
            bench.audit(*systems)
    rows = []
    for size in sizes:
        product, floor = took["product", size], took["floor", size]
        rows.append([size, spread(product), number(statistics.median(product) / SIZES[size] * MB), spread(floor),
                     number(statistics.median(floor) / SIZES[size] * MB)])
    table("Growth with the upload, one client, ms of a request", ["upload", "product", "ms/MB", "floor", "ms/MB"], rows)
    each = [(b - a) / 40 for a, b in zip(took["product", "10 MB"], took["product", "50 MB"], strict=True)]
    first = [(b - a) / 9 for a, b in zip(took["product", "1 MB"], took["product", "10 MB"], strict=True)]
    bench.target("a further MB from 10 to 50 MB, over one from 1 to 10 MB", "about 1 (linear)",
                 [a / b for a, b in zip(each, first, strict=True)], lambda v: v <= 1.1)


def flat(bench: Bench, what: str, unit: str, points: dict[str, list[float]]) -> None:
    """A table of rates, and the target that the last one is the first one within 10 %."""
    first, *_, last = points.values()
    table(f"Growth with {what}, 32 clients, 20 KB, requests/s", [unit, "product", "of the first"],
          [[name, spread(values), spread([a / b for a, b in zip(values, first, strict=True)])] for name, values in points.items()])
    bench.target(f"{what}: with the most of them, of the rate with the fewest", "at least 0.9 (flat)",
                 [a / b for a, b in zip(last, first, strict=True)], lambda v: v >= 0.9)


def grow_tokens(bench: Bench) -> None:
    counts = {"1": 1, "10": 10, "100": 100, "1,000": 1000}
    points: dict[str, list[float]] = {name: [] for name in counts}
    with running(bench.product(companies=0)) as (product,):
        for company, count in zip(COMPANIES, counts.values()):
            product.add_tokens(company, count)
        bench.load(product, 20 * KB, 32, 5, companies=len(counts))  # each token has its sums then
        for run in range(RUNS):
            say(f"growth with tokens, run {run + 1} of {RUNS}")
            for company, name in zip(COMPANIES, counts):
                result = outcome(wrk(product.url(False), 32, 2, [bench.uploads.of(20 * KB, company)]))
                product.quiet()
                if result.failed:
                    bench.faults.append(f"growth: {result.failed} requests failed with {name} tokens")
                points[name].append(result.rate)
            bench.audit(product)
    flat(bench, "tokens of a company", "tokens", points)


def grow_rows(bench: Bench) -> None:
    counts = {"0": 0, "10,000": 10_000, "100,000": 100_000, "1,000,000": 1_000_000}
    points: dict[str, list[float]] = {name: [] for name in counts}
    with running(*(bench.product(companies=1) for _ in counts)) as systems:
        for system, count in zip(systems, counts.values(), strict=True):
            if count:
                system.add_usage(COMPANIES[0], count)
            bench.load(system, 20 * KB, 32, 1)
        for run in range(RUNS):
            say(f"growth with usage rows, run {run + 1} of {RUNS}")
            for system, name in zip(systems, counts, strict=True):
                points[name].append(bench.load(system, 20 * KB, 32, 1).rate)
        bench.audit(*systems)
    flat(bench, "usage rows", "rows", points)


def grow_companies(bench: Bench) -> None:
    points: dict[str, list[float]] = {str(n): [] for n in (1, 2, 4, 8, 16, 32)}
    with running(bench.product(companies=32)) as (product,):
        bench.load(product, 20 * KB, 32, 1)
        for run in range(RUNS):
            say(f"growth with companies, run {run + 1} of {RUNS}")
            for name, values in points.items():
                values.append(bench.load(product, 20 * KB, 32, 1, companies=int(name)).rate)
            bench.audit(product)
    flat(bench, "companies, a token each", "companies", points)


def grow_processes(bench: Bench) -> None:
    counts = (1, 2, 4, 8)
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    with running(*(make(processes=n, threads=32) for n in counts for make in (bench.product, bench.floor))) as systems:
        each = list(zip(systems, [n for n in counts for _ in range(2)], strict=True))
        for run in range(RUNS):
            say(f"growth with processes, run {run + 1} of {RUNS}")
            for system, n in each:
                rates[system.name, n].append(bench.load(system, 20 * KB, 32, 1).rate)
            bench.audit(*systems)
    table("Growth with processes of 32 threads, 32 clients, 20 KB, requests/s", ["processes", "product", "floor", "of the floor"],
          [[str(n), spread(rates["product", n]), spread(rates["floor", n]),
            spread([a / b for a, b in zip(rates["product", n], rates["floor", n], strict=True)])] for n in counts])


# ---- all ----

PARTS: dict[str, Callable[[Bench], None]] = {"throughput": throughput, "mssql": mssql, "latency": latency, "cost": cost,
                                             "memory": memory, "growth": growth,
                                             # pieces, for those who look at one
                                             "bytes": grow_bytes, "tokens": grow_tokens, "rows": grow_rows,
                                             "companies": grow_companies, "processes": grow_processes,
                                             "instructions": count_instructions, "copies": count_copies}


def machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "?")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (f"{os.cpu_count()} x {cpu}, {memory_gb:.0f} GB, Linux {platform.release()}, "
            f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())} before it began")


def main() -> int:
    parts = [part for part in (os.environ.get("PART") or "throughput,mssql,latency,cost,memory,growth").split(",") if part]
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"bench: no part {unknown[0]}; there are {', '.join(PARTS)}")
    begun = time.monotonic()
    print(f"{machine()}\n{RUNS} run{'s' if RUNS > 1 else ''}: median" + (" (lowest to highest)" if RUNS > 1 else ""))
    directory, upstream = scratch(), Upstream()
    directory.chmod(0o755)
    bench = Bench(directory, upstream)
    try:
        for part in parts:
            PARTS[part](bench)
    finally:
        upstream.close()
        shutil.rmtree(directory)
    if bench.targets:
        table("Targets", ["", "target", "measured", ""],
              [[what, aim, figure, {True: "holds", False: "BELOW", None: ""}[holds]] for what, aim, figure, holds in bench.targets])
    for fault in bench.faults:
        print(f"\nWRONG: {fault}")
    print(f"\n{time.monotonic() - begun:.0f} s; " + (f"{len(bench.faults)} faults" if bench.faults else "every account balances"))
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
