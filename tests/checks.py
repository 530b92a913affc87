"""When is a result right? ``assert_matches`` says, and if it is not, where and by how much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cases import LinearCase, LinearInputs
from taut.formats import Canonical
from taut.ops import attention_backward as backward_op
from taut.ops import attention_rules as attention_op
from taut.ops import quant_linear as linear_op
from taut.ops import quantize_weight as weight_op

# Largest relative rounding error of a normal number, and absolute one of a subnormal number, of each dtype.
ROUNDING = {torch.float32: (2.0**-24, 2.0**-150), torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}
FP32_ROUNDING, FP32_TINY = ROUNDING[torch.float32]

TILE_ROWS = 8  # a strip of the Rows8 layout

# Impls of quant_linear that round a dequantized weight to the dtype of x, as a dense layer would have it.
ROUND_WEIGHTS = ("cuda_sm90a.wgmma", "cuda_sm75.dense", "cpu_avx512bf16.float")

# Impls of attention that round the weights of the values to the dtype of v, as a softmax in that dtype would have it.
ROUND_SOFTMAX = ("cuda_sm90a.wgmma", "cuda_sm80.mma", "cuda_sm75.mma", "cpu_avx512bf16")

# Impls of its gradients that do so, and round the gradients of the scores as well.
ROUND_GRADIENTS = ("cuda_sm80.mma",)

# Impls that compute with vdpbf16ps: it takes subnormal numbers for zeros, and makes zeros of them.
FLUSHES = ("cpu_avx512bf16.float",)


def assert_matches(
    out: Tensor, reference: Tensor, plain: Tensor, magnitude: Tensor, walk: Tensor, *, dtype: torch.dtype, depth: int = 1,
    weight_error: Tensor | None = None, independent: bool = True, context: str = "",
) -> None:  # fmt: skip
    """``out [M, N]`` against ``reference`` (float64), judged by ``plain``, the same computation by torch in float32.

    Of the terms t_k that were added up, ``magnitude [M, N]`` is sum |t_k|, ``walk [M, N]`` is sqrt(K * sum t_k^2), and
    ``depth`` is K, how many there are (all float64).

    Where the bound comes from. A sum of K terms in fp32, in whatever order, has an error of at most c * u * magnitude with
    u = 2^-24, c growing with the additions on the longest path and with luck. torch's own c is measured, over the whole
    output: c = max |plain - reference| / (u * magnitude). A kernel may take twice that; where torch had luck (short or few
    sums), c counts as 2, so that the four roundings no kernel can avoid (product, scale, unit, bias) fit.
    torch's sums run in many lanes, a kernel's may run in one: then each addition rounds a partial sum S_j by an error of
    standard deviation at most u |S_j| / sqrt(3), and with terms of random sign S_j^2 is about the sum of t_k^2 so far. All
    told that is a standard deviation of at most u * walk / sqrt(3); five of them are allowed where that is more.
    Then one rounding to ``dtype``: relative ROUNDING[dtype][0] of the result, or half a subnormal step. Products and sums
    below the normal range of fp32 lose half a step each: depth * 2^-150.

    ``weight_error [M, N]``: what a kernel is allowed besides that multiplies by rounded weights, see ``other_roundings``.

    Rows and columns. An error that is within the bound everywhere but leans one way or sits in one row is still a fault.
    Rounding errors spread evenly in their bound have a mean square of 1/3 of the bound's; its standard deviation over n
    values is sqrt(4/45/n). A row's or column's mean square, each element relative to its bound, may be 1/3 plus five of
    those. ``independent=False``, for inputs that repeat themselves, so that errors do too, leaves this out.
    """
    assert tuple(out.shape) == tuple(reference.shape), f"{context}: shape {list(out.shape)}, expected {list(reference.shape)}"
    assert out.dtype == dtype, f"{context}: dtype {out.dtype}, expected {dtype}"
    if out.numel() == 0:
        return
    rounded = reference.to(dtype)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(out) != test(rounded)
        if wrong.any():
            first = describe(out, reference, None, wrong.nonzero()[0])
            raise AssertionError(f"{context}: {kind} in the wrong place: {first}; {int(wrong.sum())} of {out.numel()} elements")
    finite = torch.isfinite(rounded)
    if not finite.any():
        return
    error = torch.where(finite, (out.double() - reference).abs(), 0.0)
    plain_error = torch.where(finite & torch.isfinite(plain), (plain.double() - reference).abs() - depth * FP32_TINY, 0.0).clamp(min=0)
    c = max(2.0, float((plain_error / (FP32_ROUNDING * magnitude).clamp(min=1e-300)).max()))
    relative, tiny = ROUNDING[dtype]
    sum_bound = FP32_ROUNDING * torch.maximum(2 * c * magnitude, 5 / math.sqrt(3) * walk) + depth * FP32_TINY
    if weight_error is not None:
        sum_bound += weight_error
    bound = sum_bound + torch.clamp(relative * (reference.abs() + sum_bound), min=tiny)
    bound = torch.where(finite, bound, 1.0)
    share = error / bound
    if share.max() > 1:
        at = (share == share.max()).nonzero()[0]
        raise AssertionError(
            f"{context}: {describe(out, reference, bound, at)}; {int((share > 1).sum())} of {out.numel()} elements are outside their bound"
        )
    for what, dim in (("row", 1), ("column", 0)) if independent else ():
        count = finite.sum(dim).clamp(min=1)
        mean_square = (share**2).sum(dim) / count
        limit = torch.clamp(1 / 3 + 5 * torch.sqrt(4 / 45 / count), max=1.0)
        worst = int((mean_square - limit).argmax())
        assert mean_square[worst] <= limit[worst], (
            f"{context}: {what} {worst} has a root mean square error of {math.sqrt(float(mean_square[worst])):.3f} of its bound; "
            f"rounding alone stays under {math.sqrt(float(limit[worst])):.3f}"
        )


def describe(out: Tensor, reference: Tensor, bound: Tensor | None, at: Tensor) -> str:
    m, n = (int(i) for i in at)
    text = (
        f"[m={m}, n={n}] (strip {n // TILE_ROWS}, row {n % TILE_ROWS} of it) is {float(out[m, n])!r}, expected {float(reference[m, n])!r}"
    )
    return (
        text
        if bound is None
        else f"{text}, off by {abs(float(out[m, n]) - float(reference[m, n])):.3e} where {float(bound[m, n]):.3e} is allowed"
    )


def assert_linear(out: Tensor, x: Tensor, inputs: LinearInputs, case: LinearCase, *, impl: str, independent: bool = True) -> None:
    """``out`` of quant_linear on ``x [M, K]`` against the float64 reference. Call it after the kernel has run."""
    w = weight_op.reference(*inputs.canonical, case.K, case.format, case.activations)
    reference = linear_op.reference(x, w, inputs.bias, case.activations)
    values = x.double() if case.activations == "float" else linear_op.quantize_activations(x, case.activations)
    bias = torch.zeros(case.N) if inputs.bias is None else inputs.bias
    plain = values.float() @ w.float().T + bias.float()
    terms = term_sizes(inputs, w, case)
    magnitude = values.abs() @ terms.T + bias.double().abs()
    walk = (case.K * (values**2 @ (terms**2).T)).sqrt()
    assert_matches(
        out, reference, plain, magnitude.nan_to_num(), walk.nan_to_num(), dtype=case.dtype, depth=case.K + 2,
        weight_error=other_roundings(values.nan_to_num(), w, case, impl),
        independent=independent, context=f"{impl} on {case}, seed {case.seed}",
    )  # fmt: skip


def other_roundings(values: Tensor, w: Tensor, case: LinearCase, impl: str) -> Tensor | None:
    """How far ``values @ w.T`` may move, sums aside: by the rounding of weights, and by what is subnormal on the way."""
    error = weight_rounding(values, w, case.dtype) if rounds_weights(impl, case) else None
    if impl.startswith(FLUSHES):
        smallest = torch.finfo(torch.float32).tiny
        flushed = smallest * (w.abs().sum(1)[None, :] + values.abs().sum(1)[:, None] + case.K + 2)
        error = flushed if error is None else error + flushed
    return error


def assert_attention(
    out: Tensor, lse: Tensor, arguments: dict, *, impl: str, context: str, plain: tuple[Tensor, Tensor] | None = None
) -> None:
    """``out [B, Hq, Lq, Dv]`` and ``lse`` of an attention op against the float64 reference. Call it after the kernel has run.

    Two errors meet. That of the sum over the keys is as in ``assert_matches``. An error d_j of a score moves its weight by p_j d_j, and
    with it the sum by at most sum p_j |v_j - out| d_j: d_j is a sum of D products, so c * u * sum |q k| * softmax_scale, besides
    what softcap, ALiBi, the mask, the running maximum and lse add: a few roundings of numbers as large as the score. Plain torch in
    fp32 (``plain``) has all of them, and its c is measured over the whole output. Impls in ``ROUND_SOFTMAX`` are allowed what
    rounding each weight moves the sum by.
    """
    rules = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    q, k, v = (arguments[name] for name in "qkv")
    reference, reference_lse = attention_op.reference(q, k, v, **rules)
    plain = plain_attention(q, k, v, **rules) if plain is None else plain
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().abs().repeat_interleave(group, 1) for t in (k, v))
    sizes = q.double().abs() @ keys.mT * abs(rules["softmax_scale"])  # of the products of a score
    extra = sizes if not rules["softcap"] else sizes.clamp(max=8 * rules["softcap"])
    if rules["alibi_slopes"] is not None:
        at = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
        extra = extra + rules["alibi_slopes"].double().abs()[:, None, None] * at.abs()
    if rules["mask"] is not None and rules["mask"].dtype != torch.bool:
        extra = extra + rules["mask"].double().nan_to_num(neginf=0.0).abs()
    weights = attention_weights(q, k, reference_lse, rules)
    error_of_score = extra + 4.0  # in units of the last place
    magnitude = weights @ values + (weights * error_of_score) @ values + (weights * error_of_score).sum(-1, keepdim=True) * reference.abs()
    walk = (k.shape[2] * (weights**2 @ values**2)).sqrt()
    shape = (-1, out.shape[-1])
    rounded = softmax_rounding(weights, values, out.dtype).reshape(shape) if impl.startswith(ROUND_SOFTMAX) else None
    assert_matches(
        out.reshape(shape), reference.reshape(shape), plain[0].reshape(shape), magnitude.reshape(shape), walk.reshape(shape),
        dtype=out.dtype, depth=k.shape[2] + q.shape[3], weight_error=rounded, independent=False, context=f"{impl} on {context}",
    )  # fmt: skip
    largest = torch.where(weights > 0, error_of_score, 0.0).amax(-1) + reference_lse.abs().nan_to_num(posinf=0.0)
    assert_matches(
        lse.reshape(-1, 1), reference_lse.reshape(-1, 1), plain[1].reshape(-1, 1), largest.reshape(-1, 1) + k.shape[2] / 16,
        torch.zeros_like(largest.reshape(-1, 1)), dtype=torch.float32, depth=k.shape[2], independent=False,
        context=f"{impl} on {context}, lse",
    )  # fmt: skip


def softmax_rounding(weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far ``weights @ values`` may move when each weight, relative to the largest so far, is rounded: as in ``weight_rounding``."""
    relative, tiny = ROUNDING[dtype]
    moves = torch.where(weights == 0, 0.0, torch.clamp(relative * weights, min=tiny))
    return torch.minimum(moves @ values, 5 / math.sqrt(3) * (moves**2 @ values**2).sqrt())


