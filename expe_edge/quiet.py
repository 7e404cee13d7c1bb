"""onnxruntime without its remarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime as ort

#: Severities of what onnxruntime logs.
WARNINGS, ERRORS = 2, 3


@contextmanager
def quiet_onnxruntime() -> Iterator[None]:
    """Leave away all but errors of what is logged by no session of ours."""
    ort.set_default_logger_severity(ERRORS)
    try:
        yield
    finally:
        ort.set_default_logger_severity(WARNINGS)
