"""Checkpoint files without torch: headers, configurations, arithmetic of sizes."""
