"""tf.data over TFRecord files: decode_and_crop_jpeg with TensorFlow's fast options, resize, flip, batch."""

from __future__ import annotations

from typing import Any

from peers.common import BATCH, SIZE, THREADS, Epochs, Work

NUM_SHARDS = 8


def write(work: Work) -> None:
    import tensorflow as tf

    writers = [tf.io.TFRecordWriter(str(work.container / f"{shard:03d}.tfrecord")) for shard in range(NUM_SHARDS)]
    for index, data in work.records():
        image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))
        label = tf.train.Feature(int64_list=tf.train.Int64List(value=[index]))
        example = tf.train.Example(features=tf.train.Features(feature={"image": image, "index": label}))
        writers[index % NUM_SHARDS].write(example.SerializeToString())
    for writer in writers:
        writer.close()


def open_epochs(work: Work) -> Epochs:
    import tensorflow as tf

    transform = work.transform
    # x, y, w, h -> y, x, h, w, as TensorFlow has it
    boxes, flips = tf.constant(transform.boxes[:, [1, 0, 3, 2]]), tf.constant(transform.flips)
    features = {"image": tf.io.FixedLenFeature([], tf.string), "index": tf.io.FixedLenFeature([], tf.int64)}

    def decode(record: Any) -> Any:
        example = tf.io.parse_single_example(record, features)
        index = example["index"]
        pixels = tf.image.decode_and_crop_jpeg(
            example["image"], boxes[index], 3, fancy_upscaling=False, dct_method="INTEGER_FAST"
        )
        pixels = tf.image.resize(pixels, (SIZE, SIZE))
        pixels = tf.cond(flips[index], lambda: tf.reverse(pixels, [1]), lambda: pixels)
        return tf.cast(pixels, tf.uint8), index

    options = tf.data.Options()
    options.threading.private_threadpool_size = THREADS
    options.threading.max_intra_op_parallelism = 1
    options.deterministic = False
    files = sorted(str(path) for path in work.container.glob("*.tfrecord"))
    dataset = tf.data.TFRecordDataset(files, num_parallel_reads=2).shuffle(1000, seed=7)
    dataset = dataset.map(decode, num_parallel_calls=THREADS).batch(BATCH).prefetch(2).with_options(options)
    return lambda: iter(dataset)
