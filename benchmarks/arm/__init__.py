"""Packages on an Arm processor, which qemu stands in for: the same results as here."""
