"""Plain Optax on each layer's own matrices, to compare a run's optimizer with."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from run_cases import make_config, mesh_of

from ulysses_jax.models import Transformer
from ulysses_jax.training.optimizer import learning_rate_schedule
from ulysses_jax.training.state import abstract_state, state_of

OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
IN_LAYERS = ("q", "k", "v", "out", "gate", "up", "down")
TABLES = ("embedding", "unembedding", "position_table")
# k and v are too small to factor.
MODEL = dict(
    width=128, num_heads=16, num_kv_heads=8, head_size=8, feed_forward_width=160
)
# Two stacks of two layers, and a layer that is left.
STACKS = dict(num_layers=5, pattern=["window", "full"], window=6)
ADAPTERS = dict(lora=dict(rank=4))
VARIANTS = {None: {}, "stacks": STACKS, "adapters": ADAPTERS}
TRAINING = dict(
    learning_rate=0.01,
    final_learning_rate=0.001,
    num_steps=6,
    warmup_steps=2,
    weight_decay=0.3,
    beta1=0.8,
    beta2=0.9,
    clip_norm=1.5,
)


def config_of(degrees, *, model=None, **options):
    return make_config(degrees, model=MODEL | (model or {}), **TRAINING | options)


def matrices_of(tree):
    """By layer and name: heads and their features as one side of a plain matrix."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = tuple(str(key.key) for key in path)
        x = np.asarray(x)
        if names[0] == "layers":
            for i, each in enumerate(x):
                found["layer", i, *names[1:]] = _flat(names, each)
        else:
            found[names] = _flat(names, x)
    return found


def tree_of(matrices, like):
    """The inverse of `matrices_of`: a tree like this one."""

    def of(path, x):
        names = tuple(str(key.key) for key in path)
        if names[0] != "layers":
            return matrices[names].reshape(x.shape)
        layers = [matrices["layer", i, *names[1:]] for i in range(len(x))]
        return np.stack(layers).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(of, like)


def _flat(names, x):
    """The last name is the matrix's; of an adapter of q, they are q_adapter and a."""
    name = names[-1]
    if name in ("q", "k", "v") or (name == "b" and is_of_adapter(names)):
        return x.reshape(x.shape[0], -1)
    if name == "out" or names[-2:] == ("out_adapter", "a"):
        return x.reshape(-1, x.shape[-1])
    return x


def is_of_adapter(names):
    return len(names) > 1 and names[-2].endswith("_adapter")


@functools.cache
def plain_optax(training, is_in_layer, decays):
    """The optimizer by its name as Optax has it, of one plain matrix or vector."""
    rate = learning_rate_schedule(training)
    betas = training.beta1, training.beta2
    decay = training.weight_decay * decays
    optimizer = training.optimizer
    if optimizer == "muon" and is_in_layer:
        return optax.contrib.muon(
            rate, beta=training.beta1, weight_decay=decay, consistent_rms=0.2
        )
    return {
        "adamw": lambda: optax.adamw(rate, *betas, weight_decay=decay),
        "muon": lambda: optax.adamw(rate, *betas, weight_decay=decay),
        "lion": lambda: optax.lion(rate, *betas, weight_decay=decay),
        "sgd": lambda: optax.chain(
            optax.trace(training.beta1),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(rate),
        ),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=lambda count: decay * rate(count)
        ),
    }[optimizer]()


@functools.cache
def plain_step(training, is_in_layer, decays):
    optimizer = plain_optax(training, is_in_layer, decays)

    @jax.jit
    def step(gradient, state, x):
        updates, state = optimizer.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    return optimizer.init, step


def take_plain_steps(training, parameters, gradients_of, num_steps):
    """Each matrix alone, but for the norm by which all gradients are clipped.

    Args: gradients_of: `f(step, matrices)`, of the dicts of `matrices_of`.
    """
    clip, states = optax.clip_by_global_norm(training.clip_norm), {}
    for i in range(num_steps):
        gradients, _ = clip.update(gradients_of(i, parameters), optax.EmptyState())
        stepped = {}
        for name, x in parameters.items():
            is_matrix = name[-1] in IN_LAYERS or is_of_adapter(name)
            in_layer = name[0] in ("layer", "rest") and is_matrix
            decays = is_matrix or name[-1] in TABLES
            init, step = plain_step(training, in_layer, decays)
            state = states[name] if i else init(x)
            stepped[name], states[name] = step(gradients[name], state, x)
        parameters = jax.tree.map(np.asarray, stepped)
    return parameters


@functools.cache
def grown(variant=None):
    """Parameters of `MODEL`, or a variant, large enough that layers matter."""
    rng = np.random.default_rng(1)
    with jax.set_mesh(mesh_of()):
        shapes = abstract_state(config_of({}, model=VARIANTS[variant]))

    def draw(path, x):
        if path[-1].key == "scale":
            return np.ones(x.shape, np.float32)
        return np.float32(0.08 * rng.standard_normal(x.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes.parameters)


def begun(config, mesh, parameters):
    """The state before the first step, on the mesh that is set."""
    parameters = put_like(abstract_state(config).parameters, mesh, parameters)
    return jax.jit(functools.partial(state_of, config, Transformer))(parameters, {})


def put_like(shapes, mesh, tree):
    def put(x, like):
        kind, spec = like.sharding.memory_kind, like.sharding.spec
        return jax.device_put(x, NamedSharding(mesh, spec, memory_kind=kind))

    return jax.tree.map(put, tree, shapes)


def assert_same_matrices(got, want, tolerance):
    """Relative to the largest element of each."""
    got = matrices_of(got)
    assert got.keys() == want.keys()
    for name, x in want.items():
        scale = np.abs(x).max() + 1e-12
        error = np.abs(got[name] - x).max() / scale
        assert error < tolerance, (name, error)
