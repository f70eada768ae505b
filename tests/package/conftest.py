"""Fixtures for the package: built from a copy of this tree, installed in fresh Debian 12 systems (machine.py).

    packages    the package of this version, and one of a higher version whose configuration and site differ
    machine     of the module's kind (Chroot or Booted), ended with the module

A kind that cannot be had on this machine is not collected, and the run says so.
"""
from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("guide", "life", "machine")

from machine import ROOT, Booted, Chroot, Machine, download, fresh_tree, run, why_not  # noqa: E402

EPOCH = 1_700_000_000  # of the copy's commit
HIGHER = "9.0.0"

LEFT_OUT: dict[str, str] = {}
with tempfile.TemporaryDirectory(prefix="extract-package-") as scratch:
    for module, kind in (("test_chroot.py", Chroot), ("test_booted.py", Booted)):
        if reason := why_not(kind, Path(scratch)):
            LEFT_OUT[module] = reason
collect_ignore = list(LEFT_OUT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for module, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {module}: this machine cannot do that: {reason}")


def clean_environment(**more: str) -> dict[str, str]:
    """Without what make leaves to those that it starts."""
    return {name: value for name, value in os.environ.items()
            if name not in ("BUILD", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SOURCE_DATE_EPOCH")} | more


def make(tree: Path, target: str, umask: int = 0o022, **environment: str) -> Path:
    """The build directory."""
    run("make", "--no-print-directory", target, cwd=tree, env=clean_environment(**environment), umask=umask)
    return tree / "build"


@dataclasses.dataclass
class Packages:
    version: str
    first: Path       # built in a git repository
    again: Path       # built from the source archive, elsewhere, by somebody with other habits
    higher: Path
    archives: list[Path]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    home = tmp_path_factory.mktemp("source")
    repository = home / "repository"
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false",
           f"--git-dir={repository}/.git"]
    dates = clean_environment(GIT_COMMITTER_DATE=f"{EPOCH} +0000", GIT_AUTHOR_DATE=f"{EPOCH} +0000")
    run("git", "init", "--quiet", repository)
    run(*git, f"--work-tree={ROOT}", "add", "--all", cwd=ROOT)
    run(*git, f"--work-tree={ROOT}", "commit", "--quiet", "--message=As it is", cwd=ROOT, env=dates)
    run("git", "-C", repository, "reset", "--quiet", "--hard")
    version = re.search(r"(?m)^VERSION +:= (.+)$", (repository / "Makefile").read_text())
    assert version is not None

    archives = []
    for number in range(2):
        [archive] = make(repository, "dist").glob("*.tar.gz")
        archives.append(Path(shutil.copy(archive, home / f"{number}.tar.gz")))
    run("tar", "--extract", f"--file={archives[0]}", cwd=home, umask=0o077)
    unpacked = home / f"extract-fcgi-{version[1]}"

    def built(tree: Path, wanted: str, **variables: str) -> Path:
        [package] = make(tree, "deb", **variables).glob(f"*_{wanted}_*.deb")
        return package

    first = built(repository, version[1])
    again = Path(shutil.copy(built(unpacked, version[1], umask=0o077, TZ="Pacific/Auckland", LC_ALL="C"), home / "again.deb"))

    makefile = unpacked / "Makefile"
    makefile.write_text(makefile.read_text().replace(version[0], f"VERSION  := {HIGHER}"))
    for name in ("systemd/extract-fcgi.conf.example", "nginx/extract-fcgi.site.conf"):
        with (unpacked / name).open("a") as file:
            file.write(f"# as of {HIGHER}\n")
    return Packages(version[1], first, again, built(unpacked, HIGHER), archives)


@pytest.fixture(scope="class")
def machine(request: pytest.FixtureRequest, packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    kind: type[Machine] = request.cls.KIND
    tree = fresh_tree(kind.INCLUDE)
    download(tree, [packages.first, *request.cls.PACKAGES])
    machine = kind(tree, tmp_path_factory.mktemp(kind.__name__.lower()))
    try:
        machine.start_emulator()
        yield machine
    finally:
        machine.close()
