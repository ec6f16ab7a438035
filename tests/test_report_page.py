"""The report in a real browser: at the width of a phone and of a desktop, printed, in dark mode, without a network.

Run alone: pytest tests/test_report_page.py (needs chromium and chromium-driver of Debian)
"""

import re
import shutil

import pytest

from dmat import files
from tests import browser, forked
from tests.projects import Project

CHARTS = {"accuracies", "validation_robust", "train_robust", "validation_clean", "loss", "learning_rate",
          "against_epsilon", "hours"}  # fmt: skip

needs_browser = pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="there is no Chromium here")


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory):
    """A project with the one arm that has run, and its report."""
    folder = tmp_path_factory.mktemp("reported") / "project"
    shutil.copytree(finished.folder, folder)
    project = Project(folder, finished.params | {"arms": {"generated": finished.params["arms"]["generated"]}})
    project.write({"write_report": {"baseline": "generated", "title": "A title with <b>, & and </script>"}})
    code, text = forked.Command(folder, "write-report").wait()
    assert code == 0, text
    return project


@pytest.fixture(scope="module")
def page(project):
    return project.folder / "artifacts/write_report/report/report.html"


def test_every_number_is_traced_to_a_file_with_its_hash(project, page):
    rows = re.findall(r"<tr><td><code>(artifacts/\S+?)</code></td><td><code>(\w{16})</code>", page.read_text())
    assert len(rows) > 15
    for path, digest in rows:
        assert files.sha256(project.folder / path).startswith(digest)
    assert {path.split("/")[1] for path, _ in rows} >= {"evaluate_robust", "train_robust", "metrics", "provenance"}


def test_operations_of_all_parts_are_counted(project, page):
    """Those of the generator and its images come from what these stages counted; a training pass costs three."""
    flops = files.read_json(page.parent / "comparison.json")["costs"]["generated"]["flops"]
    metrics = project.folder / "artifacts/metrics"
    trained = files.read_json(metrics / "train_diffusion/edm.json")
    assert flops["generator"] == trained["training_flops"] == 3 * trained["forward_flops"] * 1024
    sampled = files.read_json(metrics / "generate_images/edm18.json")["sampling_flops"]
    assert flops["images"] == sampled == 100 * 5 * trained["forward_flops"]  # three steps of Heun
    assert flops["training"] > 0
    assert page.read_text().count("FLOP</td>") == 5


def test_the_same_files_give_the_same_page(project, page):
    before = page.read_bytes()
    code, text = forked.Command(project.folder, "write-report", "--fresh").wait()
    assert code == 0, text
    assert page.read_bytes() == before


@needs_browser
@pytest.mark.parametrize("width", [390, 960])  # a phone; the narrowest with whole tables and charts side by side
def test_it_opens_without_errors_requests_or_overflow(page, width):
    with browser.browser(width) as driver:
        driver.get(page.as_uri())
        assert browser.console_errors(driver) == []
        assert browser.requested_urls(driver) == [page.as_uri()]
        driver.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert browser.overflowing_elements(driver) == []
        assert browser.colliding_labels(driver) == []
        charts = driver.execute_script(
            "return [...document.querySelectorAll('[id^=chart-]')].map(e => [e.id.slice(6), "
            "e.querySelectorAll('.main-svg').length, e.getBoundingClientRect().width])"
        )
        assert {name for name, _, _ in charts} == CHARTS
        assert all(pictures > 0 and 250 < wide <= width for _, pictures, wide in charts), charts
        images = driver.execute_script("return [...document.images].map(e => e.naturalWidth)")
        assert len(images) >= 8
        assert min(images) > 0
        assert driver.title == "A title with <b>, & and </script>"
        assert driver.execute_script("return document.querySelector('h1').textContent") == driver.title


@needs_browser
def test_overflow_is_detected(page, tmp_path):
    """Shows that the test above can fail."""
    spoiled = tmp_path / "report.html"
    text = page.read_text().replace("<h2 ", '<p style="width: 500px">wide</p><img src="x.png"><h2 ', 1)
    text = text.replace('table.classList.add("cards")', "")
    spoiled.write_text(text.replace('"size": 13}', '"size": 50}'))
    with browser.browser(390) as driver:
        driver.get(spoiled.as_uri())
        overflow = browser.overflowing_elements(driver)
        assert {entry.partition(".")[0] for entry in overflow} >= {"P", "TD"}
        assert browser.colliding_labels(driver)
        assert browser.console_errors(driver)
        assert len(browser.requested_urls(driver)) == 2


@needs_browser
def test_charts_fit_the_printed_page_and_come_back(page):
    with browser.browser(1440) as driver:
        driver.get(page.as_uri())
        pdf = browser.print_to_pdf(driver)
        assert pdf.startswith(b"%PDF")
        assert len(pdf) > 50_000
        script = "window.dispatchEvent(new Event('beforeprint')); return "
        width = "document.querySelector('#chart-hours .main-svg').getBoundingClientRect().width"
        assert driver.execute_script(script + width) == 640
        assert driver.execute_script("window.dispatchEvent(new Event('afterprint')); return " + width) > 900


@needs_browser
def test_text_is_light_in_dark_mode(page):
    with browser.browser(800) as driver:
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
        driver.get(page.as_uri())
        colours = driver.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "document.querySelector('#chart-hours .xtitle').style.fill]"
        )
        assert colours == ["rgb(22, 25, 28)", "rgb(233, 236, 239)", "rgb(233, 236, 239)"]
