"""The vocabulary of the Triton kernels: products of tiles, sums of parts, and the activations of the gates."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU (TRITON_INTERPRET=1)."""


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    """c + a b, summed in float32; PRECISION is "ieee", or for float32 operands "tf32".

    The interpreter multiplies the bits of bfloat16 as integers; in float32 their products are the same numbers.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32":
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(x):
    """float32 numbers rounded to tf32, halves away from zero, which keeps sums free of bias.

    Tensor cores, and Triton for them, only cut bits off.
    """
    bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bound(n):
    """A number of the kernel's as a bound or step of a loop.

    Triton's interpreter before 3.9 has it as an array of one element, of which NumPy 2.4 makes no index.
    """
    if INTERPRETED:
        return n.handle.data.item() if isinstance(n, tl.tensor) else n
    else:
        return n


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 numbers in another dtype, rounded to nearest even; for bfloat16 the interpreter only cuts bits off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, to_even.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def sum_of_parts(parts, count, first, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Elements [first, first + BLOCK) of the sum of `count` parts (count, ELEMENTS), in a fixed order, AT_ONCE at a
    time; 0 beyond them."""
    element = first + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for start in range(0, bound(count), AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        inside = (part < count) & (element < ELEMENTS)
        total += tl.load(parts + part.to(tl.int64) * ELEMENTS + element, mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def store_range(out, total, first, begin, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Store those of the elements [first, first + BLOCK) that are in [begin, begin + COUNT), where `out` begins."""
    element = first + tl.arange(0, BLOCK) - begin
    inside = (element >= 0) & (element < COUNT)
    tl.store(out + element, rounded(total, out.dtype.element_ty), mask=inside)


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # 9 bits: a whole number below 2^15 times it is exact in float32
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: the float32 numbers from there on are the whole ones
LEAST = tl.constexpr(-87.33654)  # exp of it is the smallest normal float32


@triton.jit
def _exp_and_expm1(x):
    """exp(x) and exp(x) - 1 of float32 x <= 0, to about 1 ulp each; where exp(x) is not normal, 0 and -1.

    x = n ln 2 + r with |r| <= ln(2) / 2, exp(r) - 1 = r + r^2 P(r) with P of least relative error (2^-26), and
    exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1).
    """
    clamped = tl.where(x < LEAST, LEAST, x)
    shifted = clamped * LOG2_E + ROUND
    n = shifted - ROUND
    r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW
    polynomial = ((0.0013947598636150 * r + 0.0083672469481826) * r + 0.0416662655770779) * r + 0.1666653752326965
    of_rest = (polynomial * r + 0.5) * (r * r) + r
    # The low bits of `shifted` are n in two's complement: to the exponent of 1 with them.
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    below = x < LEAST
    return tl.where(below, 0.0, of_rest * power + power), tl.where(below, -1.0, of_rest * power + (power - 1.0))


@triton.jit
def _quotient(a, b):
    """a / b for b from 1 to 2, to about 1 ulp; division rounded to nearest would call a function for its rare cases."""
    inverse = 1.0 / b
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 x, to about 2 ulp; 0 where it is not normal."""
    small, _ = _exp_and_expm1(tl.where(x < 0, x, -x))
    return _quotient(tl.where(x < 0, small, 1.0), 1.0 + small)


@triton.jit
def tanh(x):
    """The hyperbolic tangent of float32 x, to about 2 ulp.

    With e = exp(-2 |x|) it is (1 - e) / (1 + e) near 0 and 1 - 2 e / (1 + e) elsewhere, one quotient either way.
    """
    small, less = _exp_and_expm1(-2.0 * tl.abs(x))
    far = small < 0.25
    quotient = _quotient(tl.where(far, 2.0 * small, -less), 1.0 + small)
    size = tl.where(far, 1.0 - quotient, quotient)
    return tl.where(x < 0, -size, size)
