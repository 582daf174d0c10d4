"""Experiments: several arms of a curriculum, trained with several seeds and compared."""
