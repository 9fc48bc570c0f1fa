"""A real browser: the Memory Studio through Voilà and in JupyterLab, and the chapters' controls: what is clicked and shown.

On a tiny backbone, whose adapter is trained in seconds, since the page is tested and not the model. Pictures of every
step are kept in ``build/browser``. `make studio-film` drives the same page with SmolLM2.
"""

import importlib.util
import os
import re
from pathlib import Path

import nbformat
import pytest

from browser import driver

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(420),
    pytest.mark.skipif(driver.CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    *(pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: make setup")
      for name in ("playwright", "voila", "jupyterlab", "anywidget")),
]
SHOTS = driver.ROOT / "build" / "browser"
QUICK = 0.2  # seconds in which a click is answered where no model runs
BUSY = 10  # times that which another test's work beside may take
HOSTILE = "Eve: <script>window.hacked = 1</script> <img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def browser():
    with driver.chromium() as made:
        yield made


@pytest.fixture(scope="module", params=["voila", "lab"])
def opened(request, browser, tmp_path_factory):
    """(driver, folder of exports, kind) of an open page."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = dict(PDMEM_CACHE=str(folder / "cache"), PDMEM_STUDIO_BACKBONE="tiny-llama",
                    PDMEM_STUDIO_METHOD="kv_extension", PDMEM_STUDIO_FOLDER=str(folder / "out"),
                    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PDMEM_LOCOMO", raising=False)
        with driver.serve(request.param, folder, **settings) as address:
            page = browser.new_page(viewport=driver.SIZE)
            made = driver.Driver(page, SHOTS / request.param)
            made.open(address)
            made.told("trained 120 steps")  # by itself, as no adapter was kept
            yield made, folder / "out", request.param
            page.close()


def test_a_walk_from_a_turn_to_its_cause(opened):
    """Replay, scrub, ask, token -> entry -> turn, remove, measure; in one test, as each step stands on the last."""
    made, _, _ = opened
    made.shoot("opened")
    # replay and scrub
    made.redrawn(made.button("◀ Back").click, "step back")
    made.button("Start").click()
    made.box("Conversation").get_by_text("After 0 of 8 turns").wait_for()
    made.redrawn(made.button("Step ▶").click, "step")
    made.box("Conversation").get_by_text("Turn 0 changed the memory by").wait_for()
    handle = made.studio.locator(".noUi-handle").first
    handle.focus()
    made.redrawn(lambda: made.page.keyboard.press("ArrowRight"), "scrub")
    made.box("Conversation").get_by_text("Turn 1 changed the memory by").wait_for()
    made.listed("Speed of playing").select_option("4 turns/s")
    made.button("▶ Play").click()
    made.box("Conversation").get_by_text("Turn 7 changed the memory by").wait_for()
    made.button("▶ Play").wait_for()  # it has come to the end
    made.shoot("played")
    # the views of the memory
    for view in ("Who wrote what", "Decay", "Entries"):
        made.redrawn(made.button(view).click, view)
        assert made.box("Memory").locator(".main-svg").first.is_visible()
    # ask
    made.ask(answer="parrot")
    rows = made.box("Question").locator("table tr")
    assert rows.count() == 4 and "another's" in rows.nth(3).inner_text()
    assert "right: parrot" in rows.nth(0).inner_text()
    made.shoot("asked")
    # token -> block and head -> entry -> turns
    made.redrawn(made.tokens().nth(1).click, "token")
    made.chosen("Attention")
    made.redrawn(lambda: made.labelled("Block").select_option("1"), "block")
    made.redrawn(lambda: made.labelled("Head").select_option("0"), "head")
    made.redrawn(made.entries().nth(1).click, "entry")
    made.chosen("Who wrote what")
    behind = made.listed("Turns behind the entry")
    first = driver.plain(behind.locator("option").first.inner_text())
    assert "% turn " in first
    made.redrawn(lambda: behind.select_option(index=0), "turn behind")
    turn = first.split("turn ")[1].split()[0]
    made.box("Conversation").get_by_text(f"Turn {turn} changed the memory by").wait_for()
    made.shoot("followed")
    # remove it, empty the entry
    cause = made.box("Cause")
    made.button("Remove turn").click()
    cause.get_by_text(f"Without turn {turn}").wait_for()
    assert "nats" in cause.inner_text() and "→" in cause.inner_text()
    made.button("Empty entry").click()
    cause.get_by_text("Without entry").wait_for()
    # measure all
    made.redrawn(made.button("Measure every turn").click, "measure", "Which turn moved the answer")
    made.box("Which turn moved the answer").get_by_text("n = 8").wait_for()
    ranking = made.listed("Turns by what the answer loses")
    assert ranking.locator("option").count() == 8
    made.shoot("measured")
    slow = {name: seconds for name, seconds in made.took.items() if name not in ("question", "measure")
            and seconds > QUICK * BUSY}
    assert not slow


def test_a_click_on_the_map_chooses_an_entry_and_a_turn(opened):
    made, _, _ = opened
    made.button("Who wrote what").click()
    plot = made.box("Memory").locator(".pdmem-pane .nsewdrag").first
    plot.wait_for()
    box = plot.bounding_box()
    made.page.mouse.click(box["x"] + box["width"] * 2.5 / 8, box["y"] + box["height"] / 2)  # the third of eight turns
    made.box("Conversation").get_by_text("Turn 2 changed the memory by").wait_for()
    made.box("Memory").get_by_text("is framed").wait_for()
    told = made.box("Memory").inner_text()
    assert re.search(r"Entry \d+ is framed", told)
    assert made.listed("Turns; the bar").input_value().split()[1] == "2"


def test_methods_are_switched_and_compared(opened):
    made, _, kind = opened
    made.labelled("Method").select_option("M.6 Slots")
    made.told("M.6 Slots, 1×. Adapter untrained")
    made.redrawn(made.button("Collisions").click, "collisions")
    made.labelled("Method").select_option("M.4 Hebbian")
    made.told("M.4 Hebbian, 1×")
    made.redrawn(made.button("Matrix").click, "matrix")
    made.shoot("matrix")
    if kind == "voila":  # training starts, and is stopped
        made.button("Train adapter").click()
        made.told("Training M.4 Hebbian")
        made.button("Cancel").click()
        made.told("cancelled")
    made.labelled("Compare with").select_option("M.3 KV extension")
    made.button("Compare side by side").click()
    made.told("on the same conversation and question")
    beside = made.box("Another memory of the same conversation")
    assert beside.locator("table tr").count() == 8 and beside.locator(".pdmem-pane .main-svg").count() >= 2
    beside.scroll_into_view_if_needed()
    made.shoot("compared")


def test_turns_are_typed_and_what_is_typed_stays_text(opened):
    made, _, _ = opened
    made.listed("A turn of your own").fill(HOSTILE)
    made.listed("A turn of your own").press("Tab")
    made.button("Write").click()
    made.told("Turn 8 is written")
    made.box("Conversation").get_by_text("<script>").first.wait_for()  # as text; the status line speaks before the box is drawn
    made.ask("<img src=x onerror='window.hacked = 3'>?", "<b>Eve</b>")
    made.button("Remove turn").click()
    made.box("Cause").get_by_text("Without turn").wait_for()
    assert made.page.evaluate("window.hacked") is None
    made.button("Undo").click()
    made.told("Taken back, exactly")
    made.button("Ask").focus()  # by the keyboard alone
    made.listed("A question").fill("")
    made.listed("A question").press("Tab")
    made.page.keyboard.press("Enter")
    made.told("The question is empty: type one")
    assert made.studio.locator(".error").is_visible()


def test_every_view_is_exported_and_the_state_saved(opened):
    made, out, kind = opened
    made.button("Save state").click()
    made.told("memory.safetensors")
    assert (Path(out) / "memory.safetensors").is_file()
    if kind == "voila":  # once: it draws seven figures
        made.ask("Which animal did Ann adopt?", "parrot")
        made.button("Export").click()
        made.told("files are in")
        names = {file.name for file in Path(out).iterdir()}
        for view in ("entries", "who_wrote_what", "decay", "matrix", "attention", "answer",
                     "cause"):
            assert {f"{view}.png", f"{view}.html"} <= names


def test_nothing_was_asked_of_a_network_and_no_script_failed(opened):
    made, _, _ = opened
    assert made.outside == [] and made.errors == []
    width = made.page.evaluate("document.querySelector('.pdmem-studio').scrollWidth - "
                               "document.querySelector('.pdmem-studio').clientWidth")
    assert width <= 2, "the page is wider than its place"


# ---- the chapters' own controls --------------------------------------------------------------------------------------

CONTROLS = {  # a call of `pdmem_lib.widgets`; what its figure says at first, and once its first control was moved
    "explore_attention(rng.random((2, 3, 4, 5)) / 5, list('abcd'), 'toy', labels=list('xyz'), shares=rng.random((5, 3)) / 3)":
        ("mean over blocks and heads", "block 0"),
    "explore_provenance([rng.random((4, 1 + n)) / (1 + n) for n in range(4)], 'toy')":
        ("after turn 2 of 2", "after turn 1 of 2"),
    "explore_matrix([rng.random((6, 6)) for _ in range(3)], 'toy')": ("after 2 turns", "after 1 turns"),
    "explore_clipping('toy', repeats=20)": ("spread 15 points", "spread 14 points"),
}


@pytest.fixture(scope="module")
def chapter(browser, tmp_path_factory):
    """A notebook with every kind of control that the chapters have, run in JupyterLab."""
    folder = tmp_path_factory.mktemp("controls")
    imports = "import numpy as np\nfrom pdmem_lib import widgets\nrng = np.random.default_rng(0)\nwidgets."
    cells = [nbformat.v4.new_code_cell((imports if i == 0 else "widgets.") + call) for i, call in enumerate(CONTROLS)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), folder / "controls.ipynb")
    with driver.serve("lab", folder, folder / "controls.ipynb") as address:
        page = browser.new_page(viewport=driver.SIZE)
        page.set_default_timeout(driver.PATIENCE)
        page.goto(address)
        for number in range(len(CONTROLS)):
            driver.run_cell(page, number)
        yield page
        page.close()


@pytest.mark.parametrize("number", range(len(CONTROLS)), ids=[call.split("(")[0] for call in CONTROLS])
def test_a_chapters_control_redraws_its_figure(chapter, number):
    first, moved = list(CONTROLS.values())[number]
    cell = chapter.locator(".jp-Notebook .jp-CodeCell").nth(number)
    cell.scroll_into_view_if_needed()
    shown = cell.locator(".jp-OutputArea .main-svg")
    shown.filter(has_text=first).first.wait_for()
    assert shown.filter(has_text=moved).count() == 0
    if cell.locator("select").count():
        cell.locator("select").first.select_option(index=1)
    else:
        cell.locator(".noUi-handle").first.focus()
        chapter.keyboard.press("ArrowLeft")
    shown.filter(has_text=moved).first.wait_for()
    SHOTS.mkdir(parents=True, exist_ok=True)
    chapter.screenshot(path=SHOTS / f"control-{number}.png")
