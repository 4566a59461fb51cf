"""Real browsers, each driven over its own debugging protocol with nothing but `websockets`.

Chromium speaks CDP, Firefox WebDriver BiDi, WPE WebKit (the engine of Safari) its inspector's
protocol. A browser is one process in its own session and with its own home; `page()` opens a fresh
window in it. WebKit has one window, no real keys and no real mouse.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from harness import eventually, free_port, growing_pauses
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

Event = dict[str, Any]

# key -> (Windows key code for CDP, the text it types, WebDriver's code point)
KEYS = {
    "Enter": (13, "\r", "\ue007"),
    "Escape": (27, "", "\ue00c"),
    "Tab": (9, "", "\ue004"),
    "Backspace": (8, "", "\ue003"),
    "PageUp": (33, "", "\ue00e"),
    "PageDown": (34, "", "\ue00f"),
    "End": (35, "", "\ue010"),
    "Home": (36, "", "\ue011"),
    "ArrowUp": (38, "", "\ue013"),
    "ArrowDown": (40, "", "\ue015"),
    " ": (32, " ", " "),
}


COPIED = """(() => {
    let copied = "";
    const event = new Event("copy", { bubbles: true, cancelable: true });
    Object.defineProperty(event, "clipboardData", { value: { setData: (type, text) => { copied = text; } } });
    document.body.dispatchEvent(event);
    return copied;
})()"""


def unavailable(what: str) -> NoReturn:
    """At home a test may be left out for want of a program, where it counts it may not."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


class Wire:
    """Calls {id, method, params} -> {id, result}, and events: framed alike in all protocols."""

    def __init__(self, url: str) -> None:
        self.closing = contextlib.ExitStack()
        self.socket = self.closing.enter_context(
            connect(url, max_size=None, open_timeout=20, compression=None)
        )
        self.numbers, self.changed = itertools.count(1), threading.Condition()
        self.replies: dict[int, Event] = {}
        self.events: list[Event] = []
        self.listen: Callable[[Event], None] = self.events.append
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            for frame in self.socket:
                with self.changed:
                    self._take(json.loads(frame))
                    self.changed.notify_all()

    def _take(self, message: Event) -> None:
        if message.get("id") is None:
            self.listen(message)
        else:
            self.replies[message["id"]] = message

    def call(self, method: str, params: Event, timeout: float = 30, **extra: Any) -> Event:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params, **extra}))
        return self.reply(number, method, timeout)

    def reply(self, number: int, method: str, timeout: float) -> Event:
        with self.changed:
            if not self.changed.wait_for(lambda: number in self.replies, timeout):
                raise TimeoutError(f"no answer to {method} in {timeout} s")
            answer = self.replies.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']} {answer.get('message', '')}")
        result: Event = answer["result"]
        return result


class Browser:
    """A process, and the wire to it. Subclasses say how to start it and how to open a page."""

    program = ""

    def __init__(self) -> None:
        if not os.access(self.program, os.X_OK):
            unavailable(f"{self.program} is not installed")
        self.home = tempfile.mkdtemp(prefix="browser-")
        self.said = Path(self.home, "stderr")
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.quit()
            raise

    def start(self) -> None:
        raise NotImplementedError

    def page(self, window: bool = True) -> Page:
        """In a window of its own, or in a tab that covers the page opened last."""
        raise NotImplementedError

    def run(self, *arguments: str, **environment: str) -> None:
        """What it leaves behind in /tmp or at home goes away with its folder."""
        own = dict.fromkeys(("HOME", "TMPDIR", "XDG_RUNTIME_DIR"), self.home)
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(
                [self.program, *arguments],
                env={**os.environ, **own, "NO_AT_BRIDGE": "1", **environment},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def debugging_address(self) -> str:
        said = eventually(
            lambda: re.search(r"listening on (ws://\S+)\n", self.said.read_text(errors="replace")),
            60,
        )
        return str(said[1])

    def ask_to_close(self) -> None:
        raise NotImplementedError

    def quit(self) -> None:
        if self.process:
            with contextlib.suppress(Exception):
                self.ask_to_close()
                self.process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    self.process.pid, signal.SIGKILL
                )  # also a helper that outlived its parent
            self.process.wait(5)
        for _ in range(40):
            shutil.rmtree(self.home, ignore_errors=True)
            if not os.path.exists(self.home):
                break
            time.sleep(0.05)


