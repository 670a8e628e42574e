"""What the commands take, a dataclass each; the docstring under a field is its `--help`.

Options of a training are in groups, so that a function says by the group it takes what can change it. Flags and files
know no groups, see `config_file.options`. In a docstring every line is a sentence: `--help` keeps its line breaks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How records are read."""

    image_root: tuple[str, ...] = ()
    """Folder that relative image paths start from; FILE=FOLDER or NAME=FOLDER for one file or test set.
    Default: the file's own; one for all files must not hold another picture under a name that stands there too."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of records, messages or parts to drop though they may change what is said, which else is an error."""


@dataclass(frozen=True)
class RecordsConfig(ReadConfig):
    """What is trained and tested on."""

    data: tuple[str, ...] = ()
    """JSONL files of preferences, pairwise or K-wise; FILE:WEIGHT for a mixture. Default: a shapes environment.
    Of a folder whose files are splits the training one is taken, for `--eval` the test one, else validation."""
    environment: Literal["opening", "length", "hedging", "prompt", "order", "xor", "mixture"] = "opening"
    """Shapes environment to train on when there is no `--data`; the first three are its o.o.d. test sets."""
    pairs: str = "all"
    """Pairs of a K-wise record: `all` in one group, `expand`ed to a sample each, or a number of them at random."""
    max_pairs: int = 2048
    """Most pairs of a record, in training and evaluation: of more so many are drawn, and the others counted."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Records with the prompt, images and pairs of one before: left out, for which all are looked at first, or kept."""
    eval: tuple[str, ...] = ()
    """Test sets from the training distribution, NAME=FILE."""
    eval_ood: tuple[str, ...] = ()
    """Test sets from other distributions, NAME=FILE; the o.o.d. accuracy is their mean."""
    eval_fraction: float | None = None
    """Share of the training data held out as the test set `held-out`, by a hash of image and prompt."""
    overlong: Literal["skip", "truncate", "error"] = "skip"
    """A response that does not fit: drop its pairs and count them, cut it, or stop."""
    check_records: int = 100_000
    """Records checked before anything runs, with their images where a file has under 10,000; 0: none."""
    skip_bad: bool = False
    """Skip records that cannot be used, listed in skipped.jsonl, instead of stopping."""


@dataclass(frozen=True)
class BatchConfig:
    """How records become batches."""

    max_length: int | None = None
    """Tokens of one prompt with its images plus one response. Default: what the checkpoint says."""
    max_tiles: int | None = None
    """Most tiles an image is cut into, without the thumbnail. Default: what the checkpoint says."""
    compat: Literal["reference"] | None = None
    """Prepare texts and pictures exactly as the reference implementation does; see README for what differs."""
    tokens_per_micro_batch: int = 16_384
    """Work of one forward, in tokens after sharing: tokens + gathered keys / 8 + image tokens."""


@dataclass(frozen=True)
class TrainBatchConfig(BatchConfig):
    """How records become batches, and how much of them is a step."""

    min_tiles: int | None = None
    """Least tiles an image is cut into. Default: what the checkpoint says."""
    thumbnail: bool | None = None
    """Whether the whole image follows its tiles as one more. Default: what the checkpoint says."""
    pad2square: bool | None = None
    """With `--max-tiles 1`: pad an image to a square instead of stretching it. Default: what the checkpoint says."""
    normalize_type: Literal["imagenet", "clip", "siglip"] | None = None
    """Mean and deviation that pixels are normalised by. Default: what the checkpoint says."""
    inputs: Literal["all", "text", "image"] = "all"
    """What the model sees, for ablations: all, a white tile in place of every image, or images without the question."""
    tokens_per_batch: int | None = None
    """Work of one step over all ranks, in those units. Default: 131,072, about 128 pairs; 6,144 for the tiny one."""
    pairs_per_step: int | None = None
    """Pairs of one optimizer step over all ranks, instead of `--tokens-per-batch`."""


