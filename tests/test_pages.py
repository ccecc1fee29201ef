# SPDX-License-Identifier: Apache-2.0
"""Pages in a real headless Chromium, whose network leads nowhere: they draw, tell, copy, print, and ask for nothing.

`make check` installs Debian's chromium and chromium-driver where it may; elsewhere these are skipped without them.
"""

import base64
import io
import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import darekit as dk
from darekit.analysis.inspection import inspect
from darekit.analysis.records import write_inspection
from darekit.recipe import read_recipe
from result_folders import write_evaluation, write_sweep
from search_folders import write_search

pytest.importorskip("plotly")
webdriver = pytest.importorskip("selenium.webdriver")
By = pytest.importorskip("selenium.webdriver.common.by").By
Select = pytest.importorskip("selenium.webdriver.support.select").Select
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

pytestmark = pytest.mark.check

PATIENCE = 60  # seconds; machines that run tests are busy
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = '</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that no name server answers."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = "no Chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("DAREKIT_BROWSER") == "required":  # `make check` as root on Debian, which installs them
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in (
        "--headless=new", "--no-first-run", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(PATIENCE)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, llamas):
    """A page of each kind, by its kind."""
    place = tmp_path_factory.mktemp("pages")
    write_inspection(inspect(llamas.path / "base", llamas.path / "m0", llamas.path / "m1"), place / "inspection")
    folders = {
        "sweep": write_sweep(place / "sweep"),
        "search": write_search(place / "search", 60),
        "goals": write_search(place / "goals", 40, ("math/exact_match", "chat/exact_match")),
        "evaluation": write_evaluation(place / "evaluation"),
        "inspection": place / "inspection",
    }
    return {kind: dk.report(folder).page for kind, folder in folders.items()}


@pytest.fixture
def show(browser):
    """Open a page -> the browser; afterwards nothing was logged that is an error, and nothing was asked of anybody."""
    opened, logged, messages = [], [], []

    def collect():
        logged.extend(browser.get_log("browser"))
        messages.extend(json.loads(line["message"])["message"] for line in browser.get_log("performance"))

    def opening(page, *, width=1280, theme="light", before=""):
        collect() if opened else [browser.get_log(kind) for kind in ("browser", "performance")]
        browser.get("about:blank")
        browser.execute_cdp_cmd("Page.bringToFront", {})
        browser.execute_cdp_cmd("Browser.grantPermissions", {
            "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})  # fmt: skip
        browser.execute_cdp_cmd(
            "Emulation.setFocusEmulationEnabled", {"enabled": True}
        )  # who has it differs by version
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": theme}]})  # fmt: skip
        made = browser.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument", {"source": f"try {{ localStorage.clear() }} catch {{}} {before}"}
        )
        browser.get(page.as_uri())
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": made["identifier"]})
        opened.append(page.as_uri())
        until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "true")
        return browser

    yield opening
    collect()
    assert not [line["message"] for line in logged if line["level"] in ("SEVERE", "WARNING")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {
        url for url in asked if not url.startswith(("data:", "blob:", "about:", "chrome:", "chrome-untrusted:"))
    } == {*opened}


def until(what):
    """Wait for what a page does by itself."""
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)
    return found


def screenshot(browser, clip=None):
    """(height, width, 3) of what is seen, or of a part of the page."""
    image = pytest.importorskip("PIL.Image")
    more = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
    raw = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **more})["data"]
    return np.asarray(image.open(io.BytesIO(base64.b64decode(raw))).convert("RGB")).astype(int)


def box(browser, css, at=0):
    """Where an element is on the page."""
    return browser.execute_script(
        "const r = document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect();"
        "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}", css, at,
    )  # fmt: skip


def point(browser, css, at=0):
    """Move the pointer onto an element."""
    element = browser.find_elements(By.CSS_SELECTOR, css)[at]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    time.sleep(0.2)
    place = browser.execute_script(
        "const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]", element
    )
    actions = ActionChains(browser, duration=20)
    actions.w3c_actions.pointer_action.move_to_location(round(place[0]) - 3, round(place[1]) - 3)
    actions.w3c_actions.pointer_action.move_to_location(round(place[0]), round(place[1]))
    actions.perform()
    # plotly looks at moves every 50 ms; one that it looks at while the button is down makes it forget what to click.
    time.sleep(0.2)


