"""Data is never code: nothing unpickles, executes, runs a repository's code or a shell; no network unless asked; text
from data is shown as text and never names a file."""

import ast
import json
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
from audit import report

import pdmem_lib as pdmem
from pdmem_lib.experiment import Experiment
from pdmem_lib.synthetic import synthetic_locomo

LIBRARY = sorted(Path(pdmem.__file__).parent.glob("*.py"))
HOSTILE = "<script>alert(1)</script><b>x</b><a href='javascript:alert(2)'>y</a>"
NAMES = ["../../escape", "/etc/passwd", "a/b\\c", "CON", "nul\x00byte", "\u202egnirts", ".", "..", "x" * 1000]

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "ctypes"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
                   "np.load", "numpy.load", "pd.read_pickle", "torch.hub.load", "yaml.load"}


# ---- what the code can do --------------------------------------------------------------------------------------------


def sins(tree):
    """What a module does that it must not, as (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, m) for m in modules if m.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS or name.endswith(".to_pickle"):
                yield node.lineno, name
            for word in node.keywords:
                if word.arg in ("shell", "trust_remote_code", "allow_pickle") and getattr(word.value, "value", True) is not False:
                    yield node.lineno, f"{word.arg}={ast.unparse(word.value)}"
                if word.arg in ("use_safetensors", "weights_only") and getattr(word.value, "value", False) is not True:
                    yield node.lineno, f"{word.arg}={ast.unparse(word.value)}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_a_module_runs_nothing_from_outside(path):
    assert not list(sins(ast.parse(path.read_text())))


@pytest.mark.parametrize("line", ["import pickle", "from pickle import loads", "eval('1')", "torch.load('x')", "os.system('x')",
                                  "subprocess.run('x', shell=True)", "f(trust_remote_code=flag)", "np.load('x', allow_pickle=True)"])
def test_the_search_finds_what_it_is_for(line):
    assert list(sins(ast.parse(line)))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_every_load_from_a_repository_forbids_its_code_or_is_of_our_own_folder(path):
    """A model is loaded as safetensors, or dequantised from GGUF; both hold numbers and nothing else."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained":
            given = {word.arg for word in node.keywords}
            assert {"use_safetensors"} & given or {"gguf_file"} & given, f"{path.name}:{node.lineno}"


def test_a_pickled_model_is_refused(tmp_path):
    import torch

    tiny = pdmem.load_backbone("tiny-gpt2")
    tiny.model.config.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="safetensors weights"):
        pdmem.load_backbone(str(tmp_path))


def test_a_models_own_code_is_not_run(tmp_path):
    """A repository that names code of its own, which would leave a file behind."""
    tiny, mark = pdmem.load_backbone("tiny-gpt2"), tmp_path / "ran"
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        pdmem.load_backbone(str(folder))
    assert not mark.exists()


# ---- network ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """Any look-up or connection is a failure, whatever swallows the error."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network here")

    for what in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, what, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked
    assert not asked


