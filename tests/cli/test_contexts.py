"""`generate` with a prompt cache, a window and prompt lookup; `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click import Option

from expe_edge.cli.generate import generate
from expe_edge.cli.plan import plan
from expe_edge.package.directory import read_package
from tests.command_line import refused, succeed, write_text

pytestmark = pytest.mark.usefixtures("elsewhere")

PROMPT = "The old tree grows over the bright stone. " * 8


def generated(package: Path, *options: object, prompt: str = PROMPT) -> dict[str, Any]:
    result = succeed("generate", package, "--prompt", prompt, "--max-new-tokens", 24, "--json", *options)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_prompt_is_read_once(packages: Path, tmp_path: Path) -> None:
    package, file = packages / "float32", ("--prompt-cache", tmp_path / "cache")
    plain = generated(package)

    first, again, longer = (
        generated(package, *file),
        generated(package, *file),
        generated(package, *file, prompt=PROMPT + "And"),
    )

    assert [found["reused_tokens"] for found in (plain, first, again)] == [0, 0, plain["prompt_tokens"] - 1]
    assert longer["reused_tokens"] >= plain["prompt_tokens"] - 1
    assert first["tokens"] == again["tokens"] == plain["tokens"]
    assert longer["tokens"] == generated(package, prompt=PROMPT + "And")["tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_window_and_a_cache_of_it(packages: Path, tmp_path: Path) -> None:
    options = ("--window", 32, "--sinks", 2)
    plain = generated(packages / "float32", *options)
    assert plain["prompt_tokens"] > 34
    assert plain["tokens"] != generated(packages / "float32")["tokens"]

    for reused in (0, plain["prompt_tokens"] - 1):
        found = generated(packages / "float32", *options, "--prompt-cache", tmp_path / "cache")
        assert found["tokens"] == plain["tokens"]
        assert found["reused_tokens"] in (0, reused)  # the window may have dropped what the prompt's end saw


def test_prompt_lookup_gives_the_same_tokens(packages: Path) -> None:
    found = generated(packages / "float32", "--prompt-lookup")
    assert found["tokens"] == generated(packages / "float32")["tokens"]
    assert found["drafted_tokens"] > 0


def test_bad_input_leaves_the_cache_as_it_is(packages: Path) -> None:
    generated(packages / "float32", "--prompt-cache", "cache")
    write_text("text", "not a cache")
    ask = ("generate", packages / "float32", "--prompt", "the", "--max-new-tokens", 4)

    assert refused("generate", packages / "int8-static", *ask[2:], "--prompt-cache", "cache") == (
        "cache holds what another package has read: its model is not this one's; name another file"
    )
    assert refused(*ask, "--prompt-cache", "cache", "--window", 8) == (
        "cache was written with --window none, not 8 and --sinks 4"
    )
    assert refused(*ask, "--prompt-cache", "text") == (
        "text is not a cache of expe-edge; delete it or name another file"
    )
    assert refused(*ask, "--prompt-cache", "no/cache") == "no is not a directory; create it, or change where cache goes"
    assert refused(*ask, "--sinks", 4) == "--sinks are kept beside a --window; give it too"
    assert refused(*ask, "--window", 0) == "--window is 0; at least 1"
    assert refused(*ask, "--window", 8, "--sinks", -1) == "--sinks is -1; at least 0"


def test_a_window_is_refused_where_keys_carry_positions(plain_checkpoint: Path) -> None:
    succeed("export", plain_checkpoint, "--positions", "inline", "--precision", "float32", "--out", "out")

    assert refused("generate", "out/float32", "--prompt", "the", "--window", 8).startswith(
        "--window: tokens of expe with positions inline cannot be counted anew when others are dropped; "
        "leave --window out"
    )


def test_plan_prints_what_a_context_takes(packages: Path, tmp_path: Path) -> None:
    package = packages / "float32"
    result = succeed("plan", package, "--context", 4000, "--json", "plan.json")

    found = json.loads((tmp_path / "plan.json").read_text())
    contract = read_package(package).manifest.contract
    assert found["cache"] == 4000 * contract.cache_bytes
    parts = ("weights", "cache", "scores", "activations", "runtime")
    assert found["peak"] == sum(found[part] for part in parts)
    for part in (*parts, "peak"):
        assert f" {found[part] / 1e6:,.1f}" in result.stdout
    assert f"fits: {found['available'] / 1e6:,.0f} MB are available" in result.stdout


def test_plan_of_windows_batches_and_by_default(packages: Path, tmp_path: Path) -> None:
    manifest = read_package(packages / "float32").manifest
    for options, tokens in (
        (("--window", 50, "--sinks", 6), 56),
        (("--context", 40, "--window", 50), 40),
        (("--batch-size", 3), 3 * manifest.context_length),
    ):
        succeed("plan", packages / "float32", *options, "--json", "plan.json")
        found = json.loads((tmp_path / "plan.json").read_text())
        assert found["cache"] == tokens * manifest.contract.cache_bytes


def test_plan_of_the_impossible(packages: Path) -> None:
    ask = ("plan", packages / "float32")
    assert refused(*ask, "--context", 0) == "--context is 0; at least 1"
    assert refused(*ask, "--batch-size", -2) == "--batch-size is -2; at least 1"
    assert refused(*ask, "--context", 2**24 + 1) == (
        "--context is 16777217; the model's encoding has 16777216 positions"
    )
    assert refused("plan", "nowhere") == "nowhere: no such package directory"
    assert "does not fit: " in succeed(*ask, "--context", 2**24, "--batch-size", 1000).stdout


def test_generate_says_what_would_fit(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expe_edge.runtime.memory.available_memory", lambda: 10**9)
    message = refused(
        "generate", packages / "float32", "--prompt", "the", "--max-new-tokens", 2**24 - 100, "--threads", 1
    )
    assert message.startswith("1 × 16,777,1")
    assert "give a --window, or export a package with --cache int8" in message


def test_a_window_is_declared_once() -> None:
    """What `plan` predicts a window for is what `generate` keeps."""
    found = [
        {
            option.name: (option.opts, option.type, option.help)
            for option in command.params
            if isinstance(option, Option)
        }
        for command in (generate, plan)
    ]

    for name in ("window", "sinks"):
        assert found[0][name] == found[1][name]
