"""`bench` at work, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from expe_edge.cli.bench import parse_tokens
from expe_edge.errors import ConfigError
from expe_edge.export.kernels import optimized_operators
from expe_edge.package.directory import read_package
from expe_edge.runtime.memory import gigabytes, most_tokens, plan_memory
from tests.command_line import invoke, refused, succeed

pytestmark = pytest.mark.usefixtures("elsewhere")

QUICKLY = ("--turns", "2", "--steps", "3", "--prefill", "20", "--threads", "1")


def test_bench_writes_figures_table_and_plot(packages: Path) -> None:
    result = succeed(
        *("bench", packages / "float32", packages / "int8-weight", *QUICKLY, "--depths", "1k,0,300", "--profile"),
        *("--longest-prompt", "400", "--json", "figures.json", "--plot", "plot.svg"),
    )

    found = json.loads(Path("figures.json").read_text())
    assert found["settings"]["depths"] == [0, 300, 1024]
    assert found["processor"]
    assert [each["package"] for each in found["opened"]] == ["float32", "int8-weight"]
    for each in found["opened"]:
        manifest = read_package(packages / each["package"]).manifest
        assert each["nodes"] == optimized_operators(packages / each["package"] / "model.onnx").total()
        assert each["cache_bytes_per_token"] == manifest.contract.cache_bytes
        assert each["opened_bytes"] > each["weight_bytes"] > 0
    places = [(depth, name) for depth in (0, 300, 1024) for name in ("float32", "int8-weight")]
    assert [(each["depth"], each["package"]) for each in found["depths"]] == places
    for each in found["depths"]:
        for figure in ("prefill", "decode", "step_ms", "bandwidth", "read_share", "node_us"):
            low, median, high = each[figure]
            assert 0 <= low <= median <= high
        assert each["decode"][1] > 0
        assert (each["first_token_ms"] is None) == (each["depth"] == 1024)
        opened = next(of for of in found["opened"] if of["package"] == each["package"])
        assert each["cache_bytes"] == (each["depth"] + 20) * opened["cache_bytes_per_token"]
        assert each["peak_bytes"] >= opened["opened_bytes"]
    assert [(each["package"], each["phase"], each["depth"]) for each in found["profiles"]] == [
        (name, phase, depth)
        for name in ("float32", "int8-weight")
        for phase in ("decode", "prefill")
        for depth in (0, 300, 1024)
    ]
    operators = {each["operator"] for each in found["profiles"][0]["profile"]["kernels"]["operators"]}
    assert {"MatMul", "GroupQueryAttention"} <= operators
    assert "<svg" in Path("plot.svg").read_text()
    for shown in ("int8-weight, 1 thread", "decode, tokens/s", "1,024", "GroupQueryAttention", "between kernels"):
        assert shown in result.stdout


def test_the_reference_model_and_several_numbers_of_threads() -> None:
    result = succeed("bench", *QUICKLY, "--depths", "0", "--threads", "2,1", "--json", "figures.json")

    assert "using the reference model, int8-dynamic" in result.stderr
    found = json.loads(Path("figures.json").read_text())
    assert [each["threads"] for each in found["depths"]] == [1, 2]
    assert found["profiles"] == []
    for shown in ("int8-dynamic, 1 thread ", "int8-dynamic, 2 threads"):
        assert shown in result.stdout


REFUSALS: list[tuple[tuple[str, ...], str]] = [
    (("--device", "gpu"), "unknown device 'gpu'; available: cpu, cuda; change --device"),
    (("--threads", "0"), "--threads is 0; at least 1"),
    (("--threads", "1,4096"), "--threads is 4096; at most 1024"),
    (("--threads", "two"), "--threads two: expected comma-separated whole numbers, such as 0,512,4k"),
    (("--depths", "0,-1"), "--depths has -1; at least 0"),
    (("--depths", ""), "--depths : expected comma-separated whole numbers, such as 0,512,4k"),
    (
        ("--depths", "0,20000000"),
        "float32: 20000512 tokens exceed the 16777216 positions of its encoding; lower --depths",
    ),
    (("--prefill", "0"), "--prefill is 0; at least 1"),
    (("--steps", "0"), "--steps is 0; at least 1"),
    (("--turns", "-3"), "--turns is -3; at least 1"),
    (("--longest-prompt", "0"), "--longest-prompt is 0; at least 1"),
    (("--plot", "plot.pdf"), "--plot plot.pdf: expected a name that ends in .png or .svg"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSALS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_options_out_of_range(packages: Path, options: tuple[str, ...], message: str) -> None:
    assert refused("bench", packages / "float32", *options) == message


def test_packages_that_are_none(packages: Path, checkpoint: Path) -> None:
    assert refused("bench", "pakage") == "pakage: no such package directory"
    assert refused("bench", packages / "float32", checkpoint) == (
        f"{checkpoint}: no expe_edge.json in it, so not a package; make one with export"
    )
    assert refused("bench", packages / "float32", packages / "float32") == "the same model is given twice"


def test_a_cache_that_memory_has_no_room_for(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expe_edge.runtime.memory.available_memory", lambda: 1_000_000)

    plan = plan_memory(read_package(packages / "float32"), 4096 + 512)
    fitting = most_tokens(read_package(packages / "float32"), 1_000_000, limit=4608)
    assert refused("bench", packages / "float32", "--depths", "4k") == (
        f"float32: 1 × 4,608 tokens need {gigabytes(plan.cache)} of keys and values and "
        f"{gigabytes(plan.needed - plan.cache)} to read them, but 1 MB are free; at most {fitting:,} tokens fit; "
        "lower --depths"
    )


def test_a_damaged_package_is_refused_before_anything_is_timed(packages: Path) -> None:
    damaged = Path(shutil.copytree(packages / "int8-dynamic", "damaged"))
    (damaged / "model.onnx").write_bytes(b"no graph")

    result = invoke("bench", packages / "float32", damaged, *QUICKLY)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "model.onnx differs from its hash" in result.stderr


@pytest.mark.parametrize("text", ["", "1.5", "k", "1,,2", "1e3", "4K"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="expected comma-separated whole numbers"):
        parse_tokens("--depths", text)
