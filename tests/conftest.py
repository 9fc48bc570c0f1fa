"""What the tests share: tiny backbones of both families, a factory of memory models, a cache folder of their own.

The shape annotations of the write rules are checked at run time here, and only here: the hook must come first. (Beartype
looks at random items of lists, so it is kept off modules whose use of random numbers the tests watch.)
``PDMEM_TEST_BACKBONE=smollm2-135m pytest tests/test_methods.py`` runs the same tests on real weights. What is held to a
bit or a file is held to what a CPU computes, so that a GPU is hidden; ``PDMEM_TEST_GPU=1 pytest tests/test_gpu.py`` tests it.
"""

import os

if not os.environ.get("PDMEM_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from jaxtyping import install_import_hook

install_import_hook("pdmem_lib.write", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

import pdmem_lib as pdmem  # noqa: E402

REAL = os.environ.get("PDMEM_TEST_BACKBONE")
LONGEST = ("test_pipeline.py", "test_smoke.py", "test_studies.py")  # minutes each


def pytest_collection_modifyitems(items):
    """The longest modules first, so that of several workers none waits for another's at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """An empty cache folder for the session, so that no test reads or fills the user's (real weights stay in it)."""
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            patch.setenv("PDMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", params=[REAL] if REAL else ["tiny-gpt2", "tiny-llama"])
def tiny(request):
    """A backbone, shared by all tests: they must leave it as it is."""
    return pdmem.load_backbone(request.param)


@pytest.fixture(scope="session")
def plain(tiny):
    """The same weights in a transformers model that our code never touched, on transformers' own attention."""
    from transformers import AutoModelForCausalLM

    config = type(tiny.config).from_dict(tiny.config.to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(tiny.device)
    model.load_state_dict(tiny.model.state_dict())
    assert model.config._attn_implementation == "sdpa"
    return model.requires_grad_(False).eval()


@pytest.fixture
def model(tiny):
    """``model(method, capacity, seed, **overrides)`` on the backbone ``tiny``."""
    def build(method="slot", capacity=1, seed=42, **overrides):
        return pdmem.MemoryModel(tiny, method, capacity, seed, **overrides)
    return build


@pytest.fixture
def opened(model):
    """``opened(method)``: a model whose gates stand open, so that memory moves its answers."""
    def build(method="slot", **settings):
        m = model(method, **settings)
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return m
    return build
