"""The files that `make deb` and `make dist` build."""
from __future__ import annotations

import tarfile
from pathlib import Path

from conftest import EPOCH, Packages
from machine import run


def test_package_is_reproducible(packages: Packages) -> None:
    """In the repository, and from the source archive, which so builds from itself: the same bytes."""
    assert packages.first.read_bytes() == packages.again.read_bytes()


def test_source_archive_is_reproducible(packages: Packages) -> None:
    first, second = packages.archives
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        members = archive.getmembers()
    assert {(member.mtime, member.uid, member.gid) for member in members} == {(EPOCH, 0, 0)}
    assert {member.name.partition("/")[0] for member in members} == {f"extract-fcgi-{packages.version}"}
    assert {member.mode for member in members if not member.issym()} == {0o755, 0o644}


def test_package_says_what_it_needs(packages: Packages) -> None:
    depends = run("dpkg-deb", "--field", packages.first, "Depends").stdout
    for library in ("libc6", "libcurl4", "libfcgi0ldbl", "libsqlite3-0", "libsybdb5", "libssl3", "libsodium23"):
        assert f"{library} (>= " in depends
    assert "ca-certificates" in depends
    assert run("dpkg-deb", "--field", packages.first, "Recommends").stdout == "nginx-light | nginx\n"


def test_programs_are_stripped(packages: Packages, tmp_path: Path) -> None:
    run("dpkg-deb", "--extract", packages.first, tmp_path)
    for program in ("usr/sbin/extract-fcgi", "usr/bin/extractctl"):
        sections = run("readelf", "--section-headers", "--wide", tmp_path / program).stdout
        assert ".text" in sections and ".symtab" not in sections and ".debug" not in sections


def test_lintian_is_content(packages: Packages) -> None:
    """What it may say all the same stands in systemd/deb/lintian-overrides, with the reason."""
    said = run("lintian", "--allow-root", "--display-info", "--fail-on=error,warning,info", packages.first)
    assert said.stdout == ""
