"""The report in a real browser: it draws, fits a narrow window, and is read with keys and pointer."""

import contextlib
import json
import re
import subprocess

import pytest
from chromium_pipe import CHROMIUM, Tab
from sample_runs import make_run

from steploop.runs.reading import read_run
from steploop.tools.report.pages import report

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

# What a reader does, done by a script at the end of the page; its findings go into the document.
PROBE = """
<script>
const found = {errors: window.failures};
const plot = document.querySelector(".plot");
const output = document.querySelector(".values");
const press = (key, shift) => plot.dispatchEvent(new KeyboardEvent("keydown", {key, shiftKey: !!shift, bubbles: true, cancelable: true}));
found.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
found.wide = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, pre, svg, .xs, .ys") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.className || e.tagName);
found.charts = document.querySelectorAll(".chart svg").length;
const line = document.querySelector("path.s.line");
found.line = [line.getBoundingClientRect().width, document.querySelector(".area").getBoundingClientRect().width];
found.focusable = plot.tabIndex;
// a window that is not in front yet focuses an element and tells nobody: then the event is sent by hand
const tell = (name) => document.hasFocus() || plot.dispatchEvent(new FocusEvent(name));
plot.focus();
found.active = document.activeElement === plot;
tell("focus");
found.focused = output.textContent;
press("Home"); found.home = output.textContent;
press("ArrowRight"); found.next = output.textContent;
press("End"); press("ArrowRight"); found.end = output.textContent;
press("ArrowLeft", true); found.back = output.textContent;
press("Escape"); found.escaped = output.textContent;
press("Home"); const shown = output.textContent;
plot.blur();
tell("blur");
found.blurred = [shown, output.textContent];
const box = document.querySelector(".area").getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true}));
found.hovered = output.textContent;
found.cursor = document.querySelector(".cursor").style.left;
plot.dispatchEvent(new PointerEvent("pointerleave"));
found.left = output.textContent;
const button = document.querySelector(".scale");
const drawing = () => [button.textContent, document.querySelector("path.s.line").getAttribute("d"), document.querySelector(".ys").textContent];
found.scales = [drawing()];
for (let turn = 0; turn < 2; turn++) { button.click(); found.scales.push(drawing()); }
found.scrolled = [...document.querySelectorAll(".scroll, pre")].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.className);
found.cells = [...document.querySelectorAll("td")].filter((e) => e.textContent && !e.closest("details")).map((e) => e.getBoundingClientRect()).filter((b) => b.width < 1 || b.right > document.documentElement.clientWidth).length;
found.folds = [...document.querySelectorAll("details:not([open]) > summary")].map((e) => e.textContent);
found.paper = getComputedStyle(document.documentElement).backgroundColor;
found.ink = getComputedStyle(document.documentElement).color;
document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
document.getElementById("found").textContent = JSON.stringify(found);
</script>
"""
# before the page's own script: a failure in it must not go unseen
CATCH = '<script>window.failures = []; window.addEventListener("error", (e) => failures.push(e.message)); document.addEventListener("securitypolicyviolation", (e) => failures.push(e.violatedDirective));</script>'


def chromium(folder, *options):
    """What Chromium without a window prints. It now and then hangs while it starts: then another is started."""
    for attempt in range(3):
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / f'profile-{attempt}'}", *options,
        ]  # fmt: skip
        printed = folder / f"printed-{attempt}"
        with printed.open("wb") as file, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, timeout=300, check=True)
            return printed.read_text()
    pytest.fail("Chromium hung three times")


def browse(page, folder, *, width=1280, options=()):
    """Open the page in Chromium without a window; what the probe found."""
    file = folder / "page.html"
    file.write_text(page.replace("<main>", CATCH + "<main>").replace("</body>", PROBE + "</body>"))
    printed = chromium(folder, f"--window-size={width},900", *options, "--dump-dom", file.as_uri())
    text = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL).group(1)
    return json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return browse(report([read_run(make_run(folder / "a", layers=True))]), folder)


def test_the_page_runs_without_an_error_and_draws_every_chart(found):
    assert found["errors"] == []
    assert found["charts"] == 8
    drawn, area = found["line"]
    assert drawn == pytest.approx(area, rel=0.02)


def test_a_chart_is_read_with_the_keyboard(found):
    assert found["focusable"] == 0
    assert found["active"]
    assert found["focused"].startswith("step 240")
    assert found["home"].startswith("step 1")
    assert re.search(r"training 1\.\d+.*evaluation 0\.9875 \(step 60\)", found["home"])
    assert found["next"].startswith("step 2")
    assert found["end"].startswith("step 240")
    assert found["back"].startswith("step 228")
    assert found["escaped"] == ""
    shown, after = found["blurred"]
    assert shown.startswith("step 1")
    assert after == ""


def test_a_chart_is_read_with_the_pointer(found):
    assert found["hovered"].startswith("step 120")
    assert "skipped" in found["hovered"]
    assert found["cursor"] == "50%"
    assert found["left"] == ""


def test_the_scale_of_the_loss_is_switched_and_switched_back(found):
    (first, line, numbers), (second, other_line, other_numbers), last = found["scales"]
    assert (first, second) == ("log scale", "linear scale")
    assert (line, numbers) != (other_line, other_numbers)
    assert last == [first, line, numbers]


def test_nothing_runs_out_of_a_narrow_window(tmp_path):
    runs = [read_run(make_run(tmp_path / name, lr=lr, epochs=24)) for name, lr in (("a", 0.1), ("b", 0.03))]
    # headless Chromium makes no window narrower than 500
    page = report(runs)
    found = browse(page, tmp_path, width=500)
    assert found["width"][0] <= found["width"][1]
    assert found["wide"] == []
    assert found["scrolled"] == []
    assert found["cells"] == 0
    assert found["errors"] == []
    assert found["folds"] == ["14 earlier evaluations"] * 2


def test_at_the_width_of_a_phone_nothing_is_hidden_or_has_to_be_scrolled(tmp_path):
    runs = [read_run(make_run(tmp_path / name, lr=lr, epochs=24)) for name, lr in (("a", 0.1), ("b", 0.03))]
    file = tmp_path / "page.html"
    file.write_text(report(runs).replace("<main>", CATCH + "<main>").replace("</body>", PROBE + "</body>"))
    with contextlib.closing(Tab(tmp_path / "profile", width=390)) as tab:
        tab.open(file.as_uri())
        assert tab.value("innerWidth") == 390
        found = json.loads(tab.value("document.getElementById('found').textContent"))
    assert found["width"][0] <= found["width"][1] <= 390
    assert (found["wide"], found["scrolled"], found["cells"], found["errors"]) == ([], [], 0, [])


def test_the_page_is_dark_where_the_reader_wants_it(tmp_path, found):
    page = report([read_run(make_run(tmp_path / "a"))])
    dark = browse(page, tmp_path, options=["--blink-settings=preferredColorScheme=0"])
    assert (found["paper"], found["ink"]) == ("rgb(255, 255, 255)", "rgb(27, 36, 45)")
    assert (dark["paper"], dark["ink"]) == ("rgb(18, 24, 31)", "rgb(228, 233, 238)")


def test_the_page_can_be_printed(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(report([read_run(make_run(tmp_path / "a"))]))
    target = tmp_path / "page.pdf"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={target}", file.as_uri())
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    pages = re.findall(rb"/Type /Page\b(?!s)", data)
    assert 2 <= len(pages) <= 5
