"""Is what a loader gives what was asked for? Its first batch is compared with crops of the photos made here."""

from __future__ import annotations

from typing import Any

import numpy as np
from peers.common import BATCH, SIZE, Pixels, Work, random_box

MAX_DIFFERENCE = 8.0  # of 255; two unrelated photos differ by 60 to 80
MAX_CROP_DIFFERENCE = 8.0  # of coarse means; 1 to 3 where the photo is the source, from 20 on where another is
NUM_CROPS_TRIED, CELLS = 4000, 8


def check_batch(module: Any, work: Work, images: Pixels, indices: Any) -> dict[str, Any]:
    """Compares the first batch.

    Returns:
        difference: mean absolute difference to the reference, 0-255.
        checked: how it was found.

    Raises:
        ValueError: These are not the images asked for.
    """
    if images.shape != (BATCH, SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise ValueError(f"a batch {images.dtype} {images.shape}; expected uint8 {(BATCH, SIZE, SIZE, 3)}")
    flat = [at for at, image in enumerate(images) if image.std() < 3]
    if flat:
        raise ValueError(f"images {flat} of the batch are of one colour")
    if indices is None:
        return {"difference": None, "checked": "shape, type, contrast"}
    indices = np.asarray(indices)
    if len(set(indices.tolist())) < BATCH:
        raise ValueError("a photo comes twice in the first batch")
    if sorted(indices.tolist()) == indices.tolist():
        raise ValueError("the first batch is in the stored order; expected a shuffled one")
    if getattr(module, "IS_OWN_CROP", False):
        worst = max(closest_crop(photo(work, int(indices[at])), images[at]) for at in range(0, BATCH, 16))
        return verdict(worst, MAX_CROP_DIFFERENCE, "closest crop")
    if hasattr(module, "reference_crops"):
        chosen = module.reference_crops(work, indices)
    else:
        transform = work.transform
        chosen = [(int(index), transform.boxes[index], bool(transform.flips[index])) for index in indices]
    differences = [
        np.abs(image.astype(int) - reference(work, *crop)).mean() for image, crop in zip(images, chosen, strict=True)
    ]
    return verdict(max(differences), MAX_DIFFERENCE, "same crop")


def verdict(difference: float, limit: float, how: str) -> dict[str, Any]:
    """Refuses a difference above the limit."""
    if difference > limit:
        raise ValueError(
            f"images differ from their reference by {difference:.1f} of 255 ({how}); expected at most {limit:g}"
        )
    return {"difference": round(float(difference), 2), "checked": how}


def photo(work: Work, index: int) -> Pixels:
    """Decodes a photo by Pillow or OpenCV, whichever this environment has; RGB."""
    (path,) = (work.corpus / "images").glob(f"*/{index:06d}.jpg")
    try:
        import cv2
    except ImportError:
        from PIL import Image

        return np.asarray(Image.open(path).convert("RGB"))
    return np.asarray(cv2.imread(str(path))[:, :, ::-1], np.uint8)


def reference(work: Work, index: int, box: Any, flip: bool) -> Pixels:
    """Makes the crop of a photo by OpenCV."""
    import cv2

    x, y, w, h = (int(value) for value in box)
    pixels = cv2.resize(photo(work, index)[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(pixels[:, ::-1] if flip else pixels, np.uint8)


def closest_crop(source: Pixels, image: Pixels) -> float:
    """Returns how far, at best, 8 x 8 coarse means of `image` are from those of crops of its source, mirrored or not.

    Tries crops at random, then ever closer around the best one.
    """
    rng = np.random.default_rng(0)
    height, width = source.shape[:2]
    # sums over all pixels above and to the left: (H + 1, W + 1, 3)
    sums = np.pad(source.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    # (224, 224, 3) -> (8, 28, 8, 28, 3) -> (8, 8, 3)
    wanted = image.reshape(CELLS, SIZE // CELLS, CELLS, SIZE // CELLS, 3).mean((1, 3))
    boxes = np.array([random_box(rng, width, height) for _ in range(NUM_CROPS_TRIED)])
    for spread_px in (20, 10, 5, 2):
        distances = np.minimum(
            *(np.abs(coarse_means(sums, boxes) - side).mean((1, 2, 3)) for side in (wanted, wanted[:, ::-1]))
        )
        best = boxes[distances.argsort()[:8]]
        boxes = np.concatenate(
            [best, (best[:, None] + rng.integers(-spread_px, spread_px + 1, (8, 100, 4))).reshape(-1, 4)]
        )
        boxes[:, 2:] = boxes[:, 2:].clip(CELLS, (width, height))
        boxes[:, :2] = boxes[:, :2].clip(0, (width, height) - boxes[:, 2:])
    return float(distances.min())


def coarse_means(sums: Any, boxes: Any) -> Any:
    """Returns the means of 8 x 8 cells of boxes (N, 4), float (N, 8, 8, 3), from summed pixels."""
    steps = np.arange(CELLS + 1) / CELLS
    xs = np.rint(boxes[:, :1] + boxes[:, 2:3] * steps).astype(int)
    ys = np.rint(boxes[:, 1:2] + boxes[:, 3:4] * steps).astype(int)
    corners = sums[ys[:, :, None], xs[:, None, :]]  # (N, 9, 9, 3)
    areas = np.diff(ys, axis=1)[:, :, None] * np.diff(xs, axis=1)[:, None, :]
    return np.diff(np.diff(corners, axis=1), axis=2) / areas[..., None]
