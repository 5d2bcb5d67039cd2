"""Programs that learn from what they did: an actor with a critic by hand over stages, and learned values of actions.

The world is a corridor of five places; at its right end is a reward.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from pipeline import Pipeline
from stages import Stage
from tests.levels import in_turn
from tests.programs.program import SEED

PLACES = 5


def walk(place, action):
    """(where one is then, the reward, whether that was the end)."""
    place = int(np.clip(place + (1 if action else -1), 0, PLACES - 1))
    return place, float(place == PLACES - 1), place == PLACES - 1


def seen(places):
    return np.eye(PLACES, dtype="float32")[np.atleast_1d(places)]


# -- an actor and a critic over one trunk, an episode a step ----------------------------------------------------------


def trunk_and_heads():
    keras.utils.set_random_seed(SEED)
    trunk = keras.Sequential([keras.Input((PLACES,)), layers.Dense(8, activation="relu", name="common")])
    inputs = keras.Input((8,))
    actor = layers.Dense(2, activation="softmax", name="actor")(inputs)
    heads = keras.Model(inputs, [actor, layers.Dense(1, name="critic")(inputs)])
    return trunk, heads


def episode(seed):
    """(places (steps, 5), actions (steps,), discounted returns (steps,)) of a random walk."""
    random, place, places, actions, rewards = np.random.default_rng(seed), 2, [], [], []
    for _ in range(6):
        places.append(place)
        actions.append(int(random.integers(2)))
        place, reward, end = walk(place, actions[-1])
        rewards.append(reward)
        if end:
            break
    returns, total = [], 0.0
    for reward in reversed(rewards):
        total = reward + 0.9 * total
        returns.insert(0, total)
    returns = np.array(returns) - np.mean(returns)
    return tf.constant(seen(places)), np.array(actions), tf.constant(returns, tf.float32)


def actor_critic_loss(probabilities, values, actions, returns):
    """The policy's gradient by the advantage, and a Huber loss of the values."""
    chosen = tf.gather(probabilities, actions, batch_dims=1)
    advantage = tf.stop_gradient(returns - values[:, 0])
    huber = keras.losses.Huber(reduction="sum")
    return -tf.reduce_sum(tf.math.log(chosen) * advantage) + huber(returns[:, None], values)


@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2))
def test_an_actor_with_a_critic_by_hand_is_one_tape(run_eagerly):
    """Three episodes of different length; each stage has an optimizer of its own."""
    trunk, heads = trunk_and_heads()
    optimizers = [keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)]
    for number in range(3):
        places, actions, returns = episode(number)
        with tf.GradientTape() as tape:
            probabilities, values = heads(trunk(places))
            loss = actor_critic_loss(probabilities, values, actions, returns)
        gradients = tape.gradient(loss, [trunk.trainable_weights, heads.trainable_weights])
        for optimizer, part, found in zip(optimizers, (trunk, heads), gradients, strict=True):
            optimizer.apply_gradients(zip(found, part.trainable_weights, strict=True))
    expected = [*trunk.get_weights(), *heads.get_weights()]

    trunk, heads = trunk_and_heads()
    before = [*trunk.get_weights(), *heads.get_weights()]
    optimizers = [keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)]
    common, judged = Stage(trunk, run_eagerly=run_eagerly), Stage(heads, run_eagerly=run_eagerly)
    for number in range(3):
        places, actions, returns = episode(number)
        probabilities, values = judged.forward(common.forward(places))
        with tf.GradientTape() as tape:
            tape.watch([probabilities, values])
            loss = actor_critic_loss(probabilities, values, actions, returns)
        common.backward(judged.backward(tape.gradient(loss, [probabilities, values])))
        common.apply(optimizers[0])
        judged.apply(optimizers[1])
    found = [*trunk.get_weights(), *heads.get_weights()]
    change = max(np.abs(a - b).max() for a, b in zip(before, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if run_eagerly else 1e-5 * change)


# -- values of actions: the action taken as an input, a target network that follows -----------------------------------


def values_of_actions():
    """(values of all actions, the value of the action taken): only the second has a loss."""
    keras.utils.set_random_seed(SEED)
    place, action = keras.Input((PLACES,), name="place"), keras.Input((), dtype="int32", name="action")
    x = layers.Dense(8, activation="relu", name="first")(place)
    values = layers.Dense(2, name="values")(layers.Dense(8, activation="relu", name="second")(x))
    taken = ops.sum(values * ops.one_hot(action, 2), axis=1)
    return keras.Model([place, action], [values, layers.Identity(name="taken")(taken)])


def replayed(step):
    """A minibatch of what was seen: places, actions, rewards, places afterwards, whether that was the end."""
    random = np.random.default_rng(step)
    places, actions = random.integers(0, PLACES, 8), random.integers(0, 2, 8).astype("int32")
    after, rewards, ends = (np.array(some) for some in zip(*map(walk, places, actions), strict=True))
    return seen(places), actions, rewards, seen(after), ends


def learn(model, predict, follow, train):
    """Three updates; the target network follows after the second."""
    losses = []
    for step in range(3):
        places, actions, rewards, after, ends = replayed(step)
        future = np.max(np.asarray(predict([after, actions])[0]), axis=1)
        targets = (rewards + 0.9 * future * (1 - ends)).astype("float32")
        losses.append(train([places, actions], targets))
        if step == 1:
            follow()
    return losses


@pytest.mark.parametrize(("run_eagerly", "microbatches"), in_turn([(True, 1), (False, 4)], 0, 2, several=True))
def test_values_of_actions_with_a_target_network_are_keras(run_eagerly, microbatches):
    """`train_on_batch` with a loss for one of two outputs; the target network takes the pipeline's weights."""
    arguments = {"loss": [None, keras.losses.Huber()], "run_eagerly": run_eagerly}
    model, target = values_of_actions(), values_of_actions()
    before = model.get_weights()
    model.compile(optimizer=keras.optimizers.SGD(0.1, clipnorm=1.0), **arguments)

    def train(x, y):
        return model.train_on_batch(x, [np.zeros((8, 2), "float32"), y])

    def follow():
        target.set_weights(model.get_weights())

    expected = learn(model, target.predict_on_batch, follow, train)
    target = values_of_actions()
    with Pipeline.split(values_of_actions(), at=["first"], transport="inproc", microbatches=microbatches) as pipe:
        pipe.compile(optimizer=keras.optimizers.SGD(0.1, clipnorm=1.0), **arguments)

        def follow():
            target.set_weights(pipe.get_weights())

        found = learn(pipe, target.predict_on_batch, follow, lambda x, y: pipe.train_on_batch(x, [None, y]))
        weights, merged = pipe.get_weights(), pipe.merge()
    change = max(np.abs(a - b).max() for a, b in zip(before, model.get_weights(), strict=True))
    for a, b in zip([*weights, *merged.get_weights()], 2 * model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if run_eagerly else 1e-5 * change)
    np.testing.assert_allclose(found, expected, rtol=0 if run_eagerly else 1e-5)
