"""DALI on the CPU: its file reader, decoder of random crops, resize and flip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peers.common import BATCH, RATIO_MAX, SCALE_MIN, SIZE, THREADS, Epochs, Work, number

IS_OWN_CROP = True


def open_epochs(work: Work) -> Epochs:
    from nvidia.dali import fn, pipeline_def, types

    paths = work.paths

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, seed=7, prefetch_queue_depth=2)  # type: ignore[untyped-decorator]
    def photos() -> Any:
        files, labels = [str(path) for path in paths], [number(path) for path in paths]
        data, index = fn.readers.file(files=files, labels=labels, shuffle_after_epoch=True, name="files")
        area, ratio = [SCALE_MIN, 1.0], [1 / RATIO_MAX, RATIO_MAX]
        images = fn.decoders.image_random_crop(
            data, device="cpu", random_area=area, random_aspect_ratio=ratio, use_fast_idct=True
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.flip(images, horizontal=fn.random.coin_flip()), index

    pipeline = photos()
    pipeline.build()

    def epoch() -> Iterator[Any]:
        for _ in range(len(paths) // BATCH):
            images, index = pipeline.run()
            yield images.as_array(), index.as_array().ravel()

    return epoch
