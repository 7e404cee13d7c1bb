"""Checkpoint to graph to package.

from pathlib import Path
from expe_edge.export import Recipe, export
export(Path("checkpoint"), Path("package"), ["float32", Recipe("int8-dynamic", cache="int8")])
"""

from expe_edge.calibration.observations import Calibration
from expe_edge.export.exporter import ExportedPackage, export
from expe_edge.quant.recipe import Recipe

__all__ = ["Calibration", "ExportedPackage", "Recipe", "export"]
