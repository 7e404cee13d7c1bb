"""Bad input to `generate` and `compare`, and full disks: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expe_edge.cli import evaluate
from expe_edge.errors import CheckpointError
from expe_edge.package.directory import read_package, seal_package
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.runtime import Generator
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from expe_edge.training.run import disk_full_is_an_error
from tests.command_line import command, invoke, refused, succeed, tree, write_text
from tests.damage import remove, rewrite, set_json

pytestmark = pytest.mark.usefixtures("elsewhere")


# Generate


DAMAGED_PACKAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "{path}: no such package directory"),
    "no manifest": (
        remove(MANIFEST_FILE),
        "{path}: no expe_edge.json in it, so not a package; make one with export",
    ),
    "newer": (
        set_json(MANIFEST_FILE, format_version=3),
        "{path}/expe_edge.json: format version 3, newer than 2, the newest this release reads; upgrade expe-edge",
    ),
    "half the manifest": (
        rewrite(MANIFEST_FILE, lambda data: data[: len(data) // 2]),
        "{path}/expe_edge.json: not a manifest of expe-edge; export the package again",
    ),
    "edited manifest": (
        set_json(MANIFEST_FILE, precision="int8-static"),
        "{path}/expe_edge.json: changed since it was written (its digest differs); export the package again",
    ),
    "half the model": (
        rewrite("model.onnx", lambda data: data[: len(data) // 2]),
        "{path}: model.onnx differs from its hash in expe_edge.json; export the package again",
    ),
    "changed config": (
        rewrite("config.json", lambda data: data + b"\n"),
        "{path}: config.json differs from its hash in expe_edge.json; export the package again",
    ),
    "no model": (
        remove("model.onnx"),
        "{path}: model.onnx is missing; the package is incomplete, export it again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_PACKAGES)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_damaged_package(own_package: Path, packages: Path, command: str, damage: str) -> None:
    apply, message = DAMAGED_PACKAGES[damage]
    apply(own_package)
    arguments = ["--prompt", "the"] if command == "generate" else [packages / "int8-dynamic"]
    if command == "compare" and damage == "missing":
        message = "{path}: neither a package (no expe_edge.json) nor a checkpoint (no config.json)"
    if command == "compare" and damage == "no manifest":  # what is left has a config.json, so it could be a checkpoint
        message = "{path}: no model.safetensors in it, so not a finished checkpoint; run train, or --resume it"

    assert refused(command, own_package, *arguments) == message.format(path=own_package)


def test_checkpoint_in_place_of_a_package(checkpoint: Path) -> None:
    assert refused("generate", checkpoint, "--prompt", "the") == (
        f"{checkpoint}: no expe_edge.json in it, so not a package; make one with export"
    )


def test_package_with_a_tokenizer_of_another_vocabulary(own_package: Path) -> None:
    manifest = read_package(own_package).manifest
    train_tokenizer([Document("a", "text " * 99)], 257).save(str(own_package / "tokenizer.json"))
    (own_package / MANIFEST_FILE).unlink()
    seal_package(own_package, manifest)

    assert refused("generate", own_package, "--prompt", "the") == (
        f"{own_package}/tokenizer.json has 257 tokens, the model's vocabulary 300; they do not belong together, "
        "export again"
    )


@pytest.mark.parametrize("options", [["--prompt", ""], ["--prompt-file", "empty.txt"], []], ids=["", "file", "stdin"])
def test_empty_prompt(packages: Path, options: list[str]) -> None:
    write_text("empty.txt", "")

    assert refused("generate", packages / "float32", *options) == (
        "the prompt is empty; give --prompt, --prompt-file or text on standard input"
    )


def test_prompt_longer_than_the_cache(packages: Path) -> None:
    tokens = len(Generator.load(packages / "float32").encode("the old tree"))

    found = refused("generate", packages / "float32", "--prompt", "the old tree", "--cache-length", "4")

    assert found == (
        f"the prompt's {tokens} tokens and 256 new ones need a cache of {tokens + 256}, but --cache-length is 4; "
        "raise it, or shorten the prompt"
    )


GENERATE_REFUSALS: list[tuple[list[str], str]] = [
    (
        ["--device", "cuda"],
        "--device cuda: this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu on a machine with a "
        "GPU, or use --device cpu",
    ),
    (["--device", "gpu"], "unknown device 'gpu'; available: cpu, cuda; change --device"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0; at least 1"),
    (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
    (["--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
    (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--threads", "0"], "--threads is 0; at least 1"),
    (["--threads", "2147483648"], "--threads is 2147483648; at most 1024"),
    (["--prompt-file", "x"], "both --prompt and --prompt-file are given; use one"),
    (["--min-new-tokens", "-1"], "--min-new-tokens is -1; from 0 to --max-new-tokens, 256"),
    (["--min-new-tokens", "257"], "--min-new-tokens is 257; from 0 to --max-new-tokens, 256"),
    (["--samples", "0"], "--samples is 0; at least 1"),
    (["--samples", "2"], "--samples is 2, but --temperature is 0, which gives the same text every time; raise it"),
    (["--typical-p", "0"], "--typical-p is 0.0; it must be above 0 and at most 1"),
    (["--mirostat-tau", "3"], "--mirostat-tau needs a --temperature above 0; 1 leaves the model's probabilities"),
    (
        ["--mirostat-tau", "3", "--temperature", "1", "--top-p", "0.9"],
        "--mirostat-tau takes the place of --top-p; leave one of them out",
    ),
    (["--frequency-penalty", "nan"], "--frequency-penalty is nan; it must be a finite number"),
    (["--logit-bias", "5"], "--logit-bias '5': expected ID=BIAS, as 42=-100"),
    (["--logit-bias", "a=1"], "--logit-bias 'a=1': expected ID=BIAS, as 42=-100"),
    (["--logit-bias", "300=1"], "--logit-bias: token id 300 is outside the vocabulary of 300"),
    (["--logit-bias", "5=inf"], "--logit-bias is {5: inf}; it must be of finite numbers"),
    (["--stop-token", "300"], "--stop-token: token id 300 is outside the vocabulary of 300"),
    (["--json", "--logprobs", "301"], "--logprobs is 301; from 0 to 300, the vocabulary's tokens"),
    (["--logprobs", "2"], "--logprobs are shown in JSON alone; add --json"),
    (
        ["--regex", "a", "--choice", "b"],
        "a constraint is one of --json-schema, --regex, --grammar and --choice; given: --regex and --choice",
    ),
    (["--choice", ""], "--choice must be texts of one character or more"),
    (["--regex", r"[^\s\S]"], "--regex: no text of this vocabulary can meet it from here on"),
    (["--json-schema", '{"type": "color"}'], "--json-schema: Invalid type: color"),
    (["--json-schema", "missing.json"], "--json-schema missing.json: No such file or directory"),
    (["--grammar", "missing.lark"], "--grammar missing.lark: No such file or directory"),
    (
        ["--min-new-tokens", "3", "--regex", "a"],
        "--min-new-tokens and a constraint are both given, which says itself when the text may end; use one",
    ),
    (["--template", "{}"], "--template is of turns; add --interactive"),
    (["-i", "--template", "x"], "--template 'x': put {} where what is typed goes"),
    (["-i", "--json"], "--json and --interactive do not go together; leave one of them out"),
    (["-i", "--samples", "2"], "--samples and --interactive do not go together; leave one of them out"),
    (["-i", "--regex", "("], '--regex: at 1(8): invalid regex "(" (in regex): regex parse error:'),
    (["--cache-length", "20000000"], "20000000 tokens exceed the 16777216 positions of this model's encoding"),
]


@pytest.mark.parametrize(("options", "message"), GENERATE_REFUSALS, ids=lambda value: value[0] if value else "")
def test_generate_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    assert refused("generate", packages / "float32", "--prompt", "the", *options) == message


@pytest.mark.parametrize("content", [b"a\nb", b"\xef\xbb\xbfa\r\nb", "a\rb".encode("utf-16")])
def test_a_prompt_is_the_same_from_wherever_it_comes(packages: Path, content: bytes) -> None:
    package, options = packages / "float32", ("--max-new-tokens", 8, "--json")
    expected = json.loads(succeed("generate", package, "--prompt", "a\nb", *options).stdout)
    Path("prompt").write_bytes(content)

    for source, stdin in ((("--prompt-file", "prompt"), b""), (("--prompt-file", "-"), content), ((), content)):
        found = json.loads(succeed("generate", package, *source, *options, stdin=stdin).stdout)
        assert (found["prompt"], found["tokens"]) == ("a\nb", expected["tokens"])


def run_with(redirections: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line under a shell that redirects its streams."""
    line = shlex.join(command(*arguments)) + redirections
    return subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **environment}, check=False)


