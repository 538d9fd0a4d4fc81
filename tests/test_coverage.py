"""Coverage arithmetic: exact set differences of ranges and blocks, fast for a million."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.coverage import missing, missing_blocks, without
from tasks.block import Block

RANGES = st.lists(
    st.builds(lambda a, n: range(a, a + n), st.integers(0, 60), st.integers(0, 20)), max_size=12
)


@given(wanted=RANGES, have=RANGES)
def test_missing_is_set_difference_in_the_fewest_ranges(wanted: list[range], have: list[range]):
    expected = set().union(*wanted) - set().union(*have)
    found = missing(wanted, have)
    assert [i for r in found for i in r] == sorted(expected)
    assert all(a.stop < b.start for a, b in pairwise(found))


def test_missing_handles_indices_of_many_draws():
    far = 7_000_000_000
    assert missing([range(far, far + 10)], [range(far + 2, far + 5)]) == [
        range(far, far + 2),
        range(far + 5, far + 10),
    ]
    assert missing([], [range(3)]) == []


def test_missing_is_exact_for_a_million_ranges():
    size, num_ranges = 10, 1_000_000
    have = [range(i * size, (i + 1) * size) for i in range(num_ranges)]
    random.Random(2).shuffle(have)
    dropped = [have.pop()]
    wanted = [range(0, size * num_ranges)]
    assert missing(wanted, have) == dropped
    assert missing(have, wanted) == []


def pairs(blocks: list[Block]) -> list[tuple[int, int]]:
    return [(s, d) for b in blocks for d in b.draws for s in b.samples]


def span(most: int):
    return st.builds(lambda a, n: range(a, a + n), st.integers(0, most), st.integers(1, most))


BLOCKS = st.lists(st.builds(Block, span(12), span(5)), max_size=8)


@given(wanted=st.builds(Block, span(12), span(5)), have=BLOCKS)
def test_missing_blocks_are_the_set_difference_without_overlap(wanted: Block, have: list[Block]):
    found = pairs(missing_blocks(wanted, have))
    assert len(found) == len(set(found))
    assert set(found) == set(pairs([wanted])) - set(pairs(have))


@given(blocks=st.lists(st.builds(Block, span(9), st.just(range(1))), max_size=4), have=BLOCKS)
def test_without_keeps_what_others_do_not_cover(blocks: list[Block], have: list[Block]):
    assert set(pairs(without(blocks, have))) == set(pairs(blocks)) - set(pairs(have))


def test_equal_bands_of_draws_are_one_block():
    wanted = Block(range(100), range(8))
    assert missing_blocks(wanted, []) == [wanted]
    assert missing_blocks(wanted, [Block(range(100), range(2))]) == [Block(range(100), range(2, 8))]
    have = [Block(range(40), range(0, 2)), Block(range(40), range(2, 4))]
    assert missing_blocks(Block(range(100), range(4)), have) == [Block(range(40, 100), range(4))]
