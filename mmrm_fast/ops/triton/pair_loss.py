"""pair_loss in Triton: one launch whose first programs sum pairs and whose others gather each reward's gradient.

A gradient recomputes the terms of the reward's pairs, so that neither waits for the other. R rewards, P pairs.
"""

import triton
import triton.language as tl

from mmrm_fast.ops.triton.launch import Launch, Plan, block_size, sum_chunks

MODES = {"standard": 0, "paper": 1, "normalized": 1, "reference": 2}
NUM_SUMS = 7
CHUNK = 512  # pairs of one sum


@triton.jit
def _log1p(e):
    """log(1 + e) of 0 <= e <= 1 to float32's precision: 2 artanh(e / (2 + e)), the hardware's log loses small e."""
    s = e / (2 + e)
    t = s * s
    series = 1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))
    return 2 * s * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * series))))


@triton.jit
def _bradley_terry(x):
    """-logsigmoid(x) and its derivative."""
    e = tl.exp(-tl.abs(x))
    return _log1p(e) + tl.maximum(-x, 0.0), -tl.where(x < 0, 1.0, e) / (1 + e)


@triton.jit
def _optimised(x, offset, smoothing):
    """The loss with the pair's margin and label smoothing, and its derivative."""
    loss, slope = _bradley_terry(x - offset)
    return loss + smoothing * (x - offset), slope + smoothing


@triton.jit
def _correct(x):
    return tl.where(x > 0, 1.0, tl.where(x == 0, 0.5, 0.0))


@triton.jit
def _load_pair(rewards, proxy_rewards, chosen, rejected, margin, weight, pair, mask):
    """m, the sum of both rewards, b (0 without a proxy), margin and weight (0 and 1 by default)."""
    first = tl.load(chosen + pair, mask=mask, other=0)
    second = tl.load(rejected + pair, mask=mask, other=0)
    first_reward = tl.load(rewards + first, mask=mask, other=0.0)
    second_reward = tl.load(rewards + second, mask=mask, other=0.0)
    b = tl.zeros(pair.shape, tl.float32)
    offset = tl.zeros(pair.shape, tl.float32)
    w = tl.full(pair.shape, 1.0, tl.float32)
    if proxy_rewards is not None:
        b = tl.load(proxy_rewards + first, mask=mask, other=0.0) - tl.load(proxy_rewards + second, mask=mask, other=0.0)
    if margin is not None:
        offset = tl.load(margin + pair, mask=mask, other=0.0)
    if weight is not None:
        w = tl.load(weight + pair, mask=mask, other=0.0)
    return first_reward - second_reward, first_reward + second_reward, b, offset, w


@triton.jit
def _shortcut_failure(loss, proxy_loss, floor, MODE: tl.constexpr, WARMUP: tl.constexpr):
    if MODE == 0:
        sfc = tl.full(loss.shape, 1.0, tl.float32)
    elif WARMUP:
        sfc = tl.full(loss.shape, 0.5, tl.float32)
    else:
        total = 1e-7 + loss + proxy_loss
        sfc = (0.5e-7 + proxy_loss) / total if MODE == 1 else 0.5e-7 + proxy_loss / total
        sfc = tl.maximum(sfc, floor)
    return sfc


