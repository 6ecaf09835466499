"""The networks of `keras.applications`, small images: captured, trained for a step, released."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests.small import compiled, weights

applications = keras.applications

# Model, size of its images, number of captured layers, number of layers with weights that are not captured.
NETWORKS = {
    "mobilenet": (applications.MobileNetV3Small, 32, 0, 0),
    "efficientnet": (applications.EfficientNetV2B0, 32, 0, 0),
    "resnet": (applications.ResNet50, 32, 0, 0),
    "convnext": (applications.ConvNeXtTiny, 32, 0, 0),
    "densenet": (applications.DenseNet121, 32, 0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_application(name):
    make, size, count, others = NETWORKS[name]
    model = make(weights=None, input_shape=(size, size, 3), classes=5)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, size=(2, size, size, 3)).astype("float32"), np.array([1, 3])
    predicted, before = model.predict_on_batch(x), weights(model)
    classes = [type(layer) for layer in model._flatten_layers()]
    optimizer = keras_ngd.KFAC()

    report = keras_ngd.capture(model, optimizer)
    print(len(report.captured), len(report.not_captured), report.bytes)
    import collections

    print(collections.Counter(l.kind for l in report.layers if not l.captured))
    np.testing.assert_array_equal(model.predict_on_batch(x), predicted)
    import time

    t = time.time()
    compiled(model, optimizer, loss="sparse_categorical_crossentropy")
    optimizer.build(model.trainable_variables)
    loss = model.train_on_batch(x, y)
    print("step", time.time() - t)
    t = time.time()
    model.train_on_batch(x, y)
    print("step 2", time.time() - t)

    assert np.isfinite(loss)
    assert optimizer.factor_updates == optimizer.inverse_updates == 1
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 0
    trained = weights(model)
    assert all(np.all(np.isfinite(v)) for v in trained.values())
    unchanged = [path for path in trained if np.array_equal(trained[path], before[path])]
    print("unchanged", unchanged)
    predicted = model.predict_on_batch(x)
    keras_ngd.release(model)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    np.testing.assert_array_equal(model.predict_on_batch(x), predicted)
