"""The real smoke preset, from end to end; a module of its own, so that another worker can have it beside `test_pipeline`."""

import json
import sys
from pathlib import Path

import pandas
import papermill
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_pipeline import NOTEBOOKS, finish, records, reproduce, workplace  # noqa: E402, F401


@pytest.mark.slow
def test_smoke_preset_from_end_to_end(workplace):  # noqa: F811
    """With the real notebooks; a few of its runs, since every method has its own tests and `make` runs them all."""
    methods = ["slot", "hebbian", "baseline", "slot.format", "slot.lora"]
    whole = {"template": None, "report": None, "backbone": None, "data": None, "seeds": None}
    result = finish(reproduce(methods=",".join(methods), **whole))
    assert result.returncode == 0, result.stderr
    assert set(records()) == {f"{method}-1x-seed42" for method in methods}
    for path in Path("data/runs").glob("*/*/record.json"):
        record = json.loads(path.read_text())
        assert path.parent.name == f"{record['method']}-{record['capacity']}x-seed{record['seed']}"
        assert (record["backbone"], record["data"], record["preset"]) == ("tiny-gpt2", "synthetic", "smoke")
    [figures] = Path("figures").iterdir()
    assert {"own_minus_other.html", "references.html", "turn_finding.html"} <= {path.name for path in figures.iterdir()}
    verdicts = pandas.read_csv(figures / "estimates.csv").dropna(subset="verdict")
    assert dict(zip(verdicts["method"], verdicts["verdict"])).keys() == {"slot", "hebbian"}
    assert all(method in result.stdout for method in methods)
    assert "SYNTHETIC" in result.stdout
    papermill.execute_notebook(NOTEBOOKS / "91_report.ipynb", "again.ipynb", progress_bar=False, kernel_name="python3",
                               parameters=dict(runs_dir="data/runs/" + figures.name, figures_dir="again", preset="smoke",
                                               backbone="tiny-gpt2", data="synthetic", tuned=f"{figures}/beside_published.csv"))
    both = pandas.read_csv("again/beside_published.csv").query("method == 'slot' and ours == ours")
    assert len(both) and (both["tuned"] == both["ours"]).all() and (both["tuned_verdict"] == both["verdict"]).all()
