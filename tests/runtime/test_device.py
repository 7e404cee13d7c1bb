"""Packages for GPUs, and caches in a device's memory: here the CPU's, by the way that leads to a GPU's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from expe_edge.errors import GenerationError, PackageError
from expe_edge.export.exporter import export
from expe_edge.graph.linears import Int8Weight
from expe_edge.package.manifest import release
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession, Sampling, Window
from expe_edge.runtime.device import Device, DeviceBuffer
from expe_edge.runtime.opening import require_on_device
from expe_edge.runtime.session import Step
from expe_edge.runtime.shared import SharedStorage
from expe_edge.training.run import train
from tests.conftest import HAS_INT8_CACHE, needs_windows
from tests.export.test_clients import genai_tokens, optimum_model
from tests.small import small_settings

needs_gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="no onnxruntime-gpu here, or no GPU: what runs on one is not tried",
)
RECIPES = {
    "float32-cuda": Recipe(device="cuda"),
    "float16-cuda": Recipe("float16", device="cuda"),
    "int4-weight-cuda": Recipe("int4-weight", device="cuda"),
}
if release(ort.__version__) >= release(Int8Weight.since_half):
    RECIPES["int8-weight-cuda"] = Recipe("int8-weight", device="cuda")
if HAS_INT8_CACHE:
    RECIPES["float16-int8-cache-cuda"] = Recipe("float16", cache="int8", device="cuda")
#: Those whose greedy tokens are float32's.
EXACT = ("float32-cuda", "float16-cuda")
PROMPTS = ["the old tree", "a", "river runs under the bright stone and over " * 20]


@pytest.fixture(scope="module")
def gpu_packages(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    export(checkpoint, out, list(RECIPES.values()))
    return out


@pytest.fixture(scope="module")
def plain(packages: Path) -> Generator:
    return unending(Generator.load(packages / "float32", threads=1))


def unending(generator: Generator) -> Generator:
    generator.end_of_text = None
    return generator


def on_device(path: Path, device: Device | None = Device()) -> Generator:  # noqa: B008  # frozen
    """A generator whose caches are in a device's memory, bound by their addresses; None for the process's own."""
    session = PackageSession.load(path, threads=1)
    session.device = device
    return unending(Generator(session))


@pytest.mark.parametrize("name", EXACT)
def test_tokens_are_those_of_the_package_for_cpus(gpu_packages: Path, plain: Generator, name: str) -> None:
    expected = [completion.tokens for completion in plain.generate(PROMPTS, max_new_tokens=40)]
    for device in (None, Device()):
        generator = on_device(gpu_packages / name, device)
        assert [found.tokens for found in generator.generate(PROMPTS, max_new_tokens=40)] == expected
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            stream = generator.stream(prompt, max_new_tokens=40, prompt_lookup=True)
            assert "".join(stream) == generator.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", RECIPES)
def test_a_device_s_memory_changes_nothing(gpu_packages: Path, name: str) -> None:
    host, device = (on_device(gpu_packages / name, where) for where in (None, Device()))
    sampling = Sampling(temperature=0.9, seed=3)
    texts = [generator.generate(PROMPTS, n=2, max_new_tokens=30, sampling=sampling) for generator in (host, device)]
    assert [found.tokens for found in texts[0]] == [found.tokens for found in texts[1]]


def test_contexts_are_read_on_taken_back_copied_and_kept(gpu_packages: Path, plain: Generator, tmp_path: Path) -> None:
    generator = on_device(gpu_packages / "float32-cuda")
    expected = plain.generate([PROMPTS[2]], max_new_tokens=20)[0].tokens
    context = generator.context(PROMPTS[2])
    whole = len(context)
    context.append(" over the old stone")
    context.rewind(whole)
    copy = context.fork()
    copy.save(tmp_path / "kept")
    loaded = generator.context()
    loaded.load(tmp_path / "kept")
    for kept in (context, copy, loaded):
        stream = generator.stream(None, context=kept, max_new_tokens=20)
        list(stream)
        assert stream.completion.tokens == expected


def test_windows_of_text_drop_its_oldest_tokens(gpu_packages: Path) -> None:
    host, device = (on_device(gpu_packages / "float32-cuda", where) for where in (None, Device()))
    texts = [[*generator.stream(PROMPTS[2], max_new_tokens=90, window=Window(64, 4))] for generator in (host, device)]
    assert texts[0] == texts[1]


@needs_windows
def test_heads_with_windows(text_folder: Path, tmp_path: Path) -> None:
    recipe = {"softplus": True, "content_heads": 1, "temperature": 0.3}
    settings = small_settings(text_folder, positional_parameters=recipe, num_key_value_heads=4, max_steps=30)
    train(settings, tmp_path / "model")
    windowed = Recipe(head_window=16, head_window_cost=10.0)
    plain, for_gpu = export(tmp_path / "model", tmp_path, [windowed, dataclasses.replace(windowed, device="cuda")])
    prompt = np.random.default_rng(0).integers(1, 300, 700).tolist()
    expected, found = (
        generator.generate([prompt, prompt[:50]], max_new_tokens=40)
        for generator in (unending(Generator.load(plain.path)), on_device(for_gpu.path))
    )
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_the_cache_stays_where_it_is_bound(gpu_packages: Path) -> None:
    session = on_device(gpu_packages / "float16-cuda").session
    cache = session.new_cache(2, 300)
    storage = cache.storage
    assert isinstance(storage, SharedStorage)
    list(session.prefill(cache.row(1), np.arange(1, 21), 8))
    places = [buffer.value.data_ptr() for buffer in storage.buffers if isinstance(buffer, DeviceBuffer)]
    before = [array.copy() for array in storage.arrays]
    Step(session, cache.row(1), 1).run(np.array([[5]]))
    assert len(places) == 2 * session.contract.layers
    assert [buffer.value.data_ptr() for buffer in storage.buffers if isinstance(buffer, DeviceBuffer)] == places
    for old, new in zip(before, storage.arrays, strict=True):
        assert new.dtype == np.float16
        np.testing.assert_array_equal(new[1, :, :20], old[1, :, :20])
        assert np.abs(new[1, :, 20]).sum() > 0
        assert not new[0].any()
        assert not new[1, :, 21:].any()
    assert cache.nbytes == sum(array.nbytes for array in storage.arrays)


def test_a_device_without_room(gpu_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory")

    session = on_device(gpu_packages / "float32-cuda").session
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", refuse)
    with pytest.raises(GenerationError, match=r"^no memory for a cache of 1 × 256 tokens, .* bytes; lower `max_new"):
        session.new_cache(1, 300)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:1234", "CUDA", ""])
def test_names_of_no_device(text: str) -> None:
    with pytest.raises(GenerationError) as caught:
        Device.parse(text)
    assert str(caught.value) == f"unknown device {text!r}; available: cpu, cuda; change `device`"


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    second = Device.parse("cuda:1")
    assert (second, Device.parse("cuda"), Device.parse("cpu")) == (Device("cuda", 1), Device("cuda"), Device())
    options = {"device_id": "1", "use_tf32": "0"}
    assert second.providers == [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def test_a_package_for_cpus_is_refused_on_a_gpu(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(GenerationError) as caught:
        Generator.load(packages / "float32", device="cuda")
    assert str(caught.value) == (
        f"`device` cuda: {packages / 'float32'} is for CPUs, whose attention CUDAExecutionProvider has no kernel for; "
        "export it with `device` cuda"
    )


def test_nodes_that_run_elsewhere_are_refused(gpu_packages: Path) -> None:
    """A session of the CPU's, of which a GPU was asked for."""
    path = gpu_packages / "float16-cuda"
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip(f"onnxruntime {ort.__version__} does not say where nodes run")
    package = PackageSession.load(path).package
    require_on_device(package, session, Device())
    with pytest.raises(PackageError, match=r"runs MatMul, MultiHeadAttention, Skip\w+ elsewhere than on CUDA"):
        require_on_device(package, session, Device("cuda"))


