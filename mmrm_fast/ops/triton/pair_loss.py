"""pair_loss in Triton: one launch, and a second that adds up the sums of more than one chunk. P pairs."""

import triton
import triton.language as tl

from mmrm_fast.ops.triton.launch import Launch, Plan, block_size, sum_chunks

MODES = {"standard": 0, "paper": 1, "reference": 2, "balanced": 3}
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
def _optimised(x, smoothing):
    """The loss with label smoothing and its derivative."""
    loss, slope = _bradley_terry(x)
    return loss + smoothing * x, slope + smoothing


@triton.jit
def _correct(x, mask):
    return tl.where(mask, tl.where(x > 0, 1.0, tl.where(x == 0, 0.5, 0.0)), 0.0)


@triton.jit
def _shortcut_failure(loss, b, MODE: tl.constexpr):
    if MODE == 0:
        sfc = tl.full(loss.shape, 1.0, tl.float32)
    elif MODE == 3:
        e = tl.exp(-tl.abs(b))
        inverse = (1 + e) / tl.where(b < 0, e, 1.0)
        sfc = tl.where(inverse > 20.0, 1.0, 0.05 * inverse)
    else:
        proxy_loss, _ = _bradley_terry(b)
        total = 1e-7 + loss + proxy_loss
        sfc = (0.5e-7 + proxy_loss) / total if MODE == 1 else 0.5e-7 + proxy_loss / total
    return sfc


@triton.jit(do_not_specialize=["num_pairs"])
def pair_loss_fwd_kernel(
    margin, proxy_margin, demand, weight, sums, sfc, slope, proxy_slope, smoothing, num_pairs,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    pair = program * BLOCK + tl.arange(0, BLOCK)
    mask = pair < num_pairs
    m = tl.load(margin + pair, mask=mask, other=0.0)
    b, offset = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    w = tl.where(mask, 1.0, 0.0)
    if proxy_margin is not None:
        b = tl.load(proxy_margin + pair, mask=mask, other=0.0)
    if demand is not None:
        offset = tl.load(demand + pair, mask=mask, other=0.0)
    if weight is not None:
        w = tl.load(weight + pair, mask=mask, other=0.0)
    plain, _ = _bradley_terry(m)
    coefficient = _shortcut_failure(plain, b, MODE)
    loss, to_margin = _optimised(m - offset, smoothing)
    tl.store(sfc + pair, coefficient, mask=mask)
    tl.store(slope + pair, w * coefficient * to_margin, mask=mask)
    place = sums + program * 7
    tl.store(place, tl.sum(w * coefficient * loss))
    tl.store(place + 2, tl.sum(w))
    tl.store(place + 3, tl.sum(w * coefficient))
    tl.store(place + 4, tl.sum(_correct(m, mask)))
    tl.store(place + 6, tl.sum(w * plain))
    if MODE == 0:
        tl.store(place + 1, 0.0)
        tl.store(place + 5, 0.0)
    else:
        proxy_loss, to_proxy = _optimised(b - offset, smoothing)
        tl.store(proxy_slope + pair, w * to_proxy, mask=mask)
        tl.store(place + 1, tl.sum(w * proxy_loss))
        tl.store(place + 5, tl.sum(_correct(b, mask)))


def pair_loss_fwd_plan(margin, proxy_margin, demand, weight, mode, label_smoothing) -> Plan:
    """Sums over pairs, SFC and both gradient factors, in float32; arguments as those of `pair_loss_ref`."""
    num_pairs = margin.shape[0]
    block = block_size(num_pairs, CHUNK)
    num_chunks = triton.cdiv(num_pairs, block)
    sums, sfc, slope = margin.new_zeros(NUM_SUMS), margin.new_empty(num_pairs), margin.new_empty(num_pairs)
    proxy_slope = margin.new_empty(0 if proxy_margin is None else num_pairs)
    chunks = sums[None] if num_chunks <= 1 else margin.new_empty((num_chunks, NUM_SUMS))
    inputs = {"margin": margin, "proxy_margin": proxy_margin, "demand": demand, "weight": weight}
    arguments = {name: None if tensor is None else tensor.contiguous() for name, tensor in inputs.items()} | {
        "sums": chunks,
        "sfc": sfc,
        "slope": slope,
        "proxy_slope": None if proxy_margin is None else proxy_slope,
        "smoothing": float(label_smoothing),
        "num_pairs": num_pairs,
        "MODE": MODES[mode],
        "BLOCK": block,
    }
    launches = [Launch(pair_loss_fwd_kernel, (num_chunks,), arguments)]
    if num_chunks > 1:
        launches.append(sum_chunks(chunks, sums))
    return Plan((sums, sfc, slope, proxy_slope), tuple(launches))
