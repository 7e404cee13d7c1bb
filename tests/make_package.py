"""`python -m tests.make_package DIRECTORY`: a real package of a few seconds' training, for checks outside pytest."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from expe_edge.export.exporter import export
from expe_edge.training.run import train
from tests.small import small_settings, write_documents


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        text, checkpoint = Path(directory, "text"), Path(directory, "checkpoint")
        text.mkdir()
        write_documents(text)
        train(small_settings(text), checkpoint)
        export(checkpoint, out, ["int8-dynamic"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
