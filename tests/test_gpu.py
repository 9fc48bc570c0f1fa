"""On a GPU the library computes what it computes on a CPU: ``PDMEM_TEST_GPU=1 pytest tests/test_gpu.py``."""

import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import conformance, experiment
from pdmem_lib.evaluation import EvaluateSettings, sample_questions
from pdmem_lib.provenance import write_provenance
from pdmem_lib.lora import LoRAModel
from pdmem_lib.references import ask_references, prompt_references
from pdmem_lib.states import encode_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PDMEM_TEST_GPU=1")

TRAINING = dict(epochs=1, lr=0.01, warmup_steps=0, autocast=False, progress=False)
ASKING = dict(questions_per_bucket=3, max_new_tokens=4, autocast=False, progress=False)


@pytest.fixture(scope="module")
def conversations():
    return pdmem.synthetic_conversations(2, 2, seed=3, turns_per_session=8)


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def both(request):
    """The same backbone on the CPU and on the GPU."""
    return [pdmem.load_backbone(request.param, device=device) for device in ("cpu", "cuda")]


def test_where_there_is_a_gpu_it_is_used():
    assert pdmem.load_backbone("tiny-gpt2").device.type == "cuda"


def test_hidden_states_and_banks_agree(both, conversations):
    cpu, gpu = (encode_all(backbone, conversations, progress=False, autocast=False) for backbone in both)
    for id, states in cpu.items():
        torch.testing.assert_close(gpu[id][0], states[0], rtol=1e-3, atol=1e-4)
    for method in ("prefix", "hebbian", "slot"):
        ours, theirs = (pdmem.MemoryModel(backbone, method) for backbone in both)
        hidden = list(cpu[conversations[0].id])[:8]
        written = theirs.write_hidden(hidden)
        for name, bank in ours.write_hidden(hidden).items():
            torch.testing.assert_close(written[name].cpu(), bank, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("capacity", [1, 10])
@pytest.mark.parametrize("method", pdmem.METHODS)
def test_training_and_evaluation_agree(both, conversations, method, capacity):
    losses, scores = [], []
    for backbone in both:
        m = pdmem.MemoryModel(backbone, method, capacity)
        losses.append(torch.tensor(pdmem.train(m, conversations, **TRAINING)["loss"]))
        table = pdmem.evaluate(m, conversations, **ASKING)
        scores.append(torch.tensor(table.summary()[["logp_own", "logp_zero", "logp_other", "logp_shuffled"]].values))
        assert len(table.turns)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=1e-3)
    torch.testing.assert_close(scores[1], scores[0], rtol=0.01, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("method", pdmem.METHODS)
def test_methods_conform(both, method):
    table = conformance.check(pdmem.MemoryModel(both[1], method))
    assert table["passed"].all(), table.to_string()


def test_a_state_goes_from_one_to_the_other(both, tmp_path):
    ours, theirs = (pdmem.MemoryModel(backbone, "slot") for backbone in both)
    theirs.write("Ann: I adopted a grey cat.")
    theirs.save_state(tmp_path / "state.safetensors")
    ours.load_state(tmp_path / "state.safetensors")
    assert torch.equal(ours.state["P"], theirs.state["P"].cpu())


def test_turns_are_traced(both, conversations):
    model = pdmem.MemoryModel(both[1], "kv_extension")
    hidden = both[1].encode([str(turn) for turn in conversations[0].turns])
    assert write_provenance(model, hidden).shape == (64, 1 + len(hidden))


def test_references_are_asked_and_lora_trains(both, conversations):
    asked = sample_questions(conversations, 2)
    tables = [ask_references(backbone, conversations, asked, prompt_references((25,), 100),
                             EvaluateSettings(max_new_tokens=4, autocast=False, progress=False)) for backbone in both]
    torch.testing.assert_close(*(torch.tensor(table["logp"].values) for table in tables), rtol=0.01, atol=1e-2)
    model = LoRAModel(both[1], 5_000)
    assert all(p.is_cuda for p in model.parameters()) and len(pdmem.train(model, conversations, **TRAINING))


def test_runs_share_a_gpu():
    assert experiment.runs_per_gpu() >= 1
