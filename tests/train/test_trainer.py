"""Training as a user runs it: what a run writes, what it refuses, and that ranks and budgets do not change it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import losses, margins, mixed_records, read
from safetensors.torch import load_file

from mmrm_fast.cli import main
from mmrm_fast.config_file import with_options
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.command import train
from mmrm_fast.train.loss import COUNTS, SUMS, StepTotals
from mmrm_fast.train.step import lr_factor


def test_a_run_leaves_metrics_evaluation_and_a_reward_model(make_config, capsys):
    folder = train(make_config("run", robust=True, epochs=2))
    rows = read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum(row["records"] for row in rows) == 22
    assert all(row["tokens"] < row["tokens_unshared"] for row in rows)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["small"]) >= {"kind", "pairs", "accuracy", "proxy_accuracy", "sfd"}
    assert results["small"]["pairs"] == 3 and results["one"]["pairs"] == 1
    names = {path.name for path in (folder / "final").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.split()[:3] == ["python", "scripts/score.py", "--model"] and str(folder / "final") in last_line


def saved_margins(folder, records):
    """What a saved model's scores of pairwise records come to."""
    records = [{**record, "responses": [record["chosen"], record["rejected"]]} for record in records]
    scored = [{key: record[key] for key in ("prompt", "img_path", "responses")} for record in records]
    return [chosen - rejected for chosen, rejected in Scorer.from_pretrained(folder, device="cpu").score(scored)]


def test_scores_of_the_saved_model_are_the_rewards_of_the_last_evaluation(make_config, pictures):
    folder = train(make_config("run", robust=True))
    assert saved_margins(folder / "final", mixed_records(pictures)[:3]) == pytest.approx(margins(folder), abs=1e-5)


def test_two_ranks_equal_one(make_config):
    options = {"robust": True, "epochs": 2, "eval_every": 2}
    one, two = train(make_config("one", **options)), make_config("two", **options)
    assert run_ranks(train, two) == [0, 0]
    assert [row["step"] for row in read(one / "evaluations.jsonl")][:2] == [2, 4]
    assert losses(two.run.output_dir) == pytest.approx(losses(one), abs=1e-4)
    assert margins(two.run.output_dir) == pytest.approx(margins(one), abs=1e-3)
    assert margins(two.run.output_dir, "one") == pytest.approx(margins(one, "one"), abs=1e-3)
    saved, whole = (load_file(folder / "final" / "model.safetensors") for folder in (two.run.output_dir, one))
    torch.testing.assert_close(saved, whole, atol=1e-3, rtol=1e-3)


def test_two_ranks_equal_one_where_they_have_nothing_in_common(make_config, write_jsonl, pictures):
    """Steps of two records, one with a picture and one without; the last of one record: a rank has none."""
    picture, text = (
        {"prompt": "What?", "img_path": path, "chosen": "a", "rejected": "b"} for path in ("tall.png", None)
    )
    data = write_jsonl([{**record, "chosen": f"answer {i}"} for i in range(2) for record in (picture, text)] + [text])
    options = {"robust": True, "data": (str(data),), "tokens_per_batch": 120, "seed": 1}
    one, two = train(make_config("one", **options)), make_config("two", **options)
    assert run_ranks(train, two) == [0, 0]
    assert [row["records"] for row in read(one / "metrics.jsonl")][-1] == 1
    assert losses(two.run.output_dir) == pytest.approx(losses(one), abs=1e-4)
    assert margins(two.run.output_dir) == pytest.approx(margins(one), abs=1e-3)


@pytest.mark.parametrize("mode", ["reference", "balanced"])
def test_micro_batches_do_not_change_the_training(make_config, mode):
    whole = train(make_config("whole", robust=True, sfc_mode=mode, tokens_per_micro_batch=400))
    parts = train(make_config("parts", robust=True, sfc_mode=mode, tokens_per_micro_batch=80))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_a_fraction_of_the_data_is_held_out_and_tested_on(make_config):
    folder = train(make_config("split", eval_fraction=0.4, eval=(), tokens_per_batch=100))
    results = json.loads((folder / "results.json").read_text())
    trained = sum(row["pairs"] for row in read(folder / "metrics.jsonl"))
    assert list(results) == ["held-out"] and results["held-out"]["kind"] == "iid"
    assert trained + results["held-out"]["pairs"] == 17 and trained < 17


