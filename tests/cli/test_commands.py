"""The command line at work: every command's options, standard input and output, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expe_edge.package.directory import read_package
from expe_edge.runtime import Generator, Sampling
from tests.command_line import (
    PROGRESS,
    QUICK,
    command,
    interrupt,
    lines_until,
    names,
    refused,
    start,
    succeed,
    write_text,
)

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_train_takes_flags_file_and_preset(text_folder: Path, tmp_path: Path) -> None:
    config = write_text("run.yaml", "max_steps: 5\nlog_every: 1\nposition_offset: 4\n")

    result = succeed(
        *("train", "--config", config, "--data", text_folder, *QUICK, "--max-steps", "3", "--out", "out/run"),
        *("--positional", "exqpe", "--positional-parameter", "limbs=2", "--positional-parameter", "dims=8"),
        *("--positional-parameter", "where=query_key_value", "--tie-word-embeddings", "--json", "report.json"),
    )

    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((tmp_path / "out/run/training.json").read_text())
    settings = report["settings"]
    assert (settings["max_steps"], settings["position_offset"], settings["learning_rate"]) == (3, 4, 3e-3)
    given = {"limbs": 2, "dims": 8, "where": "query_key_value"}
    defaults = {"start": 0.0, "step": 0.125, "how": "override", "limb_bits": 4}
    assert settings["positional_parameters"] == {**given, **defaults}
    assert settings["tie_word_embeddings"] is True
    assert [entry["step"] for entry in report["history"]] == [1, 2, 3]
    last = report["history"][-1]["loss"]
    assert result.stdout == f"out/run: {report['parameters']:,} parameters, last loss {last:.4f}\n"
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "trainer"} <= {
        path.name for path in (tmp_path / "out/run").iterdir()
    }


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "output-error"])
def test_export_writes_a_package_for_each_precision(checkpoint: Path, tmp_path: Path, method: str) -> None:
    result = succeed(
        *("export", checkpoint, "--out", "out", "--precision", "float32", "--precision", "int8-static"),
        *("--precision", "float32", "--calibration-method", method, "--calibration-windows", "6"),
        *("--json", "export.json"),
    )

    described = json.loads((tmp_path / "export.json").read_text())["packages"]
    assert [(package["path"], package["precision"]) for package in described] == [
        ("out/float32", "float32"),
        ("out/int8-static", "int8-static"),
    ]
    assert names("out") == ["float32", "int8-static"]  # and no temporary sibling
    for package, line in zip(described, result.stdout.splitlines(), strict=True):
        manifest = read_package(Path(package["path"])).manifest
        assert manifest.parity == package["parity"]
        assert line.startswith(f"{package['path']}: {package['size_bytes'] / 1e6:.2f} MB; against PyTorch over 512 tok")
        assert package["size_bytes"] == sum(file.stat().st_size for file in Path(package["path"]).iterdir())
    calibration = read_package(Path("out/int8-static")).manifest.calibration
    assert calibration is not None
    assert (calibration["method"], calibration["windows"]) == (method, 6)
    assert [line for line in result.stderr.splitlines() if PROGRESS.fullmatch(line)] == [
        "float32: building",
        "float32: validating against PyTorch",
        "int8-static: building",
        "observing 6 windows of 32 tokens",
        *(["calibrating 6 windows of 32 tokens"] if method != "output-error" else []),
        "int8-static: validating against PyTorch",
    ]


@pytest.mark.parametrize("positions", ["folded", "inline"])
def test_export_replaces_by_force(plain_checkpoint: Path, positions: str) -> None:
    arguments = ("export", plain_checkpoint, "--out", "out", "--positions", positions)
    succeed(*arguments)
    Path("out/float32/stray").touch()

    succeed(*arguments, "--force")

    assert read_package(Path("out/float32")).manifest.positions == positions
    assert not Path("out/float32/stray").exists()
    assert names("out") == ["float32"]


def test_generate_prints_what_the_python_api_gives(packages: Path) -> None:
    (expected,) = Generator.load(packages / "float32").generate(["The old tree"], max_new_tokens=30)
    file = write_text("prompt.txt", "The old tree")
    common = ("generate", packages / "float32", "--max-new-tokens", "30")

    for result in (
        succeed(*common, "--prompt", "The old tree"),
        succeed(*common, "--prompt-file", file),
        succeed(*common, stdin=b"The old tree"),
    ):
        assert result.stdout == expected.text + "\n"
        assert result.stderr == ""


def test_generate_passes_every_option_on(packages: Path) -> None:
    sampling = Sampling(
        temperature=1.2,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        typical_p=0.97,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        logit_bias={5: 1.5, 9: -100.0},
        seed=3,
    )
    stop = [" the", " and"]
    (expected,) = Generator.load(packages / "int8-static").generate(
        ["the"], max_new_tokens=60, min_new_tokens=2, sampling=sampling, stop=stop, stop_tokens=[7, 8], logprobs=2
    )
    assert expected.finish_reason == "stop"

    result = succeed(
        *("generate", packages / "int8-static", "--prompt", "the", "--max-new-tokens", "60", "--temperature", "1.2"),
        *("--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--typical-p", "0.97", "--repetition-penalty", "1.1"),
        *("--frequency-penalty", "0.2", "--presence-penalty", "0.1", "--logit-bias", "5=1.5", "--logit-bias", "9=-100"),
        *("--seed", "3", "--min-new-tokens", "2", "--stop", " the", "--stop", " and", "--stop-token", "7"),
        *(
            "--stop-token",
            "8",
            "--cache-length",
            "200",
            "--threads",
            "1",
            "--device",
            "cpu",
            "--json",
            "--logprobs",
            "2",
        ),
    )

    found = json.loads(result.stdout)
    assert found == {
        "prompt": "the",
        **json.loads(json.dumps(dataclasses.asdict(expected))),
        "prefill_seconds": found["prefill_seconds"],
        "decode_seconds": found["decode_seconds"],
    }
    assert len(found["logprobs"]) == len(found["tokens"])


def test_generate_draws_samples(packages: Path) -> None:
    expected = Generator.load(packages / "float32").generate(
        ["the"], n=3, max_new_tokens=9, sampling=Sampling(temperature=1.0, mirostat_tau=4.0, mirostat_eta=0.2, seed=3)
    )
    common = ("generate", packages / "float32", "--prompt", "the", "--samples", "3", "--max-new-tokens", "9")
    drawn = (*common, "--temperature", "1", "--mirostat-tau", "4", "--mirostat-eta", "0.2", "--seed", "3")

    assert succeed(*drawn).stdout == "".join(f"[{number}]\n{each.text}\n" for number, each in enumerate(expected, 1))
    found = json.loads(succeed(*drawn, "--json").stdout)
    assert found["prompt"] == "the"
    assert [each["tokens"] for each in found["completions"]] == [each.tokens for each in expected]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--regex", "[a-f]{2}=[0-9];"], "[a-f]{2}=[0-9];"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
        (["--grammar", "brackets.lark"], r"\[\[+\]+\]"),
        (["--json-schema", '{"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}'], r"\[1, 1\]"),
        (["--json-schema", "schema.json"], r'\{"a": (true|false)\}'),
    ],
    ids=str,
)
def test_generate_writes_what_a_constraint_says(packages: Path, options: list[str], pattern: str) -> None:
    write_text("brackets.lark", 'start: "[" inner "]"\ninner: "[" "]" | "[" inner "]"\n')
    write_text(
        "schema.json",
        '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], '
        '"additionalProperties": false}',
    )

    for seed in range(2):
        hot = ("--temperature", 50, "--seed", seed, "--max-new-tokens", 2000, "--top-k", 60)
        result = succeed("generate", packages / "float32", "--prompt", "the", *hot, *options)
        assert re.fullmatch(pattern, result.stdout[:-1])


def test_generate_says_how_fast_it_was(packages: Path) -> None:
    result = succeed("generate", packages / "float32", "--prompt", "the", "--max-new-tokens", "9", "--verbose")

    loaded, summary = result.stderr.splitlines()
    assert re.fullmatch(r"loaded in [\d.]+ s; \d+ threads?; kernels of onnxruntime", loaded)
    assert re.fullmatch(
        r"prompt: \d+ tokens, [\d.]+ s, [\d,]+ tokens/s; new: 9 tokens, [\d.]+ s, [\d,]+ tokens/s; ended by length",
        summary,
    )


def test_a_long_prompt_shows_how_far_it_has_been_read(packages: Path) -> None:
    common = ("generate", packages / "float32", "--max-new-tokens", "1")

    assert "reading the prompt" in succeed(*common, stdin=b"the tree " * 4000).stderr
    assert succeed(*common, stdin=b"the tree " * 200).stderr == ""


def test_generate_streams_through_a_real_pipe(packages: Path) -> None:
    (expected,) = Generator.load(packages / "int8-dynamic").generate(["naïve 😀"], max_new_tokens=20)

    done = subprocess.run(
        command("generate", packages / "int8-dynamic", "--max-new-tokens", "20"),
        input="naïve 😀".encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )

    assert done.stdout.decode() == expected.text + "\n"
    assert done.stderr == b""


def test_text_comes_while_it_is_generated(packages: Path) -> None:
    arguments = command(
        "generate", packages / "float32", "--prompt", "the", "--max-new-tokens", "2500", "--threads", "1"
    )
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1 << 20)
        rest = process.stdout.read()

    assert process.returncode == 0
    assert 0 < len(first) < len(rest)


def test_compare_writes_figures_and_plot(checkpoint: Path, packages: Path, tmp_path: Path) -> None:
    result = succeed(
        *("compare", checkpoint, packages / "float32", packages / "int8-static", "--lengths", "1,4"),
        *("--documents", "2", "--threads", "1", "--json", "figures.json", "--plot", "plot.png"),
    )

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(r["model"], r["bucket_start"], r["bucket_end"], r["tokens"]) for r in figures["results"]] == [
        (model, *bucket) for model in ("model", "float32", "int8-static") for bucket in ((0, 32, 64), (32, 128, 192))
    ]
    assert [r["kl"] for r in figures["results"][:2]] == [0, 0]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Quality by position" in result.stdout
    assert "int8-static" in result.stdout


def test_names_in_brackets_are_shown_whole(packages: Path) -> None:
    for name in ("m[beta]", "[/bold]", "[red]"):
        shutil.copytree(packages / "float32", Path.cwd() / name.strip("/").replace("/", "_"))
    names = sorted(path.name for path in Path.cwd().iterdir() if path.name.startswith(("m[", "[")))

    for name in names:
        assert name in succeed("inspect", name).stdout
    shown = succeed("compare", *names, "--lengths", "1", "--documents", "2").stdout
    assert all(name in shown for name in names)


def test_compare_takes_other_text_and_one_document_has_no_error(packages: Path) -> None:
    text = write_text("other.txt", "the stone and the river " * 30)

    result = succeed(
        *("compare", packages / "float32", packages / "int8-dynamic", "--data", text, "--lengths", "2"),
        *("--json", "figures.json"),
    )

    results = json.loads(Path("figures.json").read_text())["results"]
    assert [(bucket["documents"], bucket["kl_stderr"]) for bucket in results] == [(1, None), (1, None)]
    assert f" {results[0]['perplexity']:.2f} " in result.stdout
    assert "nan" not in result.stdout


def test_probe_writes_figures_and_plot(checkpoint: Path, packages: Path, tmp_path: Path) -> None:
    result = succeed(
        *("probe", checkpoint, packages / "int8-static", "--lengths", "2,8", "--depths", "0,100", "--documents", "2"),
        *("--cases", "2", "--threads", "1", "--json", "figures.json", "--plot", "plot.png"),
    )

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(r["model"], r["length"], r["tokens"]) for r in figures["context_use"]] == [
        (model, length, 32) for model in ("model", "int8-static") for length in (64, 256)
    ]
    assert {(r["probe"], r["length"], r["depth"]) for r in figures["recall"]} >= {
        ("passkey", 256, 0.0), ("passkey", 256, 1.0), ("copying", 256, 1.0),
    }  # fmt: skip
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "gained by far text" in result.stdout
    assert "it is left out of texts of 64" in result.stderr


def test_probe_is_the_same_again(packages: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        succeed(
            *(
                "probe",
                packages / "float32",
                "--lengths",
                "8",
                "--probe",
                "keys",
                "--probe",
                "copying",
                "--depths",
                "50",
            ),
            *("--documents", "2", "--cases", "2", "--seed", "7", "--threads", "1", "--json", name),
        )

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_analyze_writes_figures_and_plot(checkpoint: Path, tmp_path: Path) -> None:
    result = succeed(
        *("analyze", checkpoint, "--length", "3", "--documents", "3", "--seed", "2"),
        *("--json", "figures.json", "--plot", "plot.png"),
    )

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["training_length"], figures["length"], figures["documents"], figures["seed"]) == (32, 96, 3, 2)
    (model,) = figures["models"]
    assert [(r["layer"], r["head"]) for r in model["reaches"]] == [
        (layer, head) for layer in (1, 2) for head in (1, 2, 3, 4)
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Position read off the residual stream" in result.stdout


# Ctrl-C, in real processes


def test_interrupted_training_resumes(text_folder: Path) -> None:
    process = start(
        *("train", "--data", text_folder, "--out", "out", *QUICK, "--max-steps", "4000", "--dtype", "float32"),
        *("--save-every", "100000", "--log-every", "400"),
    )
    said = list(lines_until(process.stderr, "step 400/4000"))
    assert "step 400/4000" in said[-1], said

    rest = interrupt(process)

    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted"
    assert "Traceback" not in rest
    (saved,) = Path("out/trainer").glob("checkpoint-*")  # by the interruption: the next one was far away
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 400 <= step < 4000
    assert refused("export", "out", "--out", "package") == (
        "out: no config.json in it, so not a finished checkpoint; run train, or --resume it"
    )

    succeed("train", "--resume", "--out", "out", "--max-steps", step + 3, "--log-every", "1")

    history = json.loads(Path("out/training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [1, 400, *range(step + 1, step + 4)]
    assert history[-1]["loss"] < history[0]["loss"] + 0.5
    assert all(torch.isfinite(weight).all() for weight in load_file("out/model.safetensors").values())


def complete_packages(out: Path) -> list[str]:
    """Names of what is in `out`, every one verified as a whole package."""
    for name in names(out):
        read_package(out / name)
    return names(out)


@pytest.mark.parametrize(("method", "stage"), [("output-error", "observing"), ("minmax", "calibrating")])
def test_export_interrupted_while_calibrating(checkpoint: Path, method: str, stage: str) -> None:
    process = start(
        *("export", checkpoint, "--out", "out", "--precision", "int8-static", "--calibration-windows", "20000"),
        *("--calibration-method", method, "--solver", "rtn"),
    )
    assert stage in list(lines_until(process.stderr, "20000 windows"))[-1]

    rest = interrupt(process)

    assert (process.returncode, rest) == (130, "interrupted\n")
    assert complete_packages(Path("out")) == []


def test_export_interrupted_as_a_package_appears(checkpoint: Path) -> None:
    """As soon as anything is to be seen under the output, complete or temporary."""
    process = start("export", checkpoint, "--out", "out", "--precision", "float32", "--precision", "int8-dynamic")
    while process.poll() is None and not names("out"):
        time.sleep(0.001)

    rest = interrupt(process)

    assert process.returncode in (0, 130)  # 0 where the last package was complete before the signal arrived
    assert "Traceback" not in rest
    assert set(complete_packages(Path("out"))) <= {"float32", "int8-dynamic"}
