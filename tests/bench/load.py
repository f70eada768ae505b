"""Load: uploads, and wrk and curl to send them."""
from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
from pathlib import Path

from systems import COMPANIES, HERE, Upstream
from conftest import form  # systems has put it on the path


class Uploads:
    """Bodies to post, made when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.made: dict[tuple[int, str], tuple[str, Path]] = {}

    @staticmethod
    def pdf(size: int) -> bytes:
        """Something that begins and ends like a PDF."""
        return b"%PDF-1.7\n" + os.urandom(size - 16) + b"\n%%EOF\n"

    def of(self, size: int, company: str = COMPANIES[0]) -> tuple[str, Path]:
        """Content type and file of a form with a PDF of so many bytes."""
        if (size, company) not in self.made:
            body, content_type = form(self.pdf(size), company)
            path = self.dir / f"{company}-{size}"
            path.write_bytes(body)
            self.made[size, company] = content_type, path
        return self.made[size, company]

    def call(self, size: int) -> Path:
        """A generateContent request with the same file, to be made directly."""
        import base64
        path = self.dir / f"call-{size}"
        if not path.exists():
            data = base64.b64encode(self.pdf(size)).decode()
            path.write_text('{"contents":[{"role":"user","parts":[{"inlineData":{"mimeType":"application/pdf","data":"'
                            + data + '"}},{"text":"Extract the invoice."}]}]}')
        return path


@dataclasses.dataclass
class Result:
    requests: int
    seconds: float
    p50: float
    p99: float
    failed: int  # no answer, or not one below 400

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def wrk(url: str, clients: int, seconds: int, uploads: list[tuple[str, Path]]) -> subprocess.Popen[str]:
    arguments = [str(argument) for upload in uploads for argument in upload]
    return subprocess.Popen(["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "120s", "-s", str(HERE / "post.lua"),
                             url, "--", *arguments], stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str], stop: bool = False) -> Result:
    if stop:
        process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    line = next((line for line in text.splitlines() if line.startswith("{")), None)
    if line is None:
        raise RuntimeError(f"wrk: {text}")
    found = json.loads(line)
    return Result(found["requests"], found["seconds"], found["p50"], found["p99"],
                  found["failed"] + found["status"] + found["timeout"])


def curl(url: str, content_type: str, body: Path, times: int) -> list[float]:
    """Seconds of each of so many requests, one after the other on one connection."""
    done = subprocess.run(["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code} %{time_total}\n", "-H", "Expect:",
                           "-H", f"Content-Type: {content_type}", "--data-binary", f"@{body}", f"{url}?[1-{times}]"],
                          capture_output=True, text=True, check=True)
    answers = [line.split() for line in done.stdout.splitlines()]
    bad = [status for status, _ in answers if status != "200"]
    if bad or len(answers) != times:
        raise RuntimeError(f"curl: {len(bad)} of {times} requests failed, the first with {bad[:1]}")
    return [float(seconds) for _, seconds in answers]


def direct_url(upstream: Upstream, model: str) -> str:
    return f"{upstream.url('direct')}/v1beta/models/{model}:generateContent"


def percentile(values: list[float], percent: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(percent * 10) - 1]
