"""A record that kills the process that scores it is found, named and left out; the rest is scored."""

import json
import os
import signal
from collections import Counter

import pytest

from mmrm_fast.checkpoint.folder import save_checkpoint
from mmrm_fast.cli import main
from mmrm_fast.data.records import RecordError
from mmrm_fast.score.command import ScoringActor
from mmrm_fast.score.pool import score_alone
from mmrm_fast.score.scored import Scored

pytestmark = pytest.mark.xdist_group("score")


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


@pytest.mark.usefixtures("cluster")
def test_a_record_that_kills_its_process_is_listed_and_the_rest_is_scored(
    make_checkpoint, tmp_path, monkeypatch, capsys
):
    class Constant:
        """A scorer that loads nothing: five processes come and go."""

        def score_groups(self, groups):
            return [
                group
                if isinstance(group, RecordError)
                else Scored(group, (1.0,), (False,), num_tokens=1, num_tokens_unshared=1)
                for group in groups
            ]

    class Mortal(ScoringActor):
        """Dies over a certain record, as inside a broken decoder."""

        def load(self):
            self.scorer = Constant()

        def groups(self, positions, fatal):
            found = super().groups(positions, fatal)
            if any(getattr(group, "id", None) == "poison" for group in found):
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    monkeypatch.setattr("mmrm_fast.score.command.ScoringActor", Mortal)
    save_checkpoint(tmp_path / "model", make_checkpoint(max_length=256))
    rows = [{"id": "poison" if i == 65 else str(i), "prompt": "p", "responses": ["a"]} for i in range(66)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--actors", "1"]
    assert main(["score", *arguments, "--out", str(tmp_path / "out.jsonl")]) == 3
    scores = [json.loads(line)["record"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert scores == list(range(65))
    assert "rows.jsonl:66: its process died twice" in capsys.readouterr().out
