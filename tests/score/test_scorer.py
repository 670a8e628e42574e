"""A scorer's rewards: the same whatever else is in the batch, in their places, from the folder that training saved."""

import base64
import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from published import published_config

from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.data import samples
from mmrm_fast.data.images import Tiling
from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.model.placement import Copies, device_numbers, fewest_devices, last_modules, nbytes, shares
from mmrm_fast.score.scored import Scored
from mmrm_fast.score.scorer import Scorer, batch_spread

RESPONSES = ("two red circles", "I think so.", "", "on the left", "two red circles on the left of the picture")


@pytest.fixture
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def folder(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "model", checkpoint)
    return tmp_path / "model"


@pytest.fixture
def scorer(folder):
    return Scorer.from_pretrained(folder, "cpu")


def record(img_path, *responses, prompt="What is in the picture?"):
    return {"prompt": prompt, "img_path": img_path, "responses": list(responses)}


def group(number, images, *responses, prompt="What?", source=None):
    return Group(source or f"file.jsonl:{number + 1}", number, None, prompt, None, tuple(images), responses)


def crowd(pictures, size):
    """Records of all kinds, some with the same picture or the same responses."""
    paths = [*pictures.values(), None]
    return [record(paths[i % 5], *RESPONSES[i % 3 :], prompt=f"What is in picture {i % 7}?") for i in range(size)]


def broken_copy(path, tmp_path):
    """A picture whose header is fine and whose pixels are not."""
    copy = tmp_path / "broken.jpg"
    Image.open(path).save(copy)
    copy.write_bytes(copy.read_bytes()[:-2000])
    return str(copy)


# rewards


def test_the_habits_of_the_reference_are_one_switch_for_texts_and_pictures(folder):
    scorer = Scorer.from_pretrained(folder, "cpu", compat="reference")
    assert (scorer.checkpoint.tiling.compat, scorer.checkpoint.prompt_encoder().compat) == ("reference", "reference")


def test_conversations_and_encoded_pictures_are_scored_as_texts_and_files_are(scorer, pictures):
    content = base64.b64encode(Path(pictures["wide"]).read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + content}}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    as_file = {"prompt": "What?", "img_path": pictures["wide"], "responses": ["two"]}
    plain, encoded = scorer.score([as_file, {"prompt": [turn], "responses": ["two"]}])
    assert encoded == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("tokens_per_micro_batch", [16_384, 1_000])
def test_a_reward_does_not_depend_on_what_else_is_scored(folder, pictures, tokens_per_micro_batch):
    scorer = Scorer.from_pretrained(folder, "cpu", tokens_per_micro_batch=tokens_per_micro_batch)
    one = record(pictures["photo"], *RESPONSES)
    (alone,) = scorer.score([one])
    others = crowd(pictures, 63)
    crowded = scorer.score([*others[:20], one, *others[20:]])
    assert len(crowded) == 64
    assert crowded[20] == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(RESPONSES)


def test_a_reward_does_not_depend_on_the_order_of_the_responses(scorer, pictures):
    shuffled = random.Random(0).sample(RESPONSES, len(RESPONSES))
    straight, mixed = scorer.score([record(pictures["tall"], *order) for order in (RESPONSES, shuffled)])
    assert mixed == pytest.approx([straight[RESPONSES.index(response)] for response in shuffled], abs=1e-5)


def test_a_reward_does_not_depend_on_other_responses_of_the_record(scorer, pictures):
    (together,) = scorer.score([record(pictures["wide"], *RESPONSES)])
    alone = [scorer.score([record(pictures["wide"], response)])[0][0] for response in RESPONSES]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_record_too_large_for_one_forward_is_cut_between_its_responses(folder, pictures):
    many = record(pictures["square"], *[f"{response} {i}" for i in range(20) for response in RESPONSES])
    (whole,) = Scorer.from_pretrained(folder, "cpu").score([many])
    small = Scorer.from_pretrained(folder, "cpu", tokens_per_micro_batch=50)
    (sample,) = [small.encode(group(0, [many["img_path"]], *many["responses"]))]
    pieces = small.split(sample)
    assert len(pieces) > 5 and all(small.cost(piece) <= 220 for piece in pieces)  # costs are rounded down
    assert small.score([many])[0] == pytest.approx(whole, abs=1e-5)


def test_best_of_64_is_one_forward_of_less_than_an_eighth_of_the_tokens(checkpoint, tmp_path):
    """A picture of 7 tiles of 256 tokens and 64 responses of 150 tokens."""
    Image.new("RGB", (448 * 3, 448 * 2)).save(tmp_path / "photo.png")
    real = replace(checkpoint, tiling=Tiling(448, 1, 6), tokens_per_tile=256, max_length=4096)
    scorer = Scorer(real)
    (sample,) = scorer.split(scorer.encode(group(0, [str(tmp_path / "photo.png")], *["a" * 150] * 64)))
    tokens = sample.main.prefix_length + sum(len(own) - sample.main.prefix_length for own in sample.main.sequences)
    assert sample.main.prefix_length > 7 * 256 and len(sample.main.sequences) == 64
    assert 8 * tokens <= sample.num_tokens_unshared


