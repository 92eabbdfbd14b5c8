"""The images: generated textures, or a folder with a sub-folder for each class."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt
import torch

from lola_flwr.errors import UserError
from lola_flwr.machine.files import expanded
from lola_flwr.model.backprop import Batch
from lola_flwr.randomness import rng_for

TEXTURES = ("rows", "columns", "diagonals", "checkers")
_NUM_TRAIN, _NUM_HELD_OUT = 2000, 400


@dataclass(frozen=True, eq=False)
class Images:
    """M labeled images: colors from -1 to 1 in [M, 3, size, size], and labels [M]."""

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def batch(self, indices: npt.NDArray[np.intp]) -> Batch:
        """Return some images as the arguments of an image classifier."""
        return {
            "pixel_values": torch.from_numpy(self.pixels[indices]),
            "labels": torch.from_numpy(self.labels[indices]),
        }


def load_images(data_dir: str, size: int, seed: int) -> tuple[Images, Images]:
    """Load training and held-out images.

    Parameters
    ----------
    data_dir
        A folder that holds a sub-folder of images for each class; "" for textures.
    size
        Height and width that the images are scaled to.
    seed
        Seed of the textures, and of the choice of a folder's held-out fifth.

    Raises
    ------
    UserError
        The folder does not hold images in at least two sub-folders.
    """
    if not data_dir:
        rng = rng_for(seed, "textures")
        train = draw_textures(_NUM_TRAIN, size, rng)
        return train, draw_textures(_NUM_HELD_OUT, size, rng)
    try:
        folder = datasets.load_dataset(
            "imagefolder", data_dir=expanded(data_dir), split="train"
        )
        # A model of one class would be one of regression.
        label = folder.features.get("label")
        if label is None or len(label.names) < 2:
            raise ValueError("images of one class")
        parts = folder.train_test_split(test_size=0.2, seed=seed)
        return _read(parts["train"], size), _read(parts["test"], size)
    # A missing folder, one without images or sub-folders, an image that is damaged.
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data-dir={data_dir!r} cannot be read ({reason}); give a folder with a "
            "sub-folder of images for each of two classes or more."
        ) from error


def draw_textures(num_images: int, size: int, rng: np.random.Generator) -> Images:
    """Draw textures of random wavelength, phase and colors, under noise."""
    labels = rng.integers(len(TEXTURES), size=num_images)
    cycles = rng.uniform(4, 8, (num_images, 1, 1))
    phases = rng.uniform(0, 2 * np.pi, (2, num_images, 1, 1))
    y, x = 2 * np.pi * cycles * (np.mgrid[:size, :size] / size)[:, None] + phases
    diagonals = np.sin((x + y) / np.sqrt(2))
    waves = np.stack([np.sin(y), np.sin(x), diagonals, np.sin(x) * np.sin(y)])
    texture = waves[labels, np.arange(num_images), None]  # [M, 1, size, size]
    colors = rng.uniform(-1, 1, (num_images, 3, 1, 1))
    noise = rng.normal(0, 0.1, (num_images, 3, size, size))
    pixels = np.clip(colors * texture + noise, -1, 1, dtype=np.float32)
    return Images(pixels, labels, TEXTURES)


def _read(rows: datasets.Dataset, size: int) -> Images:
    pixels = [
        np.asarray(row["image"].convert("RGB").resize((size, size)), np.float32)
        for row in rows
    ]
    return Images(
        np.stack(pixels).transpose(0, 3, 1, 2) / 127.5 - 1,
        np.asarray(rows["label"], dtype=np.int64),
        tuple(rows.features["label"].names),
    )