class Page:
    """One window; `console` and `errors` fill by themselves.

    The protocols differ in the methods that raise here.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.console: list[
            tuple[str, str]
        ] = []  # (level, text); a dialog that opened is ("dialog", text)
        self.errors: list[str] = []  # answers of 400 and more, as far as the protocol tells

    def evaluate(self, source: str, timeout: float) -> str | None:
        raise NotImplementedError

    def goto(self, url: str) -> None:
        raise NotImplementedError

    def key(self, key: str, shift: bool) -> None:
        raise NotImplementedError

    def mouse(self, x: float, y: float, wheel: int = 0) -> None:
        """A click, or with `wheel` so many pixels of the wheel there."""
        raise NotImplementedError

    def double_click(self, x: float, y: float) -> None:
        raise NotImplementedError

    def drag(self, *points: tuple[float, float], pause_s: float = 0, shift: bool = False) -> None:
        """Press the button at the first point, move through the others, let go at the last."""
        raise NotImplementedError

    def swipe(self, x: float, y: float, by: int, step: int) -> None:
        """A finger that goes so many pixels down, in such steps."""
        raise NotImplementedError

    def resize(self, width: int, height: int) -> None:
        raise NotImplementedError

    def to_front(self) -> None:
        raise NotImplementedError

    def screenshot(self) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def js(self, expression: str, timeout: float = 30) -> Any:
        """The value of an expression, or what its promise brings."""
        value = self.evaluate(f"(async()=>JSON.stringify(await ({expression})))()", timeout)
        return None if value is None else json.loads(value)

    def wait(self, expression: str, timeout: float = 15) -> Any:
        end = time.monotonic() + timeout
        pauses = growing_pauses()
        while not (value := self.js(expression)):
            if time.monotonic() > end:
                raise AssertionError(
                    f"still {value!r} after {timeout} s: {expression}; console: {self.console[-5:]}"
                )
            time.sleep(next(pauses))
        return value

    def copy(self) -> str:
        """What Ctrl-C puts into the clipboard."""
        return str(self.js(COPIED))

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            self.key(key, shift)

    def type(self, text: str) -> None:
        self.press(*text)


# -- Chromium: the Chrome DevTools Protocol --------------------------------------------------------


class Chromium(Browser):
    program = "/usr/bin/chromium"
    options = (
        "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        " --remote-debugging-port=0 --disable-background-networking --disable-component-update"
        " --disable-backgrounding-occluded-windows --disable-renderer-backgrounding"
        " --disable-background-timer-throttling --window-size=1000,700"
        # The address bar's suggestions are pages: two for each window, half a second of a core.
        " --disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup"
    )

    def start(self) -> None:
        self.pages: dict[str, ChromiumPage] = {}
        self.run(*self.options.split(), f"--user-data-dir={self.home}/profile", "about:blank")
        self.wire = Wire(self.debugging_address())
        self.wire.listen = self.listen

    def listen(self, event: Event) -> None:
        if page := self.pages.get(event.get("sessionId", "")):
            page.listen(event["method"], event["params"])

    def page(self, window: bool = True) -> ChromiumPage:
        if window:  # each with its own connections, which end with it
            self.context = self.wire.call("Target.createBrowserContext", {})["browserContextId"]
        how = {"url": "about:blank", "newWindow": window, "browserContextId": self.context}
        target = self.wire.call("Target.createTarget", how)["targetId"]
        session = self.wire.call("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        page = self.pages[session] = ChromiumPage(
            self.wire, target, session, self.context if window else ""
        )
        for domain in ("Page", "Runtime", "Log"):
            page.cdp(f"{domain}.enable")
        return page

    def ask_to_close(self) -> None:
        self.wire.call("Browser.close", {}, timeout=5)


class ChromiumPage(Page):
    def __init__(self, wire: Wire, target: str, session: str, context: str) -> None:
        super().__init__(wire)
        self.target, self.session, self.context, self.loaded = target, session, context, 0

    def cdp(self, method: str, timeout: float = 30, **params: Any) -> Event:
        return self.wire.call(method, params, timeout, sessionId=self.session)

    def listen(self, method: str, params: Event) -> None:
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Page.javascriptDialogOpening":
            self.console.append(("dialog", params["message"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(
                ("error", details.get("exception", {}).get("description", details["text"]))
            )
        elif method == "Runtime.consoleAPICalled":
            words = [
                str(value.get("value", value.get("description", ""))) for value in params["args"]
            ]
            self.console.append((params["type"], " ".join(words)))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            self.console.append((entry["level"], entry["text"]))
            if "status of " in entry["text"]:
                self.errors.append(f"{entry['text']} {entry.get('url')}")

    def evaluate(self, source: str, timeout: float) -> str | None:
        answer = self.cdp(
            "Runtime.evaluate", timeout, expression=source, awaitPromise=True, returnByValue=True
        )
        if details := answer.get("exceptionDetails"):
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        value: str | None = answer["result"].get("value")
        return value

    def goto(self, url: str) -> None:
        before = self.loaded
        if trouble := self.cdp("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {trouble}")
        with self.wire.changed:
            if not self.wire.changed.wait_for(lambda: self.loaded > before, 30):
                raise TimeoutError(f"{url} was not loaded in 30 s")

    def key(self, key: str, shift: bool) -> None:
        code, text, _ = KEYS.get(key, (0, key, key))
        common: Event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.cdp(
            "Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common
        )
        self.cdp("Input.dispatchKeyEvent", type="keyUp", **common)

    def mouse(self, x: float, y: float, wheel: int = 0) -> None:
        if wheel:
            self.cdp(
                "Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=wheel
            )
            return
        for kind in ("mousePressed", "mouseReleased"):
            self.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def button(
        self, kind: str, x: float, y: float, clicks: int = 1, held: bool = True, shift: bool = False
    ) -> None:
        pressed: Event = {
            "button": "left",
            "buttons": 1 if held else 0,
            "modifiers": 8 if shift else 0,
        }
        self.cdp(
            "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, clickCount=clicks, **pressed
        )

    def double_click(self, x: float, y: float) -> None:
        for clicks in (1, 2):
            self.button("Pressed", x, y, clicks)
            self.button("Released", x, y, clicks, held=False)

    def drag(self, *points: tuple[float, float], pause_s: float = 0, shift: bool = False) -> None:
        self.button("Pressed", *points[0], shift=shift)
        for point in points[1:]:
            self.button("Moved", *point, shift=shift)
            time.sleep(pause_s)
        self.button("Released", *points[-1], held=False, shift=shift)

    def swipe(self, x: float, y: float, by: int, step: int) -> None:
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
        self.cdp("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        for moved in range(step, by + 1, step):
            self.cdp(
                "Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y + moved}]
            )
        self.cdp("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def resize(self, width: int, height: int) -> None:
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def to_front(self) -> None:
        self.cdp("Page.bringToFront")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.cdp("Page.captureScreenshot")["data"])

    def close(self) -> None:
        if self.context:
            self.wire.call("Target.disposeBrowserContext", {"browserContextId": self.context})
        else:
            self.wire.call("Target.closeTarget", {"targetId": self.target})


# -- Firefox: WebDriver BiDi -----------------------------------------------------------------------


class Firefox(Browser):
    program = "/usr/bin/firefox-esr"
    options = "--headless --no-remote --remote-debugging-port=0 --width=1000 --height=700"
    events = ("log.entryAdded", "network.responseCompleted", "browsingContext.userPromptOpened")

    def start(self) -> None:
        self.pages: dict[str, FirefoxPage] = {}
        profile = f"{self.home}/profile"
        os.mkdir(profile)
        self.run(*self.options.split(), "--profile", profile, "about:blank")
        self.wire = Wire(self.debugging_address() + "/session")
        self.wire.listen = self.listen
        self.wire.call("session.new", {"capabilities": {}})
        self.wire.call("session.subscribe", {"events": self.events})

    def listen(self, event: Event) -> None:
        params = event["params"]
        context = params.get("context") or params.get("source", {}).get("context")
        if page := self.pages.get(context):
            page.listen(event["method"], params)

    def page(self, window: bool = True) -> FirefoxPage:
        context = self.wire.call("browsingContext.create", {"type": "window" if window else "tab"})[
            "context"
        ]
        page = self.pages[context] = FirefoxPage(self.wire, context)
        return page

    def ask_to_close(self) -> None:
        self.wire.call("browser.close", {}, timeout=5)


class FirefoxPage(Page):
    def __init__(self, wire: Wire, context: str) -> None:
        super().__init__(wire)
        self.context = context

    def bidi(self, method: str, timeout: float = 30, **params: Any) -> Event:
        return self.wire.call(method, {"context": self.context, **params}, timeout)

    def listen(self, method: str, params: Event) -> None:
        if method == "log.entryAdded":
            self.console.append((str(params.get("method", params["level"])), params["text"] or ""))
        elif method == "browsingContext.userPromptOpened":
            self.console.append(("dialog", params["message"]))
        elif params["response"]["status"] >= 400:
            self.errors.append(f"{params['response']['status']} {params['request']['url']}")

    def evaluate(self, source: str, timeout: float) -> str | None:
        target = {"context": self.context}
        params = {
            "expression": source,
            "target": target,
            "awaitPromise": True,
            "userActivation": True,
        }
        answer = self.wire.call("script.evaluate", params, timeout)
        if answer["type"] == "exception":
            raise RuntimeError(answer["exceptionDetails"]["text"])
        value: str | None = answer["result"].get("value")
        return value

    def goto(self, url: str) -> None:
        self.bidi("browsingContext.navigate", url=url, wait="complete")

    def act(self, kind: str, *actions: Event) -> None:
        self.bidi("input.performActions", actions=[{"type": kind, "id": kind, "actions": actions}])

    def key(self, key: str, shift: bool) -> None:
        value = KEYS[key][2] if key in KEYS else key
        held = ["\ue008", value] if shift else [value]
        down = [{"type": "keyDown", "value": one} for one in held]
        self.act("key", *down, *({"type": "keyUp", "value": one} for one in reversed(held)))

    def mouse(self, x: float, y: float, wheel: int = 0) -> None:
        place = {"x": round(x), "y": round(y)}
        if wheel:
            self.act("wheel", {"type": "scroll", **place, "deltaX": 0, "deltaY": wheel})
            return
        click = [{"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")]
        self.act("pointer", {"type": "pointerMove", **place}, *click)

    def double_click(self, x: float, y: float) -> None:
        click = [{"type": f"pointer{way}", "button": 0} for way in ("Down", "Up")]
        self.act("pointer", {"type": "pointerMove", "x": round(x), "y": round(y)}, *click, *click)

    def drag(self, *points: tuple[float, float], pause_s: float = 0, shift: bool = False) -> None:
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in points]
        rest = [
            one
            for move in moves[1:]
            for one in (move, {"type": "pause", "duration": round(1000 * pause_s)})
        ]
        press, release = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        mouse = {"type": "pointer", "id": "pointer", "actions": [moves[0], press, *rest, release]}
        key = {"type": "key", "id": "key", "actions": [{"type": "keyDown", "value": "\ue008"}]}
        self.bidi("input.performActions", actions=[mouse, key] if shift else [mouse])
        self.bidi("input.releaseActions")

    def swipe(self, x: float, y: float, by: int, step: int) -> None:
        places = [
            {"type": "pointerMove", "x": round(x), "y": round(y) + moved}
            for moved in range(0, by + 1, step)
        ]
        press, release = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        touch = {"pointerType": "touch"}
        actions = [places[0], press, *places[1:], release]
        finger = {"type": "pointer", "id": "finger", "parameters": touch, "actions": actions}
        self.bidi("input.performActions", actions=[finger])

    def resize(self, width: int, height: int) -> None:
        self.bidi("browsingContext.setViewport", viewport={"width": width, "height": height})

    def to_front(self) -> None:
        self.bidi("browsingContext.activate")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.bidi("browsingContext.captureScreenshot")["data"])

    def close(self) -> None:
        self.bidi("browsingContext.close")


# -- Both WebKits of Debian: the Web Inspector's protocol, inside of envelopes ---------------------


class WebKit(Browser):
    program = next(
        map(str, Path("/usr/lib").glob("*/wpe-webkit-1.1/MiniBrowser")),
        "wpe-webkit-1.1/MiniBrowser",
    )
    options: tuple[str, ...] = ("--headless",)

    def start(self) -> None:
        self.start_inspected()

    def start_inspected(self, **environment: str) -> None:
        inspector = f"127.0.0.1:{free_port()}"
        environment["WEBKIT_INSPECTOR_HTTP_SERVER"] = inspector
        self.run(*self.options, "about:blank", **environment)

        def path() -> str:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{inspector}/", timeout=5) as answer,
            ):
                return "".join(re.findall(r"/socket/\d+/\d+/WebPage", answer.read().decode())[:1])
            return ""

        self.wire = Wire(f"ws://{inspector}{eventually(path, 20)}")

    def page(self, window: bool = True) -> WebKitPage:
        return WebKitPage(self.wire)

    def ask_to_close(self) -> None:
        self.wire.closing.close()
        if self.process:
            os.killpg(self.process.pid, signal.SIGTERM)


class WebKitGTK(WebKit):
    """The one that needs a display: a virtual one, which ends with it."""

    program = next(
        map(str, Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser")),
        "webkit2gtk-4.1/MiniBrowser",
    )
    options = ("--enable-developer-extras=true",)

    def start(self) -> None:
        server = shutil.which("Xvfb") or unavailable("Xvfb is not installed")
        self.display = subprocess.Popen(
            [server, "-displayfd", "1", "-screen", "0", "1280x720x24", "-nolisten", "tcp"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.display.stdout
        number = self.display.stdout.readline().decode().strip()
        assert number, "Xvfb did not start"
        self.start_inspected(DISPLAY=f":{number}", GDK_BACKEND="x11", LIBGL_ALWAYS_SOFTWARE="1")

    def quit(self) -> None:
        super().quit()
        if display := getattr(self, "display", None):
            display.terminate()
            display.communicate()


class WebKitPage(Page):
    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self.target, self.enabled = "", ""
        with wire.changed:
            for event in wire.events:
                self.listen(event)
            wire.listen = self.listen
            if not wire.changed.wait_for(lambda: self.target, 10):
                raise TimeoutError("WebKit named no page in 10 s")

    def listen(self, event: Event) -> None:
        method, params = event["method"], event.get("params", {})
        if method == "Target.targetCreated" and not params["targetInfo"].get("isProvisional"):
            self.target = params["targetInfo"]["targetId"]
        elif method == "Target.didCommitProvisionalTarget":  # the new page lives in another process
            self.target = params["newTargetId"]
        elif method == "Target.dispatchMessageFromTarget":
            self.unpack(json.loads(params["message"]))

    def unpack(self, message: Event) -> None:
        if "id" in message:
            self.wire.replies[message["id"]] = message
        elif message["method"] == "Console.messageAdded":
            entry = message["params"]["message"]
            self.console.append((entry["level"], entry["text"]))

    def inspect(self, method: str, timeout: float = 20, **params: Any) -> Event:
        number = next(self.wire.numbers)
        message = json.dumps({"id": number, "method": method, "params": params})
        self.wire.call("Target.sendMessageToTarget", {"targetId": self.target, "message": message})
        return self.wire.reply(number, method, timeout)

    def evaluate(self, source: str, timeout: float) -> str | None:
        promise = self.inspect("Runtime.evaluate", timeout, expression=source)["result"]["objectId"]
        answer = self.inspect(
            "Runtime.awaitPromise", timeout, promiseObjectId=promise, returnByValue=True
        )
        if answer.get("wasThrown"):
            raise RuntimeError(answer["result"].get("description"))
        value: str | None = answer["result"].get("value")
        return value

    def goto(self, url: str) -> None:
        self.inspect(
            "Runtime.evaluate", expression=f"window.before = 1; location.href = {json.dumps(url)}"
        )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            # While the page changes hands an answer may never come.
            with contextlib.suppress(RuntimeError, TimeoutError):
                if self.enabled != (target := self.target):
                    self.inspect("Console.enable", timeout=2)
                    self.enabled = target  # there may be another one by now
                if self.js("!window.before && document.readyState === 'complete'", timeout=2):
                    return
            time.sleep(0.02)
        raise TimeoutError(f"{url} was not loaded in 20 s")

    def resize(self, width: int, height: int) -> None:
        """WPE has one size, 1280x720."""

    def screenshot(self) -> bytes:
        size = {"x": 0, "y": 0, "width": self.js("innerWidth"), "height": self.js("innerHeight")}
        shot = self.inspect("Page.snapshotRect", coordinateSystem="Viewport", **size)
        return base64.b64decode(shot["dataURL"].partition(",")[2])

    def close(self) -> None:
        """Its one window ends with the browser."""


BROWSERS: dict[str, type[Browser]] = {"chromium": Chromium, "firefox": Firefox}
WEBKITS: tuple[type[WebKit], ...] = (WebKit, WebKitGTK)
