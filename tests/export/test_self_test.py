"""What a package says it computed: the greedy tokens of our generator, and their logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expe_edge.export.self_test import READ, WRITTEN
from expe_edge.package.directory import open_manifest
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.runtime import Generator
from tests.conftest import PRECISIONS


def require_own_tokens(package: Path) -> None:
    recorded = open_manifest(package).manifest.self_test
    assert recorded is not None
    generator = Generator.load(package, threads=1)
    assert len(recorded["prompt"]) == READ
    tokens = [*recorded["prompt"], *recorded["tokens"]]
    logits = generator.session.forward([np.array(tokens[:-1], dtype=np.int64)])[0][READ - 1 :]
    assert len(logits) == WRITTEN == len(recorded["tokens"])
    chosen = logits[np.arange(WRITTEN), recorded["tokens"]]
    # Integer formats round activations, some by one range for all tokens of a run; here they are one run.
    np.testing.assert_allclose(chosen, recorded["logits"], atol=0.5 if "int" in package.name else 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_package_holds_what_it_computes(packages: Path, precision: str) -> None:
    require_own_tokens(packages / precision)


@pytest.mark.parametrize("precision", REFERENCE_PRECISIONS)
def test_so_do_the_packages_of_the_library(precision: str) -> None:
    require_own_tokens(reference_package(precision))
