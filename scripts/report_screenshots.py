"""Pictures of a report page, as a browser shows it: its sections, in the dark, and on a phone.

    python scripts/report_screenshots.py small/report/report.html --output docs/images --prefix report-

Needs Playwright and a Chromium or Chrome on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECTIONS = {
    "verdict": ("verdict", "trade"),
    "speed": ("speed",),
    "exits": ("exits",),
    "training": ("training",),
    "transport": ("transport",),
    "compression": ("compression",),
}
"""Pictures by name, and the sections of the page that each shows, without the texts of the data; what a page lacks is
left out."""
WIDTH, HEIGHT, PHONE = 1180, 900, {"width": 390, "height": 844}


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Takes the pictures, prints and returns their files; exits with a message where there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--model", help="the model whose exits are shown; the page's own choice unless given")
    parser.add_argument(
        "--only", choices=SECTIONS, help="one of the pictures of sections; all pictures unless given"
    )
    given = parser.parse_args(arguments)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("no chromium or google-chrome on the path: install one")
    from playwright.sync_api import sync_playwright

    given.output.mkdir(parents=True, exist_ok=True)
    address, written = given.page.resolve().as_uri(), []

    def path(name: str) -> Path:
        written.append(given.output / f"{given.prefix}{name}.png")
        return written[-1]

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        desktop = {"viewport": {"width": WIDTH, "height": HEIGHT}, "reduced_motion": "reduce"}
        page = _open(browser, address, **desktop)
        if given.model:
            names = page.locator("#model option").all_text_contents()
            place = [name.removesuffix(" (exits)").strip() for name in names].index(given.model)
            page.select_option("#model", index=place)
            for run in page.locator("#training > details").all():
                summary = run.locator("> summary")
                of_model = summary.text_content().strip().startswith(f"{given.model} ")
                if of_model != (run.get_attribute("open") is not None):
                    summary.click()
            # What was clicked came into view; the sections' places are counted from the top.
            page.evaluate("scrollTo(0, 0)")
        for name, sections in SECTIONS.items():
            if given.only not in (None, name):
                continue
            found = [page.locator(f"#{section}") for section in sections]
            shown = [box for part in found if part.count() and (box := part.bounding_box())]
            if shown:
                page.screenshot(path=path(name), clip=_around(shown), full_page=True)
        if given.only is None:
            _open(browser, address, color_scheme="dark", **desktop).screenshot(path=path("dark"))
            _open(browser, address, viewport=PHONE).screenshot(path=path("phone"))
        browser.close()
    for file in written:
        print(file)
    return written


def _open(browser: Any, address: str, **context: Any) -> Any:
    page = browser.new_context(**context).new_page()
    page.goto(address)
    page.wait_for_load_state("networkidle")
    return page


def _around(boxes: list[Any], margin: float = 8.0) -> dict[str, float]:
    left, top = min(box["x"] for box in boxes), min(box["y"] for box in boxes)
    right = max(box["x"] + box["width"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    return {
        "x": max(0.0, left - margin),
        "y": max(0.0, top - margin),
        "width": right - left + 2 * margin,
        "height": bottom - top + 2 * margin,
    }


if __name__ == "__main__":
    main()
