"""The function for people with a model of their own: ids, meshes, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax import attention_fn, make_mesh, ulysses_attention
from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS

B, T, N, H = 2, 16, 4, 8


def inputs(num_heads=N, num_kv_heads=N):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((B, T, heads, H), np.float32))
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


SEGMENTS = np.asarray([[1] * 5 + [2] * 11, [1] * 9 + [2] * 7])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint32, list])
def test_ids_of_any_integer_type(dtype, axis_type):
    """Unsigned ones too: a window takes differences of positions."""
    q, k, v = inputs()
    positions = np.arange(T)[None].repeat(B, axis=0)
    mask = Mask(
        causal=True,
        window=4,
        q_segment_ids=jnp.asarray(SEGMENTS),
        kv_segment_ids=jnp.asarray(SEGMENTS),
    )
    want = reference_attention(q, k, v, mask=mask)
    segments, positions = (
        x.tolist() if dtype is list else x.astype(dtype) for x in (SEGMENTS, positions)
    )
    with jax.set_mesh(make_mesh(data=2, seq=4, axis_type=axis_type)):
        attend = functools.partial(
            ulysses_attention, segment_ids=segments, positions=positions, window=4
        )
        got = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(segment_ids=SEGMENTS.astype(float)),
            "segment_ids are integers, not float",
        ),
        (dict(positions=SEGMENTS + 2**31), "positions 2147483649 to .* exceed int32"),
        (
            dict(segment_ids=SEGMENTS[:1]),
            r"segment_ids has shape \(1, 16\), .*\(2, 16\)",
        ),
        (dict(segment_ids=(SEGMENTS,)), "segment_ids is an array or a pair, not 1"),
        (dict(positions=(SEGMENTS, SEGMENTS[:, :4])), r"positions has shape \(2, 4\)"),
    ],
)
def test_ids_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        ulysses_attention(*inputs(), mesh=make_mesh(data=2, seq=4), **given)


def test_ids_in_pairs_for_cross_attention():
    q, k, v = inputs()
    q, segments = q[:, :8], (SEGMENTS[:, 2:10], SEGMENTS)
    mask = Mask(q_segment_ids=segments[0], kv_segment_ids=segments[1])
    got = ulysses_attention(
        q, k, v, mesh=make_mesh(data=2, seq=4), causal=False, segment_ids=segments
    )
    want = reference_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("heads, kv_heads", [(12, 6), (10, 2), (6, 6)])
@pytest.mark.parametrize(
    "degrees", [dict(seq=4, tensor=2), dict(seq=2, tensor=2)], ids=str
)
def test_uneven_heads_under_tensor(heads, kv_heads, degrees):
    """Padding is within the heads of a tensor shard: 6, 5 or 3 of them over seq."""
    mesh = make_mesh(data=-1, **degrees)
    q, k, v = inputs(heads, kv_heads)

    def gradients(attend):
        return jax.jit(
            jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), argnums=(0, 1, 2))
        )(q, k, v)

    got = gradients(functools.partial(ulysses_attention, mesh=mesh))
    want = gradients(functools.partial(reference_attention, mask=Mask(causal=True)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_two_meshes_at_once_are_refused():
    """The mesh that is set would win in silence."""
    with jax.set_mesh(make_mesh(data=2, seq=4)):
        with pytest.raises(ValueError, match="'seq': 8.* jax.set_mesh .*'seq': 4"):
            ulysses_attention(*inputs(8, 8), mesh=make_mesh(seq=8))
        out = ulysses_attention(*inputs(), mesh=make_mesh(data=2, seq=4))
    assert out.sharding.spec[1] in ("seq", ("ring", "seq"))


def test_the_attention_for_the_platform_is_called(monkeypatch):
    """The devices of the mesh decide, and q, k and the mask with them."""
    asked = []

    def spy(name, device, q, k, mask):
        asked.append((name, device.platform, q.shape, k.shape, mask.causal))
        return reference_attention

    monkeypatch.setattr("ulysses_jax.attend.local_attention", spy)
    q, k, v = inputs(8, 4)
    attend(q, k[:, :8], v[:, :8], mesh=make_mesh(seq=8), mask=Mask())
    assert asked == [("auto", "cpu", (B, T, 8, H), (B, 8, 4, H), False)]


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
        COMPILED.append(event)
        if event == "/jax/core/compile/backend_compile_duration"
        else None
    )
)


def compiles(call):
    """How many programs a call compiles."""
    before = len(COMPILED)
    jax.block_until_ready(call())
    return len(COMPILED) - before


def eager_calls():
    q, k, v = inputs()
    mesh = make_mesh(seq=2, devices=jax.devices()[:2])
    ring = make_mesh(ring=2, devices=jax.devices()[:2])
    flax = nnx.MultiHeadAttention(
        N, N * H, decode=False, rngs=nnx.Rngs(0), attention_fn=attention_fn(mesh)
    )
    x = jnp.ones((B, T, N * H))

    def gradient():
        def loss(q):
            return ulysses_attention(q, k, v, mesh=mesh, scale=0.2).sum()

        return jax.grad(loss)(q)

    call = functools.partial(ulysses_attention, q, k, v)
    return {
        "plain": lambda: call(mesh=mesh),
        "window": lambda: call(mesh=mesh, window=5),
        "segments": lambda: call(mesh=mesh, segment_ids=SEGMENTS, positions=SEGMENTS),
        "a mesh made anew": lambda: call(mesh=make_mesh(seq=4, data=2)),
        "ring": lambda: call(mesh=ring),
        "learned scale": lambda: call(mesh=mesh, scale=jnp.asarray(0.3)),
        "its own attention": lambda: call(mesh=mesh, attention=reference_attention),
        "logsumexp": lambda: call(mesh=mesh, return_logsumexp=True)[1],
        "gradient": gradient,
        "flax": lambda: flax(x),
    }


@pytest.mark.parametrize("name", eager_calls())
def test_the_second_call_without_jit_compiles_nothing(name):
    call = eager_calls()[name]
    assert 0 < compiles(call) < 15
    assert compiles(call) == 0


def test_what_a_function_holds_may_change_without_jit():
    """What is compiled once would attend as it did at first."""
    q, k, v = inputs()
    mesh = make_mesh(seq=2, devices=jax.devices()[:2])

    class Held:
        temperature = 1.0

        def attend(self, q, k, v, *, mask, scale):
            return self.temperature * reference_attention(q, k, v, mask=mask)

    held = Held()
    attention = held.attend
    for function in (attention, lambda *qkv, **options: attention(*qkv, **options)):
        call = functools.partial(ulysses_attention, mesh=mesh, attention=function)
        held.temperature = 1.0
        first = np.asarray(call(q, k, v))
        held.temperature = 2.0
        np.testing.assert_allclose(call(q, k, v), 2 * first, rtol=1e-6)

        def loss(temperature, call=call):
            held.temperature = temperature  # a tracer, and another one each time
            return call(q, k, v).sum()

        for _ in range(2):
            got = jax.grad(loss)(1.0)
            np.testing.assert_allclose(got, first.sum(), rtol=1e-4)


@pytest.mark.parametrize("where", ["jit", "eager", "ring"])
def test_a_learned_scale(where):
    q, k, v = inputs(4, 2)
    degrees = dict(ring=2) if where == "ring" else dict(seq=2)
    mesh = make_mesh(**degrees, devices=jax.devices()[:2])

    def gradients(attend, jit=True):
        def loss(scale, q, k):
            return jnp.sum(jnp.sin(attend(q, k, v, scale=scale / jnp.sqrt(H))))

        grad = jax.grad(loss, argnums=(0, 1, 2))
        return (jax.jit(grad) if jit else grad)(1.3, q, k)

    attend = functools.partial(ulysses_attention, mesh=mesh)
    got = gradients(attend, where != "eager")
    want = gradients(functools.partial(reference_attention, mask=Mask(causal=True)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5)


def test_under_x64():
    """float32 is what it is without; a NumPy float64 scale is a number."""
    q, k, v = inputs()
    mesh = make_mesh(ring=2, seq=2, devices=jax.devices()[:4])
    call = functools.partial(
        ulysses_attention, mesh=mesh, scale=np.float64(0.3), window=6
    )

    def gradient(q):
        return jax.grad(lambda q: jnp.sum(call(q, k, v) ** 2))(q)

    want = jax.jit(gradient)(q)
    with jax.enable_x64(True):
        got = jax.jit(gradient)(q)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="summed in float32, not float64: cast"):
            call(*(x.astype(jnp.float64) for x in (q, k, v)))
        ids = jnp.zeros((B, T), jnp.int64)
        with pytest.raises(ValueError, match=r"segment_ids are int64.*jnp\.int32"):
            call(q, k, v, segment_ids=ids)


@pytest.mark.parametrize("name", ["segment_ids", "positions"])
def test_jax_arrays_that_int32_does_not_hold(name):
    """NumPy's are told by their values; under jit these have none."""
    q, k, v = inputs()
    ids = jnp.full((B, T), 2**32 - 5, jnp.uint32)
    call = functools.partial(ulysses_attention, mesh=make_mesh(data=2, seq=4))
    message = rf"{name} are uint32, and int32 does not hold .* \.astype\(jnp\.int32\)"
    with pytest.raises(ValueError, match=message):
        call(q, k, v, **{name: ids})
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda ids: call(q, k, v, **{name: ids}))(ids)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(window=True), "window is a number of tokens, not True"),
        (dict(causal="no"), "causal is True or False, not 'no'"),
        (dict(mesh=8), r"mesh is a jax.sharding.Mesh .* make_mesh\(seq=8\), not 8"),
        (dict(head_chunks=True), "head_chunks is a number of groups, not True"),
        (dict(head_chunks=1.5), "head_chunks is a number of groups, not 1.5"),
        (dict(scale="auto"), "scale is one number or a scalar array, not str"),
        (dict(scale=1j), "scale is one number or a scalar array, not complex"),
        (dict(scale=True), "scale is one number or a scalar array, not bool"),
        (dict(scale=jnp.ones(4)), r"not float32\[4\]: multiply q"),
        (dict(scale=float("nan")), "scale is a finite number, not nan"),
        (dict(attention=5), r"attention is a function f\(q, k, v, .*, not 5"),
        (dict(attention="cuDNN"), "no attention 'cuDNN': use 'auto', 'cudnn', "),
        (dict(attention=""), "no attention '': use 'auto', 'cudnn', 'mosaic'"),
        (
            dict(attention=jax.nn.dot_product_attention),
            r"raised TypeError.* called as f\(q, k, v, mask=..., scale=...\).*Wrap it",
        ),
        (
            dict(attention=lambda q, k, v: q),
            r"argument 'mask'. It is called as f\(q, k, v, mask=..., scale=...\)",
        ),
        (
            dict(attention=lambda q, k, v, *, mask, scale: q * mask.array),
            r"no attribute 'array'.*mask a ulysses_jax.attention.mask.Mask",
        ),
        (
            dict(attention=lambda q, k, v, *, mask, scale: (q, k)),
            "attention returned tuple for a q of",
        ),
        (
            dict(attention=reference_attention, return_logsumexp=True),
            "returns no logsumexp: give a ulysses_jax.attention.parts.Parts",
        ),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    options = dict(mesh=make_mesh(data=2, seq=4)) | given
    with pytest.raises(ValueError, match=message):
        ulysses_attention(*inputs(), **options)


