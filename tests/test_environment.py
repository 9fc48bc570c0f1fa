"""One source of versions: pyproject.toml. What is made from it, installed by it or said about it must agree with it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [
    *PYPROJECT["project"]["dependencies"],
    *(pin for extra in PYPROJECT["project"]["optional-dependencies"].values() for pin in extra),
    PYPROJECT["tool"]["pdmem"]["fallback-model"],
]


def test_environment_yml_is_what_pyproject_gives(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pyproject2conda", "project", "--overwrite", "force"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    fresh = (tmp_path / "environment.yml").read_text().strip()
    assert (ROOT / "environment.yml").read_text().strip() == fresh, "out of date: run `make environment.yml`, commit it"
    missing = [pin for pin in PINS[:-1] if f"- {pin}\n" not in fresh + "\n"]
    assert not missing  # every pin, the fallback model aside, which `make setup` adds without its requirements


@pytest.mark.parametrize("pin", PINS)
def test_installed_version_is_the_pinned_one(pin):
    name, pinned = pin.split("==")  # every requirement is an exact pin
    assert version(name).split("+")[0] == pinned, "another version is installed: run `make setup`"


def test_makefile_reads_the_pins_that_pyproject_has():
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "NO_VENV"}
    command = ["make", "--no-print-directory", "-n", "-B", "setup"]
    made = subprocess.run(command, cwd=ROOT, env=clean, check=True, capture_output=True, text=True).stdout
    torch = next(pin for pin in PINS if pin.startswith("torch=="))
    assert made.index(f'"{torch}"') < made.index("[notebooks,test]") < made.index(f'--no-deps "{PINS[-1]}"')


def test_readme_names_only_targets_and_variables_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, flags=re.DOTALL))
    calls = re.findall(r"(?:^|[`\s])make((?: +[\w.=,/-]+)+)", code)
    words = {word for call in calls for word in call.split()}
    targets = {word for word in words if "=" not in word}
    variables = {word.partition("=")[0] for word in words if "=" in word}
    assert {"reproduce", "test"} <= targets
    assert targets <= set(re.findall(r"^([a-z.]+):", makefile, flags=re.MULTILINE))
    assert variables <= set(re.findall(r"^(?:ifdef )?([A-Z_]+)(?: \?=|$)", makefile, flags=re.MULTILINE))
