"""The web page in a headless Chromium: image in, masks out, a click explains, nothing leaves."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("gradio", reason="Gradio is missing: pip install 'focalnet_det[serve]'")
pytest.importorskip("selenium", reason="Selenium is missing: pip install selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip(
        "Chromium is missing: apt-get install chromium chromium-driver", allow_module_level=True
    )

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.helpers.paths import ROOT

Train = Callable[[str], Path]
SECONDS = 120
# Masks of an untrained model may have any shape: finds one that the pointer meets in its middle.
REGION_AT_ITS_MIDDLE = """
return [...document.querySelectorAll('#view .region')].reverse().find(region => {
  const box = region.querySelector('path').getBoundingClientRect();
  const met = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return met && met.closest('.region') === region;
});
"""


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a page that another process serves."""
    code = (
        "import sys; from focalnet_det.predict.serve import App, launch\n"
        "launch(App([sys.argv[1]], device='cpu'), port=0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " at http" in line:
                yield line.split(" at ")[1].split()[0]
                break
        else:
            pytest.fail("".join(lines))
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1200"):
        options.add_argument(switch)
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    try:
        yield driver
    finally:
        driver.quit()


def text_of(driver: Any, name: str) -> str:
    return driver.find_element(By.ID, name).text


@pytest.mark.slow
def test_drop_hover_click_and_a_wrong_file(trained: Train, shapes: Path, tmp_path: Path) -> None:
    image = sorted((shapes / "images/val").iterdir())[0]
    wrong = tmp_path / "notes.png"
    wrong.write_text("no picture")
    with served(trained("mask_rcnn")) as address, browser() as driver:
        assert address.startswith("http://127.0.0.1:")
        wait = WebDriverWait(driver, SECONDS)
        driver.get(address)
        upload = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#image input[type=file]"))
        upload.send_keys(str(image))
        # An untrained model is sure of nothing.
        wait.until(lambda d: "at this threshold" in text_of(d, "message"))
        number = driver.find_element(By.CSS_SELECTOR, "#threshold input[type=number]")
        number.clear()
        number.send_keys("0.02\t")
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#view .region"))
        top = driver.execute_script(REGION_AT_ITS_MIDDLE)
        name = top.find_element(By.TAG_NAME, "title").get_attribute("textContent")
        label = top.find_element(By.TAG_NAME, "text")
        assert label.value_of_css_property("opacity") == "0"
        ActionChains(driver).move_to_element(top.find_element(By.TAG_NAME, "path")).perform()
        wait.until(lambda d: label.value_of_css_property("opacity") == "1")
        assert label.text == name

        top.find_element(By.TAG_NAME, "path").click()
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#modulation img"))
        numbers = driver.find_element(By.CSS_SELECTOR, "#numbers textarea").get_attribute("value")
        assert "inside the box" in numbers
        assert len(driver.find_elements(By.CSS_SELECTOR, "#view .chosen")) == 1
        driver.save_screenshot(str(tmp_path / "page.png"))

        # The page asked this machine for everything.
        asked = driver.execute_script("return performance.getEntries().map(e => e.name)")
        hosts = {name.split("/")[2] for name in asked if name.startswith(("http:", "https:"))}
        assert hosts == {address.split("/")[2]}

        remove = driver.find_elements(By.CSS_SELECTOR, "#image button[aria-label*=lear]")
        if remove:
            remove[0].click()
            time.sleep(1)
        upload = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#image input[type=file]"))
        upload.send_keys(str(wrong))
        wait.until(lambda d: "Cannot read image" in text_of(d, "message"))
        assert "notes.png" in text_of(driver, "message")
        assert not driver.find_elements(By.CSS_SELECTOR, "#view .region")
