"""Exits with an error unless the installed `iprm_kernels` is a CUDA build for every GPU that setup.py promises."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
import triton

import iprm_kernels as ik

CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path

built = ik.build_info()
print(Path(ik.__file__).parent, built)
assert "site-packages" in ik.__file__, "the source tree is imported instead of the wheel"
assert built["extension"] == "cuda"
assert built["cuda_architectures"] == "8.0;9.0;10.0+PTX"
assert built["cuda"] == torch.version.cuda
library = next(Path(ik.__file__).parent.glob("_C*.so"))
kernels = {kind: subprocess.check_output([CUOBJDUMP, f"--list-{kind}", str(library)], text=True) for kind in ("elf", "ptx")}
for architecture in ("sm_80", "sm_90", "sm_100"):
    assert architecture in kernels["elf"], kernels
assert "sm_100" in kernels["ptx"], kernels
