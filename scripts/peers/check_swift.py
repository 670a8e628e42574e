"""A reward model that ms-swift trained and saved, read here: every reward of its own plugin against ours.

    python -m venv swift && swift/bin/pip install ms-swift==4.6.0 timm torchvision "torch<2.14"
    python scripts/peers/check_swift.py --python swift/bin/python

The status is 1 if a reward is further away than `--bound`, or a case ends otherwise than its row says.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from check_vllm import SIZES, picture, write_tiny
from safetensors import safe_open
from time_peers import CHATML, flags, timed

from mmrm_fast.checkpoint.export import summary
from mmrm_fast.client import image_url
from mmrm_fast.files import read_json, write_json, write_json_lines
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.tables import print_table

MAX_LENGTH = 512
ASKING = {"role": "user", "content": "What is it?"}
TURNS = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
LONG = "two red circles " * 200
CASES = {  # prompt, response, pictures
    "text": ([ASKING], "Two red circles.", ()),
    "empty response": ([ASKING], "", ()),
    "system": ([{"role": "system", "content": "Be brief."}, ASKING], "Two.", ()),
    "several turns": ([*TURNS, ASKING], "Two.", ()),
    **{f"picture {w} x {h}": ([ASKING], "Two.", ((w, h),)) for w, h in SIZES},
    "two pictures": ([ASKING], "Two.", SIZES[1:3]),
    "over-long response": ([ASKING], LONG, ()),
    "over-long prompt": ([{**ASKING, "content": LONG}], "Two.", ()),
    "malformed": ([{"role": "user", "content": None}], "Two.", ()),
}
REPLAYED = ("text", "empty response", "system", "several turns", "picture 56 x 56")  # by a test, from `--record`
WRITTEN = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
REFUSED = {"over-long response": "there", "over-long prompt": "both", "malformed": "here"}


def check_swift(python: Path, bound: float = 5e-3, record: Path | None = None) -> int:
    """Train a tiny model with ms-swift for two steps, and score by both what it saved.

    Args:
        python: interpreter of an environment with ms-swift.
        bound: largest difference of a reward in fp32; without a picture to resize it is about 1e-6.
        record: JSON file for its rewards and what it wrote beside the weights, which it then leaves as they were.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for width, height in SIZES:
            (root / f"{width}x{height}.png").write_bytes(picture(width, height))
        saved = trained(root, python, lr=1e-3 if record is None else 0.0)
        print(f"ms-swift saved {sorted(path.name for path in saved.iterdir())}")
        print("inspect: reward model", summary(saved)["reward model"])
        theirs = asked(root, saved, python)
        if record is not None:
            write_record(record, saved, theirs)
        scorer = Scorer.from_pretrained(saved, "cpu", max_length=MAX_LENGTH)
        rows = [[name, *judged(name, ours(scorer, root, *CASES[name]), theirs[name], bound)] for name in CASES]
    print_table("Rewards of ms-swift's folder", ["case", "mmrm_fast", "ms-swift", "as it should be"], rows, num_text=4)
    return int(any(row[-1] != "yes" for row in rows))


def write_record(path: Path, saved: Path, rewards: dict) -> None:
    """Write what a test needs to make the saved folder again, and what ms-swift's rewards of it are."""
    cases = {name: {"prompt": CASES[name][0], "response": CASES[name][1]} for name in REPLAYED}
    cases[REPLAYED[-1]]["images"] = [image_url(picture(*SIZES[0]))]
    with safe_open(saved / "model.safetensors", "pt") as weights:
        names = sorted(weights.keys())
    files = {name: read_json(saved / name) for name in WRITTEN}
    template = (saved / "chat_template.jinja").read_text()
    rewarded = {name: {**case, "reward": rewards[name]} for name, case in cases.items()}
    write_json(path, {"files": files, "chat_template": template, "names": names, "cases": rewarded})


def trained(root: Path, python: Path, *, lr: float) -> Path:
    """The folder that ms-swift saves."""
    write_tiny(root / "model", "")
    (root / "model" / "chat_template.jinja").write_text(CHATML)
    write_json_lines(root / "pairs.jsonl", [row(root, *case) for name, case in list(CASES.items())[:8]])
    options = {
        "rlhf_type": "rm", "model": root / "model", "model_type": "internvl", "template": "internvl_hf",
        "dataset": root / "pairs.jsonl", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_steps": 2, "torch_dtype": "float32", "tuner_type": "full", "freeze_vit": "true", "freeze_aligner": "false",
        "learning_rate": lr, "output_dir": root / "run", "save_strategy": "steps", "save_steps": 2,
        "save_only_model": "true", "eval_strategy": "no", "split_dataset_ratio": 0, "use_cpu": "true",
        "gradient_checkpointing": "false", "attn_impl": "sdpa", "report_to": "none",
    }  # fmt: skip
    timed([str(python.parent / "swift"), "rlhf", *flags(options)], root / "swift.log")
    (saved,) = root.glob("run/*/checkpoint-2")
    return saved


def row(root: Path, prompt: list[dict], response: str, sizes: tuple) -> dict:
    """A case in ms-swift's layout, which puts a newline behind a picture itself; the rejected reply is another text."""
    *before, last = prompt
    content = last["content"] and "<image>" * len(sizes) + last["content"]
    turns = [*before, {**last, "content": content}, {"role": "assistant", "content": response}]
    return {"messages": turns, "images": paths(root, sizes), "rejected_response": "I cannot tell."}


def paths(root: Path, sizes: tuple) -> list[str]:
    return [str(root / f"{width}x{height}.png") for width, height in sizes]


def asked(root: Path, saved: Path, python: Path) -> dict:
    """What ms-swift makes of the cases."""
    cases = {name: row(root, *case) for name, case in CASES.items()}
    for case in cases.values():
        del case["rejected_response"]
    given = {"model": str(saved), "cases": cases, "max_length": MAX_LENGTH}
    command = [str(python), str(Path(__file__).with_name("swift_rewards.py"))]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ms-swift failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(scorer: Scorer, root: Path, prompt: list[dict], response: str, sizes: tuple) -> float | str:
    """The reward of scoring, or why there is none."""
    record = {"prompt": prompt, "images": paths(root, sizes), "responses": [response]}
    try:
        return scorer.score([record])[0][0]
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def judged(name: str, here: float | str, there: float | str, bound: float) -> tuple[str, str, str]:
    """Both in words, and whether they are the same reward, or refused by whom `REFUSED` says."""
    said = [value[:60] if isinstance(value, str) else f"{value:+.6f}" for value in (here, there)]
    refused = {1: "here", 2: "there", 3: "both"}.get(isinstance(here, str) + 2 * isinstance(there, str))
    if refused or name in REFUSED:
        return (*said, "yes" if refused == REFUSED.get(name) else "NO")
    far = abs(here - there)
    return said[0], f"{said[1]}, {far:.1e} from ours", "yes" if far <= bound else "NO"


if __name__ == "__main__":
    sys.exit(tyro.cli(check_swift, description=__doc__))
