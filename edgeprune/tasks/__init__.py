"""What a model is for: loaders, loss and metric, per objective."""
