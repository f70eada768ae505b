"""What systemd/ has for Prometheus and Grafana: alert rules and a dashboard, held against the real /metrics, and Prometheus
itself with the configuration that the guide shows. promtool and prometheus are Debian's."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PATIENCE, ROOT, Stack, eventually, free_port

RULES = ROOT / "systemd/extract-fcgi.rules.yml"
DASHBOARD = ROOT / "systemd/extract-fcgi.dashboard.json"
GUIDE = ROOT / "systemd/README.md"
METRIC = re.compile(r"\bextract_[a-z_]+")


def promtool(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=PATIENCE)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def names(stack: Stack) -> set[str]:
    """Of all samples."""
    lines = stack.get("/metrics").body.decode().splitlines()
    return {re.split("[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_metrics_are_as_prometheus_wants_them(stack: Stack, company: str, pdf: bytes) -> None:
    stack.token(company)
    assert stack.post(pdf, company).status == 200
    checked = promtool("check", "metrics", stdin=stack.get("/metrics").body.decode())
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    spoilt = promtool("check", "metrics", stdin="# TYPE extract_requests counter\nextract_requests 1\n")
    assert spoilt.returncode != 0, "promtool finds what is wrong"


# ---- the rules ----

def code(name: str) -> str:
    return f'extract_requests_total{{@,code="{name}"}}'


def outbox(state: str) -> str:
    return f'extract_outbox_entries{{@,state="{state}"}}'


def histogram(name: str, fast: str, slow: str) -> dict[str, str]:
    """Ten calls a minute; half of them take less than fast, all less than slow."""
    return {f'{name}_bucket{{@,le="{le}"}}': values
            for le, values in ((fast, "0+5x60"), (slow, "0+10x60"), ("+Inf", "0+10x60"))}


# Series of one host, a value a minute: @ stands for its labels. For each alert: when it fires (with what labels more than
# those of the host), and when it is near to but does not.
CASES: dict[str, tuple[dict[str, str], ...]] = {
    "ExtractDown": ({"up{@}": "1x5 0x60"}, {}, {"up{@}": "1x28 0x60"}),
    "ExtractProcessMissing": ({"extract_processes{@}": "4x5 3x60"}, {}, {"extract_processes{@}": "4x25 3x60"}),
    "ExtractErrors": ({code("success"): "0+10x60", code("upstream_unavailable"): "0+2x60"}, {},
                      {code("success"): "0+100x60", code("invalid_file"): "0+10x60", code("upstream_unavailable"): "0+4x60"},
                      {code("success"): "0+1x60", code("upstream_unavailable"): "0x20 5x60"}),
    "ExtractInternalErrors": ({code("internal_error"): "0x25 1x60"}, {"code": "internal_error"},
                              {code("internal_error"): "5x60"}),
    "ExtractOverloaded": ({code("overloaded"): "0x25 9x60"}, {"code": "overloaded"},
                          {code("overloaded"): "9x60"}),
    "ExtractQueueing": ({"extract_requests_queued{@}": "0x5 3x60"}, {}, {"extract_requests_queued{@}": "3x25 0 3x60"}),
    "ExtractGeminiSlow": (histogram("extract_gemini_duration_seconds", "30", "60"), {},
                          histogram("extract_gemini_duration_seconds", "13", "20")),
    "ExtractGeminiFailing": ({'extract_attempts_total{@,class="success"}': "0+6x60", 'extract_attempts_total{@,class="transient"}': "0+4x60"}, {},
                             {'extract_attempts_total{@,class="success"}': "0+9x60", 'extract_attempts_total{@,class="transient"}': "0+1x60"}),
    "ExtractUnknownCalls": ({"extract_unknown_calls_total{@}": "0+1x60"}, {}, {"extract_unknown_calls_total{@}": "0x10 2x60"}),
    "ExtractKeysFailing": ({'extract_attempts_total{@,class="key_invalid"}': "0x25 1x60"}, {"class": "key_invalid"},
                           {'extract_attempts_total{@,class="rate_limited"}': "0+1x60"}),
    "ExtractNoToken": ({code("token_expired"): "0x25 1x60"}, {"code": "token_expired"},
                       {code("token_busy"): "0+1x60"}),
    "ExtractTokensNearLimit": ({'extract_api_tokens_over_threshold{@,status="Active"}': "0x5 1x60"}, {"instance": ""},
                               {'extract_api_tokens_over_threshold{@,status="Active"}': "0x60",
                                'extract_api_tokens_over_threshold{@,status="Exceeded"}': "4x60"}),
    "ExtractUnsettled": ({'extract_reservations{@,state="unsettled"}': "0x5 2x60"}, {"instance": ""},
                         {'extract_reservations{@,state="unsettled"}': "0x60", 'extract_reservations{@,state="open"}': "9x60"}),
    "ExtractUsageNotRecorded": ({"extract_unsettled_alarms_total{@}": "0x25 1x60"}, {}, {"extract_unsettled_alarms_total{@}": "1x60"}),
    "ExtractStoreDown": ({"extract_store_up{@}": "1x5 0x60"}, {}, {"extract_store_up{@}": "1x28 0x60"}),
    "ExtractStoreSlow": (histogram("extract_store_duration_seconds", "0.25", "1"), {},
                         histogram("extract_store_duration_seconds", "0.01", "0.25")),
    "ExtractOutboxOld": ({"extract_outbox_oldest_seconds{@}": "0+60x60"}, {}, {"extract_outbox_oldest_seconds{@}": "299x60"}),
    "ExtractOutboxGrowing": ({outbox("waiting"): "0+10x60", outbox("records"): "0+10x60"}, {},
                             {outbox("waiting"): "900-20x60", outbox("records"): "9x60"},
                             {outbox("waiting"): "0+1x60", outbox("records"): "0+1x60"}),
    "ExtractOutboxDead": ({outbox("dead"): "0x5 1x60"}, {"state": "dead"},
                          {outbox("dead"): "0x60"}),
    "ExtractOutboxUnreadable": ({"extract_processes{@}": "2x60"}, {},
                                {"extract_processes{@}": "2x60", outbox("waiting"): "0x60"}),
    "ExtractStorageFull": ({code("storage_full"): "0x25 1x60"}, {"code": "storage_full"},
                           {code("storage_full"): "7x60"}),
    "ExtractLogDropped": ({"extract_log_entries_dropped_total{@}": "0x25 1x60"}, {}, {"extract_log_entries_dropped_total{@}": "4x60"}),
}
HOST = {"job": "extract-fcgi", "instance": "invoices.example.org:443"}


def expected(alert: str, more: dict[str, str]) -> dict[str, Any]:
    [rule] = [rule for rule in rules() if rule["alert"] == alert]
    labels = {name: value for name, value in (HOST | more).items() if value}

    def filled(text: str) -> str:
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], text)

    return {"exp_labels": labels | rule["labels"],
            "exp_annotations": {name: filled(text) for name, text in rule["annotations"].items()}}


def rule_test(alert: str, series: dict[str, str], fires: list[dict[str, Any]]) -> dict[str, Any]:
    at = ",".join(f'{name}="{value}"' for name, value in HOST.items())
    return {"interval": "1m",
            "input_series": [{"series": name.replace("@", at), "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": "30m", "alertname": alert, "exp_alerts": fires}]}


def test_rules_fire_when_they_should(tmp_path: Path) -> None:
    assert [rule["alert"] for rule in rules()] == [*CASES] == list(dict.fromkeys(CASES)), "each has its case"
    tests = []
    for alert, (firing, labels, *silent) in CASES.items():
        tests.append(rule_test(alert, firing, [expected(alert, labels)]))
        tests += [rule_test(alert, series, []) for series in silent]
    file = tmp_path / "rules.test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_say_what_to_do(stack: Stack) -> None:
    checked = promtool("check", "rules", "--lint-fatal", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    known = names(stack)
    guide = GUIDE.read_text()
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"].keys() == {"summary", "description"}
        assert set(METRIC.findall(rule["expr"])) <= known or rule["alert"] == "ExtractDown"
        assert f"| {rule['alert']} |" in guide
    codes = re.findall(r'code="(\w+)"', stack.get("/metrics").body.decode())
    for rule in rules():
        for pattern in re.findall(r'code[!=]~?"([^"]+)"', rule["expr"]):
            for part in pattern.split("|"):
                assert any(re.fullmatch(part, code) for code in codes), part


# ---- the dashboard ----

def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def test_dashboard_shows_what_there_is(stack: Stack, tmp_path: Path) -> None:
    """Each expression is one that Prometheus reads, each metric one that there is, and none is left out."""
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    used = {name for expression in expressions for name in METRIC.findall(expression)}
    assert used <= names(stack)
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in names(stack)} == {
        re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert board["id"] is None and board["schemaVersion"] == 37  # Grafana 9
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) == variables | {"__rate_interval", "__all"}
    for variable in board["templating"]["list"]:
        assert set(METRIC.findall(str(variable["query"]))) <= names(stack)
    recorded = [{"record": f"test:{i}", "expr": expression.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")}
                for i, expression in enumerate(expressions)]
    file = tmp_path / "expressions.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_dashboard_has_no_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not taken & cells and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


# ---- Prometheus itself ----

def configured_by_the_guide(directory: Path) -> Path:
    """Debian's configuration with what the guide does to it, in another directory than /etc/prometheus."""
    [commands] = re.findall(r"(?m)^    apt-get install .* prometheus\n((?:    .*\n)+)    systemctl restart prometheus$", GUIDE.read_text())
    promtool_path = shutil.which("promtool")
    assert promtool_path is not None
    shutil.copy(Path(promtool_path).parents[2] / "etc/prometheus/prometheus.yml", directory)
    script = textwrap.dedent(commands).replace("/usr/local/share/extract-fcgi", str(ROOT)).replace("/etc/prometheus", str(directory))
    done = subprocess.run(["sh", "-eu"], input=script, capture_output=True, text=True)
    assert done.returncode == 0 and "22 rules found" in done.stdout, done.stdout + done.stderr
    return directory / "prometheus.yml"


