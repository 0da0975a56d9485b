"""Headless Chromium for tests, driven through its debugging pipe: pages at any width, what they ask
for over the network, what they complain of.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
PIPE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); " \
       "os.execv(sys.argv[3], sys.argv[3:])"  # fmt: skip
"""Chromium reads commands at descriptor 3 and answers at 4."""
TIMEOUT = 60.0

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Browser:
    """One process; commands are answered in order, events wait in the page they are of."""

    def __init__(self, folder: Path) -> None:
        theirs, self.commands = os.pipe()
        self.answers, their_answers = os.pipe()
        # clear of 3 and 4
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, their_answers)]
        words = [sys.executable, "-c", PIPE, *map(str, ends), str(CHROMIUM), *FLAGS]
        self.process = subprocess.Popen(
            [*words, f"--user-data-dir={folder}"],
            pass_fds=ends, env={**os.environ, "HOME": str(folder)}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs, their_answers, *ends):
            os.close(end)
        self.pages: dict[str, Page] = {}
        self.read, self.number = b"", 0

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.commands)
            os.close(self.answers)

    def open(self, url: str, width: int, height: int = 900) -> "Page":
        """A page as wide as that, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(browser=self, session=session)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        page.call("Page.navigate", url=url)
        page.wait("document.readyState == 'complete' && location.href != 'about:blank'")
        return page

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + TIMEOUT
        while True:
            answer = self._message(end)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                found: dict[str, Any] = answer["result"]
                return found
            if page := self.pages.get(answer.get("sessionId", "")):
                page.note(answer["method"], answer["params"])

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.answers], [], [], max(end - time.monotonic(), 0))
            assert ready, "chromium does not answer"
            more = os.read(self.answers, 1 << 20)
            assert more, "chromium ended"
            self.read += more
        whole, _, self.read = self.read.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        return message


@dataclass
class Page:
    """One open page."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    """URLs asked for, those of data: left out."""
    errors: list[str] = field(default_factory=list)
    """What stands in its console as an error."""

    def note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            url = told["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]
        elif event == "Network.webSocketCreated":
            self.requests.append(told["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception") or told))
        elif event == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(str(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def value(self, script: str) -> Any:
        """What an expression of JavaScript is worth, promises awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """What an expression is worth as soon as that is true of it."""
        end = time.monotonic() + TIMEOUT
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"{script} is not true after {TIMEOUT:.0f} s"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({selector!r}).click()")

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an <input type=file>."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def type_over(self, selector: str, text: str) -> None:
        """Replace what stands in a field, as a keyboard would."""
        self.value(f"document.querySelector({selector!r}).focus()")
        self.value(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def close(self) -> None:
        self.call("Page.close")
        del self.browser.pages[self.session]


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.close()
