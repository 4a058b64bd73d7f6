"""What can be told of a CUDA kernel with no GPU: its registers, its stack, and the instructions that it is made of.

    python gates.py build/cuda        # one <op>.<arch>.cubin and the log of ptxas, <op>.<arch>.log, an arch

Every kernel must keep its registers (no spill, no stack, no local memory), and hold the instructions that it was
written for. Without cuobjdump and nvdisasm (packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) only the log is read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Part of a kernel's mangled name, the first arch of the rule, and what its machine code must hold.
MEANT = [
    ("linear_mma_kernel", 75, ["HMMA.1688.F32", "LDSM.16.M"]),
    ("linear_mma_kernel", 80, ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M", "STG.E.128", "LDS.128"]),
    ("linear_tf32_kernel", 80, ["HMMA.1688.F32.TF32", "FFMA", "LDGSTS.E.BYPASS.128", "LDS", "STG.E.128"]),
    ("linear_thin_kernel", 80, ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M", "STG.E.128", "LDS.128"]),
    ("linear_wgmma_kernel", 90, ["HGMMA.64", "UTMALDG.2D", "USETMAXREG", "SYNCS.PHASECHK", "STG.E.128", "LDS.128"]),
    ("linear_simt_kernelIf", 80, ["FFMA", "LDGSTS.E", "LDS.128", "STG.E.128"]),
    ("linear_simt_kernelId", 80, ["DFMA", "LDGSTS.E.64", "LDS.128", "STG.E.128"]),
    ("linear_gemv_mma_kernel", 80, ["HMMA.16816.F32", "LDG.E.128"]),
    ("linear_gemv_fma_kernel", 75, ["LDG.E.128"]),
    ("linear_grad_kernel", 75, ["LDG.E.128", "STG.E.128"]),
    ("attention_mma_kernel", 75, ["HMMA.1688.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "MUFU.EX2"]),
    (
        "attention_mma_kernel",
        80,
        ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "MUFU.EX2"],
    ),
    (
        "attention_wgmma_kernel",
        90,
        ["HGMMA.64", "UTMALDG.5D", "USETMAXREG.TRY_ALLOC", "USETMAXREG.DEALLOC", "MUFU.EX2", "STG.E.128"],
    ),
    (
        "attention_grad_mma_kernel",
        80,
        ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "MUFU.EX2", "STG.E.128"],
    ),
    ("attention_grad_kernelIf", 80, ["FFMA", "LDGSTS.E", "LDS.128"]),
    ("attention_grad_kernelId", 80, ["DFMA", "LDGSTS.E.64", "LDS.128"]),
    ("attention_weights_kernelIf", 80, ["FFMA", "LDGSTS.E", "LDS.128"]),
    ("attention_simt_kernelIf", 80, ["FFMA", "LDGSTS.E", "LDS.128"]),
    ("attention_simt_kernelId", 80, ["DFMA", "LDGSTS.E.64", "LDS.128"]),
]
NEVER = ("LDL", "STL")
# Never chosen there, so not built or of no use: on sm_75 bfloat16, which has no matrix instruction, and attention's widest
# tiles; where a block has 99 KiB the tile of gradients that takes 161; wgmma after sm_90a.
LARGE_GRAD = ("attention_grad_mma_kernelINS_7Float16ELi1E", "attention_grad_mma_kernelINS_8BFloat16ELi1E")
EXEMPT = {
    75: ("8BFloat16", "attention_mma_kernelINS_7Float16ELi8E", "attention_mma_kernelINS_7Float16ELi11E"),
    86: LARGE_GRAD,
    89: LARGE_GRAD,
    100: ("wgmma_kernel",),
    120: ("wgmma_kernel", *LARGE_GRAD),
}
WARNINGS = ("C7508", "C7510", "C7511", "C7515")  # setmaxnreg ignored, wgmma serialised


def registers(log: str) -> list[str]:
    """What ptxas -v tells against a kernel."""
    wrong = [line.strip() for line in log.splitlines() if any(code in line for code in WARNINGS)]
    kernel = "?"
    for line in log.splitlines():
        if found := re.search(r"(?:Function properties for|Compiling entry function) '?(\w+)", line):
            kernel = found.group(1)
        found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if found and any(int(count) for count in found.groups()):
            wrong.append(f"{kernel}: {line.strip()}")
    return wrong


def disassembled(nvdisasm: str, cubin: Path) -> dict[str, Counter]:
    """Instructions of each kernel, by their full name."""
    text = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.match(r"\w+", part).group()
        kernels[name] = Counter(
            re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)", part, flags=re.M)
        )
    return kernels


def instructions(arch: int, kernels: dict[str, Counter]) -> list[str]:
    wrong = []
    for name, found in kernels.items():
        wrong += [f"{name}: {op}, local memory" for op in found if op.split(".")[0] in NEVER]
        if any(part in name for part in EXEMPT.get(arch, ())):
            continue
        rules = [rule for rule in MEANT if rule[0] in name and rule[1] <= arch]
        newest = max((rule[1] for rule in rules), default=0)
        for _, first, meant in rules:
            if first == newest:
                wrong += [f"{name}: no {op}" for op in meant if not any(has.startswith(op) for has in found)]
    return wrong


def unwatched(arch: int, names: set[str]) -> list[str]:
    """Rules that no kernel of their op answers to."""
    wrong = []
    for part, first, _ in MEANT:
        op = part.split("_")[0]
        if first <= arch and not any(part in name for name in names) and any(op in name for name in names):
            wrong.append(f"no kernel is named {part}: the gate watches nothing")
    return wrong


def tool(name: str, folder: Path) -> str | None:
    beside = [*folder.glob(f"tools/**/bin/{name}"), Path(shutil.which("nvcc") or "/none").resolve().parent / name]
    return shutil.which(name) or next((str(path) for path in beside if path.is_file()), None)


def main(folder: Path) -> int:
    nvdisasm = tool("nvdisasm", folder)
    if not nvdisasm:
        print("gates: no nvdisasm here: instructions are not looked at, registers and stack are")
    cubins = sorted(folder.glob("*.cubin"))
    failures = 0
    names: dict[int, set[str]] = {}
    for cubin in cubins:
        arch = int(re.sub(r"\D", "", cubin.stem.rsplit(".", 1)[1]))
        wrong = registers(cubin.with_suffix(".log").read_text())
        kernels = disassembled(nvdisasm, cubin) if nvdisasm else {}
        wrong += instructions(arch, kernels)
        names.setdefault(arch, set()).update(kernels)
        for line in wrong:
            print(f"gates: {cubin.stem}: {line}")
        failures += len(wrong)
        print(f"gates: {cubin.stem}: {len(kernels) or 'no'} kernels disassembled, {len(wrong)} complaints")
    for arch, found in names.items():
        for line in unwatched(arch, found):
            print(f"gates: sm_{arch}: {line}")
            failures += 1
    if not cubins:
        print(f"gates: nothing compiled in {folder}")
    return 1 if failures or not cubins else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