def pasted(browser):
    """What Ctrl+V gives."""
    browser.execute_script(
        "const t = document.createElement('textarea'); t.id = 'pasted'; document.body.append(t); t.focus()"
    )
    area = browser.find_element(By.ID, "pasted")
    area.send_keys(Keys.CONTROL, "v")
    text = area.get_property("value")
    browser.execute_script("arguments[0].remove()", area)
    return text


def hovered(browser):
    return until(lambda: browser.find_element(By.ID, "tip").text)


KINDS = ("sweep", "search", "goals", "evaluation", "inspection")


@pytest.mark.parametrize("kind", KINDS)
def test_every_plot_is_drawn(kind, pages, show):
    browser = show(pages[kind])
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.view:not([hidden]) .chart')].map(c => ({"
        "marks: c.querySelectorAll('.point, path.js-line, .hm image').length,"
        "titles: [...c.querySelectorAll('.xtitle, .ytitle')].map(t => t.textContent),"
        "ticks: c.querySelectorAll('.xtick text, .ytick text').length,"
        "width: c.querySelector('svg.main-svg').getBoundingClientRect().width,"
        "parent: c.parentElement.clientWidth, name: c.getAttribute('aria-label')}))"
    )
    assert charts
    for chart in charts:
        assert chart["marks"] > 0, chart
        assert chart["ticks"] > 1 or "Parallel" in chart["name"], chart
        assert chart["width"] <= chart["parent"] + 1 or "Parallel" in chart["name"], chart
    # Whatever else may be chosen is drawn when it is.
    for at in range(len(browser.find_elements(By.CSS_SELECTOR, "select[data-views]"))):
        select = Select(browser.find_elements(By.CSS_SELECTOR, "select[data-views]")[at])
        select.select_by_index(len(select.options) - 1)
        figure = "document.querySelectorAll('select[data-views]')[arguments[0]].closest('figure')"
        assert until(lambda at=at, figure=figure: browser.execute_script(
            f"return {figure}.querySelectorAll('.view:not([hidden]) svg.main-svg').length", at
        ))  # fmt: skip


@pytest.mark.parametrize("kind", ["sweep", "search", "evaluation"])
def test_the_pointer_shows_a_recipe_and_a_click_copies_it(kind, pages, show):
    browser = show(pages[kind])
    point(browser, ".scatterlayer .points path.point")
    said = hovered(browser)
    assert "merge_method:" in said.replace("\N{NO-BREAK SPACE}", " ") and re.search(r"\d\.\d+", said)
    ActionChains(browser).click().perform()
    until(lambda: browser.find_element(By.ID, "told").text.startswith("Copied the recipe of "))
    text = pasted(browser)
    recipe = read_recipe(yaml.safe_load(text))
    assert recipe.models and recipe.merge_method in said


def test_a_long_recipe_is_shown_beside_a_small_plot(tmp_path, show):
    """plotly's own text at the pointer vanishes where it is taller than the plot."""
    folder = write_evaluation(tmp_path / "e")
    asked = json.loads((folder / "asked.json").read_text())
    weights = [{"filter": f"layers.{i}.*", "value": i / 10} for i in range(22)]
    for one in asked["models"]:
        one["recipe"]["models"] = [{"model": "math", "parameters": {"weight": weights}}]
    (folder / "asked.json").write_text(json.dumps(asked))
    for width in (1280, 390):
        browser = show(dk.report(folder).page, width=width)
        chart = box(browser, ".chart")
        point(browser, ".scatterlayer .points path.point", 1)
        assert "layers.21.*" in hovered(browser)
        seen = browser.execute_script(
            "const r = document.getElementById('tip').getBoundingClientRect();"
            "return [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom, r.height]"
        )
        assert min(seen[:4]) >= 0 and seen[4] > chart["height"]


def test_a_click_on_a_square_copies_its_tensor(pages, show):
    browser = show(pages["inspection"])
    point(browser, ".chart .hm image")
    said = hovered(browser)
    assert "model.layers." in said and "p_max" in said
    ActionChains(browser).click().perform()
    until(lambda: browser.find_element(By.ID, "told").text.startswith("Copied the name of "))
    assert pasted(browser) in said


@pytest.mark.parametrize("before", [
    "Object.defineProperty(navigator, 'clipboard', {value: undefined});",
    "navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'));",
])  # fmt: skip
def test_copying_without_the_clipboard_of_scripts(before, pages, show):
    browser = show(pages["evaluation"], before=before)
    button = browser.find_elements(By.CSS_SELECTOR, "button[data-copy]")[1]
    ActionChains(browser).scroll_to_element(button).perform()
    button.click()
    until(lambda: browser.find_element(By.ID, "told").text.startswith("Copied the recipe of math"))
    assert read_recipe(yaml.safe_load(pasted(browser))).models[0].model == "math"


