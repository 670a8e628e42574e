"""What the commands take, one dataclass each; the docstring under a field is its `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SFC_MODES = ("paper", "reference", "normalized")


@dataclass(frozen=True)
class DataConfig:
    """How records become batches; shared by training, evaluation and scoring."""

    config: str | None = None
    """YAML file of these options, or a preset such as internvl2-8b-robust; flags win over it. The reference
    implementation's files work as they are."""
    image_root: Path | None = None
    """Folder that relative `img_path`s start from. Default: the folder of the JSONL file."""
    max_length: int | None = None
    """Tokens of one prompt with its images plus one response. Default: what the checkpoint says."""
    max_tiles: int | None = None
    """Most tiles an image is cut into, without the thumbnail. Default: what the checkpoint says."""
    tokens_per_micro_batch: int = 16_384
    """Work of one forward, in tokens after sharing: tokens + gathered keys / 8 + image tokens."""
    check_records: int = 100_000
    """Records checked before anything runs (syntax, fields, images, lengths); 0 checks none."""
    check: bool = False
    """Decode every image when checking. Sets of under 10,000 images are always decoded."""


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train a reward model on preference pairs: standard, or shortcut-aware with `--robust`.

    Without `--data` it makes (or finds in the cache) one synthetic environment of coloured shapes, trains the tiny
    checkpoint that comes with the package on it, and tests on all environments.
    """

    robust: bool = False
    """Train a text-only proxy beside the model and up-weight the pairs on which it fails."""
    data: tuple[str, ...] = ()
    """JSONL files of preferences, pairwise or K-wise; FILE:WEIGHT for a mixture. Default: a shapes environment."""
    pairs: str = "all"
    """Pairs of a K-wise record: `all` of them in one group, `expand` for every pair as a sample of its own, or a number
    of pairs taken at random."""
    eval_fraction: float | None = None
    """Share of the training data held out as the test set `held-out`, by a hash of image and prompt."""
    eval: tuple[str, ...] = ()
    """Test sets from the training distribution, NAME=FILE."""
    eval_ood: tuple[str, ...] = ()
    """Test sets from other distributions, NAME=FILE; the o.o.d. accuracy is their mean."""
    model: Path | None = None
    """Local folder of an InternVL checkpoint in transformers' format. Default: the tiny one."""
    proxy_model: Path | None = None
    """Checkpoint whose language model the proxy starts from, with the same tokenizer. Default: `--model`."""
    output_dir: Path | None = None
    """Run folder. Default: runs/standard or runs/robust."""
    environment: Literal["opening", "length", "hedging"] = "opening"
    """Shapes environment to train on when there is no `--data`: opening, length or hedging."""
    sfc_mode: Literal["paper", "reference", "normalized"] = "paper"
    """Weight of a pair: L_t / (L + L_t), the reference implementation's, or divided by its mean."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    lr: float | None = None
    """Peak learning rate. Default: 1e-5, 5e-4 for the tiny checkpoint."""
    warmup_ratio: float = 0.1
    """Share of the training in which the learning rate rises; after it, a cosine to zero."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    beta2: float = 0.98
    """AdamW second moment decay."""
    max_grad_norm: float = 1.0
    """Gradient norm that each branch is clipped to."""
    tokens_per_batch: int | None = None
    """Work of one optimizer step over all ranks, in the units of `--tokens-per-micro-batch`.
    Default: 131,072 (about 128 pairs), 6,144 for the tiny checkpoint."""
    inputs: Literal["all", "text", "image"] = "all"
    """What the model sees, for ablations: all, a white tile in place of every image, or images without the question."""
    pairs_per_step: int | None = None
    """Pairs of one optimizer step over all ranks, instead of `--tokens-per-batch`."""
    overlong: Literal["skip", "truncate", "error"] = "skip"
    """A response that does not fit: drop its pairs and count them, cut it, or stop."""
    skip_bad: bool = False
    """Skip records that cannot be used, listed in skipped.jsonl, instead of stopping."""
    freeze_llm: bool = False
    """Do not train the language model."""
    freeze_backbone: bool = True
    """Do not train the vision tower."""
    freeze_mlp: bool = False
    """Do not train the projector."""
    eval_every: int | None = None
    """Evaluate every so many steps; always at the end."""
    num_workers: int | None = None
    """Processes a rank that decode, tile and pack; 0 does it in the training process.
    Default: 4 with a GPU, 0 without, where they would take the cores that train."""
    seed: int = 0
    """Seed of the score head and of the order of the records."""


@dataclass(frozen=True)
class ScoreConfig(DataConfig):
    """Score every response of a JSONL with a trained reward model, on Ray actors, in input order."""

    model: Path = Path("runs/robust/final")
    """Folder of the reward model, such as runs/NAME/final."""
    data: Path = Path("records.jsonl")
    """JSONL of records; every response of any record form is scored."""
    out: Path = Path("scores.jsonl")
    """Rows id, record, response_index, prompt, img_path, response, score, truncated."""
    actors: int | None = None
    """Scoring processes. Default: one a GPU, or one a two CPUs."""
    gpus_per_actor: float | None = None
    """GPUs of an actor. Default: 1 where there are any."""
    address: str | None = None
    """Ray cluster to join. Default: start one on this machine."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a benchmark of the field, or any preference file, and say how far its numbers can be trusted."""

    bench: Literal["vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench", "rewardbench", "pairs"] = "pairs"
    """Layout, groups and metrics: a benchmark as published, or `pairs` for any preference records."""
    data: Path = Path("pairs.jsonl")
    """Parquet, JSONL, JSON or CSV file, or the folder that holds it."""
    images: Path | None = None
    """Folder that image file names start from. Default: the folder of the file."""
    model: Path = Path("runs/robust/final")
    """Folder of the reward model, such as runs/NAME/final."""
    output_dir: Path = Path("runs/evaluate")
    """Folder of results.json, reliability.svg and margins.svg."""
    max_length: int | None = None
    """Tokens of one prompt with its images plus one response. Default: what the checkpoint says."""
    max_tiles: int | None = None
    """Most tiles an image is cut into, without the thumbnail. Default: what the checkpoint says."""
    tokens_per_micro_batch: int = 16_384
    """Work of one forward, in tokens after sharing: tokens + gathered keys / 8 + image tokens."""


@dataclass(frozen=True)
class BestOfNConfig:
    """True quality of the response that reward models select out of N, as N grows: a curve a model on one plot."""

    scores: tuple[str, ...] = ()
    """Scores of one model each, as `mmrm-fast score` writes them: FILE or NAME=FILE."""
    truth: Path = Path("candidates.jsonl")
    """The records with their true qualities, a list `truth` in the order of the responses; or rows `record,
    response_index, truth`."""
    n: str = "1,2,4,...,64"
    """Numbers of responses to choose from; `...` doubles."""
    output_dir: Path = Path("runs/best-of-n")
    """Folder of best-of-n.json, best-of-n.svg and best-of-n.png."""


@dataclass(frozen=True)
class DoctorConfig:
    """Print what was built here, what each op runs on and why, and what to do where something is missing."""


@dataclass(frozen=True)
class StudyConfig:
    """Train standard and robust on every shapes environment and test each on all of them."""

    output_dir: Path = Path("runs/study")
    """Folder of all runs and of the table."""
    seeds: int = 1
    """Trainings of each method on each environment."""
    quick: bool = False
    """One seed; the default of `--seeds`, said aloud."""
    jobs: int = 2
    """Trainings at a time, with the CPU threads divided among them."""
