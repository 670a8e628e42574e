"""`mmrm-fast <command>`: one parser a command from its config dataclass; errors of the user end without a traceback."""

import os
import sys
from collections.abc import Callable, Sequence

from mmrm_fast.config import (
    BestOfNConfig,
    ConvertConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    ReportConfig,
    ScoreConfig,
    ServeConfig,
    StudyConfig,
    TrainConfig,
)
from mmrm_fast.config_file import parse

# GNU OpenMP's waiting threads otherwise spin without end: one busy neighbour made a training step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Huge pages behind torch's CPU tensors: the page faults of large fp32 activations cost a tenth of their products.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

USAGE = """usage: mmrm-fast COMMAND [options]

commands:
  train      train a reward model, standard or --robust
  score      score a JSONL with a reward model
  serve      answer reward requests over HTTP, with a page to try it
  evaluate   a benchmark of the field, with calibration and confidence intervals
  best-of-n  true quality of what reward models select out of N
  report     an HTML page about runs
  study      standard against robust on the shapes environments
  convert    an original InternVL checkpoint to transformers' own format
  export     a reward model to the layout of vLLM or of the reference implementation
  inspect    what a checkpoint folder holds
  doctor     what was built here and what each op runs on

`mmrm-fast COMMAND --help` explains every option."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, tuple[type, Callable]] = {
        "train": (TrainConfig, run_train),
        "score": (ScoreConfig, run_score),
        "serve": (ServeConfig, run_serve),
        "evaluate": (EvaluateConfig, run_evaluate),
        "best-of-n": (BestOfNConfig, run_best_of_n),
        "report": (ReportConfig, run_report),
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
    try:
        return run(parse(config_type, rest, prog=f"mmrm-fast {name}"))
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"mmrm-fast {name}: {error}", file=sys.stderr)
        return 2


def run_train(config: TrainConfig) -> int:
    if config.memory.dry_run:
        from mmrm_fast.train.dry_run import dry_run

        dry_run(config)
        return 0
    from mmrm_fast.train.trainer import train

    train(config)
    return 0


def run_score(config: ScoreConfig) -> int:
    from mmrm_fast.score.command import score

    return score(config)


def run_serve(config: ServeConfig) -> int:
    try:
        from mmrm_fast.serve.command import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'mmrm_fast[serve]'") from None

    serve(config)
    return 0


def run_evaluate(config: EvaluateConfig) -> int:
    from mmrm_fast.evaluate.command import evaluate

    return evaluate(config)


def run_best_of_n(config: BestOfNConfig) -> int:
    from mmrm_fast.evaluate.best_of_n import best_of_n

    best_of_n(config)
    return 0


def run_report(config: ReportConfig) -> int:
    from mmrm_fast.evaluate.report import report

    report(config)
    return 0


def run_study(config: StudyConfig) -> int:
    from mmrm_fast.study.command import study

    study(config)
    return 0


def run_convert(config: ConvertConfig) -> int:
    from tqdm import tqdm

    from mmrm_fast.checkpoint.export import convert_folder
    from mmrm_fast.score.scorer import reward_check

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

    from mmrm_fast.checkpoint.export import export_original, export_vllm

    export = {"vllm": export_vllm, "original": export_original}[config.format]
    export(config.source, config.target, progress=lambda names: tqdm(names, desc="export", unit="tensor"))
    print(f"wrote {config.target}")
    return 0


def run_inspect(config: InspectConfig) -> int:
    from mmrm_fast.checkpoint.export import inspect

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
