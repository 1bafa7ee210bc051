"""A real browser without a window, asked over pipes what it made of a page."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

LOOK = """(async () => {
  const images = [...document.images];
  await Promise.all(images.map(i => i.decode().catch(() => 0)));
  return {
    images: images.map(i => ({alt: i.alt, drawn: i.complete && i.naturalWidth > 0, width: i.getBoundingClientRect().width})),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    text: document.body.innerText};
})()"""


def found() -> str | None:
    """The browser of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser, spoken to by its debugging protocol, one zero-ended JSON message after the other.

    said: what it wrote on its console, threw or logged. asked: addresses that the page asked for.
    """

    def __init__(self, profile: Path) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        path = found()
        assert path is not None
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", path, "--headless", "--no-sandbox",
             "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self._events = b"", 0, "", list[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            some = os.read(self._in, 1 << 16)
            assert some, "the browser went away"
            self._buffer += some
        message, _, self._buffer = self._buffer.partition(b"\0")
        heard: dict[str, Any] = json.loads(message)
        what, more = heard.get("method"), heard.get("params", {})
        if what == "Network.requestWillBeSent":
            self.asked.append(more["request"]["url"])
        if what in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(more))
        if what is not None:
            self._events.append(what)
        return heard

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (heard := self._next()).get("id") != self._number:
            continue
        assert "error" not in heard, heard
        result: dict[str, Any] = heard["result"]
        return result

    def show(self, page: Path, width: int = 1000, height: int = 800) -> dict[str, Any]:
        """Load a file; what `LOOK` tells of it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()
        return dict(self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)["result"]["value"])

    def paper(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def heard(self) -> list[tuple[str, str]]:
        """(role, name) of what a screen reader is told of."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n]
