"""The committed notebooks: chapters carry their outputs, small and without traces of a machine; templates carry none."""

import ast
import importlib
import inspect
import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import nbformat
import pytest

import pdmem_lib
from pdmem_lib import parameters
from pdmem_lib.methods import method_name

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if not path.name.startswith("9")]
SOLUTIONS = sorted((Path(__file__).parent.parent / "notebooks" / "solutions").glob("*.ipynb"))
TEMPLATES = [path for path in NOTEBOOKS if path.name.startswith("9")]
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|opt|usr)/|site-packages")


def name(path):
    return path.stem


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tagged(path, prefix):
    """{tag: source} of the cells with a tag that begins so."""
    return {tag: cell.source for cell in code_cells(path) for tag in cell.metadata.get("tags", [])
            if tag.startswith(prefix)}


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=name)
def test_every_notebook_is_valid_and_introduces_itself(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "**Question:**" in first.source
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
                if line.startswith("# ")]
    assert len(headings) == 1
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:  # papermill reads one literal a line
        assert isinstance(statement, ast.Assign) and statement.lineno == statement.end_lineno
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=name)
def test_no_cell_is_long_and_none_knows_a_machine(path):
    for cell in nbformat.read(path, as_version=4).cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 30, f"{len(lines)} lines: {lines[0]}"
        assert cell.cell_type != "markdown" or len(cell.source.split()) <= 100, lines[0]
    assert not MACHINE.search(path.read_text()), "an absolute path"


@pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=name)
def test_a_chapter_is_committed_with_outputs(path):
    assert path.stat().st_size < 500_000
    cells = code_cells(path)
    assert all(cell.execution_count for cell in cells), "run it top to bottom before committing"
    assert [cell.execution_count for cell in cells] == sorted(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    for output in outputs:  # every interactive figure has a picture beside it
        data = output.get("data", {})
        assert "application/vnd.plotly.v1+json" not in data or "image/png" in data
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


SHOWS = [path for path in CHAPTERS if "inspect.getsource(" in path.read_text()]


@pytest.mark.parametrize("path", SHOWS, ids=name)
def test_code_that_a_chapter_shows_is_the_librarys_as_it_is(path):
    cells = code_cells(path)
    known = {"inspect": inspect, "pdmem": pdmem_lib}
    exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), known)
    shown = [cell for cell in cells if "inspect.getsource(" in cell.source]
    for cell in shown:
        with redirect_stdout(StringIO()) as said:
            exec(cell.source, known)
        assert cell.outputs[0]["text"] == said.getvalue()
    assert shown


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_a_template_is_committed_without_outputs(path):
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("path", [path for path in TEMPLATES if not path.name.startswith("90")], ids=name)
def test_a_template_refuses_what_is_no_parameter_of_its_own(path):
    """papermill only warns; and the comma lists of all are read alike. (90 asks `Experiment` itself.)"""
    cells = code_cells(path)
    (at,) = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    own = [statement.targets[0].id for statement in ast.parse(cells[at].source).body]
    assert cells[at - 1].source.endswith('BEFORE = set(globals()) | {"BEFORE"}')
    known = re.match(r'parameters.require_known\(set\(globals\(\)\) - BEFORE, "([\w ]+)".split\(\)\)$', cells[at + 1].source, re.MULTILINE)
    assert known and known[1].split() == own
    assert not [cell.source for cell in cells if '.split(",")' in cell.source]


def test_an_unknown_parameter_is_named_with_the_known_ones():
    parameters.require_known({"seeds", "_i3", "__doc__"}, ["seeds", "methods"])
    with pytest.raises(ValueError, match="unknown parameters seed: known are seeds, methods"):
        parameters.require_known({"seeds", "seed"}, ["seeds", "methods"])


def test_a_comma_list_is_read_without_its_spaces_and_each_once():
    assert parameters.listed(" slot, M.6 ,hebbian,", method_name) == ["slot", "hebbian"]
    assert parameters.listed(42, int) == [42] and parameters.listed("half the steps, γ 1") == ["half the steps", "γ 1"]
    assert parameters.listed(" ", int, (1, 2)) == [1, 2] and parameters.listed("3", int, (1, 2)) == [3]
    with pytest.raises(ValueError, match="list is empty: name at least one"):
        parameters.listed(" , ", int)
    with pytest.raises(ValueError, match="unknown method 'M.7'"):
        parameters.listed("slot,M.7", method_name)


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_what_a_chapter_imports_exists(path):
    """Without running it: every module that is imported is found, and every name that is taken of one of ours."""
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                assert all(find_spec(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
                           for alias in node.names)


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_exercises_have_a_hint_and_a_solution_that_passes_the_same_check(path):
    """A chapter's ``exercise-1`` is a stub and its ``check-1`` skips it; the solutions' notebook runs that very check."""
    exercises, checks = tagged(path, "exercise-"), tagged(path, "check-")
    assert len(exercises) == len(checks)
    if not exercises:
        return
    text = path.read_text()
    assert text.count("<details>") >= len(exercises), "a hint each"
    assert all("return None" in source for source in exercises.values())
    solved = path.parent / "solutions" / path.name
    assert solved in SOLUTIONS, f"{path.name} has no solutions"
    assert tagged(solved, "check-") == checks
    assert {tag.replace("solution", "exercise") for tag in tagged(solved, "solution-")} == set(exercises)
    for cell in code_cells(solved):
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("check-"):  # compared by nbval, so that a solution that returns None fails
                assert "nbval-check-output" in cell.metadata.tags
                assert [output.text for output in cell.outputs] == [f"Exercise {tag.removeprefix('check-')}: solved\n"]
