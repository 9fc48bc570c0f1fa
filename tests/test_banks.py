"""What banks hold: directions and copies are counted right, on made banks and on written ones."""

import pandas as pd
import pytest
import torch

import pdmem_lib as pdmem
from pdmem_lib import __main__ as command
from pdmem_lib import banks
from pdmem_lib.states import turn_states


def test_directions_are_counted():
    assert banks.effective_rank(torch.eye(5, 9)) == pytest.approx(5)
    assert banks.effective_rank(torch.ones(5, 9)) == pytest.approx(1)
    assert banks.effective_rank(torch.zeros(5, 9)) == 0
    assert banks.effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1e-9]))) == pytest.approx(2, abs=1e-6)


def test_copies_have_no_spread_and_multiples_have():
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    assert banks.row_spread(row.repeat(8, 1)) == pytest.approx(0, abs=1e-7)
    multiples = row * torch.arange(1.0, 9.0)[:, None]
    assert banks.row_spread(multiples) > 0.3 and banks.effective_rank(multiples) == pytest.approx(1, abs=1e-5)


def test_the_table_is_of_the_banks_that_are_read(tiny):
    conversations = pdmem.synthetic_conversations(3, 2, seed=1, turns_per_session=8)
    table = banks.bank_table(tiny, conversations, capacities=(1,), progress=False)
    assert table[["method", "capacity", "seed"]].drop_duplicates()["method"].tolist() == list(banks.WRITERS)
    assert len(table) == 9 and (table["effective_rank"] >= 1 - 1e-6).all() and (table["effective_rank"] <= table["rows"]).all()
    model, (one, two, _) = pdmem.MemoryModel(tiny, "slot"), conversations
    written = []
    for c in (one, two):
        model.reset()
        written.append(torch.nn.functional.normalize(model.write_hidden(turn_states(tiny, c))["P"], dim=1))
    pair = banks.bank_table(tiny, [one, two], ["slot"], (1,), progress=False)
    assert pair["cosine"].tolist() == pytest.approx([torch.cosine_similarity(*(P.flatten() for P in written), dim=0).item()] * 2)
    assert banks.bank_table(tiny, [one], ["hebbian"], (1,), progress=False)["cosine"].isna().all()
    with pytest.raises(ValueError, match="give two or more"):
        banks.bank_table(tiny, [one], ["hebbian"], (1,), centred=True, progress=False)


def test_centred_states_lack_the_mean_of_the_others():
    generator = torch.Generator().manual_seed(0)
    states = {id: [torch.randn(n, 4, generator=generator) + 5 for n in (3, 2)] for id in "abc"}
    found = banks._centred(states)
    mean = torch.cat([H for id in "bc" for H in states[id]]).mean(dim=0)
    torch.testing.assert_close(found["a"][1], states["a"][1] - mean)
    assert states["a"][0].mean() > 3  # what was given is left alone


def test_the_command_prints_and_keeps_it(tmp_path, capsys):
    out = tmp_path / "banks.csv"
    assert command.main(["banks", "--preset", "smoke", "--seeds", "42", "--out", str(out)]) == 0
    assert "effective_rank" in capsys.readouterr().out
    table = pd.read_csv(out)
    assert set(table["backbone"]) == {"tiny-gpt2"} and set(table["capacity"]) == {1, 10} and set(table["centred"]) == {False, True}