@dataclass(frozen=True)
class WeightsConfig:
    """What is trained."""

    model: Path | None = None
    """Local folder of an InternVL checkpoint, or of a text model for data without pictures. Default: the tiny one."""
    freeze_llm: bool = False
    """Do not train the language model."""
    freeze_backbone: bool = True
    """Do not train the vision tower."""
    freeze_mlp: bool = False
    """Do not train the projector."""
    llm_lora: bool = False
    """Train low-rank adapters of the language model's linear layers, of which experts are none, not its weights."""
    vision_lora: bool = False
    """Train low-rank adapters of the vision tower's linear layers."""
    lora_r: int = 64
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Scale of the adapters, times their rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters: noise that the responses of a group share."""


@dataclass(frozen=True)
class ProxyConfig:
    """The text-only proxy, whose failures say which pairs need the image."""

    robust: bool = False
    """Train a text-only proxy beside the model and up-weight the pairs on which it fails."""
    proxy_model: str = "full"
    """`full`: a copy of the model's language model; a folder: the (smaller) checkpoint there, of the same tokenizer.
    `lora`: a second adapter on the model's own frozen weights, with `--llm-lora`.
    `ngrams`: regressions on words and form, fitted before the first step; `probe`: on the model's states; `auto`: one.
    A JSONL file: margins computed before, such as the eval-NAME.jsonl of a robust run tested on its training file."""
    proxy_image: Literal["none", "white"] = "none"
    """What the proxy has in place of an image: nothing, or a white tile as in the reference implementation."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    sfc_mode: Literal["paper", "reference", "balanced"] = "paper"
    """Weight of a pair: L_t / (L + L_t), or the reference implementation's.
    `balanced`: one over the probability that the text-only proxy gives to the label, divided by its mean."""
    label_smoothing: float = 0.0
    """Share of the labels taken to be the wrong way round, 0 to 0.5; in the losses of both branches."""
    center_rewards: float = 0.0
    """Factor of (r_chosen + r_rejected)^2 in the loss of the model, which keeps rewards around zero."""
    router_aux_loss: float = 0.0
    """Factor of the load-balancing loss of a mixture of experts, a micro-batch at a time; Qwen3's own is 0.001."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How far, and by what steps."""

    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    lr: float | None = None
    """Peak learning rate. Default: 1e-5, 5e-4 for the tiny checkpoint."""
    warmup_ratio: float = 0.1
    """Share of the training in which the learning rate rises."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after it: half a cosine or a line to zero, or not at all."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    beta2: float = 0.98
    """AdamW second moment decay."""
    max_grad_norm: float = 1.0
    """Gradient norm that each branch is clipped to."""
    clip: Literal["branch", "joint"] = "branch"
    """Clip the gradients of model and proxy each by its own norm, or by their norm together."""
    max_bad_steps: int = 5
    """Steps with a loss or gradient that is not finite are skipped; so many in a row stop the run."""


@dataclass(frozen=True)
class MemoryConfig:
    """How a training fits on its GPUs; none of it changes what is computed but `--dtype`."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in: bfloat16 with a GPU, float32 without; trained weights and their sums are float32 always."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Recompute in the backward pass all but products and attention, or a whole block; `auto`: the least that fits."""
    compile: bool = False
    """torch.compile every block."""
    reshard_after_forward: bool = True
    """Free gathered weights after a block's forward pass; no keeps them for the backward pass."""
    replicas: int | None = None
    """Groups of ranks that each hold a whole sharded copy (HSDP). Default: as many as nodes, if that fits, else 1."""
    hold_gradients: bool | None = None
    """Add up a step's gradients on each rank, and over ranks once a step. Default: where there is room for them."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer in host memory."""
    dry_run: bool = False
    """Train nothing: print parameters, memory a GPU, tokens and FLOPs a step, and refuse what cannot fit."""
    num_gpus: int | None = None
    """GPUs that `--dry-run` counts with. Default: the processes that torchrun started."""
    gpu_memory: float | None = None
    """Memory of a GPU for `--dry-run`, in GiB. Default: that of the first GPU here."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run is, what it leaves and how it goes on."""

    config: str | None = None
    """YAML file of these options, the reference implementation's too or a preset; flags win over it."""
    output_dir: Path | None = None
    """Run folder. Default: runs/standard or runs/robust."""
    overwrite: bool = False
    """Replace the run that is in the run folder already."""
    resume: str | None = None
    """Go on from a checkpoint, RUN/checkpoints/step-N; `auto`: from the newest good one, or the start."""
    accept_changed_data: bool = False
    """Go on though the data are not those that the run began with, which else is an error."""
    save_every: int | None = None
    """Write a checkpoint to resume from every so many steps. On SIGTERM and SIGINT one is written in any case."""
    save_minutes: float = 30.0
    """Write one when the last is so many minutes old; 0 never."""
    keep: int = 2
    """Checkpoints to resume from that are kept, the newest ones."""
    eval_every: int | None = None
    """Evaluate every so many steps; always at the end."""
    best: str | None = None
    """Figure whose best weights are kept, such as iid.accuracy. Default: mean accuracy, of o.o.d. sets if there are."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""
    num_workers: int | None = None
    """Processes a rank that decode, tile and pack; 0: the training one. Default: 4 with a GPU, 0 without."""
    seed: int = 0
    """Seed of the score head and of the order of the records."""
    deterministic: bool = False
    """The same bits again on the same GPUs, more slowly; an operation that cannot stops the run by its name."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a reward model on preference pairs: standard, or shortcut-aware with `--robust`; by default on shapes.

    Most runs set --data --eval --eval-ood --image-root --model --robust --proxy-model --config --output-dir --resume.
    `--dry-run` says what a run takes, `mmrm-fast init` writes all options into a commented file."""

    records: tyro.conf.OmitArgPrefixes[RecordsConfig] = RecordsConfig()
    weights: tyro.conf.OmitArgPrefixes[WeightsConfig] = WeightsConfig()
    proxy: tyro.conf.OmitArgPrefixes[ProxyConfig] = ProxyConfig()
    loss: tyro.conf.OmitArgPrefixes[LossConfig] = LossConfig()
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = OptimizerConfig()
    batch: tyro.conf.OmitArgPrefixes[TrainBatchConfig] = TrainBatchConfig()
    memory: tyro.conf.OmitArgPrefixes[MemoryConfig] = MemoryConfig()
    run: tyro.conf.OmitArgPrefixes[RunConfig] = RunConfig()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A reward model, and how records become its batches."""

    model: Path = Path("runs/robust/final")
    """Folder of the reward model, such as runs/NAME/final."""
    batch: tyro.conf.OmitArgPrefixes[BatchConfig] = BatchConfig()


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(ModelConfig):
    """A reward model on Ray."""

    gpus_per_actor: float | None = None
    """GPUs of a copy of the model, over which its layers are placed where one does not hold it. Default: 1, if any."""
    address: str | None = None
    """Ray cluster to join. Default: start one on this machine."""


