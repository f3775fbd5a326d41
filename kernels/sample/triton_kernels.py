"""The kernels behind `triton_impl.py`.

A weight is exp((logit - largest) / temperature), at most 1. Sums of weights are sums of integers, weights in units of 2^-44: they have
no order, so a row's sums are the same however it is cut up, and numbers equal to those of fp64 sums to 1e-7.

A search finds the largest key for which the tokens of at least that key weigh `goal` or more, four bits of the key at a time: every
run of the vocabulary adds up its tokens by their next four bits, the next launch reads all runs' sums and knows one digit more.
    TOP_K    keys: logits;                     each token weighs 1;          goal: k
    NUCLEUS  keys: weights;                    a token's weight;             goal: top_p of all
    DRAW     keys: weights if the row has a top_p, else ids from the lowest; goal: the draw's part of all
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

TOP_K = tl.constexpr(0)
NUCLEUS = tl.constexpr(1)
DRAW = tl.constexpr(2)
UNIT = tl.constexpr(2.0**44)


@triton.jit
def peaks_kernel(logits, peaks, stride, vocab, BLOCK: tl.constexpr):
    """Grid (row, run): the run's largest logit; +inf if it holds a NaN."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    tl.store(peaks + row * tl.num_programs(1) + tl.program_id(1), tl.max(tl.where(value == value, value, float("inf")), 0))


@triton.jit
def row_peak(peaks, row, num_runs, BLOCK_RUNS: tl.constexpr):
    r = tl.arange(0, BLOCK_RUNS)
    return tl.max(tl.load(peaks + row * num_runs + r, mask=r < num_runs, other=float("-inf")), 0)


@triton.jit
def _usable(peak):
    return (peak > float("-inf")) & (peak < float("inf"))


@triton.jit
def uniform(seed, position):
    """53 bits of Philox 4x32-10 in [0, 1), fp64; the words are kept in 64 bits."""
    mask: tl.constexpr = 0xFFFFFFFF
    c0, c1 = (position & mask).to(tl.uint64), ((position >> 32) & mask).to(tl.uint64)
    k0, k1 = (seed & mask).to(tl.uint64), ((seed >> 32) & mask).to(tl.uint64)
    c2, c3 = c0 & 0, c0 & 0
    m0, m1 = (c0 & 0) + 0xD2511F53, (c0 & 0) + 0xCD9E8D57
    w0, w1 = (c0 & 0) + 0x9E3779B9, (c0 & 0) + 0xBB67AE85
    for _ in tl.static_range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return (((c0 << 32) | c1) >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def _weight(value, peak, inverse):
    return tl.exp((value - peak) * inverse)


@triton.jit
def _units(weight):
    return (weight * UNIT).to(tl.int64)


@triton.jit
def _logit_key(value):
    """fp32 as uint32 in the same order."""
    value = tl.where(value == 0.0, 0.0, value)  # -0 is 0
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _logit_of(key):
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _active(SEARCH: tl.constexpr, inverse, top_k, top_p, vocab):
    active = inverse > 0
    if SEARCH == TOP_K:
        active = active & (top_k > 0) & (top_k < vocab)
    if SEARCH == NUCLEUS:
        active = active & (top_p < 1.0)
    return active


@triton.jit
def _goal(SEARCH: tl.constexpr, total, top_k, top_p, nucleus_mass, seeds, positions, row):
    """Units (or tokens) that the search must reach, at least 1."""
    if SEARCH == TOP_K:
        goal = total * 0 + top_k
    elif SEARCH == NUCLEUS:
        goal = tl.minimum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), total)
    else:
        mass = tl.where(top_p < 1.0, nucleus_mass, total)
        draw = uniform(tl.load(seeds + row), tl.load(positions + row))
        goal = tl.minimum((draw * mass.to(tl.float64)).to(tl.int64) + 1, mass)
    return tl.maximum(goal, 1)


