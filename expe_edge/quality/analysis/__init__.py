"""What positions leave of the embedding, and where attention reaches, of checkpoints.

from pathlib import Path
from expe_edge.quality.analysis import AnalysisSettings, analyze
report = analyze([Path("model")], AnalysisSettings(length=2))
print(report.models[0].reaches[0].reach_median)
"""

from expe_edge.quality.analysis.analyzing import AnalysisReport, AnalysisSettings, ModelAnalysis, analyze
from expe_edge.quality.analysis.embedding import Neighbours, Spread
from expe_edge.quality.analysis.position_probe import PositionProbe
from expe_edge.quality.analysis.reach import HeadReach
from expe_edge.quality.analysis.slopes import HeadSlopes

__all__ = [
    "AnalysisReport",
    "AnalysisSettings",
    "HeadReach",
    "HeadSlopes",
    "ModelAnalysis",
    "Neighbours",
    "PositionProbe",
    "Spread",
    "analyze",
]