def assert_attention_gradients(
    found: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor | None, arguments: dict, *, impl: str, context: str
) -> None:
    """dq, dk, dv and ds_aux of attention_backward against autograd in float64. Call it after the kernel has run.

    A score's gradient is p (dp - shift) slope scale, and the terms of the sums are that times k or q. Its error, in units of the
    last place: of dp and shift, what their products come to; and of p, |dp - shift| times the error of a score, as ``assert_attention``
    has it. In bf16 and fp16 shift is made of an ``out`` that was rounded, maybe with the weights of its values, which
    no kernel can undo: that comes on top. Impls in ``ROUND_GRADIENTS`` multiply by weights and gradients of scores that they rounded to
    the dtype, as tensor cores must: they are allowed what that moves the sums by, as in ``softmax_rounding``.
    """
    rules = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    q, k, v = (arguments[name].double() for name in "qkv")
    reference = backward_op.reference(grad_out, grad_lse, *(arguments[name] for name in "qkv"), **rules)
    plain = AttentionTerms(arguments, grad_out, grad_lse, torch.float32).gradients()
    terms = AttentionTerms(arguments, grad_out, grad_lse, torch.float64)
    group, grad = q.shape[1] // k.shape[1], grad_out.double().abs()
    keys, values = (t.abs().repeat_interleave(group, 1) for t in (k, v))
    at = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    of_score = q.abs() @ keys.mT * abs(rules["softmax_scale"]) + 4.0 + terms.lse.abs().nan_to_num(posinf=0.0)[..., None]
    if rules["alibi_slopes"] is not None:
        of_score = of_score + rules["alibi_slopes"].double().abs()[:, None, None] * at.abs()
    if rules["mask"] is not None and rules["mask"].dtype != torch.bool:
        of_score = of_score + rules["mask"].double().nan_to_num(neginf=0.0).abs()
    of_weight = terms.weights * (1 + of_score)
    of_shift = (grad * (of_weight @ values)).sum(-1, keepdim=True) + (0.0 if grad_lse is None else grad_lse.double().abs()[..., None])
    off = (terms.grad_weights - terms.shift).abs()
    slope_error = 4.0 if rules["softcap"] else 0.0
    scale = abs(rules["softmax_scale"])
    of_grad = scale * terms.weights * ((grad @ values.mT + of_shift) * terms.slope + off * (terms.slope * of_score + slope_error))
    of_grad = of_grad + terms.grad_scores.abs()
    of_shift_given = torch.zeros_like(of_shift)
    if grad_out.dtype != torch.float32:
        of_out = ROUNDING[grad_out.dtype][0] * terms.out.abs() + softmax_rounding(terms.weights, values, grad_out.dtype)
        of_shift_given = (grad * of_out).sum(-1, keepdim=True)
    moved = scale * terms.weights * terms.slope * of_shift_given
    per_key = lambda t: t.unflatten(1, (-1, group)).sum(2)  # noqa: E731
    rows, count = q.abs(), group * q.shape[2]
    of_roundings = [None] * 3
    if impl.startswith(ROUND_GRADIENTS):
        # Side by side, for a key, what all heads that share it give.
        by_key = lambda t: t.unflatten(1, (-1, group)).flatten(2, 3)  # noqa: E731
        unscaled = terms.grad_scores.abs() / max(scale, 1e-300)
        of_roundings = [
            scale * softmax_rounding(unscaled, keys, grad_out.dtype),
            scale * softmax_rounding(by_key(unscaled).mT, by_key(rows), grad_out.dtype),
            softmax_rounding(by_key(terms.weights).mT, by_key(grad), grad_out.dtype),
        ]
    bounds = [
        (of_grad @ keys, (k.shape[2] * (terms.grad_scores**2 @ keys**2)).sqrt(), moved @ keys),
        (per_key(of_grad.mT @ rows), (count * per_key((terms.grad_scores**2).mT @ rows**2)).sqrt(), per_key(moved.mT @ rows)),
        (per_key(of_weight.mT @ grad), (count * per_key((terms.weights**2).mT @ grad**2)).sqrt(), None),
    ]
    if rules["s_aux"] is not None:
        sinks = torch.exp(rules["s_aux"].double()[:, None] - terms.lse)[..., None]
        of_sink = sinks * (of_shift + terms.shift.abs() * (rules["s_aux"].double().abs()[:, None, None] + 4 + terms.lse.abs()[..., None]))
        walk = (q.shape[0] * q.shape[2] * ((sinks * terms.shift) ** 2).sum((0, 2))).sqrt()
        bounds.append((of_sink.sum((0, 2)), walk, (sinks * of_shift_given).sum((0, 2))))
    for i, (expected, by_torch, (magnitude, walk, extra)) in enumerate(zip(reference, plain, bounds, strict=True)):
        one, name = found[i], ("dq", "dk", "dv", "ds_aux")[i]
        if i < 3 and of_roundings[i] is not None:
            extra = of_roundings[i] if extra is None else extra + of_roundings[i]
        shape = (-1, one.shape[-1])
        assert_matches(
            one.reshape(shape), expected.reshape(shape), by_torch.reshape(shape), magnitude.reshape(shape), walk.reshape(shape),
            dtype=one.dtype, depth=count + k.shape[2] + q.shape[3] + v.shape[3], independent=False,
            weight_error=None if extra is None else extra.reshape(shape), context=f"{impl} on {context}, {name}",
        )  # fmt: skip


