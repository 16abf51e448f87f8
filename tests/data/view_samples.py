"""Real pictures and short calls that the tests of views share."""

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_image

from understudy.data.views import Views

NUM_SAMPLES = 70


def samples(name):
    """Real pictures: 70 digits of 8x8, or 70 patches of a photograph with odd sides."""
    if name == "digits":
        return torch.from_numpy((load_digits().images[:NUM_SAMPLES] * 15.9).astype(np.uint8))[
            :, None
        ]
    photo = load_sample_image("flower.jpg")
    patches = [photo[y : y + 21, x : x + 18] for y in range(0, 280, 40) for x in range(0, 600, 60)]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()


def view_of(views, images, indices, view=0):
    partners = views.partners(indices, view)
    return views.apply(
        images[indices], indices, view, None if partners is None else images[partners]
    )


def one(name, **parameters):
    return Views(
        [{name: {"probability": 1, **parameters}}], seed=5, partner_pool=torch.arange(NUM_SAMPLES)
    )
