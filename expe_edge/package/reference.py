"""The reference model: packages that come with the library, to be run before anything is trained."""

from __future__ import annotations

from pathlib import Path

from expe_edge.errors import ConfigError, unknown_name

#: Formats of its linears, the one that is taken unless told otherwise first.
REFERENCE_PRECISIONS = ("int8-dynamic", "int4-weight")
DIRECTORY = Path(__file__).parents[1] / "reference"


def reference_package(precision: str = "int8-dynamic") -> Path:
    """Return the directory of a package of the reference model, which continues Python source (docs/reference.md).

    Args:
        precision: `int8-dynamic` or `int4-weight`.

    Raises:
        ConfigError: another precision.
    """
    if precision not in REFERENCE_PRECISIONS:
        raise ConfigError(unknown_name("precision of the reference model", precision, REFERENCE_PRECISIONS))
    return DIRECTORY / precision
