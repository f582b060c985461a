"""The order of waiting rows, without threads or an engine."""

from fakes import encoding
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket
from jaxembed_server.fair_queue import FairQueue, Flow, Waiting

LADDER = Ladder(Bucket(b, t) for b in (1, 4) for t in (4, 8, 16))


def flow(*lengths: int) -> Flow:
    return Flow(encodings=[encoding(*range(1, n + 1)) for n in lengths])


def drain(queue: FairQueue[Flow]) -> list[list[Waiting[Flow]]]:
    """Every batch, in order, each counted as run by one flow."""
    batches = []
    while (taken := queue.take()) is not None:
        bucket, rows = taken
        assert len(rows) <= bucket.batch_size
        assert all(len(row.encoding) <= bucket.seq_len for row in rows)
        queue.ran(rows, 1)
        batches.append(rows)
    return batches


@given(st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=12), max_size=6))
def test_every_row_comes_out_once(lengths: list[list[int]]) -> None:
    queue = FairQueue[Flow](LADDER)
    flows = [flow(*one) for one in lengths]
    for one in flows:
        queue.add(one, 0)
    assert queue.tokens == sum(map(sum, lengths))
    rows = [row for batch in drain(queue) for row in batch]
    assert sorted((flows.index(row.flow), row.item) for row in rows) == [
        (f, i) for f, one in enumerate(lengths) for i in range(len(one))
    ]
    assert queue.tokens == 0


def test_rows_of_a_dead_flow_are_dropped() -> None:
    queue = FairQueue[Flow](LADDER)
    gone, stays = flow(4, 4), flow(3)
    queue.add(gone, 0)
    queue.add(stays, 0)
    gone.dead = True
    assert [[row.flow for row in batch] for batch in drain(queue)] == [[stays]]
    queue.add(gone, 0)
    assert queue.take() is None
    assert queue.tokens == 0


def test_the_longest_rows_of_a_flow_go_first() -> None:
    queue = FairQueue[Flow](Ladder([Bucket(1, 16)]))
    queue.add(flow(3, 16, 7), 0)
    assert [row.item for batch in drain(queue) for row in batch] == [1, 2, 0]


def test_a_short_flow_passes_a_long_one_but_not_what_ran() -> None:
    queue = FairQueue[Flow](Ladder([Bucket(1, 16)]))
    bulk, query = flow(*[16] * 5), flow(4)
    queue.add(bulk, 0)
    _, first = queue.take() or (None, [])
    queue.ran(first, 1)
    queue.add(query, 0)
    assert [row.flow is query for batch in drain(queue) for row in batch] == [True, False, False, False, False]


def test_rows_given_back_keep_their_places() -> None:
    queue = FairQueue[Flow](Ladder([Bucket(1, 16)]))
    one, two = flow(5), flow(9)
    queue.add(one, 0)
    queue.add(two, 0)
    _, rows = queue.take() or (None, [])
    assert rows[0].flow is one
    assert not queue.outranks(rows[0])
    queue.give_back(rows)
    assert [row.flow for batch in drain(queue) for row in batch] == [one, two]


def test_what_is_more_urgent_outranks() -> None:
    queue = FairQueue[Flow](LADDER)
    queue.add(flow(5), 1)
    _, rows = queue.take() or (None, [])
    assert not queue.outranks(rows[0])
    urgent = flow(16)
    queue.add(urgent, 0)
    assert queue.outranks(rows[0])
    urgent.dead = True
    assert not queue.outranks(rows[0])


def test_full_is_a_whole_batch_of_tokens() -> None:
    queue = FairQueue[Flow](LADDER)
    queue.add(flow(16, 16, 16, 15), 0)
    assert not queue.full
    queue.add(flow(1), 0)
    assert queue.full
    queue.clear()
    assert queue.take() is None


def test_short_requests_can_be_taken_alone() -> None:
    """No more tokens than a part of the largest batch; dead ones go."""
    queue = FairQueue[Flow](Ladder([Bucket(1, 8), Bucket(2, 8), Bucket(4, 8)]))
    long, gone, *short = flow(8, 8), flow(2), flow(3), flow(3), flow(3)
    queue.add(long, 0)
    assert queue.take_short(8) is None
    gone.dead = True
    for one in (gone, *short):
        queue.add(one, 0)
    taken = queue.take_short(8)
    assert taken is not None
    assert [row.flow for row in taken[1]] == short[:2]
    assert [row.flow for row in queue.take_short(8)[1]] == short[2:]
    assert queue.take_short(8) is None
    assert queue.tokens == 16
    assert [[row.flow for row in batch] for batch in drain(queue)] == [[long, long]]


def test_short_requests_taken_alone_pass_long_ones_but_no_better_priority() -> None:
    """Rows of a long request that were left over come before a new query, which need not wait for them."""
    queue = FairQueue[Flow](Ladder([Bucket(1, 8), Bucket(2, 8), Bucket(4, 8)]))
    long, query = flow(8, 8), flow(3)
    queue.add(query, 0)
    queue.add(long, -1)
    assert queue.take_short(8) is None
    assert sum(map(len, drain(queue))) == 3
    queue.add(long, 0)
    queue.ran([Waiting(0, 0.0, 0, long, 0, 8)] * 9, 1)
    queue.add(query, 0)
    taken = queue.take_short(8)
    assert taken is not None and [row.flow for row in taken[1]] == [query]
    assert [[row.flow for row in batch] for batch in drain(queue)] == [[long, long]]


def test_rows_of_a_dead_flow_hold_nobody_up() -> None:
    queue = FairQueue[Flow](Ladder([Bucket(1, 8), Bucket(2, 8), Bucket(4, 8)]))
    gone, long, query = flow(8, 8), flow(8, 8), flow(3)
    queue.add(gone, -1)
    queue.add(long, 0)
    queue.add(query, 0)
    gone.dead = True
    assert queue.outranks(Waiting(1, 0.0, 0, long, 0, 8))
    taken = queue.take_short(8)
    assert taken is not None and [row.flow for row in taken[1]] == [query]
    assert queue.tokens == 16
