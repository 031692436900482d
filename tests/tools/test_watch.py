"""The live report: who may open it, when it is made again, and what a reader's browser shows."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from chromium_pipe import CHROMIUM, Tab
from sample_runs import make_run

from steploop.errors import ConfigError
from steploop.runs.directory_lock import run_lock
from steploop.tools.cli import call
from steploop.tools.commands import watch
from steploop.tools.watch.live_page import LivePage
from steploop.tools.watch.server import open_server

FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@contextlib.contextmanager
def serving(*runs):
    page = LivePage(runs)
    with open_server(page.current, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server, path=None, *, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    connection.request(method, f"/{server.token}/" if path is None else path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, answer.headers


def add(run, **values):
    """One more line of training, as a run writes it."""
    line = {"kind": "train", "phase": 0, "epoch": 5, "batch": 1, "learning_rate": 0.1, **values}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_the_page_is_served_to_whoever_has_its_address(tmp_path):
    with serving(make_run(tmp_path / "a")) as server:
        status, body, headers = asked(server)
        assert status == 200
        assert "two_moons" in body
        assert "connect-src 'self'" in body
        assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
        status, body, _ = asked(server, method="HEAD")
        assert (status, body) == (200, "")
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/../", "/wrong/", "/%00/", "*"])
def test_another_path_shows_nothing(path, tmp_path):
    with serving(make_run(tmp_path / "a")) as server:
        status, body, _ = asked(server, path)
        assert (status, body) == (404, "Open the whole address that steploop watch has printed.\n")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8123", "localhost.evil.example", "", "[::1", "0.0.0.0"]
)
def test_a_name_that_was_made_to_lead_here_is_refused(host, tmp_path):
    with serving(make_run(tmp_path / "a")) as server:
        status, body, _ = asked(server, Host=host)
        assert status == 403
        assert "two_moons" not in body


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:1", "[::1]:8123", "LOCALHOST"])
def test_the_port_of_a_tunnel_may_be_another_one(host, tmp_path):
    with serving(make_run(tmp_path / "a")) as server:
        assert asked(server, Host=host)[0] == 200


def test_what_has_not_changed_is_not_sent_again(tmp_path):
    run = make_run(tmp_path / "a")
    page = LivePage([run], clock=lambda: 0.0)
    with open_server(page.current, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            tag = asked(server)[2]["ETag"]
            assert asked(server, **{"If-None-Match": tag})[:2] == (304, "")
            add(run, step=241, attempted=244, loss=0.123456)
            status, body, headers = asked(server, **{"If-None-Match": tag})
            assert status == 200
            assert "0.123456" in body
            assert headers["ETag"] != tag
            shutil.rmtree(run)
            status, body, _ = asked(server)
            assert (status, "is no directory" in body) == (503, True)
        finally:
            server.shutdown()
            thread.join()


def test_making_pages_takes_a_twentieth_of_the_time_at_most(tmp_path):
    """Each look at this clock takes a second, so a page takes one, and the next is made twenty later."""
    run, now = make_run(tmp_path / "a"), [0.0]

    def clock():
        now[0] += 1
        return now[0]

    page = LivePage([run], clock=clock)
    first = page.current()
    add(run, step=241, attempted=244, loss=0.5)
    made_at = now[0]
    while page.current() == first:
        pass
    assert 19 <= now[0] - made_at <= 23


def test_a_run_whose_process_has_died_is_shown_so(tmp_path):
    run = make_run(tmp_path / "a", state="running")
    assert "died" in LivePage([run]).current().data.decode()


def test_a_port_that_is_taken_is_refused_and_by_default_another_one_is_found(tmp_path):
    page = LivePage([make_run(tmp_path / "a")]).current
    with open_server(page, None) as one, open_server(page, None) as other:
        assert one.server_port != other.server_port
        assert one.token != other.token
        with pytest.raises(
            ConfigError, match=rf"Port {one.server_port} cannot be used: .* Give another --port"
        ):
            open_server(page, one.server_port)


def test_a_directory_that_is_no_run_is_refused_before_anything_is_served(tmp_path, capsys):
    assert call(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert call(["watch", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_run_that_is_about_to_begin_is_waited_for(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(watch.time, "sleep", lambda _: (run / "config.json").touch())
    with run_lock(run):
        watch._await_start(run)
    watch._await_start(tmp_path)  # nobody owns it: read_run says what is wrong
    assert capsys.readouterr().err == f"{run} is about to begin: waiting for it.\n"


def test_the_command_prints_its_address_and_ends_by_ctrl_c(tmp_path):
    run = make_run(tmp_path / "a")
    command = [sys.executable, "-m", "steploop", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        host, _, path = address.removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=300)
        connection.request("GET", f"/{path}")
        assert connection.getresponse().status == 200
        connection.close()
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    port = host.partition(":")[2]
    assert f"ssh -N -L {port}:127.0.0.1:{port} HOST" in err


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_follows_the_run_and_leaves_the_reader_where_he_is(width, tmp_path):
    run = make_run(tmp_path / "a", epochs=24)
    with serving(run) as server, contextlib.closing(Tab(tmp_path / "profile", width=width)) as tab:
        tab.open(server.address)
        tab.wait(
            "document.querySelector('.live').dataset.state === 'on' && document.querySelector('.live').title !== ''"
        )
        assert tab.value("innerWidth") == width
        assert tab.value(FITS)
        tab.value(
            "document.querySelector('.scale').click(); document.querySelector('details').open = true; scrollTo(0, 500)"
        )
        assert tab.value("document.querySelector('.scale').textContent") == "linear scale"
        charts = tab.value("document.querySelectorAll('.chart svg').length")
        add(run, step=241, attempted=244, loss=0.0625, grad_norm=1.5)
        tab.wait(
            "[...document.querySelectorAll('.chart script')].some((data) => data.textContent.includes('0.0625'))"
        )
        assert tab.value("document.querySelector('.scale').textContent") == "linear scale"
        assert tab.value("document.querySelector('details').open")
        assert tab.value("scrollY") == 500
        assert tab.value("document.querySelectorAll('.chart svg').length") == charts
        assert tab.value(FITS)
        server.shutdown()
        server.server_close()
        tab.wait("document.querySelector('.live').dataset.state === 'off'")
        assert "steploop watch has ended" in tab.value("document.querySelector('.live').textContent")
