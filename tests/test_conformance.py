"""The checks pass for every method of the registry, and each fails for a method that is broken in just that way."""

import numpy as np
import pytest
import torch
from torch import nn

import pdmem_lib as pdmem
from pdmem_lib import conformance
from pdmem_lib.conformance import Nonconformity, registered
from pdmem_lib.methods import CrossAttention, Hebbian, KVExtension


@pytest.mark.parametrize("method", pdmem.REGISTRY)
def test_every_method_conforms_and_is_left_alone(model, method):
    m = model(method)
    m.write(conformance.TURNS[:1])
    state, weights = dict(m.state), {name: t.clone() for name, t in m.adapter.state_dict().items()}
    rng = torch.get_rng_state()
    table = conformance.check(m)
    assert table.columns.tolist() == ["check", "passed", "measured", "meaning"]
    assert table["check"].tolist() == list(conformance.CHECKS) and table["passed"].all(), table.to_string()
    measured = table.set_index("check")["measured"]
    exact = ["off_is_frozen", "chunks_make_no_difference", "state_survives_a_file", "memory_takes_no_positions"]
    assert (measured[exact] == 0).all() and measured["silent_start"] <= 1e-4
    assert measured["only_theta_learns"] > 0 or method == "baseline" and np.isnan(measured["only_theta_learns"])
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(m.state[name], t) for name, t in state.items())
    assert all(torch.equal(m.adapter.state_dict()[name], t) for name, t in weights.items())
    assert all(p.grad is None for p in m.parameters())


# ---- methods that are broken in one way each -------------------------------------------------------------------------


class Loud(KVExtension):
    def make_gate(self):
        self.gate = None


class DividesByZero(KVExtension):
    def read(self, state, inputs=None):
        return self.key_values((state["P"] / state["P"].norm())[None])


class LeavesAHook(CrossAttention):
    """Adds its branch by a hook of its own, which nobody takes away."""

    def read(self, state, inputs=None):
        if not self.backbone_norm._forward_hooks:
            self.backbone_norm.register_forward_hook(lambda module, args, output: output + self.beta.mean())
        return super().read(state, inputs)

    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        self.__dict__["backbone_norm"] = pdmem.seam.final_norm(backbone.model)  # not a submodule


class Stuck(CrossAttention):
    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        nn.init.zeros_(self.read_O)


class Unused(KVExtension):
    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        self.trained("spare", self.d)


class TrainsTheBackbone(KVExtension):
    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        self.head = pdmem.seam.final_norm(backbone.model).requires_grad_(True)


class Counter(KVExtension):
    turns = 0

    def write(self, state, H):
        self.turns += 1
        return {"P": super().write(state, H)["P"] / self.turns}


class WritesInPlace(KVExtension):
    def write(self, state, H):
        state["P"].add_(H.mean(dim=0))
        return state


class DrawsAnew(KVExtension):
    draws = 0

    def initial_state(self):
        self.draws += 1
        return {"P": super().initial_state()["P"] + self.draws}


class Crosstalk(CrossAttention):
    def cross_attention(self, h, K, V, seen):
        return super().cross_attention(h.mean(dim=0, keepdim=True).expand_as(h), K, V, seen)


class ReadsPadding(Hebbian):
    def read(self, state, inputs=None):
        R = self.queries(inputs.hidden) @ state["M"]
        return self.key_values(R.mean(dim=1, keepdim=True))  # over padding too


class LooksAhead(CrossAttention):
    def cross_attention(self, h, K, V, seen):
        return super().cross_attention(h.mean(dim=1, keepdim=True).expand_as(h), K, V, seen)


class KeepsToItself(KVExtension):
    """Reads with a trained number that no file holds."""

    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        self.told = [0.0]

    def write(self, state, H):
        self.told[0] = 1.0
        return super().write(state, H)

    def read(self, state, inputs=None):
        return self.key_values((state["P"] * torch.linspace(1, 1 + self.told[0], self.d))[None])


class TakesPositions(KVExtension):
    """Shifts the input behind its entries, as a literal prefix would."""

    def __init__(self, backbone, settings):
        super().__init__(backbone, settings)
        bare = backbone.model
        self.__dict__["place"] = bare.transformer.wpe if hasattr(bare, "transformer") else bare.model.rotary_emb

    def read(self, state, inputs=None):
        def shift(module, args, kwargs):
            if "position_ids" in kwargs:
                return args, kwargs | {"position_ids": kwargs["position_ids"] + len(state["P"])}
            return (*args[:-1], args[-1] + len(state["P"])), kwargs
        if not self.place._forward_pre_hooks:
            self.place.register_forward_pre_hook(shift, with_kwargs=True)
        return super().read(state, inputs)


