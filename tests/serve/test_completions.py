"""Answers, through OpenAI's own client, are the generator's own at the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expe_edge.divergence import log_softmax
from expe_edge.runtime import Constraint
from tests.serve.conftest import Running

PROMPTS = ["the tree", "a river runs under the old bright stone and the tree grows over", "but"]
#: Fields of a request, and the same for `Generator.generate`.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {"sampling": {"temperature": 0.0}}),
    "seed": ({"seed": 7}, {"sampling": {"seed": 7}}),
    "filters": (
        {"seed": 3, "temperature": 0.8, "top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01, "typical_p": 0.95}},
        {"sampling": {"seed": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "typical_p": 0.95}},
    ),
    "penalties": (
        {
            "seed": 5,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.4,
            "logit_bias": {"5": 3, "9": -100},
            "extra_body": {"repetition_penalty": 1.2},
        },
        {
            "sampling": {
                "seed": 5,
                "frequency_penalty": 0.5,
                "presence_penalty": 0.4,
                "logit_bias": {5: 3.0, 9: -100.0},
                "repetition_penalty": 1.2,
            }
        },
    ),
    "mirostat": ({"seed": 1, "extra_body": {"mirostat_tau": 3}}, {"sampling": {"seed": 1, "mirostat_tau": 3.0}}),
    "stop": ({"seed": 2, "stop": ["stone", " and"]}, {"sampling": {"seed": 2}, "stop": ["stone", " and"]}),
    "stop tokens": (
        {"seed": 2, "extra_body": {"stop_token_ids": [20, 30], "min_tokens": 5}},
        {"sampling": {"seed": 2}, "stop_tokens": [20, 30], "min_new_tokens": 5},
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_generators_own(served: Running, way: str, stream: bool) -> None:
    fields, options = WAYS[way]
    expected = served.expected(PROMPTS, max_new_tokens=40, **options)

    texts, reasons = [""] * 3, [""] * 3
    if stream:
        for event in served.client().completions.create(
            model="float32", prompt=PROMPTS, max_tokens=40, stream=True, **fields
        ):
            (choice,) = event.choices
            assert not reasons[choice.index]
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or ""
    else:
        answer = served.client().completions.create(model="float32", prompt=PROMPTS, max_tokens=40, **fields)
        texts = [choice.text for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == sum(len(one.tokens) for one in expected)
        assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in expected)

    assert texts == [one.text for one in expected]
    assert reasons == [one.finish_reason for one in expected]


def test_samples_draw_with_seeds_of_their_own_and_read_the_prompt_once(served: Running) -> None:
    prompt = 3 * "a stone under the river and the tree grows over the bright old stone. "
    expected = served.expected([prompt], n=5, max_new_tokens=20, sampling={"seed": 11})

    answer = served.client().completions.create(model="float32", prompt=prompt, n=5, max_tokens=20, seed=11)

    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert len({choice.text for choice in answer.choices}) > 1
    again = served.client().completions.create(model="float32", prompt=prompt, max_tokens=1, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == (again.usage.prompt_tokens - 1) // 16 * 16 > 0


def test_prompts_of_token_ids(served: Running) -> None:
    ids = served.generator.encode("the old tree").tolist()
    (expected,) = served.expected([ids], max_new_tokens=9, sampling={"seed": 0})

    one = served.client().completions.create(model="float32", prompt=ids, max_tokens=9, seed=0)
    two = served.client().completions.create(model="float32", prompt=[ids, ids[:2]], max_tokens=9, seed=0)

    assert one.choices[0].text == two.choices[0].text == expected.text
    assert len(two.choices) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("new_tokens", [0, 6])
def test_echo_with_log_probabilities(served: Running, new_tokens: int, stream: bool) -> None:
    """What lm-evaluation-harness asks for: the log probability of every token of a text."""
    prompt = "the tree grows over the bright stone and under the river"
    ids = served.generator.encode(prompt)
    session = served.generator.session
    chunks = session.prefill(session.new_cache(1, 256), ids, served.settings.prefill_chunk)
    logits = np.concatenate([chunk.copy() for chunk in chunks])
    expected = [None, *(log_softmax(row)[token] for row, token in zip(logits, ids[1:].tolist(), strict=False))]
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, "max_tokens": new_tokens, "temperature": 0}

    if stream:
        events = list(served.client().completions.create(model="float32", prompt=prompt, stream=True, **fields))
        choices = [event.choices[0] for event in events]
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
        assert choices[-1].finish_reason == "length"
    else:
        answer = served.client().completions.create(model="float32", prompt=prompt, **fields)
        text, parts = answer.choices[0].text, [answer.choices[0].logprobs]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == new_tokens
    found = [logprob for part in parts for logprob in part.token_logprobs]
    names = [name for part in parts for name in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    tops = [top for part in parts for top in part.top_logprobs]

    assert text.startswith(prompt)
    assert found[: len(ids)] == expected
    assert len(found) == len(ids) + new_tokens
    assert "".join(names) == "<|endoftext|>" + text
    assert [text[begin:end] for begin, end in zip(offsets, [*offsets[1:], len(text)], strict=True)] == ["", *names[1:]]
    assert tops[0] is None
    assert all(top[name] == logprob for top, name, logprob in zip(tops[1:], names[1:], found[1:], strict=True))
    assert all(2 <= len(top) <= 3 for top in tops[1:])
    if new_tokens:
        (own,) = served.expected([prompt], max_new_tokens=6, sampling={"temperature": 0.0}, logprobs=2)
        assert own.logprobs is not None
        assert found[len(ids) :] == [each.logprob for each in own.logprobs]
    else:
        assert text == prompt


def test_usage_of_a_stream(served: Running) -> None:
    *events, last = served.client().completions.create(
        model="float32", prompt="the", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )

    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(served.generator.encode("the")), 4)


def test_text_by_constraint(served: Running) -> None:
    pytest.importorskip("llguidance")
    shape: dict[str, Any] = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 99}},
        "required": ["age"],
    }
    shape["additionalProperties"] = False
    served.generator.end_of_text, before = 0, served.generator.end_of_text
    served.generator.__dict__.pop("vocabulary", None)
    ways: list[tuple[dict[str, Any], Constraint]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": shape}}}, Constraint(json_schema=shape)),
        ({"guided_json": shape}, Constraint(json_schema=shape)),
        ({"guided_regex": "[0-9]{4}"}, Constraint(regex="[0-9]{4}")),
        ({"guided_choice": ["tree", "river"]}, Constraint(choices=("tree", "river"))),
        ({"guided_grammar": 'start: "a" "b"+ "c"'}, Constraint(grammar='start: "a" "b"+ "c"')),
    ]
    try:
        for fields, constraint in ways:
            (expected,) = served.expected(["the"], max_new_tokens=60, sampling={"seed": 1}, constraint=constraint)
            answer = served.client().completions.create(
                model="float32", prompt="the", max_tokens=60, seed=1, extra_body=fields
            )
            assert answer.choices[0].text == expected.text
            assert answer.choices[0].finish_reason == "stop"
    finally:
        served.generator.end_of_text = before


def test_models(served: Running) -> None:
    (model,) = served.client().models.list()

    assert model.id == "float32"
    assert served.client().models.retrieve("float32") == model
