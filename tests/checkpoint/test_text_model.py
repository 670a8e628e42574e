"""Plain text models as reward models: equal to transformers' own classifiers, come in and go out as those do."""

import httpx
import pytest
import torch
from ranks import run_ranks
from reward_server import data_url, picture, running
from runs import losses
from safetensors.torch import load_file, save_file
from shared_fixtures import CHATML, exact
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from mmrm_fast.checkpoint.export import convert_folder, export_original, export_vllm, summary
from mmrm_fast.checkpoint.folder import CheckpointFolder, rewrite_json, save_checkpoint, save_tokenizer
from mmrm_fast.cli import main
from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.files import read_json
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import run, train
from mmrm_fast.train.loss import preference_loss

CLOSED = CHATML.replace("<|im_end|>\n{%", "<|im_end|>{%")  # it ends in the end token
RECORDS = [
    {"prompt": "Where is it? " * 12, "chosen": "on the left", "rejected": "on the right"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
     "chosen": "so", "rejected": ""},
    {"prompt": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"},
                {"role": "user", "content": "And?"}], "chosen": "I think so.", "rejected": "I think not."},
]  # fmt: skip


@pytest.fixture
def write_text(tmp_path, tokenizer):
    """Write a random text model as transformers saves it, by default a classifier."""

    def write(kind="qwen2", auto=AutoModelForSequenceClassification, *, template=CHATML, pad="<pad>", **settings):
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48,
            pad_token_id=pad and tokenizer.convert_tokens_to_ids(pad), **{"num_labels": 1, **settings},
        )  # fmt: skip
        torch.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder)
        save_tokenizer(folder, tokenizer)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return write


def padded(folder, reference, records):
    """Rewards of (chosen, rejected) of each record as TRL computes them: one right-padded batch of rendered texts."""
    tokenizer = CheckpointFolder(folder).tokenizer
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(reference.config.pad_token_id)
    turns = [
        [{"role": "user", "content": record["prompt"]}] if isinstance(record["prompt"], str) else record["prompt"]
        for record in records
    ]
    texts = [
        tokenizer.apply_chat_template([*own, {"role": "assistant", "content": record[side]}], tokenize=False)
        for own, record in zip(turns, records, strict=True)
        for side in ("chosen", "rejected")
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.view(-1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("kind", "template", "pad"),
    [
        ("qwen2", CHATML, "<pad>"),
        ("llama", CLOSED, "<|im_end|>"),
        ("mistral", CLOSED, "<pad>"),
        ("qwen3", CHATML, None),
    ],
)
def test_rewards_loss_and_gradients_are_those_of_transformers_classifier(write_text, kind, template, pad, dtype, bound):
    """Read at the last token that is not padding: before the end token where that is the padding too."""
    folder = write_text(kind, template=template, pad=pad)
    checkpoint = CheckpointFolder(folder).load(dtype=dtype)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    if pad is None:
        reference.config.pad_token_id = checkpoint.tokenizer.pad_token_id  # as TRL sets it
    for model in (checkpoint.model.model, reference) if dtype == torch.float64 else ():
        exact(model)
    rows = padded(folder, reference, RECORDS)
    (-torch.nn.functional.logsigmoid(rows[:, 0] - rows[:, 1]).mean()).backward()

    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, pairs="all")
    groups = [parse_group(record, source="test", record=i) for i, record in enumerate(RECORDS)]
    batch = pack_items(preparer, groups, preparer.whole).batch
    rewards = checkpoint.model(batch.main, batch.tiles)
    (preference_loss(rewards, None, batch).main / len(groups)).backward()

    torch.testing.assert_close(rewards.view(-1, 2), rows, rtol=bound, atol=bound * 1e-2)
    found = {name: p.grad for name, p in checkpoint.model.named_parameters()}
    wanted = {("" if name == "score.weight" else "model.") + name.replace("model.", "language_model.", 1): p.grad
              for name, p in reference.named_parameters()}  # fmt: skip
    assert found.keys() == wanted.keys()
    embedding = "model.language_model.embed_tokens.weight"
    if pad == "<|im_end|>":  # transformers gives padding's embedding no gradient, in the middle of a text too
        row = checkpoint.tokenizer.convert_tokens_to_ids(pad)
        found[embedding][row] = 0
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= bound * wanted[name].norm() + bound * 1e-3, name


