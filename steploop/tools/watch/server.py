"""Serve one page over HTTP on the loopback device, to whoever knows its address."""

import hmac
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

from steploop.errors import ConfigError, SteploopError
from steploop.tools.watch.live_page import Page

__all__ = ["PageServer", "open_server"]

FIRST_PORT: Final = 8123  # the same each time where it is free, so that a tunnel can be kept
_TRIED = 20
# A page of another site whose name was made to lead to this machine (DNS rebinding) asks with that name.
_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves ``page()`` at ``http://127.0.0.1:PORT/TOKEN/`` and nothing else.

    Loopback alone protects from other machines, not from other users of this one or from pages of other sites: so the
    path holds a random token, and the Host header must name this machine.

    Args:
        page: gives the page as it is now.
        port: 0 for any that is free.
    """

    daemon_threads = True

    def __init__(self, page: Callable[[], Page], port: int) -> None:
        self.page = page
        self.token = secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def address(self) -> str:
        """What a browser opens."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


def open_server(page: Callable[[], Page], port: int | None) -> PageServer:
    """Open a server on a port, or on the first that is free from 8123 on.

    Raises:
        ConfigError: the port is taken, or not allowed.
    """
    for tried in [*range(FIRST_PORT, FIRST_PORT + _TRIED), 0] if port is None else [port]:
        try:
            return PageServer(page, tried)
        except OSError as error:
            reason = error.strerror
    raise ConfigError(f"Port {port} cannot be used: {reason}. Give another --port, or none.")


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: PageServer
    server_version, sys_version = "steploop", ""
    timeout = 30  # seconds until a silent connection is closed

    def do_GET(self) -> None:
        """Send the page, or 304 if the browser has it."""
        if not _is_loopback(self.headers.get("Host", "")):
            self._say(HTTPStatus.FORBIDDEN, "Open this page as 127.0.0.1 or localhost.")
        elif not hmac.compare_digest(self.path.encode(), f"/{self.server.token}/".encode()):
            self._say(HTTPStatus.NOT_FOUND, "Open the whole address that steploop watch has printed.")
        else:
            self._send_page()

    do_HEAD = do_GET  # noqa: N815  (likewise)

    def _send_page(self) -> None:
        try:
            page = self.server.page()
        except (SteploopError, OSError) as error:  # the directory was removed
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        if self.headers.get("If-None-Match") == page.tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", {"ETag": page.tag})
        else:
            self._send(
                HTTPStatus.OK, page.data, {"ETag": page.tag, "Content-Type": "text/html; charset=utf-8"}
            )

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, f"{text}\n".encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def _send(self, status: HTTPStatus, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
        """Say nothing: the terminal is the user's."""


def _is_loopback(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in _HOSTS
    except ValueError:
        return False
