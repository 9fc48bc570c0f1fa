"""The finished runs of one grid as tables: those in a folder of runs and, where asked, those that figures keep [D].

A large grid is made in pieces, on one machine after another. What a report writes (`save`) is enough to make it again
without the runs' folders: so the next piece is reported together with all before it (`collect` with ``figures_dir``).
A report of fewer runs does not take the place of one of more unasked (`refuse_to_lose`): those runs may be nowhere else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .experiment import load_record, read_record
from .files import atomic_path, save_json

if TYPE_CHECKING:
    import pandas

TABLES = ("summary", "forgetting", "knowledge", "categories", "history", "turns")
RECORDS = "records"
RUN = ("method", "capacity", "seed")


@dataclass(frozen=True)
class Collected:
    """``records`` by run ("slot-1x-seed42"), ``kept``: those of them that come from the figures' folder; ``tables`` by
    name of `TABLES`, ``questions`` (a row a run and question) and ``references`` (as `references.ask_references` made
    them; None where no run did): the rows of all runs. What was kept has no texts."""

    records: dict[str, dict[str, Any]]
    kept: tuple[str, ...]
    tables: "dict[str, pandas.DataFrame]"
    questions: "pandas.DataFrame"
    references: "pandas.DataFrame | None"


def collect(runs_dir: str | Path, figures_dir: str | Path | None = None) -> Collected:
    """All finished runs in ``runs_dir`` and, of those that a report left in ``figures_dir``, the ones not there.

    ValueError where there is none, a record or table is damaged, or a record is of a run that no table holds.
    """
    import pandas as pd

    folders = {path.parent.name: path.parent for path in sorted(Path(runs_dir).glob("*/record.json"))}
    records = {name: load_record(folder) for name, folder in folders.items()}
    committed = sorted((Path(figures_dir) / RECORDS).glob("*.json")) if figures_dir is not None else []
    kept = {file.stem: read_record(file) for file in committed if file.stem not in records}
    if not records and not kept:
        raise ValueError(f"no finished run in {runs_dir}: make one with notebooks/90_run_experiment.ipynb")

    def rows(file: str, read: Any) -> "pandas.DataFrame | None":
        found = [read(folder / file) for name, folder in folders.items()
                 if file in records[name].get("files", [file]) and (folder / file).is_file()]
        if kept and (Path(figures_dir) / file).is_file():
            found.append(_only(read(Path(figures_dir) / file), kept))
        return pd.concat(found, ignore_index=True) if found else None

    tables = {name: rows(f"{name}.csv", pd.read_csv) for name in TABLES}
    if missing := [name for name, table in tables.items() if table is None]:
        raise ValueError(f"{figures_dir} keeps records but no {missing[0]}.csv: make the report of these runs again")
    questions = rows("per_question.parquet", pd.read_parquet)
    for table, what in ((tables["summary"], "summary.csv"), (questions, "per_question.parquet")):
        told = set() if table is None else set(table[list(RUN)].itertuples(index=False, name=None))
        if lacking := [name for name, record in kept.items() if tuple(record[key] for key in RUN) not in told]:
            raise ValueError(f"{figures_dir}/{RECORDS} holds {', '.join(lacking)}, of which {what} beside it has no row: they are "
                             "of two reports; take the folder back as it was (git checkout, say), or delete these records")
    return Collected({**records, **kept}, tuple(kept), tables, questions, rows("references.parquet", pd.read_parquet))


def refuse_to_lose(names: Iterable[str], figures_dir: str | Path) -> None:
    """ValueError where ``figures_dir`` tells of runs that a report of ``names`` ("slot-1x-seed42") would leave out."""
    lost = sorted({file.stem for file in (Path(figures_dir) / RECORDS).glob("*.json")} - set(names))
    if lost:
        few = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(f"a report of these runs alone would take the place of {figures_dir}, which also tells of {few}: "
                         "with KEEP=1 they are reported together, with KEEP=0 those are given up, and FIGURES=folder "
                         "(figures_dir of notebooks/91_report) writes elsewhere")


def save(runs: Collected, figures_dir: str | Path, give_up: bool = False) -> None:
    """Write the tables, without any text of the data, and the records into ``figures_dir``, for `collect`.

    Where ``figures_dir`` tells of runs that are not among these: ValueError and nothing written (`refuse_to_lose`), or,
    to ``give_up`` those, their records are deleted, so that records and tables are of the same runs.
    """
    folder = Path(figures_dir)
    if not give_up:
        refuse_to_lose(runs.records, folder)
    for file in (folder / RECORDS).glob("*.json"):
        if file.stem not in runs.records:
            file.unlink()
    for name, table in runs.tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False, float_format="%.6g")
    for name, table in {"per_question": runs.questions, "references": runs.references}.items():
        if table is not None:
            with atomic_path(folder / f"{name}.parquet") as partial:
                table.drop(columns=[column for column in table if _is_text(column)]).to_parquet(partial, index=False)
    for name, record in runs.records.items():
        save_json(folder / RECORDS / f"{name}.json", record, indent=2)


def _is_text(column: str) -> bool:
    """Whether a column holds words of the data: LoCoMo's licence (CC BY-NC) does not let them travel with a project."""
    return column == "question" or column.startswith("answer") and column != "answer_type"


