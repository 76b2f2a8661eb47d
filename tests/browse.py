"""Plays with a page of `--mode=demo` in a real browser, as a person would, and leaves pictures of what it looks like.

    python tests/browse.py http://127.0.0.1:PORT/ FOLDER [--browser=/usr/bin/chromium]

Needs `playwright`, which is no dependency of the project, and a Chromium. Fails where something is asked of elsewhere,
a script fails, an answer does not come, a mistake is not told in the page, or the page is wider than the screen.
"""

import argparse
from pathlib import Path

from playwright.sync_api import Page, sync_playwright  # pyright: ignore[reportMissingImports]

WIDTHS = {1200: 900, 420: 860}  # of a screen and a phone, with their heights
PATIENCE = 60_000  # ms


def play(page: Page) -> str:
    """Use what is there; what kind of page it is."""
    if page.locator("#board").count():
        return classify(page)
    if page.locator("#picture").count():
        return look_at_pictures(page)
    return write(page)


def classify(page: Page) -> str:
    """A wrong file, a test image, and a one that is drawn."""
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"GIF89a and no more"})
    page.locator("#message", has_text="it is a GIF file").wait_for(timeout=PATIENCE)
    examples = page.locator(".choose button")
    if examples.count():
        label = examples.nth(3).get_attribute("title")
        examples.nth(3).click()
        page.locator("#steps .example li").first.wait_for(timeout=PATIENCE)
        print(f"a test image of {label}: {page.locator('#steps .example').last.inner_text().split()}")
        assert page.locator("#message").inner_text() == ""
    box = page.locator("#board").bounding_box()
    assert box is not None
    for points in ([(0.5, 0.2), (0.5, 0.8)],):
        xs, ys = zip(*points, strict=True)
        page.mouse.move(box["x"] + xs[0] * box["width"], box["y"] + ys[0] * box["height"])
        page.mouse.down()
        for x, y in points[1:]:
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=12)
        page.mouse.up()
    page.wait_for_timeout(1500)
    print(f"a stroke: {page.locator('#steps .example').last.inner_text().split()}")
    assert page.locator("#steps .example").count() and page.locator("#message").inner_text() == ""
    return "classify"


def look_at_pictures(page: Page) -> str:
    """No class, then again as it was; the slider goes back."""
    wait_for_the_end(page)
    last = page.locator("#picture").get_attribute("src")
    boxes = page.locator("#classes input:checked")
    chosen = [each.get_attribute("value") for each in boxes.all()]
    if chosen:
        for value in chosen:
            page.locator(f"#classes input[value='{value}']").uncheck()
        page.locator("button.main").click()
        page.locator("#message", has_text="choose at least one class").wait_for(timeout=PATIENCE)
        for value in chosen:
            page.locator(f"#classes input[value='{value}']").check()
    page.locator("button.main").click()
    wait_for_the_end(page)
    assert page.locator("#picture").get_attribute("src") == last  # the same request, the same pictures
    page.locator("#at").fill("0")
    assert page.locator("#picture").get_attribute("src") != last
    page.locator("#at").fill(page.locator("#at").get_attribute("max") or "")
    return "pictures"


def write(page: Page) -> str:
    """An empty text, then the one that stood there."""
    text = page.locator("#text").input_value()
    page.locator("#text").fill("")
    page.locator("button.main").click()
    page.locator("#message", has_text="the text is empty").wait_for(timeout=PATIENCE)
    page.locator("#text").fill(text)
    page.locator("button.main").click()
    wait_for_the_end(page)
    assert len(page.locator("#written").inner_text()) >= len(text)
    return "text"


def wait_for_the_end(page: Page) -> None:
    """Until the last step is shown, or there is a mistake."""
    page.wait_for_function(
        "() => get('message').textContent || (!asking && frames.length && place === frames.length - 1)",
        timeout=PATIENCE,
    )
    assert page.locator("#message").inner_text() == ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        for width, height in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
            page.on("console", lambda told: wrong.append(told.text) if "Content Security" in told.text else None)
            page.on("request", lambda asked: is_ours(asked.url, args.address) or wrong.append(f"asked for {asked.url}"))
            page.goto(args.address)
            kind = play(page)
            page.screenshot(path=args.folder / f"{kind}_{width}.png", full_page=True)
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
                wrong.append(f"at {width} the page is {wide} wide")
            page.close()
        browser.close()
    assert not wrong, wrong


def is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


if __name__ == "__main__":
    main()
