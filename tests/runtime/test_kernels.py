"""Kernels that are built here: products are those of onnxruntime's own, which run wherever these cannot."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from expe_edge.errors import ConfigError, PackageError
from expe_edge.export.exporter import export
from expe_edge.export.kernels import optimized_operators
from expe_edge.graph.nodes import operators_of
from expe_edge.package.directory import read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.graph_cache import GRAPH_FILE, GraphCache, entry_name
from expe_edge.runtime.kernels import VARIABLE, Kernels, kernels_at, source_hash
from expe_edge.runtime.opening import open_on_cpu
from expe_edge.runtime.processor import instructions
from expe_edge.speed.measuring import status_bytes
from tests.command_line import refused, succeed
from tests.products import Product

#: Largest difference over the largest value: products of the same integers, added up in float32 in another order.
SAME = 2e-6


# Products

SHAPES = [
    Product(k, n, bits, block, bias)
    for bits in (4, 8)
    for k, n, block, bias in [
        *((768, 200, 16, False), (320, 70, 32, True), (192, 65, 64, True), (768, 300, 128, False)),
        *((768, 64, 256, True), (100, 33, 16, True), (77, 31, 64, False), (200, 1, 256, True), (40, 130, 32, True)),
        *((2048, 96, 128, True), (16, 16, 16, False), (5000, 17, 256, True)),
    ]
]


def difference(product: Product, library: Path, rows: int, threads: int = 1, scale: float = 1.0) -> float:
    """The largest difference to onnxruntime's own product of random rows, over the largest value."""
    x = scale * np.random.default_rng(rows).standard_normal((1, rows, product.k)).astype(np.float32)
    (theirs,) = product.session(threads).run(None, {"x": x})
    (ours,) = product.session(threads, library).run(None, {"x": x})
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max(initial=0) / np.abs(theirs).max(initial=1e-30))


@pytest.mark.parametrize("product", SHAPES, ids=lambda p: f"{p.bits} bits, {p.k} by {p.n} in blocks of {p.block}")
def test_products_are_those_of_onnxruntime(library: Path, product: Product) -> None:
    """Of one row, few, and many, which go three ways, and of any number that tiles divide into."""
    for rows in (0, *range(1, 20), 64, 101):
        assert difference(product, library, rows) < SAME, rows


@pytest.mark.parametrize("product", SHAPES[::5])
@pytest.mark.parametrize("rows", [1, 5, 50])
def test_so_are_those_of_two_threads(library: Path, product: Product, rows: int) -> None:
    assert difference(replace(product, n=1000), library, rows, threads=2) < SAME


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_rows_of_any_size(library: Path, scale: float) -> None:
    for rows in (1, 3, 12):
        assert difference(SHAPES[1], library, rows, scale=scale) < SAME


