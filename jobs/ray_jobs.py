"""Ray's job API as `glipv2 submit` and `glipv2 jobs` use it: connect, follow, and say how it ended.

A cluster that lets everybody in is refused: a job is a shell command on its machines.
"""

import asyncio
import ipaddress
import os
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException, responses
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glipv2.pipeline.errors import ConfigError, DataError, StoreError
from glipv2.pipeline.progress import say

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Environment variable that stands for --address, as for Ray's own command."""
TOKEN_FILE = Path("~/.ray/auth_token")
PROBE = "/api/jobs/"
WANTS_TOKEN = (401, 403)
BUSY = (429, *range(500, 600))
PAUSES_S = (1.0, 2.0, 4.0)
"""Before a busy server is asked again."""
POLL_S = 1.0
LOST_S = 120.0
"""For which a cluster that does not answer is tried again while a job is followed."""
STOPPED = 130


def connect(address: str | None) -> Any:
    """A client of the cluster's job server; ConfigError for one that is open or not there."""
    address = (address or os.environ.get(ADDRESS) or "").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address must be the cluster's dashboard, such as http://head:8265, not {address!r}"
        )
    refuse_open(address)
    has_token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if has_token or TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"{address} wants its token: set RAY_AUTH_TOKEN, or write it to {TOKEN_FILE}; on the "
            "cluster's head `ray get-auth-token` shows it"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"{address}: {error}") from error


def refuse_open(address: str) -> None:
    """ConfigError when no job server answers there, or one that lets everybody in from elsewhere.

    On the loopback address that is said, not refused: only this machine reaches it there, and it
    may be the near end of a tunnel to a cluster that nobody else reaches. StoreError while busy.
    """
    code = answer_to_a_stranger(address)
    if code in WANTS_TOKEN:
        return
    answers = f"{address} answers {code} {responses.get(code, '')}".rstrip()
    if code in BUSY:
        raise StoreError(
            f"{answers}, again and again: the cluster is starting, or a proxy does not reach it; "
            "try later"
        )
    if code >= 400:
        raise ConfigError(
            f"{answers} to {PROBE}, so it is no Ray job server; give the cluster's dashboard, such "
            "as http://head:8265"
        )
    if is_loopback(address):
        say(
            f"{address} asks for no token: everybody on this machine, and who reaches the cluster "
            "past it, can run commands there (RAY_AUTH_MODE=token on its nodes closes it)"
        )
        return
    raise ConfigError(
        f"{address} runs jobs of anybody who can reach it. Start the cluster with "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment of all its nodes (and of "
        "this command), or reach its loopback address through a tunnel: "
        "ssh -L 8265:127.0.0.1:8265 head"
    )


def answer_to_a_stranger(address: str) -> int:
    """The code that one without a token gets from the job server; asked again while it is busy."""
    code = _ask(address)
    for pause in PAUSES_S:
        if code not in BUSY:
            break
        time.sleep(pause)
        code = _ask(address)
    return code


def _ask(address: str) -> int:
    try:
        with urllib.request.urlopen(f"{address}{PROBE}", timeout=10) as answer:  # noqa: S310 - http(s) only
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigError(
            f"no Ray job server answers at {address}: {error}; its port is that of the dashboard, "
            "8265 unless the cluster says otherwise"
        ) from error


def is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def details(client: Any, job: str) -> Any:
    """What the cluster knows of a job; DataError when it knows none of this name."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise DataError(f"no job {job!r} on this cluster; `glipv2 jobs list` has them") from error


def follow(client: Any, job: str) -> int:
    """Print a job's log as it grows, until the job has ended; the exit code that it stands for.

    What was printed is not printed again after the connection was lost.
    """
    from aiohttp import ClientError

    log, deadline = _Log(), time.monotonic() + LOST_S
    while True:
        try:
            asyncio.run(log.tail(client, job))
            found = client.get_job_info(job)
        except (OSError, ClientError, RuntimeError, asyncio.TimeoutError) as error:
            if time.monotonic() > deadline:
                raise StoreError(
                    f"the cluster did not answer for {LOST_S:.0f} s ({error}); the job goes on "
                    f"without us: `glipv2 jobs logs {job} --follow` shows it again"
                ) from error
            time.sleep(POLL_S)
            continue
        deadline = time.monotonic() + LOST_S
        if found.status.is_terminal():
            return exit_code(found)
        time.sleep(POLL_S)


class _Log:
    """What was printed of a log that is read from its beginning each time."""

    def __init__(self) -> None:
        self.printed = 0

    async def tail(self, client: Any, job: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text[max(0, self.printed - seen) :])
            sys.stdout.flush()
            seen += len(text)
            self.printed = max(self.printed, seen)


def exit_code(found: Any) -> int:
    """The job's own exit code where it has one."""
    if found.status.value == "SUCCEEDED":
        return 0
    if found.status.value == "STOPPED":
        return STOPPED
    return int(found.driver_exit_code or 1)
