"""What is measured of a trained model, and during training."""
