"""Fused operations per device, each beside its plain-torch reference."""
