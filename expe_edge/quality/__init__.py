"""Quality by length and the use of far text, of packages and checkpoints.

from pathlib import Path
from expe_edge.quality import compare_by_length, open_scorer
scorers = [open_scorer(Path("package", name)) for name in ("float32", "int8-dynamic")]
print(compare_by_length(scorers, (1, 2, 4), 24).of("int8-dynamic")[-1].kl)
"""

from expe_edge.quality.comparison import BucketResult, Comparison, compare_by_length
from expe_edge.quality.context_use import ContextUse
from expe_edge.quality.loss_by_position import PositionLoss
from expe_edge.quality.probing import ProbeReport, ProbeSettings, probe
from expe_edge.quality.recall import Recall
from expe_edge.quality.scoring import Scorer, open_scorer

__all__ = [
    "BucketResult",
    "Comparison",
    "ContextUse",
    "PositionLoss",
    "ProbeReport",
    "ProbeSettings",
    "Recall",
    "Scorer",
    "compare_by_length",
    "open_scorer",
    "probe",
]