def test_a_browser_that_forbids_copying_shows_the_recipe(pages, show):
    browser = show(pages["evaluation"], before=(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined}); document.execCommand = () => false;"
    ))  # fmt: skip
    browser.find_elements(By.CSS_SELECTOR, "button[data-copy]")[1].click()
    until(lambda: "merge_method" in browser.find_element(By.ID, "told").text)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screens_are_not_blank_and_not_wider_than_the_window(theme, width, pages, show):
    for kind in ("sweep", "search"):
        browser = show(pages[kind], width=width, theme=theme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        seen = screenshot(browser)
        paper = seen[-1, 2]
        assert (paper > 230).all() if theme == "light" else (paper < 60).all()
        share = (np.abs(seen - paper).sum(-1) > 60).mean()
        assert 0.01 < share < 0.6  # there is text, and there is room around it
        place = box(browser, ".view:not([hidden]) .chart")
        chart = screenshot(browser, place)
        ground = chart[2, 2]
        coloured = chart.max(-1) - chart.min(-1) > 60
        assert 0.0005 < coloured.mean() < 0.5  # marks in colours
        assert (np.abs(chart - ground).sum(-1) > 60)[-60:].any()  # words under the axis
        assert (np.abs(chart - ground).sum(-1) > 60)[:, :50].any()  # numbers beside it
        assert (ground > 230).all() if theme == "light" else (ground < 60).all()


def test_the_theme_can_be_changed_and_plots_follow(pages, show):
    browser = show(pages["sweep"])
    place = box(browser, ".chart")
    light = screenshot(browser, place)
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    colour = browser.execute_script(
        "return getComputedStyle(document.documentElement).getPropertyValue('--soft')"
    ).strip()
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = "return getComputedStyle(document.querySelector('.chart .xtitle')).fill"
    assert until(lambda: browser.execute_script(fill) == f"rgb({red}, {green}, {blue})")
    dark = screenshot(browser, place)
    assert light[2, 2].mean() > 230 and dark[2, 2].mean() < 60
    assert browser.find_element(By.ID, "theme").text.endswith("Light")


def test_everything_can_be_reached_by_the_keyboard(pages, show):
    browser = show(pages["evaluation"])
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.text == "Skip to the content" and first.is_displayed() and first.rect["x"] >= 0
    visited, outlines = set(), []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        what = browser.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, e.id || e.className || '', s.outlineStyle + s.outlineWidth, e.dataset.copy || '']"
        )
        if what[0] == "BODY":
            break
        visited.add((what[0], what[1]))
        if not what[1].startswith("modebar"):
            outlines.append(what[2])
    assert {("BUTTON", "theme"), ("BUTTON", "copy"), ("DIV", "scroll")} <= visited
    assert any(tag == "SELECT" for tag, _ in visited) and any(tag == "A" for tag, _ in visited)
    assert outlines and all(outline != "none0px" for outline in outlines)
    browser.execute_script("arguments[0].focus()", first)  # it is off the page while it has no focus
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "main"
    button = browser.find_elements(By.CSS_SELECTOR, "button.copy")[2]
    button.send_keys(Keys.ENTER)
    assert until(lambda: browser.find_element(By.ID, "told").text) == "Copied the recipe of merged"
    assert browser.find_element(By.ID, "told").get_attribute("aria-live") == "polite"


def test_what_screen_readers_get(pages, show):
    browser = show(pages["sweep"])
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("banner", "navigation", "main", "contentinfo", "table", "status"):
        assert role in roles, role
    assert {"Verdict", "Curves", "Every setting"} <= {*roles["region"]}
    assert all(roles["image"]) and any("Bars are one standard error" in name for name in roles["image"])
    assert all(roles["button"]) and all(roles["combobox"]) and all(roles["table"])
    assert roles["heading"][:2] == ["sweep", "What was asked"]


def test_a_click_on_a_heading_sorts(pages, show):
    browser = show(pages["evaluation"])
    cells = "return [...document.querySelectorAll('tbody tr')].map(r => r.cells[1].textContent)"
    button = browser.find_elements(By.CSS_SELECTOR, "button[data-sort]")[1]
    button.click()
    down = browser.execute_script(cells)
    assert down == sorted(down, reverse=True)
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    button.click()
    assert browser.execute_script(cells) == down[::-1]


