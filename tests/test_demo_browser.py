"""The demo in a browser, as a visitor uses it. Screenshots go to `out/screenshots`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from PIL import Image

SHOTS = Path("out/screenshots")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def missing() -> str | None:
    """Why there is no browser; never a reason to skip where CI is set."""
    for name in ("gradio", "playwright", "axe_playwright_python"):
        if importlib.util.find_spec(name) is None:
            return f"the browser tests need {name} (pip install '.[dev]')"
    return None if CHROMIUM else "the browser tests need Debian's chromium (apt install chromium)"


if missing() and not os.environ.get("CI"):
    pytest.skip(str(missing()), allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

from demo_app import running  # noqa: E402
from self_attention_guidance.generate import (  # noqa: E402
    LoadedPipeline,
    read_record,
    save_png,
)
from self_attention_guidance.generate.counting import counted_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
COMPARE, CANCEL = "Draw without and with guidance", "Cancel"
PICTURE = ".image-container img"


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[str, LoadedPipeline]]:
    with running(max_steps=60) as started:
        yield started


@pytest.fixture(scope="module")
def address(demo: tuple[str, LoadedPipeline]) -> str:
    return demo[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    foreign: list[str] = []
    opened.on("request", lambda r: None if address in r.url + "/" else foreign.append(r.url))
    visit(opened, address, "?prompt=cat&seed=4&steps=4")
    yield opened
    opened.close()
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []


def visit(page: Page, address: str, query: str) -> None:
    page.goto(address + query)
    expect(page.get_by_role("button", name=COMPARE)).to_be_enabled()
    expect(field(page, "Prompt")).to_have_value("cat")  # the address has been read


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True).locator("visible=true").first


def field(page: Page, name: str) -> Any:
    return page.get_by_label(re.compile(rf"^\s*{name}\b")).first  # a tip follows the name


def type_text(page: Page, control: Any, text: str) -> None:
    """Type into a control that has just appeared; its first value may still come after it."""
    expect(control).to_be_visible()
    for _ in range(20):
        control.fill(text)
        page.wait_for_timeout(250)
        if control.input_value() == text:
            return
    pytest.fail(f"{text} did not stay")


def query(page: Page) -> dict[str, str]:
    found = parse_qs(urlparse(page.url).query, keep_blank_values=True)
    return {name: values[0] for name, values in found.items()}


def draw(page: Page) -> None:
    button(page, COMPARE).click()
    expect(page.locator(PICTURE).first).to_be_visible()


def downloaded_parameters(page: Page) -> str:
    with page.expect_download() as downloading:
        page.get_by_text("Download guided").click()
    with Image.open(downloading.value.path()) as picture:
        return picture.text["parameters"]  # type: ignore[attr-defined]


def expect_downloaded(page: Page, is_right: Callable[[str], bool]) -> None:
    """The button's file follows the figures of a new pair a little later."""
    for _ in range(20):
        parameters = downloaded_parameters(page)
        if is_right(parameters):
            return
        page.wait_for_timeout(250)
    pytest.fail(parameters)


def test_nobody_draws_before_the_address_is_read(page: Page, address: str) -> None:
    held: list[Any] = []
    page.route("**/run/predict**", lambda route: held.append(route))
    page.goto(address + "?prompt=heart&seed=9&steps=3")
    expect(button(page, COMPARE)).to_be_disabled()
    while not held:
        page.wait_for_timeout(20)
    expect(button(page, COMPARE)).to_be_disabled()
    for route in held:
        route.continue_()
    draw(page)
    page.unroute("**/run/predict**")
    parameters = downloaded_parameters(page)
    assert parameters.startswith("heart\nSteps: 3,") and "Seed: 9," in parameters


