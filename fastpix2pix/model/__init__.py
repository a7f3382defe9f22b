"""Generator and discriminator of pix2pix."""

from .patchgan import PatchGAN, build_discriminator
from .unet import Unet, build_generator

__all__ = ["PatchGAN", "Unet", "build_discriminator", "build_generator"]
