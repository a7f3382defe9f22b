"""Which packages a wheel contains; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# kernels/ lies at the top and is fastpix2pix.kernels; the link fastpix2pix/kernels shows it to tools that read the tree
PACKAGES = find_packages(
    include=["fastpix2pix", "fastpix2pix.*"], exclude=["fastpix2pix.kernels", "fastpix2pix.kernels.*"]
)

setup(packages=[*PACKAGES, "fastpix2pix.kernels"], package_dir={"fastpix2pix.kernels": "kernels"})
