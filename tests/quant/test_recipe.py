"""What a package is asked to be: its names, its refusals, and sizes as people write them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from expe_edge.cli.recipe import parse_size
from expe_edge.errors import ConfigError, ExportError
from expe_edge.export.exporter import export
from expe_edge.graph.linears import LINEAR_FORMATS, BlockWeight, ChannelInt8
from expe_edge.graph.matrices import EMBEDDING_FORMATS
from expe_edge.quant.blocks import BLOCK_SIZE
from expe_edge.quant.recipe import (
    BLOCK_SIZES,
    BLOCKWISE,
    EMBEDDINGS,
    PER_CHANNEL,
    PRECISIONS,
    SOLVERS,
    Recipe,
    require_used,
)
from expe_edge.quant.solvers import SOLVERS as SOLVER_FUNCTIONS


def test_the_names_of_the_command_line_are_those_of_the_registries() -> None:
    """They stand apart, so that help loads nothing heavy."""
    assert set(PRECISIONS) == {*LINEAR_FORMATS, "auto"}
    assert set(EMBEDDINGS) == set(EMBEDDING_FORMATS)
    assert set(SOLVERS) == set(SOLVER_FUNCTIONS)
    assert set(PER_CHANNEL) == {name for name, kind in LINEAR_FORMATS.items() if issubclass(kind, ChannelInt8)}
    assert set(BLOCKWISE) == {name for name, kind in LINEAR_FORMATS.items() if issubclass(kind, BlockWeight)}
    assert {kind.embedding for kind in LINEAR_FORMATS.values()} <= set(EMBEDDINGS)
    assert set(BLOCK_SIZE.values()) <= set(BLOCK_SIZES)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "float32"),
        ({"precision": "int4-weight", "solver": "rtn", "block_size": 32, "embedding": "int4"}, "int4-weight"),
        ({"precision": "int8-static", "smoothing": True}, "int8-static"),
        ({"precision": "int8-static", "reduce_range": True, "cache": "int8"}, "int8-static-7bit-int8-cache"),
        ({"precision": "int8-dynamic", "portable": True}, "int8-dynamic-portable"),
        ({"precision": "auto", "max_size": 1000, "cache": "int8"}, "auto-int8-cache"),
        ({"precision": "float16", "cache": "int8", "device": "cuda"}, "float16-int8-cache-cuda"),
        ({"ort_format": True, "target": "ios"}, "float32"),
    ],
)
def test_a_package_is_named_by_what_a_client_must_be_able_to_do(options: dict[str, Any], name: str) -> None:
    assert Recipe(**options).name == name


#: Options, and what is said about them.
REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"precision": "int4-wait"},
        "unknown precision 'int4-wait'; did you mean 'int4-weight'? available: auto, bfloat16, float16, float32, "
        "int4-weight, int8-dynamic, int8-static, int8-weight; change `precision`",
    ),
    (
        {"embedding": "int2"},
        "unknown embedding 'int2'; did you mean 'int8'? available: bfloat16, float16, float32, int4, int8; "
        "change `embedding`",
    ),
    ({"cache": "fp8"}, "unknown cache 'fp8'; available: float32, int8; change `cache`"),
    ({"solver": "gtpq"}, "unknown solver 'gtpq'; did you mean 'gptq'? available: gptq, rtn; change `solver`"),
    ({"block_size": 48}, "`block_size` is 48; onnxruntime takes 16, 32, 64, 128, 256"),
    ({"block_size": 0}, "`block_size` is 0; onnxruntime takes 16, 32, 64, 128, 256"),
    (
        {"reduce_range": True},
        "`reduce_range` has no meaning for float32; it is for int8-dynamic and int8-static",
    ),
    (
        {"precision": "int4-weight", "reduce_range": True},
        "`reduce_range` has no meaning for int4-weight; it is for int8-dynamic and int8-static",
    ),
    ({"precision": "auto"}, "`precision` auto needs `budget_kl` or `max_size`, one of them"),
    (
        {"precision": "auto", "budget_kl": 0.1, "max_size": 9},
        "`precision` auto needs `budget_kl` or `max_size`, one of them",
    ),
    ({"budget_kl": 0.1}, "`budget_kl` is for `precision` auto, not float32"),
    ({"precision": "int8-static", "max_size": 9}, "`max_size` is for `precision` auto, not int8-static"),
    ({"precision": "auto", "budget_kl": 0.0}, "`budget_kl` is 0.0; it must be above 0"),
    ({"precision": "auto", "budget_kl": -1.0}, "`budget_kl` is -1.0; it must be above 0"),
    ({"precision": "auto", "budget_kl": float("nan")}, "`budget_kl` is nan; it must be above 0"),
    ({"precision": "auto", "max_size": 0}, "`max_size` is 0; it must be above 0"),
    (
        {"precision": "auto", "max_size": 9, "smoothing": True},
        "`smoothing` does not go with `precision` auto, which chooses for itself; drop it",
    ),
    (
        {"precision": "auto", "max_size": 9, "embedding": "int8"},
        "`embedding` does not go with `precision` auto, which chooses for itself; drop it",
    ),
    ({"device": "gpu"}, "unknown device 'gpu'; did you mean 'cpu'? available: cpu, cuda; change `device`"),
    (
        {"precision": "int8-dynamic", "device": "cuda"},
        "`precision` int8-dynamic is for CPUs: `device` cuda has float32, float16, int8-weight, int4-weight; change "
        "one of them",
    ),
    (
        {"precision": "int4-weight", "device": "cuda", "block_size": 256},
        "`block_size` is 256; on `device` cuda onnxruntime takes 16, 32, 64, 128",
    ),
    (
        {"portable": True, "device": "cuda"},
        "`portable` is for any device, `device` cuda for one; drop one of them",
    ),
    (
        {"ort_format": True, "device": "cuda"},
        "`ort_format` is for builds of onnxruntime without GPUs; drop it, or `device`",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=lambda value: str(value) if value else "")
def test_a_recipe_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ExportError), match=f"^{re.escape(message)}$"):
        Recipe(**options)


def test_a_recipe_is_plain_data_that_makes_it_again() -> None:
    recipe = Recipe("int4-weight", embedding="int4", cache="int8", solver="rtn", block_size=32)
    assert Recipe(**recipe.to_dict()) == recipe


BLOCKS = "int8-weight and int4-weight"
INTEGERS = "int8-dynamic and int8-static and int8-weight and int4-weight"


@pytest.mark.parametrize(
    ("settings", "name", "served"),
    [
        ({"solver": "rtn"}, "solver", INTEGERS),
        ({"block_size": 64}, "block_size", BLOCKS),
        ({"smoothing": True}, "smoothing", INTEGERS),
    ],
)
def test_a_setting_that_no_package_uses_is_refused(settings: dict[str, Any], name: str, served: str) -> None:
    recipes = [Recipe("float32", **settings), Recipe("float16", **settings)]
    message = f"`{name}` is for `precision` {served}; add such a precision, or drop the option"

    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        require_used(recipes)
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export(Path("none"), Path("none"), recipes)
    require_used([*recipes, Recipe("int4-weight", **settings)])


def test_auto_uses_solvers() -> None:
    require_used([Recipe("auto", budget_kl=0.1, solver="rtn", block_size=64)])


def test_ranges_that_no_package_uses_are_refused() -> None:
    message = "`ranges_from` is for `precision` int8-static; add such a precision, or drop the option"

    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        require_used([Recipe("int4-weight")], ranges_from=True)
    require_used([Recipe("int4-weight"), Recipe("int8-static")], ranges_from=True)
    require_used([Recipe("int4-weight")])


def test_an_int4_embedding_has_blocks_too() -> None:
    require_used([Recipe("int8-dynamic", embedding="int4", block_size=64)])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        ("1000", 1000),
        ("600kB", 600_000),
        ("600 KB", 600_000),
        (" 1.5MB ", 1_500_000),
        ("1.5m", 1_500_000),
        ("2G", 2_000_000_000),
        ("7B", 7),
        ("0.5kB", 500),
        ("0", 0),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | None, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "kB", "much", "1,5MB", "-3", "1e6", "1.MB", "3TB", "600 kB or so", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match=f"^{re.escape(f'--max-size {text}: expected bytes, as 600kB or 1.5MB')}$"):
        parse_size(text)
