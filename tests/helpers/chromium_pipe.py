"""A page in Chromium without a window, of any size, driven over a pipe by the DevTools protocol."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
LIMIT_S = 60


class Tab:
    """One page; ``folder`` takes the browser's profile."""

    def __init__(self, folder, *, width, height=900):
        theirs, self._write = os.pipe()
        self._read, their_answers = os.pipe()
        # Chromium reads requests from file 3 and writes answers to file 4
        program = f'exec "$@" 3<&{theirs} 4>&{their_answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", program, "-", CHROMIUM, f"--user-data-dir={folder}", *OPTIONS],
            pass_fds=(theirs, their_answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(their_answers)
        self._buffer, self._last, self._session = b"", 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def ask(self, method, **params):
        """Call a method of the protocol; its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self):
        until = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], until - time.monotonic())[0], (
                "Chromium does not answer"
            )
            self._buffer += os.read(self._read, 1 << 20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        """Go to an address and wait until it is loaded."""
        self.ask("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression):
        """The value of a JavaScript expression, awaited."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + LIMIT_S
        while not self.value(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.05)

    def picture(self, path):
        """Write what is seen as PNG."""
        path.write_bytes(
            base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )

    def close(self):
        """End the browser."""
        with contextlib.suppress(OSError):
            os.close(self._write)
            os.close(self._read)
        self._process.kill()
        self._process.wait()
