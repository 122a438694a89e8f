"""ulysses_attention against the dense oracle: forward and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but_for

from ulysses_jax import make_mesh, ulysses_attention
from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS

B, T, H = 2, 16, 4
TOLERANCE = 2e-5


def inputs(num_heads, num_kv_heads, *, keys=T, dtype=jnp.float32, batch=B):
    draws = jax.random.split(jax.random.key(num_heads * 100 + num_kv_heads), 4)
    q, weights = (
        jax.random.normal(draw, (batch, T, num_heads, H), dtype) for draw in draws[:2]
    )
    k, v = (
        jax.random.normal(draw, (batch, keys, num_kv_heads, H), dtype)
        for draw in draws[2:]
    )
    return q, k, v, weights


def out_and_gradients(attend, q, k, v, weights):
    """The output and the gradients of a weighted sum of it with respect to q, k, v."""

    def weighted(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    grad = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)
    gradients, out = jax.jit(grad)(q, k, v)
    return (out, *gradients)


def assert_close(got, want, tolerance=TOLERANCE):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@functools.cache
def oracle(num_heads, num_kv_heads, causal=True):
    q, k, v, weights = inputs(num_heads, num_kv_heads)
    attend = functools.partial(reference_attention, mask=Mask(causal=causal))
    return out_and_gradients(attend, q, k, v, weights)


def mesh_of(axis_type=AxisType.Auto, **degrees):
    num = int(np.prod(list(degrees.values())))
    return make_mesh(**degrees, devices=jax.devices()[:num], axis_type=axis_type)


@pytest.mark.parametrize(
    "heads, seq",
    slow_but_for(
        [
            ((8, 8), 8),
            ((8, 8), 1),
            ((8, 4), 2),
            ((8, 2), 8),
            ((8, 1), 4),
            ((6, 3), 2),
            ((6, 3), 4),
            ((7, 7), 4),
            ((12, 4), 8),
        ],
        [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (7, 7), (12, 4)],
        [1, 2, 4, 8],
    ),
)
def test_equals_the_oracle(heads, seq):
    mesh = mesh_of(seq=seq)
    attend = functools.partial(ulysses_attention, mesh=mesh)
    got = out_and_gradients(attend, *inputs(*heads))
    assert_close(got, oracle(*heads))


@pytest.mark.parametrize(
    "degrees",
    slow_but_for(
        [dict(data=2, seq=4), dict(fsdp=2, seq=2, tensor=2)],
        [
            dict(data=2, seq=4),
            dict(fsdp=2, seq=2, tensor=2),
            dict(seq=4, tensor=2),
            dict(seq=2, tensor=4),
            dict(data=1, fsdp=2, seq=4),
        ],
    ),
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_composes_with_other_axes(degrees, axis_type):
    mesh = mesh_of(axis_type, **degrees)
    q, k, v, weights = inputs(8, 4)
    with jax.set_mesh(mesh):
        got = out_and_gradients(ulysses_attention, q, k, v, weights)
    assert_close(got, oracle(8, 4))
    assert got[0].sharding.is_equivalent_to(
        NamedSharding(mesh, P(("data", "fsdp"), "seq", "tensor")), 4
    )


def test_a_residual_sum_has_one_type():
    """Axes of degree 1 do not come into the type of what a user's array is added to."""
    mesh = mesh_of(AxisType.Explicit, data=2, seq=4)
    q, k, v, weights = inputs(8, 8)
    with jax.set_mesh(mesh):
        put = NamedSharding(mesh, P("data", "seq"))
        q, k, v, weights = (jax.device_put(x, put) for x in (q, k, v, weights))
        got = out_and_gradients(
            lambda q, k, v: q + ulysses_attention(q, k, v), q, k, v, weights
        )
    want, dq, *others = oracle(8, 8)
    assert_close(got, (want + np.asarray(q), dq + np.asarray(weights), *others))


@pytest.mark.parametrize("head_chunks", [2, 4])
@pytest.mark.parametrize("heads, kv_heads", [(16, 16), (16, 2)])
def test_head_chunks_change_nothing(heads, kv_heads, head_chunks):
    mesh = mesh_of(seq=2)
    attend = functools.partial(ulysses_attention, mesh=mesh, head_chunks=head_chunks)
    got = out_and_gradients(attend, *inputs(heads, kv_heads))
    assert_close(got, oracle(heads, kv_heads))


