"""The documentation as a site: built without a warning, whole, and asking for nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
# What a browser loads by itself, by tag; of <link> only these relations. A link to click may lead elsewhere.
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}
LOADING = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}

pytestmark = pytest.mark.slow
pytest.importorskip("zensical", reason="zensical is not installed: pip install 'ldm-toolkit[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a folder of its own with a proxy that refuses, so that a download would fail."""
    place = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", place)
    shutil.copytree(ROOT / "docs", place / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    refusing = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    tool = shutil.which("zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool is not None
    build = [tool, "build", "--strict", "--clean"]
    done = subprocess.run(build, cwd=place, env=os.environ | refusing, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "No issues found" in said and "arning" not in said, said
    return place / "out" / "site"


class Loads(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in LOADED and LOADED[tag] in values:
            self.found.append(values[LOADED[tag]])
        if tag == "link" and LOADING & {*values.get("rel", "").split()}:
            self.found.append(values["href"])
        self.found += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.found += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


def test_the_reader_of_pages_sees_what_is_loaded() -> None:
    page = (
        '<link rel="stylesheet" href="a.css"><link rel="next" href="no.html"><script src="//cdn/b.js"></script>'
        '<img src="c.png" srcset="d.png 2x"><p style="background: url(\'e.png\')"><a href="https://no">no</a>'
    )
    assert Loads(page).found == ["a.css", "//cdn/b.js", "c.png", "d.png", "e.png"]


@pytest.mark.parametrize("name", [*PAGES, "404"])
def test_a_page_loads_only_files_of_the_site(site: Path, name: str) -> None:
    page = site / f"{name}.html"
    wanted = Loads(page.read_text("utf-8")).found
    assert any(address.endswith(".css") for address in wanted) and any(address.endswith(".js") for address in wanted)
    for address in wanted:
        assert not re.match(r"[a-z]+:|//", address), address
        there = site / address.lstrip("/") if name == "404" else page.parent / address
        assert there.resolve().is_relative_to(site.resolve()) and there.is_file(), address


def test_styles_load_nothing_from_elsewhere(site: Path) -> None:
    styles = sorted(site.rglob("*.css"))
    assert any(path.name == "site.css" for path in styles)
    for path in styles:
        text = path.read_text("utf-8")
        loaded = re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)
        assert all(address.startswith(("data:", "#")) for address in loaded), path.name


def test_every_page_is_there_and_nothing_of_the_workshop(site: Path) -> None:
    assert sorted(path.stem for path in site.glob("*.html")) == sorted([*PAGES, "404"])
    assert list(site.rglob("*.py")) == [] and list(site.rglob("*.md")) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_pages_from_the_folder(browser: Any, site: Path, width: int) -> None:
    """Nothing is asked of the network, nothing is complained of, every picture is there, nothing sticks out."""
    context = browser.new_context(viewport={"width": width, "height": 844})
    page, asked, complaints = context.new_page(), list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_load_state("networkidle")
        pictures = page.locator("article img").evaluate_all("all => all.map((one) => one.complete && one.naturalWidth)")
        assert all(width > 0 for width in pictures), name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and complaints == []
    context.close()
