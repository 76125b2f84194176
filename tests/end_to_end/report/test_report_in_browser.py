"""The report in a real browser, with clicks and keys: Chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardc.api
from samples.textbook import MLP, Logits
from shardc.inspect.html import questions

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Deep(nn.Module):
    """Four equal blocks, then one that gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.tail = nn.Sequential(*(Logits(64, 128) for _ in range(4))), MLP(64, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.blocks(x))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a model on two meshes."""
    path, x = tmp_path_factory.mktemp("report") / "report.html", torch.randn(64, 64)
    whole = {f"blocks.*.{name}.weight": (None, None) for name in ("up", "down")}
    asked: Any = {"constraints": {"tail.up.weight": ("tp", None), **whole}, "hardware": "cpu"}
    first = shardc.api.compile(Deep(), "dp=2,tp=2", (x,), **asked)
    second = shardc.api.compile(Deep(), "dp=1,tp=4", (x,), **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "MOST_SEARCHES", 2)
        first.to_html(path, against=second)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        folder = tmp_path_factory.mktemp("chromium")
        context = started.chromium.launch_persistent_context(folder, executable_path=CHROMIUM, args=QUIET)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report as it opens. No script fails, and nothing is asked of the network."""
    page, wrong = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    yield page
    assert wrong == []
    page.close()


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.textContent")


def test_every_view_opens_by_a_click_and_by_keys_where_chromium_is_installed(page: Any) -> None:
    names = page.get_by_role("tab").all_inner_texts()
    assert names == ["Plan", "Modules", "Communication", "Memory", "Timeline", "Graph", "Compare"]
    for name in names:
        page.get_by_role("tab", name=name).click()
        assert page.get_by_role("tabpanel").count() == 1 and page.get_by_role("tabpanel").inner_text().strip()
    page.keyboard.press("ArrowRight")
    assert focused(page) == "Plan"
    page.keyboard.press("End")
    assert focused(page) == "Compare"
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("tab", name="Graph").get_attribute("aria-selected") == "true"


def test_the_tree_is_walked_by_arrow_keys_where_chromium_is_installed(page: Any) -> None:
    page.get_by_role("tab", name="Modules").click()
    page.keyboard.press("Tab")
    assert focused(page).startswith("▾Deep")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    assert focused(page).strip("▾▸").startswith("blocks")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "0–3" in focused(page) and "×4 folded" in focused(page)
    before = page.get_by_role("row").count()
    page.keyboard.press("u")
    assert "×4 unfolded" in focused(page)
    assert page.get_by_role("row").count() == before + 4
    page.keyboard.press("u")
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("row").count() == before
    page.keyboard.press("ArrowLeft")
    assert focused(page).strip("▾▸").startswith("blocks")


def test_a_parameter_opens_and_escape_closes_where_chromium_is_installed(page: Any) -> None:
    page.get_by_role("tab", name="Modules").click()
    page.locator("tr", has_text="tail").first.click()
    page.locator("tr", has_text="up").last.click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    panel = page.get_by_role("dialog")
    assert panel.locator("h2").inner_text() == "tail.up.weight"
    text = panel.inner_text()
    assert "f32[128@tp, 64]" in text and "tp splits dim 0" in text and "all ranks of dp hold the same" in text
    assert "made by    parameter tail.up.weight" in text and "demanded" in text
    panel.get_by_role("button", name="rank 3").click()
    assert "Rank 3 (dp 1, tp 1) holds dim 0: 64–127 of 128; dim 1: all 64." in panel.inner_text()
    page.keyboard.press("Escape")
    assert not panel.is_visible()
    assert focused(page).startswith("weight")


def test_another_layout_has_its_cost_or_the_command_where_chromium_is_installed(page: Any) -> None:
    panel = page.get_by_role("dialog")
    page.evaluate("openValue(plan.answers.find((one) => Object.values(one.instead).some(Boolean)).value)")
    costs = panel.locator("table[aria-label='Other layouts and their cost']").inner_text()
    assert "a step" in costs or "at the same cost" in costs
    page.evaluate("openValue('blocks.2.up.weight')")
    panel.get_by_label("dp (2)").select_option("1")
    panel.get_by_label("tp (2)").select_option("0")
    told = panel.locator("#other-layout").inner_text()
    assert "f32[128@tp, 64@dp]" in told
    assert 'compiled.plan.why_not("blocks.2.up.weight", "f32[128@tp, 64@dp]")' in told
    panel.get_by_label("tp (2)").select_option("1")
    assert "f32[128, 64@(dp,tp)]" in panel.locator("#other-layout").inner_text()


def test_timeline_and_memory_zoom_and_tell_by_keys_where_chromium_is_installed(page: Any) -> None:
    page.get_by_role("tab", name="Timeline").click()
    picture = page.locator("canvas")
    picture.focus()
    whole = picture.screenshot()
    page.keyboard.press("+")
    assert picture.screenshot() != whole
    page.keyboard.press("0")
    page.keyboard.press(".")
    told = page.get_by_role("tabpanel").get_by_role("status").inner_text()
    assert "forward" in told and "from 0 s" in told
    page.get_by_role("tab", name="Memory").click()
    status = page.get_by_role("tabpanel").get_by_role("status")
    page.locator("section:not([hidden]) svg.zoomed").focus()
    first = status.inner_text()
    page.keyboard.press(",")
    assert status.inner_text() != first and "parameters" in first


def test_two_graphs_stand_side_by_side_where_chromium_is_installed(page: Any) -> None:
    page.get_by_role("tab", name="Graph").click()
    panel = page.get_by_role("tabpanel")
    assert panel.get_by_label("before", exact=True).input_value() == "assign"
    panel.get_by_label("after", exact=True).select_option("capture")
    assert panel.locator("svg").count() == 2
    assert panel.locator("svg").nth(1).locator(".collective").count() == 0
    assert "2 more" in panel.locator("svg").nth(1).text_content()
    panel.locator("svg").first.focus()
    page.keyboard.press(".")
    assert "read by" in panel.get_by_role("status").first.inner_text()


def test_two_plans_are_compared_and_switched_where_chromium_is_installed(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    text = page.get_by_role("tabpanel").inner_text()
    assert "predicted step" in text and "tail.up.weight" in text
    page.get_by_role("button", name="dp=1,tp=4").click()
    page.get_by_role("tab", name="Plan").click()
    assert "plan for mesh dp=1,tp=4" in page.get_by_role("tabpanel").inner_text()


def luminance(color: tuple[float, ...]) -> float:
    """As WCAG defines it, of red, green and blue up to 255."""
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme_where_chromium_is_installed(page: Any, scheme: str) -> None:
    """At least 4.5 to 1, as WCAG asks: of text on the page, on panels, on parts and on the darkest cell."""
    page.emulate_media(color_scheme=scheme)

    def read(name: str) -> tuple[float, ...]:
        text = page.evaluate("color", name) if name != "darkest" else ""
        if text:
            return tuple(int(text[at : at + 2], 16) for at in (1, 3, 5))
        heat = [int(part) for part in page.evaluate("color('heat')").split(",")]
        return tuple(0.75 * over + 0.25 * under for over, under in zip(heat, read("back"), strict=True))

    pairs = [(text, under) for text in ("text", "soft", "accent") for under in ("back", "panel")]
    pairs += [("text", f"part{part}") for part in range(8)] + [("on-heat", "darkest")]
    for text, under in pairs:
        darker, lighter = sorted((luminance(read(text)), luminance(read(under))))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{text} on {under}"


def test_a_narrow_window_scrolls_only_tables_where_chromium_is_installed(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    for name in page.get_by_role("tab").all_inner_texts():
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
