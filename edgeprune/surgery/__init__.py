"""Plans, cutting, checking, saving and loading."""
