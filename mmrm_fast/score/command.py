"""Batch scoring on Ray: actors, each a `Scorer`, read their own records and write their own shards.

The driver hands out positions and gets counts back; no text and no pixels pass through it, and it imports no torch.
Not Ray Data: a chunk's shard and its note are written under the chunk's own number, so that a run that died anywhere
and is started again has every response once; and actors that read their own records move none between processes.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import ray
from tqdm import tqdm

from mmrm_fast.config import ScoreConfig
from mmrm_fast.config_file import options
from mmrm_fast.data.census import peek, told
from mmrm_fast.data.pictures import ImageRoots
from mmrm_fast.data.records import Group, RecordError, Records, iter_groups, parse_group
from mmrm_fast.data.splits import FAILURES
from mmrm_fast.data.types import prompt_json
from mmrm_fast.files import locked, read_json, write_json_lines
from mmrm_fast.score.cluster import gpus_each, ray_cluster, require_gpus
from mmrm_fast.score.pool import CHUNKS_AHEAD, Pool, score_alone
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.shards import PAIRS, SCORES, Shards, fingerprint
from mmrm_fast.tables import print_lines

if TYPE_CHECKING:
    from mmrm_fast.score.scorer import Scorer

CPUS_PER_ACTOR = 2
FATAL = "its process died twice, each time over this record alone"
EXIT_SOME_FAILED = 3
IDENTITY = ("max_length", "max_tiles", "compat", "best_of", "to_pairs", "normalize")  # what changes the rows


class ScoringActor:
    """One copy of the model. Two calls at a time: one reads, decodes and packs while the other is in the model."""

    def __init__(self, config: ScoreConfig, shards: Shards, *, num_threads: int):
        self.config, self.shards, self.num_threads = config, shards, num_threads
        self.records = open_records(config)
        self.reading = threading.Lock()
        self.scale, self.scorer = reward_scale(config), None

    def load(self) -> None:
        """Load the model, unless that was done. Raises `ValueError` where its folder holds no reward model."""
        import torch

        from mmrm_fast.score.scorer import Scorer

        torch.set_num_threads(self.num_threads)
        with self.reading:
            self.scorer = self.scorer or Scorer.from_pretrained(self.config.model, **options(self.config.batch))

    def score(self, chunk: int, poison: Sequence[int] = ()) -> Counter:
        """Score a chunk but its `poison` and write its shard; its counts. Raises what failed beside the records.

        They are of records, responses, failed records, `tokens` (prompts, images and responses, a prompt counted once)
        and `tokens_unshared` (as if every response were scored by itself).
        """
        self.load()
        positions = self.shards.records(chunk)
        fatal = {place: RecordError(self.records.source(place), "", FATAL) for place in poison}
        results = score_or_say_why(self.scorer, self.groups(positions, fatal))
        faults = [own for own in results if isinstance(own, Exception) and not isinstance(own, RecordError)]
        if faults and not any(isinstance(own, Scored) for own in results):
            raise faults[0]  # as after an error of the GPU: no record is to blame
        rows, errors, tally = [], [], Counter(records=len(positions))
        for position, result in zip(positions, results, strict=True):
            if isinstance(result, Scored):
                rows += rows_of(result, self.config, *self.scale)
                counts = {"tokens": result.num_tokens, "tokens_unshared": result.num_tokens_unshared}
                tally.update(counts, responses=len(result.rewards))
            else:
                errors.append(error_row(position, result))
        tally["failed"] = len(errors)
        self.shards.write(chunk, rows, {"tally": tally, "errors": errors})
        return tally

    def groups(self, positions: Sequence[int], fatal: dict[int, RecordError]) -> list[Group | RecordError]:
        """The groups at some positions; the fatal ones are not read."""
        with self.reading:
            read = iter_groups(self.records, [place for place in positions if place not in fatal])
            return [fatal[place] if place in fatal else next(read) for place in positions]

    def probe(self, positions: Sequence[int]) -> bool:
        """Score some records, or a plain text where they are none, for whether this process lives to say True."""
        self.load()
        plain = parse_group({"prompt": "What?", "responses": ["This."]}, source="a probe")
        score_or_say_why(self.scorer, self.groups(positions, {}) or [plain])
        return True


def score_or_say_why(scorer: "Scorer", groups: Sequence[Group | RecordError]) -> list[Scored | Exception]:
    """Score groups; where that fails as a whole, each by itself, so that only the one at fault is lost."""
    try:
        return scorer.score_groups(groups)
    except Exception as error:
        if len(groups) == 1:
            return [error]
        return [result for group in groups for result in score_or_say_why(scorer, [group])]


def error_row(position: int, error: Exception) -> dict:
    place = {name: getattr(error, name, None) for name in ("source", "field")}
    return {"record": position, **place, "reason": getattr(error, "reason", str(error)), "error": type(error).__name__}


def reward_scale(config: ScoreConfig) -> tuple[float, float]:
    """(mean, standard deviation) that rewards are normalised by."""
    if not config.normalize:
        return 0.0, 1.0
    path = config.model / "reward_stats.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; training writes it, with test sets, for --normalize")
    stats = read_json(path)
    if not stats.get("std"):
        raise ValueError(f"{path}: needs a `mean` and a positive `std`")
    return stats["mean"], stats["std"]


def rows_of(scored: Scored, config: ScoreConfig, mean: float = 0.0, std: float = 1.0) -> list[dict]:
    """A record's output: a row a response, its best response, or its best and worst as a pair."""
    group = scored.group
    shared, written, said = {"id": group.id, "record": group.record}, group.images_written, group.response_json
    prompt, tools = prompt_json(group.prompt), {"tools": [*map(json.loads, group.tools)]} if group.tools else {}
    scores = [(reward - mean) / std for reward in scored.rewards]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if config.to_pairs is not None:
        best, worst = order[0], order[-1]
        margin = scores[best] - scores[worst]
        if best == worst or margin < config.to_pairs:
            return []
        pair = {"chosen": said(best), "rejected": said(worst), "reward_margin": margin}
        others = written(worst)  # null would be those of the chosen response
        if group.seen:
            pair["rejected_images"] = others if isinstance(others, list) else [others] if others else []
        return [{**shared, "prompt": prompt, "img_path": written(best), **pair, **tools}]
    return [
        {
            **shared, "response_index": i, "prompt": prompt, "img_path": written(i), "response": said(i),
            "score": scores[i], "truncated": scored.truncated[i], **tools,
        }
        for i in (order[:1] if config.best_of else range(len(scores)))
    ]  # fmt: skip


