"""Every Triton kernel compiles to machine code for every target, without a GPU and without spilling a register.

In a process of its own: with TRITON_INTERPRET set, or a cached import under it, kernels cannot be compiled.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.xdist_group("cubin"),  # compiled once
]

REPORT = """
import io, json, sys
from importlib import import_module
import torch
from rich.console import Console
sys.path.insert(0, "scripts")
import kernel_report
from kernel_report import launch_resources

OPS = ("pack_image_tokens", "pair_loss")
names = ("launch", *OPS)
kernels = {n for name in names for n in vars(import_module(f"mmrm_fast.ops.triton.{name}")) if n.endswith("_kernel")}
rows = []
for hidden_size, dtype, architectures in (
    (2048, torch.bfloat16, (80, 90, 100)),
    (4096, torch.bfloat16, (80, 90, 100)),
    (4096, torch.float32, (90,)),
    (1537, torch.float16, (90,)),
):
    for case in kernel_report.cases(hidden_size, dtype):
        for launch in case.plan.launches:
            for architecture in architectures:
                resources = launch_resources(launch, architecture)._asdict()
                rows.append({"kernel": launch.kernel.__name__, "target": architecture, **resources})
            if launch.kernel.__name__ == "pack_image_tokens_bwd_kernel":
                squeezed = launch_resources(launch, 90, max_registers=24)._asdict()
console = Console(width=140, file=io.StringIO())
console.print(kernel_report.table(kernel_report.report((90,))))
table = console.file.getvalue()
print(json.dumps({"kernels": sorted(kernels), "rows": rows, "squeezed": squeezed, "table": table}))
"""


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run([sys.executable, "-c", REPORT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_every_target(machine_code):
    compiled = {(row["kernel"], row["target"]) for row in machine_code["rows"]}
    assert compiled == {(kernel, target) for kernel in machine_code["kernels"] for target in (80, 90, 100)}


def test_no_kernel_spills(machine_code):
    spilling = [row for row in machine_code["rows"] if row["stack"] or row["local"]]
    assert not spilling
    assert all(0 < row["registers"] <= 128 for row in machine_code["rows"])


def test_a_spill_would_be_seen(machine_code):
    assert machine_code["squeezed"]["stack"] > 0


def test_kernel_report(machine_code):
    lines = machine_code["table"].splitlines()
    assert any("computed from bytes and FLOPs, not measured" in line for line in lines)
    (pack, *_) = (line for line in lines if "pack_image_tokens_fwd" in line and "sm_90" in line)
    cells = [cell.strip() for cell in pack.strip("│").split("│")]
    assert cells[1] == "Triton"
    assert cells[4] == "0"  # spills
    assert cells[6] == "67.2 / 134"  # MB: 8,192 rows of 2,048 and 4,096 bf16 read and written, and their sources
    assert cells[8] == "20.1 / 40.1"  # microseconds at 3.35 TB/s
