"""lm-evaluation-harness on packages: the numbers are the checkpoint's, by its classes, its function and our command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from expe_edge.errors import ExPEEdgeError, GenerationError
from expe_edge.quality import harness_checkpoint  # noqa: F401  # registers it
from expe_edge.quality.harness import AUTO_BATCH, PackageLM
from expe_edge.runtime import Generator, Sampling
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint
from tests.command_line import refused
from tests.quality.scored import NATS, SHARE, torch_scores

LONG = "The old tree grows under the bright stone. " * 25
#: Contexts and continuations: none, short, several tokens, one read together with the next, past the prefill chunk.
PAIRS = [
    ("", "The old tree"),
    ("The river runs", " over the stone and under a tree"),
    ("The river runs over", " a"),
    ("The river runs over", " b"),
    ("The river", " runs over a"),
    (LONG, " bright stone"),
    (LONG[:300], LONG[300:]),
    ("What <|endoftext|> spells ", "is text"),
    ("<|endoftext|>", " too"),
]
TEXTS = ["", "A tree.", LONG, "the stone and the river"]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """What lm_eval asks a model for."""
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_continuations_have_the_nats_of_the_checkpoint(
    trained: Checkpoint, packages: Path, batch_size: int | str
) -> None:
    model = PackageLM(str(packages / "float32"), batch_size=batch_size)

    scores = model.loglikelihood(requests("loglikelihood", PAIRS))

    expected = [torch_scores(trained, *pair) for pair in PAIRS]
    np.testing.assert_allclose([nats for nats, _ in scores], [nats for nats, _ in expected], rtol=SHARE, atol=NATS)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def test_what_the_generator_chooses_is_greedy(packages: Path) -> None:
    ids = [0, 40, 50]
    chosen = Generator.load(packages / "float32").generate([ids], max_new_tokens=6)[0].tokens
    other = [*chosen[:-1], (chosen[-1] + 1) % 300]
    model = PackageLM(str(packages / "float32"), batch_size=2)

    scores = model._loglikelihood_tokens([(None, ids, chosen), (None, ids, other), (None, ids, [])])

    assert [greedy for _, greedy in scores] == [True, False, True]
    assert scores[0][0] > scores[1][0]
    assert scores[2][0] == 0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_whole_texts_have_the_nats_of_the_checkpoint(trained: Checkpoint, packages: Path, batch_size: int) -> None:
    model = PackageLM(str(packages / "float32"), batch_size=batch_size)

    nats = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]))

    expected = [torch_scores(trained, "", text)[0] if text else 0.0 for text in TEXTS]
    np.testing.assert_allclose(nats, expected, rtol=SHARE, atol=NATS)


def test_max_length_reads_texts_in_windows(packages: Path) -> None:
    whole = PackageLM(str(packages / "float32"))
    windowed = PackageLM(str(packages / "float32"), max_length=16, batch_size=4)
    ids = whole.tok_encode(LONG)

    (nats,) = windowed.loglikelihood_rolling(requests("loglikelihood_rolling", [(LONG,)]))

    windows = [ids[begin : begin + 17] for begin in range(0, len(ids) - 17, 16)]
    tail = len(ids) - 1 - 16 * len(windows)
    expected = whole._loglikelihood_tokens(
        [*((None, window[:1], window[1:]) for window in windows), (None, ids[-17:-tail], ids[-tail:])]
    )
    assert nats == pytest.approx(sum(score for score, _ in expected), abs=NATS)


def test_max_length_cuts_contexts_from_the_left_and_says_so(packages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, short = PackageLM(str(packages / "float32")), PackageLM(str(packages / "float32"), max_length=8)
    ids = whole.tok_encode(LONG)[:20]

    cut = short._loglikelihood_tokens([(None, ids[:15], ids[15:]), (None, ids[:3], ids[3:6])])

    expected = whole._loglikelihood_tokens([(None, ids[11:15], ids[15:]), (None, ids[:3], ids[3:6])])
    np.testing.assert_allclose([nats for nats, _ in cut], [nats for nats, _ in expected], rtol=SHARE, atol=NATS)
    assert "1 of 2 texts exceed max_length=8 and lose tokens from the left" in capfd.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 3])
def test_completions_are_those_of_the_generator(packages: Path, batch_size: int) -> None:
    model, generator = PackageLM(str(packages / "float32"), batch_size=batch_size), Generator.load(packages / "float32")
    prompts = ["The old tree", "", "A", "The river runs over the bright"]
    short = {"until": ["stone", "."], "max_gen_toks": 20, "do_sample": False}
    settings: list[dict[str, Any]] = [short, short, short, {"until": "the"}]

    texts = model.generate_until(requests("generate_until", list(zip(prompts, settings, strict=True))))

    expected = [
        generator.generate([prompt or [0]], max_new_tokens=asked.get("max_gen_toks", 256), stop=asked["until"])[0].text
        for prompt, asked in zip(prompts, settings, strict=True)
    ]
    assert texts == expected


def test_sampling_is_repeated_by_the_seed_of_numpy(packages: Path) -> None:
    model = PackageLM(str(packages / "float32"), max_gen_toks=24, batch_size=2)
    asked = requests("generate_until", [("The old", {"do_sample": True, "temperature": 1.5, "top_k": 50})] * 2)

    def sample(seed: int) -> list[str]:
        np.random.seed(seed)
        return model.generate_until(asked)

    first = sample(1)
    assert first == sample(1) != sample(2)
    assert first[0] != first[1]


def test_a_given_seed_is_the_generators(packages: Path) -> None:
    model, generator = PackageLM(str(packages / "float32")), Generator.load(packages / "float32")
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 3, "max_gen_toks": 8, "num_beams": 1}

    texts = model.generate_until(requests("generate_until", [("The old", settings)]))

    sampling = Sampling(temperature=0.9, top_p=0.9, seed=3)
    assert texts == [generator.generate("The old", max_new_tokens=8, sampling=sampling)[0].text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_lenght": 8}, "unknown model argument 'max_lenght'; did you mean 'max_length'?"),
        ({"batch_size": 0}, "batch_size is 0; at least 1, or auto"),
        ({"batch_size": "many"}, "batch_size is many; at least 1, or auto"),
        ({"max_length": 0}, "max_length is 0; from 1 to "),
        ({"max_length": 2**30}, f"max_length is {2**30}; from 1 to "),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_arguments_it_refuses(packages: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ExPEEdgeError, match=message.replace("?", r"\?")):
        PackageLM(str(packages / "float32"), **arguments)


def test_batches_that_lm_eval_may_ask_for(packages: Path) -> None:
    assert PackageLM(str(packages / "float32"), batch_size="8").batch_size == 8
    assert PackageLM(str(packages / "float32"), batch_size="auto:4").batch_size == AUTO_BATCH
    assert PackageLM(str(packages / "float32"), batch_size="auto", max_batch_size=2).batch_size == 2


def test_requests_it_refuses(packages: Path) -> None:
    model = PackageLM(str(packages / "float32"), max_length=8)
    with pytest.raises(GenerationError, match="unknown generation setting 'eta_cutoff'"):
        model.generate_until(requests("generate_until", [("A", {"eta_cutoff": 0.5})]))
    with pytest.raises(GenerationError, match="max_gen_toks is 8; of max_length=8 it must leave room for a prompt"):
        model.generate_until(requests("generate_until", [("A", {"max_gen_toks": 8})]))
    with pytest.raises(GenerationError, match="a continuation of 9 tokens exceeds max_length=8; raise it"):
        model._loglikelihood_tokens([(None, [0], [5] * 9)])


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of one task of each kind, over four questions in a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [" over the stone", " under a tree", " and", " bright"]
    questions = ["The river runs", "", "A bright stone", LONG]
    rows = [{"question": text, "choices": choices, "answer": 0, "text": text + "."} for text in questions]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds: dict[str, dict[str, Any]] = {
        "multiple_choice": {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"},
        "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "text"},
        "generate_until": {
            "doc_to_text": "question",
            "doc_to_target": "text",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        },
    }
    metrics = {"multiple_choice": "acc", "loglikelihood_rolling": "word_perplexity", "generate_until": "exact_match"}
    for kind, settings in kinds.items():
        task = {
            "task": f"small_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": kind,
            "metric_list": [{"metric": metrics[kind]}],
            **settings,
        }
        (folder / f"{kind}.yaml").write_text(json.dumps(task), encoding="utf-8")  # which is YAML too
    return folder


NAMES = ["small_multiple_choice", "small_loglikelihood_rolling", "small_generate_until"]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets are cached where the test ends."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def answers(model: str, arguments: dict[str, Any], tasks: Path) -> tuple[list[float], list[Any]]:
    """All nats of an evaluation, and all that is not a number: which answers are greedy, and texts."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(model, arguments, tasks=NAMES, batch_size=2, device="cpu", task_manager=manager)
    samples = [sample for name in NAMES for sample in results["samples"][name]]
    flat = [part for sample in samples for reply in sample["resps"] for part in _parts(reply[0])]
    return [part for part in flat if type(part) is float], [part for part in flat if type(part) is not float]


