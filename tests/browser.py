"""A headless Chromium: what a page logs to its console, which URLs it requests, and how wide it is."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from typing import Any

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")


@contextlib.contextmanager
def browser(width: int, height: int = 900) -> Iterator[Any]:
    """A driver of selenium whose pages are `width` CSS pixels wide."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
    finally:
        driver.quit()


def console_errors(driver: Any) -> list[str]:
    """Errors and warnings of the console since the last call."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def requested_urls(driver: Any) -> list[str]:
    """URLs that the page requested since the last call, except data and blob URLs."""
    events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


def overflowing_elements(driver: Any) -> list[str]:
    """Elements that reach beyond the right edge of the window, or of a table's box. Only pictures may be scrolled."""
    script = """
        const root = document.documentElement, wide = root.clientWidth, overflow = [];
        if (root.scrollWidth > wide) overflow.push("page: " + root.scrollWidth);
        for (const element of document.body.querySelectorAll("*")) {
            if (element.closest(".picture, .wide, details:not([open]), svg")) continue;
            const box = element.getBoundingClientRect();
            if (box.width && box.right > wide + 1)
                overflow.push(element.tagName + "." + element.className + ": " + box.right);
        }
        return overflow;"""
    return list(driver.execute_script(script))


def colliding_labels(driver: Any) -> list[str]:
    """Texts of a chart that overlap by more than a pixel or leave the chart, and legends with a scroll bar."""
    script = """
        const collisions = [];
        for (const chart of document.querySelectorAll("[id^=chart-]")) {
            const frame = chart.getBoundingClientRect();
            const texts = [...chart.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
            const shown = texts.filter(([_, box]) => box.width && box.height);
            shown.forEach(([text, box], k) => {
                if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
                    collisions.push(chart.id + ": " + text + " leaves the chart");
                for (const [other, next] of shown.slice(k + 1))
                    if (Math.min(box.right, next.right) - Math.max(box.left, next.left) > 1
                        && Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top) > 1)
                        collisions.push(chart.id + ": " + text + " on " + other);
            });
            for (const bar of chart.querySelectorAll(".legend .scrollbar"))
                if (bar.getBoundingClientRect().height) collisions.push(chart.id + ": the legend scrolls");
        }
        return collisions;"""
    return list(driver.execute_script(script))


def print_to_pdf(driver: Any) -> bytes:
    """The page as a PDF on A4."""
    import base64

    options = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": False}
    return base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", options)["data"])
