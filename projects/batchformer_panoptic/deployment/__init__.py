"""Trained models in formats that need neither Detectron2 nor this package."""
