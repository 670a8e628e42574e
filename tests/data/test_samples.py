"""Records to samples: only paired responses are encoded, overlong ones follow the policy, faults are found."""

import base64
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrm_fast.data.records import Group, Pair, Pairs, RecordError, RecordFile
from mmrm_fast.data.samples import GroupDataset, PreferenceDataset, fault, only_paired
from mmrm_fast.train.proxy import ProxyMargins

LONG = "I think so. " * 40


def group(*responses, pairs=(), truth=None, prompt="What?", images=()):
    return Group("file.jsonl:1", 0, None, prompt, None, tuple(images), responses, Pairs.of(*pairs), truth)


@pytest.fixture
def make_dataset(make_checkpoint):
    def make(files=(), *, kind=PreferenceDataset, max_length=100, **options):
        checkpoint = make_checkpoint(max_length=max_length)
        return kind(files, checkpoint.prompt_encoder(), checkpoint.tiling, **options)

    return make


# only_paired


def test_responses_without_a_pair_are_left_out():
    kept = only_paired(group("a", "b", "c", "d", pairs=[Pair(3, 1, 0.5), Pair(1, 3)], truth=(0, 1, 2, 3)))
    assert kept.responses == ("b", "d")
    assert kept.pairs == Pairs.of((1, 0, 0.5), (0, 1))
    assert kept.truth == (1, 3)


def test_a_group_whose_responses_are_all_paired_stays_as_it_is():
    whole = group("a", "b", "c", pairs=[Pair(0, 1), Pair(2, 1)])
    assert only_paired(whole) is whole


def test_a_group_without_pairs_keeps_no_response():
    assert only_paired(group("a", "b")).responses == ()


# samples


def test_records_of_several_files_follow_each_other(make_dataset, write_jsonl):
    names = [["a", "b"], [], ["c"]]
    files = [
        RecordFile(write_jsonl([{"prompt": p, "responses": ["x"]} for p in prompts], f"{i}.jsonl"))
        for i, prompts in enumerate(names)
    ]
    dataset = make_dataset(files, kind=GroupDataset)
    assert [dataset[index].group.prompt for index in range(len(dataset))] == ["a", "b", "c"]


def test_scoring_encodes_every_response_and_training_only_the_paired(make_dataset):
    record = group("a", "b", "c", pairs=[Pair(0, 2)])
    assert len(make_dataset(kind=GroupDataset).encode(record).main.sequences) == 3
    assert len(make_dataset().encode(record).main.sequences) == 2


def test_loaded_tiles_are_those_that_were_counted(make_dataset, pictures):
    dataset = make_dataset(max_length=512)
    sample = dataset.encode(group("a", "b", pairs=[Pair(0, 1)], images=[pictures["photo"], pictures["square"]]))
    assert sample.tiles_per_image == (7, 1)
    assert [len(tiles) for tiles in dataset.load(sample)] == [7, 1]


@pytest.mark.parametrize("prompt", ["What?", "<image>\nWhat?"])
def test_the_proxy_sees_the_same_record_without_its_image(make_dataset, pictures, prompt):
    pairs = [Pair(0, 1)]
    seeing = make_dataset(with_text=True).encode(group("a", "b", pairs=pairs, prompt=prompt, images=[pictures["wide"]]))
    blind = make_dataset().encode(group("a", "b", pairs=pairs))
    for text, main in zip(seeing.text.sequences, blind.main.sequences, strict=True):
        assert text.tolist() == main.tolist()


def test_removing_a_slot_makes_no_new_one(make_dataset, pictures):
    sample = make_dataset(with_text=True).encode(
        group("a", "b", pairs=[Pair(0, 1)], prompt="<ima<image>ge>", images=[pictures["wide"]])
    )
    assert all((sequence >= 0).all() for sequence in sample.text.sequences)


@pytest.mark.parametrize(
    ("prompt", "image", "field"),
    [("<image> and <image>", "square", "prompt"), (LONG, "square", "prompt"), ("What?", None, "img_path")],
    ids=["wrong slots", "prefix too long", "no such image"],
)
def test_a_group_that_cannot_be_encoded_is_an_error_naming_its_line_and_field(
    make_dataset, pictures, prompt, image, field
):
    with pytest.raises(RecordError) as caught:
        make_dataset().encode(group("a", prompt=prompt, images=[pictures.get(image, "/none.png")]))
    assert (caught.value.source, caught.value.field) == ("file.jsonl:1", field)


