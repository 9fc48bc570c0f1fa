"""A few tries of every fault; ``python -m tests.faults`` makes many more and writes down how many it tried."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parent / "faults"
sys.path.insert(0, str(FOLDER))
from faults import FAULTS  # noqa: E402

NAMES = [name for name in FAULTS if name != "hub_hangs"]  # takes its time; test_backbone and test_data have their own


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """The harness forks, so it runs in a process of its own, of one thread."""
    table = tmp_path_factory.mktemp("faults") / "faults.csv"
    command = [sys.executable, FOLDER, "--times", "2", "--files", "8", "--csv", table, "--only", *NAMES]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert table.exists(), done.stderr
    return pd.read_csv(table).set_index("fault"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", NAMES)
def test_it_holds_under(tried, fault):
    table, said = tried
    if not table["tried"][fault]:
        pytest.skip("this user may mount no disk")
    failures = [line for line in said.splitlines() if line.startswith(fault)]
    assert table["held"][fault] == table["tried"][fault], "\n".join(failures)
