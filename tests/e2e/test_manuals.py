"""The manual pages and the completion of command lines, beside what the programs say of themselves."""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import BUILD, ROOT

PAGES = ("extractctl.1", "extract-fcgi.conf.5", "extract-fcgi.8")


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env={"PATH": os.environ["PATH"], "EXTRACT_CONFIG": "/dev/null"})
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def page(name: str, directory: Path) -> str:
    """As a terminal shows it, on one line without the emphasis."""
    file = directory / name
    file.write_text(said("systemd/man/generate", str(BUILD), f"systemd/man/{name}.in"))
    return re.sub(r"\s+", " ", re.sub(".\b", "", said("mandoc", "-Tascii", str(file))))


def commands() -> dict[str, str]:
    """The commands of extractctl, each with its --help."""
    listed = said(str(BUILD / "extractctl"), "--help").split("\n\n")[1]
    names = re.findall(r"(?m)^  ([a-z-]+(?: [a-z-]+)?)", listed)
    return {name: said(str(BUILD / "extractctl"), *name.split(), "--help") for name in names}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(said("systemd/man/generate", str(BUILD), f"systemd/man/{name}.in"))
    assert said("mandoc", "-Tlint", "-W", "warning", str(file)) == ""
    assert not re.search("@[A-Z]+@", file.read_text())


def test_every_key_has_its_entry(tmp_path: Path) -> None:
    text = page("extract-fcgi.conf.5", tmp_path)
    shown = said(str(BUILD / "extract-fcgi"), "--check-config")
    keys = re.findall(r"(?m)^# (.*)\n# from default\n(\w+) = (.*)$", shown)
    assert len(keys) > 40
    for description, name, value in keys:
        entry = f"{name} = {value} {description[:1].upper()}{description[1:]}." if value else f"{name} {description[:1].upper()}"
        assert re.sub(r"\s+", " ", entry) in text, entry


def test_every_command_has_its_entry(tmp_path: Path) -> None:
    text = page("extractctl.1", tmp_path)
    assert len(commands()) > 15
    for name, told in commands().items():
        summary = re.sub(r"\s+", " ", told.split("\n\n")[1].split("\n")[0])
        assert summary in text, summary
        assert name in text
        for option, what in re.findall(r"(?m)^  (--[a-z-]+(?: [A-Z]+|\[=[A-Z]+\])?) +(\S.*)$", told):
            assert f"{option} {what}" in text, option


COMPLETE = """
source systemd/extractctl.completion.bash
compopt() { :; }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_extractctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(*words: str) -> set[str]:
    return set(said("bash", "-c", COMPLETE, "bash", str(BUILD / "extractctl"), *words).split())


@pytest.mark.parametrize("words, expected", [
    (["to"], {"token"}),
    (["token", ""], {"add", "list", "set-status", "set-key", "set-limit"}),
    (["token", "set-l"], {"set-limit"}),
    (["token", "set-status", "7", ""], {"Active", "Expired", "Exceeded", "Disabled"}),
    (["outbox", ""], {"status", "drain"}),
    (["check", ""], set()),
    (["check", "--a"], {"--after-install"}),
    (["--json", "logs", "--err"], {"--errors"}),
    (["token", "add", "--company", ""], set()),
    (["--config", "README"], {"README.md"}),
    (["nothing", "--j"], {"--json"}),
    (["token", "list", "--color", "="], {"auto", "always", "never"}),
    (["token", "list", "--color", "=", "n"], {"never"}),
    (["--color", "=", "always", "to"], {"token"}),
    (["--col"], {"--color"}),
    (["usage", "--by", "=", "us"], {"user"}),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_completion(words: list[str], expected: set[str]) -> None:
    assert complete(*words) == expected


def test_completion_knows_all_there_is() -> None:
    assert complete("") == {name.split()[0] for name in commands()}
    for name, told in commands().items():
        assert complete(*name.split(), "--") == set(re.findall(r"(?m)^  (--[a-z-]+)", told)) | {"--help"}
    sums = re.search(r"--by WHAT +sum by (.*)", commands()["usage"])
    assert sums is not None
    assert complete("usage", "--by", "") == set(re.findall(r"\w+", sums[1])) - {"default", "or"}