@pytest.mark.parametrize("heads, kv_heads", [(7, 7), (11, 11), (28, 4)])
def test_head_chunks_with_heads_that_do_not_divide(heads, kv_heads):
    attend = functools.partial(ulysses_attention, mesh=mesh_of(seq=2), head_chunks=2)
    got = out_and_gradients(attend, *inputs(heads, kv_heads))
    assert_close(got, oracle(heads, kv_heads))


@pytest.mark.parametrize("degrees", [dict(seq=1), dict(ring=2)], ids=str)
def test_head_chunks_where_nothing_is_exchanged(degrees):
    """Groups are attended by themselves all the same."""
    seen = []

    def forward(q, k, v, *, mask, scale):
        seen.append((q.shape[2], k.shape[2]))
        return PARTS["blockwise"].forward(q, k, v, mask=mask, scale=scale)

    def attention(q, k, v, *, mask, scale):
        return forward(q, k, v, mask=mask, scale=scale)[0]

    if "ring" in degrees:
        attention = Parts(forward, PARTS["blockwise"].gradients)
    call = functools.partial(
        ulysses_attention, mesh=mesh_of(**degrees), attention=attention
    )
    q, k, v, _ = inputs(8, 4)
    out = call(q, k, v, head_chunks=2)
    np.testing.assert_allclose(out, oracle(8, 4)[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert set(seen) == {(4, 2)}
    with pytest.raises(ValueError, match=r"head_chunks 3 does not divide .* use one"):
        call(q, k, v, head_chunks=3)


def test_axes_of_other_names_are_not_dropped_in_silence():
    mesh = jax.make_mesh((2, 4), ("dp", "seq"), axis_types=(AxisType.Explicit,) * 2)
    q, k, v, _ = inputs(8, 4)
    with jax.set_mesh(mesh):
        put = NamedSharding(mesh, P("dp", "seq"))
        q, k, v = (jax.device_put(x, put) for x in (q, k, v))
        with pytest.raises(ValueError, match="'dp'.*name it data or fsdp"):
            jax.jit(ulysses_attention)(q, k, v)
    mesh = jax.make_mesh((8,), ("sp",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"\('sp',\).*name the sequence's axis seq"):
        ulysses_attention(*inputs(8, 4)[:3], mesh=mesh)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_with_axes_of_other_names_without_jit(axis_type):
    mesh = jax.make_mesh((2, 4), ("replica", "seq"), axis_types=(axis_type,) * 2)
    q, k, v, weights = inputs(8, 4)
    out = ulysses_attention(q, k, v, mesh=mesh)
    np.testing.assert_allclose(out, oracle(8, 4)[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_window_positions_and_scale():
    q, k, v, weights = inputs(4, 4)
    positions = jnp.asarray(np.random.default_rng(0).permuted([range(T)] * B, axis=1))
    mask = Mask(causal=True, window=5, q_positions=positions, kv_positions=positions)
    want = out_and_gradients(
        functools.partial(reference_attention, mask=mask, scale=0.3), q, k, v, weights
    )
    attend = functools.partial(
        ulysses_attention,
        mesh=mesh_of(seq=4),
        window=5,
        positions=positions,
        scale=0.3,
    )
    assert_close(out_and_gradients(attend, q, k, v, weights), want)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_under_checkpoint_and_scan(axis_type):
    mesh = mesh_of(axis_type, data=2, seq=4)
    q, k, v, weights = inputs(4, 4)

    def three_layers(attend, q, k, v):
        @jax.checkpoint
        def layer(x, _):
            return x + attend(x, k, v), None

        return jax.lax.scan(layer, q, None, length=3)[0]

    attend = functools.partial(ulysses_attention, mesh=mesh)
    dense = functools.partial(reference_attention, mask=Mask(causal=True))
    got, want = (
        out_and_gradients(functools.partial(three_layers, f), q, k, v, weights)
        for f in (attend, dense)
    )
    assert_close(got, want)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_without_jit_and_without_set_mesh(axis_type):
    mesh = mesh_of(axis_type, seq=2)
    q, k, v, weights = inputs(8, 4)

    def weighted(q, k, v):
        return jnp.sum(ulysses_attention(q, k, v, mesh=mesh) * weights)

    got = jax.grad(weighted, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(got, oracle(8, 4)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_inside_a_shard_map_over_another_axis():
    mesh = mesh_of(data=2, seq=4)
    q, k, v, _ = inputs(8, 4)

    def one_row(q, k, v):
        assert q.shape[0] == 1
        return ulysses_attention(q, k, v)

    with jax.set_mesh(mesh):
        out = jax.jit(
            jax.shard_map(
                one_row, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
            )
        )(q, k, v)
    np.testing.assert_allclose(out, oracle(8, 4)[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "degrees, given",
    [
        (dict(data=2, seq=2), dict(segment_ids=True)),
        (dict(data=2, ring=2, seq=2), dict(window=5)),
        (dict(data=2, ring=2), dict(return_logsumexp=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_a_shard_map_over_another_axis(degrees, given, check_vma):
    """Keys that are the same on every member of it: their gradient is a sum."""
    q, k, v, weights = inputs(4, 2)
    k = k[:1]
    segments = jnp.asarray([[1] * 5 + [2] * 11, [1] * 9 + [2] * 7])
    given = dict(given)
    ids = segments if given.pop("segment_ids", False) else None
    split = P("data")

    def row(q, k, v, ids):
        out = ulysses_attention(q, k, v, segment_ids=ids, **given)
        if given.get("return_logsumexp"):
            return out[0] + out[1][..., None]
        return out

    def attend(q, k, v):
        specs = split, P(), split, split
        over_data = jax.shard_map(
            row,
            in_specs=specs,
            out_specs=split,
            axis_names={"data"},
            check_vma=check_vma,
        )
        return over_data(q, k, v, ids)

    def dense(q, k, v):
        mask = Mask(
            causal=True,
            window=given.get("window"),
            q_segment_ids=ids,
            kv_segment_ids=ids,
        )
        k = jnp.broadcast_to(k, v.shape)
        out = reference_attention(q, k, v, mask=mask)
        if given.get("return_logsumexp"):
            logits = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(B, T, 2, 2, H), k)
            seen = mask.visible(0, T, 0, T)[:, :, None, None]
            logits = jnp.where(seen, logits * H**-0.5, -1e30)
            out += jax.nn.logsumexp(logits, axis=-1).reshape(B, T, 4, 1)
        return out

    with jax.set_mesh(mesh_of(**degrees)):
        got = out_and_gradients(attend, q, k, v, weights)
    assert_close(got, out_and_gradients(dense, q, k, v, weights))


def test_a_mesh_with_axes_of_other_names():
    mesh = jax.make_mesh((2, 4), ("replica", "seq"), axis_types=(AxisType.Auto,) * 2)
    attend = functools.partial(ulysses_attention, mesh=mesh)
    got = out_and_gradients(attend, *inputs(8, 4))
    assert_close(got, oracle(8, 4))


def test_the_tolerance_catches_faults():
    """A wrong scale and a mask that is off by one differ by far more than TOLERANCE."""
    q, k, v, weights = inputs(8, 4)
    mesh, want = mesh_of(seq=4), oracle(8, 4)

    def off_by_one(q, k, v, *, mask, scale):
        shifted = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = Mask(causal=True, q_positions=shifted + 1, kv_positions=shifted)
        return reference_attention(q, k, v, mask=mask, scale=scale)

    for fault in (dict(scale=1.01 * H**-0.5), dict(attention=off_by_one)):
        attend = functools.partial(ulysses_attention, mesh=mesh, **fault)
        got = out_and_gradients(attend, q, k, v, weights)
        for a, b in zip(got, want, strict=True):
            if fault.get("scale") and a is got[3]:
                continue
            assert float(jnp.abs(a - b).max()) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "shapes, degrees, message",
    [
        (((2, 12, 8, 4), (2, 12, 8, 4)), dict(seq=8), "12, .* pad it to 16"),
        (((3, 16, 8, 4), (3, 16, 8, 4)), dict(data=2), "batch, 3, .* pad it to 4"),
        (
            ((2, 16, 6, 4), (2, 16, 6, 4)),
            dict(tensor=4),
            "(?m)heads, 6, .* tensor degree 4: use a degree of 2$",
        ),
        (
            ((2, 16, 8, 4), (2, 16, 2, 4)),
            dict(tensor=4),
            "(?m)key/value heads, 2, .* a degree of 2, or repeat each 2 times$",
        ),
        (((2, 16, 8, 4), (2, 16, 3, 4)), dict(seq=2), "num_kv_heads 3 does not divide"),
        (((2, 16, 8, 4), (1, 16, 8, 4)), dict(seq=2), "differ in batch or head size"),
        (((2, 16, 8), (2, 16, 8)), dict(seq=2), r"q is \[B, T, N, H\]"),
        (
            ((2, 12, 8, 4), (2, 12, 8, 4)),
            dict(ring=2, seq=4),
            "12, .* ring 2 x seq 4.* use ring=2, seq=2, or ring=1, seq=4, or pad it to "
            "16",
        ),
        (
            ((2, 31, 8, 4), (2, 31, 8, 4)),
            dict(ring=2, seq=4),
            "31, .* use ring=1, seq=1, or pad it to 32",
        ),
    ],
)
def test_bad_shapes_are_refused_with_numbers(shapes, degrees, message):
    q, k = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        ulysses_attention(q, k, k, mesh=mesh_of(**degrees))


def test_bad_arguments_are_refused():
    q = jnp.zeros((1, 16, 8, 4))
    message = (
        r"head_chunks 3 does not divide what a device has of 8 query heads / tensor 2 "
        r"/ seq 2 = 2 query heads \(2 KV heads x 1\): use one of \[1, 2\]"
    )
    with pytest.raises(ValueError, match=message):
        ulysses_attention(q, q, q, mesh=mesh_of(seq=2, tensor=2), head_chunks=3)
    with pytest.raises(ValueError, match="no mesh: pass mesh="):
        ulysses_attention(q, q, q)
    with pytest.raises(ValueError, match="differ in dtype"):
        ulysses_attention(q, q, q.astype(jnp.bfloat16), mesh=mesh_of(seq=2))
    k, ids = q[:, :12], jnp.ones((1, 16), jnp.int32)
    with pytest.raises(ValueError, match="16 query tokens but 12 key tokens"):
        ulysses_attention(q, k, k, mesh=mesh_of(seq=2), segment_ids=ids)
    spec = P(None, "seq")
    with pytest.raises(ValueError, match="call seq_to_heads and heads_to_seq"):
        with jax.set_mesh(mesh_of(seq=2)):
            jax.shard_map(
                lambda x: ulysses_attention(x, x, x), in_specs=spec, out_specs=spec
            )(q)


@pytest.mark.parametrize("degrees", [dict(seq=2), dict(ring=2, seq=2), dict(ring=2)])
def test_no_groups_of_heads(degrees):
    q = jnp.zeros((2, 8, 4, 4))
    with pytest.raises(ValueError, match="head_chunks 0.* use (1 or more|one of)"):
        ulysses_attention(q, q, q, mesh=mesh_of(**degrees), head_chunks=0)


def test_what_is_no_attention():
    q, mesh = jnp.zeros((2, 8, 4, 4)), mesh_of(seq=2)
    for returned in (lambda out: out[:, :4], lambda out: out[:, :, :1]):

        def attention(q, k, v, *, mask, scale, returned=returned):
            return returned(q)

        with pytest.raises(ValueError, match=r"returned \(2.* of q's shape"):
            ulysses_attention(q, q, q, mesh=mesh, attention=attention)
    with pytest.raises(ValueError, match="bfloat16 or float16,.* not int32: cast"):
        ulysses_attention(*[q.astype(jnp.int32)] * 3, mesh=mesh)
    with pytest.raises(ValueError, match="a number of tokens, not 5.5"):
        ulysses_attention(q, q, q, mesh=mesh, window=5.5)
    with pytest.raises(ValueError, match="cudnn needs GPUs, and these are cpu devices"):
        attend(q, q, q, mesh=mesh, mask=Mask(causal=True), attention="cudnn")
    for bad in (dict(strategy="usp"), dict(strategy="")):
        with pytest.raises(ValueError, match="no strategy .*: use one of 'ulysses', "):
            attend(q, q, q, mesh=mesh, mask=Mask(causal=True), **bad)
    for degrees in (dict(seq=2), dict(ring=2)):
        with pytest.raises(ValueError, match="no attention 'flash': use 'auto', 'cu"):
            attend(q, q, q, mesh=mesh_of(**degrees), mask=Mask(), attention="flash")
