"""Measurements: how fast the host side is on this machine, and how good its selection is."""
