"""What a scheduler does about figures: the best step is pinned, falls and failures are reported.

RUN/eval/best-SUITE.METRIC.json    the best step that still exists; pinned, so it will
RUN/eval/alerts/NAME.json          each report once, whoever finds it; NAME says what it is about
RUN/eval/alerts.jsonl              all of them, for people and the report
"""

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from glipv2.model.folders import step_url
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.pins import pin

log = logging.getLogger(__name__)

TRIES = 3
"""Of sending a report in one go."""
MAX_TRIES = 12
"""Of sending it at all."""
TIMEOUT_S = 10.0
PAUSE_S = 1.0
"""Before the second try; twice as long before the third."""
REFUSED = range(400, 500)
BUSY = (408, 429)
"""Of the refusals, those that mean: later."""


def keep_best(run: str, metric: str, values: Mapping[int, float], there: set[int]) -> int | None:
    """Pin the best step of those that exist, and return it if it is new.

    Of equal ones that which is best already, or else the first.
    """
    known = {step: value for step, value in values.items() if step in there}
    if not known:
        return None
    url = storage.join(run, "eval", f"best-{metric}.json")
    before = storage.read_json(url) if storage.exists(url) else {}
    best = max(known, key=lambda step: (known[step], step == before.get("step"), -step))
    content = {
        "metric": metric,
        "value": known[best],
        "step": best,
        "checkpoint": step_url(run, best),
    }
    if before == content:
        return None
    pin(run, f"best-{metric}", best)
    storage.write_json(url, content)
    return best


def falls(metric: str, values: Mapping[int, float], drop: float) -> list[dict[str, Any]]:
    """A report for every step that is worse by more than `drop` than the scored one before it."""
    steps, found = sorted(values), []
    for before, step in zip(steps, steps[1:], strict=False):
        if drop and values[before] - values[step] > drop:
            text = (f"{metric} fell from {values[before]:.4f} at step {before} to "
                    f"{values[step]:.4f} at step {step}")  # fmt: skip
            found.append({
                "event": "fall", "metric": metric, "step": step, "value": values[step],
                "before": {"step": before, "value": values[before]}, "text": text,
            })  # fmt: skip
    return found


def report(run: str, name: str, content: dict[str, Any], webhook: str) -> bool:
    """Write a report down, to be sent if there is a webhook; False if it is known already."""
    url = storage.join(run, "eval", "alerts", f"{name}.json")
    if storage.exists(url):
        return False
    whole = {"run": run, **content, "at": round(time.time(), 1)}
    whole |= {"sent": False, "tries": 0} if webhook else {}
    if not storage.create_once(url, json.dumps(whole, indent=1).encode()):
        return False
    log.warning("%s: %s", run, content["text"])
    return True


def settle(run: str, webhook: str) -> bool:
    """Send what is not sent yet, and write alerts.jsonl; whether all is settled."""
    folder, entries, open_ends = storage.join(run, "eval", "alerts"), [], 0
    for name in storage.list_names(folder):
        if not name.endswith(".json"):
            continue
        url = storage.join(folder, name)
        entry = storage.read_json(url)
        if webhook and entry.get("sent") is False and entry["tries"] < MAX_TRIES:
            payload = {k: v for k, v in entry.items() if k not in ("sent", "tries")}
            entry["sent"] = send(webhook_url(webhook), payload)
            entry["tries"] += TRIES
            storage.write_json(url, entry)
            open_ends += not entry["sent"] and entry["tries"] < MAX_TRIES
        entries.append(entry)
    lines = (json.dumps(e) + "\n" for e in sorted(entries, key=lambda e: (e["at"], e["text"])))
    text, url = "".join(lines).encode(), storage.join(run, "eval", "alerts.jsonl")
    if entries and not (storage.exists(url) and storage.read_bytes(url) == text):
        storage.write_bytes(url, text)
    return not open_ends


def webhook_url(given: str) -> str:
    """The URL itself, of http or https; ConfigError, which never shows it, for anything else."""
    url = os.environ.get(given[1:], "") if given.startswith("$") else given
    if given and urlsplit(url).scheme not in ("http", "https"):
        where = f"the environment variable {given[1:]}" if given.startswith("$") else "it"
        what = "is no URL of http or https" if url else "is not set"
        raise ConfigError(f"schedule.webhook: {where} {what}")
    return url


def send(url: str, payload: dict[str, Any]) -> bool:
    """POST a JSON value; whether it was taken. Follows no redirect, and logs the host alone."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    host, problem = urlsplit(url).hostname, ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE_S * 2 ** (number - 1))
        request = urllib.request.Request(
            url, json.dumps(payload).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                return True
        except urllib.error.HTTPError as error:
            problem = f"it answers {error.code}"
            if error.code in REFUSED and error.code not in BUSY:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
    log.warning("a report could not be sent to the webhook at %s: %s", host, problem)
    return False
