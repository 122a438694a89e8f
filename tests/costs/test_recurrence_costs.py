"""What layers of states cost, by hand: FLOPs, kernels, bytes of states and halos."""

import jax
import jax.numpy as jnp
import pytest
from test_optimizer_step import with_optimizer
from test_predict import GPU, plan, run, step_flops

from ulysses_jax import linear_attention
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.optimizer import muon_flops
from ulysses_jax.costs.predict import predict
from ulysses_jax.costs.recurrences import chunk_kernels
from ulysses_jax.costs.traffic import attention_bytes, received_by

HYBRID = dict(num_layers=4, pattern=("delta", "linear", "full"))

# 8 heads of v, gate and out, 4 of q and k, of 64; delta's beta and decay are 8 columns.
LINEAR = 256 * (3 * 512 + 2 * 256)
DELTA = LINEAR + 256 * 2 * 8
FEED_FORWARD, FULL = 3 * 256 * 512, 256 * (2 * 512 + 2 * 256)

# A token and head, forward, on a device that has all tokens: chunks of 64 and 128.
DELTA_FLOPS = 4 * 64 * (64 + 64) + 2 / 3 * 64 * 64 + 6 * 64 * 64
LINEAR_FLOPS = 2 * 128 * (64 + 64) + 4 * 64 * 64
# Of shards, what they do to a state: of the delta rule 64 more columns.
SPREAD_DELTA = 4 * 64 * (64 + 128) + 2 / 3 * 64 * 64 + 6 * 64 * 128
READ = 2 * 64 * 64


def test_flops_by_hand():
    """Of delta, linear, full, delta; 4 sequences of 1,024."""
    flops = step_flops(run(**HYBRID))
    own = 2 * DELTA + LINEAR + FULL
    weights = own + 4 * FEED_FORWARD + 256 * 512  # and the head
    assert flops["matmul"] == 6 * 4096 * weights
    # All but the down projections again.
    again = own + 4 * FEED_FORWARD * 2 // 3
    assert flops["matmul_recompute"] == 2 * 4096 * again
    assert flops["attention"] == step_flops(run(num_layers=1))["attention"]
    one = 4096 * 8 * (2 * DELTA_FLOPS + LINEAR_FLOPS)
    assert flops["recurrence"] == pytest.approx(3 * one)
    # Forward, again, a chunk in the backward pass, and twice a forward: five.
    done = 5 * (2 * SPREAD_DELTA + LINEAR_FLOPS) + 4 * 3 * READ
    more = 4096 * 8 * done - 3 * one
    assert flops["recurrence_recompute"] == pytest.approx(more)


# Of 16 states of 32 x 128, 8 heads of keys.
OWN = dict(delta_heads=16, delta_key_heads=8, delta_key_size=32, delta_value_size=128)


def test_of_sizes_of_its_own():
    """One layer of the delta rule, over shards; and a gate of one that attends."""
    config = run(num_layers=1, pattern=("delta",), **OWN)
    flops = step_flops(config)
    weights = 256 * (3 * 2048 + 2 * 256 + 2 * 16) + FEED_FORWARD + 256 * 512
    assert flops["matmul"] == 6 * 4096 * weights
    one = 4 * 64 * (32 + 128) + 2 / 3 * 64 * 64 + 6 * 32 * 128
    assert flops["recurrence"] == pytest.approx(3 * 4096 * 16 * one)
    one = 4 * 64 * (32 + 160) + 2 / 3 * 64 * 64 + 6 * 32 * 160
    done = flops["recurrence"] + flops["recurrence_recompute"]
    assert done == pytest.approx(4096 * 16 * (5 * one + 4 * 2 * 32 * 128))
    # Three hops of a state, one of them with a change; three tokens before.
    halo = 3 * (16 * 128 + 2 * 8 * 32) * 2
    sent = 4 * 16 * 32 * (3 * 128 + 32) + halo
    assert attention_bytes(config) == {("collective-permute", "seq"): 2 * 3 * sent}
    plain, gated = (
        step_flops(run(attention_gate=gate))["matmul"] for gate in (False, True)
    )
    assert gated - plain == 6 * 4096 * 2 * 256 * 512


