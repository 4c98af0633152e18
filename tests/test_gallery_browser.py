"""The gallery page in a real browser: no network, a dialog worked by mouse and keys, and nothing foreign runs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.gallery import Picture, command_of, describe, gallery, rows_of

pytestmark = pytest.mark.slow
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

PROMPTS = [
    "an owl on a blue background",
    "</script><img src=x onerror=window.hacked=1>",
    "a taco\nin two lines \u202efdp",
    "<svg onload=window.hacked=1>",
]
SIZES = [(64, 64), (300, 200), (64, 32), (512, 512)]
SEEDS = [9, 10, 2, 10**18]
SHOWN = "#list li"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with hostile prompts and names, and their page."""
    place = tmp_path_factory.mktemp("gallery")
    pictures = []
    for i, (prompt, size, seed) in enumerate(zip(PROMPTS, SIZES, SEEDS, strict=True)):
        path = place / f"{i} ?#%41&'{'<b>' * (i == 1)}.png"
        Image.new("RGB", size, (60 * i, 90, 200)).save(path)
        os.utime(path, (1_700_000_000 + i, 1_700_000_000 + i))
        request = {"prompt": prompt, "seed": seed, "scheduler": "euler" if i % 2 else "ddim"}
        made = describe(path, place)._replace(recipe=rows_of(request), command=command_of(request), parameters=prompt)
        pictures.append(made)
    (place / "index.html").write_text(gallery(pictures, "Owls & <i>others</i>"), "utf-8")
    return place


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The page, opened as a file, with what it asked for and complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.asked, opened.complaints = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.add_init_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => { window.copied = text; }}})"
    )
    opened.goto((folder / "index.html").as_uri())
    yield opened
    assert all(url.startswith(("file:", "data:")) for url in opened.asked)
    assert opened.complaints == []  # neither errors nor breaches of the policy
    assert opened.evaluate("window.hacked") is None
    context.close()


def captions(page: Any) -> list[str]:
    found: list[str] = page.locator(f"{SHOWN} .caption").evaluate_all("all => all.map((one) => one.textContent)")
    return found


def focused(page: Any) -> str:
    """The caption of the picture that has the focus."""
    text: str = page.evaluate("document.activeElement.textContent")
    return text


def test_the_grid_shows_every_picture(page: Any) -> None:
    assert captions(page) == PROMPTS and page.locator("h1").text_content() == "Owls & <i>others</i>"
    for i, width in enumerate((64, 256, 64, 256)):
        api.expect(page.locator("#list img").nth(i)).to_have_js_property("naturalWidth", width)
    rendering = page.locator("#list img").evaluate_all("all => all.map((one) => getComputedStyle(one).imageRendering)")
    assert rendering == ["pixelated", "auto", "pixelated", "auto"]


def test_search_and_sort(page: Any) -> None:
    page.get_by_label("Search").fill("DDIM owl")
    assert captions(page) == [PROMPTS[0]] and page.locator("#count").text_content() == "1 of 4 pictures"
    page.get_by_label("Search").fill("zebra")
    assert captions(page) == [] and page.locator("#none").is_visible()
    page.get_by_label("Search").fill("")
    assert captions(page) == PROMPTS and page.locator("#none").is_hidden()
    page.get_by_label("Sort by").select_option("seed")
    assert captions(page) == [PROMPTS[i] for i in (2, 0, 1, 3)]
    page.get_by_label("Sort by").select_option("date")
    assert captions(page) == PROMPTS[::-1]


def test_the_dialog_is_worked_by_keys(page: Any) -> None:
    link = page.locator("#list a").first
    link.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible() and page.locator("#prompt").text_content() == PROMPTS[0]
    for i in (1, 2, 3, 0, 1):  # round and round
        page.keyboard.press("ArrowRight")
        assert page.locator("#prompt").text_content() == PROMPTS[i]
        assert page.locator("#full").get_attribute("alt") == PROMPTS[i]
        api.expect(page.locator("#full")).to_have_js_property("naturalWidth", SIZES[i][0])  # the file itself
    page.keyboard.press("ArrowLeft")
    assert page.locator("#place").text_content() == "1 of 4"
    page.keyboard.press("ArrowRight")
    cells = page.locator("#recipe th, #recipe td").all_text_contents()
    assert cells[:4] == ["Seed", "10", "Scheduler", "euler"] and cells[4:6] == ["Pixels", "300 \u00d7 200"]
    page.keyboard.press("Escape")
    assert dialog.is_hidden() and focused(page) == PROMPTS[1]


def test_what_is_copied(page: Any) -> None:
    page.locator("#list a").nth(2).click()
    page.get_by_role("button", name="Copy the command").click()
    api.expect(page.locator("#told")).to_have_text("Copied")
    assert page.evaluate("window.copied") == command_of({"prompt": PROMPTS[2], "seed": 2, "scheduler": "ddim"})
    page.get_by_role("button", name="Copy parameters").click()
    api.expect(page.locator("#told")).to_have_text("Copied")
    assert page.evaluate("window.copied") == PROMPTS[2]
    page.get_by_role("button", name="Close").click()
    assert page.get_by_role("dialog").is_hidden() and focused(page) == PROMPTS[2]


def test_light_and_dark(page: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_a_narrow_screen(page: Any) -> None:
    """Two pictures side by side, nothing beyond the edge, and a dialog that can be closed."""
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [page.locator("#list li").nth(i).bounding_box() for i in (0, 1, 2)]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"]
    page.locator("#list a").nth(1).click()
    api.expect(page.locator("#full")).to_have_js_property("naturalWidth", 300)
    room = page.evaluate("document.documentElement.clientWidth")
    for part in ("#previous", "#next", "#close", "#full", "#prompt", "#recipe"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= room, part
    page.get_by_role("button", name="Close").click()
    assert page.get_by_role("dialog").is_hidden()


def test_a_page_without_its_files_shows_thumbnails(browser: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "index.html", tmp_path / "index.html")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.locator("#list a").nth(1).click()
    page.locator("#missing").wait_for(state="visible")
    assert page.evaluate("document.getElementById('full').naturalWidth") == 256
    page.close()


def test_two_thousand_pictures_stay_usable(browser: Any, folder: Path, tmp_path: Path) -> None:
    one = describe(next(iter(sorted(folder.glob("*.png")))), folder)
    several = [
        Picture(f"{i}.png", one.thumbnail, one.size, i, rows_of({"prompt": f"owl {i}", "seed": i}), "", "")
        for i in range(2000)
    ]
    (tmp_path / "index.html").write_text(gallery(several, "Many"), "utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert page.locator("#list li").count() == 2000
    took = page.evaluate(
        "() => { const begun = performance.now(), search = document.getElementById('search'); search.value = '1999';"
        " search.dispatchEvent(new Event('input')); document.body.offsetHeight; return performance.now() - begun; }"
    )
    assert captions(page) == ["owl 1999"] and took < 500  # milliseconds; it takes some eighty
    page.close()