def test_compare_drag_and_keep(page: Page) -> None:
    draw(page)
    expect(page.get_by_role("button", name="Thumbnail 1 of 2")).to_be_visible()
    handle = page.locator(".slider-wrap .outer")
    box, grip = page.locator(".slider-wrap").bounding_box(), handle.bounding_box()
    assert box is not None and grip is not None
    page.screenshot(path=SHOTS / "compare.png")
    height = grip["y"] + grip["height"] / 2
    page.mouse.move(grip["x"] + grip["width"] / 2, height)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, height, steps=8)
    page.mouse.up()
    dragged = handle.bounding_box()
    assert dragged is not None and dragged["x"] > grip["x"] + box["width"] * 0.2
    page.screenshot(path=SHOTS / "dragged.png")
    assert downloaded_parameters(page).startswith("cat\nSteps: 4,")


def test_what_a_pair_took_and_where_it_was_blurred(page: Page) -> None:
    draw(page)
    message = r"^Unguided [\d.]+ s, 8 network evaluations; guided [\d.]+ s, 9 network evaluations$"
    expect(page.get_by_text(re.compile(message))).to_be_visible()
    blurred = button(page, "Where it was blurred")
    expect(blurred).to_be_visible()
    field(page, "Guidance").click()
    page.get_by_role("option", name=re.compile("^PAG")).click()
    button(page, COMPARE).click()
    expect(blurred).to_be_hidden()  # it blurs nothing


def shown_picture(page: Page) -> Any:
    """In the tab that is open."""
    return page.get_by_role("tabpanel").locator("visible=true").locator("img").first


def test_a_pair_is_there_on_arrival(page: Page, demo: tuple[str, LoadedPipeline]) -> None:
    address, model = demo
    with counted_rows(model.pipeline.unet) as drawn:
        page.goto(address)
        expect(page.locator(PICTURE).first).to_be_visible()
    assert drawn == []  # it was, before anybody came
    example = str(page.locator(".examples button").first.inner_text())
    expect(field(page, "Prompt")).to_have_value(example)
    expect(page.get_by_text(re.compile(r"network evaluations; guided"))).to_be_visible()
    expect(page.get_by_role("button", name="Thumbnail 1 of 2")).to_be_visible()
    page.screenshot(path=SHOTS / "arrival.png")
    parameters = downloaded_parameters(page)
    assert parameters.startswith(f"{example}\nSteps: ") and "Seed: 0," in parameters
    visit(page, address, "?prompt=cat&steps=4")  # it would not be what the address says
    expect(page.locator(PICTURE)).to_have_count(0)


@pytest.mark.parametrize("drawn", ["compare", "steps", "sweep"])
def test_a_link_draws_on_opening(page: Page, address: str, drawn: str) -> None:
    sweep = "&rows=cfg&row_values=1,3&columns=guidance&column_values=none,pag:scale%3D2,start%3D0.5"
    page.goto(address + f"?prompt=cat&seed=5&steps=4&start=0&draw={drawn}{sweep}")
    expect(shown_picture(page)).to_be_visible()
    tabs = {"compare": "Compare", "steps": "Step by step", "sweep": "Sweep"}
    tab = page.get_by_role("tab", name=tabs[drawn])
    expect(tab).to_have_attribute("aria-selected", "true")
    if drawn == "compare":
        assert "Seed: 5," in downloaded_parameters(page)
    elif drawn == "sweep":
        expect(field(page, "Values of the rows")).to_have_value("1,3")
        expect(field(page, "Values of the columns")).to_have_value("none,pag:scale=2,start=0.5")
    page.screenshot(path=SHOTS / f"link-{drawn}.png", full_page=True)


def test_what_was_drawn_and_the_open_tab_are_in_the_address(page: Page) -> None:
    assert "draw" not in query(page)
    page.get_by_role("tab", name="Sweep").click()
    page.wait_for_url("**tab=sweep**")
    type_text(page, field(page, "Values of the columns"), "0, 1")
    type_text(page, field(page, "Values of the rows"), "4")
    button(page, "Draw the grid").click()
    page.wait_for_url("**draw=sweep**")
    found = query(page)
    asked = {"rows": "seed", "row_values": "4", "columns": "scale", "column_values": "0, 1"}
    assert found.items() >= asked.items()
    page.reload()
    expect(shown_picture(page)).to_be_visible()
    expect(field(page, "Values of the columns")).to_have_value("0, 1")