def test_prometheus_reads_it_as_the_guide_says(make_stack: Callable[..., Stack], tmp_path: Path, pdf: bytes) -> None:
    stack = make_stack(processes=2)
    stack.token()
    assert stack.post(pdf).status == 200
    file = configured_by_the_guide(tmp_path)
    text = file.read_text()
    assert text.count("invoices.example.org:443") == 1
    configuration = yaml.safe_load(text.replace("invoices.example.org:443", f"localhost:{stack.https_port}"))
    assert [job["job_name"] for job in configuration["scrape_configs"]] == ["extract-fcgi", "prometheus", "node"]
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["scrape_configs"] = configuration["scrape_configs"][:1]
    configuration["scrape_configs"][0]["tls_config"] = {"ca_file": str(stack.dir / "tls/cert.pem")}  # its own authority
    del configuration["alerting"]
    file.write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}",
                                   f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    try:
        def ask(path: str, **arguments: str) -> Any:
            try:
                url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
                with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                    return json.load(answer)["data"]
            except OSError:
                return None

        def value(expression: str) -> str | None:
            data = ask("query", query=expression)
            return data["result"][0]["value"][1] if data and data["result"] else None

        eventually(lambda: value('up{job="extract-fcgi"}') == "1", "it is scraped")
        assert value("extract_processes") == "2"
        assert value('extract_requests_total{code="success"}') == "1"
        assert value("histogram_quantile(0.5, extract_gemini_duration_seconds_bucket) > 0") is not None
        groups = eventually(lambda: (data := ask("rules")) and data["groups"])
        assert {rule["name"] for rule in groups[0]["rules"]} == {*CASES}
        assert value('ALERTS{alertstate="firing"}') is None
    finally:
        server.terminate()
        server.wait(PATIENCE)
