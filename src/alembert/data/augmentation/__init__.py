"""Further training texts out of a task's own: words are replaced by others that fit (TinyBERT)."""

from alembert.data.augmentation.dataset import augment
from alembert.data.augmentation.options import AugmentationOptions
from alembert.data.augmentation.vectors import WordVectors, load_word_vectors
from alembert.data.augmentation.writing import write_augmented

__all__ = ["AugmentationOptions", "WordVectors", "augment", "load_word_vectors", "write_augmented"]