def score(config: ScoreConfig) -> int:
    """Score every record of `config.data`; returns the exit status, 3 when any record failed.

    Started again after an interruption, it goes on where it stopped.
    """
    config = replace(
        config,
        model=config.model.resolve(),
        data=config.data.absolute(),
        out=config.out.absolute(),
        image_root=ImageRoots.parse(config.image_root).options(),
    )
    if config.best_of and config.to_pairs is not None:
        raise ValueError("--best-of and --to-pairs write different rows; choose one")
    if config.actors != "auto" and config.actors < 1:
        raise ValueError(f"--actors must be auto or at least 1, got {config.actors}")
    if not (config.model / "config.json").is_file():
        raise ValueError(f"{config.model}: no config.json; expected a checkpoint folder")
    reward_scale(config)
    if not config.out.parent.is_dir():
        raise ValueError(f"{config.out.parent}: no such folder to write scores into")
    records = open_records(config)
    if config.out.resolve() in [source.path.resolve() for source in records.files]:
        raise ValueError(f"{config.out}: is one of the files to be scored; choose another --out")
    shards = shards_of(config, records)
    require_free(config, shards)
    with locked(shards.folder):
        print_lines(shards.open(identity(config, records, shards)))
        print_lines(told(records, peek(records)))
        tally = run(config, shards)
        errors = [error for note in shards.notes() for error in note["errors"]]
        return finish(config, shards, tally, errors)


def open_records(config: ScoreConfig) -> Records:
    roots = ImageRoots.parse(config.image_root)
    records = Records(config.data, image_root=roots, ignored=config.ignore_fields)
    roots.refuse_unused(records.names)
    return records


def shards_of(config: ScoreConfig, records: Records) -> Shards:
    """The run's shards: in the folder `out`, or beside the file `out` until they are joined."""
    single = config.out.suffix == ".jsonl"
    if single and config.format == "parquet":
        raise ValueError(f"--format parquet writes a folder of shards; {config.out} looks like a file")
    folder = config.out.with_name(config.out.name + ".parts") if single else config.out
    return Shards(
        folder, "jsonl" if single else config.format, len(records), SCORES if config.to_pairs is None else PAIRS
    )


