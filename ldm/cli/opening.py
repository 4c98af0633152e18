"""Opening a model, as a picture's recipe used it where nothing else is said."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.recipe import Recipe

MOST_THREADS = 256  # that a stranger's recipe may start


def opened(
    recipe: "Recipe | None", model: str | None = None, device: str | None = None, dtype: str | None = None
) -> "Pipeline":
    """The model; of a recipe come its device if there is one here, its type of numbers, and its number of threads, for
    sums are taken in another order with another number.
    """
    from ldm.pipeline import Pipeline

    if recipe is None:
        return Pipeline.from_pretrained(model, device=device, dtype=dtype)
    import torch

    there = recipe.device != "cuda" or torch.cuda.is_available()
    where = device or (recipe.device if there else None)
    pipeline = Pipeline.from_pretrained(model, device=where, dtype=dtype or recipe.dtype)
    if pipeline.device.type == "cpu":
        torch.set_num_threads(min(recipe.threads, MOST_THREADS))
    return pipeline