def test_the_best_weights_are_those_of_the_best_mean_accuracy_out_of_distribution(make_config, write_jsonl, pictures):
    """The labels of the o.o.d. sets are those of the training set turned round, so training makes them worse."""
    records = mixed_records(pictures)[:8]
    turned = [{**record, "chosen": record["rejected"], "rejected": record["chosen"]} for record in records]
    same, left, right = (write_jsonl(own, name) for own, name in ((records, "s"), (turned[:3], "l"), (turned[3:], "r")))
    config = make_config("ood", eval=(f"same={same}",), eval_ood=(f"left={left}", f"right={right}"), eval_every=1)
    folder = train(with_options(config, epochs=3))
    results = json.loads((folder / "results.json").read_text())
    assert {name: own["kind"] for name, own in results.items()} == {"same": "iid", "left": "ood", "right": "ood"}
    sets = [row["sets"] for row in read(folder / "evaluations.jsonl")]
    means = [(row["left"]["accuracy"] + row["right"]["accuracy"]) / 2 for row in sets]
    assert max(means) > means[-1] and sets[-1]["same"]["accuracy"] > sets[0]["same"]["accuracy"]
    parts = (saved_margins(folder / "best", turned[:3]), saved_margins(folder / "best", turned[3:]))
    assert sum(sum(margin > 0 for margin in part) / len(part) for part in parts) / 2 == max(means)


def test_test_records_among_the_training_records_are_said(make_config, capsys):
    train(make_config("copies", max_steps=1))
    assert "small: 3 of 3 test records are in the training data" in capsys.readouterr().out


@pytest.mark.parametrize(("pairs", "records", "count"), [("all", 11, 17), ("expand", 17, 17), ("1", 11, 11)])
def test_pairs_of_a_kwise_record_are_one_group_or_samples_of_their_own_or_some(make_config, pairs, records, count):
    rows = read(train(make_config("pairs", pairs=pairs, eval=())) / "metrics.jsonl")
    assert (sum(row["records"] for row in rows), sum(row["pairs"] for row in rows)) == (records, count)


def test_of_a_folder_of_splits_the_right_one_is_trained_and_tested_on(make_config, write_jsonl, tmp_path, capsys):
    (tmp_path / "hub").mkdir()
    for name, count in (("train_prefs-0", 5), ("train_sft-0", 5), ("test_prefs-0", 2), ("test_sft-0", 2)):
        records = [{"prompt": f"What? {i}", "chosen": "a", "rejected": f"b {name[:4]}"} for i in range(count)]
        write_jsonl(records, f"hub/{name}.jsonl")
    folder = train(make_config("split", data=(str(tmp_path / "hub"),), eval=(f"own={tmp_path / 'hub'}",)))
    assert sum(row["pairs"] for row in read(folder / "metrics.jsonl")) == 5
    assert json.loads((folder / "results.json").read_text())["own"]["pairs"] == 2
    out = capsys.readouterr().out
    taken, tested = (line for line in out.splitlines() if line.startswith("taken: "))
    assert "train_prefs-0.jsonl: 5 records, 0 with pictures, 5 without; read: chosen, prompt, rejected\n" in out
    assert "test_prefs-0.jsonl: 2 records, 0 with" in out
    left = "left, of other splits: test_prefs-0.jsonl, test_sft-0.jsonl, train_sft-0.jsonl"
    assert taken == f"taken: {tmp_path / 'hub' / 'train_prefs-0.jsonl'}; {left}"
    assert tested.startswith(f"taken: {tmp_path / 'hub' / 'test_prefs-0.jsonl'}; left")


def test_steps_can_be_a_number_of_pairs(make_config):
    rows = read(
        train(make_config("fixed", pairs="expand", pairs_per_step=4, tokens_per_batch=None, eval=())) / "metrics.jsonl"
    )
    assert [row["pairs"] for row in rows] == [4, 4, 4, 4, 1]


def test_a_mixture_is_as_long_as_its_files_together(make_config, write_jsonl, pictures):
    data = make_config("mixture").records.data[0]
    other = write_jsonl(mixed_records(pictures)[:2], "other.jsonl")  # again, as the weights say
    folder = train(make_config("mixture", data=(f"{data}:1", f"{other}:3"), eval=()))
    assert sum(row["records"] for row in read(folder / "metrics.jsonl")) == 13


def test_workers_do_not_change_the_training(make_config):
    alone = train(make_config("alone", max_steps=2))
    assert losses(train(make_config("workers", max_steps=2, num_workers=1))) == losses(alone)


def test_the_same_seed_gives_the_same_run(make_config):
    first, second = (train(make_config(name, robust=True, max_steps=2)) for name in ("first", "second"))
    assert losses(first) == losses(second) and margins(first) == margins(second)


