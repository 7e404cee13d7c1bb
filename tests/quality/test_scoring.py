"""What can be scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from expe_edge.errors import CheckpointError, ConfigError, ExPEEdgeError, PackageError
from expe_edge.quality.scoring import CheckpointScorer, PackageScorer, open_scorer


def test_path_decides_the_backend(checkpoint: Path, packages: Path) -> None:
    assert isinstance(open_scorer(checkpoint), CheckpointScorer)
    assert isinstance(open_scorer(packages / "int8-static"), PackageScorer)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        ([], ConfigError, "{path}: neither a package (no expe_edge.json) nor a checkpoint (no config.json)"),
        (
            ["config.json"],
            CheckpointError,
            "{path}: no model.safetensors in it, so not a finished checkpoint; run train, or `resume` it",
        ),
        (
            ["expe_edge.json"],
            PackageError,
            "{path}/expe_edge.json: not a manifest of expe-edge; export the package again",
        ),
    ],
)
def test_path_that_is_neither(tmp_path: Path, damage: list[str], kind: type[ExPEEdgeError], message: str) -> None:
    for name in damage:
        (tmp_path / name).write_text("{}", encoding="utf-8")

    with pytest.raises(kind) as caught:
        open_scorer(tmp_path)

    assert str(caught.value) == message.format(path=tmp_path)


def test_missing_path_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_scorer(tmp_path / "none")

    assert str(caught.value) == (
        f"{tmp_path}/none: neither a package (no expe_edge.json) nor a checkpoint (no config.json)"
    )
