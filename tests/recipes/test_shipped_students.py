"""The weights in ``students/`` are those of the shipped recipe's network."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from understudy.models.build import NormalizedModel, build_network
from understudy.recipes.files import read_recipe
from understudy.recipes.schema import parse_recipe

FOLDER = Path(__file__).parents[2] / "students"


def test_weights_fit_their_recipe_and_its_budget():
    for path in FOLDER.glob("*.safetensors"):
        given = ("data.source=x", "teacher.checkpoint=x", "strategy.teachers.0.checkpoint=x")
        values, _ = read_recipe(path.stem, given)
        recipe = parse_recipe(values)
        section = recipe.student.model
        network = build_network(
            section.name, num_classes=10, image_shape=(3, 32, 32), arguments=section.arguments
        )
        model = NormalizedModel(network, mean=[0.0] * 3, std=[1.0] * 3, flip_average=True).eval()
        model.load_state_dict(load_file(path))
        num_params = sum(p.numel() for p in network.parameters())
        assert num_params <= recipe.budget.num_params
        # Trained: its norms have seen pictures.
        assert not torch.equal(network.state_dict()["stem.1.running_mean"], torch.zeros(16))
        with torch.no_grad():
            logits_NK = model(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
        assert logits_NK.isfinite().all()
    assert (FOLDER / "cifar10_12k.safetensors").is_file()
