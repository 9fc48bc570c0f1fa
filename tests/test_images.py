"""Images are drawn under a time limit, whatever the browser does."""

import os
import signal
import time

import pytest

from pdmem_lib import images
from pdmem_lib.images import Drawer, NoImages

go = pytest.importorskip("plotly.graph_objects", reason="the figures come with the notebooks extra")
pytest.importorskip("kaleido", reason="the figures come with the notebooks extra")
FIGURE = go.Figure(go.Bar(y=[1, 2]))
PNG = b"\x89PNG"


@pytest.fixture
def chromium():
    from choreographer.browsers.chromium import Chromium

    if not Chromium.find_browser(skip_local=False):
        pytest.skip("no Chromium here: apt-get install chromium")


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """Say what the browser does, as a line of shell."""
    def set_to(line):
        path = tmp_path / "browser"
        path.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\n{line}\n")
        path.chmod(0o755)
        monkeypatch.setenv("BROWSER_PATH", str(path))
        return tmp_path / "starts"
    return set_to


def test_a_browser_that_dies_at_its_start_is_tried_twice_and_given_up_by_name(browser):
    starts = browser("exit 1")
    with Drawer() as drawer, pytest.raises(NoImages, match=r"BrowserFailedError.*apt-get install chromium.*BROWSER_PATH"):
        drawer.draw(FIGURE)
    assert starts.read_text().split() == ["started", "started"]


def test_a_browser_that_hangs_at_its_start_is_given_up_in_time(browser):
    browser("exec sleep 300")
    began = time.monotonic()
    with Drawer(limit=3) as drawer, pytest.raises(NoImages, match="TimeoutError"):
        drawer.draw(FIGURE)
    assert time.monotonic() - began < 120  # of the 300, and of ever, as kaleido alone would


def test_no_browser_is_said_at_the_first_image(monkeypatch):
    from choreographer.browsers.chromium import Chromium

    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(Chromium, "find_browser", lambda **_: None)
    with Drawer() as drawer, pytest.raises(NoImages, match="no Chromium is found; apt-get install chromium"):
        drawer.draw(FIGURE)


@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP"])
def test_a_browser_that_is_lost_is_replaced(chromium, monkeypatch, blow):
    monkeypatch.setattr(images, "CLOSING", 2.0)
    with Drawer(limit=20) as drawer:
        assert drawer.draw(FIGURE).startswith(PNG)
        lost = drawer._browser.subprocess
        os.killpg(lost.pid, getattr(signal, blow))
        assert drawer.draw(FIGURE, "svg").startswith(b"<svg")
        assert drawer._browser.subprocess is not lost and lost.poll() is not None


def test_a_figure_that_cannot_be_drawn_is_its_own_error_and_the_browser_goes_on(chromium):
    with Drawer() as drawer:
        with pytest.raises(Exception, match="gif|format") as error:
            drawer.draw(FIGURE, "gif")
        assert not isinstance(error.value, NoImages)
        assert drawer.draw(FIGURE.to_dict(), scale=2).startswith(PNG)


def test_closing_ends_the_browser_and_may_be_asked_twice(chromium):
    drawer = Drawer()
    drawer.draw(FIGURE)
    process = drawer._browser.subprocess
    drawer.close()
    drawer.close()
    assert process.poll() is not None
