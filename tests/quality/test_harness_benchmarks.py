"""HellaSwag, ARC and MMLU as lm_eval defines them, over our own questions: nats and accuracies are PyTorch's."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from expe_edge.quality import harness, harness_checkpoint  # noqa: F401  # register the models
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint
from tests.quality.scored import NATS, SHARE, torch_scores

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
#: Task to the file of lm_eval that defines it.
DEFINED_IN = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "mmlu_astronomy": "mmlu/default/mmlu_astronomy.yaml",
}
#: Worked examples before a question.
SHOTS = 2


def going_on(activity: str, begun: str, then: str, endings: list[str], label: int) -> dict[str, Any]:
    return {"activity_label": activity, "ctx_a": begun, "ctx_b": then, "endings": endings, "label": str(label)}


def science(question: str, texts: list[str], key: str, labels: str = "ABCD") -> dict[str, Any]:
    return {"question": question, "choices": {"text": texts, "label": list(labels[: len(texts)])}, "answerKey": key}


def subject(question: str, choices: list[str], answer: int) -> dict[str, Any]:
    return {"question": question, "choices": choices, "answer": answer}


HELLASWAG = {
    "train": [
        going_on("Gardening", "A man digs a hole.", "he", ["plants a tree.", "eats it.", "sings.", "swims off."], 0),
        going_on("Rowing", "Two boats leave the bank.", "they", ["sleep.", "row over the river.", "fly.", "burn."], 1),
        going_on("Cooking", "Water boils in the pot.", "she", ["rows.", "adds salt.", "digs.", "shines."], 1),
    ],
    "validation": [
        going_on("Masonry", "She lifts a stone.", "she", ["sets it on the wall.", "reads.", "is a tree.", "rains."], 0),
        going_on("Walking", "The path runs by", "the river", ["under a tree.", "and the.", "of bright.", "in tea."], 0),
        going_on("Camping", "A fire burns.", "the men", ["are wet stones.", "grow.", "sit around it.", "melt."], 2),
        going_on("How to rest [title] Find a tree", "Sit", "down", ["over.", "on a root.", "of the.", "bright."], 1),
    ],
}
ARC = {
    "train": [
        science("What do trees grow from?", ["seeds", "stones", "rivers", "wind"], "A"),
        science("Which of these is wet?", ["sand", "a river", "a stone"], "B"),
        science("When is it dark?", ["at noon", "in the morning", "in May", "at night"], "D"),
    ],
    "test": [
        science("What do the roots of a tree take up?", ["light", "water", "stones", "birds"], "B"),
        science("What does the sun give?", ["light", "rain", "wood", "the smell of the old river"], "1", "1234"),
        science("Which is the hardest?", ["water", "a leaf", "a stone"], "C"),
        science("Where does a river run to?", ["up a hill", "into a tree", "under the moon", "to the sea"], "D"),
    ],
}
MMLU = {
    "dev": [
        subject("What does the moon go around?", ["the sun", "the earth", "a tree", "a star"], 1),
        subject(" What is the sun?", ["a stone", "a river", "a star", "a moon"], 2),
        subject("What is the moon made of?", ["tea", "stone", "wood", "light"], 1),
    ],
    "test": [
        subject("Which of these is the largest?", ["a stone", "the moon", "the earth", "the sun"], 3),
        subject("What gives the moon its light? ", ["the sun", "fire", "the sea", "itself"], 0),
        subject("How many moons has the earth?", ["none", "one", "two", "three"], 1),
        subject("What do stars do?", ["run", "grow on trees", "shine", "rain"], 2),
    ],
}
#: By task and split: worked examples, then what is asked.
DATA = {"hellaswag": HELLASWAG, "arc_easy": ARC, "arc_challenge": ARC, "mmlu_astronomy": MMLU}


def hellaswag_question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return begun.replace(" [title] ", ". "), row["endings"], int(row["label"])


def arc_question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"])


def mmlu_question(row: dict[str, Any]) -> tuple[str, list[str], int]:
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}{listed}\nAnswer:", list("ABCD"), row["answer"]


QUESTION = {
    "hellaswag": hellaswag_question,
    "arc_easy": arc_question,
    "arc_challenge": arc_question,
    "mmlu_astronomy": mmlu_question,
}
DESCRIPTION = {
    "mmlu_astronomy": "The following are multiple choice questions (with answers) about astronomy.\n\n",
}


def contexts(task: str, question: str, shots: int) -> set[str]:
    """What may stand before an answer: description, examples, question. Examples are drawn; MMLU takes the first."""
    examples, _ = DATA[task].values()
    worked = [f"{asked} {choices[answer]}\n\n" for asked, choices, answer in map(QUESTION[task], examples)]
    orders = [tuple(worked[:shots])] if task.startswith("mmlu") else permutations(worked, shots)
    return {DESCRIPTION.get(task, "") + "".join(order) + question for order in orders}


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of lm_eval's own tasks, but for where their text comes from; datasets are cached where the test ends."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, splits in DATA.items():
        files = {split: folder / f"{task}-{split}.jsonl" for split in splits}
        for split, rows in splits.items():
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        local = {
            "include": str(DEFINITIONS / DEFINED_IN[task]),
            "task": f"own_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        }
        if "arc" in task:
            local["validation_split"] = None
        (folder / f"{task}.yaml").write_text(json.dumps(local), encoding="utf-8")  # which is YAML too
    return folder


@pytest.mark.parametrize("shots", [0, SHOTS])
@pytest.mark.parametrize("model", ["expe-edge", "expe-edge-checkpoint"])
def test_scores_are_those_of_the_checkpoint(
    trained: Checkpoint, packages: Path, tasks: Path, model: str, shots: int
) -> None:
    arguments = {"package": str(packages / "float32")} if model == "expe-edge" else {"pretrained": str(trained.path)}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    done = lm_eval.simple_evaluate(
        model,
        arguments,
        tasks=[f"own_{task}" for task in DATA],
        num_fewshot=shots,
        batch_size=4,
        device="cpu",
        task_manager=manager,
    )

    for task in DATA:
        results, samples = done["results"][f"own_{task}"], done["samples"][f"own_{task}"]
        right, right_by_length = [], []
        _, asked = DATA[task].values()
        assert len(samples) == len(asked)
        for row, sample in zip(asked, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
            question, choices, answer = QUESTION[task](row)
            (context,) = {given for given, _ in sample["arguments"]}
            assert context in contexts(task, question, shots)
            expected = np.array([torch_scores(trained, context, f" {choice}")[0] for choice in choices])
            nats = [nats for ((nats, _),) in sample["resps"]]
            np.testing.assert_allclose(nats, expected, rtol=SHARE, atol=NATS)
            right.append(expected.argmax() == answer)
            right_by_length.append((expected / [len(choice) for choice in choices]).argmax() == answer)
        assert results["acc,none"] == np.mean(right)
        assert results.get("acc_norm,none", np.mean(right_by_length)) == np.mean(right_by_length)
        assert ("acc_norm,none" in results) == (not task.startswith("mmlu"))


def test_lm_eval_knows_the_tasks_by_the_names_of_the_page() -> None:
    """Only the folders that they are in: to index all of its tasks takes lm_eval half a minute."""
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    folders = [str(DEFINITIONS / name) for name in ("hellaswag", "arc", "mmlu/default")]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks
    for task in ("hellaswag", "arc_easy", "arc_challenge", "mmlu"):
        assert f"--tasks {task} " in page
        assert task in known
