"""FFCV: one .beton file of raw pixels or of JPEGs, its own decoder of random crops."""

from __future__ import annotations

from typing import Any

from peers.common import BATCH, SIZE, THREADS, Epochs, Work, number

IS_OWN_CROP = True


def write(work: Work) -> None:
    import cv2
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Photos:
        paths = work.paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, at: int) -> Any:
            return cv2.cvtColor(cv2.imread(str(self.paths[at])), cv2.COLOR_BGR2RGB), number(self.paths[at])

    fields = {"image": RGBImageField(write_mode=work.options["mode"], jpeg_quality=90), "index": IntField()}
    DatasetWriter(str(work.container / "photos.beton"), fields, num_workers=1).from_indexed_dataset(Photos())


def open_epochs(work: Work) -> Epochs:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    loader = Loader(
        str(work.container / "photos.beton"),
        batch_size=BATCH,
        num_workers=THREADS,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=7,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()],
            "index": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return lambda: iter(loader)