@dataclass(frozen=True)
class ScoreConfig(ReadConfig, ClusterConfig):
    """Score every response with a reward model, on Ray actors, in input order; started again, it goes on."""

    data: Path = Path("records.jsonl")
    """Records: a JSONL (.gz, .zst) or Parquet file, a folder or a glob; every response of any form is scored."""
    out: Path = Path("scores.jsonl")
    """Rows id, record, response_index, prompt, img_path, response, score, truncated: a .jsonl file or a folder."""
    overwrite: bool = False
    """Replace the file that is at `--out`, which else is an error."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the shards in a folder."""
    best_of: bool = False
    """Write only the best response of each record."""
    to_pairs: float | None = None
    """Write the best and the worst response of each record as chosen and rejected, where they are this far apart."""
    normalize: bool = False
    """Write (reward - mean) / std by the reward_stats.json beside the model."""
    allow_errors: bool = False
    """Exit with status 0 though records failed."""
    actors: Literal["auto"] | int = "auto"
    """Scoring processes; `auto`: as many as there are GPUs for, or one a two CPUs."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint, original or native, to a native transformers one, and compare a reward of both."""

    source: tyro.conf.Positional[Path]
    """Folder of the checkpoint: config.json, safetensors and the tokenizer's files."""
    target: tyro.conf.Positional[Path]
    """Folder to write."""
    check: bool = True
    """Load both and compare the rewards of a sample record (needs room for the weights in fp32)."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a reward model in the layout that other programs read."""

    source: tyro.conf.Positional[Path]
    """Folder of the reward model, such as runs/NAME/final."""
    target: tyro.conf.Positional[Path]
    """Folder to write."""
    format: Literal["vllm", "original"] = "vllm"
    """`vllm` for vLLM's and SGLang's sequence classification, `original` for the reference implementation."""


