"""`optimum-cli export expe-edge`: Optimum's command line finds it by the folder that this file is in.

No folder above has an `__init__.py`: they are Optimum's name space, which any distribution may add to (PEP 420).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class ExPEEdgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum publishes no types
    """Exports a checkpoint as `expe-edge export` does, to the directory that is named."""

    COMMAND = CommandInfo(
        name="expe-edge", help="Export a checkpoint of expe-edge to ONNX, validated by its own parity."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the arguments, by the names that `optimum-cli export onnx` has for them."""
        parser.add_argument("-m", "--model", type=Path, required=True, help="The checkpoint, or a float32 package.")
        parser.add_argument("output", type=Path, help="Where the package goes.")
        parser.add_argument(
            "--precision", default="float32", help="Format of the linears, as `expe-edge export` has it."
        )
        parser.add_argument(
            "--cache", default="float32", help="Key/value cache: float32, or int8, which Optimum refuses."
        )
        parser.add_argument("--portable", action="store_true", help="Standard ONNX operators alone.")

    def run(self) -> None:
        """Export; bad input ends in one line and code 2, with nothing written."""
        from expe_edge.cli.recipe import report
        from expe_edge.errors import ExPEEdgeError
        from expe_edge.quant.recipe import Recipe

        try:
            recipe = Recipe(self.args.precision, cache=self.args.cache, portable=self.args.portable)
            from expe_edge.export.exporter import export_one  # which takes seconds

            report(export_one(self.args.model, self.args.output, recipe))
        except ExPEEdgeError as error:
            print(f"Error: {error}", file=sys.stderr)  # as the command line has it
            sys.exit(2)


REGISTER_COMMANDS = [(ExPEEdgeExportCommand, ExportCommand)]