def test_bad_records_stop_training_before_the_first_step_all_at_once(make_config, write_jsonl, pictures, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:200])
    good = mixed_records(pictures)[0]
    data = write_jsonl(
        [
            good,
            "{broken",
            {"prompt": "no responses", "responses": []},
            {**good, "img_path": "missing.png"},
            {**good, "img_path": "cut.png"},
            {**good, "prompt": "word " * 400},
            {**good, "chosen": 3},
        ],
        "bad.jsonl",
    )
    config = make_config("bad", data=(str(data),))
    with pytest.raises(ValueError) as caught:
        train(config)
    message = str(caught.value)
    for line, reason in [
        (2, "JSON"),
        (3, "chosen"),
        (4, "missing.png"),
        (5, "cut.png"),
        (6, "--max-length"),
        (7, "string"),
    ]:
        assert any(f"bad.jsonl:{line}:" in text and reason in text for text in message.splitlines()), (line, message)
    assert not config.run.output_dir.exists()

    folder = train(make_config("skipping", data=(str(data),), skip_bad=True))
    assert len(read(folder / "skipped.jsonl")) == 6
    assert sum(row["pairs"] for row in read(folder / "metrics.jsonl")) == 1


def fails_with_named_image(config):
    with pytest.raises(ValueError, match=r"cut\.png"):
        train(config)


def test_an_image_that_cannot_be_decoded_later_is_named_on_all_ranks(make_config, write_jsonl, pictures, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:200])
    records = mixed_records(pictures)
    data = write_jsonl([*records, {**records[0], "img_path": "cut.png"}], "late.jsonl")
    config = make_config("late", data=(str(data),), check_records=0)
    assert run_ranks(fails_with_named_image, config) == [0, 0]


def test_an_overlong_response_is_skipped_and_counted(make_config, write_jsonl, pictures, capsys):
    good = mixed_records(pictures)[0]
    data = write_jsonl([good, {**good, "chosen": "word " * 300}], "long.jsonl")
    folder = train(make_config("long", data=(str(data),)))
    (note,) = read(folder / "skipped.jsonl")
    assert note["source"].endswith("long.jsonl:2") and "--max-length" in note["reason"]
    assert "1 records or responses skipped" in capsys.readouterr().out


def test_a_bad_record_is_listed_once_however_often_it_is_met(make_config, write_jsonl, pictures):
    evaluation = write_jsonl([mixed_records(pictures)[0], "{broken"], "cut.jsonl")
    folder = train(make_config("often", eval=(f"small={evaluation}",), eval_every=1, epochs=2, skip_bad=True))
    assert [row["source"].rpartition("/")[2] for row in read(folder / "skipped.jsonl")] == ["cut.jsonl:2"]


def test_without_checks_records_that_cannot_be_used_are_named_all_the_same(make_config, write_jsonl):
    data = write_jsonl([{"prompt": "?", "img_path": "absent.png", "chosen": "a", "rejected": "b"}], "lost.jsonl")
    with pytest.raises(ValueError, match=r"lost\.jsonl:1: img_path.*absent\.png"):
        train(make_config("unchecked", data=(str(data),), check_records=0, eval=()))


def test_a_run_without_a_step_that_could_be_applied_says_so_and_writes_no_model(make_config, monkeypatch):
    monkeypatch.setattr("mmrm_fast.train.step.gradient_norms", lambda *_: [float("nan")])
    config = make_config("nothing", max_steps=3)
    with pytest.raises(ValueError, match=r"train\.jsonl: no record was trained on in 3 steps"):
        train(config)
    assert not (config.run.output_dir / "final").exists()


def test_a_run_that_ends_early_says_so(make_config):
    with pytest.raises(ValueError, match=r"train\.jsonl: ended after 11 records, 12 were planned"):
        train(make_config("early"), lambda event, trainer: setattr(trainer, "total", 12))


def test_figures_that_no_pair_defines_are_null(make_config, write_jsonl):
    data = write_jsonl([{"prompt": "What?", "chosen": "a", "rejected": "b"}], "one.jsonl")
    folder = train(make_config("one", robust=True, max_steps=1, eval=(f"one={data}",)))
    assert json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)["one"]["sfd"] is None


