"""The interpreter of PTX against known answers: arithmetic, exchanges within a warp, and mistakes.

If it were wrong, test_ptx.py would say nothing about a GPU. Each answer here is from the PTX ISA or
computed with exact fractions.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.ptx_interpreter.arithmetic import DTYPES, INSTRUCTIONS
from tests.ptx_interpreter.machine import Launch, Machine
from tests.ptx_interpreter.memory import Region
from tests.ptx_interpreter.parser import PtxError, parse

NAN = 0x7FFFFFFF


def compute(opcode: str, *operands: int) -> int:
    """The bits of the result for operands given by their bits."""
    semantics = INSTRUCTIONS[opcode]
    arrays = [
        np.array([bits], f"u{DTYPES[name].itemsize}").view(DTYPES[name])
        for bits, name in zip(operands, semantics.operands, strict=True)
    ]
    with np.errstate(all="ignore"):
        result = semantics.function(*arrays)
    result = np.asarray(result)
    assert result.dtype == DTYPES[semantics.result]
    return int(result.view(f"u{result.dtype.itemsize}")[0])


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        # Bytes are numbered from a's lowest; the highest bit of a nibble asks for the sign.
        ("prmt.b32", (0x33221100, 0x77665544, 0x7530), 0x77553300),
        ("prmt.b32", (0x00000080, 0x7F000000, 0xF888), 0x00FFFFFF),
        ("lop3.b32", (0b1100, 0b1010, 0b1111, 0x80), 0b1000),  # a and b and c
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0x96), 0b0000),  # a xor b xor c
        ("shf.l.wrap.b32", (0x80000001, 0x00000003, 33), 0x00000007),
        ("shl.b32", (1, 31), 1 << 31),
        ("shl.b32", (1, 32), 0),
        ("shr.s32", (0x80000000, 40), 0xFFFFFFFF),
        ("shr.u32", (0x80000000, 40), 0),
        ("shr.u64", (1 << 63, 63), 1),
        ("bfi.b64", (0xFFFF, 0, 8, 4), 0xF00),
        ("bfi.b32", (0, 0xFFFFFFFF, 4, 32), 0xF),
        ("brev.b32", (0b1011,), 0xD0000000),
        ("bfind.shiftamt.u32", (0x00010000,), 15),
        ("bfind.shiftamt.u32", (1,), 31),
        ("bfind.shiftamt.u32", (0,), 0xFFFFFFFF),
        ("popc.b32", (0xF0F0F0F1,), 17),
        ("mul.wide.s32", (0xFFFFFFFF, 2), 2**64 - 2),
        ("mul.wide.u32", (0xFFFFFFFF, 2), 0x1FFFFFFFE),
        ("mad.lo.s32", (0xFFFFFFFF, 3, 5), 2),
        ("div.s32", (2**32 - 7, 2), 2**32 - 3),  # -7 / 2 = -3
        ("rem.s32", (2**32 - 7, 2), 2**32 - 1),
        ("rem.u32", (2**32 - 7, 10), 9),
        ("cvt.s64.s32", (0x80000000,), 0xFFFFFFFF80000000),
        ("cvt.u64.u32", (0x80000000,), 0x80000000),
        ("cvt.u16.u32", (0x12345678,), 0x5678),
        ("cvt.rn.f32.u32", (0xFFFFFF7F,), bits(2.0**32 - 256)),
        ("cvt.rzi.u32.f32", (bits(-1.5),), 0),
        ("cvt.rzi.u32.f32", (bits(1e10),), 0xFFFFFFFF),
        ("cvt.rzi.s32.f32", (bits(-1.5),), 2**32 - 1),
        ("cvt.rzi.s32.f32", (NAN,), 0),
        ("cvt.rmi.f32.f32", (bits(-1.5),), bits(-2.0)),
        # A code clamped to 4 bits each from a and b, and c moved up by a byte.
        ("cvt.pack.sat.u4.s32.b32", (0x80000000, 7, 0x11AB), 0x11AB07),
        ("cvt.pack.sat.u4.s32.b32", (99, 3, 0xFF000000), 0xF3),
        # Round to nearest even, and a NaN of its own.
        ("cvt.rn.bf16.f32", (0x3F808000,), 0x3F80),
        ("cvt.rn.bf16.f32", (0x3F818000,), 0x3F82),
        ("cvt.rn.bf16.f32", (0x7F7FFFFF,), 0x7F80),
        ("cvt.rn.bf16.f32", (0xFF800001,), 0x7FFF),
        ("cvt.rn.bf16.f32", (0x80000001,), 0x8000),
        ("cvt.rn.bf16x2.f32", (0x40000000, 0x3F808001), 0x40003F81),  # the first is the high half
        # +0 is greater than -0; a NaN loses to a number.
        ("max.bf16x2", (0x80000000, 0x00008000), 0x00000000),
        ("min.bf16x2", (0x80000000, 0x00008000), 0x80008000),
        ("max.bf16x2", (0x7FC03F80, 0xBF80FFFF), 0xBF803F80),
        ("min.bf16x2", (0x7FC0FFC0, 0x7F810001), 0x7FFF0001),
        ("max.bf16x2", (0xC0003F81, 0xBF803F80), 0xBF803F81),
        ("min.bf16x2", (0xC0003F81, 0xBF803F80), 0xC0003F80),
        ("max.f32", (0x80000000, 0), 0),
        ("min.f32", (0, 0x80000000), 0x80000000),
        ("min.f32", (NAN, bits(3.0)), bits(3.0)),
        ("max.f32", (0xFFC00000, 0xFFC00001), NAN),
        ("add.rn.f32", (0xFFC00000, bits(1.0)), NAN),
        ("sub.rn.f32", (0x7F800000, 0x7F800000), NAN),
        ("copysign.f32", (bits(-1.0), bits(3.0)), bits(-3.0)),
        ("mul.rz.f32", (0x3F800001, 0x3F800001), 0x3F800002),
        ("mul.rz.f32", (bits(3e38), bits(3e38)), 0x7F7FFFFF),
        ("mul.rz.f32", (bits(7.99), 1), 7),  # a subnormal number counts
        ("mul.rz.f32", (bits(-7.99), 1), 0x80000007),
        ("sqrt.rn.f32", (bits(2.0),), 0x3FB504F3),
        ("setp.lt.f32", (NAN, 0), 0),
        ("setp.ltu.f32", (NAN, 0), 1),
        ("setp.ne.f32", (NAN, NAN), 0),
        ("setp.neu.f32", (NAN, NAN), 1),
        ("setp.eq.f32", (0, 0x80000000), 1),
        ("setp.lt.s32", (0xFFFFFFFF, 0), 1),
        ("setp.lt.u32", (0xFFFFFFFF, 0), 0),
        ("selp.b32", (1, 2, 0), 2),
    ],
)
def test_known_results(opcode: str, operands: tuple[int, ...], expected: int) -> None:
    assert hex(compute(opcode, *operands)) == hex(expected)


def nearest_float32(exact: Fraction) -> np.float32:
    """Rounded once, to nearest even. The candidates are around the twice rounded value."""
    near = np.float32(float(exact))
    candidates = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), c.view(np.uint32) & 1))


def test_fused_multiply_add_rounds_once(rng: np.random.Generator) -> None:
    # 1 + 2^-24 + 2^-54: rounded to float64 first, it would be a tie, which goes to 1.
    fma = INSTRUCTIONS["fma.rn.f32"].function
    a, b, c = (np.float32([x]) for x in (33025 * 2.0**-27, 32513 * 2.0**-27, 1.0))
    assert np.float32(a.astype(np.float64) * b + c) == 1
    assert fma(a, b, c) == 1 + 2.0**-23
    assert fma(-a, b, -c) == -1 - 2.0**-23

    def draw() -> np.ndarray:
        exponents = rng.integers(-30, 30, 3000)
        return np.ldexp(rng.integers(-7, 8, 3000) + 1e-7, exponents).astype(np.float32)

    a, b, c = draw(), draw(), draw()
    c[::2] = (-a.astype(np.float64) * b * (1 + rng.integers(-2, 3, 3000) * 2.0**-24))[::2]
    for result, x, y, z in zip(fma(a, b, c), a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert result == nearest_float32(exact)


# -------------------------------------------------------------------------------------------------
# Whole programs. `out` has a place for each thread, in which the body's %r1 is stored.

PROGRAM = """
.version 9.0
.target sm_90
.address_size 64
.shared .align 16 .b8 memory[1024];
.entry kernel(.param .u64 out)
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<9>;
  mov.u32 %r0, %tid.x;
  ld.param.u64 %rd0, [out];
  cvta.to.global.u64 %rd1, %rd0;
  mul.wide.u32 %rd2, %r0, 4;
  add.s64 %rd3, %rd1, %rd2;
  mov.u32 %r4, memory;
  shl.b32 %r5, %r0, 2;
  add.s32 %r6, %r4, %r5;  // the thread's own place in shared memory
  {body}
  st.global.u32 [%rd3], %r1;