def test_text_that_the_terminal_cannot_show_is_replaced(packages: Path) -> None:
    prompt = ("--prompt", "café", "--temperature", 3, "--seed", 5, "--max-new-tokens", 64)
    done = run_with("", "generate", packages / "float32", *prompt, PYTHONIOENCODING="cp1252")
    whole = run_with("", "generate", packages / "float32", *prompt, PYTHONIOENCODING="utf-8").stdout.decode()

    assert (done.returncode, done.stderr) == (0, b"")
    assert "\ufffd" in whole
    assert done.stdout == whole.encode("cp1252", errors="replace")


@pytest.mark.parametrize("closed", [" >&-", " 2>&-", " >&- 2>&-"])
def test_output_that_is_closed_goes_nowhere(packages: Path, closed: str) -> None:
    done = run_with(closed, "generate", packages / "float32", "--prompt", "the", "--max-new-tokens", 2)

    assert (done.returncode, done.stderr) == (0, b"")


def test_standard_input_that_is_closed_is_an_empty_prompt(packages: Path) -> None:
    done = run_with(" <&-", "generate", packages / "float32")

    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: the prompt is empty; ")


def test_what_a_message_quotes_breaks_no_line_and_drives_no_terminal(packages: Path) -> None:
    message = refused("compare", packages / "float32", "--lengths", "1\n\x1b[2J\u202e")

    assert message == r"--lengths 1\n\x1b[2J\u202e: expected comma-separated integers, such as 1,2,4,8,16"