def test_a_white_proxy_sees_one_tile_in_place_of_each_image(make_dataset, pictures):
    record = group(
        "a", "b", pairs=[Pair(0, 1)], prompt="<image> or <image>?", images=[pictures["photo"], pictures["wide"]]
    )
    sample = make_dataset(with_text=True, proxy_image="white", max_length=512).encode(record)
    assert [(sequence < 0).sum() for sequence in sample.text.sequences] == [2 * 4, 2 * 4]
    assert [(sequence < 0).sum() for sequence in sample.main.sequences] == [10 * 4, 10 * 4]


def test_text_inputs_are_a_white_tile_for_each_image_whatever_it_is(make_dataset):
    dataset = make_dataset(inputs="text", kind=GroupDataset)
    sample = dataset.encode(group("a", images=["/none.png", "/none either.png"]))
    assert sample.tiles_per_image == (1, 1)
    assert [tiles.min() for tiles in dataset.load(sample)] == [255, 255]


def test_image_inputs_have_no_question(make_dataset, pictures):
    dataset = make_dataset(inputs="image", kind=GroupDataset)
    asked = dataset.encode(group("a", prompt="What is it?", images=[pictures["wide"]]))
    unasked = dataset.encode(group("a", prompt="", images=[pictures["wide"]]))
    assert asked.main.sequences[0].tolist() == unasked.main.sequences[0].tolist()
    assert asked.group.prompt == "What is it?"


def test_encoded_images_are_read_again_instead_of_carried_along(make_dataset, write_jsonl, pictures):
    content = base64.b64encode(Path(pictures["wide"]).read_bytes()).decode()
    images = ["data:image/png;base64," + content, pictures["square"]]
    records = [{"prompt": "first", "responses": ["a"]}, {"prompt": "p", "images": images, "responses": ["a"]}]
    dataset = make_dataset([RecordFile(write_jsonl(records))], kind=GroupDataset)
    sample = dataset.select(np.array([1]))[0]
    assert sample.group.images == ()
    assert [len(tiles) for tiles in dataset.load(sample)] == list(sample.tiles_per_image) == [3, 1]
    assert len(pickle.dumps(sample)) < 5000


# overlong responses


def test_skip_drops_only_the_pairs_of_the_overlong_response(make_dataset):
    pairs = [Pair(0, 1), Pair(1, 2), Pair(0, 2), Pair(2, 3)]
    sample = make_dataset(overlong="skip", with_text=True).encode(group("a", LONG, "b", "c", pairs=pairs))
    assert sample.group.responses == ("a", "b", "c")
    assert sample.group.pairs == Pairs.of((0, 1), (1, 2))
    assert [note.field for note in sample.dropped] == ["response 1"]
    assert len(sample.main.sequences) == len(sample.text.sequences) == 3
    assert not any(sample.main.truncated)


def test_skip_drops_responses_that_are_left_without_a_pair(make_dataset):
    sample = make_dataset(overlong="skip").encode(group("a", LONG, "b", "c", pairs=[Pair(0, 1), Pair(2, 3)]))
    assert sample.group.responses == ("b", "c")
    assert sample.group.pairs == Pairs.of((0, 1))


def test_margins_of_a_file_stay_with_their_pairs_where_a_response_is_left_out(make_dataset, write_jsonl):
    pairs = [Pair(a, b) for a in range(4) for b in range(a + 1, 4)]
    rows = [{"record": 0, "chosen": p.chosen, "rejected": p.rejected, "proxy_margin": i} for i, p in enumerate(pairs)]
    sample = make_dataset(overlong="skip").encode(group("a", LONG, "b", "c", pairs=pairs))
    margins = ProxyMargins(write_jsonl(rows, "margins.jsonl")).of([sample])
    assert margins.tolist() == [pairs.index(Pair(*pair)) for pair in ((0, 2), (0, 3), (2, 3))]


def test_skip_leaves_nothing_of_a_record_whose_every_pair_is_overlong(make_dataset):
    sample = make_dataset(overlong="skip").encode(group(LONG, "a", pairs=[Pair(0, 1)]))
    assert (len(sample.group.pairs), sample.main.sequences) == (0, ())
    assert len(sample.dropped) == 1