def test_parts_that_are_called_otherwise():
    parts = Parts(lambda q, k, v: (q, q), PARTS["blockwise"].gradients)
    with pytest.raises(ValueError, match=r"called as f\(q, k, v, mask=..., scale"):
        ulysses_attention(*inputs(), mesh=make_mesh(ring=4, data=2), attention=parts)


def test_arrays_that_are_none():
    q, k, v = inputs()
    call = functools.partial(ulysses_attention, mesh=make_mesh(data=2, seq=4))
    with pytest.raises(ValueError, match="q is an array, not list"):
        call(q.tolist(), k, v)
    over_ring = dict(mesh=make_mesh(data=2, ring=4), window=3)
    for no_q, no_k in ((q[:0], k[:0]), (q[:, :0], k), (q, k[:, :0]), (q[:, :, :0], k)):
        with pytest.raises(ValueError, match=r"nothing to attend .* call out where"):
            call(no_q, no_k, no_k)
        with pytest.raises(ValueError, match=r"nothing to attend .* call out where"):
            call(no_q, no_k, no_k, **over_ring)
    eights = (x.astype(jnp.float8_e4m3fn) for x in inputs())
    with pytest.raises(ValueError, match="float32, bfloat16 or float16,.*float8"):
        call(*eights)


def test_an_attention_that_closes_over_a_sharded_array():
    q, k, v = inputs()
    mesh = make_mesh(data=2, seq=4, axis_type=AxisType.Explicit)
    bias = jnp.ones((H,)) * 0.1

    def call(mesh, bias):
        def attention(q, k, v, *, mask, scale):
            return reference_attention(q + bias, k, v, mask=mask, scale=scale)

        return ulysses_attention(q, k, v, mesh=mesh, attention=attention)

    lies = jax.device_put(bias, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="a mesh with Auto axes, .* np.asarray"):
            call(None, lies)
        got = call(None, np.asarray(lies))
    auto = make_mesh(data=2, seq=4)
    other = call(auto, jax.device_put(bias, NamedSharding(auto, P())))
    want = reference_attention(q + bias, k, v, mask=Mask(causal=True))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(other, want, rtol=2e-5, atol=2e-5)


