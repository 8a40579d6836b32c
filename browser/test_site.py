"""The site and JupyterLab in a real browser: `make test-browser`, which installs Chromium where there is none."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import expect, sync_playwright

from faceadv.course.run import KERNEL_ENVIRONMENT
from faceadv.store.paths import PROJECT

SITE = PROJECT / "build" / "site"
pytestmark = pytest.mark.filterwarnings("ignore")  # of servers and browsers


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page, from disk and without a network; what went wrong in it is in ``page.problems``."""
    page = browser.new_page()
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.context.set_offline(True)
    page.set_default_timeout(60_000)
    yield page
    page.close()


@pytest.fixture(scope="module", autouse=True)
def site():
    if not (SITE / "index.html").exists():
        pytest.fail("Build the site first: make site.")


def address(name):
    return (SITE / name).as_uri()


PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)


def ours(problems):
    """Problems other than a request for the network, which a page from disk does without."""
    return [problem for problem in problems if "ERR_INTERNET_DISCONNECTED" not in problem]


def test_every_page_loads_without_an_error(page):
    assert len(PAGES) > 40
    for name in PAGES:
        page.goto(address(name))
        assert ours(page.problems) == [], name


def test_a_phone_does_not_scroll_sideways(browser):
    page = browser.new_page(viewport={"width": 375, "height": 740})
    for name in PAGES:
        page.goto(address(name))
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 376, f"{name} is {wide} pixels wide"
    page.close()


def test_search_finds_resgn(page):
    page.goto(address("search.html") + "?q=ResGN")
    page.wait_for_selector("#search-results li a")
    assert "03_resgn" in " ".join(
        link.get_attribute("href") for link in page.query_selector_all("#search-results li a")
    )


def test_equations_are_typeset(page):
    page.goto(address("notebooks/02_deidentification.html"))
    page.wait_for_selector("mjx-container mjx-math", state="attached")
    assert page.locator("mjx-container").count() > 10
    assert page.locator("mjx-merror").count() == 0
    assert ours(page.problems) == []


def test_the_chart_reacts(page):
    page.goto(address("explorer.html"))
    page.wait_for_selector("#chart .plot-container")
    expect(page.locator("#chart .gtitle")).to_contain_text("static attacks")
    before = page.locator("#numbers").inner_html()
    page.select_option("#view", "attack")
    page.select_option("#attack", "A3GN")
    expect(page.locator("#chart .gtitle")).to_contain_text("A3GN")
    assert page.locator("#numbers").inner_html() != before
    page.select_option("#view", "curve")
    page.select_option("#defence", "jpeg")
    expect(page.locator("#chart .gtitle")).to_contain_text("against the budget")
    assert page.locator("#chart .scatterlayer .trace").count() == 4  # two worst cases, and two ways of PGD
    for view, budget in (("tradeoff", "1"), ("cost", "0.5")):
        page.select_option("#view", view)
        page.select_option("#budget", budget)
        expect(page.locator("#chart .gtitle")).to_contain_text(f"worst case at {budget}/255")
        assert page.locator("#chart .scatterlayer .point").count() >= 10
        page.select_option("#attack", "PGD")
        expect(page.locator("#chart .gtitle")).to_contain_text("PGD, static")
        page.select_option("#attack", "worst")
    for view in page.locator("#view option").evaluate_all("all => all.map(one => one.value)"):
        page.select_option("#view", view)
        for key in ("profile", "recogniser", "goal", "attack", "defence", "budget"):
            if page.locator(f"#{key}").is_visible():
                for value in page.locator(f"#{key} option").evaluate_all("all => all.map(one => one.value)"):
                    page.select_option(f"#{key}", value)
                page.select_option(f"#{key}", index=0)
    assert ours(page.problems) == []


def test_there_is_a_dark_mode(page):
    page.emulate_media(color_scheme="dark")
    page.goto(address("index.html"))
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 80


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks: a function from a path in it to its address."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(PROJECT / "notebooks", root / "notebooks")
    # otherwise cells out of sight are not in the page, and a question about news is
    settings = {"notebook-extension/tracker": {"windowingMode": "none"}}
    settings["apputils-extension/notification"] = {"fetchNews": "false", "checkForUpdates": False}
    for name, values in settings.items():
        path = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--no-browser", "--allow-root", f"--notebook-dir={root}"]
    # whoever else is on this machine must not run code here; in the environment, as all can read a command line
    token = secrets.token_urlsafe()
    with open(root / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ
            | KERNEL_ENVIRONMENT
            | {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "JUPYTER_TOKEN": token},
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/api/status?token={token}")
            break
        except OSError:
            time.sleep(0.5)
    yield lambda path: f"{url}/{path}?reset&token={token}"
    server.terminate()
    server.wait()


def test_jupyterlab_asks_strangers_for_a_token(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(lab("api/contents").split("?")[0])
    assert urllib.request.urlopen(lab("api/contents")).status == 200


def test_notebook_01_runs_in_jupyterlab_and_its_slider_moves(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(lab("lab/tree/notebooks/01_attacks.ipynb"))
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    expect(idle).to_have_count(1)
    page.click('.lm-MenuBar-itemLabel:text-is("Edit")')
    page.click('.lm-Menu-itemLabel:text-is("Clear Outputs of All Cells")')
    expect(page.locator(".jp-Notebook .jp-OutputArea-output")).to_have_count(0)
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    # to the end: every cell has a number, none failed
    last = cells.last.locator(".jp-InputPrompt")
    expect(last).to_have_text(re.compile(r"\[\d+\]"), timeout=500_000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    slider = page.locator(".widget-slider")
    slider.scroll_into_view_if_needed()
    image = page.locator(".widget-image")
    before = image.get_attribute("src")
    slider.locator(".noUi-handle").press("ArrowRight")
    expect(image).not_to_have_attribute("src", before)
    page.close()
