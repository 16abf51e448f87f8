"""The numbers of "Efficient Knowledge Distillation" (Lin and Shen, 2024), as printed."""

from __future__ import annotations

# Table 5: parameters.
PARAMETERS = {
    "Student": 11_444,
    "Teacher 4": 39_316,
    "Teacher 6": 57_876,
    "Teacher 8": 76_436,
    "ViT-B/16, 10 classes": 85_806_346,
}
# Tables 1 to 4: milliseconds and megabytes of one batch of 100 on CPU; None: not in that table.
OPERATORS: dict[str, dict[str, tuple[float, float]]] = {
    "Student": {
        "model inference": (124.773, 0),
        "create tensor": (0.306, 50.18),
        "conv2d": (57.069, 25.00),
        "dropout": (45.907, 50.02),
        "leaky relu": (3.705, 25.01),
        "data loading": (14.777, 1.17),
    },
    "Teacher 4": {
        "model inference": (275.721, 0),
        "create tensor": (0.165, 162.71),
        "conv2d": (132.866, 62.50),
        "dropout": (99.021, 125.02),
        "leaky relu": (20.030, 62.51),
        "batch norm": (18.906, 50.00),
        "data loading": (11.968, 1.17),
    },
    "Teacher 6": {
        "model inference": (437.044, 0),
        "create tensor": (0.470, 250.20),
        "conv2d": (199.713, 87.50),
        "dropout": (169.428, 175.02),
        "leaky relu": (14.149, 87.51),
        "batch norm": (25.248, 75.00),
        "data loading": (17.719, 1.17),
    },
    "Teacher 8": {
        "model inference": (594.629, 0),
        "create tensor": (0.435, 312.69),
        "conv2d": (293.220, 112.50),
        "dropout": (211.366, 225.02),
        "leaky relu": (15.319, 112.51),
        "batch norm": (37.660, 100.00),
        "data loading": (13.316, 1.17),
    },
}
# Table 6: training and validation accuracy after 100 epochs.
ACCURACIES = {
    "Student": (0.5395, 0.5296),
    "Teacher 4": (0.8288, 0.7886),
    "Teacher 6": (0.8687, 0.8196),
    "Teacher 8": (0.8874, 0.8380),
    "TS 4": (0.6357, 0.6086),
    "TS 6": (0.7025, 0.6751),
    "TS 8": (0.674, 0.6235),
}
# Table 7: seconds an epoch of training and of inference.
SECONDS = {
    "Student": (62.59, 13.88),
    "Teacher 4": (213.54, 37.13),
    "Teacher 6": (321.31, 60.22),
    "Teacher 8": (429.12, 80.93),
    "TS 4": (104.53, 13.56),
    "TS 6": (125.81, 13.94),
    "TS 8": (146.43, 13.91),
}
# Section 4.3: the best training accuracy is at alpha 0.7; stable for T from 0.5 to 5.
BEST_ALPHA, BEST_ALPHA_ACCURACY = 0.7, 0.7203
STABLE_TEMPERATURES = (0.5, 5.0)
# Section 4.4: hours of wall clock for 100 epochs.
ONLINE_HOURS, OFFLINE_HOURS = 11.7, 12.42
# Section 4.5: the student of the pretrained ViT.
PRETRAINED_ACCURACY, PRETRAINED_SECONDS = 0.5382, 862.0
VIT_ACCURACY = 0.9788
EPOCHS = 100
