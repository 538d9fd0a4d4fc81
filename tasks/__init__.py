"""The mathematics of flatcensus: checkpoints, images, estimators. Knows no machinery."""