def _parts(reply: Any) -> tuple[Any, ...]:
    return tuple(reply) if isinstance(reply, list | tuple) else (reply,)


def test_package_and_checkpoint_answer_alike(checkpoint: Path, packages: Path, tasks: Path) -> None:
    ours, our_choices = answers("expe-edge", {"package": str(packages / "float32")}, tasks)
    theirs, their_choices = answers("expe-edge-checkpoint", {"pretrained": str(checkpoint)}, tasks)

    assert len(ours) == 4 * 4 + 4
    np.testing.assert_allclose(ours, theirs, rtol=SHARE, atol=NATS)
    assert our_choices == their_choices


#: `expe-edge` with lm_eval's own tasks out of sight: to index those takes it half a minute.
WITHOUT_ITS_TASKS = """
from functools import partialmethod
from lm_eval.tasks import TaskManager
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
from expe_edge.cli.main import main
main(prog_name="expe-edge")
"""


def test_the_command_evaluates(packages: Path, tasks: Path, tmp_path: Path) -> None:
    options = ["--include_path", tasks, "--tasks", ",".join(NAMES), "--batch_size", "2", "--output_path", tmp_path]
    arguments = ["evaluate", packages / "int8-static", *options, "--model_args", "max_length=512"]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ITS_TASKS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    (report,) = tmp_path.glob("**/results_*.json")
    results = json.loads(report.read_text(encoding="utf-8"))
    assert results["config"]["model"] == "expe-edge"
    assert results["config"]["model_args"] == {"package": str(packages / "int8-static"), "max_length": 512}
    assert set(results["results"]) == set(NAMES)
    assert "word_perplexity" in done.stdout


@pytest.mark.usefixtures("elsewhere")
def test_what_lm_eval_refuses_is_one_line(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError(f"Tasks not found: {sys.argv[-1]}")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    monkeypatch.setattr(sys, "argv", ["expe-edge"])  # the command sets it

    assert refused("evaluate", packages / "float32", "--tasks", "any") == "lm-eval: Tasks not found: any"
