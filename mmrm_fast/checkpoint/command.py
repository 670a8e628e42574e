"""`mmrm-fast export` and `mmrm-fast inspect`."""

from tqdm import tqdm

from mmrm_fast.checkpoint.export import export_original, export_vllm
from mmrm_fast.checkpoint.export import inspect as facts
from mmrm_fast.config import ExportConfig, InspectConfig


def export(config: ExportConfig) -> None:
    """Write a reward model for other programs."""
    write = {"vllm": export_vllm, "original": export_original}[config.format]
    write(config.source, config.target, progress=lambda names: tqdm(names, desc="export", unit="tensor"))
    print(f"wrote {config.target}")


def inspect(config: InspectConfig) -> None:
    """Print what a checkpoint folder holds."""
    for name, value in facts(config.folder).items():
        print(f"{name:16} {value}")