def test_settings_are_in_the_address_and_come_back(page: Page, address: str) -> None:
    field(page, "Prompt").fill("heart & star=1")
    field(page, "Seed").fill("9")
    draw(page)
    page.wait_for_url("**seed=9**")
    assert query(page)["prompt"] == "heart & star=1"
    assert query(page)["steps"] == "4"
    page.reload()
    expect(field(page, "Prompt")).to_have_value("heart & star=1")
    expect(field(page, "Seed")).to_have_value("9")
    visit(page, address, "?prompt=cat&seed=-5&steps=x&scheduler=/etc/passwd&blur_sigma=1e9")
    expect(field(page, "Prompt")).to_have_value("cat")
    expect(field(page, "Seed")).to_have_value("0")


def test_every_control_has_a_tip(page: Page) -> None:
    page.get_by_role("button", name="Sampling").click()
    page.get_by_role("button", name="Begin with a picture").click()
    shown = 0
    for tab in ("Compare", "Step by step", "Sweep"):
        page.get_by_role("tab", name=tab).click()
        for label in page.locator("[data-testid=block-info]").filter(visible=True).all():
            assert label.locator("xpath=following-sibling::*").count(), label.inner_text()
            shown += 1
    assert shown > 20
    page.screenshot(path=SHOTS / "tips.png", full_page=True)