$end:
  ret;
}}
"""


def run(body: str, num_threads: int = 32, num_blocks: int = 1, **options: object) -> list[int]:
    """What ends up in `out`, which is 0xffffffff at first."""
    out = np.full(num_threads, 0xFFFFFFFF, np.uint32)
    address = out.__array_interface__["data"][0]
    machine = Machine(parse(PROGRAM.format(body=body)), **options)  # type: ignore[arg-type]
    launch = Launch("kernel", num_blocks, num_threads, address.to_bytes(8, "little"))
    machine.launch(launch, [Region.at("out", address, out.nbytes, True)])
    return out.tolist()


def test_shuffles() -> None:
    shuffle = "shfl.sync.{}.b32 %r1|%p1, %r0, {}, {}, -1;"
    assert run(shuffle.format("bfly", 1, 31)) == [i ^ 1 for i in range(32)]
    assert run(shuffle.format("up", 2, 0)) == [0, 1, *range(30)]
    assert run(shuffle.format("down", 2, 31)) == [*range(2, 32), 30, 31]
    assert run(shuffle.format("idx", 5, 31)) == [5] * 32
    # Segments of 8 lanes: the mask in the third operand's second byte.
    assert run(shuffle.format("up", 1, 0x1800)) == [i - (i % 8 > 0) for i in range(32)]
    assert run(shuffle.format("down", 1, 0x181F)) == [i + (i % 8 < 7) for i in range(32)]
    assert run(shuffle.format("idx", 3, 0x181F)) == [i // 8 * 8 + 3 for i in range(32)]
    predicate = shuffle.format("up", 2, 0) + "selp.u32 %r1, 1, 0, %p1;"
    assert run(predicate) == [0, 0] + [1] * 30


def test_votes_and_sums_within_each_warp() -> None:
    vote = "setp.gt.u32 %p1, %r0, 33; vote.sync.ballot.b32 %r1, {}%p1, -1;"
    assert run(vote.format(""), 64) == [0] * 32 + [0xFFFFFFFC] * 32
    assert run(vote.format("!"), 64) == [0xFFFFFFFF] * 32 + [3] * 32
    total = run("mov.u32 %r2, -1; redux.sync.add.u32 %r1, %r0, %r2;", 64)
    assert total == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_a_loop_in_which_each_thread_takes_its_own_number_of_turns() -> None:
    body = """
      mov.u32 %r1, 0;
    $loop:
      setp.ge.u32 %p1, %r1, %r0;
      @%p1 bra $done;
      add.u32 %r1, %r1, 1;
      bra.uni $loop;
    $done:
      bar.sync 0;
    """
    assert run(body, 70) == list(range(70))


def test_predicates_and_scopes() -> None:
    constant = "mov.pred %p1, {}; selp.u32 %r1, 1, 0, %p1;"
    assert run(constant.format(0), 2) + run(constant.format(-1), 2) == [0, 0, 1, 1]
    body = """
      mov.u32 %r1, 0;
      { .reg .pred p; setp.lt.u32 p, %r0, 3; @p add.u32 %r1, %r1, 5; @!p bra $done; }
      { .reg .pred p; setp.lt.u32 p, %r0, 1; @!p add.u32 %r1, %r1, 1; }
    $done:
    """
    assert run(body, 6) == [5, 6, 6, 0, 0, 0]


def test_values_pass_through_shared_memory() -> None:
    body = """
      st.shared.u32 [%r6], %r0;
      bar.sync 0;
      xor.b32 %r7, %r5, 252;
      add.s32 %r7, %r7, %r4;
      ld.shared.u32 %r1, [%r7];
    """
    for seed in range(5):
        assert run(body, 64, seed=seed) == list(range(63, -1, -1))
    # Within a warp, its own barrier is enough.
    by_warp = body.replace("bar.sync 0", "bar.warp.sync -1").replace("252", "124")
    assert run(by_warp, 64) == [i ^ 31 for i in range(64)]


def test_vectors_and_narrow_accesses() -> None:
    body = """
      mov.b64 %rd4, 0x8877665544332211;
      mul.lo.u32 %r7, %r0, 16;
      add.u32 %r7, %r7, %r4;
      mov.u16 %rs1, 0xabcd;
      cvt.u32.u64 %r2, %rd4;
      st.shared.v4.u32 [%r7], {%r2, %r2, %r0, %r0};
      st.shared.u8 [%r7+1], %rs1;
      ld.shared.v2.u16 {%rs2, %rs3}, [%r7];
      mov.b32 %r1, {%rs3, %rs2};
    """
    assert run(body, 4) == [0xCD114433] * 4


def test_atomic_operations_count_every_thread() -> None:
    body = """
      setp.ne.u32 %p1, %r0, 0;
      mov.u32 %r2, 0;
      @!%p1 st.shared.u32 [memory], %r2;
      bar.sync 0;
      atom.shared.add.u32 %r3, [memory], 2;
      bar.sync 0;
      ld.shared.u32 %r1, [memory];
    """
    assert run(body, 64) == [128] * 64


@pytest.mark.parametrize("by_warps", [True, False])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r1, [%rd3+4];", r"outside of memory, at out \+ 256"),
        ("ld.global.u32 %r1, [%rd1+-4];", "outside of memory"),
        ("ld.global.u16 %rs1, [%rd3+1];", r"2-byte access at out \+ \d+ is misaligned"),
        ("add.s64 %rd3, %rd3, 2;", "4-byte access at out"),
        ("ld.global.v2.u32 {%r1, %r2}, [%rd3];", "8-byte access .* misaligned"),
        ("ld.shared.u32 %r1, [%r6];", r"shared \+ \d+ is read, but nobody wrote it"),
        ("st.shared.u32 [%r6+1024], %r0;", "outside of memory"),
        ("ld.global.u32 %r1, [0];", "is no address"),
        ("st.shared.u32 [memory], %r0;", "race|different values"),
        ("st.shared.u32 [%r6], %r0; ld.shared.u32 %r1, [memory];", "race|nobody wrote it"),
        ("st.shared.u32 [%r6], %r0; bar.warp.sync -1; ld.shared.u32 %r1, [memory];", "race"),
        (  # a read, then a write by another thread
            "st.shared.u32 [%r6], %r0; bar.sync 0; ld.shared.u32 %r1, [memory+8];"
            "st.shared.u32 [%r6], %r1;",
            "race: no barrier between this write",
        ),
        (  # an atomic operation and an ordinary one
            "mov.u32 %r1, 1; st.shared.u32 [memory], %r1; atom.shared.add.u32 %r1, [memory], 1;",
            "race",
        ),
        (  # a thread's own atomic operation hides none of the others
            "mov.u32 %r1, 1; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [memory], %r1; bar.sync 0;"
            "atom.shared.add.u32 %r1, [memory], 1; @%p1 ld.shared.u32 %r1, [memory];",
            "race",
        ),
        ("ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd3], %r0;", "race"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 bra $end; bar.sync 0;", "have exited"),
        (
            "setp.eq.u32 %p1, %r0, 3; @%p1 bra $end; redux.sync.add.u32 %r1, %r0, %r0;",
            "not in its mask",
        ),
        (
            "mov.u32 %r2, -1; setp.eq.u32 %p1, %r0, 3; @%p1 bra $end;"
            "redux.sync.add.u32 %r1, %r0, %r2;",
            "deadlock: 31 threads",
        ),
        (  # a thread that was at a collective before it exited is not there again
            "mov.u32 %r2, 0; mov.u32 %r1, 0; mov.u32 %r3, -1; bra $loop; $out: ret;"
            "$loop: redux.sync.add.u32 %r7, %r2, %r3; add.u32 %r2, %r2, 1;"
            "setp.eq.u32 %p1, %r0, 3; @%p1 bra $out;"
            "setp.lt.u32 %p2, %r2, 3; @%p2 bra $loop;",
            "deadlock: 31 threads",
        ),
        (  # half of the threads wait at each of two barriers
            "and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra $even; bar.sync 0;"
            "bra $both; $even: bar.sync 0; $both:",
            "different barriers",
        ),
        (
            "mov.u32 %r2, -1; setp.lt.u32 %p1, %r0, 32; @%p1 bra $first; bar.sync 0; bra $both;"
            "$first: setp.eq.u32 %p2, %r0, 3; @%p2 bra $late;"
            "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $late: bar.sync 0; $both:",
            "deadlock",
        ),
        ("shfl.sync.idx.b32 %r1, %r0, 9, 31, %r3;", "not in its mask"),
        ("mov.u32 %r1, 0; div.u32 %r1, %r0, %r1;", "division by zero"),
        ("add.sat.s32 %r1, %r0, %r0;", r"add\.sat\.s32: unknown instruction"),
        ("ex2.approx.f32 %r1, %r0;", "unknown instruction"),
        ("bar.sync 1;", "unknown modifiers"),
        ("add.s64 %r1, %r0, %r0;", "not as wide"),
        ("ld.volatile.global.u32 %r1, [%rd3];", "ld.volatile"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("mov.u32 %r1, %r99;", "not declared"),
    ],
)
def test_mistakes_are_found(body: str, message: str, by_warps: bool) -> None:
    with pytest.raises(PtxError, match=message):
        run(body, 64, by_warps=by_warps)


def test_blocks_must_not_race_either() -> None:
    body = "mov.u32 %r2, %ctaid.x; add.u32 %r1, %r2, %r0;"
    assert run(body) == list(range(32))
    with pytest.raises(PtxError, match=r"block 1.* race"):
        run(body, num_blocks=2)


def test_threads_may_set_a_flag_to_one_value() -> None:
    body = "mov.u32 %r1, 7; st.shared.u32 [memory], %r1; bar.sync 0; ld.shared.u32 %r1, [memory];"
    assert run(body, 64) == [7] * 64


def test_results_that_depend_on_random_bits_differ_between_seeds() -> None:
    """Registers that nothing was written to; the order of atomic operations."""
    ranks = """
      mov.u32 %r2, 0; setp.ne.u32 %p1, %r0, 0; @!%p1 st.shared.u32 [memory], %r2;
      bar.sync 0;
      atom.shared.add.u32 %r1, [memory], 1;
    """
    for body in ("mov.u32 %r1, %r8;", ranks):
        assert run(body, 64, seed=1) != run(body, 64, seed=2)
        assert run(body, 64, seed=1) == run(body, 64, seed=1)


def test_a_function_is_called() -> None:
    function = """
