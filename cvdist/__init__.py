"""cvdist: distributed training for image classification on data sets that live on HDFS."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvdist.dataset import image_dataset_from_shards

__version__ = "0.1.0"
__all__ = ["__version__", "image_dataset_from_shards"]


def __getattr__(name: str) -> Any:
    """Imports what is public when it is asked for: `import cvdist` and the command line stay quick."""
    if name == "image_dataset_from_shards":
        from cvdist.dataset import image_dataset_from_shards

        return image_dataset_from_shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
