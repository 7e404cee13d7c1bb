"""Who imports what: the runtime stays light, help is instant, and every module can be imported by itself."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import expe_edge
from expe_edge.cli.main import main as cli

ROOT = Path(expe_edge.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(expe_edge.__path__, "expe_edge."))
#: What the base install does not have, or has only for the command line.
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "optimum",
    "matplotlib",
    "accelerate",
    "datasets",
    "safetensors",
    "pyarrow",
    "lm_eval",
    "joblib",
    "jinja2",
    "huggingface_hub",
    "llguidance",
    "starlette",
    "uvicorn",
    "prometheus_client",
}
SOURCES = sorted(ROOT.rglob("*.py"))
#: What every folder may import, and what it may of the others. docs/design.md draws it.
GROUND = ("errors", "kinds", "progress", "divergence", "results", "quiet", "spool", "__version__")
MAY_IMPORT = {
    "errors": (),
    "kinds": (),
    "progress": (),
    "divergence": (),
    "results": (),
    "quiet": (),
    "spool": (),
    "positions": (),
    "package": (),
    "quant": (),
    "text": ("package.directory", "package.tokenizer"),
    "model": ("positions", "package.checks", "package.contract"),
    "graph": ("model.config", "model.encodings.inverse_frequencies", "positions", "quant", "package"),
    "training": ("model", "text", "positions", "quant", "package"),
    "runtime": ("package",),
    "serve": ("runtime", "package"),
    "calibration": ("graph", "model.config", "positions", "quant", "text", "package"),
    "quality": (
        *("runtime", "text", "package", "training.checkpoint"),
        *("model.attention", "model.decoder", "model.encoding"),
    ),
    "hub": ("package",),
    "export": ("hub", "calibration", "graph", "training", "model", "text", "positions", "quant", "package"),
    "speed": ("runtime", "package"),
    "web": ("runtime", "package"),
    "study": ("export", "quality", "runtime", "speed", "training", "positions", "package"),
    "cli": (
        "study",
        "serve",
        "speed",
        "calibration",
        "export",
        "hub",
        "quality",
        "runtime",
        "training",
        "package",
        "quant",
        "text",
        "web",
    ),
    "__main__": ("cli",),
}
#: Folders that the base install must be able to run, or that must stay arithmetic; what they may import of others.
LIGHT = {
    "errors": set[str](),
    "kinds": set[str](),
    "results": set[str](),
    "package": set[str](),
    "positions": {"numpy"},
    "quant": {"numpy"},
    "runtime": {"numpy", "onnxruntime", "tokenizers", "llguidance"},  # the last imported where a constraint is used
    "speed": {"numpy", "onnxruntime"},
    "serve": {"numpy", "starlette", "uvicorn", "prometheus_client"},
    "hub": {"huggingface_hub"},
    "web": set[str](),
}


def top_level_modules(code: str, *arguments: str) -> set[str]:
    """Run `code` in a fresh interpreter; return the names of the top-level modules it has loaded at its end."""
    ending = "\nimport json, sys\nprint()\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + ending, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full name of every module that the source at `path` imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign_names(path: Path) -> set[str]:
    """Return what `path` imports beside the standard library."""
    return {name for name in imported_names(path) if name.partition(".")[0] not in sys.stdlib_module_names}


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    loaded = top_level_modules("import expe_edge.runtime")

    assert {"numpy", "onnxruntime", "expe_edge"} <= loaded
    assert not loaded & (HEAVY | {"click", "rich", "yaml", "tokenizers"})


def test_a_session_needs_no_tokenizer(packages: Path) -> None:
    code = "import sys\nfrom expe_edge.runtime import PackageSession\nPackageSession.load(sys.argv[1])"

    assert not top_level_modules(code, str(packages / "float32")) & (HEAVY | {"click", "rich", "yaml", "tokenizers"})


@pytest.mark.parametrize("precision", ["float32", "int8-static"])
def test_generating_loads_nothing_heavy_either(packages: Path, precision: str) -> None:
    code = (
        "import sys\n"
        "from expe_edge.runtime import Generator, Sampling\n"
        "generator = Generator.load(sys.argv[1])\n"
        "sampling = Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=0)\n"
        "assert len(generator.generate(['the', 'a tree'], max_new_tokens=4, sampling=sampling)) == 2\n"
        "assert ''.join(generator.stream('the', max_new_tokens=4))"
    )

    assert not top_level_modules(code, str(packages / precision)) & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in sorted(cli.commands))])
def test_help_loads_neither_numpy_nor_anything_heavier(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from expe_edge.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:], prog_name='expe-edge')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
    )

    loaded = top_level_modules(code, *arguments)

    assert "click" in loaded
    assert not loaded & (HEAVY | {"numpy", "onnxruntime", "tokenizers", "rich", "yaml"})


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    if name.startswith("expe_edge.quality.harness"):
        pytest.importorskip("lm_eval")
    if name.startswith("expe_edge.serve."):
        pytest.importorskip("starlette")
    assert importlib.import_module(name).__name__ == name


def test_every_source_file_is_among_the_modules() -> None:
    sources = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}

    assert {name.removesuffix(".__init__") for name in sources} == {"expe_edge", *MODULES}


def importer(path: Path) -> str:
    """Return the folder that `path` is in, or its own name where it stands beside the folders."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    allowed = (importer(path), *MAY_IMPORT.get(importer(path), ()), *GROUND)
    ours = [name.removeprefix("expe_edge.") for name in imported_names(path) if name.startswith("expe_edge.")]
    above = [name for name in ours if not f"{name}.".startswith(tuple(f"{place}." for place in allowed))]
    assert not above, f"{path.relative_to(ROOT)} imports {', '.join(above)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_light_folder_imports_only_what_the_base_install_has(path: Path) -> None:
    allowed = LIGHT.get(importer(path))
    foreign = {name.partition(".")[0] for name in foreign_names(path)} - {"expe_edge"}
    assert allowed is None or foreign <= allowed, f"{path.relative_to(ROOT)} imports {foreign - allowed}"
