"""`mmrm-fast <command>`: one parser a command from its config dataclass; errors of the user end without a traceback."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from mmrm_fast import config
from mmrm_fast.config_file import parse
from mmrm_fast.evaluate.config import AuditConfig, BestOfNConfig, EvaluateConfig, ReportConfig
from mmrm_fast.train.starter import InitConfig

# GNU OpenMP's waiting threads otherwise spin without end: one busy neighbour made a training step ten times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Huge pages behind torch's CPU tensors: the page faults of large fp32 activations cost a tenth of their products.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Every micro-batch has other sizes, which would leave a GPU's memory in fragments.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

COMMANDS = {  # what it takes, the function that runs it (None or 0 is success), what it is for
    "init": (InitConfig, "train.starter:init", "write a commented YAML file for your data"),
    "train": (config.TrainConfig, "train.command:run", "train a reward model, standard or --robust"),
    "study": (config.StudyConfig, "study.command:study", "methods against each other, in and out of distribution"),
    "audit": (AuditConfig, "evaluate.audit:audit", "what text alone can tell of preference files"),
    "evaluate": (EvaluateConfig, "evaluate.command:evaluate", "a benchmark, with calibration and intervals"),
    "best-of-n": (BestOfNConfig, "evaluate.best_of_n:best_of_n", "true quality of what models select out of N"),
    "report": (ReportConfig, "evaluate.report:report", "an HTML page about runs"),
    "score": (config.ScoreConfig, "score.command:score", "score a file with a reward model"),
    "serve": (config.ServeConfig, "serve.command:serve", "answer reward requests over HTTP, with a page to try it"),
    "inspect": (config.InspectConfig, "checkpoint.export:inspect", "what a checkpoint folder holds"),
    "convert": (config.ConvertConfig, "score.convert:convert", "an InternVL checkpoint to transformers' own format"),
    "export": (config.ExportConfig, "checkpoint.export:export", "a reward model to the layout of other programs"),
    "doctor": (config.DoctorConfig, "doctor.command:doctor", "what was built here, whether it is right and how fast"),
}
TASKS = {
    "train": ("init", "train", "study"), "judge": ("audit", "evaluate", "best-of-n", "report"),
    "use": ("score", "serve"), "checkpoints": ("inspect", "convert", "export"), "diagnose": ("doctor",),
}  # fmt: skip
USAGE = "\n".join(
    [
        "usage: mmrm-fast COMMAND [options]",
        *(
            f"\n{task}:\n" + "\n".join(f"  {name:10} {COMMANDS[name][2]}" for name in names)
            for task, names in TASKS.items()
        ),
        "\n`mmrm-fast COMMAND --help` explains every option."
        " On a GPU, PYTORCH_ALLOC_CONF is expandable_segments:True unless you set it.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 where it cannot be run so, 128 + N where signal N stopped it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        if near := get_close_matches(arguments[0], COMMANDS, n=1) if arguments and not asked else []:
            print(f"\n{arguments[0]}: did you mean `{near[0]}`?", file=sys.stderr)
        return 0 if asked else 2
    name, *rest = arguments
    config_type, place, _ = COMMANDS[name]
    try:
        taken = parse(config_type, rest, prog=f"mmrm-fast {name}")
        return imported(place)(taken) or 0
    except KeyboardInterrupt:
        print(f"mmrm-fast {name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install 'mmrm_fast[serve]'"
    except (ValueError, FloatingPointError, OSError) as error:
        reason = str(error)
    print(f"mmrm-fast {name}: {reason}", file=sys.stderr)
    return 2


def imported(place: str) -> Callable[[Any], int | None]:
    """A command's function; meanwhile no garbage is collected, which takes a tenth of a command's start."""
    module, _, function = place.partition(":")
    gc.disable()
    try:
        return getattr(import_module(f"mmrm_fast.{module}"), function)
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
