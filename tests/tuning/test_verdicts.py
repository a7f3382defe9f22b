"""What is a verdict about kernels, and what only says that others use the machine too."""

import signal

import pytest
import torch

from fastpix2pix.tuning.verdicts import OUT_OF_MEMORY, ended_from_outside, one_line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported at another call"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=str,
)
def test_no_memory_is_known_whoever_says_it(error):
    assert one_line(error) == OUT_OF_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_what_a_kernel_does_is_told(error):
    assert one_line(error) == f"RuntimeError: {error}"


def test_who_ends_a_process():
    assert all(ended_from_outside(-number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    assert not any(ended_from_outside(code) for code in (0, 1, 9, -signal.SIGSEGV, -signal.SIGABRT))
