"""The examples in nginx/README.md, run as they stand there: curl, JavaScript, Python, C#."""
from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT, Emulator, Stack

GUIDE = (ROOT / "nginx/README.md").read_text()
SITE = "https://invoices.example.org"


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.M | re.S))


# Each prints the answer's "data", or the problem's code and request_id.
JAVASCRIPT = """
import {readFile} from "node:fs/promises";
import {File} from "node:buffer";
import {invoiceForm, extractPatiently} from "./client.mjs";
const [url, path, companyID, username, key, idempotencyKey] = process.argv.slice(2);
try {
    const file = new File([await readFile(path)], "invoice.pdf");
    const form = invoiceForm(file, {companyID, username, branch: "Lyon"});
    console.log(JSON.stringify((await extractPatiently(url, form, {key, idempotencyKey})).data));
} catch (problem) {
    console.log(JSON.stringify({code: problem.code, request_id: problem.request_id, spent: problem.spent}));
}
"""
PYTHON = """
import json, sys
from client import Problem, extract
url, path, company, user, key, idempotency_key = sys.argv[1:]
try:
    print(json.dumps(extract(url, path, company, user, key, idempotency_key, "Lyon")["data"]))
except Problem as problem:
    print(json.dumps({"code": problem.code, "request_id": problem.request_id, "spent": problem.spent}))
"""
CSHARP = """
public static class Program
{
    public static void Main(string[] a)
    {
        try
        {
            System.Console.WriteLine(Extraction.Extract(a[0], a[1], a[2], a[3], a[4], a[5], "Lyon").GetAwaiter().GetResult());
        }
        catch (ExtractionException e)
        {
            System.Console.WriteLine("{\\"code\\": \\"" + e.Problem.code + "\\", \\"request_id\\": \\"" + e.Problem.request_id
                + "\\", \\"spent\\": " + (e.Problem.spent ? "true" : "false") + "}");
        }
    }
}
"""

Call = Callable[..., dict[str, Any]]


def run(*command: object, cwd: Path, **env: object) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=2 * PATIENCE,
                          env=os.environ | {"HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"} | {n: str(v) for n, v in env.items()})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def service(_emulator: Emulator, certificate: Path) -> Iterator[Stack]:
    stack = Stack(_emulator, certificate, env={"EXTRACT_AUTH_MODE": "bearer"})
    yield stack
    stack.close()


def in_curl(directory: Path, stack: Stack) -> Call:
    section = GUIDE.partition("\n### curl\n")[2].partition("\n### ")[0]
    command = "\n".join(re.findall(r"(?m)^    (.*)$", section))
    assert command.count(f"{SITE}/extract") == 1 and "companyID=NT047" in command and "username=anna" in command

    def call(company: str, path: Path, key: str, idempotency_key: str) -> dict[str, Any]:
        script = (command.replace(SITE, f"https://localhost:{stack.https_port}").replace("NT047", company)
                  .replace("$(cat /proc/sys/kernel/random/uuid)", idempotency_key))
        (directory / "invoice.pdf").write_bytes(path.read_bytes())
        answer = json.loads(run("sh", "-euc", script, cwd=directory, KEY=key, CURL_CA_BUNDLE=stack.dir / "tls/cert.pem"))
        return answer.get("data") or {name: answer[name] for name in ("code", "request_id", "spent")}
    return call


def in_javascript(directory: Path, stack: Stack) -> Call:
    (directory / "client.mjs").write_text(blocks("js"))
    (directory / "main.mjs").write_text(JAVASCRIPT)
    return lambda company, path, key, idempotency_key: json.loads(run(
        "node", "main.mjs", f"https://localhost:{stack.https_port}/extract", path, company, "anna", key, idempotency_key,
        cwd=directory, NODE_EXTRA_CA_CERTS=stack.dir / "tls/cert.pem"))


def in_python(directory: Path, stack: Stack) -> Call:
    (directory / "client.py").write_text(blocks("python"))
    (directory / "main.py").write_text(PYTHON)
    return lambda company, path, key, idempotency_key: json.loads(run(
        "/usr/bin/python3", "main.py", f"https://localhost:{stack.https_port}/extract", path, company, "anna", key, idempotency_key,
        cwd=directory, REQUESTS_CA_BUNDLE=stack.dir / "tls/cert.pem"))