def test_a_classifier_comes_in_and_goes_out_bit_for_bit(write_text, tmp_path):
    folder = write_text()
    save_checkpoint(tmp_path / "final", CheckpointFolder(folder).load(max_length=9000))
    export_vllm(tmp_path / "final", tmp_path / "vllm")
    expected = load_file(folder / "model.safetensors")
    for path in (tmp_path / "final", tmp_path / "vllm"):
        state = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        assert CheckpointFolder(path).load().max_length == 9000
    assert summary(tmp_path / "final")["layout"].endswith("qwen2, a text model")
    assert "last token" in summary(tmp_path / "final")["reward model"]


def test_a_causal_language_model_gets_a_score_and_is_trained_to_a_classifier(write_text, write_jsonl, tmp_path):
    folder, data = write_text(auto=AutoModelForCausalLM, pad=None), write_jsonl(RECORDS * 3)
    config = config_of(folder, data, tmp_path / "run", duplicates="keep")
    final = train(config) / "final"
    reference = AutoModelForSequenceClassification.from_pretrained(final)
    rows = Scorer.from_pretrained(final, "cpu").score(
        [{"prompt": record["prompt"], "responses": [record["chosen"], record["rejected"]]} for record in RECORDS]
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(rows), padded(final, reference, RECORDS), rtol=1e-4, atol=1e-5)


def config_of(folder, data, output_dir, **options):
    defaults = {"lr": 1e-3, "pairs_per_step": 2, "report_to": (), "epochs": 1, "check_records": 0}
    return with_options(
        TrainConfig(), model=folder, data=(str(data),), output_dir=output_dir, **{**defaults, **options}
    )


@pytest.mark.parametrize("options", [{"llm_lora": True}, {"robust": True, "proxy_model": "ngrams"}])
def test_a_text_model_trains_in_every_form_and_resumes_to_the_same_losses(write_text, write_jsonl, tmp_path, options):
    folder = write_text()
    data = write_jsonl([{**record, "prompt": f"{i}?"} for i in range(12) for record in RECORDS[:1]])
    config = config_of(folder, data, tmp_path / "run", save_every=3, **options)
    train(config)
    before, weights = losses(tmp_path / "run"), load_file(tmp_path / "run" / "final" / "model.safetensors")
    train(with_options(config, resume=str(min((tmp_path / "run" / "checkpoints").iterdir()))))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert len(before) == 6 and losses(tmp_path / "run") == before
    assert weights.keys() == again.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_text_model_trains_beside_a_probe_on_two_ranks_to_the_losses_of_one(write_text, write_jsonl, tmp_path):
    data = write_jsonl([{**record, "prompt": f"{i}?"} for i in range(6) for record in RECORDS[:1]])
    probe = {"robust": True, "proxy_model": "probe"}
    one, two = (config_of(write_text(), data, tmp_path / name, **probe) for name in ("one", "two"))
    train(one)
    assert run_ranks(train, two) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_text_model_judges_a_benchmark_and_its_states_tell_an_audit_what_text_tells(
    write_text, write_jsonl, tmp_path
):
    folder, rows = (
        write_text(),
        [{"id": "1", "prompt": "Why?", "chosen": ["so"], "rejected": ["", "no"], "subset": "Math"}],
    )
    bench = {
        "bench": "rewardbench-2",
        "data": write_jsonl(rows),
        "model": folder,
        "output-dir": tmp_path,
        "ties": "wrong",
    }
    assert main(["evaluate", *(f"--{name}={value}" for name, value in bench.items())]) == 0
    found = read_json(tmp_path / "results.json")
    assert found["metrics"]["sections"].keys() == {"Math, first", "score"} and len(found["items"]) == 2
    data = write_jsonl([{**record, "prompt": f"{i}?"} for i in range(8) for record in RECORDS[:1]], "audited.jsonl")
    assert main(["audit", str(data), f"--model={folder}", f"--output-dir={tmp_path}"]) == 0
    assert "probe_matrix" in read_json(tmp_path / "audit.json")


def test_the_dry_run_counts_a_text_model(write_text, write_jsonl, tmp_path, capsys):
    run(config_of(write_text(), write_jsonl(RECORDS), tmp_path / "run", dry_run=True, gpu_memory=80.0))
    printed = capsys.readouterr().out
    assert "fits" in printed and "FLOPs" in printed and "0 tiles" in printed


