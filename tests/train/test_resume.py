"""A run that ends early goes on as if it had not: killed, terminated, damaged, moved to other ranks, out of disk."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ranks import TIMEOUT_SECONDS, run_ranks
from runs import losses, read
from safetensors.torch import load_file

from mmrm_fast.config import TrainConfig
from mmrm_fast.config_file import options, with_options
from mmrm_fast.files import write_json
from mmrm_fast.train.command import train
from mmrm_fast.train.resume import RunState, not_kept, sealed
from mmrm_fast.train.run_folder import FREE, config_json, keep_until, require_same

OPTIONS = {"robust": True, "epochs": 2, "save_every": 2, "keep": 3, "report_to": (), "eval": ()}


@pytest.fixture(scope="module")
def begun():
    return []


@pytest.fixture
def whole(make_config, begun, tmp_path_factory):
    """The folder of a run of `OPTIONS` that nothing disturbed: one for all tests, which read it."""
    if not begun:
        config = make_config("whole", **OPTIONS)
        begun.append(train(with_options(config, output_dir=tmp_path_factory.mktemp("whole") / "run")))
    return begun[0]


def in_child(function, *args):
    """Run a function in a fork; its exit code, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"still running after {TIMEOUT_SECONDS} s")
    return process.exitcode


MOMENTS = {
    "in a step": ("micro-batch", 3),
    "inside a save": ("seal", 4),
    "between a step and its checkpoint": ("save", 6),
}


def train_until(moment, config):
    """Train, and kill this process at a moment: an event after so many steps."""

    def killing(event, trainer):
        step = trainer.checkpoints.saving_step if event == "seal" else trainer.state.step
        if (event, step) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, killing)


def same_runs(one, two):
    """The same steps, each once, with bitwise the same losses and weights."""
    assert [row["step"] for row in read(one / "metrics.jsonl")] == list(range(1, len(losses(one)) + 1))
    assert [row["step"] for row in read(two / "metrics.jsonl")] == list(range(1, len(losses(one)) + 1))
    assert losses(one) == losses(two)
    for name in ("final", "proxy"):
        torch.testing.assert_close(*(load_file(f / name / "model.safetensors") for f in (one, two)), rtol=0, atol=0)


def test_killed_runs_resume_to_bitwise_the_same_end(make_config):
    """With worker processes and dropout in adapters, at three moments in turn on the same run."""
    options = {**OPTIONS, "num_workers": 1, "llm_lora": True, "lora_r": 4, "lora_dropout": 0.2}
    whole = train(make_config("whole", **options))
    config = make_config("killed", resume="auto", **options)
    for moment in MOMENTS:
        assert in_child(train_until, MOMENTS[moment], config) == -signal.SIGKILL, moment
        assert not (config.run.output_dir / "final").exists()
    same_runs(whole, train(config))
    names = sorted(path.name for path in (config.run.output_dir / "checkpoints").iterdir())
    assert len(names) == 3 and not any("unfinished" in name for name in names)