def test_pairs_whose_sides_are_the_same_are_counted_and_in_no_loss_and_no_figure(make_config, write_jsonl, capsys):
    pair = {"prompt": "What?", "chosen": "a", "rejected": "a"}
    rated = {"prompt": "Which?", "responses": ["a", "b", "a"], "scores": [3, 2, 1]}
    data = write_jsonl([pair, rated, {**pair, "rejected": "b"}], "same.jsonl")
    alike = write_jsonl([pair], "alike.jsonl")
    sets = (f"own={data}", f"alike={alike}")
    folder = train(make_config("same", data=(str(data),), eval=sets, robust=True, eval_every=1))
    assert sum(row["pairs"] for row in read(folder / "metrics.jsonl")) == 3
    notes = [(row["source"][-1], row["reason"]) for row in read(folder / "skipped.jsonl")]
    assert notes == [(line, f"1 of {n} pairs have two sides of the same tokens") for line, n in (("1", 1), ("2", 3))]
    results = json.loads((folder / "results.json").read_text())
    counts = [(results[name]["pairs"], results[name]["identical_pairs"]) for name in ("own", "alike")]
    assert counts == [(3, 2), (0, 1)] and results["alike"]["accuracy"] is None
    out = capsys.readouterr().out
    assert "2 pairs whose two sides are the same" in out and "without a preference" not in out
    assert "alike: 1 pairs whose two sides are the same are in no figure" in out


def test_pairs_over_the_most_of_a_record_are_counted(make_config, capsys):
    folder = train(make_config("most", max_pairs=2))
    assert sum(row["pairs"] for row in read(folder / "metrics.jsonl")) == 8 + 3 * 2
    assert "3 pairs over --max-pairs" in capsys.readouterr().out


def test_ratings_that_are_not_numbers_are_counted(make_config, capsys):
    train(make_config("unrated", max_steps=100))
    assert "3 responses without a numeric rating" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "{data}", "--model", "nowhere"], "nowhere"),
        (["--data", "{data}", "--eval", "noname"], "NAME=FILE"),
        (["--model", "{model}"], "--data"),
        (["--data", "{data}", "--eval", "a={data}", "--eval-ood", "a={data}"], "a name of its own"),
        (["--data", "{data}", "--eval", "a/b={data}"], "without a slash"),
        (["--data", "{data}", "--eval", "a={data}", "--best", "a.accuracy"], "--eval-every"),
        (["--data", "{data}", "--eval", "a={data}", "--best", "b.accuracy", "--eval-every", "2"], "SET.FIGURE, of a"),
    ],
)
def test_a_wrong_option_is_a_message_not_a_traceback(make_config, monkeypatch, capsys, arguments, reason):
    config = make_config("wrong")
    places = {"data": config.records.data[0], "model": config.weights.model}
    monkeypatch.setattr(sys, "argv", ["mmrm-fast"])
    assert main(["train", "--output-dir", str(config.run.output_dir), *(a.format(**places) for a in arguments)]) == 2
    assert reason in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(make_config, monkeypatch):
    monkeypatch.setattr("mmrm_fast.train.refusals.get_available_trackers", list)
    config = make_config("tracked", report_to=("mlflow",))
    with pytest.raises(ValueError, match="--report-to mlflow: pip install mlflow"):
        train(config)
    assert not config.run.output_dir.exists()


def test_learning_rate_warms_up_and_ends_at_zero():
    assert [lr_factor(share, 0.1) for share in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_balanced_mode_divides_the_main_branch_by_the_sum_of_its_weights():
    sums = dict.fromkeys(SUMS + COUNTS, 0.0) | {"weight": 8.0, "weighted_sfc": 2.0}
    assert StepTotals(sums).gradient_scales("balanced") == (1 / 2, 1 / 8)
    assert StepTotals(sums).gradient_scales("paper") == (1 / 8, 1 / 8)
    assert StepTotals(dict.fromkeys(SUMS + COUNTS, 0.0)).gradient_scales("balanced") == (0.0, 0.0)


def test_the_frozen_vision_tower_does_not_change_and_the_rest_does(make_config, model_folder):
    folder = train(make_config("frozen"))
    before, after = (Scorer.from_pretrained(path, device="cpu").model for path in (model_folder, folder / "final"))
    changed = {
        name.split(".")[1]
        for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed == {"language_model", "multi_modal_projector", "weight"}


@pytest.mark.parametrize("method", ["robust", "standard"])
def test_the_references_own_yaml_runs_with_paths_overridden(make_config, method, capsys):
    config = make_config(method)
    name = Path(__file__).parents[1] / "reference" / f"train_{method}_8B.yaml"
    places = ["--model", config.weights.model, "--data", *config.records.data, "--output-dir", config.run.output_dir]
    assert main(["train", "--config", *map(str, [name, *places])]) == 0
    assert "deepspeed" in capsys.readouterr().out
    rows = read(config.run.output_dir / "metrics.jsonl")
    assert [row["pairs"] for row in rows] == [8, 8, 1]
    assert all(("proxy_grad_norm" in row) == (method == "robust") for row in rows)