def test_a_bf16_scorer_gives_rewards_finer_than_bf16(folder, pictures):
    scorer = Scorer.from_pretrained(folder, "cpu", "bfloat16")
    (rewards,) = scorer.score([record(pictures["wide"], *RESPONSES)])
    assert any(torch.tensor(reward).bfloat16().item() != reward for reward in rewards)


def test_an_image_path_may_be_absent(scorer):
    assert len(scorer.score([{"prompt": "What?", "responses": ["a", "b"]}])[0]) == 2


def test_no_records_have_no_rewards(scorer):
    assert scorer.score([]) == []


# places


def test_results_stand_where_their_groups_stand(scorer, pictures):
    groups = [group(i, [pictures["wide"]], *RESPONSES[: 1 + i % 4], prompt=f"What {i}?") for i in range(12)]
    results = scorer.score_groups(groups)
    assert [result.group for result in results] == groups
    assert [len(result.rewards) for result in results] == [len(group.responses) for group in groups]
    for one, result in zip(groups, results, strict=True):
        (alone,) = scorer.score_groups([one])
        assert result.rewards == pytest.approx(alone.rewards, abs=1e-5)


FAULTS = {
    "an error of parsing": lambda broken: RecordError("file.jsonl:2", "", "not valid JSON"),
    "no such image": lambda broken: group(1, ["/none.png"], "a"),
    "a picture that breaks while decoding": lambda broken: group(1, [broken], "a", "b"),
    "too many slots": lambda broken: group(1, [broken], "a", prompt="<image><image>"),
    "a prompt over the limit": lambda broken: group(1, [], "a", prompt="long " * 1000),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_error_stays_in_its_place_and_moves_no_other_reward(scorer, pictures, tmp_path, kind):
    good = [group(0, [pictures["wide"]], "two", "red"), group(2, [], "I think so.")]
    bad = FAULTS[kind](broken_copy(pictures["wide"], tmp_path))
    results = scorer.score_groups([good[0], bad, good[1]])
    assert isinstance(results[1], RecordError)
    assert results[1].source == "file.jsonl:2"
    for result, wanted in zip((results[0], results[2]), scorer.score_groups(good), strict=True):
        assert result.rewards == pytest.approx(wanted.rewards, abs=1e-5)


@pytest.mark.parametrize("reads", ["image_size", "load_tiles"], ids=["header", "pixels"])
def test_a_picture_whose_disk_does_not_answer_is_an_error_of_its_record_alone(scorer, pictures, monkeypatch, reads):
    answer, read = threading.Event(), getattr(samples, reads)

    def slow(image, *options):
        if image == pictures["wide"]:
            assert answer.wait(60)
        return read(image, *options)

    monkeypatch.setattr(samples, reads, slow)
    monkeypatch.setattr(scorer, "preparer", replace(scorer.preparer, seconds=2.0))
    groups = [Group("f:1", 0, None, "p", None, (pictures[name],), ("a",)) for name in ("photo", "wide", "tall")]
    results = scorer.score_groups(groups)
    answer.set()
    assert [type(result) for result in results] == [Scored, RecordError, Scored]
    assert str(results[1]) == f"f:1: img_path: {pictures['wide']}: not read within 2 seconds"


def test_groups_of_one_source_keep_their_own_results(scorer, pictures, tmp_path):
    images = [pictures["wide"], broken_copy(pictures["wide"], tmp_path)]
    results = scorer.score_groups([group(0, [image], "two", source="records[0]") for image in images])
    assert [type(result) for result in results] == [Scored, RecordError]


def test_score_raises_the_error_of_the_record(scorer):
    with pytest.raises(RecordError, match=r"records\[1\]: responses: expected a non-empty list"):
        scorer.score([{"prompt": "p", "responses": ["a"]}, {"prompt": "p", "responses": []}])


def test_an_overlong_response_is_scored_and_marked(scorer):
    (result,) = scorer.score_groups([group(0, [], "two", "I think so. " * 400)])
    assert result.truncated == (False, True)
    assert len(result.rewards) == 2


# folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_comes_back_bit_for_bit(make_checkpoint, tmp_path, dtype):
    saved = make_checkpoint(dtype=dtype, max_length=300, max_tiles=4)
    save_checkpoint(tmp_path / "model", saved)
    loaded = CheckpointFolder(tmp_path / "model").load(dtype=dtype)
    before, after = saved.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_saved_folder_remembers_how_records_are_read(make_checkpoint, tmp_path):
    tiling = Tiling(56, 1, 4, thumbnail=False, pad2square=True, pad_colour=(127, 102, 76))
    saved = replace(make_checkpoint(max_length=300), tiling=tiling)
    saved.model.pixel_mean, saved.model.pixel_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    save_checkpoint(tmp_path / "model", saved)
    loaded = CheckpointFolder(tmp_path / "model").load()
    for field in ("tiling", "tokens_per_tile", "max_length"):
        assert getattr(loaded, field) == getattr(saved, field), field
    assert (loaded.model.pixel_mean, loaded.model.pixel_std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    encoded = [x.prompt_encoder().encode("What?", ("two",), (1,)).sequences[0].tolist() for x in (saved, loaded)]
    assert encoded[0] == encoded[1]


def test_a_saved_model_gives_the_rewards_it_gave_before(checkpoint, scorer, pictures):
    records = [record(pictures["photo"], *RESPONSES)]
    assert Scorer(checkpoint).score(records) == scorer.score(records)


def test_limits_can_be_overridden_when_loading(folder):
    loaded = CheckpointFolder(folder).load(max_length=123, max_tiles=2)
    assert (loaded.max_length, loaded.tiling.max_tiles) == (123, 2)


def test_a_folder_without_a_score_weight_is_refused(checkpoint, tmp_path):
    state = {name: value for name, value in checkpoint.model.state_dict().items() if name != "score.weight"}
    save_checkpoint(tmp_path / "model", checkpoint, state)
    with pytest.raises(ValueError, match=r"model: no `score\.weight`: this is not a reward model"):
        Scorer.from_pretrained(tmp_path / "model", "cpu")


def test_a_folder_of_another_kind_of_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    with pytest.raises(ValueError, match=r"model_type is .clip.; expected `internvl`"):
        Scorer.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_an_incomplete_folder_is_refused_by_the_name_of_what_is_missing(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"no {missing}"):
        Scorer.from_pretrained(folder, "cpu")


def test_a_folder_with_a_weight_missing_is_refused(checkpoint, tmp_path):
    state = checkpoint.model.state_dict()
    name = next(name for name in state if "q_proj" in name and "language" in name)
    del state[name]
    save_checkpoint(tmp_path / "model", checkpoint, state)
    with pytest.raises(ValueError, match=r"no tensor language_model.*q_proj.weight, expected \[32, 32\]"):
        Scorer.from_pretrained(tmp_path / "model", "cpu")


def test_the_spread_over_batches_is_what_a_reward_changes_by_beside_others(scorer):
    assert batch_spread(scorer) < 1e-5
    score = scorer.score_groups
    raised = lambda scored: replace(scored, rewards=tuple(reward + 0.25 for reward in scored.rewards))  # noqa: E731
    scorer.score_groups = lambda groups: [raised(own) if len(groups) > 1 else own for own in score(groups)]
    assert batch_spread(scorer) == pytest.approx(0.25, abs=1e-5)


# several devices


@pytest.mark.parametrize("count", [2, 3])
def test_layers_placed_over_several_devices_give_the_same_bits(folder, scorer, pictures, monkeypatch, count):
    followed = set()
    follow = Copies.follow
    monkeypatch.setattr(Copies, "follow", lambda self, *call: followed.add(call[1]) or follow(self, *call))
    placed = Scorer.from_pretrained(folder, ",".join(["cpu"] * count))
    records = crowd(pictures, 6)
    assert placed.score(records) == scorer.score(records)
    assert followed >= {*placed.model.blocks(), *last_modules(placed.model)}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """InternVL3-78B in bf16, on the meta device."""
    folder = tmp_path_factory.mktemp("78B")
    (folder / "config.json").write_text(json.dumps(published_config("InternVL2.5-78B, 3-78B")))
    return CheckpointFolder(folder).model(torch.bfloat16)


def test_a_model_is_cut_into_runs_of_blocks_of_about_the_same_bytes(large):
    for count in (2, 3, 8):
        numbers = list(map(device_numbers(large, count).get, large.blocks()))
        assert numbers == sorted(numbers) and {*numbers} == {*range(count)}
        held = shares(large, count)
        assert sum(held) == nbytes(large) and max(held) < 1.06 * sum(held) / count


def test_a_model_is_on_as_few_gpus_as_hold_it_and_what_fills_them_is_refused_with_the_figures(large):
    gib = 1 << 30
    assert fewest_devices(large, [79 * gib] * 8, path="final") == 3
    assert fewest_devices(large, [141 * gib] * 8, path="final") == 2
    assert fewest_devices(large, [180 * gib], path="final") == 1
    figures = (
        r"final: its weights take 14\d\.\d GiB, on 2 GPU\(s\) up to 7\d\.\d of the 79\.0 of one.*--gpus-per-actor 3"
    )
    with pytest.raises(ValueError, match=figures):
        fewest_devices(large, [79 * gib] * 2, path="final")
