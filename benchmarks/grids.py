"""What `benchmarks.tasks` trains with which optimizers, and what each is tuned over."""

FIRST_ORDER = ("SGD", "Adam", "AdamW", "Muon")
# SOAP is `EigenAdam(basis="gradient")`.
SECOND_ORDER = ("EigenAdam", "SOAP", "KFAC", "EKFAC", "THOR", "SKFAC", "SNGD", "HyLo-KID")
# What is neither a method of this package nor one that sets targets.
RIVALS = ("KL-Shampoo",)
COLOURS = {
    "SGD": "tab:gray",
    "Adam": "tab:orange",
    "AdamW": "tab:olive",
    "Muon": "tab:brown",
    "KL-Shampoo": "gold",
    "EigenAdam": "black",
    "SOAP": "slategray",
    "KFAC": "tab:blue",
    "EKFAC": "tab:pink",
    "THOR": "tab:green",
    "SKFAC": "tab:purple",
    "SNGD": "tab:red",
    "HyLo-KID": "tab:cyan",
}

# For each optimizer momenta (`beta_1` of Adam and EigenAdam), learning rates and dampings, or arguments by name: as many trials
# for each optimizer of a task.
_CLASSIFIER = {
    "SGD": ((0.8, 0.9), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)),
    "Adam": ((0.8, 0.9), (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)),
    "Muon": ((0.9, 0.95), (0.01, 0.02, 0.03, 0.04, 0.05, 0.07)),
    "KFAC": ((0.8, 0.9), (0.03, 0.1), (0.0003, 0.001, 0.003)),
    "THOR": ((0.8, 0.9), (0.03, 0.1), (0.0003, 0.001, 0.003)),
    "SKFAC": ((0.8, 0.9), (0.03, 0.1), (0.003, 0.01, 0.03)),
    "SNGD": ((0.8, 0.9), (0.03, 0.1), (0.1, 1.0, 10.0)),
    "HyLo-KID": ((0.8, 0.9), (0.1, 0.3), (0.1, 0.3, 1.0)),
    "EigenAdam": ((0.8, 0.9), (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)),
    "SOAP": ((0.8, 0.9), (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)),
    "KL-Shampoo": ((0.9, 0.95), (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03)),
}
_DIGITS = {"backend": "jax", "batch_size": 250, "losses_per_example": 1, "steps": 6}
_LABELS = {**_DIGITS, "epochs": 20, "target": 0.01, "intervals": [3, 3], "trial_seeds": 3}
_IMAGES = {"backend": "tensorflow", "steps": 8, "target": None, "intervals": [4, 8], "trial_seeds": 1}
# What takes too long for a run of all benchmarks is measured where it is named. Without "intervals", the methods of second order
# have their default arguments, but for those of the grid and of `ARGUMENTS`; so they have wherever they are not tuned.
_REAL = {"backend": "jax", "trial_seeds": 1, "seeds": 3, "by_name": True}
_FALLING = {"schedule": "cosine", "target": "AdamW"}
TASKS = {
    "cnn": _LABELS,
    "mlp": _LABELS,
    "autoencoder": {
        **_DIGITS,
        "losses_per_example": 64,
        "epochs": 150,
        "target": None,
        "intervals": [1, 3],
        "trial_seeds": 1,
    },
    "resnet": {**_IMAGES, "batch_size": 64, "losses_per_example": 1, "epochs": 16},
    "unet": {**_IMAGES, "batch_size": 16, "losses_per_example": 64 * 64, "epochs": 16},
    "text": {**_REAL, **_FALLING, "batch_size": 64, "steps": 46, "epochs": 10},
    "vit": {**_REAL, **_FALLING, "batch_size": 100, "steps": 50, "epochs": 10},
    "deep_autoencoder": {**_REAL, "target": None, "batch_size": 500, "steps": 40, "epochs": 12},
}
_RATES = (0.03, 0.1, 0.3)
_SECOND_ORDER_RATES = (0.01, 0.02, 0.04, 0.08)
_GLOBAL = {"learning_rate": _SECOND_ORDER_RATES, "damping": (0.15, 0.5)}
_RELATIVE = {"learning_rate": _SECOND_ORDER_RATES, "damping": (0.3, 1.0)}
_EIGEN_ADAM = {"learning_rate": (0.0025, 0.005, 0.01, 0.02), "beta_2": (0.95, 0.99)}
_KL_SHAMPOO = {"learning_rate": (0.0025, 0.005, 0.01, 0.02), "momentum": (0.9, 0.95)}
_TRANSFORMER = {
    "Adam": {"learning_rate": (0.001, 0.002, 0.004, 0.008), "beta_2": (0.95, 0.999)},
    "AdamW": {"learning_rate": (0.001, 0.002, 0.004, 0.008), "weight_decay": (0.01, 0.1)},
    "Muon": {"learning_rate": (0.002, 0.004, 0.008, 0.016), "weight_decay": (0.01, 0.1)},
    **dict.fromkeys(("EigenAdam", "SOAP"), _EIGEN_ADAM),
    "KL-Shampoo": _KL_SHAMPOO,
    "KFAC": _GLOBAL,
    "EKFAC": _GLOBAL,
    "THOR": _GLOBAL,
}
GRIDS = {
    "cnn": _CLASSIFIER,
    "mlp": _CLASSIFIER,
    "autoencoder": {
        "SGD": ((0.9, 0.95), (0.5, 1.0, 2.0, 3.0)),
        "Adam": ((0.5, 0.9), (0.003, 0.005, 0.01, 0.015)),
        "Muon": ((0.9, 0.95), (0.01, 0.015, 0.02, 0.03)),
        "KFAC": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
        "THOR": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
        "SKFAC": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
        **dict.fromkeys(("EigenAdam", "SOAP"), _EIGEN_ADAM),
        "KL-Shampoo": _KL_SHAMPOO,
    },
    "resnet": {
        "SGD": ((0.9,), (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)),
        "Adam": ((0.9,), (0.001, 0.002, 0.003, 0.004, 0.006, 0.01)),
        "Muon": ((0.95,), (0.001, 0.002, 0.003, 0.004, 0.006, 0.01)),
        "KFAC": ((0.9,), _RATES, (0.01, 0.03)),
        "THOR": ((0.9,), _RATES, (0.01, 0.03)),
        "SKFAC": ((0.9,), _RATES, (0.01, 0.03)),
        "HyLo-KID": ((0.9,), _RATES, (0.1, 0.3)),
        "EigenAdam": ((0.9,), (0.002, 0.004, 0.006, 0.01, 0.015, 0.02)),
    },
    "unet": {
        "SGD": ((0.9,), (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)),
        "Adam": ((0.9,), (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
        "Muon": ((0.95,), (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
        "KFAC": ((0.9,), _RATES, (0.001, 0.01)),
        "THOR": ((0.9,), _RATES, (0.001, 0.01)),
        "SKFAC": ((0.9,), _RATES, (0.003, 0.01)),
        "HyLo-KID": ((0.9,), _RATES, (0.1, 1.0)),
        "EigenAdam": ((0.9,), (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
    },
    "text": _TRANSFORMER,
    "vit": {
        **_TRANSFORMER,
        "Muon": {"learning_rate": (0.0005, 0.001, 0.002, 0.004), "weight_decay": (0.01, 0.1)},
    },
    "deep_autoencoder": {
        "SGD": {"momentum": (0.9, 0.95), "learning_rate": (0.5, 1.0, 2.0, 4.0)},
        "Adam": {"momentum": (0.5, 0.9), "learning_rate": (0.0005, 0.001, 0.002, 0.004)},
        "Muon": {"momentum": (0.9, 0.95), "learning_rate": (0.001, 0.002, 0.004, 0.008)},
        **dict.fromkeys(("EigenAdam", "SOAP"), _EIGEN_ADAM),
        "KL-Shampoo": _KL_SHAMPOO,
        **dict.fromkeys(("KFAC", "EKFAC", "THOR"), _GLOBAL),
        "SKFAC": _RELATIVE,
    },
}
# What users are told to set: Muon is not for a network's last layer (nor for embeddings, which it leaves out by itself).
ARGUMENTS = {
    "Muon": {"exclude_layers": ["logits"]},
    **dict.fromkeys(("KFAC", "EKFAC", "THOR"), {"damping_mode": "global"}),
    "SKFAC": {"damping_mode": "relative"},
}
# What runs once more with no argument set at all.
DEFAULTS = {
    **dict.fromkeys(("cnn", "mlp", "autoencoder", "resnet", "unet"), ("EigenAdam", "KFAC", "THOR")),
    **dict.fromkeys(("text", "vit"), ("EigenAdam", "KFAC", "EKFAC", "THOR")),
    "deep_autoencoder": ("EigenAdam", "KFAC", "EKFAC", "THOR", "SKFAC"),
}
