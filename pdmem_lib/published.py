"""Numbers that others printed, to stand beside ours; nothing here was measured by this project.

[A] is the abstract of the study (arXiv:2603.22329), on frozen GPT-2; [C] its companion on encoder-decoders
(arXiv:2603.16413), the final version on Flan-T5-XL and the first on Flan-T5-base (239 questions of one conversation).
They are other backbones, and [C] another kind of model: beside ours they are a comparison of claims, not of runs.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

COLUMNS = ("source", "backbone", "method", "capacity", "quantity", "lag", "low", "high", "printed")
GPT2, XL, BASE = ("A", "gpt2"), ("C", "flan-t5-xl"), ("C, first version", "flan-t5-base")
BUCKETS = ("0–31", "32–63", "64–127", "128–255", "256+")

# methods, capacity (None: not said), quantity, lag, low, high, as printed. A single number is low and high; what is
# printed as "below" has no low, what is said without a number has neither.
_A = [
    (("cross_attention", "hebbian", "slot"), 1, "retained", "", 7, 18, "7–18 %"),
    (("cross_attention", "hebbian", "slot"), 1, "ΔK", "", 7, 10, "7–10"),
    (("prefix", "kv_extension", "gated"), 1, "retained", "", None, 0.4, "< 0.4 %"),
    (("prefix", "cross_attention", "kv_extension", "hebbian", "gated", "slot"), 10, "retained", "", None, None,
     "all six converge"),
]
_XL = [
    (("cross_attention",), 1, "retained", "short", 17.85, 17.85, "17.85 %"),
    (("cross_attention",), 1, "retained", "256+", 9.02, 9.02, "9.02 %"),
    (("slot",), 1, "retained", "short", 17.21, 17.21, "17.21"),
    (("slot",), 1, "retained", "256+", 7.08, 7.08, "7.08"),
    (("hebbian",), 1, "retained", "short", 9.51, 9.51, "9.51"),
    (("hebbian",), 1, "retained", "256+", 9.23, 9.23, "9.23"),
    (("hebbian",), 10, "retained", "short", 15.86, 15.86, "15.86"),
    (("hebbian",), 10, "retained", "256+", 10.32, 10.32, "10.32"),
    (("hebbian",), 10, "retained", "mean", 11.60, 11.60, "11.60"),
    (("kv_extension",), 10, "retained", "short", 15.58, 15.58, "15.58"),
    (("kv_extension",), 10, "retained", "mean", 12.05, 12.05, "12.05"),
    (("cross_attention",), None, "K_30", "", 11.04, 11.04, "11.04"),
    (("hebbian",), None, "K_30", "", 10.62, 10.62, "10.62"),
    (("slot",), None, "K_30", "", 9.71, 9.71, "9.71"),
    (("slot",), None, "ΔK", "", 9.71, 9.71, "9.71"),
    (("baseline",), None, "K_30", "", 5.57, 5.57, "5.57"),
    (("off",), None, "F1", "", 6.44, 6.44, "6.44"),
    (("all six",), None, "tax", "", 2.38, 4.23, "2.38–4.23"),
    (("all six",), 10, "benefit", "", 1.83, 6.26, "+1.83 to +6.26"),
]
_BASE = [
    *((("gated",), None, "retained", bucket, value, value, f"{value}")
      for bucket, value in zip(BUCKETS, (24.0, 6.1, 6.1, 5.8, 4.8), strict=True)),
    *((("slot",), None, "retained", bucket, value, value, f"{value}")
      for bucket, value in zip(BUCKETS, (3.2, 3.2, 3.2, 3.1, 3.1), strict=True)),
    *((("cross_attention", "hebbian"), None, "retained", bucket, 0.7, 0.7, "0.7 flat") for bucket in BUCKETS),
    (("prefix", "kv_extension"), None, "retained", "", 0.3, 0.3, "0.3"),
]


def table() -> "pandas.DataFrame":
    """All of them, a row a method and number: source, backbone, method, capacity, quantity, lag, low, high, printed.

    ``method`` is the name in code, "off" the bare frozen model, "all six" a range over the methods. ``quantity``:
    "retained" (the retained-memory score, %), "ΔK" and "K_30" (knowledge curve, points of F1), "F1" (%), "tax" and
    "benefit" (points of F1). ``lag`` is a bucket of lags in turns, "short", "mean" (of the buckets), or "" where none
    is named. ``printed`` is what stands there, ``low`` and ``high`` its numbers, NaN where it has none. ``capacity`` is
    missing where it is not said.
    """
    import pandas as pd

    rows = [(*source, method, capacity, *rest) for source, block in ((GPT2, _A), (XL, _XL), (BASE, _BASE))
            for methods, capacity, *rest in block for method in methods]
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    return found.astype({"capacity": "Int64", "low": float, "high": float})