def test_random_seed_changes_the_seed(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Random seed")).click()
    expect(field(page, "Seed")).not_to_have_value("4")
    assert 0 <= int(field(page, "Seed").input_value()) < 2**32


def test_a_method_is_chosen_with_its_settings(page: Page, address: str) -> None:
    layers, threshold = field(page, "Layers"), page.get_by_label("number input for Mask threshold")
    expect(layers).to_be_hidden()
    expect(threshold).to_be_visible()
    field(page, "Guidance").click()
    page.get_by_role("option", name=re.compile("^PAG")).click()
    expect(layers).to_be_visible()
    expect(threshold).to_be_hidden()
    expect(page.get_by_label("number input for PAG scale (0 is off)")).to_have_value("3")
    type_text(page, layers, "mid")
    page.screenshot(path=SHOTS / "method.png", full_page=True)
    draw(page)
    parameters = downloaded_parameters(page)
    assert "Guidance Method: pag, PAG Scale: 3" in parameters
    assert "PAG Layers: mid" in parameters
    page.wait_for_url("**method=pag**")
    page.reload()
    expect(field(page, "Layers")).to_have_value("mid")
    expect(page.get_by_label("number input for PAG scale (0 is off)")).to_have_value("3")


def choose(page: Page, place: str, path: Path) -> None:
    """Gives a picture to a place of this label."""
    block = page.locator(".block", has=page.get_by_text(place, exact=True)).last
    block.locator("input[type=file]").set_input_files(path)
    expect(block.locator("img")).to_be_visible()


def test_it_begins_with_a_picture(page: Page, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", (96, 64), "#3366cc").save(start)
    Image.linear_gradient("L").resize((96, 64)).point(lambda v: 255 if v > 127 else 0).save(mask)
    expect(field(page, "Strength")).to_be_hidden()  # the first screen stays simple
    page.get_by_role("button", name="Begin with a picture").click()
    choose(page, "Picture", start)
    draw(page)
    expect(page.get_by_text(re.compile("guided .* 7 network evaluations$"))).to_be_visible()
    parameters = downloaded_parameters(page)
    assert "Size: 96x64" in parameters and "Image: start.png, Strength: 0.8" in parameters
    page.wait_for_url("**strength=0.8**")
    assert "draw" not in query(page)  # who opened the link would see another drawing
    choose(page, "Mask", mask)
    number = page.get_by_label("number input for Strength")
    number.fill("0.5")
    number.press("Enter")
    button(page, COMPARE).click()
    expect(page.get_by_text(re.compile("guided .* 5 network evaluations$"))).to_be_visible()
    expect_downloaded(page, lambda found: "Mask: mask.png, Strength: 0.5" in found)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=SHOTS / "begin-phone.png", full_page=True)
    for _ in range(2):  # without them it is as before
        page.get_by_label("Remove Image").first.click()
    button(page, COMPARE).click()
    expect(page.get_by_text(re.compile("guided .* 9 network evaluations$"))).to_be_visible()
    expect_downloaded(page, lambda found: "Image:" not in found)
    assert query(page)["draw"] == "compare"


def test_an_earlier_picture_sets_the_controls(page: Page, address: str, tmp_path: Path) -> None:
    visit(page, address, "?prompt=cat&seed=4&steps=3&method=pag&sag_scale=2&layers=mid&size=64")
    draw(page)
    with page.expect_download() as downloading:
        page.get_by_text("Download guided").click()
    earlier = downloading.value.path().rename(tmp_path / "earlier.png")
    visit(page, address, "?prompt=cat")
    page.get_by_role("button", name="Settings of an earlier picture").click()
    block = page.locator(".block", has=page.get_by_text("Earlier picture", exact=True)).last
    block.locator("input[type=file]").set_input_files(earlier)
    expect(page.get_by_text("The page now has its settings.")).to_be_visible()
    expect(field(page, "Seed")).to_have_value("4")
    expect(field(page, "Layers")).to_have_value("mid")
    expect(page.get_by_label("number input for PAG scale (0 is off)")).to_have_value("2")
    page.screenshot(path=SHOTS / "earlier.png", full_page=True)
    draw(page)
    with page.expect_download() as downloading:
        page.get_by_text("Download guided").click()
    with Image.open(downloading.value.path()) as again, Image.open(earlier) as before:
        assert again.tobytes() == before.tobytes()
    record = {**read_record(earlier), "model": "emoji-styles"}
    save_png(Image.new("RGB", (8, 8)), earlier, record, overwrite=True)
    block.locator("input[type=file]").set_input_files(earlier)
    message = "drawn by emoji-styles, and this page draws with emoji: nothing was changed."
    expect(page.get_by_text(message)).to_be_visible()
    Image.new("RGB", (8, 8)).save(earlier)
    block.locator("input[type=file]").set_input_files(earlier)
    expect(page.get_by_text("This picture holds no settings")).to_be_visible()
    expect(field(page, "Layers")).to_have_value("mid")  # nothing was changed
    page.set_viewport_size({"width": 390, "height": 844})
    page.screenshot(path=SHOTS / "earlier-phone.png", full_page=True)


def test_an_example_is_a_click_away(page: Page) -> None:
    example = page.locator(".examples button").first
    example.click()
    expect(field(page, "Prompt")).to_have_value(str(example.inner_text()))


def test_the_dark_page(page: Page, address: str) -> None:
    visit(page, address, "?prompt=cat&seed=4&steps=4&__theme=dark")
    draw(page)
    for name in ("Begin with a picture", "Settings of an earlier picture"):
        page.get_by_role("button", name=name).click()
    expect(page.get_by_text("Earlier picture", exact=True)).to_be_visible()
    page.screenshot(path=SHOTS / "dark.png", full_page=True)


def test_the_steps_can_be_watched(page: Page, address: str) -> None:
    visit(page, address, "?prompt=cat&seed=4&steps=6&start=0&stop=1&every=1")
    page.get_by_role("tab", name="Step by step").click()
    button(page, "Watch the steps").click()
    strip = shown_picture(page)
    expect(strip).to_be_visible()
    first = strip.get_attribute("src")
    number = page.get_by_label("number input for Second pass", exact=True)
    number.fill("6")
    number.press("Enter")
    expect(strip).not_to_have_attribute("src", str(first))
    page.screenshot(path=SHOTS / "steps.png")


def test_sweep(page: Page) -> None:
    page.get_by_role("tab", name="Sweep").click()
    values = field(page, "Values of the columns")
    field(page, "Columns").click()
    page.get_by_role("option", name="Window of steps").click()
    expect(values).to_have_value("0-1, 0-0.5, 0.5-1")  # to begin with
    values.fill("0-0.5, 0.5-1")
    field(page, "Values of the rows").fill("4, 5")
    button(page, "Draw the grid").click()
    grid = shown_picture(page)
    expect(grid).to_be_visible()
    page.wait_for_url("**columns=window**")
    asked = {"rows": "seed", "row_values": "4, 5", "column_values": "0-0.5, 0.5-1"}
    assert query(page).items() >= asked.items()
    page.screenshot(path=SHOTS / "sweep.png", full_page=True)
    first = grid.get_attribute("src")
    field(page, "Columns").click()
    page.get_by_role("option", name="Seed", exact=True).click()
    button(page, "Draw the grid").click()
    expect(page.locator(".toast-wrap")).to_contain_text("must differ: both are seed")
    assert grid.get_attribute("src") == first


def test_a_wide_grid_can_be_read_on_a_phone(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    asked = "&rows=steps&row_values=1&columns=seed&column_values=1,2,3,4,5,6"
    page.goto(address + f"?prompt=cat&draw=sweep{asked}")
    grid = shown_picture(page)
    expect(grid).to_be_visible()
    page.wait_for_function("document.querySelector('.grid img').width > 6 * 160")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    scrolled = "e => { e.scrollLeft = 500; return e.scrollLeft; }"
    assert page.locator(".grid .image-frame").evaluate(scrolled) == 500
    page.screenshot(path=SHOTS / "sweep-phone.png")


def test_cancel_and_draw_again(page: Page, address: str) -> None:
    visit(page, address, "?prompt=cat&seed=4&steps=60&size=256&start=0&stop=1&every=1")
    button(page, COMPARE).click()
    expect(page.get_by_text(re.compile(r"drawing|processing")).first).to_be_visible()
    button(page, CANCEL).click()
    expect(page.get_by_text(re.compile(r"drawing|processing"))).to_have_count(0)
    assert page.locator(PICTURE).count() == 0
    visit(page, address, "?prompt=cat&seed=4&steps=4")
    draw(page)


def test_bad_input_is_one_plain_sentence(page: Page, address: str) -> None:
    visit(page, address, "?prompt=cat&steps=4&start=0.9&stop=0.1")
    button(page, COMPARE).click()
    expect(page.locator(".toast-wrap")).to_contain_text("start")
    page.screenshot(path=SHOTS / "error.png")
    visit(page, address, "?prompt=cat&steps=4")
    draw(page)


def test_what_the_model_ignores_is_said(page: Page, address: str) -> None:
    long = "cat" + " apple" * 90
    visit(page, address, f"?prompt=cat&steps=1&guidance_scale=1&negative_prompt={long}")
    button(page, COMPARE).click()
    toasts = page.locator(".toast-wrap")
    expect(toasts).to_contain_text("The negative prompt is too long for this model")
    expect(toasts).to_contain_text("The negative prompt has no effect")
    expect(toasts).to_contain_text("No step is guided")  # the only one is before the window
    page.screenshot(path=SHOTS / "ignored.png")


def test_a_phone_can_use_it(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    start = button(page, COMPARE).bounding_box()
    assert start is not None and start["y"] + start["height"] < 844
    page.screenshot(path=SHOTS / "phone-first.png")
    draw(page)
    page.screenshot(path=SHOTS / "phone.png", full_page=True)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    picture = page.locator(PICTURE).first.bounding_box()
    assert picture is not None and picture["width"] > 250


def test_the_keyboard_is_enough(page: Page) -> None:
    field(page, "Prompt").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == COMPARE:
            break
    page.keyboard.press("Enter")
    expect(page.locator(PICTURE).first).to_be_visible()


def test_axe_finds_nothing_serious(page: Page) -> None:
    page.get_by_role("button", name="Begin with a picture").click()
    draw(page)
    # The list of earlier pictures is empty for a moment.
    expect(page.get_by_label("Empty value").filter(visible=True)).to_have_count(0)
    found = Axe().run(page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in
               ("serious", "critical")]  # fmt: skip
    assert serious == []