def test_arrays_that_lie_elsewhere():
    """On devices that are not the mesh's, or where JAX may move nothing by itself."""
    q, k, v = inputs()
    mesh = make_mesh(seq=2, devices=jax.devices()[:2])
    spec = P(("data", "fsdp"), ("ring", "seq"), "tensor", None)
    laid_out = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    ids = jax.device_put(SEGMENTS.astype(np.int32), NamedSharding(mesh, P(spec[0])))
    scale = jax.device_put(jnp.asarray(0.3), NamedSharding(mesh, P()))
    call = functools.partial(ulysses_attention, mesh=mesh, segment_ids=ids, scale=scale)
    elsewhere = [jax.device_put(x, jax.devices()[3]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"NamedSharding\(mesh, P\(.*'seq'\), 'tens"):
        call(*elsewhere)
    with jax.transfer_guard("disallow"):
        with pytest.raises(ValueError, match=r"NamedSharding\(mesh, P\(.*Disallowed"):
            call(q, k, v)
        got = call(*laid_out)
    want = call(q, k, v)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "sinks, attention, message",
    [
        (np.zeros(2, np.float32), None, r"a logit a query head, \(4,\) .*, not \(2,\)"),
        (np.zeros((1, 4), np.float32), None, r"query head, \(4,\) .*, not \(1, 4\)"),
        ([0.0] * 4, None, r"query head, \(4,\) .*, not list"),
        (np.zeros(4, np.int32), None, "in float32 or bfloat16, not int32: cast them"),
        (np.zeros(4, np.float32), reference_attention, "give a .*Parts, to which they"),
        (np.zeros(4, np.float32), "reference", "reference cannot attend to some keys"),
    ],
)
def test_sinks_that_cannot_be(sinks, attention, message):
    """The reference alone joins none: it has them on whole rows, not over a ring."""
    mesh = make_mesh(ring=2 if attention == "reference" else 1, seq=2, data=-1)
    call = functools.partial(ulysses_attention, mesh=mesh, attention=attention)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(call, sinks=sinks), *inputs())