def test_a_fault_of_ours_is_one_line_and_a_traceback_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("expe_edge.cli.inspect.require_writable", broken)
    monkeypatch.delenv("EXPE_EDGE_DEBUG", raising=False)
    result = invoke("inspect", "anything")
    assert result.exit_code == 1
    assert result.stderr == "Error: ZeroDivisionError: a b; a fault of expe-edge, EXPE_EDGE_DEBUG=1 shows where\n"

    monkeypatch.setenv("EXPE_EDGE_DEBUG", "1")
    assert isinstance(invoke("inspect", "anything").exception, ZeroDivisionError)


def test_prompt_file_that_cannot_be_read(packages: Path) -> None:
    Path("latin.txt").write_bytes(b"caf\xe9")

    assert refused("generate", packages / "float32", "--prompt-file", "latin.txt") == (
        "--prompt-file latin.txt: not UTF-8 text (unexpected end of data at byte 3)"
    )
    assert refused("generate", packages / "float32", "--prompt-file", "gone.txt") == (
        "--prompt-file gone.txt: No such file or directory"
    )
    assert refused("generate", packages / "float32", "--prompt-file", ".") == "--prompt-file .: Is a directory"


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xffa"])
def test_prompt_on_standard_input_that_is_not_utf8(packages: Path, data: bytes) -> None:
    assert refused("generate", packages / "float32", stdin=data).startswith("standard input: not UTF-8 text (")


@pytest.mark.parametrize("options", [[], ["--prompt", "caf\udce9"]], ids=["stdin", "argument"])
def test_prompt_that_is_not_utf8_where_the_locale_lets_bytes_through(packages: Path, options: list[str]) -> None:
    """In the C locale Python hands on bytes that are no text as halves of surrogate pairs."""
    done = subprocess.run(
        [os.fsencode(part) for part in command("generate", packages / "float32", *options)],
        input=b"caf\xe9",
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "LC_ALL": "C"},
    )

    assert (done.returncode, done.stdout) == (2, b""), done.stderr
    assert re.fullmatch(rb"Error: [^\n]+ not UTF-8 text[^\n]*\n", done.stderr)


# Compare


