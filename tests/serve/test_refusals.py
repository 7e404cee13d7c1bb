"""Bad input is refused in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Running

URL = "/v1/completions"
JSON = {"Content-Type": "application/json"}

#: Bodies, and what the refusal says of them.
BODIES: dict[bytes, str] = {
    b"": "not JSON",
    b"{": "not JSON",
    b'{"prompt": "a"': "not JSON",
    b'{"prompt": "\xff\xfe"}': "not UTF-8 (byte 12)",
    b'{"prompt": "a", "temperature": NaN}': "NaN is no JSON",
    b'{"prompt": "a", "temperature": 1e999}': "'temperature' is inf",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "not JSON",
    b"[" * 100_000: "not JSON",
    b"[1]": "must be a JSON object",
    b"null": "must be a JSON object",
    b"{}": "'prompt' is missing",
}
#: Fields, the status, what the refusal says and which field it names.
FIELDS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": None}, 400, "'prompt' is missing", "prompt"),
    ({"prompt": ""}, 400, "the prompt is empty", None),
    ({"prompt": []}, 400, "'prompt' is []; it must be text", "prompt"),
    ({"prompt": [[]]}, 400, "the prompt is empty", None),
    ({"prompt": 5}, 400, "'prompt' is 5", "prompt"),
    ({"prompt": ["a", 1]}, 400, "'prompt' is ['a', 1]", "prompt"),
    ({"prompt": [1, True]}, 400, "'prompt' is [1, True]", "prompt"),
    ({"prompt": [1.0]}, 400, "'prompt' is [1.0]", "prompt"),
    ({"prompt": {"a": 1}}, 400, "'prompt' is", "prompt"),
    ({"prompt": [1, 300]}, 400, "token id 300 is outside the vocabulary of 300", None),
    ({"prompt": [-1]}, 400, "token id -1 is outside", None),
    ({"prompt": [10**30]}, 400, "is outside the vocabulary", None),
    ({"prompt": "half \ud800"}, 400, "half a surrogate pair", None),
    ({"prompt": "a " * 400}, 400, "contexts hold 256 tokens", "prompt"),
    ({"prompt": "a " * 90_000}, 400, "or more; shorten", "prompt"),
    ({"prompt": [1] * 257}, 400, "the prompt has 257 or more", "prompt"),
    ({"max_tokens": 256}, 400, "contexts hold 256 tokens", "prompt"),
    ({"max_tokens": -1}, 400, "'max_tokens' is -1", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "'max_tokens' is 1.5", "max_tokens"),
    ({"max_tokens": "9"}, 400, "'max_tokens' is '9'", "max_tokens"),
    ({"max_tokens": True}, 400, "'max_tokens' is True", "max_tokens"),
    ({"max_tokens": 10**40}, 400, "'max_tokens' is", "max_tokens"),
    ({"min_tokens": 99}, 400, "'min_tokens' is 99", "min_tokens"),
    ({"n": 0}, 400, "'n' is 0", "n"),
    ({"n": 129}, 400, "'n' is 129", "n"),
    ({"prompt": ["a", "b"], "n": 128}, 400, "256 completions are more than the 128", "prompt"),
    ({"best_of": 3}, 400, "'best_of' must be 'n'", "best_of"),
    ({"temperature": -0.1}, 400, "'temperature' is -0.1", "temperature"),
    ({"temperature": "hot"}, 400, "'temperature' is 'hot'", "temperature"),
    ({"top_p": 0}, 400, "'top_p' is 0.0", "top_p"),
    ({"seed": -1}, 400, "'seed' is -1", "seed"),
    ({"seed": 2**63}, 400, "'seed' is", "seed"),
    ({"logit_bias": {"a": 1}}, 400, "'logit_bias' is {'a': 1}", "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "'logit_bias' is {'1': 101}", "logit_bias"),
    ({"logit_bias": {"300": 1}}, 400, "300", "logit_bias"),
    ({"logit_bias": {"9" * 999: 1}}, 400, "'logit_bias' is", "logit_bias"),
    ({"logit_bias": [1]}, 400, "'logit_bias' is [1]", "logit_bias"),
    ({"logprobs": 21}, 400, "'logprobs' is 21", "logprobs"),
    ({"logprobs": True}, 400, "'logprobs' is True", "logprobs"),
    ({"stop": [""]}, 400, "'stop' is ['']", "stop"),
    ({"stop": ["a"] * 17}, 400, "'stop' is", "stop"),
    ({"stop_token_ids": [300]}, 400, "300", "stop_token_ids"),
    ({"stream": "yes"}, 400, "'stream' is 'yes'", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "need 'stream'", "stream_options"),
    ({"stream": True, "stream_options": {"what": 1}}, 400, "'stream_options' is", "stream_options"),
    ({"suffix": "end"}, 400, "'suffix' is not served", "suffix"),
    ({"tempreature": 1}, 400, "did you mean 'temperature'?", "tempreature"),
    ({"x" * 9999: 1}, 400, "unknown field", "x" * 100),
    ({"half \ud800": 1}, 400, "unknown field", "half \\ud800"),
    ({"model": "gpt-4"}, 404, "no model 'gpt-4'; there is 'float32'", "model"),
    ({"model": 4}, 400, "'model' is 4", "model"),
    ({"response_format": {"type": "xml"}}, 400, "'response_format' is", "response_format"),
    ({"guided_choice": []}, 400, "'guided_choice' is []", "guided_choice"),
    ({"guided_choice": ["half \ud800"]}, 400, "'guided_choice' holds half a surrogate pair", "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "are both given", "guided_regex"),
    ({"mirostat_tau": 3, "top_k": 5}, 400, "'mirostat_tau' takes the place", "mirostat_tau"),
]


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    (name,) = answer.json()
    error: dict[str, Any] = answer.json()[name]
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 2500
    return error


def goes_on(running: Running) -> None:
    """The server answers as before."""
    (expected,) = running.expected(["the"], max_new_tokens=4, sampling={"seed": 0})
    answer = running.client().completions.create(model="float32", prompt="the", max_tokens=4, seed=0)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:24]))
def test_a_body_that_is_none(served: Running, body: bytes) -> None:
    error = refusal(httpx.post(served.address + URL, content=body, headers=JSON), 400)

    assert BODIES[body] in error["message"]
    assert error["type"] == "invalid_request_error"
    goes_on(served)


@pytest.mark.parametrize(("fields", "status", "said", "param"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_field_that_is_wrong(
    served: Running, fields: dict[str, Any], status: int, said: str, param: str | None
) -> None:
    body = json.dumps({"model": "float32", "prompt": "the tree", **fields})

    error = refusal(httpx.post(served.address + URL, content=body, headers=JSON), status)

    assert said in error["message"]
    assert error["param"] == param
    goes_on(served)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", URL, 405), ("POST", "/v1/nothing", 404), ("GET", "/v1/models/other", 404)],
)
def test_paths_that_are_none(served: Running, method: str, path: str, status: int) -> None:
    refusal(httpx.request(method, served.address + path), status)


def test_stop_tokens_that_leave_none_to_choose(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when they are asked for: within a step they would end the texts of all others too."""
    monkeypatch.setattr(served.generator, "end_of_text", 0)
    body = {"prompt": "the", "min_tokens": 1, "stop_token_ids": list(range(1, 300))}

    error = refusal(httpx.post(served.address + URL, json=body), 400)

    assert error["param"] == "stop_token_ids"


