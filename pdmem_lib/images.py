"""Figures as images: kaleido draws them in a Chromium of its own, under a time limit.

kaleido's own blocking calls wait without end for a browser that dies at its start or answers no more, and a notebook
waits with them. Here a lost browser is replaced once, and then the images are given up, by name.
"""

import asyncio
import atexit
import os
import signal
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from threading import Thread

LIMIT = 60.0  # seconds for the browser's start, and for each image [D]; a start takes 1 to 2, an image 0.1 to 0.5
CLOSING = 10.0  # seconds that a browser is given to end by itself [D]


class NoImages(RuntimeError):
    """No image can be drawn here; the message says why, and the mend where there is one."""


class Drawer:
    """A Chromium that draws figures. It starts at once and in the background; `close` it, or use it in a ``with``.

    Args:
        limit: seconds for the browser's start and for each image.

    Raises:
        NoImages: kaleido is not installed.
    """

    def __init__(self, limit: float = LIMIT):
        try:
            import kaleido
            from choreographer import errors
        except ImportError:
            raise NoImages("kaleido is not installed; pip install kaleido") from None
        self._kaleido, self._limit, self._no_browser = kaleido, limit, errors.ChromeNotFoundError
        self._lost = (errors.BrowserClosedError, errors.BrowserFailedError, errors.ChannelClosedError, CancelledError,
                      TimeoutError)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        self._start()
        atexit.register(self.close)

    def draw(self, figure: object, kind: str = "png", scale: float = 1.0) -> bytes:
        """The bytes of a plotly figure, or of its dict, as ``kind`` (png, svg, pdf) at ``scale`` times its size.

        Raises:
            NoImages: no Chromium is found, or two in a row did not start or answer within the limit.
        """
        for again in (True, False):
            try:
                self._opened.result(self._limit)
                return self._do(self._browser.calc_fig(figure, dict(format=kind, scale=scale))).result(self._limit)
            except self._no_browser:
                raise NoImages("no Chromium is found; apt-get install chromium") from None
            except self._lost as error:
                self._stop()
                if not again:
                    raise NoImages(f"no Chromium could be run ({type(error).__name__}); apt-get install chromium, or "
                                   "name another with BROWSER_PATH") from error
                self._start()

    def close(self) -> None:
        """End the browser; nothing is drawn after it. A second call does nothing."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        wait([self._opened], min(self._limit, CLOSING))  # one that is starting leaves processes behind
        self._stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1)

    def __enter__(self) -> "Drawer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _start(self) -> None:
        self._browser = None
        self._opened = self._do(self._open())

    async def _open(self) -> None:
        self._browser = self._kaleido.Kaleido(mathjax=False)  # MathJax would come from the network
        await self._browser.open()

    def _stop(self) -> None:
        """End the browser, by force where it has not started or does not answer; its folder goes with it."""
        if not self._opened.done():
            self._kill()
        if self._browser is not None:
            with suppress(Exception):  # whatever it says: it is being thrown away
                self._do(self._browser.close()).result(CLOSING)
        self._kill()

    def _kill(self) -> None:
        process = getattr(self._browser, "subprocess", None)
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # kaleido starts it as the head of a group

    def _do(self, work: Coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)
