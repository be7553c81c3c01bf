"""sample_order: every record in every epoch, and steps that are a function of their number."""

import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.data.sample_order import BucketOrder, sample_position


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [[sample_position(7, 7 * e + i, seed=1) for i in range(7)] for e in range(4)]
    assert all(
        sorted(r for r, _ in epoch) == list(range(7)) and {v for _, v in epoch} == {e}
        for e, epoch in enumerate(epochs)
    )
    assert len({tuple(r for r, _ in epoch) for epoch in epochs}) > 1
    assert [sample_position(7, i, seed=1) for i in range(20)] != [
        sample_position(7, i, seed=2) for i in range(20)
    ]
    assert sample_position(7, 17, seed=1) == sample_position(7, 17, seed=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=17),
    st.integers(1, 7),
    st.integers(0, 5),
)
def test_every_record_comes_in_every_epoch_and_its_visits_count_up(groups, batch, seed):
    plan = BucketOrder(groups, batch, seed)
    assert plan.steps == sum(math.ceil(n / batch) for n in Counter(groups).values())
    counts, fillers = Counter(), Counter()
    for epoch in range(7):
        steps = [plan.visits(step) for step in range(epoch * plan.steps, (epoch + 1) * plan.steps)]
        assert all(
            len(rows) == batch and len({groups[record] for record, _ in rows}) == 1
            for rows in steps
        )
        visits = sorted(itertools.chain.from_iterable(steps))
        inside = Counter(record for record, _ in visits)
        assert set(inside) == set(range(len(groups)))
        fillers.update(inside - Counter(range(len(groups))))
        expected = []
        for record, n in inside.items():
            expected += [(record, counts[record] + i) for i in range(n)]
        assert visits == sorted(expected)  # 0, 1, 2 ... over the whole run
        counts.update(inside)
    for group in set(groups):
        filled = [fillers[record] for record, g in enumerate(groups) if g == group]
        assert max(filled) - min(filled) <= 1  # in turn


def test_a_step_is_a_function_of_its_number_and_epochs_differ():
    groups = ["a"] * 9 + ["b"] * 4 + ["c"]
    plan = BucketOrder(groups, 3, 1)
    forward = [plan.visits(step) for step in range(40)]
    assert [BucketOrder(groups, 3, 1).visits(step) for step in reversed(range(40))] == forward[::-1]
    assert forward != [BucketOrder(groups, 3, 2).visits(step) for step in range(40)]
    order = [
        "".join(groups[forward[step][0][0]] for step in range(e * plan.steps, (e + 1) * plan.steps))
        for e in range(6)
    ]
    assert len(set(order)) > 3 and {"".join(sorted(o)) for o in order} == {
        "aaabbc"
    }  # the groups are mixed, not one after another