@dataclass(frozen=True)
class InspectConfig:
    """Say what a checkpoint folder holds: architecture, parameters, template, tiles, score head, proxy."""

    folder: tyro.conf.Positional[Path]
    """Folder of the checkpoint."""


@dataclass(frozen=True)
class ServeConfig(ClusterConfig):
    """Serve a reward model over HTTP, to this machine alone by default; images are data URLs, nothing is fetched."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in: give a `--token-file` then."""
    port: int = 8000
    """Port of the API and the page."""
    allowed_host: tuple[str, ...] = ()
    """Names, beside localhost and any address, that requests may have for this machine in their `Host`."""
    token_file: Path | None = None
    """File whose content requests must carry as `Authorization: Bearer`. Default: no token is asked for."""
    image_root: Path | None = None
    """Folder whose images requests may name by path. Default: images by data URL only."""
    image_index: Path | None = None
    """JSON lines of `id` and `images`: those that a label of `/get_reward` means which is such an id."""
    replicas: int = 1
    """Copies of the model to begin with."""
    max_replicas: int | None = None
    """Copies under load; they come and go between the two numbers. Default: as many as `--replicas`."""
    max_requests: int = 256
    """Requests of a copy that wait or are being scored, half of them of one address; the next is answered 429."""
    timeout: float = 60.0
    """Seconds that a request may take; then it is answered 504."""


@dataclass(frozen=True)
class DoctorConfig:
    """Print what was built here, what each op runs on and why, and what to do where something is missing."""

    gpu: bool = False
    """Check on the GPU, under torchrun on all: ops, rewards, training, against the CPU and one rank; measure speeds."""
    cpu: bool = False
    """The same on the CPU: the checks that need no GPU."""
    json: Path | None = None
    """File to write all of it to, for a bug report."""


@dataclass(frozen=True)
class StudyConfig:
    """Train every method on every environment and test it on all: accuracies in and out of distribution, SFD, tests."""

    env: tuple[str, ...] = ()
    """NAME=TRAIN,TEST: preference files as published; or names of shapes environments. Default: the first three."""
    methods: str = "standard,robust"
    """Of standard, robust, robust-X; X: reference, balanced, white, lora, ngrams, probe, with -balanced the last two.
    robust-lora takes --llm-lora among the options."""
    model: Path | None = None
    """Local folder of the checkpoint that trainings start from. Default: the tiny one."""
    options: str = ""
    """Further options of `mmrm-fast train` for every training: --options='--epochs 2 --max-tiles 6'."""
    processes: int = 1
    """Ranks of a training, such as the number of GPUs; over 1 they are started by torchrun."""
    best_of_n: bool = False
    """Also measure the true quality of what a method selects out of 1 to 64 responses of environments it never saw."""
    output_dir: Path = Path("runs/study")
    """Folder of study.json, study.html, study.csv, comparisons.csv and all runs, of which finished ones stand."""
    seeds: int = 1
    """Trainings of each method on each environment."""
    jobs: int = 2
    """Trainings at a time, with the CPU threads divided among them."""