class AttentionTerms:
    """The steps of the backward by its formula, in plain torch: in float32 a peer, in float64 the sizes of what is added up."""

    def __init__(self, arguments: dict, grad_out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype) -> None:
        self.q, grad = arguments["q"].to(dtype), grad_out.to(dtype)
        self.group = self.q.shape[1] // arguments["k"].shape[1]
        self.k, v = (arguments[name].to(dtype).repeat_interleave(self.group, 1) for name in "kv")
        scale, cap, s_aux = arguments["softmax_scale"], arguments["softcap"], arguments["s_aux"]
        eye = torch.eye(self.k.shape[2]).expand(*arguments["k"].shape[:2], -1, -1)
        rules = {name: value for name, value in arguments.items() if name not in "qkv"}
        attend = plain_attention if dtype == torch.float32 else attention_op.reference
        self.weights, self.lse = attend(arguments["q"], arguments["k"], eye, **rules)
        self.out, self.grad_out, self.s_aux = self.weights @ v, grad, s_aux
        self.slope = 1 - torch.tanh(self.q @ self.k.mT * scale / cap) ** 2 if cap else torch.ones_like(self.weights)
        self.grad_weights = grad @ v.mT
        self.shift = (grad * self.out).sum(-1, keepdim=True) - (0.0 if grad_lse is None else grad_lse.to(dtype)[..., None])
        self.grad_scores = self.weights * (self.grad_weights - self.shift) * self.slope * scale

    def gradients(self) -> list[Tensor]:
        per_key = lambda t: t.unflatten(1, (-1, self.group)).sum(2)  # noqa: E731
        found = [self.grad_scores @ self.k, per_key(self.grad_scores.mT @ self.q), per_key(self.weights.mT @ self.grad_out)]
        if self.s_aux is not None:
            found.append(-(torch.exp(self.s_aux.to(self.lse.dtype)[:, None] - self.lse)[..., None] * self.shift).sum((0, 2))[:, 0])
        return found


