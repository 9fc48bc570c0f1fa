"""Persistent latent memory for frozen decoder-only language models.

    import pdmem_lib as pdmem

    model = pdmem.MemoryModel(pdmem.load_backbone("auto"), "slot")
    model.write("Caroline: I adopted a cat.")
    model.answer(["What did Caroline adopt?"])

Marks in the docstrings say where a choice comes from: [A] the abstract of "Trained Persistent Memory for Frozen
Decoder-Only LLMs" (arXiv:2603.22329), [C] its companion on encoder-decoders (arXiv:2603.16413), [D] decided here.

Where things are: `backbone` (frozen models), `seam` (where memory enters), `write` (write rules), `methods` (the six
methods and their registry), `memory` (MemoryModel), `locomo` and `synthetic` (data), `states` (cached hidden states),
`training`, `evaluation`, `metrics`, `provenance` (which turn left what), `editing` (states compared, merged, turns
forgotten), `persistence` (adapters and states as files), `session` (a conversation that goes on) and `journal` (its
folder), `chat`, `cards` (model cards), `references` (what stands beside a memory),
`estimates` (intervals and the verdict), `recall` (a task whose answer is known), `experiment` (one run of the study),
`published` (others' numbers), `figures`; `causal` (what an answer rests on), `recording` (a conversation kept turn by
turn), `lesson` (an adapter in a minute), and the Memory Studio, `studio`, made of `studio_model` and `studio_view`.
"""

from importlib.metadata import version

from . import conformance, editing, estimates, metrics, published, recall, write
from .backbone import Backbone, load_backbone
from .evaluation import Evaluation, evaluate
from .experiment import Experiment, load_data, save_run
from .locomo import Conversation, Question, Turn, load_locomo, split, to_dataset_dict
from .memory import MemoryModel
from .methods import METHODS, REGISTRY, MemorySettings
from .session import Session
from .synthetic import synthetic_conversations
from .training import train

__version__ = version("pdmem")  # pyproject.toml says it


def studio(model: "MemoryModel | None" = None, talks=None, folder="studio-export", **settings):
    """The Memory Studio: a page in which a memory is watched as it is written and read (`studio_view.open_studio`).

    ``model`` None: SmolLM2 or what "auto" stands for, with the adapter kept of the studio's lesson, or trained now.
    Needs the notebook extras; RuntimeError that says so without them.
    """
    try:
        from .studio_view import open_studio
    except ImportError as error:
        raise RuntimeError(f"the Memory Studio needs the notebook extras, and {error.name} is missing: "
                           'pip install "pdmem[notebooks]", or make setup') from error
    return open_studio(model, talks, folder, **settings)


__all__ = [
    "METHODS", "REGISTRY", "Backbone", "Conversation", "Evaluation", "Experiment", "MemoryModel", "MemorySettings",
    "Question", "Session", "Turn", "conformance", "editing", "estimates", "evaluate", "load_backbone", "load_data",
    "load_locomo", "metrics", "published", "recall", "save_run", "split", "studio",
    "synthetic_conversations", "to_dataset_dict", "train", "write",
]
