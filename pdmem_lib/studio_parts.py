"""Parts of the Memory Studio's page: how it looks, boxes and buttons, and the work that runs behind it."""

import asyncio
import threading
import time
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as w

from .studio_model import Cancelled, Progress

SHOWN = 0.1  # seconds between two steps of the progress bar
STYLE = """<style>
.pdmem-studio { font-size: 14px; line-height: 1.35; color: #222; --jp-widgets-font-size: 14px; max-width: 1360px; margin-top: -8px;
  background: #fff; }
.pdmem-studio .jupyter-button { width: auto; flex-shrink: 0; padding: 0 9px; border: 1px solid #767676;
  border-radius: 4px; background: #f4f6f8; color: #111; }
.pdmem-studio .jupyter-button:focus-visible, .pdmem-studio select:focus-visible, .pdmem-studio input:focus-visible,
.pdmem-studio .noUi-handle:focus-visible { outline: 3px solid #D55E00; outline-offset: 1px; }
.pdmem-studio .jupyter-button.mod-active { background: #08306B; color: #fff; border-color: #08306B; }
.pdmem-studio .jupyter-button.mod-primary { background: #0072B2; color: #fff; border-color: #0072B2; }
.pdmem-studio .jupyter-button:disabled { opacity: .5; }
.pdmem-studio .widget-toggle-buttons .jupyter-button { margin: 1px; height: 27px; line-height: 25px; padding: 0 6px;
  font-size: 13px; }
.pdmem-studio .n { white-space: nowrap; }
.pdmem-studio .widget-toggle-buttons > .widget-label { display: none; }
.pdmem-studio select, .pdmem-studio input { border-color: #767676; color: #111; }
.pdmem-studio h2 { font-size: 19px; margin: 0; } .pdmem-studio small { font-size: 14px; font-weight: normal; }
.pdmem-studio h3 { font-size: 15px; margin: 0 0 2px; }
.pdmem-studio .widget-html-content { line-height: 1.35; }
.pdmem-studio table { border-collapse: collapse; margin: 0; font-size: 14px; }
.pdmem-studio td, .pdmem-studio th { padding: 1px 8px 1px 0; text-align: left; vertical-align: top;
  font-weight: normal; }
.pdmem-studio th { color: #444; } .pdmem-studio td.n { text-align: right; font-variant-numeric: tabular-nums; }
.pdmem-studio .box { border: 1px solid #c8ccd0; border-radius: 6px; padding: 6px 8px; background: #fff; }
.pdmem-studio .told { color: #333; } .pdmem-studio .error { color: #8a1c00; font-weight: 600; }
.pdmem-pane { width: 100%; }
</style>"""


class Work:
    """One long thing at a time, in a thread, with a bar and a button that stops it.

    Where no event loop runs (a test, a script) it is done at once, in place.
    """

    def __init__(self, tell: Callable[[str, bool], None]):
        self.tell = tell
        self.bar = w.IntProgress(0, 0, 1, layout=w.Layout(width="180px", visibility="hidden"))
        self.cancel = w.Button(description="Cancel", tooltip="Stop what is running (what was reached stays)",
                               layout=w.Layout(visibility="hidden"))
        self.cancel.on_click(lambda _: self.stop())
        self.running = ""  # what is
        self.holds = False  # whether it needs the page to stand still
        self._stopped = threading.Event()
        self._shown = 0.0

    def stop(self) -> None:
        """Ask the work to end at its next step."""
        self._stopped.set()
        if self.running:
            self.tell("Stopping …", False)

    def run(self, what: str, work: Callable[[Progress], Any], done: Callable[[Any], None], holds: bool = False) -> None:
        """``done(work(progress))``; `Cancelled` and errors are told. RuntimeError where something runs already.

        ``holds``: it looks at what the page looks at, which must not move meanwhile (`require_free`).
        """
        self.require_idle()
        self.running, self.holds, self._shown = what, holds, 0.0
        self._stopped.clear()
        self.bar.value, self.bar.max = 0, 1
        self.bar.layout.visibility = self.cancel.layout.visibility = "visible"
        self.tell(f"{what} …", False)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._end(self._attempt(work, self._step), done)
            return

        def step(*at) -> None:
            now = time.monotonic()
            if now - self._shown > SHOWN:
                self._shown = now
                loop.call_soon_threadsafe(self._step, *at)

        def act() -> None:
            outcome = self._attempt(work, step)
            loop.call_soon_threadsafe(self._end, outcome, done)

        threading.Thread(target=act, daemon=True, name="pdmem-studio").start()

    def require_idle(self) -> None:
        """RuntimeError while a work is going on."""
        if self.running:
            raise RuntimeError(f"still at work ({self.running}): wait for it, or press Cancel")

    def require_free(self) -> None:
        """RuntimeError while a work is going on that needs the page to stand still."""
        if self.holds:
            self.require_idle()

    def _step(self, done: int, of: int, what: str) -> None:
        self.bar.max, self.bar.value = max(1, of), done
        if not self._stopped.is_set():
            self.tell(f"{what[:1].upper()}{what[1:]}: {done} of {of}", False)

    def _attempt(self, work: Callable[[Progress], Any], step: Progress) -> tuple[Any, BaseException | None]:
        def progress(*at) -> None:
            if self._stopped.is_set():
                raise Cancelled
            step(*at)

        try:
            return work(progress), None
        except Exception as error:  # of whatever kind: it becomes a sentence, and the page stays usable
            return None, error

    def _end(self, outcome: tuple[Any, BaseException | None], done: Callable[[Any], None]) -> None:
        what, self.running, self.holds = self.running, "", False
        self.bar.layout.visibility = self.cancel.layout.visibility = "hidden"
        value, error = outcome
        try:
            done(value)  # also after an error: what was reached is shown
        except Exception as late:
            error = error or late
        if isinstance(error, Cancelled):
            self.tell(f"{what}: cancelled. What was reached until then is shown.", False)
        elif error is not None:
            self.tell(sentence(error), True)


def sentence(error: BaseException) -> str:
    """An error as a sentence for the page."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"this did not work ({type(error).__name__}: {text}): go on with something else, or open the page again"
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def button(text: str, tooltip: str, style: str = "") -> w.Button:
    """A button with a tooltip."""
    return w.Button(description=text, tooltip=tooltip, button_style=style)


LEFT, MIDDLE, RIGHT = ("24%", "270px"), ("40%", "430px"), ("33%", "370px")  # of a row, and at least


def box(title: str, *children: w.Widget, place: tuple[str, str] | None = None) -> w.VBox:
    """A framed part of the page; parts that do not fit beside each other stand below."""
    share, least = place or ("100%", "0")
    box = w.VBox([w.HTML(f"<h3>{escape(title)}</h3>"), *children],
                 layout=w.Layout(flex=f"1 1 {share}" if place else "0 0 auto", min_width=least, margin="2px"))
    box.add_class("box")
    return box


def row(*boxes: w.VBox) -> w.HBox:
    """Widgets side by side."""
    return w.HBox(boxes, layout=w.Layout(align_items="stretch", flex_flow="row wrap"))


def beside(label: str, control: w.Widget) -> w.HBox:
    """A control behind its label, on one line."""
    told = w.HTML(f"<div style='line-height:1.15'>{label}</div>", layout=w.Layout(width="66px", flex="0 0 auto"))
    return w.HBox([told, control], layout=w.Layout(align_items="center"))


def plain_token(token: str) -> str:
    """A token as a button shows it, where text is not read as HTML."""
    return token.replace("\n", "↵").replace(" ", "·")[:16] or "·"