@pytest.mark.parametrize("shape", [(192,), (3, 192), (2, 5, 192), (2, 2, 3, 192), (3, 0, 192)])
def test_inputs_of_any_number_of_axes(library: Path, shape: tuple[int, ...]) -> None:
    product = Product(192, 65, 4, 32, bias=True, axes=len(shape))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    (ours,) = product.session(library=library).run(None, {"x": x})
    (theirs,) = replace(product, axes=2).session(library=library).run(None, {"x": x.reshape(-1, 192)})

    assert ours.shape == (*shape[:-1], 65)
    np.testing.assert_allclose(ours.reshape(-1, 65), theirs, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_runs_of_one_session_and_of_two_at_once(library: Path, rows: int) -> None:
    """Each gives the bits that it gives alone, whatever the others unpack meanwhile."""
    products = [Product(768, 512, 8, 128, bias=True), Product(640, 320, 4, 32)]
    sessions = [product.session(2, library) for product in products]
    inputs = [
        np.random.default_rng(seed).standard_normal((1, rows, products[seed % 2].k)).astype(np.float32)
        for seed in range(4)
    ]
    alone = [sessions[i % 2].run(None, {"x": x})[0] for i, x in enumerate(inputs)]

    def run(i: int) -> bool:
        again = [sessions[i % 2].run(None, {"x": inputs[i]})[0] for _ in range(50)]
        return all(np.array_equal(each, alone[i]) for each in again)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_memory_of_weights_ends_with_the_session(library: Path) -> None:
    """Every session copies 32 MB."""
    product = Product(2048, 2**14, 8, 128)
    x = np.ones((1, 1, product.k), dtype=np.float32)
    (expected,) = product.session(library=library).run(None, {"x": x})
    before = status_bytes("VmSize")

    for _ in range(8):
        (found,) = product.session(library=library).run(None, {"x": x})
        np.testing.assert_array_equal(found, expected)

    assert status_bytes("VmSize") - before < 100e6


REFUSALS = [
    (Product(128, 32, 4, 32, zero_points=True), "zero points or an order of groups"),
    (Product(128, 32, 4, 32, order=True), "zero points or an order of groups"),
    (Product(128, 32, 4, 32, accuracy_level=1), "an accuracy level other than 4"),
    (Product(128, 32, 2, 32), "weights of other than 4 or 8 bits"),
    (Product(128, 32, 8, 48), "blocks of other than a power of two from 16 to 256"),
    (Product(600, 32, 8, 512), "blocks of other than a power of two from 16 to 256"),
]


@pytest.mark.parametrize(("product", "reason"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_other_products_are_refused_when_a_session_is_made(library: Path, product: Product, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        product.session(library=library)


def test_weights_that_are_too_few_are_refused(library: Path) -> None:
    """Nothing is read behind the end of a tensor, whatever a graph says of it."""
    for name in ("codes", "scales", "bias"):
        model = Product(128, 32, 8, 32, bias=True).model()
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.dims[0] //= 2
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        with pytest.raises(Exception, match="weights of another shape"):
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# Packages


def logits(session: PackageSession, chunk: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 300, 48)
    cache = session.new_cache(1, 60)
    return np.concatenate(list(session.prefill(cache, tokens, chunk)))


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight"])
def test_a_package_gives_nearly_the_same_logits(packages: Path, library: Path, precision: str) -> None:
    """In a prefill, drafts and steps. Activations halfway between two codes may be rounded the other way."""
    theirs = PackageSession.load(packages / precision, threads=1)
    ours = PackageSession.load(packages / precision, threads=1, kernels=library.parent)

    assert (theirs.kernels, ours.kernels) == (None, library)
    for chunk in (48, 7, 1):
        expected = logits(theirs, chunk)
        assert np.abs(logits(ours, chunk) - expected).mean() < 0.005 * np.abs(expected).mean()


def test_functions_are_nodes_and_the_rest_is_optimised_alike(packages: Path, library: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = packages / "int4-weight" / "model.onnx"
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    found = operators_of(onnx.load(tmp_path / "optimized.onnx"))
    chained, layers = optimized_operators(model), read_package(packages / "int4-weight").manifest.contract.layers
    assert [found[kind] for kind in ("Slopes", "SlopeBias", "GatedHeads", "SwiGLU")] == [layers] * 4
    for kind in ("MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"):
        assert found[kind] == chained[kind] > 0
    assert found.total() == chained.total() - 9 * layers


def test_portable_packages_have_no_use_for_them(
    checkpoint: Path, tmp_path: Path, kernels: Kernels, library: Path
) -> None:
    """onnxruntime would not open them: a release that does lets this fail."""
    (exported,) = export(checkpoint, tmp_path / "out", [Recipe("int4-weight", portable=True)])
    package = read_package(exported.path)

    assert package.manifest.kernels["MatMulNBits"] > 0
    assert kernels.library(package.manifest) is None
    with pytest.raises(PackageError, match="is not a registered"):
        open_on_cpu(package, 1, None, library)


def test_kept_graphs_of_both_kernels_stand_side_by_side(packages: Path, kernels: Kernels, tmp_path: Path) -> None:
    path, cache = packages / "int4-weight", GraphCache(tmp_path / "graphs")
    expected = {}
    for where in ("off", kernels.directory):
        expected[where] = logits(PackageSession.load(path, cache=cache, kernels=where), 48)
    for where in ("off", kernels.directory):
        np.testing.assert_array_equal(
            logits(PackageSession.load(path, cache=cache, kernels=where), 48), expected[where]
        )

    package = read_package(path)
    names = {entry_name(package), entry_name(package, kernels.library(package.manifest))}
    assert {place.name for place in cache.directory.iterdir()} == names
    sizes = [(cache.directory / name / GRAPH_FILE).stat().st_size for name in names]
    assert len(sizes) == 2


def test_a_package_whose_products_are_refused_runs_onnxruntimes_own(
    packages: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a library does not load, or makes no kernel of a node, as of zero points."""
    path = packages / "int4-weight"
    expected = logits(PackageSession.load(path), 48)
    real = ort.InferenceSession

    def refusing(model: str, options: ort.SessionOptions, **named: object) -> ort.InferenceSession:
        if options in with_library:
            return Product(128, 32, 4, 32, zero_points=True).session(library=library)
        return real(model, options, **named)

    (library,) = kernels.directory.iterdir()
    with_library: list[ort.SessionOptions] = []
    register = ort.SessionOptions.register_custom_ops_library

    def registered(options: ort.SessionOptions, name: str) -> None:
        register(options, name)
        with_library.append(options)

    monkeypatch.setattr(ort.SessionOptions, "register_custom_ops_library", registered)
    monkeypatch.setattr(ort, "InferenceSession", refusing)
    session = PackageSession.load(path, kernels=kernels.directory)

    assert with_library
    assert session.kernels is None
    np.testing.assert_array_equal(logits(session, 48), expected)


# Finding them


@pytest.fixture
def own(kernels: Kernels, tmp_path: Path) -> Kernels:
    """A copy, to be damaged."""
    return Kernels(Path(shutil.copytree(kernels.directory, tmp_path / "own")))


def used(kernels: Kernels, packages: Path) -> bool:
    return PackageSession.load(packages / "int4-weight", kernels=kernels.directory).kernels is not None


def test_what_was_damaged_is_not_loaded_and_can_be_built_anew(own: Kernels, packages: Path) -> None:
    assert used(own, packages)
    (path,) = own.directory.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert not used(own, packages)

    own.build()

    assert used(own, packages)
    assert len(list(own.directory.iterdir())) == 1


def test_a_directory_that_others_may_write_to_is_not_used(own: Kernels, packages: Path) -> None:
    own.directory.chmod(0o777)

    assert not used(own, packages)
    with pytest.raises(OSError, match="can be written to by others"):
        own.build()


def test_a_library_of_other_sources_is_not_used(
    own: Kernels, packages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from expe_edge.runtime import kernels as module

    changed = Path(shutil.copytree(module.SOURCES, tmp_path / "sources"))
    with (changed / "vnni.h").open("a") as file:
        file.write("// later\n")
    before = source_hash()
    monkeypatch.setattr(module, "SOURCES", changed)

    assert source_hash() != before
    assert not used(own, packages)


def test_processors_without_the_instructions(own: Kernels, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expe_edge.runtime.kernels.instructions", lambda: {"avx2", "avx512f", "avx512bw", "avx512vl"})

    assert not used(own, packages)
    with pytest.raises(ConfigError, match="this processor lacks avx512_vnni, avx512dq; onnxruntime's own"):
        own.build()


def test_instructions_are_those_that_all_cores_have(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f\n\nflags\t\t: fpu avx2\n")

    assert instructions(cpuinfo) == {"fpu", "avx2"}
    assert instructions(tmp_path / "none") == set()


def test_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_at() is None  # as the tests are run
    assert kernels_at(tmp_path) == Kernels(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert kernels_at() == Kernels(tmp_path / "chosen")
    assert kernels_at("off") is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels_at() == Kernels(tmp_path / "expe-edge" / "kernels")


# The command line


@pytest.mark.usefixtures("kernels")
def test_the_command_line_builds_and_says_what_runs(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "built"))
    result = succeed("build-kernels")
    (path,) = (tmp_path / "built").iterdir()
    assert str(path) in result.stdout

    asked = ("generate", packages / "int4-weight", "--prompt", "the", "--max-new-tokens", "3", "--verbose")
    assert "kernels of expe-edge" in succeed(*asked).stderr
    assert "kernels of onnxruntime" in succeed(*asked, "--kernels", "off").stderr
    assert Generator.load(packages / "int4-weight").session.kernels == path
    quickly = ("--turns", "1", "--steps", "2", "--prefill", "10", "--threads", "1", "--depths", "0", "--profile")
    shown = succeed("bench", packages / "int4-weight", *quickly, "--kernels", "both").stdout
    for part in ("int4-weight, kernels built", "int4-weight, kernels off", "expe-edge", "onnxruntime", "MatMulNBits"):
        assert part in shown


@pytest.mark.usefixtures("elsewhere")
def test_what_build_kernels_refuses(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("build-kernels") == "--kernels is off; name a directory, or unset EXPE_EDGE_KERNELS"
    asked = ("build-kernels", "--kernels", str(kernels.directory.parent / "none"))
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert refused(*asked) == "no C++ compiler (no-such-compiler); install g++ or clang++, or name one in CXX"
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(3)'")
    assert refused(*asked) == f"{sys.executable} cannot compile the kernels (exit code 3); name another in CXX"
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert refused(*asked) == "kernels are built on Linux alone, this is Windows; onnxruntime's own are used"