def attention_weights(q: Tensor, k: Tensor, lse: Tensor, rules: dict) -> Tensor:
    """The softmax's weights in float64, ``[B, Hq, Lq, Lk]``: attention over the rows of the identity."""
    eye = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    return attention_op.reference(q, k, eye, **rules)[0]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int, softcap: float, mask: Tensor | None,
    s_aux: Tensor | None, alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain torch, in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scores = q.float() @ k.mT * softmax_scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.float()[:, None, None] * distance.abs()
    hidden = (distance < 0) & causal | ((distance.abs() >= window) & (window > 0))
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float())
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.float()[:, None, None].expand(*scores.shape[:3], 1)), -1)
        v = torch.cat((v, v.new_zeros(*v.shape[:2], 1, v.shape[3])), -2)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def rounds_weights(impl: str, case: LinearCase) -> bool:
    if impl.startswith("cpu_avx512bf16.float") and case.format.name in ("mxfp4", "nvfp4"):
        return False  # a few bits times a few bits: bfloat16 holds them
    return impl.startswith(ROUND_WEIGHTS) or (impl.startswith("cpu_amx.float") and case.format.name == "nf4")


def weight_rounding(values: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """How far ``values @ w.T`` may move when each weight is rounded to ``dtype``, as a dense layer of dequantized weights has it.

    A weight moves by at most d_k: ROUNDING[dtype][0] of it, or half a subnormal step; the sum by at most sum |x_k| d_k. As the
    errors are independent, its standard deviation is at most sqrt(sum (x_k d_k)^2) / sqrt(3): five of those are allowed.
    """
    relative, tiny = ROUNDING[dtype]
    moves = torch.where(w == 0, 0.0, torch.clamp(relative * w.abs(), min=tiny))
    return torch.minimum(values.abs() @ moves.T, 5 / math.sqrt(3) * (values**2 @ (moves**2).T).sqrt())


def term_sizes(inputs: LinearInputs, w: Tensor, case: LinearCase) -> Tensor:
    """How large the terms are that a kernel may add up in place of each element of w, ``float64 [N, K]``.

    WHY int8 differs, and nf4 beside 8-bit x: an instruction set without 8 x 8 bit products that cannot overflow takes
    q = 16 * high + low in two passes, each rounded; for a q near zero of which high is -1 they are larger than q itself.
    """
    if case.format.name != "int8" and (case.format.name != "nf4" or case.activations == "float"):
        return w.abs()
    scale = weight_op.reference(*scales_alone(inputs, case), case.K, case.format).abs()
    if case.format.name == "int8":
        q = inputs.codes.double()
    else:  # of the 127ths
        codes = inputs.canonical._replace(scales=torch.full_like(inputs.scales, 127))
        q, scale = weight_op.reference(*codes, case.K, case.format, case.activations), scale / 127
    high = torch.div(q, 16, rounding_mode="floor")
    return (16 * high.abs() + (q - 16 * high)) * scale


def scales_alone(inputs: LinearInputs, case: LinearCase) -> Canonical:
    """The weight as if each of its codes stood for 1."""
    one = {"int8": 1, "nf4": 0xFF}.get(case.format.name, 0)
    return inputs.canonical._replace(codes=torch.full_like(inputs.codes, one))


def assert_same_bits(a: Tensor, b: Tensor, context: str) -> None:
    """Equal bit for bit: NaN equals NaN of the same payload, 0.0 does not equal -0.0."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{context}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.contiguous().view(integers) != b.contiguous().view(integers)
    if different.any():
        at = tuple(int(i) for i in different.nonzero()[0])
        raise AssertionError(
            f"{context}: {list(at)} is {a[at].item()!r} and {b[at].item()!r}; {int(different.sum())} of {a.numel()} differ"
        )