def test_a_server_of_a_text_model_refuses_pictures_and_scores_the_rest(write_text):
    scorer = Scorer.from_pretrained(write_text(), "cpu")
    image = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    shown = [{"role": "user", "content": [image, {"type": "text", "text": "Why?"}]}]
    answer = {"role": "assistant", "content": "so"}
    with running(scorer) as url:
        good = httpx.post(f"{url}/classify", json={"messages": [*RECORDS[1]["prompt"], answer]})
        bad = httpx.post(f"{url}/classify", json={"messages": [*shown, answer]})
    expected = scorer.score([{"prompt": RECORDS[1]["prompt"], "responses": ["so"]}])[0]
    assert good.json()["data"][0]["probs"] == pytest.approx(expected, abs=1e-5)
    assert bad.status_code == 422 and "reads text alone" in bad.text


def test_records_with_pictures_are_refused_by_name(write_text, write_jsonl, pictures, tmp_path):
    data = write_jsonl([*RECORDS, {**RECORDS[0], "img_path": pictures["photo"]}])
    with pytest.raises(ValueError, match=r"records.jsonl:4: img_path: the model reads text alone"):
        train(config_of(write_text(), data, tmp_path / "run", check_records=10))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        ({"num_labels": 2}, "num_labels is 2; expected 1"),
        ({"auto": AutoModelForTokenClassification}, "architectures is .*Qwen2ForTokenClassification"),
        ({"kind": "gemma"}, "GemmaModel"),
    ],
)
def test_a_head_or_a_model_that_is_not_known_is_refused_by_name(write_text, write, reason):
    with pytest.raises(ValueError, match=reason):
        CheckpointFolder(write_text(**write)).load()


def test_other_model_types_and_what_a_text_model_has_not_are_refused_by_name(write_text, write_jsonl, tmp_path):
    folder, data = write_text(), write_jsonl(RECORDS)
    config = config_of(folder, data, tmp_path / "run")
    calls = {
        "no original": lambda: export_original(folder, tmp_path / "out"),
        "no other layout": lambda: convert_folder(folder, tmp_path / "out"),
        "--max-tiles 2: the model reads text alone": lambda: CheckpointFolder(folder).load(max_tiles=2),
        "--compat reference: the model reads": lambda: train(with_options(config, compat="reference")),
        "--vision-lora True: the model reads": lambda: train(with_options(config, vision_lora=True)),
        "--inputs text: the model reads": lambda: train(with_options(config, inputs="text")),
        "--proxy-model ngrams": lambda: train(with_options(config, robust=True)),
        "no chat template": lambda: unwritten(write_text()),
        "model_type is 'qwen2_vl'": lambda: changed(folder, "config.json", model_type="qwen2_vl"),
        r"architectures is \['Qwen2Model', 'X'\]; expected \[Qwen2ForSequenceClassification\] or": lambda: changed(
            write_text(), "config.json", architectures=["Qwen2Model", "X"]
        ),
        "architectures is Qwen2Model; expected": lambda: changed(
            write_text(), "config.json", architectures="Qwen2Model"
        ),
        "value_head.safetensors holds the reward head; put its v_head": lambda: with_value_head(
            write_text(auto=AutoModelForCausalLM)
        ),
        "BertModel": lambda: changed(folder, "config.json", model_type="bert", architectures=["BertModel"]),
    }
    for reason, call in calls.items():
        with pytest.raises(ValueError, match=reason):
            call()


def with_value_head(folder):
    """As LLaMA-Factory saves a reward model."""
    save_file(
        {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
        folder / "value_head.safetensors",
    )
    CheckpointFolder(folder).load()


def unwritten(folder):
    (folder / "chat_template.jinja").unlink()
    Scorer.from_pretrained(folder, "cpu")


def test_vllms_template_ends_where_the_reward_is_read_before_padding_too(write_text, tmp_path):
    folder = write_text(template=CLOSED, pad="<|im_end|>")
    export_vllm(folder, tmp_path / "vllm")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so"}]
    text = CheckpointFolder(tmp_path / "vllm").tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("assistant\nso")


def changed(folder, name, **settings):
    rewrite_json(folder / name, settings)
    CheckpointFolder(folder).load()
