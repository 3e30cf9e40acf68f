"""Photographs and weights to measure with: class folders, the solar cells of ELPV, DINOv2 ViT-S/14 without a hub."""