@pytest.mark.parametrize("remat, passes", [("none", 4), ("products", 5), ("full", 5)])
def test_chunks_are_computed_again_and_layers_too(remat, passes):
    """Of devices that have all tokens; what products keeps is no state."""
    found = step_flops(run(**HYBRID, memory=dict(remat=remat), mesh=dict(fsdp=4)))
    ratio = found["recurrence_recompute"] / found["recurrence"]
    assert ratio == pytest.approx(passes / 3 - 1)
    assert (found["matmul_recompute"] > 0) == (remat == "full")


def test_of_states_alone():
    """No pairs, no exchange, no groups of heads."""
    config = run(num_layers=2, pattern=("linear",))
    flops = step_flops(config)
    assert flops["attention"] == flops["attention_recompute"] == 0
    assert flops["recurrence"] == pytest.approx(3 * 4096 * 8 * 2 * LINEAR_FLOPS)
    assert received_by(config, "ulysses", ring=1, seq=4) == {}
    assert {kind for kind, _ in attention_bytes(config)} == {"collective-permute"}
    assert config.memory.head_chunks == 1


def test_an_exchange_is_that_of_layers_that_attend():
    hybrid, full = run(**HYBRID), run(num_layers=4)
    one, all_ = (received_by(each, "ulysses", ring=1, seq=4) for each in (hybrid, full))
    assert one == all_
    exchange = "all-to-all", "seq"
    assert attention_bytes(hybrid)[exchange] == attention_bytes(full)[exchange] / 4


@pytest.mark.parametrize(
    "mesh, by_axis",
    [
        # Shards 1 on, and 2 on without the change; and 1 on, the state before.
        (dict(fsdp=2, seq=4), {"seq": (3, 1)}),
        (dict(ring=8), {"ring": (4, 2)}),
        # 1 on with the change, 1 on in the end; 2 with and 4 without cross ring alone.
        (dict(ring=4, seq=2), {"ring+seq": (2, 1), "ring": (2, 1)}),
        (dict(ring=2, seq=4), {"ring+seq": (3, 2), "ring": (1, 0)}),
    ],
    ids=str,
)
def test_bytes_of_states_by_hand(mesh, by_axis):
    """Float32 states of 8 heads of 64 x 64 and as large changes; three rows of q, k and
    v of 16 heads in bfloat16. Forward, again, backward."""
    config = run(num_layers=1, pattern=("delta",), mesh=mesh, batch_size=8)
    rows = 8 // mesh.get("fsdp", 1)
    found = attention_bytes(config)
    for axes, (states, changes) in by_axis.items():
        halo = 3 * 16 * 64 * 2 * (axes != "ring" or "seq" not in mesh)
        sent = 4 * 8 * 64 * 64 * (states + changes) + halo
        assert found.pop(("collective-permute", axes)) == rows * 3 * sent
    assert not found


def test_time_is_that_of_kernels_one_after_the_other():
    config = run(**HYBRID)
    flops = step_flops(config)
    quick, slow = (
        predict(config, GPU, plan(config, chunk_kernels=n)) for n in (0, 10_000_000)
    )
    done = (flops["recurrence"] + flops["recurrence_recompute"]) / 8
    assert quick["recurrence_seconds"] == pytest.approx(done / 0.25e12)  # TF32
    assert slow["recurrence_seconds"] == pytest.approx(30)
    grown = slow["step_seconds"] - quick["step_seconds"]
    assert grown == pytest.approx(30 - quick["recurrence_seconds"])
    model = flops["matmul"] + flops["attention"] + flops["recurrence"]
    assert quick["model_flops"] == model
    # 3 passes of a float32 state a chunk, in each of 4: the delta rule's twice as wide.
    full = run(num_layers=4)
    more = (
        quick["elementwise_seconds"]
        - predict(full, GPU, plan(full))["elementwise_seconds"]
    )
    states = 8 * 64 * 64 * (2 * 2 / 64 + 1 / 128)
    assert more == pytest.approx(4 * 3 * 4 * states * 4096 / 8 / 1e9)


