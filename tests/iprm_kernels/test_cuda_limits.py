"""csrc/cuda/launch_limits.h, compiled for the host with functions of CUDA that count their calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from places import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: only Triton's kernels are tested", allow_module_level=True)

HEADER = Path(__file__).parents[2] / "csrc" / "cuda" / "launch_limits.h"
#: A device of 4 multiprocessors, each with 100 KiB of shared memory, all of which a block may request.
PROGRAM = """
#include <cstddef>
#include <iostream>
#include <stdexcept>
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
int calls = 0, allowed = 48 * 1024;
bool works = true;
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  ++calls;
  *value = name == cudaDevAttrMultiProcessorCount ? 4 : 100 * 1024;
  return works ? cudaSuccess : cudaErrorUnknown;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) { return ++calls, allowed = bytes, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t bytes) {
  ++calls;
  *blocks = int(bytes) <= allowed ? 100 * 1024 / int(bytes) : 0;
  return cudaSuccess;
}
#define STD_TORCH_CHECK(condition, ...) \\
  if (!(condition)) throw std::runtime_error("check")

#include "HEADER"

int main() {
  const char kernel = 0, other = 0;
  const auto ask = [](const void* kernel, int kilobytes, int device = 0) {
    calls = 0;
    const int64_t blocks = iprm::device::resident_blocks(kernel, 256, kilobytes * 1024, device);
    std::cout << blocks << " " << calls << std::endl;
  };
  ask(&kernel, 20), ask(&kernel, 20);  // the second time without a call
  ask(&kernel, 90), ask(&kernel, 50), ask(&kernel, 90);  // a smaller request in between takes nothing away
  std::cout << (allowed >= 90 * 1024) << std::endl;
  ask(&kernel, 101), ask(&kernel, 101);  // too much
  ask(&kernel, 20, 1), ask(&other, 20);
  works = false;
  try { ask(&other, 30); } catch (const std::runtime_error&) { std::cout << "error" << std::endl; }
  works = true;
  ask(&other, 30);  // an error is not kept
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ was found")
def test_cuda_is_asked_once_per_device_kernel_and_size(tmp_path: Path) -> None:
    source, program = tmp_path / "limits.cpp", tmp_path / "limits"
    source.write_text(PROGRAM.replace("HEADER", str(HEADER)))
    subprocess.run(["g++", "-std=c++20", "-Wno-unknown-pragmas", str(source), "-o", str(program)], check=True)
    printed = subprocess.check_output([str(program)], text=True).splitlines()
    first, too_much, of_one, of_two, of_three = "20 3", "0 2", "4 4", "8 4", "12 3"
    assert printed == [
        first, "20 0", of_one, of_two, "4 0", "1", too_much, "0 0", first, first, "error", of_three,
    ]  # fmt: skip