@triton.jit
def descend(
    SEARCH: tl.constexpr, partial, state, row, num_rows, num_runs, level, top_k, top_p, nucleus_mass, seeds, positions,
    BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """(digits so far, what weighs above them, goal) once the sums of `level` are there. The draw is made once, at level 0."""
    r = tl.arange(0, BLOCK_RUNS)
    digit = tl.arange(0, 16)
    sums = tl.load(partial + (row * num_runs + r)[:, None] * 16 + digit[None, :], mask=(r < num_runs)[:, None], other=0)
    sums = tl.sum(sums, 0)
    total = tl.sum(sums, 0)
    prefix, above, goal = total * 0, total * 0, total * 0
    if level == 0:
        goal = _goal(SEARCH, total, top_k, top_p, nucleus_mass, seeds, positions, row)
    else:
        at = state + ((level * num_rows + row) * 3)
        prefix, above, goal = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    # what weighs at least digit d, for every d: the sum over the digits from d on
    from_digit = above + tl.sum(tl.where(digit[None, :] >= digit[:, None], sums[None, :], 0), 1)
    found = tl.max(tl.where(from_digit >= goal, digit, 0), 0)
    above += tl.sum(tl.where(digit > found, sums, 0), 0)
    return prefix * 16 + found, above, goal


@triton.jit
def search_kernel(
    logits, peaks, cuts, nucleus, partial_before, partial, state, inverse_temperature, top_k, top_p, seeds, positions,
    stride, vocab, num_rows, level,
    SEARCH: tl.constexpr, TRUNCATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (row, run): sums of the run by digit number `level`. The first run's program keeps what is known for the next launch."""
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    num_runs = tl.num_programs(1)
    inverse = tl.load(inverse_temperature + row)
    k, p = 0, 1.0
    if TRUNCATE:
        k, p = tl.load(top_k + row), tl.load(top_p + row)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    if _active(SEARCH, inverse, k, p, vocab) & _usable(peak):
        sorted_row = p < 1.0
        lowest_key, mass = tl.load(nucleus + row * 2), tl.load(nucleus + row * 2 + 1)
        prefix = mass * 0
        if level > 0:
            prefix, above, goal = descend(
                SEARCH, partial_before, state, row, num_rows, num_runs, level - 1, k, p, mass, seeds, positions, BLOCK_RUNS
            )
            if run == 0:
                at = state + ((level * num_rows + row) * 3)
                tl.store(at, prefix)
                tl.store(at + 1, above)
                tl.store(at + 2, goal)
        index = run * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        counted = index < vocab
        if SEARCH == TOP_K:
            key = _logit_key(value)
            units = tl.full([BLOCK], 1, tl.int64)
        else:
            counted = counted & (value >= tl.load(cuts + row))
            weight = _weight(value, peak, inverse)
            key = weight.to(tl.uint32, bitcast=True)
            units = _units(weight)
        if SEARCH == DRAW:
            counted = counted & ((not sorted_row) | (key.to(tl.int64) >= lowest_key))
            key = tl.where(sorted_row, key, 0x7FFFFFFF - index.to(tl.uint32))
        shift = 28 - 4 * level
        digits = key >> shift.to(tl.uint32)
        counted = counted & ((digits >> 4).to(tl.int64) == prefix)
        mine = (digits & 15).to(tl.int32)
        units = tl.where(counted, units, 0)
        digit = tl.arange(0, 16)
        sums = tl.zeros([16], tl.int64)
        for d in tl.static_range(16):
            sums = tl.where(digit == d, tl.sum(tl.where(mine == d, units, 0), 0), sums)
        tl.store(partial + (row * num_runs + run) * 16 + digit, sums)


@triton.jit
def begin_kernel(cuts, nucleus, partial, state, num_runs):
    """Grid (row): what the first search reads although it needs none of it, so that nothing a plan reads starts as garbage."""
    row = tl.program_id(0).to(tl.int64)
    digit = tl.arange(0, 16)
    tl.store(cuts + row, float("-inf"))
    tl.store(nucleus + row * 2 + digit, tl.zeros([16], tl.int64), mask=digit < 2)
    tl.store(state + row * 3 + digit, tl.zeros([16], tl.int64), mask=digit < 3)
    tl.store(partial + row * num_runs * 16 + digit, tl.zeros([16], tl.int64))


@triton.jit
def cut_kernel(
    peaks, partial, state, cuts, inverse_temperature, top_k, min_p_gap, vocab, num_rows, num_runs,
    TRUNCATE: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (row): the smallest logit that top-k and min-p keep."""
    row = tl.program_id(0).to(tl.int64)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    # in fp64, rounded once; the likeliest token is kept whatever the rounding
    cut = peak.to(tl.float64) + tl.load(min_p_gap + row)
    if TRUNCATE:
        k = tl.load(top_k + row)
        if _active(TOP_K, tl.load(inverse_temperature + row), k, 1.0, vocab) & _usable(peak):
            key, _, _ = descend(TOP_K, partial, state, row, num_rows, num_runs, 7, k, 1.0, 0, top_k, top_k, BLOCK_RUNS)
            cut = tl.maximum(cut, _logit_of(key.to(tl.uint32)).to(tl.float64))
    tl.store(cuts + row, tl.minimum(cut.to(tl.float32), peak))


@triton.jit
def nucleus_kernel(peaks, partial, state, nucleus, inverse_temperature, top_p, vocab, num_rows, num_runs, BLOCK_RUNS: tl.constexpr):
    """Grid (row): the nucleus as (smallest weight in it as a key, its units); of equals with that weight only as many as are needed."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(top_p + row)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    if _active(NUCLEUS, tl.load(inverse_temperature + row), 0, p, vocab) & _usable(peak):
        key, above, goal = descend(NUCLEUS, partial, state, row, num_rows, num_runs, 7, 0, p, 0, top_p, top_p, BLOCK_RUNS)
        units = tl.maximum(_units(key.to(tl.int32).to(tl.float32, bitcast=True)), 1)
        tl.store(nucleus + row * 2, key)
        tl.store(nucleus + row * 2 + 1, above + (goal - above + units - 1) // units * units)


@triton.jit
def pick_kernel(
    logits, peaks, cuts, partial, state, nucleus, out, inverse_temperature, top_p, seeds, positions, stride, vocab, num_rows, num_runs,
    TRUNCATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (row): the token where the draw's search ended; the largest logit's for a greedy row; -1 for an unusable one."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(inverse_temperature + row)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    r = tl.arange(0, BLOCK_RUNS)
    token = tl.full([], -1, tl.int32)
    if _usable(peak):
        if inverse == 0:
            best = tl.load(peaks + row * num_runs + r, mask=r < num_runs, other=float("-inf"))
            index = tl.min(tl.where(best == peak, r, BLOCK_RUNS), 0) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
            token = tl.min(tl.where(value == peak, index, vocab), 0)
        else:
            p = 1.0
            if TRUNCATE:
                p = tl.load(top_p + row)
            mass = tl.load(nucleus + row * 2 + 1)
            key, above, goal = descend(DRAW, partial, state, row, num_rows, num_runs, 7, 0, p, mass, seeds, positions, BLOCK_RUNS)
            if p < 1.0:  # the n-th token, by id, of those with this weight
                units = tl.maximum(_units(key.to(tl.int32).to(tl.float32, bitcast=True)), 1)
                n = (goal - above + units - 1) // units
                equals = tl.load(partial + (row * num_runs + r) * 16 + (key & 15), mask=r < num_runs, other=0) // units
                reached = tl.cumsum(equals, 0)
                run = tl.sum((reached < n).to(tl.int32), 0)
                n -= tl.sum(tl.where(r < run, equals, 0), 0)
                index = run * BLOCK + tl.arange(0, BLOCK)
                value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
                same = (
                    (index < vocab)
                    & (value >= tl.load(cuts + row))
                    & (_weight(value, peak, inverse).to(tl.int32, bitcast=True) == key.to(tl.int32))
                )
                rank = tl.cumsum(same.to(tl.int32), 0)
                token = tl.min(tl.where(same & (rank == n), index, vocab), 0)
            else:
                token = (0x7FFFFFFF - key).to(tl.int32)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def checked_kernel(logits, tokens, checked, fed, stride, vocab):
    """Grid (row): the token, or -1 and 0 where it stands on no finite logit."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    inside = (token >= 0) & (token < vocab)
    value = tl.load(logits + row * stride + token, mask=inside, other=float("inf")).to(tl.float32)
    good = inside & (value > float("-inf")) & (value < float("inf"))
    tl.store(checked + row, tl.where(good, token, -1))
    tl.store(fed + row, tl.where(good, token, 0))


@triton.jit
def mask_kernel(logits, mask, out, stride, mask_stride, vocab, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (row, run): fp32 logits, -inf where the mask's bit is 0."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + index, mask=index < vocab, other=0.0).to(tl.float32)
    if HAS_MASK:
        word = tl.load(mask + row * mask_stride + index // 32, mask=index < vocab, other=0)
        value = tl.where(((word >> (index % 32)) & 1) != 0, value, float("-inf"))
    tl.store(out + row * vocab + index, value, mask=index < vocab)


@triton.jit
def penalty_kernel(out, ids, bias, counts, penalties, vocab, num_ids, BLOCK: tl.constexpr):
    """Grid (row, run of touched tokens). They are distinct, so no two programs touch one logit."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * num_ids + i
    token = tl.load(ids + at, mask=i < num_ids, other=-1)
    touched = (token >= 0) & (token < vocab)
    value = tl.load(out + row * vocab + token, mask=touched, other=0.0) + tl.load(bias + at, mask=touched, other=0.0)
    count = tl.load(counts + at, mask=touched, other=-1.0)
    repetition, frequency, presence = (tl.load(penalties + row * 3), tl.load(penalties + row * 3 + 1), tl.load(penalties + row * 3 + 2))
    divisor = tl.zeros_like(value) + repetition
    repeated = tl.where(value > 0, tl.math.div_rn(value, divisor), value * repetition)
    penalised = repeated - frequency * count - tl.where(count > 0, presence, 0.0)
    tl.store(out + row * vocab + token, tl.where(count >= 0, penalised, value), mask=touched)


@triton.jit
def top_runs_kernel(
    logits, token_ids, peaks, units, higher, top_values, top_ids, stride, vocab,
    NUM_TOP: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (row, run): units of exp(logit - largest), how many are above the row's token, the run's NUM_TOP best."""
    row = tl.program_id(0).to(tl.int64)
    run, num_runs = tl.program_id(1), tl.num_programs(1)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    token = tl.maximum(tl.load(token_ids + row), 0)
    chosen = tl.load(logits + row * stride + token).to(tl.float32)
    index = run * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    at = row * num_runs + run
    tl.store(units + at, tl.sum(tl.where(index < vocab, _units(tl.exp(value - peak)), 0), 0))
    tl.store(higher + at, tl.sum(((value > chosen) & (index < vocab)).to(tl.int32), 0))
    if NUM_TOP > 0:
        place = tl.arange(0, BLOCK_TOP)
        free = index < vocab
        values = tl.full([BLOCK_TOP], float("-inf"), tl.float32)
        ids = tl.full([BLOCK_TOP], 2147483647, tl.int32)
        for i in range(NUM_TOP):
            best = tl.max(tl.where(free, value, float("-inf")), 0)
            found = tl.min(tl.where(free & (value == best), index, 2147483647), 0)
            values = tl.where(place == i, best, values)
            ids = tl.where(place == i, found, ids)
            free = free & (index != found)
        tl.store(top_values + at * NUM_TOP + place, values, mask=place < NUM_TOP)
        tl.store(top_ids + at * NUM_TOP + place, ids, mask=place < NUM_TOP)


@triton.jit
def top_rows_kernel(
    logits, token_ids, peaks, units, higher, run_values, run_ids, logprobs, ranks, top_ids, top_logprobs, stride, num_runs,
    NUM_TOP: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Grid (row): the runs together."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_RUNS)
    peak = row_peak(peaks, row, num_runs, BLOCK_RUNS)
    total = tl.sum(tl.load(units + row * num_runs + r, mask=r < num_runs, other=0), 0)
    log_sum = tl.log(total.to(tl.float32) * (1.0 / UNIT))
    token = tl.maximum(tl.load(token_ids + row), 0)
    tl.store(logprobs + row, tl.load(logits + row * stride + token).to(tl.float32) - peak - log_sum)
    tl.store(ranks + row, 1 + tl.sum(tl.load(higher + row * num_runs + r, mask=r < num_runs, other=0), 0).to(tl.int64))
    if NUM_TOP > 0:
        i = tl.arange(0, BLOCK_ALL)
        here = i < num_runs * NUM_TOP
        value = tl.load(run_values + row * num_runs * NUM_TOP + i, mask=here, other=float("-inf"))
        index = tl.load(run_ids + row * num_runs * NUM_TOP + i, mask=here, other=2147483647)
        free = here & (index != 2147483647)
        for n in range(NUM_TOP):
            best = tl.max(tl.where(free, value, float("-inf")), 0)
            found = tl.min(tl.where(free & (value == best), index, 2147483647), 0)
            tl.store(top_ids + row * NUM_TOP + n, found.to(tl.int64))
            tl.store(top_logprobs + row * NUM_TOP + n, best - peak - log_sum)
            free = free & (index != found)
