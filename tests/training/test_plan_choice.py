"""The search over measured times: against every combination, and in the cases that make it a search at all."""

import random
from itertools import product

import pytest

from fastpix2pix.kernels.conv_plan import ConvPlan
from fastpix2pix.kernels.wgrad_plan import WgradPlan
from fastpix2pix.training.convolution import Plans
from fastpix2pix.training.plan_choice import Term, Times, best_plans, least, predicted_ms

F = [ConvPlan(64, 64, 64, 1, 1, 4, 3), ConvPlan(128, 64, 64, 1, 1, 8, 3)]
W = WgradPlan(64, 64, 64, 1, 4, 3)
READERS = {("a", 1): [("b", 1), ("d", 1)], ("b", 1): [("c", 1)], ("c", 1): [("d", 1)]}


def times(draw: random.Random) -> Times:
    found = Times()
    found.forward[None, False, False] = draw.uniform(1, 2)
    for plan in F:
        for own, raw in product((False, True), repeat=2):
            found.forward[plan, own, raw] = draw.uniform(1, 2) - 0.7 * raw + 0.3 * own
    found.dgrad = {None: draw.uniform(1, 2), F[0]: draw.uniform(1, 2)}
    found.wgrad = {(None, False): draw.uniform(1, 2), (W, False): draw.uniform(1, 2), (W, True): draw.uniform(1, 2)}
    return found


def every_choice(table):
    options = [Plans(f, d, w) for f in (None, *F) for d in (None, F[0]) for w in (None, W)]
    for combined in product(options, repeat=len(table)):
        yield dict(zip(table, combined, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_every_combination(seed):
    """Three nodes can be tried out entirely."""
    draw = random.Random(seed)
    table = {key: times(draw) for key in (("b", 1), ("c", 1), ("d", 1))}
    found = predicted_ms(best_plans(table, READERS), table, READERS)
    best = min(predicted_ms(choice, table, READERS) for choice in every_choice(table))
    assert found == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_bits_of_a_u_net_are_the_best_of_all(seed):
    """Each map is read by the next node and by the one across."""
    draw, keys = random.Random(seed), [(str(n), 1) for n in range(8)]
    scopes = [(keys[n], *keys[n + 1 : n + 2], *([keys[7 - n]] if n < 3 else [])) for n in range(8)]
    terms = [Term(s, {bits: draw.random() for bits in product((False, True), repeat=len(s))}) for s in scopes]

    def total(bits) -> float:
        return sum(term.table[tuple(bits[k] for k in term.scope)] for term in terms)

    every = [dict(zip(keys, bits, strict=True)) for bits in product((False, True), repeat=8)]
    assert total(least(keys, terms)) == pytest.approx(min(map(total, every)))


def test_readers_pay_for_what_their_producer_saves():
    """b's own product is slower than the library's, but it spares a the pass between them."""
    a, b = Times(), Times()
    a.forward = {
        (None, False, False): 1.0,
        (F[0], False, False): 1.0,
        (F[0], True, False): 1.0,
        (F[0], False, True): 0.2,
    }
    b.forward = {(None, False, False): 1.0, (F[0], False, False): 1.3, (F[0], True, False): 1.3}
    for node in (a, b):
        node.dgrad = {None: 1.0}
        node.wgrad = {(None, False): 1.0, (W, False): 1.0, (W, True): 1.0}
    readers = {("a", 1): [("b", 1)]}
    found = best_plans({("a", 1): a, ("b", 1): b}, readers)
    assert found["a", 1].forward == F[0]
    assert found["b", 1].reads_sources
    b.forward[F[0], True, False] = 3.0  # now it costs more than that
    found = best_plans({("a", 1): a, ("b", 1): b}, readers)
    assert not found["b", 1].reads_sources


def test_a_node_without_the_librarys_time_is_left_alone():
    table = {("a", 1): times(random.Random(0)), ("b", 1): times(random.Random(1))}
    del table["a", 1].dgrad[None]
    assert list(best_plans(table, READERS)) == [("b", 1)]


def test_failed_plans_are_not_chosen():
    node = Times({(None, False, False): 5.0}, {None: 5.0, F[1]: 1.0}, {(None, False): 5.0})
    assert best_plans({("a", 1): node}, {}) == {("a", 1): Plans(None, F[1], None)}
