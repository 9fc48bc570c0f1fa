"""`make studio-film`: the studio with SmolLM2 in a browser, filmed; writes figures/studio.gif and figures/studio_times.csv.

The times are seconds from a click to the figure or sentence that it shows, in the browser, on this machine.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import driver  # noqa: E402

WIDTH, COLOURS, LARGEST = 960, 48, 2_000_000  # pixels, of a palette, bytes
SHOTS = driver.ROOT / "build" / "film"


def act(made: driver.Driver) -> list[int]:
    """The scene; milliseconds that each picture stands."""
    stands = []

    def shoot(name: str, for_ms: int) -> None:
        made.shoot(name)
        stands.append(for_ms)

    made.button("Start").click()
    shoot("start", 900)
    for turn in range(8):
        made.redrawn(made.button("Step ▶").click, f"step {turn}")
        shoot(f"turn-{turn}", 450)
    for view in ("Who wrote what", "Decay"):
        made.redrawn(made.button(view).click, f"view {view}")
        shoot(view.replace(" ", "-"), 1200)
    made.ask()
    shoot("asked", 2200)
    made.redrawn(made.tokens().nth(1).click, "token")
    shoot("token", 1800)
    made.redrawn(made.entries().nth(1).click, "entry")
    shoot("entry", 1800)
    behind = made.listed("Turns behind the entry")
    told = next(text for text in behind.locator("option").all_inner_texts() if "parrot" in text)
    made.redrawn(lambda: behind.select_option(told), "turn")
    shoot("turn", 1500)
    made.button("Remove turn").click()
    made.box("Cause").get_by_text("Without turn").wait_for()
    shoot("removed", 2500)
    made.redrawn(made.button("Measure every turn").click, "measure every turn", "Which turn moved the answer")
    made.box("Which turn moved the answer").get_by_text("n = 8").wait_for()
    shoot("measured", 4000)
    return stands


def film(frames: list[Path], stands: list[int], target: Path) -> None:
    """Pictures as an animated GIF of one palette."""
    from PIL import Image

    pictures = []
    for frame in frames:
        picture = Image.open(frame).convert("RGB")
        pictures.append(picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS))
    palette = pictures[-1].quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    flat = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    flat[0].save(target, save_all=True, append_images=flat[1:], duration=stands, loop=0, optimize=True)
    if target.stat().st_size > LARGEST:
        raise RuntimeError(f"{target} has {target.stat().st_size:,} bytes, more than {LARGEST:,}: film fewer pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--method", default="kv_extension")
    given = parser.parse_args()
    if driver.CHROMIUM is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium")
    for old in SHOTS.glob("*.png"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(PDMEM_STUDIO_BACKBONE=given.backbone, PDMEM_STUDIO_METHOD=given.method)
        os.environ.pop("PDMEM_LOCOMO", None)
        with driver.serve("voila", Path(folder), **settings) as address, driver.chromium() as browser:
            made = driver.Driver(browser.new_page(viewport=driver.SIZE), SHOTS)
            made.open(address)
            made.page.set_default_timeout(300_000)
            made.told("trained")
            made.page.set_default_timeout(driver.PATIENCE)
            stands = act(made)
            times = made.took
    film(made.frames, stands, driver.ROOT / "figures" / "studio.gif")
    rows = [f"{name},{seconds:.3f}" for name, seconds in times.items()]
    (driver.ROOT / "figures" / "studio_times.csv").write_text("\n".join(["what,seconds", *rows]) + "\n")
    print(*rows, sep="\n")
    print(f"figures/studio.gif: {len(made.frames)} pictures, {(driver.ROOT / 'figures' / 'studio.gif').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