class ReadsNothing(KVExtension):
    def read(self, state, inputs=None):
        return None


class Raises(KVExtension):
    def read(self, state, inputs=None):
        raise KeyError("Q")


BROKEN = {  # method: the check that must fail, what its sentence says
    Loud: ("silent_start", "start at zero"),
    DividesByZero: ("silent_start", "zero state logits are not finite"),
    LeavesAHook: ("off_is_frozen", "gone after it"),
    Stuck: ("only_theta_learns", "read_O.* no gradient in two steps"),
    Unused: ("only_theta_learns", "spare got no gradient"),
    TrainsTheBackbone: ("only_theta_learns", "asks for a gradient|changed"),
    Counter: ("chunks_make_no_difference", "nothing on the module"),
    WritesInPlace: ("chunks_make_no_difference", "return a new one|after a reset|in two parts"),
    DrawsAnew: ("chunks_make_no_difference", "from the seed, every time|in two parts"),
    Crosstalk: ("batch_makes_no_difference", "mix no rows"),
    ReadsPadding: ("batch_makes_no_difference", "leave padding out"),
    LooksAhead: ("no_look_ahead", "moves an earlier logit"),
    KeepsToItself: ("state_survives_a_file", "a parameter or a buffer"),
    TakesPositions: ("memory_takes_no_positions", "memory takes none"),
    ReadsNothing: ("off_is_frozen", "read.. must use the state"),
}
ALONE = [Loud, DividesByZero, Stuck, Unused, Crosstalk, KeepsToItself]  # everything else still passes


@pytest.fixture(params=["tiny-gpt2", "tiny-llama"])
def own(request):
    """A backbone that nobody shares: some of these methods damage it."""
    return pdmem.load_backbone(request.param)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda method: method.__name__)
def test_a_broken_method_fails_the_check_that_is_about_it(own, broken):
    check, sentence = BROKEN[broken]
    with registered(broken, "broken"):
        m = pdmem.MemoryModel(own, "broken")
        with pytest.raises(Nonconformity, match=sentence) as error:
            conformance.CHECKS[check](m)
        assert isinstance(error.value, AssertionError)
        if broken in ALONE:
            table = conformance.check(m)
            assert table.query("not passed")["check"].tolist() == [check], table.to_string()
            assert table.set_index("check")["meaning"][check] == str(error.value)


def test_each_check_has_a_method_that_fails_it():
    assert {check for check, _ in BROKEN.values()} == set(conformance.CHECKS)


def test_an_evaluation_names_the_memory_under_which_nothing_is_finite(own, tmp_path):
    conversations, kept = pdmem.synthetic_conversations(2, 1, seed=3, turns_per_session=8), tmp_path / "kept.json"
    few = dict(questions_per_bucket=1, max_new_tokens=2, progress=False, autocast=False)
    with registered(DividesByZero, "divides"):
        for _ in range(2):  # what was kept of the first does not stand in the second's way
            with pytest.raises(ValueError, match="under the memory 'zero' .* not finite"):
                pdmem.evaluate(pdmem.MemoryModel(own, "divides"), conversations, kept, **few)
    assert "NaN" not in kept.read_text()


def test_an_error_of_the_method_is_the_finding(own):
    with registered(Raises):
        table = conformance.check(pdmem.MemoryModel(own, "mine")).set_index("check")
    assert not table["passed"]["silent_start"] and table["meaning"]["silent_start"] == "KeyError: 'Q'"
    assert table["passed"]["chunks_make_no_difference"]


def test_a_registered_method_is_gone_after_the_block_and_after_an_error(own):
    before = dict(pdmem.REGISTRY)
    with pytest.raises(RuntimeError, match="on purpose"), registered(Loud, "slot") as name:
        assert pdmem.REGISTRY[name] is Loud
        raise RuntimeError("on purpose")
    assert pdmem.REGISTRY == before and list(pdmem.REGISTRY) == list(before)


def test_the_plain_model_shares_weights_and_nothing_else(own):
    plain = conformance._without_our_code(own)
    assert plain.config._attn_implementation == "sdpa"
    assert own.model.config._attn_implementation == pdmem.seam.IMPLEMENTATION
    for name, weight in own.model.state_dict().items():
        assert plain.state_dict()[name].data_ptr() == weight.data_ptr()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