def test_same_model_twice(packages: Path) -> None:
    path = packages / "float32"

    assert refused("compare", path, path) == "the same model is given twice"
    assert refused("compare", path, packages / "int8-static" / ".." / "float32") == "the same model is given twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1,1"], "--lengths 1,1: expected rising positive integers, as 1,2,4,8,16"),
        (["--lengths", "0"], "--lengths 0: expected rising positive integers, as 1,2,4,8,16"),
        (["--lengths", "1,b"], "--lengths 1,b: expected comma-separated integers, such as 1,2,4,8,16"),
        (["--lengths", ""], "--lengths : expected comma-separated integers, such as 1,2,4,8,16"),
        (["--documents", "0"], "--documents is 0; at least 1"),
        (["--data", "gone.txt"], "--data gone.txt: no such file or folder"),
        (["--threads", "0"], "--threads is 0; at least 1"),
    ],
)
def test_compare_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    outputs = ["--json", "figures.json", "--plot", "plot.png"]

    assert refused("compare", packages / "float32", packages / "int8-static", *options, *outputs) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "0"], "--length is 0; at least 1"),
        (["--documents", "0"], "--documents is 0; at least 1"),
        (
            ["--length", "400"],
            "no document of 12800 tokens to measure on; lower --length, or give longer text with --calibration-data",
        ),
        (["--calibration-windows", "0"], "--calibration-windows is 0; at least 1"),
        (
            ["--precision", "int8-dynamic", "--block-size", "64"],
            "--block-size is for --precision int8-weight and int4-weight; add such a precision, or drop the option",
        ),
    ],
)
def test_sensitivity_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    outputs = ["--json", "figures.json", "--plot", "plot.png"]

    assert refused("sensitivity", packages / "float32", *options, *outputs) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "2,2"], "--lengths 2,2: expected rising positive integers, as 1,2,4,8,16"),
        (["--lengths", "1,b"], "--lengths 1,b: expected comma-separated integers, such as 1,2,4,8,16"),
        (
            ["--lengths", "1"],
            "--lengths end at 1: context use is measured beyond 1, as --near says; "
            "add such a length, or choose another --probe",
        ),
        (["--near", "0"], "--near is 0; at least 1"),
        (["--depths", "50,101"], "--depths 50,101: expected rising percentages from 0 to 100, as 0,25,50,75,100"),
        (["--depths", "half"], "--depths half: expected comma-separated integers, such as 0,50,100"),
        (["--documents", "0"], "--documents is 0; at least 1"),
        (["--cases", "0"], "--cases is 0; at least 1"),
        (["--seed", "-1"], "--seed is -1; at least 0"),
        (["--threads", "0"], "--threads is 0; at least 1"),
        (["--data", "gone.txt"], "--data gone.txt: no such file or folder"),
        (
            ["--probe", "key"],
            "unknown --probe 'key'; did you mean 'keys'? available: code-definition, context-use, copying, "
            "first-definition, keys, last-definition, loss-by-position, passkey",
        ),
    ],
)
def test_probe_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    outputs = ["--json", "figures.json", "--plot", "plot.png"]

    assert refused("probe", packages / "float32", packages / "int8-static", *options, *outputs) == message


def test_probe_needs_text_as_long_as_asked_and_models_that_differ(packages: Path) -> None:
    path = packages / "float32"

    assert refused("probe", path, path) == "the same model is given twice"
    assert refused("probe", path, "--lengths", "2,400", "--json", "figures.json") == (
        "no document of 12840 tokens (the longest has fewer); lower --lengths, or give longer text with --data"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "0"], "--length is 0; at least 1"),
        (["--documents", "2"], "--documents is 2; at least 3"),
        (["--seed", "-1"], "--seed is -1; at least 0"),
        (["--data", "gone.txt"], "--data gone.txt: no such file or folder"),
        (
            ["--length", "1"],
            "--length 1 is 32 tokens, as N is 32, but reach is measured in more than 32; raise --length",
        ),
        (
            ["--length", "400"],
            "no document of 12800 tokens (the longest has fewer); lower --length, or give longer text with --data",
        ),
        (
            ["--data", "{text}/00.txt", "--data", "{text}/01.txt"],
            "2 documents of 128 tokens, but the position probe fits, chooses and tests on 3 at least; lower --length, "
            "or give more text with --data",
        ),
    ],
)
def test_analyze_options_out_of_range(checkpoint: Path, text_folder: Path, options: list[str], message: str) -> None:
    given = [option.format(text=text_folder) for option in options]

    assert refused("analyze", checkpoint, *given, "--json", "figures.json", "--plot", "plot.png") == message


