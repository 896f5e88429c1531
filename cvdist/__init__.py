"""cvdist: distributed training for image classification on data sets that live on HDFS."""

__version__ = "0.1.0"