def test_matrices_that_muon_makes_orthogonal():
    """Each kind's own, of 4 layers the last of which is no part of a stack."""

    def flops(pattern, num_layers):
        options = dict(num_layers=num_layers, pattern=pattern)
        return muon_flops(with_optimizer("muon", **options))

    by_kind = {kind: flops((kind,), 1) for kind in ("delta", "linear", "full")}
    assert by_kind["linear"] == by_kind["full"] + 5 * (4 * 256**2 * 512 + 2 * 256**3)
    assert by_kind["delta"] == by_kind["linear"] + 2 * 5 * (4 * 8**2 * 256 + 2 * 8**3)
    assert flops(HYBRID["pattern"], 4) == sum(by_kind.values()) + by_kind["delta"]


PROGRAM = """
HloModule jit_step

%fused (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  ROOT %n = f32[4] negate(%x)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %y = f32[4] get-tuple-element(%t), index=1
  %a = f32[4] fusion(%y), kind=kLoop, calls=%fused
  %b = f32[4] fusion(%a), kind=kLoop, calls=%fused
  %c = f32[4] custom-call(%b), custom_call_target="__cublas$gemm"
  ROOT %o = (s32[], f32[4]) tuple(%i, %c)
}

%condition (u: (s32[], f32[4])) -> pred[] {
  %u = (s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %k = s32[] constant(7)
  ROOT %l = pred[] compare(%j, %k), direction=LT
}

ENTRY %main (v: (s32[], f32[4])) -> (s32[], f32[4]) {
  %v = (s32[], f32[4]) parameter(0)
  ROOT %w = (s32[], f32[4]) while(%v), condition=%condition, body=%body, NAME
}
"""


def test_a_program_names_its_loops():
    """Four groups of two chunks: their own kernels, and those of the chunks."""
    q = jnp.ones((1, 64, 1, 8))
    none = jax.sharding.get_abstract_mesh()

    def out(v):
        return linear_attention(q, q, v, mesh=none, chunk_tokens=8).sum()

    text = jax.jit(jax.grad(out)).lower(q).compile().as_text()
    kernels = chunk_kernels(parse(text))
    assert kernels > 8 and kernels % 4 == 0


def test_kernels_of_loops_over_chunks():
    """Three in a body that runs 7 times, and what asks whether it goes on."""
    trips = 'backend_config={"known_trip_count":{"n":"7"}}, metadata={op_name="%s"}'
    for name, kernels in (("jit(step)/over_chunks/while", 28), ("jit(step)/while", 0)):
        module = parse(PROGRAM.replace("NAME", trips % name))
        assert chunk_kernels(module) == kernels


@pytest.mark.parametrize("is_spread", [True, False])
def test_pieces_by_hand(is_spread):
    """One layer of the delta rule. Pieces are read from a state that is known: forward,
    again, a chunk, and twice a forward. Over shards what they do to a state is computed
    six times, else what they leave once; keys, values, beta and decay as often, of
    which one more is the forward pass's and two are products of a pull."""
    mesh = dict(seq=4) if is_spread else dict(fsdp=4)
    memory = dict(sequence_chunk_tokens=128)
    config = run(num_layers=1, pattern=("delta",), memory=memory, mesh=mesh)
    flops = step_flops(config)
    columns = 128 if is_spread else 64
    end = 2 * 64 * (64 + columns) + 2 / 3 * 64 * 64 + 4 * 64 * columns
    done = 5 * DELTA_FLOPS + (6 if is_spread else 1) * end
    found = flops["recurrence"] + flops["recurrence_recompute"]
    assert found == pytest.approx(4096 * 8 * done)
    again = DELTA + FEED_FORWARD * 2 // 3
    again += (5 if is_spread else 1) * 256 * (512 + 256 + 16)
    assert flops["matmul_recompute"] == 2 * 4096 * again
    if is_spread:  # three hops of a state, and one change; three tokens of the layer
        sent = 4 * 8 * 64 * (3 * 64 + 64) + 3 * 256 * 2
        assert attention_bytes(config) == {("collective-permute", "seq"): 4 * 3 * sent}
