"""What `glipv2 schedule` reports of figures that fall, and how: alerts, the report, a webhook."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from schedule_runs import (  # noqa: E402
    STORES,
    Scoring,
    alerts,
    commit_step,
    run_on_store,
    scheduler,
    scored_by_table,
)
from scored_runs import write_detection  # noqa: E402

from glipv2.jobs import schedule_alerts  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.jobs.schedule_status import status_table  # noqa: E402
from glipv2.pipeline.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_detection(tmp_path_factory.mktemp("data") / "val")


@pytest.fixture(params=STORES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return run_on_store(request, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Scoring:
    return scored_by_table(monkeypatch)


class Hook:
    """A real webhook: what it got, and what it answers next."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.answers: list[int] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(hook.answers.pop(0) if hook.answers else 204)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-path"


@contextmanager
def listening() -> Iterator[Hook]:
    hook = Hook()
    thread = threading.Thread(target=hook.server.serve_forever, daemon=True)
    thread.start()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


def test_a_fall_is_reported_once_also_when_steps_come_in_any_order(
    run: str, val: str, scoring: Scoring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_alerts, "PAUSE_S", 0.01)
    scoring.values = {10: 0.5, 20: 0.48, 30: 0.3, 40: 0.31}
    with listening() as hook:
        monkeypatch.setenv("SCHEDULE_HOOK", hook.url)
        settings = {"alert_drop": 0.05, "webhook": "$SCHEDULE_HOOK"}
        hook.answers = [500, 429]  # then it takes it
        for step in (10, 20, 30, 40):
            commit_step(run, step)
        scheduler(run, val, **settings).serve()
        assert len(hook.got) == 3 and hook.got[0] == hook.got[2]
        [told] = alerts(run)
        assert told["sent"] is True
        assert hook.got[2] == {k: v for k, v in told.items() if k not in ("sent", "tries")}
        assert told["text"] == "coco.ap fell from 0.4800 at step 20 to 0.3000 at step 30"
        assert (told["step"], told["before"]) == (30, {"step": 20, "value": 0.48})
        page = Path(write_report(run, out=str(tmp_path / "page.html"))).read_text()
        assert f"fall</span>: {told['text']}" in page
        scheduler(run, val, **settings).serve()
        assert len(hook.got) == 3
        commit_step(run, 50)
        scoring.values[50] = 0.1
        hook.answers = [302]  # redirects are not followed, and not tried again by this one
        scheduler(run, val, **settings).serve()
        assert {entry["step"] for entry in hook.got[3:]} == {50}


def test_a_webhook_that_is_away_delays_nothing_for_long(
    local: str, val: str, scoring: Scoring, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(schedule_alerts, "PAUSE_S", 0.01)
    scoring.values = {10: 0.5, 20: 0.1}
    for step in (10, 20):
        commit_step(local, step)
    with listening() as hook:
        url = hook.url
    settings = {"alert_drop": 0.05, "webhook": url}
    for _ in range(6):
        assert scheduler(local, val, **settings).serve() == 0
    assert sorted(scoring.scored) == [("coco", 10), ("coco", 20)]
    [told] = alerts(local)
    assert told["sent"] is False and told["tries"] == schedule_alerts.MAX_TRIES
    assert "could not be sent to the webhook at 127.0.0.1" in caplog.text
    assert "secret-path" not in caplog.text


def test_what_the_webhook_refuses_is_not_sent_again_at_once(local: str) -> None:
    with listening() as hook:
        hook.answers = [404]
        assert not schedule_alerts.send(hook.url, {"text": "x"})
        assert len(hook.got) == 1


def test_a_webhook_that_is_not_set_is_missed_when_it_is_needed(val: str, local: str) -> None:
    without = scheduler(local, val, webhook="$NOT_SET")
    assert "no checkpoint yet" in status_table(without)
    with pytest.raises(ConfigError, match="the environment variable NOT_SET is not set"):
        without.serve()
