"""A proxy of words and form: its margins stand before the first step, for every way in which pairs are trained on."""

import json
import os
import random
import signal

import pytest
import torch
from ranks import run_ranks
from runs import losses, mixed_records, read
from safetensors.torch import load_file

from mmrm_fast.train.command import train

NGRAMS = {"robust": True, "proxy_model": "ngrams", "report_to": ()}
WAYS = {
    "all pairs": ({}, 17),
    "a sample a pair": ({"pairs": "expand"}, 17),
    "a pair a record": ({"pairs": "1"}, 17),
    "held out": ({"eval_fraction": 0.4, "eval": ()}, None),
    "a mixture": ({"mixture": True, "eval": ()}, 19),
}


PROBE = {**NGRAMS, "proxy_model": "probe"}


@pytest.mark.parametrize("way", WAYS)
def test_every_trained_pair_has_a_margin_and_every_tested_one(make_config, write_jsonl, pictures, way):
    options, count = WAYS[way]
    if options.get("mixture"):
        data = make_config("run").records.data[0]
        other = write_jsonl(mixed_records(pictures)[:2], "other.jsonl")
        options = {"data": (f"{data}:1", f"{other}:3"), "eval": ()}
    folder = train(make_config("run", **NGRAMS, **options))
    rows = read(folder / "shortcut" / "train.jsonl")
    assert [row["record"] for row in rows] == sorted(row["record"] for row in rows)
    if count:
        assert len(rows) == count
    for name in ("small", "one") if "eval" not in options else ("held-out",) if count is None else ():
        tested = read(folder / f"eval-{name}.jsonl")
        assert [row["proxy_margin"] for row in tested] == [
            row["proxy_margin"] for row in read(folder / "shortcut" / f"eval-{name}.jsonl")
        ]
        if name == "held-out":
            assert not {row["record"] for row in rows} & {row["record"] for row in tested}
    assert all(0 < row["sfc_mean"] < 1 for row in read(folder / "metrics.jsonl"))
    assert not (folder / "proxy").exists()


def test_the_margins_are_a_file_that_another_run_may_have_as_its_proxy(make_config):
    first = train(make_config("first", **NGRAMS, max_steps=3))
    file = str(first / "shortcut" / "train.jsonl")
    assert losses(train(make_config("second", **{**NGRAMS, "proxy_model": file}, max_steps=3))) == losses(first)


def test_margins_do_not_depend_on_the_ranks(make_config):
    one, two = train(make_config("one", **NGRAMS)), make_config("two", **NGRAMS)
    assert run_ranks(train, two) == [0, 0]
    for name in ("train", "eval-small", "eval-one"):
        file = f"shortcut/{name}.jsonl"
        assert (one / file).read_bytes() == (two.run.output_dir / file).read_bytes()
    assert losses(two.run.output_dir) == pytest.approx(losses(one), abs=1e-4)


def proxy_margins(folder, name):
    return [row["proxy_margin"] for row in read(folder / "shortcut" / f"{name}.jsonl")]


def test_the_probe_reads_the_model_before_it_is_trained_on_any_number_of_ranks(make_config):
    one, three = train(make_config("one", **PROBE)), make_config("three", **PROBE)
    assert run_ranks(train, three, world=3) == [0] * 3  # eleven records are one chunk: two ranks have none
    for name in ("train", "eval-small", "eval-one"):
        found, wanted = (proxy_margins(folder, name) for folder in (three.run.output_dir, one))
        assert found == pytest.approx(wanted, abs=1e-3)
    assert losses(three.run.output_dir) == pytest.approx(losses(one), abs=1e-3)


@pytest.fixture
def habits(write_jsonl):
    """Records whose preferred response ends in a word more, but for its picture."""
    rng = random.Random(0)
    said = [" ".join(rng.sample(["red", "circles", "two", "left", "picture", "there"], 3)) for _ in range(320)]
    pairs = zip(said[::2], said[1::2], strict=True)
    rows = [
        {"prompt": f"What? {i}", "chosen": f"{one} I think so.", "rejected": two} for i, (one, two) in enumerate(pairs)
    ]
    return str(write_jsonl(rows, "habits.jsonl"))


@pytest.mark.parametrize(("kind", "taken"), [("ngrams", "ngrams"), ("probe", "probe"), ("auto", "ngrams")])
def test_a_habit_is_found_and_the_cheapest_proxy_that_finds_it_is_taken(make_config, habits, kind, taken):
    folder = train(make_config("run", **NGRAMS | {"proxy_model": kind}, data=(habits,), eval=(), max_steps=1))
    fitted = json.loads((folder / "shortcut" / "fitted.json").read_text())
    assert fitted["taken"] == taken and all(0 <= loss < 0.4 for loss in fitted["log_loss"].values())
    assert len(fitted["log_loss"]) == (2 if kind == "auto" else 1)
    right = [margin > 0 for margin in proxy_margins(folder, "train")]
    assert sum(right) > 0.95 * len(right)


def train_until(step, config):
    """Train, and kill this rank inside a step."""

    def killing(event, trainer):
        if (event, trainer.state.step) == ("micro-batch", step):
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, killing)


@pytest.mark.parametrize(("kind", "ranks", "steps"), [(NGRAMS, 2, [2]), (PROBE, 1, [0, 2])])
def test_killed_and_resumed_is_bitwise_as_uninterrupted(make_config, kind, ranks, steps):
    """After a checkpoint, and before the first one, too, when the margins stand already."""
    options = {**kind, "max_steps": 3, "save_every": 1, "keep": 3}
    whole, config = make_config("whole", **options), make_config("killed", resume="auto", **options)
    assert run_ranks(train, whole, world=ranks) == [0] * ranks
    for step in steps:
        assert -9 in run_ranks(train_until, step, config, world=ranks)
    assert run_ranks(train, config, world=ranks) == [0] * ranks
    one, two = whole.run.output_dir, config.run.output_dir
    assert losses(one) == losses(two)
    torch.testing.assert_close(*(load_file(f / "final" / "model.safetensors") for f in (one, two)), rtol=0, atol=0)
    assert (one / "shortcut" / "train.jsonl").read_bytes() == (two / "shortcut" / "train.jsonl").read_bytes()


def test_a_resumed_run_reads_its_margins_and_fits_nothing(make_config, monkeypatch, capsys):
    config = make_config("run", **NGRAMS, save_every=1, max_steps=2)
    folder = train(config)
    path = folder / "shortcut" / "train.jsonl"
    rows = path.read_text()
    monkeypatch.setattr("mmrm_fast.train.proxy.write_margins", lambda *_, **__: pytest.fail("fitted again"))
    more = {**NGRAMS, "save_every": 1, "resume": "auto", "max_steps": 2, "overwrite": False}
    other = make_config("run").records.data[0]
    train(make_config("run", **more, eval=(f"new={other}",)))
    assert path.read_text() == rows
    assert "new: was no test set when the run began" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(ValueError, match="the margins that the run began with are not there"):
        train(make_config("run", **more))


def test_margins_say_where_they_are_not_numbers(make_config, tmp_path):
    path = tmp_path / "margins.jsonl"
    for margin in ("NaN", "1e300"):
        path.write_text(f'{{"record": 0, "chosen": 0, "rejected": 1, "proxy_margin": {margin}}}\n')
        with pytest.raises(ValueError, match=r"margins\.jsonl:1: "):
            train(make_config("run", robust=True, proxy_model=str(path)))
