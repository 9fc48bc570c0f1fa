"""The Memory Studio driven in a real browser: servers and a driver for `tests/test_browser.py` and `make studio-film`."""