def die_before_a_rename(config, number):
    """SIGTERM after step 2, which is saved already, so that it is saved again; die before its so-manyth rename."""
    renames, rename_now = iter(range(number)), os.replace

    def replace(source, target):
        if os.path.basename(target) == "step-00000002" and next(renames, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename_now(source, target)

    def terminating(event, trainer):
        if (event, trainer.state.step) == ("micro-batch", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    os.replace = replace
    train(config, terminating)


@pytest.mark.parametrize("number", [0, 1], ids=["the first checkpoint", "one that is written again"])
def test_what_is_sealed_is_not_lost_to_a_kill_before_it_has_its_name(make_config, capsys, number):
    options = {**OPTIONS, "keep": 1, "epochs": 1}
    whole, config = train(make_config("whole", **options)), make_config("run", **options)
    assert in_child(die_before_a_rename, config, number) == -signal.SIGKILL
    assert not (config.run.output_dir / "checkpoints" / "step-00000002").exists()
    same_runs(whole, train(with_options(config, resume="auto")))
    assert "resuming after step 2" in capsys.readouterr().err


def test_a_broken_end_of_the_metrics_is_cut_and_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st\xff')
    keep_until(path, 2)
    assert read(path) == [{"step": 1}, {"step": 2}]
    assert "left out: " in (said := capsys.readouterr().err) and "metrics.jsonl:4: not valid JSON" in said


def wait_in_step_2(config, reached, go_on):
    def waiting(event, trainer):
        if (event, trainer.state.step) == ("micro-batch", 2):
            reached.set()
            assert go_on.wait(TIMEOUT_SECONDS)

    train(config, waiting)


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_a_second_run_in_a_folder_is_refused_and_the_first_is_as_if_alone(make_config, whole, options):
    config = make_config("run", **OPTIONS)
    context = multiprocessing.get_context("fork")
    reached, go_on = context.Event(), context.Event()
    process = context.Process(target=wait_in_step_2, args=(config, reached, go_on), daemon=True)
    process.start()
    assert reached.wait(TIMEOUT_SECONDS)
    with pytest.raises(ValueError, match=rf"run: process {process.pid} on .* is at work there"):
        train(with_options(config, **options))
    go_on.set()
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode == 0
    same_runs(whole, config.run.output_dir)


def terminate_one(config):
    """SIGTERM to the last rank: in the third step, or in the evaluation after the fourth."""
    moment = ("evaluation", 4) if config.run.resume else ("micro-batch", 2)

    def terminating(event, trainer):
        if os.environ["RANK"] == "1" and (event, trainer.state.step) == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config, terminating)


def test_sigterm_to_one_rank_saves_on_all_and_another_number_of_ranks_goes_on(make_config):
    options = {"robust": True, "epochs": 2, "eval_every": 4, "keep": 3}
    whole, config = train(make_config("whole", **options)), make_config("stopped", **options)
    assert run_ranks(terminate_one, config) == [128 + signal.SIGTERM] * 2
    assert len(losses(config.run.output_dir)) == 2 and not (config.run.output_dir / "final").exists()
    assert [path.name for path in (config.run.output_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert run_ranks(terminate_one, with_options(config, resume="auto")) == [128 + signal.SIGTERM] * 2
    assert len(losses(config.run.output_dir)) == 4 and not (config.run.output_dir / "evaluations.jsonl").exists()
    train(with_options(config, resume="auto"))
    assert [row["step"] for row in read(config.run.output_dir / "evaluations.jsonl")] == [4]
    assert losses(config.run.output_dir) == pytest.approx(losses(whole), abs=1e-4)
    torch.testing.assert_close(
        *(load_file(f / "final" / "model.safetensors") for f in (config.run.output_dir, whole)), atol=1e-3, rtol=1e-3
    )


def interrupt(config, times):
    """SIGINT, to the worker processes too as from a terminal, in the third step; and again before that is saved."""
    os.setpgid(0, 0)
    left = iter(range(times))

    def interrupting(event, trainer):
        if (event, trainer.state.step) in (("micro-batch", 2), ("save", 2)) and next(left, None) is not None:
            os.killpg(0, signal.SIGINT)

    train(config, interrupting)


def test_an_interrupt_saves_and_a_second_one_leaves_at_once(make_config, capfd):
    options = {"epochs": 1, "num_workers": 1, "eval": ()}
    whole, config = train(make_config("whole", **options)), make_config("run", **options)
    assert in_child(interrupt, config, 1) == 128 + signal.SIGINT
    assert "stopped by SIGINT after step 2, 8 of 11 records; --resume auto goes on" in capfd.readouterr().err
    assert losses(train(with_options(config, resume="auto"))) == losses(whole)
    twice = with_options(config, output_dir=config.run.output_dir.with_name("twice"))
    assert in_child(interrupt, twice, 2) == -signal.SIGINT
    assert not (twice.run.output_dir / "checkpoints").exists()


def flip_a_bit(newest):
    part = newest / "__0_0.distcp"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    return part


def alter_the_state(newest):
    seal = newest / "checkpoint.json"
    content = json.loads(seal.read_text())
    content["state"]["consumed"] += 1
    seal.write_text(json.dumps(content))
    return seal


@pytest.mark.parametrize("damage", [flip_a_bit, alter_the_state])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(make_config, whole, capsys, damage):
    config = make_config("run", **OPTIONS)
    *_, before, newest = sorted((train(config) / "checkpoints").iterdir())
    part = damage(newest)
    same_runs(whole, train(with_options(config, resume="auto")))
    said = capsys.readouterr().err
    assert f"{part}: damaged" in said and f"from {before}" in said

    for path in (config.run.output_dir / "checkpoints").iterdir():
        (path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="no good checkpoint"):
        train(with_options(config, resume="auto"))


def test_data_that_have_changed_since_the_checkpoint_are_named_and_taken_where_that_is_asked_for(make_config, capsys):
    config = make_config("run", **OPTIONS)
    oldest = sorted((train(config) / "checkpoints").iterdir())[0]
    again, data = with_options(config, resume=str(oldest)), Path(config.records.data[0])
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([lines[0].replace("two red circles", "three red circles"), *lines[1:]]))
    with pytest.raises(ValueError, match=r"train\.jsonl: changed, 11 records where 11 were\n.*--accept-changed-data"):
        train(again)
    train(with_options(again, accept_changed_data=True))
    assert "going on with changed data: " in capsys.readouterr().err
    train(with_options(config, resume="auto"))  # what was accepted is what the run is trained on
    data.write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match=r"22 records were trained on, the data have 4: nothing is left"):
        train(with_options(config, resume="auto", accept_changed_data=True))


def kill_at_once(config):
    train(config, lambda event, trainer: os.kill(os.getpid(), signal.SIGKILL))


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_config_alone(make_config, whole):
    config = make_config("run", resume="auto", **OPTIONS)
    assert in_child(kill_at_once, config) == -signal.SIGKILL
    assert (config.run.output_dir / "config.json").exists() and not (config.run.output_dir / "checkpoints").exists()
    with pytest.raises(ValueError, match=r"seed 0 -> 1"):
        train(with_options(config, seed=1))
    same_runs(whole, train(config))


def test_a_checkpoint_is_written_when_the_last_one_is_so_many_minutes_old(make_config):
    options = {**OPTIONS, "save_every": None, "keep": 2}
    by_clock, never = (
        make_config("often", save_minutes=1e-9, **options),
        make_config("never", save_minutes=0, **options),
    )
    saved = []
    whole = train(by_clock, lambda event, trainer: saved.append(trainer.state.step) if event == "save" else None)
    assert saved == list(range(1, len(losses(whole)) + 1))
    assert len(list((whole / "checkpoints").iterdir())) == 2
    assert not (train(never) / "checkpoints").exists()
    same_runs(whole, train(with_options(by_clock, resume=str(min((whole / "checkpoints").iterdir())))))


def train_on_unequal_clocks(config):
    config = with_options(config, save_minutes=1e-9 if os.environ["RANK"] == "0" else 1e9)
    train(config)


def test_one_ranks_clock_makes_all_ranks_save(make_config):
    config = make_config("ranks", **{**OPTIONS, "save_every": None, "max_steps": 2})
    assert run_ranks(train_on_unequal_clocks, config) == [0, 0]
    steps = sorted(path.name for path in (config.run.output_dir / "checkpoints").iterdir())
    assert steps == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "step"),
        ({"consumed": "4"}, "consumed"),
        ({"skipped": {}}, "skipped"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_a_state_that_is_not_one_is_refused_by_the_name_of_its_field(tmp_path, change, reason):
    path = tmp_path / "checkpoint.json"
    path.write_text(sealed({"state": asdict(RunState({}, step=4, consumed=9, best=0.5)), "files": {}}))
    assert RunState.read(tmp_path) == RunState({}, step=4, consumed=9, best=0.5)
    path.write_text(sealed({"state": asdict(RunState({})) | change, "files": {}}))
    with pytest.raises(ValueError, match=rf"checkpoint\.json: not the state of a run of this version: {reason}"):
        RunState.read(tmp_path)
    for broken in ("null", "[]", '{"state": null}', "{}", "{", '{"state": {}, "files": {}, "sum": "x"}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"checkpoint\.json"):
            RunState.read(tmp_path)


def test_what_may_differ_when_a_run_goes_on_are_options():
    assert set(options(TrainConfig())) >= FREE


def test_nothing_of_a_run_waits_for_the_garbage_collector(make_config):
    """A process group that is collected later, in a fork, waits for threads which that does not have."""
    seen = []
    gc.disable()
    try:
        train(make_config("run", **OPTIONS), lambda event, trainer: seen.append(weakref.ref(trainer)))
        assert seen and not any(trainer() for trainer in seen)
    finally:
        gc.enable()


def test_a_checkpoint_can_be_named(make_config, whole):
    config = make_config("run", **OPTIONS)
    oldest = sorted((train(config) / "checkpoints").iterdir())[0]
    same_runs(whole, train(with_options(config, resume=str(oldest), output_dir=None)))
    with pytest.raises(ValueError, match="not a checkpoint of the run folder"):
        train(make_config("other", resume=str(oldest), **OPTIONS))


def test_later_checkpoints_that_a_resumed_run_left_behind_go_when_its_own_is_whole(tmp_path):
    names = [f"step-{step:08d}" for step in (4, 6, 7, 8)]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in not_kept(tmp_path / names[2], keep=2)] == [names[0], names[3]]
    assert [path.name for path in not_kept(tmp_path / names[3], keep=4)] == []


def test_a_run_folder_is_neither_overwritten_nor_continued_differently_by_accident(make_config):
    config = make_config("run", **OPTIONS)
    first = losses(train(config))
    with pytest.raises(ValueError, match=r"--resume auto continues it, --overwrite replaces it"):
        train(config)
    with pytest.raises(ValueError, match=r"lr 0\.001 -> 0\.002"):
        train(with_options(config, resume="auto", lr=2e-3))
    assert losses(config.run.output_dir) == first
    with pytest.raises(ValueError, match="nowhere"):
        train(with_options(config, overwrite=True, data=("nowhere.jsonl",)))
    assert losses(config.run.output_dir) == first and (config.run.output_dir / "final").exists()
    replaced = train(with_options(config, overwrite=True, max_steps=2))
    assert losses(replaced) != first and len(losses(replaced)) == 2


def test_a_run_of_another_release_goes_on_where_its_options_mean_the_same(make_config):
    config = make_config("run", pairs_per_step=4, tokens_per_batch=None)
    now = config_json(config)
    before = {**now, "gone": 0.0, "tokens_per_batch": 131_072}
    del before["clip"]
    config.run.output_dir.mkdir()
    write_json(config.run.output_dir / "config.json", before)
    require_same(config, None)
    for changed, refusal in (({"gone": 0.5}, "gone 0.5 -> None"), ({"clip": "joint"}, "clip 'joint' -> 'branch'")):
        write_json(config.run.output_dir / "config.json", before | changed)
        with pytest.raises(ValueError, match=refusal):
            require_same(config, None)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(make_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        train(make_config("file/run"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"3 checkpoints take .* GB, the disk has"):
        train(make_config("full"))


def train_with_small_files(config, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write past it fails as on a full disk
    train(config)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_a_warning_and_training_goes_on(make_config, whole, capfd):
    config = make_config("full", **OPTIONS)
    size = (whole / "final" / "model.safetensors").stat().st_size
    assert in_child(train_with_small_files, config, size + 1000) == 0
    assert "warning: the checkpoint of step 2 could not be written: " in capfd.readouterr().err
    assert not any((config.run.output_dir / "checkpoints").iterdir())
    same_runs(whole, config.run.output_dir)


def test_what_was_skipped_before_is_told_after_resuming(make_config, write_jsonl, pictures, capsys):
    good = {"prompt": "What?", "img_path": pictures["photo"], "chosen": "a b", "rejected": "c"}
    records = [line for i in range(8) for line in ({**good, "rejected": f"c {i}"}, "{broken")]
    data = write_jsonl(records, "bad.jsonl")
    options = {**OPTIONS, "data": (str(data),), "skip_bad": True, "epochs": 1, "tokens_per_batch": 80}
    del options["eval"]
    whole = train(make_config("whole", **options))
    config = make_config("run", **options)
    train(config)
    train(with_options(config, resume=str(sorted((config.run.output_dir / "checkpoints").iterdir())[0])))
    assert read(config.run.output_dir / "skipped.jsonl") == read(whole / "skipped.jsonl")
    assert len(read(whole / "skipped.jsonl")) == 8
    same = [json.loads((f / "results.json").read_text()) for f in (whole, config.run.output_dir)]
    assert same[0] == same[1]
