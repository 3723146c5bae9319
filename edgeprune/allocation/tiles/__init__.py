"""How many tiles each layer keeps."""
