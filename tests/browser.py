"""A real browser for tests: headless Chromium, driven by clicks and keys through its driver.

The W3C's WebDriver protocol is JSON over HTTP, so the standard library is enough: https://www.w3.org/TR/webdriver2.
A browser that is not installed is a reason to skip, `make browser` installs it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

DRIVER, BROWSER = "chromedriver", "chromium"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which the standard gives elements."""
ENTER, ESCAPE, RIGHT, DOWN = "\ue007", "\ue00c", "\ue014", "\ue015"
SECONDS = 30
"""What one command may take before the browser counts as hanging."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--no-default-browser-check", "--window-size=1400,1000"),
)


def missing() -> str:
    """Why there is no browser; "" if there is one."""
    lacking = [name for name in (BROWSER, DRIVER) if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} here: make browser installs it" if lacking else ""


class BrowserError(Exception):
    """The browser refused a command, or a page did not do what was waited for."""


class Element:
    """Something on the page."""

    def __init__(self, browser: Browser, key: str) -> None:
        self.browser, self.key = browser, key

    def click(self) -> None:
        """Scroll it into view and click its middle; an error if something else is there."""
        self.browser.call("POST", f"/element/{self.key}/click", {})

    def type(self, text: str) -> None:
        """Give it the focus and type."""
        self.browser.call("POST", f"/element/{self.key}/value", {"text": text})

    @property
    def text(self) -> str:
        """What a reader sees."""
        return str(self.browser.call("GET", f"/element/{self.key}/text"))

    @property
    def shown(self) -> bool:
        """Whether a reader sees it."""
        return bool(self.browser.call("GET", f"/element/{self.key}/displayed"))

    def attribute(self, name: str) -> str | None:
        """An attribute as it stands in the document."""
        found = self.browser.call("GET", f"/element/{self.key}/attribute/{name}")
        return None if found is None else str(found)

    def style(self, name: str) -> str:
        """A computed property of its style."""
        return str(self.browser.call("GET", f"/element/{self.key}/css/{name}"))


class Browser:
    """One window.

    Args:
        port: Where the driver listens.
        profile: An empty folder.
    """

    def __init__(self, port: int, profile: Path) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        self.path = "/session"
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which(BROWSER)}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.path = f"/session/{made['sessionId']}"

    def call(self, method: str, command: str, body: dict[str, Any] | None = None) -> Any:
        """One command of the protocol.

        Raises:
            BrowserError: The browser answers that it could not.
        """
        data = None if body is None else json.dumps(body)
        self.connection.request(method, self.path + command, data, {"Content-Type": "application/json"})
        answer = json.loads(self.connection.getresponse().read())["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise BrowserError(f"{method} {command}: {answer['error']}: {answer['message']}")
        return answer

    def open(self, page: Path) -> None:
        """Load a file and wait until it is complete."""
        self.call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in the page returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def all(self, selector: str) -> list[Element]:
        """The elements of a CSS selector."""
        found = self.call("POST", "/elements", {"using": "css selector", "value": selector})
        return [Element(self, one[ELEMENT]) for one in found]

    def one(self, selector: str) -> Element:
        """The one element of a CSS selector.

        Raises:
            BrowserError: There is none, or more than one.
        """
        found = self.all(selector)
        if len(found) != 1:
            raise BrowserError(f"expected one {selector!r} on the page, there are {len(found)}")
        return found[0]

    def press(self, *keys: str) -> None:
        """Press and release keys, whatever has the focus."""
        pressed = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": pressed}]})

    def point(self, element: Element) -> None:
        """Move the mouse to the middle of an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: element.key})
        move = {"type": "pointerMove", "duration": 0, "origin": {ELEMENT: element.key}, "x": 0, "y": 0}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.call("POST", "/actions", {"actions": [mouse]})

    def prefer(self, scheme: str) -> None:
        """Have the page believe that the reader prefers ``dark`` or ``light``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def complaints(self) -> list[str]:
        """What the page wrote on the console since the last call: errors, refused scripts, failed loads."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser that is gone afterwards, with its driver.

    Args:
        folder: An empty one, for the browser's profile.
    """
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert driver.stdout is not None
        ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
        port = next((int(found[1]) for found in ports if found), None)
        if port is None:
            raise BrowserError(f"{DRIVER} ended with status {driver.wait(SECONDS)} before it listened")
        browser = Browser(port, folder)
        try:
            yield browser
        finally:
            browser.call("DELETE", "")
            browser.connection.close()
    finally:
        driver.terminate()
        driver.wait(SECONDS)
        if driver.stdout is not None:
            driver.stdout.close()
