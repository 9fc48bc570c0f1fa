"""Execute chapters from top to bottom and save them as they are committed: `make chapters`, or

    python notebooks/execute.py notebooks/14_is_it_memory.ipynb

What the page of a code host cannot show, and what would make a file large, is left out: figures keep their PNG and lose
the interactive copy (running the cell brings it back), widgets lose their state, cells the times they took and their
progress bars.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from pdmem_lib.files import atomic_path

INTERACTIVE = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"


def is_progress(output) -> bool:
    """A progress bar, as text or as a widget, and the blank line with which it ends."""
    if output.output_type == "stream":
        return output.name == "stderr" and ("%|" in output.text or not output.text.strip())
    return "%|" in output.get("data", {}).get("text/plain", "")


def execute(path: Path) -> None:
    """Run one notebook in its own folder, and replace it only when every cell succeeded."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                   record_timing=False).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = {kind: data for kind, data in output["data"].items() if kind not in INTERACTIVE}
    with atomic_path(path) as partial:
        nbformat.write(notebook, partial)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        start = time.monotonic()
        execute(Path(name))
        print(f"{name}: {time.monotonic() - start:.0f} s, {Path(name).stat().st_size / 1000:.0f} kB", flush=True)
