"""The one part that is compiled: cutting tiles out of JPEGs. Without a C compiler cvdist installs all the same and decodes whole images."""

from setuptools import Extension, setup

TILES = Extension("cvdist._tiles", ["cvdist/_tiles.c"], optional=True, extra_compile_args=["-O3", "-Wall", "-Wextra"])

setup(ext_modules=[TILES])