def test_a_legend_hides_what_it_names(pages, show):
    browser = show(pages["sweep"])
    lines = "return document.querySelector('.chart').querySelectorAll('.scatterlayer .trace').length"
    there = browser.execute_script(lines)
    key = browser.find_element(By.CSS_SELECTOR, ".key[data-name='TIES']")
    key.click()
    assert until(lambda: browser.execute_script(lines) == there - 1) and key.get_attribute("aria-pressed") == "false"
    key.click()
    assert until(lambda: browser.execute_script(lines) == there)


WIDTHS = "return [...document.querySelectorAll('.view:not([hidden]) .chart svg.main-svg')].map(x => x.clientWidth)"
# Notes how wide plots are while the page is printed.
ON_PAPER = """
const found = {widths: []};
addEventListener("beforeprint", () => {
  found.widths = [...document.querySelectorAll(".view:not([hidden]) .chart svg.main-svg")].map((x) => x.clientWidth);
});
window.printed = found;
"""


@pytest.mark.parametrize("kind", ["sweep", "search", "inspection"])
def test_it_prints(kind, pages, show):
    browser = show(pages[kind], theme="dark")
    before = browser.execute_script(WIDTHS)
    browser.execute_script(ON_PAPER)
    raw = browser.execute_cdp_cmd(
        "Page.printToPDF", {"printBackground": False, "paperWidth": 8.27, "paperHeight": 11.69}
    )
    pdf = base64.b64decode(raw["data"])
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    # On paper everything is light, and the screen is dark again afterwards.
    assert not browser.execute_script("return document.documentElement.dataset.theme")
    # Plots are as wide as paper, whatever the window, and as wide as the window again.
    on_paper = browser.execute_script("return window.printed.widths")
    assert len(on_paper) == len(before) and max(on_paper) <= 660 < max(before)
    until(lambda: browser.execute_script(WIDTHS) == before)
    assert screenshot(browser)[-1, 2].mean() < 60


def test_hostile_names_run_nothing(tmp_path, show):
    def spoil(lines):
        for line in lines[5:]:
            line["recipe"]["models"][0]["model"] = HOSTILE
            line["params"] = {HOSTILE if k == "merge_method" else k: v for k, v in line["params"].items()}

    page = dk.report(write_search(tmp_path / "search", 20, (HOSTILE,), change=spoil)).page
    browser = show(page)
    assert browser.find_elements(By.TAG_NAME, "img") == [] and browser.title == "abilities · Search · darekit"
    assert HOSTILE in browser.find_element(By.TAG_NAME, "main").text
    point(browser, ".scatterlayer .points path.point")
    assert "onerror" in hovered(browser) and browser.find_elements(By.TAG_NAME, "img") == []


def test_a_script_that_got_in_could_not_run(tmp_path, pages, browser):
    """The policy in the head forbids every script but the page's two: shown on a page that is spoiled on purpose."""
    spoiled = tmp_path / "spoiled.html"
    text = pages["evaluation"].read_text()
    spoiled.write_text(text.replace("<h1>", "<script>document.title = 'ran'</script><h1>"))
    assert spoiled.read_text() != text
    browser.get(spoiled.as_uri())
    assert browser.title != "ran"
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


@pytest.mark.parametrize("make", ["empty", "one", "unfinished", "failed"])
def test_folders_with_little_in_them(make, tmp_path, show):
    from result_folders import SWEEP, failed

    seen = []
    made = SimpleNamespace(
        empty=lambda: write_sweep(tmp_path / "s", keep=lambda cell: False),
        one=lambda: write_sweep(tmp_path / "s", {**SWEEP, "axes": {"sparsify.drop_rate": [0]}, "seeds": []}),
        unfinished=lambda: write_search(tmp_path / "s", 3, finished=False),
        failed=lambda: write_sweep(tmp_path / "s", change=lambda cell, one: seen.append(cell) or failed("NaN")),
    )
    browser = show(dk.report(getattr(made, make)()).page)
    said = browser.find_element(By.TAG_NAME, "main").text
    assert {"empty": "Not finished: 0 of", "one": "Validation chooses", "unfinished": "Not finished: 3 trials",
            "failed": f"All {len(seen)} cells that ran have failed"}[make] in said  # fmt: skip
