"""Petastorm's `_common_metadata` for the folder of a split, so that a split of ours is a Petastorm data set as well."""

from __future__ import annotations

import io
import json
import pickle
import posixpath
import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cvdist.shards import SCHEMA, Shard


def petastorm_metadata(shards: Sequence[Shard], codec: str, schema: pa.Schema = SCHEMA) -> bytes | None:
    """Returns the bytes of Petastorm's `_common_metadata` for the folder of a split, or None where Petastorm is not installed.

    Source: Petastorm 0.13, etl/dataset_metadata.py: a pickled Unischema and the row groups per file, in the file's metadata.
    """
    try:
        from petastorm.codecs import CompressedImageCodec, NdarrayCodec
        from petastorm.unischema import Unischema, UnischemaField
    except ImportError:
        return None
    image_codec = CompressedImageCodec("jpeg") if codec == "jpeg" else NdarrayCodec()
    image = UnischemaField("image", np.uint8, (None, None, None), image_codec, False)
    kinds = {pa.string(): np.str_, pa.int32(): np.int32, pa.int64(): np.int64, pa.float32(): np.float32}
    scalars = [field for field in schema if field.name != "image"]
    # Interned, because a pickle shows which strings are one object: the same bytes in every process.
    names = [sys.intern(field.name) for field in scalars]
    fields = [image, *(UnischemaField(name, kinds[schema.field(name).type], (), None, False) for name in names)]
    groups = {posixpath.basename(shard.path): len(shard.row_group_rows) for shard in shards}
    described = schema.with_metadata(
        {
            b"dataset-toolkit.unischema.v1": pickle.dumps(Unischema("CvdistSchema", fields), protocol=2),
            b"dataset-toolkit.num_row_groups_per_file.v1": json.dumps(groups).encode(),
        }
    )
    buffer = io.BytesIO()
    pq.write_metadata(described, buffer)
    return buffer.getvalue()
