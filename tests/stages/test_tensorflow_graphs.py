"""What TensorFlow does with its private names of graphs and random numbers; see `test_tensorflow_internals.py`."""

import tensorflow as tf

from stages import tensorflow_internals as internals


def test_an_operation_waits_for_one_that_was_made_after_it():
    """Without the order a clock may be read before the work that it should be behind."""
    with tf.Graph().as_default() as graph:
        first = tf.constant(1.0) + 1.0
        later = tf.timestamp()
        assert not first.op.control_inputs
        internals.run_behind(first.op, later.op)
        assert [op.name for op in first.op.control_inputs] == [later.op.name]
        node = next(node for node in graph.as_graph_def().node if node.name == first.op.name)
        assert f"^{later.op.name}" in node.input  # TensorFlow's own graph has it, not only Python's


def test_the_graph_of_a_called_function_is_found_by_name():
    inner = tf.function(lambda x: tf.sin(x))
    graph = tf.function(lambda x: inner(x) + 1.0).get_concrete_function(tf.TensorSpec((), tf.float32)).graph
    (call,) = [one for one in graph.get_operations() if "PartitionedCall" in one.type]
    found = internals.called_graph(graph, call.get_attr("f").name)
    assert "Sin" in {operation.type for operation in found.get_operations()}
    assert internals.called_graph(graph, "no_such_function") is None


def test_seeds_that_would_be_drawn_next_are_kept():
    tf.random.set_seed(1)
    expected = [float(tf.random.normal(())) for _ in range(3)]
    tf.random.set_seed(1)
    found = [float(tf.random.normal(()))]
    with internals.drawing_seeds_from("others"):
        other = float(tf.random.normal(()))
    drawn, more = internals.drawn_seeds(), [float(tf.random.normal(())) for _ in range(2)]
    internals.set_drawn_seeds(1, drawn)
    assert found + more == expected == found + [float(tf.random.normal(())) for _ in range(2)]
    assert other not in expected
