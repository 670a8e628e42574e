"""plan_trie packs a forest of token tries: hand-written cases, then both backends over random forests."""

from dataclasses import fields

import numpy as np
import pytest

from mmrm_fast.ops.plan_trie import TriePlan, plan_trie, plan_trie_ref


@pytest.fixture(params=["ref", "cpu"])
def backend(request):
    if request.param == "ref":
        return plan_trie_ref
    import mmrm_fast._native  # noqa: F401, a missing build fails here instead of being skipped

    return lambda keys, cu_seqlens, min_shared: plan_trie(keys, cu_seqlens, min_shared=min_shared)


def join(sequences):
    return np.array([key for s in sequences for key in s], dtype=np.int64), np.cumsum([0] + [len(s) for s in sequences])


def nodes(plan: TriePlan, keys: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Per node: its keys, and the keys it attends to."""
    packed = keys[plan.token_index]
    q, k = plan.cu_seqlens_q, plan.cu_seqlens_k
    return [
        (packed[q[m] : q[m + 1]].tolist(), packed[plan.kv_index[k[m] : k[m + 1]]].tolist()) for m in range(len(q) - 1)
    ]


def assert_plans_equal(actual: TriePlan, expected: TriePlan) -> None:
    for field in fields(TriePlan):
        np.testing.assert_array_equal(
            getattr(actual, field.name), getattr(expected, field.name), strict=True, err_msg=field.name
        )


def assert_replays(plan: TriePlan, sequences: list[list[int]], keys: np.ndarray) -> None:
    """What a sequence's last token attends to, up to itself, is that sequence."""
    for sequence, last in zip(sequences, plan.last_index, strict=True):
        m = np.searchsorted(plan.cu_seqlens_q, last, side="right") - 1
        visible = plan.kv_index[plan.cu_seqlens_k[m] : plan.cu_seqlens_k[m + 1]]
        path = visible[: len(visible) - (plan.cu_seqlens_q[m + 1] - 1 - last)]
        assert keys[plan.token_index[path]].tolist() == sequence
        assert plan.position_ids[path].tolist() == list(range(len(sequence)))


def random_forest(rng: np.random.Generator) -> list[list[int]]:
    """Sequences that extend, cut or repeat earlier ones, over a small alphabet."""
    sequences: list[list[int]] = []
    for _ in range(rng.integers(1, 14)):
        base = sequences[rng.integers(len(sequences))] if sequences and rng.random() < 0.85 else []
        kept = base[: rng.integers(len(base) + 1)]
        sequences.append((kept + rng.integers(-2, 3, rng.integers(0, 9)).tolist()) or [0])
    return sequences


def test_a_shared_prefix_is_one_node(backend):
    keys, cu_seqlens = join([[7, 8, 9, 1, 2], [7, 8, 9, 3]])
    plan = backend(keys, cu_seqlens, 3)
    assert nodes(plan, keys) == [
        ([7, 8, 9], [7, 8, 9]),
        ([1, 2], [7, 8, 9, 1, 2]),
        ([3], [7, 8, 9, 3]),
    ]
    assert plan.token_index.tolist() == [0, 1, 2, 3, 4, 8]
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert plan.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert plan.kv_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert plan.cu_seqlens_k.tolist() == [0, 3, 8, 12]
    assert plan.last_index.tolist() == [4, 5]


def test_a_short_shared_run_is_recomputed(backend):
    keys, cu_seqlens = join([[7, 8, 1], [7, 8, 2]])
    assert nodes(backend(keys, cu_seqlens, 3), keys) == [([7, 8, 1], [7, 8, 1]), ([7, 8, 2], [7, 8, 2])]


def test_a_recomputed_run_counts_towards_the_next_node(backend):
    keys, cu_seqlens = join([[7, 8, 8, 1], [7, 8, 8, 2], [7, 9]])
    assert [own for own, _ in nodes(backend(keys, cu_seqlens, 3), keys)] == [[7, 8, 8], [1], [2], [7, 9]]


def test_three_levels(backend):
    keys, cu_seqlens = join([[5, 5, 6, 6, 1], [5, 5, 6, 6, 2], [5, 5, 7, 7]])
    plan = backend(keys, cu_seqlens, 2)
    assert nodes(plan, keys) == [
        ([5, 5], [5, 5]),
        ([6, 6], [5, 5, 6, 6]),
        ([1], [5, 5, 6, 6, 1]),
        ([2], [5, 5, 6, 6, 2]),
        ([7, 7], [5, 5, 7, 7]),
    ]
    assert plan.last_index.tolist() == [4, 5, 7]


def test_duplicates_are_computed_once(backend):
    keys, cu_seqlens = join([[4, 5], [4, 5], [4, 5]])
    plan = backend(keys, cu_seqlens, 1)
    assert plan.token_index.tolist() == [0, 1]
    assert plan.last_index.tolist() == [1, 1, 1]


def test_a_prefix_rides_inside_the_longer_sequence(backend):
    keys, cu_seqlens = join([[4, 5], [4, 5, 6, 7], [4, 5, 6]])
    plan = backend(keys, cu_seqlens, 32)
    assert nodes(plan, keys) == [([4, 5, 6, 7], [4, 5, 6, 7])]
    assert plan.token_index.tolist() == [0, 1, 4, 5], "each token from the smallest index that carries it"
    assert plan.last_index.tolist() == [1, 3, 2]


def test_a_passenger_of_a_recomputed_run_ends_in_the_lexicographically_next_sequence(backend):
    keys, cu_seqlens = join([[4, 9], [4], [4, 3]])
    plan = backend(keys, cu_seqlens, 32)
    assert nodes(plan, keys) == [([4, 9], [4, 9]), ([4, 3], [4, 3])]
    assert plan.token_index.tolist() == [0, 1, 2, 4], "[4] is carried by sequence 1, before sequence 2"
    assert plan.last_index.tolist() == [1, 2, 3]


def test_packed_order_follows_the_input_order(backend):
    keys, cu_seqlens = join([[9], [2], [5], [2, 1], [0]])
    assert [own for own, _ in nodes(backend(keys, cu_seqlens, 1), keys)] == [[9], [2, 1], [5], [0]]


def test_image_keys_are_keys_like_any_other(backend):
    keys, cu_seqlens = join([[1, -3, -3, 2], [1, -3, -3, 4], [1, -9, -9, 2]])
    assert [own for own, _ in nodes(backend(keys, cu_seqlens, 2), keys)] == [[1, -3, -3], [2], [4], [1, -9, -9, 2]]


@pytest.mark.parametrize("sequences", [[], [[3]]])
def test_smallest_batches(backend, sequences):
    keys, cu_seqlens = join(sequences)
    plan = backend(keys, cu_seqlens, 32)
    assert plan.token_index.tolist() == plan.kv_index.tolist() == plan.last_index.tolist() == [0] * len(sequences)
    assert plan.cu_seqlens_q.tolist() == plan.cu_seqlens_k.tolist() == [*range(len(sequences) + 1)]


@pytest.mark.parametrize("seed", range(100))
def test_random_forests_replay_and_backends_agree(backend, seed):
    sequences = random_forest(np.random.default_rng(seed))
    keys, cu_seqlens = join(sequences)
    for min_shared in (1, 2, 4, 32):
        plan = backend(keys, cu_seqlens, min_shared)
        assert_replays(plan, sequences, keys)
        assert_plans_equal(plan, plan_trie_ref(keys, cu_seqlens, min_shared))


def test_with_min_shared_one_no_prefix_is_computed_twice(backend):
    sequences = random_forest(np.random.default_rng(1))
    keys, cu_seqlens = join(sequences)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(backend(keys, cu_seqlens, 1).token_index) == len(prefixes)


def test_deep_tries_do_not_recurse(backend):
    sequences = [[0] * n + [1] for n in range(1200)]
    keys, cu_seqlens = join(sequences)
    plan = backend(keys, cu_seqlens, 1)
    assert len(plan.token_index) == 2 * 1200 - 1
    assert_replays(plan, sequences, keys)


def test_public_function_takes_strided_keys():
    keys, cu_seqlens = join([[7, 8, 9, 1, 2], [7, 8, 9, 3]])
    assert_plans_equal(plan_trie(np.repeat(keys, 2)[::2], cu_seqlens, min_shared=3), plan_trie_ref(keys, cu_seqlens, 3))


@pytest.mark.parametrize(
    ("keys", "cu_seqlens", "min_shared", "message"),
    [
        ([1, 2, 3], [0, 2, 2, 3], 1, "sequence 1 is empty: cu_seqlens goes from 2 to 2"),
        ([1, 2, 3], [0, 4, 3], 1, "sequence 1 is empty: cu_seqlens goes from 4 to 3"),
        ([1, 2, 3], [0, 2], 1, "must run from 0 to 3 tokens"),
        ([1, 2, 3], [1, 3], 1, "must run from 0 to 3 tokens"),
        ([], [], 1, "must run from 0 to 0 tokens"),
        ([[1, 2]], [0, 2], 1, r"keys must be 1-D int64, got shape \(1, 2\)"),
        ([1, 2], [0, 2], 0, "min_shared must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_named(keys, cu_seqlens, min_shared, message):
    with pytest.raises(ValueError, match=message):
        plan_trie(np.array(keys, dtype=np.int64), np.array(cu_seqlens, dtype=np.int64), min_shared=min_shared)


def test_more_tokens_than_int32_edges_can_count_are_refused():
    keys = np.broadcast_to(np.int64(0), 1 << 30)  # takes no memory
    with pytest.raises(ValueError, match=r"1,073,741,824 tokens in one plan, at most 1,073,741,823"):
        plan_trie(keys, np.array([0, keys.size]))


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_gathers_at_most_two_keys_a_token(seed):
    keys, cu_seqlens = join(random_forest(np.random.default_rng(seed)))
    assert len(plan_trie(keys, cu_seqlens, min_shared=1).kv_index) <= 2 * len(keys)


def test_wrong_dtype_is_named():
    with pytest.raises(ValueError, match=r"cu_seqlens must be 1-D int64, got shape .* int32"):
        plan_trie(np.zeros(2, dtype=np.int64), np.array([0, 2], dtype=np.int32))
