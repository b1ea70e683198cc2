"""A page in headless Chromium: no error, no request, and what a reader touches works. Skipped without a browser."""

import json
import shutil
import time

import pytest

from maedistill.report.run_page import write_page
from tests.report.made_up import draw_sheets, made_run
from tests.report.test_pages import ODD
from tests.support.waiting import wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)
DEEP = """
const found = [], walk = (root) => root.querySelectorAll("*").forEach((one) => {
  if (one.matches(".bk-tooltip-row-value, .bk-tooltip-content td")) found.push(one.textContent.trim());
  if (one.shadowRoot) walk(one.shadowRoot);
});
walk(document); return found;"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser whose profile and cache are in a temporary folder."""
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, page, *, width: int = 1280, scheme: str = "light") -> None:
    """Open a page and wait until its plots are drawn."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    limit = time.monotonic() + 60
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() < limit, browser.get_log("browser")
        time.sleep(0.05)


def test_a_page_of_odd_names_works_and_asks_nobody(browser, tmp_path):
    evil = "</script><script>alert(1)</script>"
    runs = [made_run(tmp_path / name, license=evil, every=100, epochs=3) for name in ODD]
    for run in runs[:2]:
        draw_sheets(run, [1, 2, 3])
    page = write_page(runs, tmp_path / "page.html")
    run = browser.execute_script

    show(browser, page, width=360, scheme="dark")
    assert run("return document.documentElement.scrollWidth") == 360, "no horizontal scrolling"
    assert run("return getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    axis = "return Bokeh.documents[0].roots()[0].left[0].major_label_text_color"
    dark = run(axis)

    show(browser, page)
    assert run("return getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)" and run(axis) != dark
    shown = "return [...document.querySelectorAll('.sheet img')].filter((o) => o.checkVisibility()).map((o) => o.alt)"
    assert run(shown) == ["student sees", "teacher sees", "predicted, epoch 3", "true", "error, epoch 3"]
    run("const knob = document.querySelector('[type=range]'); knob.value = 0; knob.dispatchEvent(new Event('input'))")
    assert run(shown) == ["student sees", "teacher sees", "predicted, epoch 1", "true", "error, epoch 1"]
    assert run("return document.querySelector('.slider output').value") == "1"

    plot = "const plot = Bokeh.documents[0].roots().find((one) => one.name === 'learning rate');"
    values = "plot.y_scale.type, plot.renderers[0].glyph.x.field, plot.below[0].axis_label, plot.x_range.end"
    line = f"{plot} return [{values}]"
    before = run(line)
    run(f"{plot} plot.x_range.setv({{start: 1, end: 2}}); plot.x_range.have_updated_interactively = true")  # a zoom
    run("document.querySelector('[value=log]').click(); document.querySelector('[value=minutes]').click()")
    assert before[:3] == ["LinearScale", "epoch", "epoch"] and before[3] == pytest.approx(3, rel=0.1)
    assert run(line)[:3] == ["LogScale", "minutes", "minutes of training"]
    wait_until(lambda: run(line)[3] == pytest.approx(3 * 1251 * 1.1 / 60, rel=0.1))  # the axis follows
    run("document.querySelector('[value=linear]').click()")
    visible = f"{plot} return plot.renderers.filter((one) => one.visible).length"
    count = run(visible)
    loss = "const loss = Bokeh.documents[0].roots().find((one) => one.name.startsWith('training loss'));"
    run(f"{loss} const [one] = loss.renderers.filter((one) => one.tags[0] === 3); one.data_source.data.y.fill(70)")
    for place in range(1, 4):
        run(f"document.querySelector('[data-run=\"{place}\"]').click()")
        high = run(f"{loss} return loss.y_range.end")
        assert (high > 70) == (place < 3), "the axis is that of the visible lines"
    assert run(visible) == count / 4

    spot = run(f"""{plot} const place = document.querySelector(`[data-root-id="${{plot.id}}"]`).parentElement;
        place.scrollIntoView({{block: "center"}}); const box = place.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]""")
    for step in range(2):
        moved = {"type": "mouseMoved", "x": spot[0] + step, "y": spot[1]}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
        time.sleep(0.1)
    wait_until(lambda: ODD[0] in (texts := run(DEEP)) and any(text.startswith("0.0001") for text in texts))
    for box in range(4):
        run(f"document.querySelector('[data-run=\"{box}\"]').click()")
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": spot[0] + 3, "y": spot[1]})
    wait_until(lambda: set(ODD[1:3]) <= set(run(DEEP)))  # names are text in the hover, too

    assert not [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = {url.partition(":")[0] if url != page.as_uri() else "page" for url in asked}
    assert "page" in asked and asked <= {"page", "data", "blob", "chrome", "chrome-untrusted"}, (
        "the browser's own first tab"
    )
