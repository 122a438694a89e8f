"""A real browser, headless: Debian's Chromium by its driver, without a package."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

# As root, and without a word to anyone outside of this machine.
_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
]


class Browser:
    """One page at a time."""

    def __init__(self, address: str, profile: Path):
        self._address = address
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        }
        logs = {"browser": "ALL", "performance": "ALL"}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        made = self._send("POST", "", {"capabilities": {"alwaysMatch": asked}})
        self._address += f"/{made['sessionId']}"

    def open(self, page: Path | str) -> None:
        url = page.absolute().as_uri() if isinstance(page, Path) else page
        self._send("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, which runs in the page."""
        sent = {"script": script, "args": list(arguments)}
        return self._send("POST", "/execute/sync", sent)

    def wait(self, script: str, seconds: float = 20) -> Any:
        """The first true value that a script returns."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"{script} stays {value}"
            time.sleep(0.1)
        return value

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and what its user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        mobile = {"mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size | mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def picture(self) -> bytes:
        """The whole page as a PNG file."""
        for tries_left in (2, 1, 0):  # on a machine that is busy it fails now and then
            size = self._devtools("Page.getLayoutMetrics", {})["cssContentSize"]
            how = {
                "format": "png",
                "captureBeyondViewport": True,
                "clip": size | {"scale": 1},
            }
            try:
                taken = self._devtools("Page.captureScreenshot", how)
                return base64.b64decode(taken["data"])
            except RuntimeError:
                if not tries_left:
                    raise
                time.sleep(1)
        raise AssertionError

    def pointer(self, x: float, y: float) -> None:
        where = {"type": "mouseMoved", "x": x, "y": y}
        self._devtools("Input.dispatchMouseEvent", where)

    def print(self) -> bytes:
        """The page printed, as a PDF file."""
        how = {"printBackground": False, "preferCSSPageSize": True}
        return base64.b64decode(self._devtools("Page.printToPDF", how)["data"])

    def said(self) -> list[str]:
        """What the console got: errors of scripts, refused loads, and the like."""
        return [each["message"] for each in self._send("POST", "/se/log", BROWSER)]

    def requested(self) -> list[str]:
        """Each address that was asked for, of pages too."""
        messages = [
            json.loads(each["message"])["message"]
            for each in self._send("POST", "/se/log", PERFORMANCE)
        ]
        return [
            each["params"]["request"]["url"]
            for each in messages
            if each["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self._send("DELETE", "")

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        sent = {"cmd": command, "params": parameters}
        return self._send("POST", "/goog/cdp/execute", sent)

    def _send(self, method: str, path: str, sent: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self._address}{path}",
            method=method,
            data=None if sent is None else json.dumps(sent).encode(),
            headers={"Content-Type": "application/json"},
        )
        # Not by a proxy that the environment may name.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            why = json.load(error)["value"]["message"].split("\n")[0]
            raise RuntimeError(f"{path} {str(sent)[:200]}: {why}") from None


BROWSER, PERFORMANCE = {"type": "browser"}, {"type": "performance"}


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a folder that does not exist yet."""
    assert DRIVER is not None and CHROMIUM is not None
    profile.mkdir()
    log = profile.with_suffix(".log")
    with open(log, "w") as said:
        driver = subprocess.Popen(
            [DRIVER, "--port=0"],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(profile), "TMPDIR": str(profile)},
        )
    try:
        until, port = time.monotonic() + 30, None
        while port is None:
            assert driver.poll() is None and time.monotonic() < until, log.read_text()
            found = re.search(r"successfully on port (\d+)\.", log.read_text())
            port = found and int(found[1])
            time.sleep(0.05)
        each = Browser(f"http://127.0.0.1:{port}/session", profile / "data")
        try:
            yield each
        finally:
            each.close()
    finally:
        driver.terminate()
        driver.wait(30)
