"""One source of versions: pyproject.toml. What is made from it, installed by it or said about it must agree with it."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import FunctionType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [
    *PYPROJECT["project"]["dependencies"],
    *(pin for extra in PYPROJECT["project"]["optional-dependencies"].values() for pin in extra),
    PYPROJECT["tool"]["pdmem"]["fallback-model"],
]
CLUSTER = set(PYPROJECT["project"]["optional-dependencies"]["cluster"]) - set(
    PYPROJECT["project"]["optional-dependencies"]["notebooks"])


def test_environment_yml_is_what_pyproject_gives(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pyproject2conda", "project", "--overwrite", "force"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    fresh = (tmp_path / "environment.yml").read_text().strip()
    assert (ROOT / "environment.yml").read_text().strip() == fresh, "out of date: run `make environment.yml`, commit it"
    missing = [pin for pin in PINS[:-1] if pin not in CLUSTER and f"- {pin}\n" not in fresh + "\n"]
    assert not missing  # every pin, the fallback model aside, which `make setup` adds without its requirements


@pytest.mark.parametrize("pin", PINS)
def test_installed_version_is_the_pinned_one(pin):
    name, pinned = pin.split("==")  # every requirement is an exact pin
    try:
        version(name)
    except PackageNotFoundError:
        if pin in CLUSTER:
            pytest.skip("installed when a profile is first asked for: make reproduce PROFILE=slurm")
    assert version(name).split("+")[0] == pinned, "another version is installed: run `make setup`"


def test_makefile_reads_the_pins_that_pyproject_has():
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "NO_VENV"}
    command = ["make", "--no-print-directory", "-n", "-B", "setup"]
    made = subprocess.run(command, cwd=ROOT, env=clean, check=True, capture_output=True, text=True).stdout
    torch = next(pin for pin in PINS if pin.startswith("torch=="))
    assert made.index(f'"{torch}"') < made.index("[notebooks,docs,test]") < made.index(f'--no-deps "{PINS[-1]}"')


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


def test_pages_link_to_files_and_headings_that_exist():
    """Of the links in every committed page that lead to this repository."""
    pages = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [page for page in pages if "@@" in (ROOT / page).read_text()] == []  # a place that was left to fill
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())]
    inside = [(page, *link.partition("#")[::2]) for page, link in links if "://" not in link]
    assert len(inside) > 30
    for page, path, heading in inside:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}"
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, f"{page} links to {path}#{heading}"


# ---- a release -------------------------------------------------------------------------------------------------------

FIGURES = {"_maps", "_plot", "causal_figures", "control_figures", "cost_figures", "data_figures", "diagrams",
           "evidence_figures", "figures", "images", "memory_figures", "pane", "reading_figures", "sensitivity",
           "studio_controls", "studio_drawing", "studio_model", "studio_parts", "studio_view", "widgets"}
FOR_OTHERS = {  # a requirement that no line here imports -> who does, when the library calls it
    "accelerate": "transformers, to read the wheel's GGUF", "gguf": "transformers, likewise", "pyarrow": "pandas, to write parquet",
}
ONLY_CORE = """
import importlib, sys
refused, modules = set(sys.argv[1].split(",")), sys.argv[2].split(",")
class Without:  # as if the extras were not installed
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
for module in modules:
    importlib.import_module(f"pdmem_lib.{module}")
"""


def imported_as(pin):
    """Top-level modules that a pinned distribution brings."""
    name = re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower()
    return {module for module, brought_by in packages_distributions().items()
            if name in {re.sub(r"[-_.]+", "-", one).lower() for one in brought_by}}


def library_modules():
    return {path.stem for path in (ROOT / "pdmem_lib").glob("*.py")} - {"__init__", "__main__"}


def test_the_library_imports_nothing_of_an_extra():
    """Figures and widgets aside, which the chapters import by themselves."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    refused = {module for extra in extras.values() for pin in extra for module in imported_as(pin)}
    assert {"plotly", "ipywidgets", "papermill", "snakemake", "pytest"} <= refused
    assert library_modules() >= FIGURES
    core = sorted(library_modules() - FIGURES)
    arguments = [",".join(sorted(refused)), ",".join([*core, "__main__"])]
    done = subprocess.run([sys.executable, "-c", ONLY_CORE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = subprocess.run([sys.executable, "-c", ONLY_CORE, arguments[0], "figures"], capture_output=True, text=True)
    assert "No module named 'plotly'" in figures.stderr  # so the extras are indeed out of reach


def test_the_library_imports_all_that_it_requires_and_requires_all_that_it_imports():
    pins = PYPROJECT["project"]["dependencies"]
    trees = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "pdmem_lib").glob("*.py")}
    found = {stem: {name.partition(".")[0] for node in ast.walk(tree) for name in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else
        [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])} for stem, tree in trees.items()}
    used = set().union(*(names for stem, names in found.items() if stem not in FIGURES))
    idle = [pin for pin in pins if not imported_as(pin) & used and pin.split("==")[0] not in FOR_OTHERS]
    assert not idle, "required by nobody"
    brought = set().union(*map(imported_as, pins))
    assert used - set(sys.stdlib_module_names) - {"pdmem_lib"} <= brought, "imported, and not required"


def test_one_version_is_said_everywhere():
    import pdmem_lib

    said = PYPROJECT["project"]["version"]
    assert pdmem_lib.__version__ == said == version("pdmem"), "another version is installed: run `make setup`"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == said and citation["license"] == PYPROJECT["project"]["license"] == "MIT"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    newest = re.search(r"^## (\S+) — (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest.groups() == (said, citation["date-released"])


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = set(re.findall(r"^  make (\S+)", shown, flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z][\w.-]*):", makefile, flags=re.MULTILINE))
    assert targets == listed
    assert set(re.search(r"^\.PHONY: (.+)", makefile, flags=re.MULTILINE)[1].split()) <= listed


def test_every_public_name_has_a_docstring():
    """Of a module of the library, its functions and classes, and their methods unless a parent's says it already."""
    missing = []
    for stem in sorted(stem for stem in library_modules() if not stem.startswith("_")):
        module = importlib.import_module(f"pdmem_lib.{stem}")
        assert module.__doc__, stem
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__ or not callable(thing):
                continue
            members = [m for m in vars(thing) if not m.startswith("_")] if inspect.isclass(thing) else []
            methods = [m for m in members if isinstance(vars(thing)[m], (FunctionType, property, classmethod, staticmethod))]
            missing += [f"{stem}.{name}.{m}" for m in methods if not inspect.getdoc(getattr(thing, m))]
            missing += [] if thing.__doc__ and not thing.__doc__.startswith(f"{name}(") else [f"{stem}.{name}"]
    assert not missing


@pytest.mark.slow
def test_the_reference_is_built_without_a_network_and_loads_nothing(tmp_path):
    pytest.importorskip("pdoc", reason="the reference is made by the docs extra")
    modules = [f"pdmem_lib.{stem}" for stem in sorted(library_modules()) if not stem.startswith("_")]
    command = [sys.executable, "-m", "pdoc", "--docformat", "markdown", "-o", str(tmp_path), "pdmem_lib", *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    pages = {str(path.relative_to(tmp_path).with_suffix("")).replace("/", "."): path.read_text() for path in tmp_path.rglob("*.html")}
    assert set(modules) <= set(pages)
    for page in pages.values():
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?:https?:)?//[^\"']*", page)
