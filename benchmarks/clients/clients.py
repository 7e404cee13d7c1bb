"""The clients: how each is started, and what it can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from benchmarks.clients.cases import BEAMS, Task, Texts, tasks
from benchmarks.clients.environments import node, oldest_onnxruntime, other_python, this_python
from benchmarks.clients.running import Program


@dataclass(frozen=True)
class Client:
    """A client by the name in the table.

    start: raises `MissingError` where it cannot run. special: what it alone is asked, by the names of `special_tasks`.
    without: tasks that it has no call for.
    """

    name: str
    start: Callable[[], Program]
    special: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)


_WHOLE = "it completes whole texts; nothing is read behind what it generated"

CLIENTS = (
    Client("our generator, onnxruntime", partial(this_python, "ours", "onnxruntime")),
    Client("onnxruntime-oldest", lambda: other_python("onnxruntime_loop", oldest_onnxruntime())),
    Client("onnxruntime", partial(this_python, "onnxruntime_loop", "onnxruntime")),
    Client("onnxruntime-genai", partial(this_python, "genai", "onnxruntime-genai"), ("append twice", "left padding")),
    Client("Optimum", partial(this_python, "optimum_model", "optimum-onnx"), ("beams", "prompt lookup", "assisted")),
    Client(
        "lm-evaluation-harness",
        partial(this_python, "harness", "lm-eval", speaks_text=True),
        without={"continue": _WHOLE, "rewind": _WHOLE},
    ),
    Client("onnxruntime-node", partial(node, "onnxruntime-node.mjs", "onnxruntime-node")),
    Client("onnxruntime-web", partial(node, "onnxruntime-web.mjs", "onnxruntime-web")),
    Client("transformers.js", partial(node, "transformers.mjs", "@huggingface/transformers")),
)


def special_tasks(texts: Texts, training_length: int, new: int) -> dict[str, Task]:
    """Return what some clients alone are asked, by name."""
    usual = {task.name: task for task in tasks(texts, training_length, new)}
    greedy = usual["greedy"].arguments
    return {
        "left padding": Task("left padding", "complete", {**usual["batch"].arguments, "left": True}, doubtful=True),
        "append twice": Task("append twice", "append_twice", usual["continue"].arguments, doubtful=True),
        "beams": Task("beams", "complete", {**greedy, "num_beams": BEAMS}),
        "prompt lookup": Task("prompt lookup", "complete", {**greedy, "prompt_lookup_num_tokens": 4}),
        "assisted": Task("assisted", "assisted", greedy),
    }
