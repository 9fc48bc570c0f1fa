"""Servers of the Memory Studio on this machine, and a page that is driven as a user drives it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "notebooks" / "page" / "memory_studio.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SIZE = dict(width=1280, height=720)
PATIENCE = 45_000  # ms for what a busy machine may take
TRIES = 5  # times that a cell's keys are pressed within that


@contextmanager
def serve(kind: str, folder: Path, source: Path = PAGE, **environment: str) -> Iterator[str]:
    """The address of a Voilà page or a JupyterLab with the notebook ``source``, in ``folder``; gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook = folder / "studio.ipynb"
    shutil.copy(source, notebook)
    if kind == "voila":
        command = ["voila", str(notebook), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", "--theme=light",
                   "--template=memory_studio"]
        address = f"http://127.0.0.1:{port}/"
    else:
        command = ["jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
                   f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ServerApp.password=",
                   "--LabApp.news_url=", "--ServerApp.terminals_enabled=False"]
        address = f"http://127.0.0.1:{port}/lab/tree/studio.ipynb?reset"
    (folder / "config").mkdir(exist_ok=True)
    news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = dict(JUPYTER_PATH=str(PAGE.parent), JUPYTER_CONFIG_DIR=str(folder / "config"), JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"),
               JUPYTERLAB_WORKSPACES_DIR=str(folder / "workspaces"), JUPYTER_PREFER_ENV_PATH="1", HF_HUB_OFFLINE="1",
               PYTHONPATH=str(ROOT))
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, stdout=log, stderr=log,
                                  env={**os.environ, **own, **environment})
        try:
            _await(f"http://127.0.0.1:{port}/{'api' if kind == 'lab' else 'voila/static/style.css'}", server, log.name)
            yield address
        finally:
            server.terminate()  # it ends its kernels
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _await(address: str, server: subprocess.Popen, log: str) -> None:
    """Until anything is answered at ``address``; any status will do."""
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {Path(log).read_text()[-2000:]}")
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server does not answer: {Path(log).read_text()[-2000:]}")


class Driver:
    """A page with the studio in it. ``took`` holds the seconds from a click to what it shows, by name."""

    def __init__(self, page, shots: Path | None = None):
        self.page, self.shots = page, shots
        self.outside: list[str] = []  # what was asked of elsewhere
        self.errors: list[str] = []
        self.took: dict[str, float] = {}
        self.frames: list[Path] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, request) -> None:
        if not re.match(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:", request.url):
            self.outside.append(request.url)

    def open(self, address: str) -> None:
        self.page.goto(address)
        if "/lab/" in address:
            run_cell(self.page)
            self.page.keyboard.press("Control+b")  # hides the list of files
        try:
            self.studio.wait_for()
        except Exception as error:  # what stands there in its place
            raise AssertionError(f"no studio: the page says {self.page.locator('body').inner_text()[-2000:]!r}") from error
        self.studio.locator(".pdmem-pane .main-svg").first.wait_for()

    @property
    def studio(self):
        return self.page.locator(".pdmem-studio").first

    @property
    def status(self):
        return self.studio.locator("[role=status]")

    def button(self, name: str):
        return self.studio.get_by_role("button", name=name, exact=True)

    def chosen(self, name: str) -> None:
        """Wait until the button ``name`` of several is the one that is on."""
        self.studio.locator(".widget-toggle-button.mod-active", has_text=name).first.wait_for()

    def box(self, title: str):
        return self.studio.locator(".box", has=self.page.get_by_role("heading", name=title, exact=True))

    def listed(self, tooltip: str):
        """The list or field without a label that has this tooltip."""
        return self.studio.locator(f"select[title^='{tooltip}'], input[title^='{tooltip}']").first

    def labelled(self, label: str):
        """The list or field with this label."""
        return self.studio.get_by_label(label, exact=True)

    def told(self, words: str) -> str:
        """What the status line says, once ``words`` are in it."""
        self.status.filter(has_text=words).wait_for()
        return plain(self.status.inner_text())

    def drawn(self, box: str = "Memory") -> int:
        return int(self.box(box).locator(".pdmem-pane").first.get_attribute("data-drawn") or 0)

    def redrawn(self, act, name: str, box: str = "Memory") -> None:
        """Do something, and wait until the box's figure is drawn anew; the seconds stand in ``took``."""
        before = self.drawn(box)
        start = time.perf_counter()
        act()
        self.page.wait_for_function(
            "([pane, before]) => Number(pane.dataset.drawn) > before",
            arg=[self.box(box).locator(".pdmem-pane").first.element_handle(), before], polling=10)
        self.took[name] = time.perf_counter() - start

    def ask(self, question: str | None = None, answer: str = "") -> None:
        if question is not None:
            self.listed("A question").fill(question)
            self.listed("A question").press("Tab")
        self.labelled("Score").fill(answer)
        self.labelled("Score").press("Tab")
        start = time.perf_counter()
        self.button("Ask").click()
        self.told("Asked after")
        self.took["question"] = time.perf_counter() - start

    def tokens(self):
        return self.box("Question").locator(".widget-toggle-buttons").nth(0).get_by_role("button")

    def entries(self):
        return self.box("Question").locator(".widget-toggle-buttons").nth(1).get_by_role("button")

    def shoot(self, name: str) -> None:
        """A picture of the page as it stands."""
        if self.shots is not None:
            self.page.wait_for_timeout(250)
            self.shots.mkdir(parents=True, exist_ok=True)
            self.frames.append(self.shots / f"{len(self.frames):02}-{name}.png")
            self.page.screenshot(path=self.frames[-1])


def run_cell(page, number: int = 0) -> None:
    """Run a code cell of the notebook that is open in JupyterLab, by its keys.

    A JupyterLab that is still starting takes them for no kernel's, asks for one, or moves the focus elsewhere: so a
    dialog is answered with what it offers, and the keys are pressed again until the cell's prompt says that it runs.
    """
    from playwright.sync_api import TimeoutError

    cell, dialog = page.locator(".jp-Notebook .jp-CodeCell").nth(number), page.locator(".jp-Dialog")
    prompt = cell.locator(".jp-InputPrompt").first
    page.locator(".jp-NotebookPanel-toolbar .jp-Toolbar-kernelName", has_text="Python").first.wait_for()
    page.add_locator_handler(dialog, lambda asked: asked.locator(".jp-Dialog-button.jp-mod-accept").first.click())
    for _ in range(TRIES):
        cell.locator(".cm-content").first.click()
        page.keyboard.press("Control+Enter")
        try:
            page.wait_for_function(r"prompt => /\[[*\d]+\]/.test(prompt.textContent)", arg=prompt.element_handle(),
                                   timeout=PATIENCE / TRIES)
            break
        except TimeoutError:
            pass
    else:
        raise AssertionError(f"cell {number} does not run: its prompt says {prompt.text_content()!r}")
    page.remove_locator_handler(dialog)


def plain(text: str) -> str:
    """Text of a page with its blanks as a keyboard makes them: lists show no-break ones."""
    return text.replace("\xa0", " ")


@contextmanager
def chromium(**options) -> Iterator:
    """A browser of this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, **options)
        try:
            yield browser
        finally:
            browser.close()
