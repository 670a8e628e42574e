"""A record that kills the process that scores it is found, named and left out; the rest is scored."""

from collections import Counter

import pytest

from mmrm_fast.score.pool import score_alone


def asker(kills, records, questions):
    """Answers for processes that die over some records; `kills(records)` says over which."""

    def ask(method, *arguments):
        questions.append((method, *arguments))
        if method == "probe":
            return None if kills(list(arguments[0])) else True
        left = [record for record in records if record not in arguments[1]]
        return None if kills(left) else Counter(records=len(records), failed=len(arguments[1]))

    return ask


@pytest.mark.parametrize("poison", [[64], [127], [64, 65, 100], [], list(range(64, 128))], ids=str)
def test_every_record_that_kills_is_left_out_and_no_other(poison):
    records, questions = range(64, 128), []
    ask = asker(lambda asked: any(record in poison for record in asked), records, questions)
    assert score_alone(ask, 1, records) == Counter(records=64, failed=len(poison))
    assert questions[-1][0] == "score" and sorted(questions[-1][2]) == poison
    assert len(questions) <= 4 + len(poison) * (2 * 6 + 1)  # the chunk twice, a plain text; halves, alone once more


@pytest.mark.parametrize(
    ("kills", "reason"),
    [(lambda asked: True, "die over a plain text too"), (lambda asked: len(asked) > 40, "over none of them alone")],
    ids=["a broken machine", "too much for one process"],
)
def test_records_are_not_blamed_for_what_is_not_theirs(kills, reason):
    with pytest.raises(OSError, match=reason):
        score_alone(asker(kills, range(64), []), 0, range(64))
