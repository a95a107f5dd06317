"""Benchmarks: time and memory side by side with other implementations, as ratios."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
