"""The report page in headless Chromium, from ``file://``: on a desktop, on a phone, and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.browser import TAB, Browser, browser
from tests.helpers.report_curriculum import ReportedCurriculum

DESK, PHONE = (1280, 800), (390, 844)
BOTH = ("light", "dark")

LOADED = """
return Promise.all([...document.querySelectorAll('video')].map(async video => {
  if (video.readyState < 1 && !video.error)
    await new Promise(done => { video.onloadedmetadata = done; video.onerror = done; setTimeout(done, 20000); });
  return [video.readyState, video.error && video.error.message, video.duration, video.videoWidth];
}))"""

FOCUSED = """
const each = document.activeElement;
if (each === document.body) return null;
const style = getComputedStyle(each);
return [[...document.querySelectorAll('*')].indexOf(each), style.outlineStyle, parseFloat(style.outlineWidth)]"""

LOW_CONTRAST = """
const part = text => { const all = text.match(/[\\d.]+/g).map(Number); return all.length < 4 ? [...all, 1] : all; };
const light = colour => { const [r, g, b] = colour.slice(0, 3).map(c => c / 255).map(
  c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const found = [];
for (const each of document.querySelectorAll('body *')) {
  if (![...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
  if (each.closest('.hidden') || !each.getClientRects().length) continue;
  let behind = each;
  while (behind && part(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const ground = behind ? part(getComputedStyle(behind).backgroundColor) : [0, 0, 0, 0];
  const [a, b] = [light(part(getComputedStyle(each).color)), light(ground)].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) found.push(each.outerHTML.slice(0, 120));
}
return found"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(window: Browser, reported: ReportedCurriculum) -> Browser:
    window.set_screen(*DESK, "light")
    window.log("browser")
    window.log("performance")
    window.open((reported.folder / "report.html").as_uri())
    return window


def test_page_loads_without_console_messages_or_network_requests(page: Browser, reported: ReportedCurriculum) -> None:
    page.run(LOADED)
    assert page.log("browser") == []
    events = [json.loads(each["message"])["message"] for each in page.log("performance")]
    requested = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert (reported.folder / "report.html").as_uri() in requested
    assert [address[:80] for address in requested if not address.startswith(("file://", "data:"))] == []


def test_errors_of_a_broken_page_are_logged(window: Browser, tmp_path: Path) -> None:
    """The console log is not always empty, so that the checks above can fail."""
    (tmp_path / "broken.html").write_text("<!doctype html><video src='gone.mp4'></video><script>nothing()</script>")
    window.log("browser")
    window.open((tmp_path / "broken.html").as_uri())
    assert window.run(LOADED)[0][1]
    assert any("nothing is not defined" in each["message"] for each in window.log("browser"))


def test_every_video_and_image_loads(page: Browser, reported: ReportedCurriculum) -> None:
    videos = page.run(LOADED)
    assert len(videos) == len(reported.page.videos) == 2
    for ready, error, duration, width in videos:
        assert error is None and ready >= 1 and duration > 0 and width == 1280
    pictures = page.run("return [...document.images].map(each => [each.complete, each.naturalWidth])")
    assert len(pictures) == 5 and all(complete and width > 0 for complete, width in pictures)


def test_every_link_has_a_target(page: Browser, reported: ReportedCurriculum) -> None:
    links = page.run("return [...document.querySelectorAll('a[href]')].map(each => each.getAttribute('href'))")
    inside = [each[1:] for each in links if each.startswith("#")]
    missing = "return arguments[0].filter(each => !document.getElementById(each))"
    assert len(inside) == 7 and page.run(missing, inside) == []
    files = [each for each in links if not each.startswith("#")]
    assert len(files) == 2
    for name in files:
        page.open((reported.folder / name).as_uri())
        assert page.run(LOADED)[0][1] is None
    assert page.log("browser") == []


def test_tab_reaches_all_controls_in_order_with_a_visible_focus(page: Browser) -> None:
    reached: list[int] = []
    for _ in range(80):
        page.press(TAB)
        focused = page.run(FOCUSED)
        if focused is None:
            break
        number, style, width = focused
        if not reached or reached[-1] != number:  # a video has several controls
            reached.append(number)
            name = page.run("return document.querySelectorAll('*')[arguments[0]].tagName", number)
            assert name == "VIDEO" or (style != "none" and width >= 2), f"no visible focus on {name}"
    else:
        pytest.fail("the focus never leaves the page")
    expected = """const all = [...document.querySelectorAll('*')];
        return [...document.querySelectorAll('a[href], summary, [tabindex], video')].map(each => all.indexOf(each))"""
    assert reached == page.run(expected)


@pytest.mark.parametrize("scheme", BOTH)
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_page_fits_the_screen_with_readable_contrast(
    page: Browser, size: tuple[int, int], scheme: str, tmp_path: Path
) -> None:
    page.set_screen(*size, scheme)
    page.run(LOADED)
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.run(LOW_CONTRAST) == []
    page.screenshot(tmp_path / "page.png", size[1])
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_every_stage_value_is_visible_on_a_phone(page: Browser) -> None:
    page.set_screen(*PHONE, "light")
    outside = """return [...document.querySelectorAll('#stages td, #stages th[scope=row], #weights td')]
        .filter(each => { const place = each.getBoundingClientRect();
                          return place.left < 0 || place.right > innerWidth || !place.height; }).length"""
    assert page.run(outside) == 0
    labels = """return [...document.querySelectorAll('#stages td')].slice(0, 4)
        .map(each => getComputedStyle(each, '::before').content)"""
    assert page.run(labels) == ['"Videos"', '"Training"', '"Best epoch"', '"Validated on"']


def test_wide_tables_scroll_in_their_own_box(page: Browser) -> None:
    page.set_screen(*PHONE, "dark")
    inner = "const box = document.querySelector('#domains .scroll'); return [box.scrollWidth > box.clientWidth, "
    scrolls, sticky = page.run(
        inner
        + """(box.scrollLeft = 200, box.querySelector('tbody th').getBoundingClientRect().left
              - box.getBoundingClientRect().left)]"""
    )
    assert scrolls and sticky < 5, "the stage's name stays visible"
