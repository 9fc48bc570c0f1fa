"""Persistent latent memory for frozen decoder-only language models.

    import pdmem_lib as pdmem

    model = pdmem.MemoryModel(pdmem.load_backbone("auto"), "slot")
    model.write("Caroline: I adopted a cat.")
    model.answer(["What did Caroline adopt?"])

Marks in the docstrings say where a choice comes from: [A] the abstract of "Trained Persistent Memory for Frozen
Decoder-Only LLMs" (arXiv:2603.22329), [C] its companion on encoder-decoders (arXiv:2603.16413), [D] decided here.

Where things are: `pdmem_lib.backbone` (frozen models), `pdmem_lib.seam` (where memory enters), `pdmem_lib.write`
(write rules), `pdmem_lib.methods` (the six methods and their registry), `pdmem_lib.memory` (MemoryModel),
`pdmem_lib.prompts` (how it is asked and scored), `pdmem_lib.locomo` and `pdmem_lib.synthetic` (data),
`pdmem_lib.states` (cached hidden states), `pdmem_lib.training`, `pdmem_lib.evaluation`, `pdmem_lib.metrics`,
`pdmem_lib.provenance` (which turn left what), `pdmem_lib.editing` (states compared, merged, turns forgotten),
`pdmem_lib.persistence` (adapters and states as files), `pdmem_lib.session` (a conversation that goes on) and
`pdmem_lib.journal` (its folder), `pdmem_lib.chat`, `pdmem_lib.cards` (model cards), `pdmem_lib.references` and
`pdmem_lib.lora` (what stands beside a memory), `pdmem_lib.estimates` (intervals and the verdict), `pdmem_lib.recall`
(a task whose answer is known), `pdmem_lib.oracle` and `pdmem_lib.probe` (where content is lost), `pdmem_lib.experiment` (one run of the
study), `pdmem_lib.published` (others' numbers), `pdmem_lib.collected` (runs of one grid), `pdmem_lib.figures`;
`pdmem_lib.causal` (what an answer rests on), `pdmem_lib.recording` (a conversation kept turn by turn),
`pdmem_lib.lesson` (an adapter in a minute), `pdmem_lib.sources` (the library's code as a digest),
`pdmem_lib.parameters` (of notebooks and commands), and the Memory Studio, `studio`, made of `pdmem_lib.studio_model`,
`studio_controls`, `studio_drawing` and `studio_view`.
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
