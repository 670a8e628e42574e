"""`mmrm-fast <command>`: one parser a command from its config dataclass; errors of the user end without a traceback."""

import os
import sys
from collections.abc import Callable, Sequence

import tyro

from mmrm_fast.config import (
    ConvertConfig,
    DoctorConfig,
    ExportConfig,
    InspectConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
)

# GNU OpenMP's waiting threads otherwise spin without end: one busy neighbour made a training step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

USAGE = """usage: mmrm-fast COMMAND [options]

commands:
  train    train a reward model, standard or --robust
  score    score a JSONL with a reward model
  study    standard against robust on the shapes environments
  convert  an original InternVL checkpoint to transformers' own format
  export   a reward model to the layout of vLLM or of the reference implementation
  inspect  what a checkpoint folder holds
  doctor   what was built here and what each op runs on

`mmrm-fast COMMAND --help` explains every option."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, tuple[type, Callable]] = {
        "train": (TrainConfig, run_train),
        "score": (ScoreConfig, run_score),
        "study": (StudyConfig, run_study),
        "convert": (ConvertConfig, run_convert),
        "export": (ExportConfig, run_export),
        "inspect": (InspectConfig, run_inspect),
        "doctor": (DoctorConfig, run_doctor),
    }
    if not arguments or arguments[0] not in commands:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *rest = arguments
    config_type, run = commands[name]
    config = tyro.cli(config_type, prog=f"mmrm-fast {name}", description=config_type.__doc__, args=rest)
    try:
        return run(config)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"mmrm-fast {name}: {error}", file=sys.stderr)
        return 2


def run_train(config: TrainConfig) -> int:
    from mmrm_fast.train import train

    train(config)
    return 0


def run_score(config: ScoreConfig) -> int:
    from mmrm_fast.score import score

    return score(config)


def run_study(config: StudyConfig) -> int:
    from mmrm_fast.study import study

    study(config)
    return 0


def run_convert(config: ConvertConfig) -> int:
    from tqdm import tqdm

    from mmrm_fast.export import convert_folder, reward_check

    convert_folder(config.source, config.target, progress=lambda names: tqdm(names, desc="convert", unit="tensor"))
    if config.check:
        before, after = reward_check([config.source, config.target])
        print(
            f"reward of a sample record: {before:.6f} before, {after:.6f} after, difference {abs(before - after):.1e}"
        )
        return 0 if before == after else 1
    return 0


def run_export(config: ExportConfig) -> int:
    from tqdm import tqdm

    from mmrm_fast.export import export_original, export_vllm

    export = {"vllm": export_vllm, "original": export_original}[config.format]
    export(config.source, config.target, progress=lambda names: tqdm(names, desc="export", unit="tensor"))
    print(f"wrote {config.target}")
    return 0


def run_inspect(config: InspectConfig) -> int:
    from mmrm_fast.export import inspect

    facts = inspect(config.folder)
    for name, value in facts.items():
        print(f"{name:16} {value}")
    return 0


def run_doctor(config: DoctorConfig) -> int:
    from mmrm_fast.doctor import doctor

    doctor()
    return 0


if __name__ == "__main__":
    sys.exit(main())