def _only(table: "pandas.DataFrame", records: Mapping[str, Mapping[str, Any]]) -> "pandas.DataFrame":
    """The rows of these runs."""
    runs = {tuple(record[name] for name in RUN) for record in records.values()}
    return table[[key in runs for key in table[list(RUN)].itertuples(index=False, name=None)]]


def agreement(one: Collected, two: Collected) -> "pandas.DataFrame":
    """How far the runs that both hold lie apart: a row a run, to tell what another machine or version changes [D].

    method, capacity, seed; machine_one, machine_two; n questions; same_answers (%, own memory; NaN where a side keeps no
    texts); retained_one, retained_two (printed mean, %); logp_difference (nats per token, own, two - one, mean) and
    logp_apart (mean of its size). ValueError where they share no run, or a run's questions, backbone, data or settings
    differ: these are two experiments and not one on two machines.
    """
    import pandas as pd

    if not (shared := [name for name in one.records if name in two.records]):
        raise ValueError(f"no run stands in both: {', '.join(one.records)}; and {', '.join(two.records)}")
    rows = []
    for name in shared:
        run = {key: one.records[name][key] for key in RUN}
        _require_same_experiment(name, one.records[name], two.records[name])
        a, b = (_only(each.questions, {name: run}).set_index(["conversation", "number"]).sort_index() for each in (one, two))
        if not a.index.equals(b.index):
            raise ValueError(f"{name} was asked other questions in one than in the other: these cannot be compared")
        texts = [table["answer_own"] if "answer_own" in table else pd.Series(index=a.index, dtype=object) for table in (a, b)]
        told = not any(text.isna().any() for text in texts)
        apart = b["logp_own"] - a["logp_own"]
        retained = [_only(each.tables["summary"], {name: run})["retained_mean"].item() for each in (one, two)]
        rows.append(run | {
            "machine_one": _machine(one.records[name]), "machine_two": _machine(two.records[name]), "n": len(a),
            "same_answers": 100 * (texts[0] == texts[1]).mean() if told else float("nan"),
            "retained_one": retained[0], "retained_two": retained[1],
            "logp_difference": apart.mean(), "logp_apart": apart.abs().mean()})
    return pd.DataFrame(rows)


def _require_same_experiment(name: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    for key in ("backbone_fingerprint", "data_sha256", "preset", "settings"):
        if (here := _leaves(one.get(key))) != (there := _leaves(two.get(key))):
            what = min(leaf for leaf in {*here, *there} if here.get(leaf) != there.get(leaf))
            raise ValueError(f"{name} is not one experiment: its {' '.join((key, *what))} is {here.get(what)} in one and "
                             f"{there.get(what)} in the other")


def _leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of nested dicts by their place, without those of None, which is what an older record does not have."""
    if isinstance(value, Mapping):
        return {leaf: one for key, each in value.items() for leaf, one in _leaves(each, (*place, key)).items()}
    return {} if value is None else {place: json.dumps(value)}


def _machine(record: Mapping[str, Any]) -> str:
    return record["hardware"]["gpu"] or record["hardware"]["cpu"]
