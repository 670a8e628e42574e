"""What the reward clients of OpenRLHF and verl get for given cases; `check_clients.py` runs it in their environment.

Prints {client: {case: reward, or why there is none}} as the last line.
"""

import asyncio
import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import openrlhf.utils.agent as openrlhf_agent
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoProcessor, AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

FOREIGN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"  # another model's template


class Engine:
    """A policy that says one response."""

    def __init__(self, tokenizer, response: str):
        self.ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    async def generate(self, prompt_ids, params, multi_modal_data=None):
        output = SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def shown(case: dict) -> list[dict]:
    """The messages with parts for the pictures, before the last turn's text."""
    *before, last = case["messages"]
    parts = [{"type": "image"} for _ in case["images"]]
    text = [{"type": "text", "text": last["content"]}]
    return [*before, {**last, "content": [*parts, *text] if parts else last["content"]}]


async def openrlhf(case: dict, endpoint: str, model: str) -> float | str:
    """The reward that OpenRLHF's rollout ends with."""
    tokenizer, log = AutoTokenizer.from_pretrained(model), Kept()
    processor = AutoProcessor.from_pretrained(model) if case["images"] else tokenizer
    openrlhf_agent.logger.addHandler(log)
    prompt = tokenizer.apply_chat_template(shown(case), tokenize=False, add_generation_prompt=True)
    if case["foreign"]:
        prompt = f"[INST] {case['messages'][-1]['content']} [/INST]"
    longest = 24 if case["cut"] else 100_000
    label = case["label"] or (json.dumps({"images": case["labelled"]}) if case["labelled"] else "label")
    params = SimpleNamespace(max_tokens=8, logprobs=None)
    executor = openrlhf_agent.SingleTurnAgentExecutor(endpoint)
    engine = Engine(tokenizer, case["response"])
    output = await executor.execute(prompt, label, params, longest, processor, engine, case["images"] or None)
    openrlhf_agent.logger.removeHandler(log)
    reward = output["reward"]
    return first(reward) if reward is not None else " | ".join(dict.fromkeys(log.lines))


def first(reward) -> float:
    """A list's or tensor's only value."""
    return float(torch.as_tensor(reward).flatten()[0])


def verl_config(model: str, custom: str | None, engine: str):
    """What the reward loop reads of verl's config."""
    return OmegaConf.create({
        "actor_rollout_ref": {"model": {"path": model, "tokenizer_path": model}},
        "reward": {
            "custom_reward_function": {"path": custom, "name": "compute_score", "reward_kwargs": {}},
            "reward_model": {"enable": custom is None, "model_path": model, "rollout": {"name": engine}},
            "reward_manager": {"source": "register", "name": "naive"},
            "num_workers": 1,
        },
        "data": {},
    })  # fmt: skip


def verl_row(case: dict, tokenizer) -> DataProto:
    """One rollout."""
    ids = torch.tensor([tokenizer(case["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]])
    extra = {} if case["foreign"] else {"messages": shown(case), "images": case["labelled"]}
    rows = {
        "raw_prompt": shown(case), "data_source": "peers", "reward_model": {"ground_truth": ""}, "extra_info": extra,
    }  # fmt: skip
    batch = TensorDict({"responses": ids, "attention_mask": torch.ones_like(ids)}, batch_size=1)
    arrays = {}
    for name, value in rows.items():
        arrays[name] = np.empty(1, object)
        arrays[name][0] = value
    return DataProto(batch=batch, non_tensor_batch=arrays)


async def verl(case: dict, worker: RewardLoopWorker) -> float | str:
    """The reward of verl's own loop, or the exception that ends the training."""
    try:
        (result,) = await worker.compute_score_batch(verl_row(case, worker.input_tokenizer))
        return float(result["reward_score"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def main(given: dict) -> dict:
    """All outcomes."""
    model, url, examples = given["model"], given["url"], given["examples"]
    outcomes: dict[str, dict] = {}
    for name, endpoint in (("HTTP", f"{url}/get_reward"), ("file", f"{examples}/openrlhf_reward.py")):
        own = outcomes[f"OpenRLHF, {name}"] = {}
        for case, fields in given["cases"].items():
            own[case] = await openrlhf(fields, endpoint, model)
    kinds = {"/classify": (None, "vllm"), "/v1/embeddings": (None, "sglang")}
    kinds["file"] = (f"{examples}/verl_reward.py", "vllm")
    for name, (custom, engine) in kinds.items():
        address = None if custom else url.removeprefix("http://")
        own = outcomes[f"verl, {name}"] = {}
        for case, fields in given["cases"].items():
            if fields["cut"]:  # which verl does before, and drops such rows or fails
                continue
            worker = RewardLoopWorker(verl_config(model, custom, engine), address)
            if fields["foreign"] and not custom:
                worker.reward_model_tokenizer.chat_template = FOREIGN
            own[case] = await verl(fields, worker)
    return outcomes


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
