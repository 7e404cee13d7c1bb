"""The device that a package runs on, and the buffers of a cache: in memory, or in the device's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from expe_edge.errors import GenerationError
from expe_edge.package.contract import CUDA_OPTIONS
from expe_edge.runtime.storage import Array

#: What `--device` begins with, to the execution provider it stands for.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Device:
    """kind: `cpu` or `cuda`. index: which of several."""

    kind: str = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device of a name, as `cuda` or `cuda:1`.

        Raises:
            GenerationError: an unknown one, or one that this onnxruntime cannot run on.
        """
        match = re.fullmatch(r"(cpu|cuda)(?::(\d{1,3}))?", text)
        if match is None or (match[1] == "cpu" and match[2]):
            raise GenerationError(f"unknown device {text!r}; available: {', '.join(PROVIDERS)}; change `device`")
        device = cls(match[1], int(match[2] or 0))
        if device.provider not in ort.get_available_providers():
            raise GenerationError(
                f"`device` {text}: this onnxruntime has no {device.provider}; install onnxruntime-gpu on a machine "
                "with a GPU, or use `device` cpu"
            )
        return device

    @property
    def provider(self) -> str:
        """Its execution provider."""
        return PROVIDERS[self.kind]

    @property
    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """What a session is opened with: its provider, and the CPU's for what that leaves."""
        if self.kind == "cpu":
            return [self.provider]
        return [(self.provider, {"device_id": str(self.index), **CUDA_OPTIONS}), PROVIDERS["cpu"]]


class HostBuffer:
    """Keys or values of all rows, (batch, heads, columns, D), in memory that runs read and write in place.

    shape: its axes. nbytes: its bytes.
    """

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.nbytes = array, array.shape, array.nbytes

    def read(self) -> Array:
        """Return what it holds, valid until the next change."""
        return self.array

    @contextmanager
    def edit(self) -> Iterator[Array]:
        """Yield what it holds, to be changed."""
        yield self.array

    def bind(self, binding: ort.IOBinding, past: str, present: str, begin: int, end: int) -> None:
        """Bind the rows [begin, end) as the input `past` and the output `present`."""
        value = ort.OrtValue.ortvalue_from_numpy(self.array[begin:end])
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)


class DeviceBuffer:
    """The same in the memory of a device. What is read or changed outside of runs is copied, all rows of it."""

    def __init__(self, array: Array, device: Device) -> None:
        self.device, self.dtype, self.shape, self.nbytes = device, array.dtype, array.shape, array.nbytes
        try:
            self.value = ort.OrtValue.ortvalue_from_numpy(array, device.kind, device.index)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise MemoryError(str(error)) from error

    def read(self) -> Array:
        """Return a copy of what it holds."""
        array: Array = self.value.numpy()
        return array

    @contextmanager
    def edit(self) -> Iterator[Array]:
        """Yield a copy of what it holds, which is written back once it has been changed."""
        array = np.array(self.value.numpy())
        yield array
        self.value.update_inplace(array)

    def bind(self, binding: ort.IOBinding, past: str, present: str, begin: int, end: int) -> None:
        """Bind the rows [begin, end), by their address, as the input `past` and the output `present`."""
        shape = (end - begin, *self.shape[1:])
        place = self.value.data_ptr() + begin * (self.nbytes // self.shape[0])
        kind, index = self.device.kind, self.device.index
        binding.bind_input(past, kind, index, self.dtype, shape, place)
        binding.bind_output(present, kind, index, self.dtype, shape, place)
