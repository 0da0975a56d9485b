"""The order of the test files, and their object store: one SeaweedFS server a run, started for the
first to need it."""

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

sys.path.insert(0, str(Path(__file__).parent))
import s3_server  # noqa: E402
from fault_proxy import Proxy, proxy_to  # noqa: E402

from glipv2.pipeline import retries  # noqa: E402

BUCKET = "glipv2-tests"
LONGEST = (
    "test_main_job", "test_label_kills", "test_kill_and_resume", "test_ray_map", "test_s3_label",
    "test_adapt", "test_health", "test_evaluate_suites", "test_loss_equality", "test_s3_faults",
    "test_s3_sources", "test_engine", "test_readme_commands",
)  # fmt: skip
"""Files that go first, for none of them to be left alone at the end where several run at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    """A cluster that a file's tests have started is not the next file's."""
    yield
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The server itself, past the proxy."""
    if problem := s3_server.why_not():
        pytest.skip(problem)
    with s3_server.running() as endpoint:
        s3_server.plain_client(endpoint).call_s3("create_bucket", Bucket=BUCKET)
        yield endpoint


@pytest.fixture
def s3_bare(s3_endpoint: str) -> S3FileSystem:
    """The store as it is, seen past our code and past the proxy."""
    return s3_server.plain_client(s3_endpoint)


@pytest.fixture(scope="session")
def s3_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """What stands in front of it and breaks requests on demand."""
    with proxy_to(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3_folder(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new folder behind the proxy, which breaks nothing yet; the environment points there."""
    for name, value in s3_server.environment(s3_proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    s3_proxy.set()
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process no layer but ours tries a request again, and that at once."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(retries, "REQUEST_TRIES", 1)
