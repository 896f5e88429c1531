"""What happens to a training image depends on (seed, epoch, sample), and is what the configuration says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cvdist import augment
from cvdist.config import AugmentConfig

EVERYTHING = AugmentConfig(
    flip=True,
    crop_scale_min=0.2,
    rotation_deg=40,
    shift=0.2,
    shear=0.2,
    zoom=0.2,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
)
SIZE = 33


def smooth_images(n: int, channels: int = 3) -> np.ndarray:
    """Returns blurred noise, float32 (n, SIZE, SIZE, channels), 0-255."""
    noise = np.random.default_rng(0).uniform(0, 255, (n, SIZE, SIZE, channels)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(image, (0, 0), 2).reshape(SIZE, SIZE, channels) for image in noise])


def set_uniform(draws: augment.Draws, column: int, value: float) -> augment.Draws:
    """Returns the draws with every column at the middle, but one."""
    uniforms = np.full_like(draws.uniforms, 0.5)
    uniforms[:, column] = value
    return augment.Draws(uniforms)


def some_draws(n: int, config: AugmentConfig = EVERYTHING, seed: int = 0) -> augment.Draws:
    """Returns the draws of samples 0 to n - 1."""
    return augment.draw(config, seed=seed, epoch=0, sample_ids=np.arange(n))


def test_the_generator_gives_the_published_numbers_of_splitmix64() -> None:
    state, numbers = np.array([1234567], np.uint64), []
    for _ in range(3):
        numbers.append(int(augment.mix(state)[0]))
        with np.errstate(over="ignore"):
            state = state + augment.GOLDEN
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    epoch=st.integers(0, 2**31),
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40, unique=True),
    data=st.data(),
)
def test_a_samples_numbers_do_not_depend_on_its_batch_rank_or_position(
    seed: int, epoch: int, ids: list[int], data: st.DataObject
) -> None:
    whole = augment.draw(EVERYTHING, seed=seed, epoch=epoch, sample_ids=np.array(ids)).uniforms
    order = data.draw(st.permutations(range(len(ids))))
    part = order[: data.draw(st.integers(1, len(ids)))]
    np.testing.assert_array_equal(
        augment.draw(EVERYTHING, seed=seed, epoch=epoch, sample_ids=np.array(ids)[part]).uniforms, whole[part]
    )
    assert ((whole >= 0) & (whole < 1)).all()


def test_another_seed_epoch_or_sample_gives_other_numbers() -> None:
    ids = np.arange(1000)
    first = augment.draw(EVERYTHING, seed=1, epoch=1, sample_ids=ids).uniforms
    assert len(np.unique(first)) == first.size
    for seed, epoch in ((2, 1), (1, 2), (2, 0)):
        other = augment.draw(EVERYTHING, seed=seed, epoch=epoch, sample_ids=ids).uniforms
        assert not np.isin(other, first).any()


def test_numbers_are_uniform_and_independent() -> None:
    uniforms = some_draws(20_000).uniforms
    assert np.abs(uniforms.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 20_000)
    assert np.abs(uniforms.var(axis=0) - 1 / 12).max() < 0.003
    correlation = np.corrcoef(np.concatenate([uniforms[:-1], uniforms[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / np.sqrt(20_000)


def test_turning_crops_on_leaves_the_other_numbers_as_they_were() -> None:
    without = some_draws(10, AugmentConfig(flip=True)).uniforms
    np.testing.assert_array_equal(some_draws(10).uniforms[:, : without.shape[1]], without)


def test_half_of_the_images_are_flipped_and_none_when_it_is_off() -> None:
    draws = some_draws(10_000)
    assert abs(augment.flips(EVERYTHING, draws).mean() - 0.5) < 0.025
    assert augment.flips(AugmentConfig(), draws).sum() == 0
    assert augment.flips(EVERYTHING, draws).dtype == bool


def test_without_crops_the_box_is_the_one_of_evaluation() -> None:
    heights, widths = np.array([300, 224, 7]), np.array([224, 301, 7])
    expected = [[0, 38, 224, 224], [38, 0, 224, 224], [0, 0, 7, 7]]
    boxes = augment.crop_boxes(AugmentConfig(), some_draws(3, AugmentConfig()), heights, widths)
    assert boxes.tolist() == augment.center_boxes(heights, widths).tolist() == expected
    assert boxes.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=30),
    scale=st.floats(0.01, 1.0),
    ratio=st.floats(1.0, 10.0),
    seed=st.integers(0, 1000),
)
def test_every_crop_lies_inside_its_image(sizes: list[tuple[int, int]], scale: float, ratio: float, seed: int) -> None:
    config = AugmentConfig(crop_scale_min=scale, crop_ratio_max=ratio)
    heights, widths = np.array(sizes).T
    x, y, w, h = augment.crop_boxes(config, some_draws(len(sizes), config, seed), heights, widths).T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (x + w <= widths).all()
    assert (y + h <= heights).all()


def test_crops_keep_the_areas_and_ratios_of_the_configuration() -> None:
    config, n = AugmentConfig(crop_scale_min=0.25, crop_ratio_max=4 / 3), 20_000
    boxes = augment.crop_boxes(config, some_draws(n, config), np.full(n, 1000), np.full(n, 1000))
    x, y, w, h = boxes.T.astype(float)
    area, log_ratio = w * h / 1e6, np.log(w / h) / np.log(4 / 3)
    assert 0.249 < area.min() < 0.26
    assert 0.97 < area.max() <= 1
    assert -1.01 < log_ratio.min() < -0.95
    assert 0.95 < log_ratio.max() < 1.01
    # Small crops fit whatever their ratio, so their areas and ratios are uniform.
    small = area < 0.5
    assert abs(area[small].mean() - 0.375) < 0.005
    assert abs(log_ratio[small].mean()) < 0.03
    # Positions are uniform over what is left, both ends included.
    left = x / np.maximum(1, 1000 - w)
    assert abs(left[small].mean() - 0.5) < 0.02
    assert x.min() == 0
    assert (x + w).max() == 1000
    assert abs(np.corrcoef(x[small], y[small])[0, 1]) < 0.05


def test_crops_follow_the_sequential_algorithm_of_torchvision() -> None:
    config, n = AugmentConfig(crop_scale_min=0.5, crop_ratio_max=2), 300
    rng = np.random.default_rng(3)
    heights, widths = rng.integers(20, 400, (2, n))
    draws = some_draws(n, config)
    boxes = augment.crop_boxes(config, draws, heights, widths)
    fallbacks = 0
    for row, (box, height, width) in enumerate(zip(boxes.tolist(), heights.tolist(), widths.tolist(), strict=True)):
        u = draws.uniforms[row]
        expected = None
        for k in range(10):
            area = height * width * (0.5 + 0.5 * u[augment.CROP_TRIES + 2 * k])
            ratio = np.exp(np.log(0.5) + (np.log(2) - np.log(0.5)) * u[augment.CROP_TRIES + 2 * k + 1])
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(u[augment.CROP_X] * (width - w + 1)), int(u[augment.CROP_Y] * (height - h + 1))
                expected = [x, y, w, h]
                break
        if expected is None:
            fallbacks += 1
            w, h = width, height
            if width / height < 0.5:
                h = round(width / 0.5)
            elif width / height > 2:
                w = round(height * 2)
            expected = [(width - w) // 2, (height - h) // 2, w, h]
        assert box == expected
    assert fallbacks > 5


def test_a_crop_of_a_very_wide_image_falls_back_to_its_centre() -> None:
    config = AugmentConfig(crop_scale_min=0.9, crop_ratio_max=4 / 3)
    boxes = augment.crop_boxes(config, some_draws(2, config), np.array([30, 3000]), np.array([3000, 30]))
    assert boxes.tolist() == [[1480, 0, 40, 30], [0, 1480, 30, 40]]


def test_off_means_untouched_and_free() -> None:
    config = AugmentConfig(flip=True, crop_scale_min=0.3)
    params = augment.params(config, some_draws(2, config), SIZE)
    assert params.shape == (2, 0)
    assert augment.num_params(config) == 0
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)), tf.uint8)
    assert augment.apply(images, params) is images


def test_drawing_the_identity_changes_no_bit() -> None:
    draws = augment.Draws(np.full((2, 31), 0.5))
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    params = augment.params(EVERYTHING, draws, SIZE)
    assert params.shape == (2, 11)
    assert augment.num_params(EVERYTHING) == 11
    np.testing.assert_array_equal(augment.apply(images, params).numpy(), images)


@pytest.mark.parametrize(
    "config, width",
    [(AugmentConfig(shear=0.1), 8), (AugmentConfig(contrast=0.1), 3), (AugmentConfig(zoom=0.1, saturation=0.1), 11)],
)
def test_only_what_is_on_has_parameters(config: AugmentConfig, width: int) -> None:
    params = augment.params(config, some_draws(4, config), SIZE)
    assert params.shape == (4, width)
    assert augment.num_params(config) == width
    assert params.dtype == np.float32
    changed = tf.function(augment.apply)(smooth_images(4).astype(np.uint8), tf.constant(params))
    assert changed.shape == (4, SIZE, SIZE, 3)
    assert changed.dtype == tf.float32


def test_parameters_of_an_unknown_width_are_refused() -> None:
    with pytest.raises(ValueError, match="params have 5 columns"):
        augment.apply(smooth_images(1), np.zeros((1, 5), np.float32))


def transformed(config: AugmentConfig, column: int, value: float, images: np.ndarray) -> np.ndarray:
    """Applies one transform with its uniform number set to `value`."""
    draws = set_uniform(some_draws(len(images)), column, value)
    return augment.apply(images, augment.transforms(config, draws, SIZE)).numpy()


def test_a_positive_rotation_turns_counter_clockwise() -> None:
    images = smooth_images(2)
    # At 1, the end of the range, the angle is the largest: 90 degrees make the comparison exact.
    turned = transformed(AugmentConfig(rotation_deg=90), augment.ROTATION, 1.0, images)
    np.testing.assert_allclose(turned, np.rot90(images, 1, axes=(1, 2)), atol=0.01)
    turned = transformed(AugmentConfig(rotation_deg=90), augment.ROTATION, 0.0, images)
    np.testing.assert_allclose(turned, np.rot90(images, -1, axes=(1, 2)), atol=0.01)


def test_a_positive_shift_moves_right_and_down_and_repeats_the_edge() -> None:
    images, config = smooth_images(2), AugmentConfig(shift=5 / SIZE)
    right = transformed(config, augment.SHIFT_X, 1.0, images)
    np.testing.assert_allclose(right[:, :, 5:], images[:, :, :-5], atol=0.01)
    np.testing.assert_allclose(right[:, :, :5], np.repeat(images[:, :, :1], 5, axis=2), atol=0.01)
    up = transformed(config, augment.SHIFT_Y, 0.0, images)
    np.testing.assert_allclose(up[:, :-5], images[:, 5:], atol=0.01)


def test_a_positive_zoom_enlarges_about_the_centre() -> None:
    # A cone keeps its apex, and becomes flatter as it is enlarged.
    distance = np.hypot(*(np.indices((SIZE, SIZE)) - SIZE // 2))[None, :, :, None].astype(np.float32)
    enlarged = transformed(AugmentConfig(zoom=0.5), augment.ZOOM, 1.0, 10 * distance)
    reduced = transformed(AugmentConfig(zoom=0.5), augment.ZOOM, 0.0, 10 * distance)
    middle = SIZE // 2
    np.testing.assert_allclose(enlarged[0, middle, middle + 6, 0], 10 * 6 / 1.5, atol=0.1)
    np.testing.assert_allclose(reduced[0, middle, middle + 6, 0], 10 * 6 / 0.5, atol=0.1)
    assert enlarged[0, middle, middle, 0] == 0


def test_a_positive_shear_moves_the_lower_half_to_the_right() -> None:
    columns = np.tile(np.arange(SIZE, dtype=np.float32), (SIZE, 1))[None, :, :, None]
    sheared = transformed(AugmentConfig(shear=0.25), augment.SHEAR, 1.0, columns)
    middle = SIZE // 2
    for down in (-8, 0, 8):
        np.testing.assert_allclose(sheared[0, middle + down, middle, 0], middle - 0.25 * down, atol=0.01)


def test_all_transforms_together_are_the_warp_of_opencv() -> None:
    images, n = smooth_images(40), 40
    draws = some_draws(n)
    changed = augment.apply(images, augment.transforms(EVERYTHING, draws, SIZE)).numpy()
    u = 2 * draws.uniforms - 1
    center = np.array([[1, 0, (SIZE - 1) / 2], [0, 1, (SIZE - 1) / 2], [0, 0, 1]])
    for row in range(n):
        rotation, shift, shear = np.eye(3), np.eye(3), np.eye(3)
        rotation[:2] = cv2.getRotationMatrix2D((0, 0), 40 * u[row, augment.ROTATION], 1)
        shift[:2, 2] = 0.2 * SIZE * u[row, augment.SHIFT_X], 0.2 * SIZE * u[row, augment.SHIFT_Y]
        shear[0, 1] = 0.2 * u[row, augment.SHEAR]
        zoom = 1 + 0.2 * u[row, augment.ZOOM]
        forward = center @ shift @ rotation @ shear @ np.diag([zoom, zoom, 1]) @ np.linalg.inv(center)
        expected = cv2.warpAffine(
            images[row], forward[:2], (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        # OpenCV places pixels on a grid of 1/32.
        np.testing.assert_allclose(changed[row], expected, atol=3)
        assert np.abs(changed[row] - expected).mean() < 0.3


@pytest.mark.parametrize("name", ["rotation_deg", "shift", "shear", "zoom"])
def test_each_transform_spans_its_range_to_both_sides(name: str) -> None:
    config = AugmentConfig(**{name: 0.3 if name != "rotation_deg" else 40.0})
    rows = augment.transforms(config, some_draws(5000), SIZE).astype(np.float64)
    center = (SIZE - 1) / 2
    value, limit = {
        "rotation_deg": (np.rad2deg(np.arctan2(rows[:, 3], rows[:, 4])), 40),
        "shift": (-rows[:, 2] / SIZE, 0.3),
        "shear": (-rows[:, 1], 0.3),
        "zoom": (1 / rows[:, 0] - 1, 0.3),
    }[name]
    assert -limit - 1e-6 <= value.min() < -0.98 * limit
    assert 0.98 * limit < value.max() <= limit + 1e-6
    assert abs(value.mean()) < 0.03 * limit
    if name != "shift":  # the centre stays where it is
        np.testing.assert_allclose(rows[:, 0] * center + rows[:, 1] * center + rows[:, 2], center, atol=1e-4)


def test_colour_factors_span_their_ranges_independently() -> None:
    factors = augment.colours(AugmentConfig(brightness=0.1, contrast=0.2, saturation=0.3), some_draws(5000))
    np.testing.assert_allclose(factors.min(axis=0), [0.9, 0.8, 0.7], atol=0.005)
    np.testing.assert_allclose(factors.max(axis=0), [1.1, 1.2, 1.3], atol=0.005)
    np.testing.assert_allclose(np.corrcoef(factors.T), np.eye(3), atol=0.06)


def colour_reference(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Changes one image step by step, as torchvision does, but clips at the end."""

    def grey(pixels: np.ndarray) -> np.ndarray:
        return pixels if pixels.shape[-1] == 1 else (pixels @ [0.299, 0.587, 0.114])[..., None]

    image = image.astype(np.float64) * brightness
    image = contrast * image + (1 - contrast) * grey(image).mean()
    image = saturation * image + (1 - saturation) * grey(image)
    return np.clip(image, 0, 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_changed_as_published(channels: int) -> None:
    images = smooth_images(30, channels)
    factors = augment.colours(AugmentConfig(brightness=0.9, contrast=0.9, saturation=0.9), some_draws(30))
    changed = augment.apply(images, factors).numpy()
    assert changed.max() == 255  # some are clipped
    for image, row, result in zip(images, factors, changed, strict=True):
        np.testing.assert_allclose(result, colour_reference(image, *row.tolist()), atol=0.01)


def test_each_colour_factor_does_what_its_name_says() -> None:
    image = np.array([[[[100, 50, 20], [40, 80, 60]]]], np.float32)
    grey = image[0, 0] @ np.array([0.299, 0.587, 0.114])
    brighter, contrasty, colourless = (
        augment.apply(image, np.array([row], np.float32)).numpy()[0, 0] for row in ([1.5, 1, 1], [1, 2, 1], [1, 1, 0])
    )
    np.testing.assert_allclose(brighter, 1.5 * image[0, 0], rtol=1e-6)
    np.testing.assert_allclose(contrasty, np.clip(2 * image[0, 0] - grey.mean(), 0, 255), rtol=1e-5)
    np.testing.assert_allclose(colourless, np.repeat(grey[:, None], 3, axis=1), rtol=1e-5)


def test_saturation_leaves_grey_images_as_they_are() -> None:
    images = smooth_images(2, channels=1)
    np.testing.assert_array_equal(augment.apply(images, np.array([[1, 1, 0.2], [1, 1, 1.8]], np.float32)), images)
