"""When an object store fails for a moment: what is tried again, for how long, and what is said.

Two layers, both bounded. botocore sends a failed request again at once, REQUEST_TRIES times in
all, so that one bad answer doesn't cost the hundred parts of a large file. `retried` repeats the
whole operation with growing pauses until the store has failed for PATIENCE seconds. The layer that
s3fs has between the two is switched off, else the three would multiply. (aiohttp, below them all,
repeats a request once whose kept connection was closed before an answer came.)
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from glipv2.pipeline.errors import ConfigError, StoreError

PATIENCE = "GLIPV2_STORE_PATIENCE"
"""Environment variable: seconds for which a failing store is tried again; 0 gives up at once."""
DEFAULT_PATIENCE = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds; each pause is at most twice the one before, and drawn between half of that and all."""
REQUEST_TRIES = 3
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0
"""Seconds until a connection stands, and between two bytes of an answer."""
SLOWEST_UPLOAD = 2**18
"""Bytes per second below which sending counts as stalled."""
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
PASSING_CODES = {
    "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "IncompleteBody",
    "BadDigest", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict", "OperationAborted",
    "NoSuchUpload",
}  # fmt: skip
"""S3 error codes that say: again. NoSuchUpload: the answer that completed the upload was lost."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)
_random = random.SystemRandom()  # forked processes must not wait for the same times


def s3_client_config() -> dict[str, Any]:
    """Timeouts and retries of a botocore client."""
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"mode": "standard", "total_max_attempts": REQUEST_TRIES},
    }


def upload_limit(size: int) -> float:
    """Seconds after which sending `size` bytes is given up; nothing else ends a stalled upload."""
    return CONNECT_TIMEOUT + READ_TIMEOUT + size / SLOWEST_UPLOAD


def retried(
    url: str, what: str, act: Callable[[], Result], tidy: Callable[[], None] | None = None
) -> Result:
    """`act()`, again and again while it fails in a way that may pass.

    `what` completes "URL can't be ...". `tidy` is called after each failure; its own are ignored.
    Raises StoreError after PATIENCE seconds of failing; any other failure passes unchanged.
    """
    patience, tries, failing_since = _patience(), 0, 0.0
    while True:
        try:
            return act()
        except Exception as error:
            if not may_pass(error):
                raise
            if tidy is not None:
                with suppress(Exception):
                    tidy()
            now = time.monotonic()
            tries += 1
            failing_since = failing_since or now
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * _random.uniform(0.5, 1)
            failing = now - failing_since
            if failing + pause > patience:
                raise StoreError(
                    f"{url} can't be {what}: the store failed {tries} times within {failing:.0f} "
                    f"seconds, the last time with: {reason(error)}. Once it works again, the same "
                    f"command goes on from here (tried again for {patience:.0f} s: {PATIENCE})"
                ) from error
            log.warning(
                "%s can't be %s (%s); try %d follows in %.1f s",
                url, what, reason(error), tries + 1, pause,
            )  # fmt: skip
        time.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether the same operation may well succeed later: a 5xx answer, throttling, a connection
    that broke or stalled. Not what the store refuses for good, such as 403, 404 and 412."""
    import aiohttp
    from botocore import exceptions, parsers

    answer = _answer(error)
    if answer is not None:
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in PASSING_STATUS or answer.get("Error", {}).get("Code") in PASSING_CODES
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in PASSING_STATUS
    if isinstance(error, exceptions.SSLError):  # a certificate doesn't mend itself
        return False
    return isinstance(
        error,
        ConnectionError | TimeoutError | asyncio.TimeoutError
        | exceptions.HTTPClientError | exceptions.ConnectionError | exceptions.FlexibleChecksumError
        | parsers.ResponseParserError | aiohttp.ClientConnectionError | aiohttp.ClientPayloadError,
    )  # fmt: skip


def is_of_store(error: BaseException) -> bool:
    """Whether the store, or its client, said no; else the error is of another origin."""
    from botocore.exceptions import BotoCoreError

    return _answer(error) is not None or isinstance(error, BotoCoreError)


def has_no_bucket(error: BaseException) -> bool:
    """Whether the store knows no such bucket."""
    return (_answer(error) or {}).get("Error", {}).get("Code") == "NoSuchBucket"


def reason(error: BaseException) -> str:
    """What went wrong, on one line."""
    source = error.__cause__ if error.__cause__ is not None and _answer(error) else error
    return " ".join(f"{type(source).__name__}: {source}".split())[:300]


def _answer(error: BaseException) -> dict[str, Any] | None:
    """The S3 answer behind an exception of botocore, or one that s3fs made of it."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return None


def _patience() -> float:
    text = os.environ.get(PATIENCE, "")
    try:
        return float(text) if text else DEFAULT_PATIENCE
    except ValueError as error:
        raise ConfigError(f"{PATIENCE} must be a number of seconds, not {text!r}") from error