def test_truncate_keeps_every_pair_and_says_what_was_cut(make_dataset):
    sample = make_dataset(overlong="truncate").encode(group("a", LONG, pairs=[Pair(0, 1)]))
    assert sample.group.pairs == Pairs.of((0, 1))
    assert sample.main.truncated == (False, True)
    assert [len(sequence) <= 100 for sequence in sample.main.sequences] == [True, True]
    assert sample.dropped == ()


def test_error_names_the_response(make_dataset):
    with pytest.raises(RecordError, match="response 1: does not fit into --max-length 100"):
        make_dataset(overlong="error").encode(group("a", LONG, pairs=[Pair(0, 1)]))


def test_with_the_habits_of_the_reference_every_overlong_response_is_cut(make_dataset):
    dataset = make_dataset(overlong="error")
    dataset.encoder.compat = "reference"
    sample = dataset.encode(group("a", LONG, pairs=[Pair(0, 1)]))
    assert (sample.group.pairs, sample.main.truncated) == (Pairs.of((0, 1)), (False, True))


@pytest.mark.parametrize("overlong", ["skip", "truncate", "error"])
def test_an_overlong_response_in_no_pair_does_not_matter(make_dataset, overlong):
    sample = make_dataset(overlong=overlong).encode(group("a", LONG, "b", pairs=[Pair(0, 2)]))
    assert sample.group.responses == ("a", "b")
    assert sample.dropped == ()


# check


@pytest.fixture
def faulty(tmp_path, pictures, write_jsonl, make_dataset):
    """A data set with one fault a line, but for lines 1 and 7."""
    truncated = tmp_path / "truncated.png"
    Image.effect_noise((100, 100), 50).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    good = {"prompt": "p", "img_path": pictures["square"], "chosen": "a", "rejected": "b"}
    return make_dataset(
        [
            RecordFile(
                write_jsonl(
                    [
                        good,
                        '{"prompt":',
                        {"prompt": "p", "chosen": "a"},
                        {**good, "img_path": "none.png"},
                        {**good, "prompt": LONG},
                        {**good, "img_path": str(truncated)},
                        good,
                        {**good, "rejected": LONG},
                    ]
                )
            )
        ],
        overlong="error",
    )


def line_of(error):
    return int(error.source.rpartition(":")[2])


@pytest.mark.parametrize(("decode", "lines"), [(False, [2, 3, 4, 5, 8]), (True, [2, 3, 4, 5, 6, 8])])
def test_every_fault_is_found_and_nothing_else(faulty, decode, lines):
    errors = [fault(faulty, index, decode=decode) for index in range(len(faulty))]
    assert [line_of(error) for error in errors if error] == lines


# selections and pairs


@pytest.fixture
def kwise(make_dataset, write_jsonl):
    """Three records of 3, 0 and 1 pairs, the second of which cannot be parsed."""

    def completions(*ratings):
        return {
            "annotations": [{"Helpfulness": {"Rating": rating}} for rating in ratings],
            "response": [f"answer {rating}" for rating in ratings],
        }

    records = [
        {"prompt": "a", "completions": completions(3, 2, 1)},
        "{",
        {"prompt": "c", "completions": completions(1, 2)},
    ]
    return make_dataset([RecordFile(write_jsonl(records))])


def test_a_selection_is_a_data_set_of_those_records(kwise):
    last = kwise.select(np.array([0, 2])).select(np.array([1]))
    assert (len(last), last.group(0).prompt, last.records_per_file()) == (1, "c", [1])
    assert len(kwise) == 3


def test_every_pair_can_be_a_sample_of_its_own(kwise):
    counts = np.array([kwise.num_pairs(index) for index in range(3)])
    assert counts.tolist() == [3, 0, 1]
    pairs = kwise.expanded(counts)
    assert [pairs.group(index).pairs for index in (0, 1, 2, 4)] == [
        Pairs.of(pair) for pair in ((0, 1), (0, 2), (1, 2), (1, 0))
    ]
    assert len(pairs[0].group.responses) == 2
    with pytest.raises(RecordError):
        pairs[3]


def test_random_pairs_of_a_record_are_always_the_same_for_a_seed(kwise):
    assert [len(kwise.sampled(2, 0).group(index).pairs) for index in (0, 2)] == [2, 1]
    assert kwise.sampled(2, 0).group(0) == kwise.sampled(2, 0).group(0)
    assert len({tuple(kwise.sampled(1, seed).group(0).pairs) for seed in range(20)}) == 3