def require_free(config: ScoreConfig, shards: Shards) -> None:
    """Raise `ValueError` where the output would take the place of a file, unless it may, or did so before a kill."""
    if config.out == shards.folder or not config.out.exists():
        return
    if config.out.is_dir():
        raise ValueError(f"{config.out}: a folder; scores in a folder have a name that does not end in .jsonl")
    if not config.overwrite and not shards.done():
        raise ValueError(f"{config.out}: is there already: --overwrite replaces it, or choose another --out")


def identity(config: ScoreConfig, records: Records, shards: Shards) -> dict:
    """What must be the same where a run goes on."""
    weights = sorted(path for path in config.model.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    return {
        "data": fingerprint(source.path for source in records.files),
        "image root": list(config.image_root),
        "model": fingerprint(weights, sampled=True),
        "records": len(records),
        "options": {name: options(config)[name] for name in IDENTITY},
        "ignored fields": sorted(config.ignore_fields),
        "format": shards.kind,
    }


def run(config: ScoreConfig, shards: Shards) -> Counter:
    """Score the chunks that are not done; the counts of all."""
    tally, todo = Counter(), shards.todo()
    for note in shards.notes():
        tally.update(note["tally"])
    if not todo:
        return tally
    started, before = time.monotonic(), tally["responses"]
    with tqdm(total=shards.num_records, initial=tally["records"], unit=" records", desc="scoring") as bar:
        for done in scored_chunks(config, shards, todo):
            tally.update(done)
            rate = (tally["responses"] - before) / (time.monotonic() - started)
            bar.set_postfix_str(f"{rate:.0f} responses/s, shared {sharing(tally):.1f}x, failed {tally['failed']}")
            bar.update(done["records"])
    return tally


def sharing(tally: Counter) -> float:
    """Tokens of per-response scoring over tokens that went through the model."""
    return tally["tokens_unshared"] / max(tally["tokens"], 1)


def scored_chunks(config: ScoreConfig, shards: Shards, chunks: Sequence[int]) -> Iterator[Counter]:
    """The counts of chunks as they are done, on a pool of actors; of those over which one died, later and alone."""
    with ray_cluster(config.address):
        waiting, suspects = deque(chunks), deque()
        try:
            pool = Pool(actor_starts(config, shards, len(chunks)))
            while waiting or suspects:
                yield from pool.together(waiting, suspects)
                while suspects:
                    chunk = suspects.popleft()
                    yield score_alone(pool.ask, chunk, shards.records(chunk))
        except (ray.exceptions.RayError, OSError) as error:
            if isinstance(cause := getattr(error, "cause", None), ValueError):  # as of a folder that holds no model
                raise cause from None
            raise OSError(f"a scoring process failed; what is done is kept, start again to go on: {error}") from None


def actor_starts(config: ScoreConfig, shards: Shards, num_chunks: int) -> list[Callable]:
    """What starts each of the scoring processes: as many as there are GPUs for, or one a two CPUs, if not told.

    Raises `ValueError` where the cluster lacks GPUs for them.
    """
    resources = ray.cluster_resources()
    gpus = gpus_each(config.gpus_per_actor)
    slots = resources.get("GPU", 0) / gpus if gpus else resources["CPU"] / CPUS_PER_ACTOR
    count = max(1, int(slots)) if config.actors == "auto" else config.actors
    require_gpus(count, gpus, "--actors")
    count = min(count, num_chunks)
    threads = max(1, min(int(resources["CPU"] / count), CPUS_PER_ACTOR))
    cpus = threads if count * threads <= resources["CPU"] else 0  # more actors than CPUs, if the user wants it so
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=CHUNKS_AHEAD)(ScoringActor)
    return [partial(actor.remote, config, shards, num_threads=threads)] * count


def finish(config: ScoreConfig, shards: Shards, tally: Counter, errors: list[dict]) -> int:
    """Join what is to be joined, list the failed records, print the summary; the exit status."""
    listing = config.out / FAILURES
    if config.out != shards.folder:
        listing = config.out.with_name(f"{config.out.name}.{FAILURES}")
    listing.unlink(missing_ok=True)
    if errors:
        write_json_lines(listing, errors)
    if config.out != shards.folder:
        shards.join(config.out)
    print(f"{tally['records'] - tally['failed']} of {tally['records']} records scored: {config.out}")
    print(f"{tally['responses']} responses; {sharing(tally):.1f} times the tokens if each were scored by itself")
    if not errors:
        return 0
    print(f"{len(errors)} records failed, listed in {listing}:")
    names = ("source", "field", "reason")
    print_lines(": ".join(str(error[name]) for name in names if error[name]) for error in errors[:50])
    return 0 if config.allow_errors else EXIT_SOME_FAILED