def in_csharp(directory: Path, stack: Stack) -> Call:
    """Mono has certificates of its own: without TLS."""
    (directory / "Client.cs").write_text(blocks("csharp") + CSHARP)
    run("mcs", "-out:client.exe", "-r:System.Net.Http", "-r:System.Runtime.Serialization", "Client.cs", cwd=directory)

    def call(company: str, path: Path, key: str, idempotency_key: str) -> dict[str, Any]:
        answer = json.loads(run("mono", "client.exe", f"http://127.0.0.1:{stack.port}/extract", path, company, "anna", key,
                                idempotency_key, cwd=directory))
        return answer.get("data", answer)
    return call


def tries_again(stack: Stack, emulator: Emulator, company: str, pdf: bytes, key: str, api_key: str,
                call: Callable[[str], dict[str, Any]]) -> None:
    """While the first request with an idempotency key runs, another is told to come again; it does, and hears that it was done."""
    same = str(uuid.uuid4())
    emulator.script(api_key, {"hold": True})
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(stack.post, pdf, company, headers={"Authorization": f"Bearer {key}", "Idempotency-Key": same})
        emulator.wait(held=1)
        second = threads.submit(call, same)
        stack.rows("SELECT Message FROM ApplicationLogs WHERE Message LIKE ?", f"request_in_progress: company={company} %")
        emulator.release()
        assert first.result().status == 200
        assert second.result()["code"] == "already_processed"


@pytest.mark.parametrize("language", [in_curl, in_javascript, in_python, in_csharp])
def test_client(service: Stack, emulator: Emulator, company: str, tmp_path: Path, pdf: bytes,
                language: Callable[[Path, Stack], Call]) -> None:
    """A success; tried again where that makes sense, under the same idempotency key; a problem that stays one."""
    call = language(tmp_path, service)
    path = tmp_path / "document.pdf"
    path.write_bytes(pdf)
    key = service.ctl("client-key", "add", "--company", company).stdout.strip()
    api_key = f"key-{company}"
    token = service.token(company, api_key)
    first = str(uuid.uuid4())
    assert call(company, path, key, first)["currency"] == "EUR"
    [row] = service.sql("SELECT RequestID, RequestedBy, Branch FROM TokenUsageLogs WHERE CompanyID = ?", company)
    assert (row["RequestedBy"], row["Branch"]) == ("anna", "Lyon")
    problem = call(company, path, key, first)
    assert problem["code"] == "already_processed" and problem["request_id"] != row["RequestID"]
    path.write_bytes(b"GIF89a")
    assert call(company, path, key, str(uuid.uuid4()))["code"] == "unsupported_media_type"
    path.write_bytes(pdf)
    if language is not in_curl:
        tries_again(service, emulator, company, pdf, key, api_key, lambda again: call(company, path, key, again))
    service.ctl("token", "set-status", str(token), "Expired")
    problem = call(company, path, key, str(uuid.uuid4()))
    assert (problem["code"], problem["spent"]) == ("token_expired", False)


def test_csv_and_json_for_administrators(service: Stack, emulator: Emulator, tmp_path: Path) -> None:
    section = GUIDE.partition("\n## For administrators: /admin/\n")[2]
    commands = "\n".join(re.findall(r"(?m)^    ((?:KEY|curl).*)$", section))
    assert commands.count(SITE) == 2
    script = commands.replace(SITE, f"https://localhost:{service.https_port}")
    env = {name: value for name, value in service.env.items() if name.startswith("EXTRACT_")}
    out = run("sh", "-euc", script, cwd=tmp_path, CURL_CA_BUNDLE=service.dir / "tls/cert.pem",
              PATH=f"{Path(os.environ.get('BUILD', ROOT / 'build')).resolve()}:{os.environ['PATH']}", **env)
    assert isinstance(json.loads(out)["rows"], list)
    assert (tmp_path / "errors.csv").read_text().startswith("LogID,Timestamp,")
