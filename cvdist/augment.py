"""Random changes of training images: draw their parameters (NumPy, anywhere), apply them (TensorFlow, in the graph).

What happens to a sample follows from (seed, epoch, sample id) alone, through a counter-based generator, so it is the
same on any number of ranks, in any batch, and after a resume. Crops and flips are made by the loader while it decodes;
the rest is one array of numbers for each sample, which `apply` turns into one affine resampling and one change of
colour. Only train.py calls `apply`: validation and test see `center_boxes` and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cvdist.config import AugmentConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.integer[Any]]

# Columns of the uniform numbers of a sample. A parameter keeps its column for ever: changing one changes every run.
FLIP, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, BRIGHTNESS, CONTRAST, SATURATION, CROP_X, CROP_Y, CROP_TRIES = range(12)
NUM_CROP_TRIES = 10  # Source: torchvision, RandomResizedCrop.get_params.
NUM_TRANSFORMS, NUM_COLOURS = 8, 3
# Shares of red, green and blue in a grey level. Source: ITU-R BT.601, section 2.5.1.
GREY_WEIGHTS = (0.299, 0.587, 0.114)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of some samples.

    Attributes:
        uniforms: float64 (N, parameters), in [0, 1).
    """

    uniforms: NDArray[np.float64]


def draw(config: AugmentConfig, *, seed: int, epoch: int, sample_ids: IntArray) -> Draws:
    """Draws the random numbers of the samples `sample_ids` (N,) in one epoch.

    The numbers do not depend on `config`, except that the columns of crops are left out where there are none: turning
    one change on or off leaves the others as they were.
    """
    num_parameters = CROP_TRIES + (2 * NUM_CROP_TRIES if config.crop_scale_min < 1 else 0)
    epoch_key = mix(mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch))
    keys = mix(epoch_key ^ np.asarray(sample_ids).astype(np.uint64))
    with np.errstate(over="ignore"):
        counters = keys[:, None] + np.arange(num_parameters, dtype=np.uint64)[None, :] * GOLDEN
    return Draws((mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns the next outputs of SplitMix64 generators whose states are `values`; a bijection of 64-bit integers.

    Source: Steele 2014, Fast Splittable Pseudorandom Number Generators, with the constants of Vigna's splitmix64.c.
    """
    with np.errstate(over="ignore"):
        z = values + GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def center_boxes(heights: IntArray, widths: IntArray) -> NDArray[np.int32]:
    """Returns the largest centred squares, int32 (N, 4) x, y, w, h, of images of the given sizes (N,), pixels."""
    heights, widths = np.asarray(heights), np.asarray(widths)
    sides = np.minimum(heights, widths)
    boxes = [(widths - sides) // 2, (heights - sides) // 2, sides, sides]
    return np.stack(boxes, axis=1, dtype=np.int32, casting="unsafe")


def crop_boxes(config: AugmentConfig, draws: Draws, heights: IntArray, widths: IntArray) -> NDArray[np.int32]:
    """Returns what random resized crops keep of images of the given sizes (N,): int32 (N, 4) x, y, w, h, pixels.

    A crop keeps a uniform share of the area, in a log-uniform aspect ratio. Of ten tries the first that fits is taken;
    where none fits, the largest centred box whose aspect ratio is allowed. Without random crops: `center_boxes`.
    Source: Szegedy 2015, section 6; tries, rounding and fallback of torchvision, RandomResizedCrop.get_params.
    """
    if config.crop_scale_min >= 1:
        return center_boxes(heights, widths)
    heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    u, ratio_max = draws.uniforms, config.crop_ratio_max
    # (N, 2 * tries) -> (N, tries, area and ratio)
    tries = u[:, CROP_TRIES:].reshape(len(u), NUM_CROP_TRIES, 2)
    areas = (heights * widths)[:, None] * (config.crop_scale_min + (1 - config.crop_scale_min) * tries[:, :, 0])
    ratios = np.exp(math.log(ratio_max) * (2 * tries[:, :, 1] - 1))
    try_w, try_h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (try_w >= 1) & (try_w <= widths[:, None]) & (try_h >= 1) & (try_h <= heights[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    fallback = ~fits.any(axis=1)
    w = np.where(fallback, np.minimum(widths, np.maximum(1, np.rint(heights * ratio_max))), try_w[rows, first])
    h = np.where(fallback, np.minimum(heights, np.maximum(1, np.rint(widths * ratio_max))), try_h[rows, first])
    x = np.where(fallback, (widths - w) // 2, np.floor(u[:, CROP_X] * (widths - w + 1)))
    y = np.where(fallback, (heights - h) // 2, np.floor(u[:, CROP_Y] * (heights - h + 1)))
    return np.stack([x, y, w, h], axis=1, dtype=np.int32, casting="unsafe")


def flips(config: AugmentConfig, draws: Draws) -> NDArray[np.bool_]:
    """Returns which samples (N,) are mirrored horizontally: half of them, or none."""
    return (draws.uniforms[:, FLIP] < 0.5) & config.flip


def has_transforms(config: AugmentConfig) -> bool:
    """Says whether `config` rotates, shifts, shears or zooms."""
    return any((config.rotation_deg, config.shift, config.shear, config.zoom))


def has_colours(config: AugmentConfig) -> bool:
    """Says whether `config` changes brightness, contrast or saturation."""
    return any((config.brightness, config.contrast, config.saturation))


def transforms(config: AugmentConfig, draws: Draws, image_size: int) -> NDArray[np.float32]:
    """Returns, for square images of `image_size` pixels, where each output pixel is taken from: float32 (N, 8).

    A row a0..a7 takes output pixel (x, y) from input (a0 x + a1 y + a2, a3 x + a4 y + a5); a6 and a7 are zero. About
    the centre, an image is zoomed (above 1 enlarges), then sheared (the lower half to the right), then rotated
    (positive is counter-clockwise), then shifted (positive is right and down).
    """
    u = 2 * draws.uniforms[:, ROTATION : ZOOM + 1] - 1  # columns from ROTATION to ZOOM, in [-1, 1)
    angle = np.deg2rad(config.rotation_deg * u[:, 0])
    shift_x, shift_y = config.shift * image_size * u[:, 1], config.shift * image_size * u[:, 2]
    shear, zoom = config.shear * u[:, 3], 1 + config.zoom * u[:, 4]
    cos, sin = np.cos(angle), np.sin(angle)
    # The inverse of rotation @ shear @ zoom, with y pointing down.
    a, b = (cos - shear * sin) / zoom, (-sin - shear * cos) / zoom
    c, d = sin / zoom, cos / zoom
    center = (image_size - 1) / 2
    offset_x = center - a * (center + shift_x) - b * (center + shift_y)
    offset_y = center - c * (center + shift_x) - d * (center + shift_y)
    zero = np.zeros(len(u))
    return np.stack([a, b, offset_x, c, d, offset_y, zero, zero], axis=1, dtype=np.float32, casting="unsafe")


def colours(config: AugmentConfig, draws: Draws) -> NDArray[np.float32]:
    """Returns the factors of brightness, contrast and saturation, float32 (N, 3); 1 changes nothing."""
    amounts = np.array([config.brightness, config.contrast, config.saturation])
    return np.asarray(1 + amounts * (2 * draws.uniforms[:, BRIGHTNESS : SATURATION + 1] - 1), np.float32)


def num_params(config: AugmentConfig) -> int:
    """Returns K, the width of `params`."""
    return NUM_TRANSFORMS * has_transforms(config) + NUM_COLOURS * has_colours(config)


def params(config: AugmentConfig, draws: Draws, image_size: int) -> NDArray[np.float32]:
    """Returns what `apply` needs, float32 (N, K): K is 0, 3 (colours), 8 (transforms) or 11 (transforms, colours)."""
    columns = [np.zeros((len(draws.uniforms), 0), np.float32)]
    if has_transforms(config):
        columns.append(transforms(config, draws, image_size))
    if has_colours(config):
        columns.append(colours(config, draws))
    return np.concatenate(columns, axis=1)


def apply(images: Any, params: Any) -> Any:
    """Changes images (N, H, W, C), 0-255, RGB or grey, as `params` (N, K) says; for use inside a tf.function.

    K is read while the graph is made: what is off costs nothing, and with K = 0 the images are returned as they came.
    XLA has no kernel for the resampling, so this stays outside a jit-compiled function.

    Returns:
        float32 images of the same shape, 0-255 (of the same type as before where K = 0).
    """
    import tensorflow as tf

    width = params.shape[-1]
    if width not in (0, NUM_COLOURS, NUM_TRANSFORMS, NUM_TRANSFORMS + NUM_COLOURS):
        raise ValueError(f"params have {width} columns; expected 0, 3, 8 or 11, as augment.params makes them")
    if width == 0:
        return images
    images = tf.cast(images, tf.float32)
    if width >= NUM_TRANSFORMS:
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=params[:, :NUM_TRANSFORMS],
            output_shape=tf.shape(images)[1:3],
            interpolation="BILINEAR",
            fill_mode="NEAREST",
            fill_value=0.0,
        )
    return change_colours(images, params[:, -NUM_COLOURS:]) if width != NUM_TRANSFORMS else images


def change_colours(images: Any, factors: Any) -> Any:
    """Changes brightness, then contrast, then saturation of float32 images (N, H, W, C), and clips once at the end.

    Contrast moves pixels from or to the image's mean grey level, saturation from or to the pixel's own.
    Source: torchvision, adjust_brightness, adjust_contrast and adjust_saturation (which clip after each).
    """
    import tensorflow as tf

    # (N, 3) -> three of (N, 1, 1, 1)
    brightness, contrast, saturation = (factors[:, k, None, None, None] for k in range(NUM_COLOURS))
    is_grey = images.shape[-1] == 1
    grey = images if is_grey else tf.tensordot(images, tf.constant(GREY_WEIGHTS, shape=(3, 1)), axes=1)
    mean = tf.reduce_mean(grey, axis=[1, 2], keepdims=True)
    # All three are linear, and grey levels are unchanged by saturation, so that they fold into one weighted sum.
    gain, offset = brightness * contrast, brightness * (1 - contrast) * mean
    if is_grey:
        return tf.clip_by_value(images * gain + offset, 0.0, 255.0)
    return tf.clip_by_value(images * (gain * saturation) + (grey * (gain * (1 - saturation)) + offset), 0.0, 255.0)
