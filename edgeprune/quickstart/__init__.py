"""The main job on an embedded default: a small residual CNN on handwritten digits, from profile to release."""
