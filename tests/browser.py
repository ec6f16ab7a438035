"""A headless Chromium as people have it: what a page says in its console, asks of the network, and how wide it is."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")


@contextlib.contextmanager
def browser(width: int, height: int = 900) -> Iterator[Any]:
    """A driver of selenium whose pages are `width` CSS pixels wide."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
    finally:
        driver.quit()


def errors(driver: Any) -> list[str]:
    """What the console says in red since the last call."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def asked(driver: Any) -> list[str]:
    """Addresses that the page asked for since the last call, other than its own parts."""
    messages = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    found = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [url for url in found if not url.startswith(("data:", "blob:"))]


def too_wide(driver: Any) -> list[str]:
    """Elements that stick out of the window and that no box of their own scrolls; empty: no overflow."""
    script = """
        const wide = document.documentElement.clientWidth, found = [];
        if (document.documentElement.scrollWidth > wide) found.push("page: " + document.documentElement.scrollWidth);
        for (const one of document.body.querySelectorAll("*")) {
            if (one.closest(".scroll, pre, details:not([open]), svg")) continue;
            const box = one.getBoundingClientRect();
            if (box.width && box.right > wide + 1) found.push(one.tagName + "." + one.className + ": " + box.right);
        }
        return found;"""
    return list(driver.execute_script(script))


def shoot(driver: Any, path: Path, whole: bool = True) -> None:
    """A PNG of the page, of all its length or of the window."""
    import base64

    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip} if whole else {}
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


def on_paper(driver: Any) -> bytes:
    """The page as a PDF on A4."""
    import base64

    options = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": False}
    return base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", options)["data"])
