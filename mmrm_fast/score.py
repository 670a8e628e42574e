"""Batch scoring: a JSONL of records through Ray actors, each a `Scorer`, to a JSONL of scores in input order."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ray
import torch
from ray.util import ActorPool
from tqdm import tqdm

from mmrm_fast.config import ScoreConfig
from mmrm_fast.records import RecordError, RecordFile, iter_groups, prompt_json
from mmrm_fast.scorer import Scored, Scorer
from mmrm_fast.weights import require_reward_model

RECORDS_PER_TASK = 64
CPUS_PER_ACTOR = 2
EXIT_SOME_FAILED = 3


class ScoringActor:
    """A process that reads its own records, so that neither text nor pixels pass through the driver."""

    def __init__(self, config: ScoreConfig, *, num_threads: int):
        torch.set_num_threads(num_threads)
        self.file = RecordFile(config.data, config.image_root)
        self.scorer = Scorer.from_pretrained(
            config.model,
            max_length=config.max_length,
            max_tiles=config.max_tiles,
            compat=config.compat,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
        )

    def score(self, records: range) -> list[Scored | RecordError]:
        """Score the records at these positions of the file; encoded images do not travel back."""
        results = self.scorer.score_groups(list(iter_groups(self.file, records)))
        return [replace(r, group=replace(r.group, images=())) if isinstance(r, Scored) else r for r in results]


def score(config: ScoreConfig) -> int:
    """Score every record of `config.data`; returns the exit status, 3 when any record failed.

    Failed records are listed in `<out>.errors.jsonl` and printed; every other record's responses are in `out`.
    """
    config = replace(config, model=config.model.resolve(), data=config.data.resolve())
    file = RecordFile(config.data, config.image_root)
    require_reward_model(config.model)
    if not config.out.parent.is_dir():
        raise ValueError(f"{config.out.parent}: no such folder to write scores into")
    errors: list[RecordError] = []
    unfinished = config.out.with_name(config.out.name + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as rows, tqdm(total=len(file), unit=" records", desc="scoring") as bar:
        for results in scored_chunks(config, len(file)):
            for result in results:
                if isinstance(result, Scored):
                    rows.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in score_rows(result))
                else:
                    errors.append(result)
            bar.update(len(results))
            bar.set_postfix(failed=len(errors))
    os.replace(unfinished, config.out)
    return report(config.out, len(file), errors)


def scored_chunks(config: ScoreConfig, num_records: int) -> Iterator[list[Scored | RecordError]]:
    """Results of the records in order, computed on a pool of actors."""
    ray.init(address=config.address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        pool = ActorPool(make_actors(config))
        chunks = [range(at, min(at + RECORDS_PER_TASK, num_records)) for at in range(0, num_records, RECORDS_PER_TASK)]
        yield from pool.map(lambda actor, records: actor.score.remote(records), chunks)
    except ray.exceptions.RayError as error:
        raise OSError(f"a scoring process failed: {error}") from None
    finally:
        ray.shutdown()


def make_actors(config: ScoreConfig) -> list:
    """The scoring processes: one a GPU, or one a two CPUs, unless the config says how many."""
    resources = ray.cluster_resources()
    gpus = config.gpus_per_actor if config.gpus_per_actor is not None else float(bool(resources.get("GPU")))
    slots = resources["GPU"] / gpus if gpus else resources["CPU"] / CPUS_PER_ACTOR
    count = config.actors or max(1, int(slots))
    threads = max(1, min(int(resources["CPU"] / count), CPUS_PER_ACTOR))
    cpus = threads if count * threads <= resources["CPU"] else 0  # more actors than CPUs, if the user wants it so
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=2, max_task_retries=2)(ScoringActor)
    return [actor.remote(config, num_threads=threads) for _ in range(count)]


def score_rows(scored: Scored) -> Iterator[dict]:
    """One row a response."""
    group = scored.group
    for index, response in enumerate(group.responses):
        yield {
            "id": group.id,
            "record": group.record,
            "response_index": index,
            "prompt": prompt_json(group.prompt),
            "img_path": group.img_path,
            "response": response,
            "score": scored.rewards[index],
            "truncated": scored.truncated[index],
        }


def report(out: Path, num_records: int, errors: list[RecordError]) -> int:
    """Write and print the failed records; the exit status."""
    listing = out.with_name(out.name + ".errors.jsonl")
    listing.unlink(missing_ok=True)
    print(f"{num_records - len(errors)} of {num_records} records scored: {out}")
    if not errors:
        return 0
    with open(listing, "w") as file:
        file.writelines(json.dumps({"source": e.source, "field": e.field, "reason": e.reason}) + "\n" for e in errors)
    print(f"{len(errors)} records failed, listed in {listing}:")
    print("\n".join(map(str, errors[:50])))
    return EXIT_SOME_FAILED
