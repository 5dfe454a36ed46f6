"""What runs on the target: runtimes, timing, parity and bundles, with numpy and one runtime only."""
