"""Chromium without a window, driven through its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

SECONDS = 30  # that an answer may take


def unavailable() -> str | None:
    return None if shutil.which("chromium") else "Chromium is not installed (tests/browser/install.sh, as root)"


class Page:
    """One tab; `said` holds what went wrong in it: console errors, exceptions, refused loads."""

    def __init__(self, url: str) -> None:
        self._socket = websocket.create_connection(url, timeout=SECONDS, suppress_origin=True)
        self._last = 0
        self.said: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # A machine without a network: what the page may load is its own file.
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while (message := self._next()).get("id") != self._last:
            pass
        assert "error" not in message, (method, message)
        return message["result"]

    def _next(self) -> dict[str, Any]:
        message = json.loads(self._socket.recv())
        method, values = message.get("method"), message.get("params")
        if method == "Runtime.exceptionThrown":
            self.said.append(values["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.said.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "assert"):
            self.said.append(str([argument.get("value") for argument in values["args"]]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        return message

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + SECONDS
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, "the page does not load"

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, a promise awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """With the mouse, on the middle of the first element that the selector finds."""
        where = f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "center"}});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.value(where)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """An empty tab of a Chromium whose profile lies in `folder`."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    command = ["chromium", *flags, f"--user-data-dir={folder}", "--window-size=1400,1000", "about:blank"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port, deadline = folder / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port.exists() and "\n" in port.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.05)
        number = port.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list", timeout=SECONDS) as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        yield Page(tab["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(SECONDS)