.func double(.param .b64 place, .param .b32 value)
{
  .reg .b64 %rd<2>;
  .reg .b32 %r<3>;
  ld.param.u64 %rd1, [place];
  ld.param.u32 %r1, [value];
  add.s32 %r2, %r1, %r1;
  st.u32 [%rd1], %r2;
  ret;
}
"""
    call = """
  cvta.to.global.u64 %rd4, %rd3;
  {{ .param .b64 a; .param .b32 b;
  st.param.b64 [a+0], %rd4; st.param.b32 [b+0], %r0;
  call.uni double, (a, b); }}
  bra.uni $end;
"""
    text = PROGRAM.replace("{body}", call).replace(".entry", function + ".entry")
    text = text.replace(function, function.replace("{", "{{").replace("}", "}}"))
    out = np.zeros(40, np.uint32)
    address = out.__array_interface__["data"][0]
    machine = Machine(parse(text.format()))
    machine.launch(
        Launch("kernel", 1, 40, address.to_bytes(8, "little")),
        [Region.at("out", address, out.nbytes, True)],
    )
    assert out.tolist() == [2 * i for i in range(40)]


def test_inputs_are_not_written() -> None:
    out = np.zeros(32, np.uint32)
    address = out.__array_interface__["data"][0]
    machine = Machine(parse(PROGRAM.format(body="mov.u32 %r1, 0;")))
    launch = Launch("kernel", 1, 32, address.to_bytes(8, "little"))
    with pytest.raises(PtxError, match="is only an input"):
        machine.launch(launch, [Region.at("out", address, out.nbytes, False)])
    with pytest.raises(PtxError, match="takes 8 bytes of arguments, not 4"):
        machine.launch(Launch("kernel", 1, 32, bytes(4)), [])