def test_forward_mode_is_refused_and_works_on_the_gradient():
    q, k, v = inputs()
    mesh = make_mesh(seq=2, devices=jax.devices()[:2])
    attend = functools.partial(ulysses_attention, mesh=mesh)
    with pytest.raises(ValueError, match=r"reverse mode alone: use jax.grad"):
        jax.jvp(lambda q: attend(q, k, v), (q,), (q,))

    def along(attend):
        def gradient(q):
            return jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, k, v))))(q)

        return jax.jit(lambda q: jax.jvp(gradient, (q,), (jnp.cos(q),)))(q)[1]

    want = along(functools.partial(reference_attention, mask=Mask(causal=True)))
    np.testing.assert_allclose(along(attend), want, rtol=5e-5, atol=5e-5)


def dense_with_logsumexp(q, k, v, mask):
    """float32 `[B, T, N, H]` and `[B, T, N]`."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * H**-0.5
    seen = mask.visible(0, q.shape[1], 0, k.shape[1])[:, None]
    logits = jnp.where(seen, logits, -1e30)
    logsumexp = jax.nn.logsumexp(logits, axis=-1).transpose(0, 2, 1)
    weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v), logsumexp


@pytest.mark.parametrize(
    "degrees, heads, kv_heads, options",
    [
        (dict(seq=2), 4, 2, dict(segment_ids=SEGMENTS)),
        (dict(seq=4), 6, 3, dict(window=5)),
        (dict(seq=2), 8, 4, dict(head_chunks=2)),
        (dict(seq=4), 4, 1, dict(causal=False)),
        (dict(data=2, tensor=2), 4, 2, {}),
        (dict(ring=2), 4, 2, dict(window=5)),
        (dict(ring=2, seq=2), 6, 3, {}),
    ],
    ids=str,
)
def test_the_logsumexp_and_its_gradient(degrees, heads, kv_heads, options):
    q, k, v = inputs(heads, kv_heads)
    num = int(np.prod(list(degrees.values())))
    mesh = make_mesh(**degrees, devices=jax.devices()[:num])
    ids = options.get("segment_ids")
    ids = None if ids is None else jnp.asarray(ids)
    mask = Mask(
        causal=options.get("causal", True),
        window=options.get("window"),
        q_segment_ids=ids,
        kv_segment_ids=ids,
    )
    draws = jax.random.split(jax.random.key(3), 2)
    weights = (
        jax.random.normal(draws[0], q.shape),
        jax.random.normal(draws[1], q.shape[:3]),
    )

    def all_of(attend):
        def loss(q, k, v):
            results = attend(q, k, v)
            return sum(map(jnp.vdot, results, weights)), results

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        gradients, results = jax.jit(grad)(q, k, v)
        return *results, *gradients

    attend = functools.partial(
        ulysses_attention, mesh=mesh, return_logsumexp=True, **options
    )
    got, want = all_of(attend), all_of(lambda *qkv: dense_with_logsumexp(*qkv, mask))
    assert got[1].dtype == jnp.float32 and got[1].shape == (B, T, heads)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5, err_msg=name)


def test_the_logsumexp_of_bfloat16_and_of_a_query_without_a_key():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(4, 2))
    mesh = make_mesh(data=2, seq=4)
    q_ids = jnp.asarray(SEGMENTS).at[:, 3].set(-1)
    ids = q_ids, jnp.asarray(SEGMENTS)
    out, logsumexp = ulysses_attention(
        q, k, v, mesh=mesh, segment_ids=ids, return_logsumexp=True
    )
    assert out.dtype == jnp.bfloat16 and logsumexp.dtype == jnp.float32
    assert (logsumexp[:, 3] == -1e30).all() and not out[:, 3].any()
    assert (abs(jnp.delete(logsumexp, 3, axis=1)) < 20).all()
