"""What pyproject.toml cannot say: configs/, which lies where people edit it, is a part of the installed package."""

from setuptools import find_packages, setup

COPY = "diffexp_jax._installed.configs"  # config_files.py finds it there

setup(packages=[*find_packages(include=["diffexp_jax*"]), COPY], package_dir={COPY: "configs"})
