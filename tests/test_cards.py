"""The model card: every number from the record, limits and verdict in plain words, nothing that data could smuggle in."""

import json
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from pdmem_lib import cards, estimates, experiment

STUDY = Path(__file__).parent.parent / "figures" / "quick-smollm2-135m-locomo"
RECORDS = sorted((STUDY / "records").glob("*.json"))


def of_run(record):
    tables = pd.read_csv(STUDY / "summary.csv"), pd.read_csv(STUDY / "estimates.csv").fillna({"verdict": ""})
    return [table[table["method"] == record["method"]] for table in tables]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_the_card_of_every_committed_run(file):
    record = json.loads(file.read_text())
    summary, found = of_run(record)
    text = cards.model_card(record, summary, found)
    front = ModelCard(text).data
    assert front.license == "cc-by-nc-4.0" and front.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front.library_name == ("peft" if record["method"].endswith(".lora") else "pdmem")
    assert f"{record['trainable_parameters']:,}" in text and record["backbone_fingerprint"][:12] in text
    assert f"{summary.iloc[0]['f1_own']:.2f} %" in text and "CC BY-NC 4.0" in text and "4-bit GGUF" in text
    deciding = found[(found["contrast"] == "own - other") & (found["score"] == "logp")]
    if len(deciding):
        (row,) = deciding.itertuples()
        assert cards.VERDICTS[row.verdict] in text and estimates.RULE in text
        assert f"| own - other | {row.effect:.4f} | [{row.low:.4f}, {row.high:.4f}] |" in text
    else:
        assert "No verdict" in text and estimates.RULE not in text


def test_each_verdict_is_said_as_it_is():
    record = json.loads((STUDY / "records" / "slot-1x-seed42.json").read_text())
    summary, found = of_run(record)
    for verdict, words in ((estimates.REMEMBERS, "It remembers"), (estimates.UNTOLD, "cannot be told"),
                           (estimates.WORSE, "Worse than")):
        card = cards.model_card(record, summary, found.replace({"verdict": {"cannot be told": verdict}}))
        assert card.split("## How well")[1].strip().startswith("**") and words in card.split("## How well")[1][:60]


def test_a_model_without_a_run_says_that_nothing_was_measured(model):
    m = model("hebbian")
    text = cards.model_card(cards.unmeasured(m))
    assert "Not measured" in text and "Not recorded" in text and "random weights" in text and "%" not in text
    assert ModelCard(text).data.license is None and f"{m.num_trainable:,}" in text


@pytest.mark.parametrize("tiny", ["tiny-gpt2"], indirect=True)
def test_a_reference_point_is_not_called_a_memory(tiny, model):
    from pdmem_lib.lora import LoRAModel

    text = cards.model_card(cards.unmeasured(LoRAModel(tiny, 5000, 42)))
    assert "no memory: a reference point" in text and "LoRAModel.from_pretrained" in text
    assert tiny.fingerprint[:12] in text and ModelCard(text).data.library_name == "peft"
    assert "no memory and trains nothing" in cards.model_card(cards.unmeasured(model("baseline")))


def test_names_from_data_stay_names():
    record = json.loads((STUDY / "records" / "slot-1x-seed42.json").read_text())
    record["data"] = "mine`\n# not a heading\n---\nlicense: mit.json"
    record["settings"]["train_conversations"] = ["a`**b**\x1b[31m"]
    record["backbone"] = "/home/ann/secret-place/my-model"
    text = cards.model_card(record, *of_run(record))
    assert "\n# not a heading" not in text and "\x1b" not in text and "secret-place" not in text and "`my-model`" in text
    assert ModelCard(text).data.license == "unknown" and "ask its owner" in text


@pytest.mark.parametrize("tiny", ["tiny-gpt2"], indirect=True)
def test_every_run_leaves_its_card_beside_its_adapter(tiny, tmp_path):
    import time

    from pdmem_lib import evaluate, train

    run = experiment.Experiment(backbone="tiny-gpt2", data="synthetic", method="kv_extension", preset="smoke",
                                max_questions=8, output_dir=str(tmp_path / "run"))
    data, model = experiment.load_data("synthetic", "smoke"), run.build(tiny)
    history = train(model, data.train[:1], epochs=1, max_questions=8, progress=False)
    evaluation = evaluate(model, data.test[:2], questions_per_bucket=1, knowledge_points=2, max_new_tokens=2, progress=False)
    experiment.save_run(run, model, data, history, evaluation, time.time())
    assert sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir()) == [
        "README.md", "adapter.safetensors", "config.json"]
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "not LoCoMo" in text and "own - other" in text and "random weights" in text
    assert cards.run_card(tmp_path / "run") == text
    (tmp_path / "run" / "summary.csv").unlink()
    with pytest.raises(FileNotFoundError, match="holds no summary.csv: give the folder of a finished run"):
        cards.run_card(tmp_path / "run")