def test_a_whole_run_asks_for_no_network(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    tiny, data = pdmem.load_backbone("tiny-gpt2"), pdmem.load_data("synthetic", "smoke")
    run = Experiment(backbone="tiny-gpt2", data="synthetic", preset="smoke", method="slot", num_entries=16, max_questions=8,
                     output_dir=str(tmp_path / "run"))
    model = run.build(tiny)
    history = pdmem.train(model, data.train[:1], checkpoint=run.checkpoint, **vars(run.train_settings) | dict(progress=False))
    evaluation = pdmem.evaluate(model, data.test[:1], questions_per_bucket=1, max_new_tokens=2, progress=False)
    pdmem.save_run(run, model, data, history, evaluation, started=0.0)
    assert pdmem.MemoryModel.from_pretrained(tmp_path / "run" / "adapter", tiny).num_trainable == model.num_trainable


def test_a_local_folder_asks_for_no_network(no_network, tmp_path):
    tiny = pdmem.load_backbone("tiny-gpt2")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    assert pdmem.load_backbone(str(tmp_path)).fingerprint == tiny.fingerprint


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_from_data_reach_no_path(tmp_path, monkeypatch):
    """Ids, speakers and texts that would be paths: files are made in the cache only, under names of hex digits."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    records = synthetic_locomo(len(NAMES), 1, seed=0, turns_per_session=8)
    for record, name in zip(records, NAMES, strict=True):
        record["sample_id"] = name
        for turn in record["conversation"]["session_1"]:
            turn |= {"speaker": name, "text": name}
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    conversations, tiny = pdmem.load_locomo(file), pdmem.load_backbone("tiny-gpt2")
    model = pdmem.MemoryModel(tiny, "slot", num_entries=16)
    pdmem.train(model, conversations[:2], epochs=1, max_questions=4, progress=False)
    pdmem.evaluate(model, conversations, questions_per_bucket=1, max_new_tokens=1, progress=False)
    assert not list(home.iterdir()) and {path.name for path in tmp_path.iterdir()} == {"home", "cache", "data.json"}
    made = [path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(made) == len(NAMES) + 1
    assert all(set(path.stem) <= set("0123456789abcdef") and path.parts[0] in ("states", "frozen") for path in made)


# ---- HTML ------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def strings(value):
    """Every string in a figure's plain form; the names of legend groups are never shown."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, part in value.items() if key != "legendgroup" for text in strings(part))
    elif hasattr(value, "__iter__"):
        yield from (text for part in value for text in strings(part))


def assert_shows_as_text(figure):
    """Plotly reads tags in texts, and a page is HTML: what came from data stands in neither."""
    shown = list(strings(figure.to_plotly_json()))
    assert not [text for text in shown if "<script" in text or "<b>x</b>" in text or "<a " in text]
    page = figures()._page("stem", figure)
    assert "<script>alert" not in page and "javascript:" not in "".join(map(str, Tags(page).found))
    return any("&lt;script&gt;" in text for text in shown)


def figures():
    pytest.importorskip("plotly", reason="the figures come with the notebooks extra")
    from pdmem_lib import figures

    return figures


def tables():
    import pandas as pd
    import test_data_figures
    import test_figures

    runs = pd.DataFrame([dict(method=method, capacity=capacity, seed=seed) for method in ("slot", HOSTILE)
                         for capacity in (1, 10) for seed in (42, 43)])
    return test_figures.tables(runs) | {"session_timeline": test_data_figures.SESSIONS}


TABLES = ["forgetting_curves", "retained_bars", "knowledge_curves", "log_probability_bars", "category_heatmap", "loss_curves",
          "effect_intervals", "controls_chart", "noise_floor_bars", "published_against_ours", "reference_points", "breakdown",
          "turn_finding", "recall_curves", "session_timeline"]


@pytest.mark.parametrize("name", TABLES)
def test_every_text_column_of_a_figures_table_shows_as_text(name):
    import pandas as pd

    table = tables()[name]
    for column in [column for column in table if pd.api.types.is_string_dtype(table[column].dropna()) and
                   not pd.api.types.is_numeric_dtype(table[column])]:
        hostile = table.copy()
        first = hostile[column].iloc[0]
        hostile[column] = hostile[column].where(hostile[column] != first, f"{HOSTILE}{first}")
        try:
            figure = getattr(figures(), name)(hostile, HOSTILE)
        except (ValueError, KeyError):  # a column with a known vocabulary refuses it
            continue
        assert assert_shows_as_text(figure), column


def test_every_figure_and_widget_of_texts_shows_them_as_text():
    figures()
    widgets = pytest.importorskip("pdmem_lib.widgets")
    import numpy as np
    import test_memory_figures

    for name, draw in test_memory_figures.DRAWN.items():
        assert assert_shows_as_text(draw(HOSTILE)), name
    attention = np.full((2, 2, 3, 4), 0.1)
    shares = [np.full((4, 1 + n), 1 / (1 + n)) for n in range(3)]
    for explorer in (widgets.explore_attention(attention, [HOSTILE] * 3, HOSTILE, shares[2][:, 1:], [HOSTILE] * 2),
                     widgets.explore_provenance(shares, HOSTILE, [HOSTILE] * 2),
                     widgets.explore_matrix([np.eye(3)], HOSTILE), widgets.explore_clipping(HOSTILE, repeats=5)):
        assert assert_shows_as_text(explorer.figure)
        shown = explorer._repr_mimebundle_()
        assert "<script" not in json.dumps(shown[0] if isinstance(shown, tuple) else shown, default=str)


def test_tables_of_data_show_as_text_in_a_notebook():
    records = synthetic_locomo(2, 1, seed=0, turns_per_session=8)
    for record in records:
        for row in record["qa"]:
            row["question"] = HOSTILE
    from pdmem_lib.locomo import parse

    table = pdmem.evaluate(pdmem.MemoryModel(pdmem.load_backbone("tiny-gpt2"), "baseline"), parse(records),
                           questions_per_bucket=1, max_new_tokens=1, progress=False).per_question
    assert "&lt;script&gt;" in table._repr_html_()
    assert {tag for tag, _ in Tags(table._repr_html_()).found} <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p"}


# ---- dependencies ----------------------------------------------------------------------------------------------------


def test_an_audit_fails_for_a_hole_and_says_what_was_not_scanned():
    hole = {"id": "CVE-2026-1", "fix_versions": ["1.1"]}
    sound, holed = ({"name": "a", "version": "1.0", "vulns": vulns} for vulns in ([], [hole]))
    assert report([sound]) == (0, "1 packages scanned, 0 known holes")
    status, text = report([sound, holed, {"name": "b", "skip_reason": "not found"}])
    assert status == 1 and "a 1.0: CVE-2026-1, mended in 1.1" in text and "NOT scanned" in text and "(b ...)" in text