@triton.jit
def pair_loss_fwd_kernel(
    rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry, sums, sfc, grad_rewards, grad_proxy,
    smoothing, centering, floor, num_rewards, num_pairs, num_chunks,
    MODE: tl.constexpr, WARMUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < num_chunks:
        pair = program * BLOCK + tl.arange(0, BLOCK)
        mask = pair < num_pairs
        m, total, b, offset, w = _load_pair(rewards, proxy_rewards, chosen, rejected, margin, weight, pair, mask)
        w = tl.where(mask, w, 0.0)
        bt_main, _ = _bradley_terry(m)
        bt_proxy, _ = _bradley_terry(b)
        coefficient = _shortcut_failure(bt_main, bt_proxy, floor, MODE, WARMUP)
        loss, _ = _optimised(m, offset, smoothing)
        tl.store(sfc + pair, coefficient, mask=mask)
        place = sums + program * 7
        tl.store(place, tl.sum(w * (coefficient * loss + centering * total * total)))
        tl.store(place + 2, tl.sum(w))
        tl.store(place + 3, tl.sum(w * coefficient))
        tl.store(place + 4, tl.sum(tl.where(mask, _correct(m), 0.0)))
        tl.store(place + 6, tl.sum(w * bt_main))
        if MODE == 0:
            tl.store(place + 1, 0.0)
            tl.store(place + 5, 0.0)
        else:
            proxy_loss, _ = _optimised(b, offset, smoothing)
            tl.store(place + 1, tl.sum(w * proxy_loss))
            tl.store(place + 5, tl.sum(tl.where(mask, _correct(b), 0.0)))
    else:
        row = (program - num_chunks) * BLOCK + tl.arange(0, BLOCK)
        exists = row < num_rewards
        start = tl.load(row_ptr + row, mask=exists, other=0)
        length = tl.load(row_ptr + row + 1, mask=exists, other=0) - start
        to_main, to_proxy = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for i in range(0, tl.max(length)):
            mask = i < length
            entry = tl.load(row_entry + start + i, mask=mask, other=0)
            pair = entry // 2
            m, total, b, offset, w = _load_pair(rewards, proxy_rewards, chosen, rejected, margin, weight, pair, mask)
            bt_main, _ = _bradley_terry(m)
            bt_proxy, _ = _bradley_terry(b)
            coefficient = _shortcut_failure(bt_main, bt_proxy, floor, MODE, WARMUP)
            sign = tl.where(entry % 2 == 0, 1.0, -1.0)
            _, slope = _optimised(m, offset, smoothing)
            to_main += tl.where(mask, w * (2 * centering * total + sign * coefficient * slope), 0.0)
            _, slope = _optimised(b, offset, smoothing)
            to_proxy += tl.where(mask, w * sign * slope, 0.0)
        tl.store(grad_rewards + row, to_main, mask=exists)
        if MODE != 0:
            tl.store(grad_proxy + row, to_proxy, mask=exists)


def pair_loss_fwd_plan(
    rewards, proxy_rewards, chosen, rejected, margin, weight, row_ptr, row_entry,
    mode, label_smoothing, centering, warmup, floor,
) -> Plan:  # fmt: skip
    num_rewards, num_pairs = rewards.shape[0], chosen.shape[0]
    block = block_size(max(num_rewards, num_pairs), CHUNK)
    num_chunks = triton.cdiv(num_pairs, block)
    sums, sfc = rewards.new_zeros(NUM_SUMS), rewards.new_empty(num_pairs)
    grad_rewards = rewards.new_empty(num_rewards)
    grad_proxy = rewards.new_empty(0 if proxy_rewards is None else num_rewards)
    chunks = sums[None] if num_chunks <= 1 else rewards.new_empty((num_chunks, NUM_SUMS))
    inputs = {
        "rewards": rewards, "proxy_rewards": proxy_rewards, "chosen": chosen, "rejected": rejected, "margin": margin,
        "weight": weight, "row_ptr": row_ptr, "row_entry": row_entry,
    }  # fmt: skip
    arguments = {name: None if tensor is None else tensor.contiguous() for name, tensor in inputs.items()} | {
        "sums": chunks,
        "sfc": sfc,
        "grad_rewards": grad_rewards,
        "grad_proxy": None if proxy_rewards is None else grad_proxy,
        "smoothing": float(label_smoothing),
        "centering": float(centering),
        "floor": float(floor),
        "num_rewards": num_rewards,
        "num_pairs": num_pairs,
        "num_chunks": num_chunks,
        "MODE": MODES[mode],
        "WARMUP": warmup,
        "BLOCK": block,
    }
    launches = [Launch(pair_loss_fwd_kernel, (num_chunks + triton.cdiv(num_rewards, block),), arguments)]
    if num_chunks > 1:
        launches.append(sum_chunks(chunks, sums))
    return Plan((sums, sfc, grad_rewards, grad_proxy), tuple(launches))


def pair_loss_fwd_triton(*arguments):
    """Sums over pairs, SFC and both gradients, in float32; arguments as those of `pair_loss_ref`."""
    return pair_loss_fwd_plan(*arguments).run()
