"""`mmrm-fast doctor`: what is here; with `--gpu` or `--cpu`, whether it computes right on every rank, and how fast."""

from importlib import import_module

from mmrm_fast.config import DoctorConfig
from mmrm_fast.doctor.built import facts, inspect, lines, remedies
from mmrm_fast.files import write_json


def doctor(config: DoctorConfig) -> int:
    """Print the report of this machine, or check it; the exit status, 1 where a check failed.

    Raises:
        ValueError: `--gpu` where there is none.
    """
    machine = inspect()
    if config.gpu and config.cpu:
        raise ValueError("--gpu --cpu: one of the two")
    if config.gpu and not machine.devices:
        found = [line.removeprefix("GPU: ") for line in remedies(machine) if line.startswith("GPU: ")]
        why = found[0] if found else "there is no NVIDIA driver (libcuda.so.1): install one, and a torch with CUDA"
        raise ValueError(f"--gpu: {why}; `mmrm-fast doctor --cpu` checks what needs no GPU")
    if config.gpu or config.cpu:
        return import_module("mmrm_fast.doctor.ranks").check(config, facts(machine))  # with all that trains
    print("\n".join(lines(machine)))
    if config.json:
        write_json(config.json, [{"machine": facts(machine)}])
    return 0