@pytest.mark.parametrize("name", EXACT)
def test_genai_takes_the_same_graph(gpu_packages: Path, plain: Generator, tmp_path: Path, name: str) -> None:
    """On the CPU, where the provider that its config asks for is not: with one buffer, cleared, as on a GPU."""
    copy = Path(shutil.copytree(gpu_packages / name, tmp_path / name))
    config = json.loads((copy / "genai_config.json").read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {"use_tf32": "0"}}]
    options["provider_options"] = []
    (copy / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    prompt = plain.encode(PROMPTS[0]).tolist()
    found = genai_tokens(copy, prompt)
    assert found == plain.generate([prompt], max_new_tokens=len(found))[0].tokens


def test_optimum_whose_cache_grows_says_at_once_that_it_cannot(gpu_packages: Path) -> None:
    with pytest.raises(Exception, match="expe-with-one-buffer-for-expe-edge-or-onnxruntime-genai"):
        optimum_model(gpu_packages / "float32-cuda")


@needs_gpu
@pytest.mark.parametrize("name", EXACT)
def test_tokens_on_a_gpu(gpu_packages: Path, plain: Generator, name: str) -> None:
    generator = unending(Generator.load(gpu_packages / name, device="cuda"))
    expected = [completion.tokens for completion in plain.generate(PROMPTS, max_new_tokens=40)]
    assert [found.tokens for found in generator.generate(PROMPTS, max_new_tokens=40)] == expected
