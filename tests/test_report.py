"""The report page: names that hold HTML, what lies where, others' files, and a look with a real browser."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from conftest import output_of
from test_evaluation import options
from utils.errors import InputError
from utils.report import Report

HOSTILE = "<img src=x onerror=alert(1)>.png"


def make(folder: Path) -> Path:
    page, generator = Report(folder), np.random.default_rng(0)
    for number, name in enumerate(("a.png", HOSTILE, "50% #1?.webp", "</script>{{data}}.png")):
        pictures = generator.random((3, 30, 40, 3), dtype=np.float32)
        path = folder / "a:b" / name.replace("/", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pictures[1] * 255).astype(np.uint8)).save(path)
        scores = {"psnr": 20.0}, {"psnr": float("inf") if number == 2 else 30.0 - number}
        page.add("a:b", name, path, pictures if number else (*pictures[:2], None), scores)
    table = [["set", "dB"], [HOSTILE, "9.5"], ["ours", "10.5"], ["late", "-"]]
    return page.write(HOSTILE, [table], ["x < y & z"])


def test_names_are_text_and_every_picture_is_there(tmp_path):
    text = make(tmp_path).read_text("utf-8")
    assert HOSTILE not in text and text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)        # no network
    entries = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert [entry["name"] for entry in entries][1] == HOSTILE
    assert "clean" not in entries[0] and "clean" in entries[1] and entries[2]["scores"][1] == {"psnr": 999.0}
    for entry in entries:
        assert entry["size"] == [40, 30]
        for kind in {"restored", "input", "clean", "thumbnail"} & entry.keys():
            assert ":" not in entry[kind] and Image.open(tmp_path / unquote(entry[kind])).size == (40, 30)


@pytest.mark.parametrize("taken", ["index.html", "report/holiday.jpg"])
def test_files_of_the_user_stay(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="^--report: .* is there"):
        Report(tmp_path, "--report")
    assert (tmp_path / taken).read_text() == "mine"


def test_test_sets(tmp_path, checkpoint):
    opt = options(tmp_path, checkpoint)
    for _ in range(2):                                      # the second over the first one's page
        assert "results/table/index.html" in output_of("test.py", "--opt", opt).splitlines()[-1]
    assert (tmp_path / "results/table/index.html").read_text("utf-8").count('"thumbnail"') == 3 + 2 + 3


def test_in_a_browser(tmp_path):
    """Needs pip install playwright and a Chromium: nothing is reported, no network; keys, slider, sorting."""
    sync_api, browser = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not browser:
        pytest.skip("no chromium")
    address, trouble, requests = make(tmp_path).as_uri(), [], []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 400, "height": 800})
        for event in ("console", "pageerror", "dialog", "requestfailed"):
            page.on(event, lambda what: trouble.append(str(what)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        names = page.locator(".card b")
        assert names.nth(0).inner_text().endswith("</script>{{data}}.png")      # 27 dB, the worst
        page.select_option("#order", "psnr -1")
        assert names.nth(0).inner_text().endswith(".webp")                       # equal, the best
        for order in (["ours", HOSTILE, "late"], [HOSTILE, "ours", "late"]):
            page.locator("thead button").nth(1).click()
            assert page.locator("tbody th").all_inner_texts() == order

        page.locator(".card").nth(0).press("Enter")
        for key in ("ArrowRight", "+", "g", "ArrowDown", "+", "+"):
            page.keyboard.press(key)
        page.wait_for_timeout(300)
        assert page.locator("#slider").input_value() == "52"
        layers = page.locator(".layer img")
        left, right = (layers.nth(side).evaluate("image => image.style.transform") for side in (0, 1))
        assert left == right and "scale(2.25)" in left                          # in register
        page.keyboard.press("Escape")
        assert not page.locator("#viewer").evaluate("dialog => dialog.open")
        chromium.close()
    assert not trouble and all(url.startswith(("file:", "data:")) for url in requests)