def test_analyze_takes_checkpoints_that_differ(checkpoint: Path, packages: Path) -> None:
    assert refused("analyze", checkpoint, checkpoint) == "the same model is given twice"
    assert refused("analyze", packages / "float32") == (
        f"{packages / 'float32'} is a package, not a checkpoint; give the directory that train wrote"
    )


def test_analyze_says_where_a_model_is_not_finite(own_checkpoint: Path) -> None:
    weights = load_file(own_checkpoint / "model.safetensors")
    weights["blocks.0.feed_forward.down.weight"][3, 4] = torch.nan
    save_file(weights, own_checkpoint / "model.safetensors", {"format": "pt"})

    result = invoke("analyze", own_checkpoint, "--json", "figures.json")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {own_checkpoint}: states behind layer 1 are not finite; its weights are damaged"
    )
    assert not Path("figures.json").exists()


def test_evaluate_takes_a_package_or_a_checkpoint() -> None:
    Path("empty").mkdir()
    assert refused("evaluate", "empty", "--tasks", "any") == (
        "empty: neither a package (no expe_edge.json) nor a checkpoint (no config.json)"
    )


def test_evaluate_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: Path) -> list[str]:
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    monkeypatch.setattr(evaluate, "_model_options", absent)
    assert refused("evaluate", "package") == "lm_eval is not installed; pip install 'expe-edge[evaluate]'"


def test_no_document_is_long_enough(packages: Path) -> None:
    found = refused("compare", packages / "float32", "--lengths", "1,400", "--json", "figures.json")

    assert found.startswith("no document of 12801 tokens (the longest has ")
    assert found.endswith("); lower --lengths, or give longer text with --data")


def test_plot_of_an_unknown_kind_is_refused_before_the_work(packages: Path) -> None:
    refused("compare", packages / "float32", packages / "int8-static", "--plot", "plot.xyz", "--json", "figures.json")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_output_that_is_a_folder_is_refused_before_the_work(packages: Path, option: str) -> None:
    Path("folder.png").mkdir()

    refused("compare", packages / "float32", packages / "int8-static", option, "folder.png")


# No space left


def full_device(folder: Path) -> Path:
    """A file that is always full: a link, so that whoever replaces it does not replace the device."""
    path = folder / "full"
    path.symlink_to("/dev/full")
    return path


def test_full_device_for_the_figures(packages: Path, tmp_path: Path) -> None:
    full = full_device(tmp_path)
    before = tree(tmp_path)

    result = invoke("compare", packages / "float32", "--lengths", "1", "--documents", "1", "--json", full)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: no space left on the device; ")
    assert tree(tmp_path) == before


def test_full_device_for_the_text(packages: Path) -> None:
    arguments = command("generate", packages / "float32", "--prompt", "the")

    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)

    assert done.returncode == 2
    assert re.fullmatch(rb"Error: no space left on the device; [^\n]+\n", done.stderr)


@pytest.mark.parametrize("kind", ["text", "tokenizer"])
def test_full_device_for_a_checkpoint(tmp_path: Path, kind: str) -> None:
    """Each library that writes a part of a checkpoint tells of a full disk by an exception of its own."""
    full = full_device(tmp_path)
    writers: dict[str, Callable[[], object]] = {
        "text": lambda: full.write_text("x"),
        "tokenizer": lambda: train_tokenizer([Document("a", "text " * 99)], 257).save(str(full)),
    }

    with pytest.raises(CheckpointError) as caught, disk_full_is_an_error(tmp_path):
        writers[kind]()

    assert str(caught.value) == f"{tmp_path}: no space left on the device; free some or change `out`"


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_full_is_an_error(tmp_path):
        (tmp_path / "none").read_text()