def test_chat_is_refused_with_what_to_do(served: Running) -> None:
    error = refusal(httpx.post(f"{served.address}/v1/chat/completions", json={"messages": []}), 400)

    assert error["code"] == "no_chat_template"
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {**JSON, "Content-Encoding": "gzip"}, {}])
def test_bodies_of_another_kind(served: Running, headers: dict[str, str]) -> None:
    """A page of another origin may send text without asking; JSON it may not."""
    refusal(httpx.post(served.address + URL, content=b'{"prompt": "a"}', headers=headers), 415)


def test_bodies_that_are_too_long(serving: Callable[..., Running]) -> None:
    one = serving(body_bytes=2000)
    long = json.dumps({"prompt": "a" * 3000}).encode()

    refusal(httpx.post(one.address + URL, content=long, headers=JSON), 413)
    refusal(httpx.post(one.address + URL, content=iter([long[:1500], long[1500:]]), headers=JSON), 413)
    goes_on(one)


def test_a_body_that_never_comes(serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expe_edge.serve.app.BODY_SECONDS", 0.2)
    one = serving()
    host, port = one.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = f"POST {URL} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        slow.sendall(head.encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    goes_on(one)


def test_keys(serving: Callable[..., Running]) -> None:
    one = serving(api_keys=("first", "sécond"))
    for key in ("wrong", "firs", "first2"):
        answer = httpx.get(f"{one.address}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert refusal(answer, 401)["code"] == "invalid_api_key"
    refusal(httpx.get(f"{one.address}/v1/models"), 401)
    refusal(httpx.get(f"{one.address}/v1/models", headers={"Authorization": "Bearer"}), 401)
    refusal(httpx.get(f"{one.address}/metrics"), 401)

    assert httpx.get(f"{one.address}/health").json() == {"status": "ok"}
    assert one.client(api_key="first").models.list().data[0].id == "float32"
    named = httpx.get(f"{one.address}/v1/models", headers={b"Authorization": "Bearer sécond".encode()})
    assert named.status_code == 200


def test_names_of_other_hosts(served: Running, serving: Callable[..., Running]) -> None:
    """A name that someone lets lead to this machine."""
    other = {"Host": "evil.example:80"}
    assert refusal(httpx.get(f"{served.address}/v1/models", headers=other), 421)["code"] == "wrong_host"
    for name in ("localhost", "LocalHost:80", "127.0.0.1:8000", "[::1]:80"):
        assert httpx.get(f"{served.address}/v1/models", headers={"Host": name}).status_code == 200

    one = serving(host_names=("Evil.example",))
    assert httpx.get(f"{one.address}/v1/models", headers=other).status_code == 200


def test_pages_of_other_origins(served: Running, serving: Callable[..., Running]) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(served.address + URL, headers=asked).status_code == 405
    assert "access-control-allow-origin" not in httpx.get(f"{served.address}/health", headers=asked).headers

    one = serving(cors_origins=("https://a.example",), api_keys=("key",))
    allowed = httpx.options(one.address + URL, headers={**asked, "Access-Control-Request-Headers": "authorization"})
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.get(f"{one.address}/health", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
