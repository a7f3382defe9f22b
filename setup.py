"""Which packages a wheel contains; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["fastpix2pix", "fastpix2pix.*"]))
